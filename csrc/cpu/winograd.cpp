// 3x3 convolutions of stride 1 and padding 1, of tensors that lie in memory as [N, H, W, C], by Winograd's F(4x4, 3x3): see
// winograd.h. Each of the 36 numbers of the tiles' transforms is a product of matrices, [tiles, C] [C, K] forward and
// [K, tiles] [tiles, C] for the weights' gradient. They are made in pieces that stay in the second-level cache. A tile's
// numbers are added in one order whatever tiles are beside it, so that no result depends on the batch or on threads.
#include <algorithm>
#include <tuple>

#include "memory.h"

namespace dgf {
namespace {

constexpr int64_t kSide = 6, kNumbers = kSide * kSide;  // of a patch
constexpr int64_t kBlockBytes = 768 << 10;               // of the transforms of a block
constexpr int64_t kInputs = 128;                         // whose weights are transformed at a time, of few tiles
constexpr int64_t kLeast = 28;                           // tiles of a block of a sum: each reads and writes all sums
constexpr int64_t kRunTiles = 256, kRuns = 16;           // of a run at least, and runs at most
constexpr int64_t kSplit = 64;                           // outputs of a task that sums

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t parts(int64_t n, int64_t each) { return (n + each - 1) / each; }

// The distance, of n numbers or a little more, of arrays that are walked through side by side: an odd number of cache lines,
// or they would meet in few places of the cache.
int64_t apart(int64_t n) { return (parts(n, 16) | 1) * 16; }

// A batch of images as tiles of 4x4 pixels.
struct Tiles {
  int64_t N, height, width;

  int64_t across() const { return parts(width, 4); }
  int64_t per_image() const { return parts(height, 4) * across(); }
  int64_t count() const { return N * per_image(); }
  int64_t image(int64_t tile) const { return tile / per_image(); }
  int64_t top(int64_t tile) const { return tile % per_image() / across() * 4; }
  int64_t left(int64_t tile) const { return tile % across() * 4; }

  // Where SIDE x SIDE pixels from row y and column z of an image on are: `zeros` for those outside of it.
  template <int SIDE>
  void point(const float* x, int64_t channels, const float* zeros, int64_t n, int64_t y, int64_t z, const float** to) const {
    for (int64_t i = y; i < y + SIDE; ++i)
      for (int64_t j = z; j < z + SIDE; ++j) {
        const bool inside = i >= 0 && i < height && j >= 0 && j < width;
        *to++ = inside ? x + ((n * height + i) * width + j) * channels : zeros;
      }
  }
};

struct Zeros : Room<float> {
  explicit Zeros(int64_t n) : Room<float>(n) { std::fill_n(static_cast<float*>(*this), n, 0.0f); }
};

// The inputs of a convolution, or the gradients of its outputs, and their transforms: number i of tile t at i step + t row.
struct Images {
  const Winograd& w;
  const Tiles& tiles;
  const float *pixels, *zeros;
  int64_t channels, first_channel, channels_here;

  int64_t row() const { return up_to(channels_here, w.panel); }
  int64_t step(int64_t count) const { return apart(count * row()); }

  void patches(int64_t first, int64_t count, float* to, int64_t step) const {
    for (int64_t t = first; t < first + count; ++t, to += row()) {
      const float* at[kNumbers];
      tiles.point<kSide>(pixels + first_channel, channels, zeros, tiles.image(t), tiles.top(t) - 1, tiles.left(t) - 1, at);
      w.patch(at, channels_here, to, step);
    }
  }

  // adds the gradients to `sums`, in whole vectors
  void gradients(int64_t first, int64_t count, float* to, int64_t step, float* sums) const {
    for (int64_t t = first; t < first + count; ++t, to += row()) {
      const float* at[16];
      tiles.point<4>(pixels + first_channel, channels, zeros, tiles.image(t), tiles.top(t), tiles.left(t), at);
      w.tile_back(at, channels_here, to, step, sums);
    }
  }
};

// The transforms of the weights from some inputs to a panel of outputs: number i of input c at i step + c panel.
void transform(const Winograd& w, const WinogradWeights& from, int64_t first, int64_t inputs, int64_t output, int64_t out,
               float* to, int64_t step) {
  for (int64_t half = 0; half < w.panel; half += w.panel / 2) {
    const int64_t k = output + half, outputs = std::clamp<int64_t>(out - k, 0, w.panel / 2);
    for (int64_t c = first; c < first + inputs; c += kWinogradInputs) {
      WinogradWeights mine = from;
      mine.data += k * from.output + c * from.input;
      w.weights(mine, std::min(kWinogradInputs, first + inputs - c), outputs, to + half + (c - first) * w.panel, step,
                w.panel);
    }
  }
}

struct Convolution {
  const Winograd& w;
  const Tiles& tiles;
  int64_t in, out;
  const float* x;
  WinogradWeights weights;
  const float* bias;
  float* result;

