// AVX2, FMA and F16C: eight lanes. Compiled with -mavx2 -mfma -mf16c, entered only on a processor that has them.
#include <immintrin.h>

#include "kernels.h"
#include "transpose.h"
#include "winograd.h"

namespace dgf {
namespace {

struct Avx2 : Transpose8 {
  using I = __m256i;
  using F = __m256;
  static constexpr int width = 8;

  static I splat(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
  static F splat(float v) { return _mm256_set1_ps(v); }
  static void mul_wide(I a, uint32_t m, I& hi, I& lo) {
    // Even and odd lanes are multiplied apart (32 x 32 -> 64 bits), then high and low halves are brought together.
    const I k = _mm256_set1_epi64x(m);
    const I even = _mm256_mul_epu32(a, k), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), k);
    hi = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    lo = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
  static I bxor(I a, I b) { return _mm256_xor_si256(a, b); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  template <int S> static I shl(I a) { return _mm256_slli_epi32(a, S); }
  template <int S> static I shr(I a) { return _mm256_srli_epi32(a, S); }
  static I band(I a, I b) { return _mm256_and_si256(a, b); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static I bits(F a) { return _mm256_castps_si256(a); }
  static F from_bits(I a) { return _mm256_castsi256_ps(a); }
  static F select_odd(I odd, F a, F b) { return _mm256_blendv_ps(b, a, from_bits(shl<31>(odd))); }

  static I lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static void counters(uint64_t block, I& lo, I& hi) {
    lo = add(splat(static_cast<uint32_t>(block)), lanes());
    hi = splat(static_cast<uint32_t>(block >> 32));
    if (static_cast<uint32_t>(block) > 0xffffffffu - 7u)  // lanes that wrapped are 0..6, the others negative: carry
      hi = sub(hi, _mm256_cmpgt_epi32(lo, _mm256_set1_epi32(-1)));
  }
  static I nearest(F a) { return _mm256_cvtps_epi32(a); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  // The first `n` lanes, or all: memory behind them is not touched.
  static I first(int64_t n) { return _mm256_cmpgt_epi32(splat(static_cast<uint32_t>(n)), lanes()); }
  static F load(const float* p, int64_t n) { return n >= width ? load(p) : _mm256_maskload_ps(p, first(n)); }
  static void store(float* p, int64_t n, F v) { n >= width ? store(p, v) : _mm256_maskstore_ps(p, first(n), v); }
  // Of the first `n` lanes, numbers `step` apart; 0 in the others.
  static F gather(const float* p, int64_t step, int64_t n) {
    if (step == 1) return load(p, n);
    const I at = _mm256_mullo_epi32(lanes(), splat(static_cast<uint32_t>(step)));
    const F none = splat(0.0f);
    return _mm256_mask_i32gather_ps(none, p, at, from_bits(first(n)), 4);
  }
  static F slope_at(F z, float slope) {
    return _mm256_blendv_ps(splat(slope), splat(1.0f), _mm256_cmp_ps(z, splat(0.0f), _CMP_GT_OQ));
  }
  // z[j] holds number j of eight blocks; memory wants the four numbers of a block together.
  static void store_blocks(float* out, const F z[4]) {
    const F a = _mm256_unpacklo_ps(z[0], z[1]), b = _mm256_unpackhi_ps(z[0], z[1]);
    const F c = _mm256_unpacklo_ps(z[2], z[3]), d = _mm256_unpackhi_ps(z[2], z[3]);
    const F p = _mm256_shuffle_ps(a, c, 0x44), q = _mm256_shuffle_ps(a, c, 0xEE);
    const F r = _mm256_shuffle_ps(b, d, 0x44), s = _mm256_shuffle_ps(b, d, 0xEE);
    _mm256_storeu_ps(out, _mm256_permute2f128_ps(p, q, 0x20));
    _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(r, s, 0x20));
    _mm256_storeu_ps(out + 16, _mm256_permute2f128_ps(p, q, 0x31));
    _mm256_storeu_ps(out + 24, _mm256_permute2f128_ps(r, s, 0x31));
  }
};

}  // namespace

Kernels avx2_kernels() {
  Kernels k = kernels_of<Avx2>();
  k.pack = pack<Avx2>;
  k.product = product<Avx2>;
  if (!__builtin_cpu_supports("avx512f")) k.add_outer = add_outer<Avx2>;  // else oneDNN is faster
  k.winograd = &kWinograd<Avx2>;
  return k;
}

}  // namespace dgf
