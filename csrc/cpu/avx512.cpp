// AVX-512 (F, BW, DQ, VL): sixteen lanes. Compiled with -mavx512f and its kin, entered only on a processor that has them.
#include <immintrin.h>

#include "kernels.h"
#include "transpose.h"
#include "winograd.h"

namespace dgf {
namespace {

struct Avx512 : Transpose8 {
  using I = __m512i;
  using F = __m512;
  static constexpr int width = 16;

  static I splat(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
  static F splat(float v) { return _mm512_set1_ps(v); }
  static void mul_wide(I a, uint32_t m, I& hi, I& lo) {
    // Even and odd lanes are multiplied apart (32 x 32 -> 64 bits), then high and low halves are brought together.
    const I k = _mm512_set1_epi64(m);
    const I even = _mm512_mul_epu32(a, k), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), k);
    hi = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
    lo = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
  }
  static I bxor(I a, I b) { return _mm512_xor_si512(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  template <int S> static I shl(I a) { return _mm512_slli_epi32(a, S); }
  template <int S> static I shr(I a) { return _mm512_srli_epi32(a, S); }
  static I band(I a, I b) { return _mm512_and_si512(a, b); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static I bits(F a) { return _mm512_castps_si512(a); }
  static F from_bits(I a) { return _mm512_castsi512_ps(a); }
  static F select_odd(I odd, F a, F b) { return _mm512_mask_blend_ps(_mm512_test_epi32_mask(odd, splat(1u)), b, a); }

  static I lanes() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  static void counters(uint64_t block, I& lo, I& hi) {
    const I first = splat(static_cast<uint32_t>(block));
    lo = add(first, lanes());
    hi = splat(static_cast<uint32_t>(block >> 32));
    hi = _mm512_mask_add_epi32(hi, _mm512_cmplt_epu32_mask(lo, first), hi, splat(1u));  // lanes that wrapped carry
  }
  static I nearest(F a) { return _mm512_cvtps_epi32(a); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  // The first `n` lanes, or all: memory behind them is not touched.
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static F load(const float* p, int64_t n) { return n >= width ? load(p) : _mm512_maskz_loadu_ps(first(n), p); }
  static void store(float* p, int64_t n, F v) { n >= width ? store(p, v) : _mm512_mask_storeu_ps(p, first(n), v); }
  // Of the first `n` lanes, numbers `step` apart; 0 in the others.
  static F gather(const float* p, int64_t step, int64_t n) {
    if (step == 1) return load(p, n);
    const I at = _mm512_mullo_epi32(lanes(), splat(static_cast<uint32_t>(step)));
    return _mm512_mask_i32gather_ps(splat(0.0f), n >= width ? __mmask16(0xffff) : first(n), at, p, 4);
  }
  static F slope_at(F z, float slope) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(z, splat(0.0f), _CMP_GT_OQ), splat(slope), splat(1.0f));
  }
  // z[j] holds number j of sixteen blocks; memory wants the four numbers of a block together.
  static void store_blocks(float* out, const F z[4]) {
    const F a = _mm512_unpacklo_ps(z[0], z[1]), b = _mm512_unpackhi_ps(z[0], z[1]);
    const F c = _mm512_unpacklo_ps(z[2], z[3]), d = _mm512_unpackhi_ps(z[2], z[3]);
    // quarter i of p, q, r, s is block 4 i, 4 i + 1, 4 i + 2, 4 i + 3
    const F p = _mm512_shuffle_ps(a, c, 0x44), q = _mm512_shuffle_ps(a, c, 0xEE);
    const F r = _mm512_shuffle_ps(b, d, 0x44), s = _mm512_shuffle_ps(b, d, 0xEE);
    const F p02q02 = _mm512_shuffle_f32x4(p, q, 0x88), p13q13 = _mm512_shuffle_f32x4(p, q, 0xDD);
    const F r02s02 = _mm512_shuffle_f32x4(r, s, 0x88), r13s13 = _mm512_shuffle_f32x4(r, s, 0xDD);
    store(out, _mm512_shuffle_f32x4(p02q02, r02s02, 0x88));
    store(out + 16, _mm512_shuffle_f32x4(p13q13, r13s13, 0x88));
    store(out + 32, _mm512_shuffle_f32x4(p02q02, r02s02, 0xDD));
    store(out + 48, _mm512_shuffle_f32x4(p13q13, r13s13, 0xDD));
  }
};

}  // namespace

Kernels avx512_kernels() {
  Kernels k = kernels_of<Avx512>();
  k.pack = pack<Avx512>;
  k.product = product<Avx512>;
  k.winograd = &kWinograd<Avx512>;
  return k;
}

}  // namespace dgf