  void run() const {
    const Zeros zeros(up_to(in, w.panel));
    const Images images{w, tiles, x, zeros, in, 0, in};
    tiles.count() <= out ? by_panels(images) : by_blocks(images);
  }

 private:
  // All weights are transformed beforehand, some tiles at a time.
  void by_blocks(const Images& images) const {
    const int64_t panels = parts(out, w.panel), each = parts(in, kWinogradInputs), number = apart(panels * in * w.panel);
    Room<float> all(kNumbers * number);
    for_tasks(panels * each, [&](int64_t task) {
      const int64_t k = task / each * w.panel, c = task % each * kWinogradInputs;
      transform(w, weights, c, std::min(kWinogradInputs, in - c), k, out, all + k * in + c * w.panel, number);
    });
    const int64_t size = block_size(), step = images.step(size), product = apart(size * w.panel);
    for_tasks(parts(tiles.count(), size), [&](int64_t block) {
      const int64_t first = block * size, count = std::min(size, tiles.count() - first);
      Room<float> patches(kNumbers * step), products(kNumbers * product);
      images.patches(first, count, patches, step);
      for (int64_t k = 0; k < out; k += w.panel) {
        for (int64_t i = 0; i < kNumbers; ++i)
          w.product({count, in, patches + i * step, images.row(), 1, all + i * number + k * in, w.panel, w.panel / 2,
                     products + i * product, w.panel});
        write(first, count, k, products, product);
      }
    });
  }

  // As many tiles as fit, in as many blocks as there are threads or a multiple of them.
  int64_t block_size() const {
    const int64_t tile = kNumbers * up_to(in, w.panel) * int64_t(sizeof(float));
    const int64_t fit = std::max<int64_t>(kBlockBytes / tile / w.rows, 1) * w.rows;
    const int64_t blocks = up_to(parts(tiles.count(), fit), std::max<int64_t>(torch::stable::get_num_threads(), 1));
    return std::min(fit, up_to(parts(tiles.count(), blocks), w.rows));
  }

  // All tiles are transformed beforehand, some weights at a time: of few tiles the transforms are the smaller ones.
  void by_panels(const Images& images) const {
    const int64_t step = images.step(tiles.count()), product = apart(tiles.count() * w.panel);
    Room<float> patches(kNumbers * step);
    for_tasks(tiles.count(), [&](int64_t t) { images.patches(t, 1, patches + t * images.row(), step); });
    for_tasks(parts(out, w.panel), [&](int64_t panel) {
      const int64_t k = panel * w.panel, number = apart(kInputs * w.panel);
      Room<float> some(kNumbers * number), products(kNumbers * product);
      for (int64_t c = 0; c < in; c += kInputs) {
        const int64_t inputs = std::min(kInputs, in - c);
        transform(w, weights, c, inputs, k, out, some, number);
        for (int64_t i = 0; i < kNumbers; ++i)
          (c ? w.add_product : w.product)({tiles.count(), inputs, patches + i * step + c, images.row(), 1,
                                           some + i * number, w.panel, w.panel / 2, products + i * product, w.panel});
      }
      write(0, tiles.count(), k, products, product);
    });
  }

  // What becomes of the products of some tiles with the panel of outputs from k on.
  void write(int64_t first, int64_t count, int64_t k, const float* products, int64_t step) const {
    for (int64_t t = first; t < first + count; ++t, products += w.panel) {
      const int64_t y = tiles.top(t), z = tiles.left(t);
      w.tile(products, step, bias ? bias + k : nullptr, std::min<int64_t>(w.panel, out - k),
             std::min<int64_t>(4, tiles.height - y), std::min<int64_t>(4, tiles.width - z),
             result + ((tiles.image(t) * tiles.height + y) * tiles.width + z) * out + k, tiles.width * out, out);
    }
  }
};

struct WeightGradient {
  const Winograd& w;
  const Tiles& tiles;
  int64_t in, out;
  const float *x, *grad;
  float *weight, *bias;

