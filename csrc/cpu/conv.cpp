// The gradient of a convolution's weights and biases, of tensors that lie in memory as [N, H, W, C]:
//
//   dW[o, i, j, c] = sum_nyx dY[n, y, x, o] X[n, y s + i - p, x s + j - p, c],   db[o] = sum_nyx dY[n, y, x, o]
//
// For every tap (i, j) a product of matrices over all pixels, in blocks: dY is copied by tiles of kTileRows channels, and
// for each tap X by panels of kPanel, with zeros where the tap is outside of the image; all tiles meet a panel while it is
// in the first-level cache. Runs of blocks have sums of their own, added up in the end: their number depends on shapes
// alone, so no result depends on the number of threads.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "memory.h"
#include "products.h"

namespace dgf {
namespace {

constexpr int64_t kPixels = 256;  // of a block at most, but for images that are wider
// A run of blocks has so many pixels and multiplications at least, beside which its sums cost little; and there are so
// many runs at most.
constexpr int64_t kRunPixels = 512, kRunWork = 4 << 20, kRuns = 16;
constexpr int64_t kTile = kTileRows * kPanel;

struct Conv {
  int64_t N, height, width, in;  // X
  int64_t rows, columns, out;    // dY
  int64_t kernel, stride, padding;

  int64_t taps() const { return kernel * kernel; }
  int64_t panels() const { return (in + kPanel - 1) / kPanel; }
  int64_t tiles() const { return (out + kTileRows - 1) / kTileRows; }
  int64_t first(int64_t tile) const { return out * tile / tiles(); }  // channel of a tile; they differ by one at most
  int64_t sums() const { return tiles() * panels() * taps() * kTile; }
};

// How the pixels of dY are cut: into blocks of whole rows of an image, or of whole images.
struct Blocks {
  int64_t images, rows, per_image, count;

  explicit Blocks(const Conv& c) {
    rows = std::clamp<int64_t>(kPixels / std::max<int64_t>(c.columns, 1), 1, std::max<int64_t>(c.rows, 1));
    images = std::max<int64_t>(rows == c.rows ? kPixels / (rows * std::max<int64_t>(c.columns, 1)) : 1, 1);
    per_image = (c.rows + rows - 1) / rows;
    count = (c.N + images - 1) / images * per_image;
  }
};

// `width` numbers of each of `count` pixels, `stride` apart, one after the other. Of constant width: moves, no calls.
template <int width> void gather(int64_t count, const float* from, int64_t stride, float* to) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * width, from + i * stride, width * sizeof(float));
}

// The sums of one run of blocks.
class Run {
 public:
  Run(const Conv& c, const Blocks& b, const float* x, const float* grad, float* sums, double* bias)
      : c_(c), b_(b), x_(x), grad_(grad), sums_(sums), bias_(bias),
        tile_(b.images * b.rows * c.columns * kTileRows), tiles_(c.tiles() * tile_),
        panel_(b.images * b.rows * c.columns * kPanel), row_(c.out) {
    std::fill_n(sums, c.sums(), 0.0f);
    std::fill_n(bias, c.out, 0.0);
  }

  void block(int64_t index) {
    const int64_t n = index / b_.per_image * b_.images, y = index % b_.per_image * b_.rows;
    const int64_t images = std::min(b_.images, c_.N - n), rows = std::min(b_.rows, c_.rows - y);
    const int64_t pixels = images * rows * c_.columns;
    const float* grad = grad_ + (n * c_.rows + y) * c_.columns * c_.out;
    copy_grad(grad, pixels);
    add_bias(grad, pixels);
    float* sums = sums_;
    for (int64_t p = 0; p < c_.panels(); ++p) {
      for (int64_t tap = 0; tap < c_.taps(); ++tap) {
        copy_x(p, tap, n, y, images, rows);
        for (int64_t t = 0; t < c_.tiles(); ++t, sums += kTile)
          kernels().add_outer(c_.first(t + 1) - c_.first(t), pixels, tiles_ + t * tile_, panel_, sums);
      }
    }
  }

 private:
  // Panel p as a tap sees it.
  void copy_x(int64_t p, int64_t tap, int64_t n, int64_t y, int64_t images, int64_t rows) {
    const int64_t up = tap / c_.kernel - c_.padding, left = tap % c_.kernel - c_.padding;
    const int64_t channels = std::min(kPanel, c_.in - p * kPanel);
    // the columns first … last - 1 see some of the image
    const int64_t first = std::min(left < 0 ? (c_.stride - 1 - left) / c_.stride : 0, c_.columns);
    const int64_t last = std::clamp((c_.width - left + c_.stride - 1) / c_.stride, first, c_.columns);
    float* to = panel_;
    for (int64_t m = n; m < n + images; ++m) {
      for (int64_t r = y; r < y + rows; ++r, to += c_.columns * kPanel) {
        const int64_t row = r * c_.stride + up;
        if (row < 0 || row >= c_.height) {
          std::fill_n(to, c_.columns * kPanel, 0.0f);
          continue;
        }
        std::fill_n(to, first * kPanel, 0.0f);
        std::fill_n(to + last * kPanel, (c_.columns - last) * kPanel, 0.0f);
        const float* from = x_ + ((m * c_.height + row) * c_.width + left) * c_.in + p * kPanel;
        if (channels == kPanel) {
          gather<kPanel>(last - first, from + first * c_.stride * c_.in, c_.stride * c_.in, to + first * kPanel);
          continue;
        }
        for (int64_t i = first; i < last; ++i)
          std::fill(std::copy_n(from + i * c_.stride * c_.in, channels, to + i * kPanel), to + (i + 1) * kPanel, 0.0f);
      }
    }
  }

