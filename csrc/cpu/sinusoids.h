// Sines and cosines of many phases, for sinusoidal embeddings.
#pragma once
#include <cmath>

#include "../philox.h"
#include "core.h"

namespace dgf {
namespace {

constexpr float kLargestPhase = 1e4f;  // up to which multiples of the first two parts of pi/2 (Cephes) are exact

// out [n, 2 half]: sin(x_i w_k), then cos(x_i w_k)
template <class V>
void sinusoids(int64_t n, int64_t half, const float* x, const float* frequencies, float* out) {
  using F = typename V::F;
  for (int64_t i = 0; i < n; ++i, out += 2 * half) {
    int64_t k = 0;
    for (; k + V::width <= half && std::fabs(x[i]) <= kLargestPhase; k += V::width) {  // no frequency is above 1
      const F phase = V::mul(V::splat(x[i]), V::load(frequencies + k));
      const typename V::I quadrant = V::nearest(V::mul(phase, V::splat(0.636619772f)));
      const F q = V::to_float(quadrant);
      F r = V::fma(q, V::splat(-1.5703125f), phase);
      r = V::fma(q, V::splat(-4.837512969970703125e-4f), r);
      r = V::fma(q, V::splat(-7.549789948768648e-8f), r);
      F s, c;
      sin_cos<V>(r, quadrant, s, c);
      V::store(out + k, s);
      V::store(out + half + k, c);
    }
    for (; k < half; ++k) {
      out[k] = std::sin(x[i] * frequencies[k]);
      out[half + k] = std::cos(x[i] * frequencies[k]);
    }
  }
}

}  // namespace
}  // namespace dgf
