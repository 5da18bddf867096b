// With AVX2, which processors with AVX-512 have too.
#pragma once
#include <immintrin.h>

#include "core.h"

namespace dgf {
namespace {

struct Transpose8 {
  // The transpose of eight rows of eight, `stride` apart, in rows kPanel apart.
  static void transpose8(const float* w, int64_t stride, float* out) {
    __m256 r[8], q[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(w + i * stride);
    for (int h = 0; h < 8; h += 4) {
      const __m256 a = _mm256_unpacklo_ps(r[h], r[h + 1]), b = _mm256_unpackhi_ps(r[h], r[h + 1]);
      const __m256 c = _mm256_unpacklo_ps(r[h + 2], r[h + 3]), d = _mm256_unpackhi_ps(r[h + 2], r[h + 3]);
      q[h] = _mm256_shuffle_ps(a, c, 0x44);
      q[h + 1] = _mm256_shuffle_ps(a, c, 0xEE);
      q[h + 2] = _mm256_shuffle_ps(b, d, 0x44);
      q[h + 3] = _mm256_shuffle_ps(b, d, 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(out + i * kPanel, _mm256_permute2f128_ps(q[i], q[i + 4], 0x20));
      _mm256_storeu_ps(out + (i + 4) * kPanel, _mm256_permute2f128_ps(q[i], q[i + 4], 0x31));
    }
  }
};

}  // namespace
}  // namespace dgf
