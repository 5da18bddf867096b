// The loops of winograd.cpp, on vectors: V holds neighbouring channels of a pixel.
//
// Winograd's F(4x4, 3x3): a tile of 4x4 outputs is A^T [(G g G^T) . (B^T d B)] A of the patch d of 6x6 inputs it sees and
// of the weights g: 36 multiplications for each pair of channels where the definition takes 144 (Lavin and Gray 2016, §4).
// The polynomials are evaluated at 0, +-3/4, +-3/2 and infinity: at the usual 0, +-1, +-2 rounding errors are more than
// twice as large, and these make A and B exact in float32.
#pragma once
#include <algorithm>

#include "products.h"

namespace dgf {
namespace {

constexpr float kNear = 0.75f, kNear2 = kNear * kNear, kNear3 = kNear2 * kNear;
constexpr float kFar = 1.5f, kFar2 = kFar * kFar, kFar3 = kFar2 * kFar;
constexpr float kNearFactor = 1 / (2 * kNear2 * (kNear2 - kFar2)), kFarFactor = 1 / (2 * kFar2 * (kFar2 - kNear2));

// B^T d, of the numbers `step` apart
template <class V> inline void patch_line(const typename V::F* d, int step, typename V::F* out) {
  using F = typename V::F;
  const F d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  const F sum = V::splat(-(kNear2 + kFar2)), product = V::splat(kNear2 * kFar2);
  const F even_near = V::fma(V::splat(-kFar2), d2, d4), odd_near = V::fma(V::splat(-kFar2), d1, d3);
  const F even_far = V::fma(V::splat(-kNear2), d2, d4), odd_far = V::fma(V::splat(-kNear2), d1, d3);
  out[0] = V::fma(sum, d2, V::fma(product, d0, d4));
  out[1] = V::fma(V::splat(kNear), odd_near, even_near);
  out[2] = V::fma(V::splat(-kNear), odd_near, even_near);
  out[3] = V::fma(V::splat(kFar), odd_far, even_far);
  out[4] = V::fma(V::splat(-kFar), odd_far, even_far);
  out[5] = V::fma(sum, d3, V::fma(product, d1, d5));
}

// A^T m
template <class V> inline void tile_line(const typename V::F* m, int step, typename V::F* out) {
  using F = typename V::F;
  const F even_near = V::add(m[step], m[2 * step]), odd_near = V::sub(m[step], m[2 * step]);
  const F even_far = V::add(m[3 * step], m[4 * step]), odd_far = V::sub(m[3 * step], m[4 * step]);
  out[0] = V::add(V::add(m[0], even_near), even_far);
  out[1] = V::fma(V::splat(kFar), odd_far, V::mul(V::splat(kNear), odd_near));
  out[2] = V::fma(V::splat(kFar2), even_far, V::mul(V::splat(kNear2), even_near));
  out[3] = V::fma(V::splat(kFar3), odd_far, V::fma(V::splat(kNear3), odd_near, m[5 * step]));
}

// G g
template <class V> inline void weight_line(const typename V::F* g, int step, typename V::F* out) {
  using F = typename V::F;
  constexpr float near = kNearFactor, far = kFarFactor;
  const F g0 = g[0], g1 = g[step], g2 = g[2 * step];
  const F even_near = V::fma(V::splat(near * kNear2), g2, V::mul(V::splat(near), g0));
  const F even_far = V::fma(V::splat(far * kFar2), g2, V::mul(V::splat(far), g0));
  out[0] = V::mul(V::splat(1 / (kNear2 * kFar2)), g0);
  out[1] = V::fma(V::splat(near * kNear), g1, even_near);
  out[2] = V::fma(V::splat(-near * kNear), g1, even_near);
  out[3] = V::fma(V::splat(far * kFar), g1, even_far);
  out[4] = V::fma(V::splat(-far * kFar), g1, even_far);
  out[5] = g2;
}

// A y, of four numbers, and G^T u, of six: the transposes of what is above.
template <class V> inline void tile_line_back(const typename V::F* y, int step, typename V::F* out) {
  using F = typename V::F;
  const F y0 = y[0], y1 = y[step], y2 = y[2 * step], y3 = y[3 * step];
  const F even_near = V::fma(V::splat(kNear2), y2, y0), even_far = V::fma(V::splat(kFar2), y2, y0);
  const F odd_near = V::fma(V::splat(kNear3), y3, V::mul(V::splat(kNear), y1));
  const F odd_far = V::fma(V::splat(kFar3), y3, V::mul(V::splat(kFar), y1));
  out[0] = y0;
  out[1] = V::add(even_near, odd_near);
  out[2] = V::sub(even_near, odd_near);
  out[3] = V::add(even_far, odd_far);
  out[4] = V::sub(even_far, odd_far);
  out[5] = y3;
}

template <class V> inline void weight_line_back(const typename V::F* u, int step, typename V::F* out) {
  using F = typename V::F;
  const F even_near = V::mul(V::splat(kNearFactor), V::add(u[step], u[2 * step]));
  const F odd_near = V::mul(V::splat(kNearFactor * kNear), V::sub(u[step], u[2 * step]));
  const F even_far = V::mul(V::splat(kFarFactor), V::add(u[3 * step], u[4 * step]));
  const F odd_far = V::mul(V::splat(kFarFactor * kFar), V::sub(u[3 * step], u[4 * step]));
  out[0] = V::fma(V::splat(1 / (kNear2 * kFar2)), u[0], V::add(even_near, even_far));
  out[1] = V::add(odd_near, odd_far);
  out[2] = V::fma(V::splat(kNear2), even_near, V::fma(V::splat(kFar2), even_far, u[5 * step]));
}

// The transforms of a patch, of pixels that `pixels` points to the first channels of: number i at out + i step, in whole
// vectors.
template <class V> void winograd_patch(const float* const* pixels, int64_t channels, float* out, int64_t step) {
  using F = typename V::F;
  for (int64_t c = 0; c < channels; c += V::width) {
    F d[36], columns[6][6], line[6];
    for (int i = 0; i < 36; ++i) d[i] = V::load(pixels[i] + c, channels - c);
    for (int j = 0; j < 6; ++j) patch_line<V>(d + j, 6, columns[j]);
    for (int i = 0; i < 6; ++i) {
      patch_line<V>(columns[0] + i, 6, line);
      for (int j = 0; j < 6; ++j) V::store(out + (6 * i + j) * step + c, line[j]);
    }
  }
}

// The weights of some inputs, kWinogradInputs at most, for V::width outputs: number i at out + i step, one input's row after
// the other.
template <class V>
void winograd_weights(WinogradWeights w, int64_t inputs, int64_t outputs, float* out, int64_t step, int64_t row) {
  using F = typename V::F;
  // Rows of inputs are far apart in memory, often by powers of two, which a cache keeps few of: it gets a copy of them.
  constexpr int64_t apart = kWinogradInputs + 1;
  float rows[9 * V::width * apart];
  if (w.input == 1) {
    for (int64_t i = 0; i < 9; ++i)
      for (int64_t k = 0; k < outputs; ++k)
        std::copy_n(w.data + i / 3 * w.down + i % 3 * w.right + k * w.output, inputs, rows + (i * V::width + k) * apart);
    w = {rows, apart, 1, 3 * V::width * apart, V::width * apart};
  }
  for (int64_t c = 0; c < inputs; ++c) {
    F g[9], columns[3][6], line[6];
    for (int i = 0; i < 9; ++i)
      g[i] = V::gather(w.data + c * w.input + i / 3 * w.down + i % 3 * w.right, w.output, outputs);
    for (int j = 0; j < 3; ++j) weight_line<V>(g + j, 3, columns[j]);
    for (int i = 0; i < 6; ++i) {
      weight_line<V>(columns[0] + i, 6, line);
      for (int j = 0; j < 6; ++j) V::store(out + (6 * i + j) * step + c * row, line[j]);
    }
  }
}

// The tile of 4x4 outputs, or what the image has of it, from their transforms: number i at m + i step.
template <class V>
void winograd_tile(const float* m, int64_t step, const float* bias, int64_t channels, int64_t height, int64_t width,
                   float* out, int64_t down, int64_t right) {
  using F = typename V::F;
  for (int64_t c = 0; c < channels; c += V::width) {
    F d[36], columns[6][4], line[4];
    for (int i = 0; i < 36; ++i) d[i] = V::load(m + i * step + c);
    for (int j = 0; j < 6; ++j) tile_line<V>(d + j, 6, columns[j]);
    const F b = bias ? V::load(bias + c, channels - c) : V::splat(0.0f);
    for (int64_t i = 0; i < height; ++i) {
      tile_line<V>(columns[0] + i, 4, line);
      for (int64_t j = 0; j < width; ++j) V::store(out + i * down + j * right + c, channels - c, V::add(line[j], b));
    }
  }
}

// The transforms of a tile's gradient, of 16 pixels that `pixels` points to the first channels of. Their sum is added to
// `sums`, of whole vectors.
template <class V>
void winograd_tile_back(const float* const* pixels, int64_t channels, float* out, int64_t step, float* sums) {
  using F = typename V::F;
  for (int64_t c = 0; c < channels; c += V::width) {
    F d[16], columns[4][6], line[6], sum = V::load(sums + c);
    for (int i = 0; i < 16; ++i) sum = V::add(sum, d[i] = V::load(pixels[i] + c, channels - c));
    V::store(sums + c, sum);
    for (int j = 0; j < 4; ++j) tile_line_back<V>(d + j, 4, columns[j]);
    for (int i = 0; i < 6; ++i) {
      tile_line_back<V>(columns[0] + i, 6, line);
      for (int j = 0; j < 6; ++j) V::store(out + (6 * i + j) * step + c, line[j]);
    }
  }
}

// The gradient of the weights between one output and all inputs, number (i, j) at out + (3 i + j) inputs, from the sum of
// `runs` gradients of their transforms.
template <class V>
void winograd_weights_back(const float* u, int64_t step, int64_t runs, int64_t run, int64_t inputs, float* out) {
  using F = typename V::F;
  for (int64_t c = 0; c < inputs; c += V::width) {
    F d[36], columns[6][3], line[3];
    for (int i = 0; i < 36; ++i) {
      d[i] = V::load(u + i * step + c);
      for (int64_t r = 1; r < runs; ++r) d[i] = V::add(d[i], V::load(u + r * run + i * step + c));
    }
    for (int j = 0; j < 6; ++j) weight_line_back<V>(d + j, 6, columns[j]);
    for (int i = 0; i < 3; ++i) {
      weight_line_back<V>(columns[0] + i, 3, line);
      for (int j = 0; j < 3; ++j) V::store(out + (3 * i + j) * inputs + c, inputs - c, line[j]);
    }
  }
}

template <class V, bool ADD> void winograd_product(const MatrixProduct& p) { multiply_rows<V, 2, ADD>(p); }

template <class V>
constexpr Winograd kWinograd = {2 * V::width,          kRowsAtATime<V>, winograd_patch<V>,
                                winograd_weights<V>,   winograd_tile<V>,   winograd_product<V, false>,
                                winograd_tile_back<V>, winograd_weights_back<V>, winograd_product<V, true>};

}  // namespace
}  // namespace dgf
