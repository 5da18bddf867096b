// Philox4x32-10 (Salmon et al., SC 2011) and the Box-Muller transform: the one random number generator of the
// host, the CPU kernels and the CUDA kernels. kernels/random.py repeats it for Triton, diffgan_fast/_philox.py for
// plain torch.
//
//   key     = (lo, hi) of a 64-bit integer
//   counter = (block lo, block hi, stream, 0),   block = index / 4; word j of a block serves index 4*block + j
//   normal  : u = ((w0 >> 9) + 0.5) / 2^23, theta = 2 pi w1 / 2^32, r = sqrt(-2 ln u), pair = (r cos, r sin)
//   uniform : (w >> 8) / 2^24 in [0, 1)
//   integer : (w * high) >> 32 in [0, high)
//
// The code is written against a "vector" V of lanes, so that one text serves scalars (host, CUDA) and SIMD registers.
// Everything has internal linkage: a copy compiled for AVX2 or AVX-512 must never replace the baseline's at link time.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DGF_HD __host__ __device__ __forceinline__
#else
#define DGF_HD inline
#endif

namespace dgf {
namespace {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr double kTwoPi = 6.283185307179586476925286766559;

// One lane.
struct Scalar {
  using I = uint32_t;
  using F = float;
  static constexpr int width = 1;

  static DGF_HD I splat(uint32_t v) { return v; }
  static DGF_HD F splat(float v) { return v; }
  static DGF_HD void mul_wide(I a, uint32_t m, I& hi, I& lo) {
#ifdef __CUDA_ARCH__
    hi = __umulhi(a, m);
    lo = a * m;
#else
    const uint64_t p = static_cast<uint64_t>(a) * m;
    hi = static_cast<uint32_t>(p >> 32);
    lo = static_cast<uint32_t>(p);
#endif
  }
  static DGF_HD I bxor(I a, I b) { return a ^ b; }
  static DGF_HD I add(I a, I b) { return a + b; }
  static DGF_HD I sub(I a, I b) { return a - b; }
  template <int S> static DGF_HD I shl(I a) { return a << S; }
  template <int S> static DGF_HD I shr(I a) { return a >> S; }
  static DGF_HD I band(I a, I b) { return a & b; }
  static DGF_HD F to_float(I a) { return static_cast<float>(static_cast<int32_t>(a)); }
  static DGF_HD F mul(F a, F b) { return a * b; }
  static DGF_HD F add(F a, F b) { return a + b; }
  static DGF_HD F sub(F a, F b) { return a - b; }
  static DGF_HD F fma(F a, F b, F c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
  }
  static DGF_HD F sqrt(F a) { return sqrtf(a); }
  static DGF_HD I bits(F a) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(a);
#else
    uint32_t r;
    __builtin_memcpy(&r, &a, 4);
    return r;
#endif
  }
  static DGF_HD F from_bits(I a) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(a);
#else
    float r;
    __builtin_memcpy(&r, &a, 4);
    return r;
#endif
  }
  // Lanes of `a` where the lowest bit of `odd` is set, else of `b`.
  static DGF_HD F select_odd(I odd, F a, F b) { return (odd & 1u) ? a : b; }
};