  void run() const {
    const Zeros zeros(up_to(std::max(in, out), w.panel));
    const Images inputs{w, tiles, x, zeros, in, 0, in}, outputs{w, tiles, grad, zeros, out, 0, out};
    tiles.count() <= std::min(in, out) ? by_outputs(inputs, outputs) : by_runs(inputs, outputs);
  }

 private:
  // All tiles are transformed beforehand. The sums of some outputs are turned into weights as soon as they are made.
  void by_outputs(const Images& inputs, const Images& outputs) const {
    const int64_t step = inputs.step(tiles.count()), step_out = outputs.step(tiles.count()), row = inputs.row();
    Room<float> patches(kNumbers * step), gradients(kNumbers * step_out);
    const Zeros lines(tiles.count() * outputs.row());  // a tile's sums
    for_tasks(tiles.count(), [&](int64_t t) {
      inputs.patches(t, 1, patches + t * row, step);
      outputs.gradients(t, 1, gradients + t * outputs.row(), step_out, lines + t * outputs.row());
    });
    const int64_t each = 2 * w.rows, number = apart(each * row);
    for_tasks(parts(out, each), [&](int64_t task) {
      const int64_t first = task * each, outs = std::min(each, out - first);
      Room<float> sums(kNumbers * number);
      for (int64_t i = 0; i < kNumbers; ++i)
        for (int64_t c = 0; c < in; c += w.panel)
          w.product({outs, tiles.count(), gradients + i * step_out + first, 1, outputs.row(), patches + i * step + c, row,
                     w.panel / 2, sums + i * number + c, row});
      for (int64_t k = 0; k < outs; ++k) {
        w.weights_back(sums + k * row, number, 1, 0, in, weight + (first + k) * 9 * in);
        double total = 0;
        for (int64_t t = 0; t < tiles.count(); ++t) total += double(lines[t * outputs.row() + first + k]);
        bias[first + k] = static_cast<float>(total);
      }
    });
  }

  // Runs of tiles have sums of their own, added up in the end. Their number depends on shapes alone.
  void by_runs(const Images& inputs, const Images& outputs) const {
    const int64_t runs = std::clamp<int64_t>(tiles.count() / kRunTiles, 1, kRuns), splits = parts(out, kSplit);
    const int64_t row = inputs.row(), sum = kNumbers * kSplit * row;  // of a split, all runs one after the other
    Room<float> sums(splits * runs * sum);
    Room<double> biases(splits * runs * kSplit);
    for_tasks(splits * runs, [&](int64_t task) {
      Images mine = outputs;
      mine.first_channel = task / runs * kSplit;
      mine.channels_here = std::min(kSplit, out - mine.first_channel);
      const int64_t begin = tiles.count() * (task % runs) / runs, end = tiles.count() * (task % runs + 1) / runs;
      add_up(inputs, mine, begin, end, sums + task * sum, biases + task * kSplit);
    });
    for_tasks(out, [&](int64_t k) {
      const int64_t split = k / kSplit * runs, outs = std::min(kSplit, out - k / kSplit * kSplit), place = k % kSplit;
      w.weights_back(sums + split * sum + place * row, outs * row, runs, sum, in, weight + k * 9 * in);
      double total = 0;
      for (int64_t r = 0; r < runs; ++r) total += biases[(split + r) * kSplit + place];
      bias[k] = static_cast<float>(total);
    });
  }