  void copy_grad(const float* grad, int64_t pixels) {
    for (int64_t t = 0; t < c_.tiles(); ++t) {
      const float* from = grad + c_.first(t);
      float* to = tiles_ + t * tile_;
      switch (c_.first(t + 1) - c_.first(t)) {
        case 6: gather<6>(pixels, from, c_.out, to); break;
        case 5: gather<5>(pixels, from, c_.out, to); break;
        case 4: gather<4>(pixels, from, c_.out, to); break;
        case 3: gather<3>(pixels, from, c_.out, to); break;
        case 2: gather<2>(pixels, from, c_.out, to); break;
        default: gather<1>(pixels, from, c_.out, to);
      }
    }
  }

  void add_bias(const float* grad, int64_t pixels) {
    std::fill_n(static_cast<float*>(row_), c_.out, 0.0f);
    for (int64_t i = 0; i < pixels; ++i) {
      const float* __restrict from = grad + i * c_.out;
      float* __restrict row = row_;
      for (int64_t o = 0; o < c_.out; ++o) row[o] += from[o];
    }
    for (int64_t o = 0; o < c_.out; ++o) bias_[o] += double(row_[o]);
  }

  const Conv& c_;
  const Blocks& b_;
  const float *x_, *grad_;
  float* sums_;
  double* bias_;
  int64_t tile_;
  Room<float> tiles_, panel_, row_;
};

// All runs' sums of a panel at a tap, in the order of the weights.
void add_up(const Conv& c, int64_t runs, const float* sums, int64_t p, int64_t tap, float* weight) {
  const int64_t width = std::min(kPanel, c.in - p * kPanel);
  const float* from = sums + (p * c.taps() + tap) * c.tiles() * kTile;
  for (int64_t t = 0; t < c.tiles(); ++t, from += kTile) {
    for (int64_t o = c.first(t); o < c.first(t + 1); ++o) {
      float total[kPanel] = {};
      for (int64_t k = 0; k < runs; ++k)
        for (int64_t i = 0; i < kPanel; ++i) total[i] += from[k * c.sums() + (o - c.first(t)) * kPanel + i];
      std::copy_n(total, width, weight + (o * c.taps() + tap) * c.in + p * kPanel);
    }
  }
}

Conv make_conv(const Tensor& x, const Tensor& grad, int64_t kernel, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(dtype_of(x) == Dtype::f32 && dtype_of(grad) == Dtype::f32 && is_channels_last(x) &&
                      is_channels_last(grad) && grad.is_cpu() && x.size(0) == grad.size(0),
                  "diffgan_fast: x and grad must be float32 in channels_last, with the same number of samples");
  STD_TORCH_CHECK(kernel >= 1 && stride >= 1 && padding >= 0, "diffgan_fast: the convolution is impossible");
  const Conv c{x.size(0),    x.size(2), x.size(3), x.size(1), grad.size(2),
               grad.size(3), grad.size(1), kernel, stride,    padding};
  const auto fits = [&](int64_t size, int64_t out) { return out == (size + 2 * padding - kernel) / stride + 1; };
  STD_TORCH_CHECK(fits(c.height, c.rows) && fits(c.width, c.columns), "diffgan_fast: grad does not fit x");
  return c;
}

// dW [out, in, kernel, kernel] in channels_last, and db [out].
std::tuple<Tensor, Tensor> conv2d_weight_gradient(Tensor x, Tensor grad, int64_t kernel, int64_t stride, int64_t padding) {
  const Conv c = make_conv(x, grad, kernel, stride, padding);
  const int64_t sizes[4] = {c.out, c.in, kernel, kernel}, strides[4] = {c.taps() * c.in, 1, kernel * c.in, c.in};
  Tensor weight = uninitialized(x, 4, sizes, strides), bias = uninitialized_vector(x, c.out);
  const Blocks blocks(c);
  const int64_t pixels = c.N * c.rows * c.columns, work = pixels * c.out * c.in * c.taps();
  const int64_t runs = std::max<int64_t>(1, std::min({blocks.count, kRuns, pixels / kRunPixels, work / kRunWork}));
  const auto *from = static_cast<const float*>(x.data_ptr()), *g = static_cast<const float*>(grad.data_ptr());
  auto *w = static_cast<float*>(weight.data_ptr()), *b = static_cast<float*>(bias.data_ptr());
  Room<float> sums(runs * c.sums());
  Room<double> biases(runs * c.out);
  for_tasks(runs, [&](int64_t k) {
    Run run(c, blocks, from, g, sums + k * c.sums(), biases + k * c.out);
    for (int64_t i = blocks.count * k / runs; i < blocks.count * (k + 1) / runs; ++i) run.block(i);
  });
  for_tasks(c.panels() * c.taps(), [&](int64_t i) { add_up(c, runs, sums, i / c.taps(), i % c.taps(), w); });
  for (int64_t o = 0; o < c.out; ++o) {
    double total = 0;
    for (int64_t k = 0; k < runs; ++k) total += biases[k * c.out + o];
    b[o] = static_cast<float>(total);
  }
  return {weight, bias};
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CPU, m) {
  if (dgf::kernels().add_outer) m.impl("conv2d_weight_gradient", TORCH_BOX(&dgf::conv2d_weight_gradient));
}