// Ten rounds on the four counter words, in place.
template <class V>
DGF_HD void philox4x32(typename V::I c[4], uint32_t k0, uint32_t k1) {
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    typename V::I h0, l0, h1, l1;
    V::mul_wide(c[0], kPhiloxM0, h0, l0);
    V::mul_wide(c[2], kPhiloxM1, h1, l1);
    c[0] = V::bxor(V::bxor(h1, c[1]), V::splat(k0));
    c[1] = l1;
    c[2] = V::bxor(V::bxor(h0, c[3]), V::splat(k1));
    c[3] = l0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

// ln(x) for x in (0, 1): the mantissa is brought into [sqrt(1/2), sqrt(2)), then a polynomial of degree 9 (Cephes).
template <class V>
DGF_HD typename V::F log_unit(typename V::F x) {
  using F = typename V::F;
  using I = typename V::I;
  // Adding 1 - sqrt(1/2) in units of the last place carries into the exponent exactly where the mantissa is >= sqrt(2).
  const I shifted = V::add(V::bits(x), V::splat(0x3f800000u - 0x3f3504f3u));
  const I e = V::sub(V::template shr<23>(shifted), V::splat(127u));
  const F f = V::sub(V::from_bits(V::add(V::band(shifted, V::splat(0x007fffffu)), V::splat(0x3f3504f3u))),
                     V::splat(1.0f));
  const F n = V::to_float(e);
  const F z = V::mul(f, f);
  F p = V::splat(7.0376836292e-2f);
  p = V::fma(p, f, V::splat(-1.1514610310e-1f));
  p = V::fma(p, f, V::splat(1.1676998740e-1f));
  p = V::fma(p, f, V::splat(-1.2420140846e-1f));
  p = V::fma(p, f, V::splat(1.4249322787e-1f));
  p = V::fma(p, f, V::splat(-1.6668057665e-1f));
  p = V::fma(p, f, V::splat(2.0000714765e-1f));
  p = V::fma(p, f, V::splat(-2.4999993993e-1f));
  p = V::fma(p, f, V::splat(3.3333331174e-1f));
  F y = V::mul(V::mul(f, z), p);
  y = V::fma(n, V::splat(-2.12194440e-4f), y);
  y = V::fma(z, V::splat(-0.5f), y);
  return V::fma(n, V::splat(0.693359375f), V::add(y, f));
}

// sin and cos of quadrant * pi/2 + x, |x| <= pi/4 (the low two bits of `quadrant` count).
template <class V>
DGF_HD void sin_cos(typename V::F x, typename V::I quadrant, typename V::F& s, typename V::F& c) {
  using F = typename V::F;
  using I = typename V::I;
  const F z = V::mul(x, x);
  F sp = V::fma(V::splat(-1.9515295891e-4f), z, V::splat(8.3321608736e-3f));
  sp = V::fma(sp, z, V::splat(-1.6666654611e-1f));
  sp = V::fma(V::mul(sp, z), x, x);
  F cp = V::fma(V::splat(2.443315711809948e-5f), z, V::splat(-1.388731625493765e-3f));
  cp = V::fma(cp, z, V::splat(4.166664568298827e-2f));
  cp = V::fma(V::mul(cp, z), z, V::fma(z, V::splat(-0.5f), V::splat(1.0f)));
  // Quadrant q: (cos, sin) = (c, s), (-s, c), (-c, -s), (s, -c) for q = 0..3; the sign goes into the top bit.
  const I sign_s = V::template shl<30>(V::band(quadrant, V::splat(2u)));
  const I sign_c = V::template shl<30>(V::band(V::add(quadrant, V::splat(1u)), V::splat(2u)));
  c = V::from_bits(V::bxor(V::bits(V::select_odd(quadrant, sp, cp)), sign_c));
  s = V::from_bits(V::bxor(V::bits(V::select_odd(quadrant, cp, sp)), sign_s));
}

// Two independent standard normals from two words.
template <class V>
DGF_HD void box_muller(typename V::I w0, typename V::I w1, typename V::F& c, typename V::F& s) {
  using F = typename V::F;
  using I = typename V::I;
  const F u = V::fma(V::to_float(V::template shr<9>(w0)), V::splat(1.1920928955078125e-7f),
                     V::splat(5.9604644775390625e-8f));
  const F r = V::sqrt(V::mul(V::splat(-2.0f), log_unit<V>(u)));
  // theta = quadrant * pi/2 + x with |x| <= pi/4, split in integers and so without rounding.
  const I quadrant = V::template shr<30>(V::add(w1, V::splat(0x20000000u)));
  const F x = V::mul(V::to_float(V::sub(w1, V::template shl<30>(quadrant))), V::splat(1.4629180792671596e-9f));
  sin_cos<V>(x, quadrant, s, c);
  c = V::mul(r, c);
  s = V::mul(r, s);
}

template <class V>
DGF_HD typename V::F uniform(typename V::I w) {
  return V::mul(V::to_float(V::template shr<8>(w)), V::splat(5.9604644775390625e-8f));
}

// The four words of one block of a stream.
DGF_HD void philox_block(uint64_t block, uint32_t stream, uint64_t key, uint32_t w[4]) {
  w[0] = static_cast<uint32_t>(block);
  w[1] = static_cast<uint32_t>(block >> 32);
  w[2] = stream;
  w[3] = 0u;
  philox4x32<Scalar>(w, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

// A new key from a key and a word of data. Bit 63 is clear, as in all keys.
DGF_HD int64_t fold_in(uint64_t key, uint64_t word) {
  uint32_t w[4] = {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32), 0xf01du, 1u};
  philox4x32<Scalar>(w, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  return static_cast<int64_t>((w[0] | static_cast<uint64_t>(w[1]) << 32) & ~(1ull << 63));
}

// The same pair in double precision, as the formula reads.
inline void box_muller_double(uint32_t w0, uint32_t w1, double& c, double& s) {
  const double r = std::sqrt(-2.0 * std::log((static_cast<double>(w0 >> 9) + 0.5) * 0x1p-23));
  const double theta = kTwoPi * (static_cast<double>(w1) * 0x1p-32);
  c = r * std::cos(theta);
  s = r * std::sin(theta);
}

}  // namespace
}  // namespace dgf