  // The sums [36, outputs here, inputs in whole panels] over a run of tiles, and those of the gradients alone.
  void add_up(const Images& inputs, const Images& outputs, int64_t begin, int64_t end, float* sums, double* lines) const {
    const int64_t row = inputs.row(), up = outputs.row(), outs = outputs.channels_here;
    const int64_t fit = kBlockBytes / (kNumbers * (row + up) * int64_t(sizeof(float)));
    const int64_t size = std::min(std::max(kLeast, fit), std::max<int64_t>(end - begin, 1));
    const int64_t step = inputs.step(size), step_out = outputs.step(size);
    Room<float> patches(kNumbers * step), gradients(kNumbers * step_out), line(up);
    std::fill_n(sums, kNumbers * outs * row, 0.0f);
    std::fill_n(lines, outs, 0.0);
    for (int64_t first = begin; first < end; first += size) {
      const int64_t count = std::min(size, end - first);
      std::fill_n(static_cast<float*>(line), up, 0.0f);
      inputs.patches(first, count, patches, step);
      outputs.gradients(first, count, gradients, step_out, line);
      for (int64_t k = 0; k < outs; ++k) lines[k] += double(line[k]);
      for (int64_t i = 0; i < kNumbers; ++i)
        for (int64_t c = 0; c < in; c += w.panel)
          w.add_product({outs, count, gradients + i * step_out, 1, up, patches + i * step + c, row, w.panel / 2,
                         sums + i * outs * row + c, row});
    }
  }
};

void check(bool fits) {
  STD_TORCH_CHECK(fits, "diffgan_fast: expected float32 on the CPU, images in channels_last, weights [K, C, 3, 3], and "
                        "shapes that fit");
}

bool is_image(const Tensor& x) { return dtype_of(x) == Dtype::f32 && x.is_cpu() && is_channels_last(x); }

const float* data_of(const Tensor& x) { return static_cast<const float*>(x.data_ptr()); }

Tensor new_image(const Tensor& like, int64_t N, int64_t C, int64_t height, int64_t width) {
  const int64_t sizes[4] = {N, C, height, width}, strides[4] = {height * width * C, 1, width * C, C};
  return uninitialized(like, 4, sizes, strides);
}

// The convolution of x [N, C, H, W] with weight [K, C, 3, 3] and bias [K]; or where `transposed` its gradient with respect
// to its input: that of x [N, K, H, W] with the weights turned around.
Tensor conv2d_winograd(Tensor x, Tensor weight, MaybeTensor bias, bool transposed) {
  check(is_image(x) && dtype_of(weight) == Dtype::f32 && weight.is_cpu() && weight.dim() == 4 && weight.size(2) == 3 &&
        weight.size(3) == 3 && weight.size(transposed ? 0 : 1) == x.size(1));
  const int64_t in = x.size(1), to = transposed ? 1 : 0, out = weight.size(to);
  check(!bias || (dtype_of(*bias) == Dtype::f32 && bias->dim() == 1 && bias->size(0) == out && bias->is_contiguous()));
  const Tiles tiles{x.size(0), x.size(2), x.size(3)};
  Tensor result = new_image(x, tiles.N, out, tiles.height, tiles.width);
  WinogradWeights weights{data_of(weight), weight.stride(to), weight.stride(1 - to), weight.stride(2), weight.stride(3)};
  if (transposed) {
    weights.data += 2 * weights.down + 2 * weights.right;
    weights.down = -weights.down;
    weights.right = -weights.right;
  }
  Convolution{*kernels().winograd, tiles, in, out, data_of(x), weights, bias ? data_of(*bias) : nullptr,
              static_cast<float*>(result.data_ptr())}.run();
  return result;
}

// dW [K, C, 3, 3] in channels_last and db [K], from x [N, C, H, W] and the gradient of the output [N, K, H, W].
std::tuple<Tensor, Tensor> conv2d_winograd_weight_gradient(Tensor x, Tensor grad) {
  check(is_image(x) && is_image(grad) && x.size(0) == grad.size(0) && x.size(2) == grad.size(2) &&
        x.size(3) == grad.size(3));
  const Tiles tiles{x.size(0), x.size(2), x.size(3)};
  const int64_t in = x.size(1), out = grad.size(1);
  Tensor weight = new_image(x, out, in, 3, 3), bias = uninitialized_vector(x, out);
  WeightGradient{*kernels().winograd, tiles, in, out, data_of(x), data_of(grad), static_cast<float*>(weight.data_ptr()),
                 static_cast<float*>(bias.data_ptr())}.run();
  return {weight, bias};
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CPU, m) {
  if (dgf::kernels().winograd) {
    m.impl("conv2d_winograd", TORCH_BOX(&dgf::conv2d_winograd));
    m.impl("conv2d_winograd_weight_gradient", TORCH_BOX(&dgf::conv2d_winograd_weight_gradient));
  }
}
