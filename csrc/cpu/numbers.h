// Numbers of a stream, by vectors: each lane of a V makes one block of four (philox.h).
#pragma once
#include <cstring>

#include "../philox.h"
#include "core.h"

namespace dgf {
namespace {

// Writes numbers first .. first + n of a stream with `Fill`, which makes `Fill::lanes` of them from a block on.
template <class Fill, class A>
void fill(A* out, uint64_t first, int64_t n, uint32_t stream, uint64_t key, const Fill& make) {
  alignas(64) A edge[Fill::lanes];
  uint64_t block = first / 4;
  int64_t skip = static_cast<int64_t>(first % 4);
  while (n > 0) {
    if (skip == 0 && n >= Fill::lanes) {
      make(out, block, stream, key);
      out += Fill::lanes;
      n -= Fill::lanes;
    } else {
      make(edge, block, stream, key);
      const int64_t take = n < Fill::lanes - skip ? n : Fill::lanes - skip;
      std::memcpy(out, edge + skip, static_cast<size_t>(take) * sizeof(A));
      out += take;
      n -= take;
      skip = 0;
    }
    block += Fill::lanes / 4;
  }
}

// Two vectors of blocks at once, step by step: with 32 x 32 multiplications in flight for one, the other's shuffles and
// xors have work to do.
template <class V>
inline void blocks2(uint64_t block, uint32_t stream, uint64_t key, typename V::I a[4], typename V::I b[4]) {
  using I = typename V::I;
  V::counters(block, a[0], a[1]);
  V::counters(block + V::width, b[0], b[1]);
  a[2] = b[2] = V::splat(stream);
  a[3] = b[3] = V::splat(0u);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    I ah0, al0, ah1, al1, bh0, bl0, bh1, bl1;
    V::mul_wide(a[0], kPhiloxM0, ah0, al0);
    V::mul_wide(b[0], kPhiloxM0, bh0, bl0);
    V::mul_wide(a[2], kPhiloxM1, ah1, al1);
    V::mul_wide(b[2], kPhiloxM1, bh1, bl1);
    const I key0 = V::splat(k0), key1 = V::splat(k1);
    a[0] = V::bxor(V::bxor(ah1, a[1]), key0);
    a[1] = al1;
    a[2] = V::bxor(V::bxor(ah0, a[3]), key1);
    a[3] = al0;
    b[0] = V::bxor(V::bxor(bh1, b[1]), key0);
    b[1] = bl1;
    b[2] = V::bxor(V::bxor(bh0, b[3]), key1);
    b[3] = bl0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

template <class V> struct Normals {
  static constexpr int lanes = 8 * V::width;
  void operator()(float* out, uint64_t block, uint32_t stream, uint64_t key) const {
    typename V::I w[2][4];
    blocks2<V>(block, stream, key, w[0], w[1]);
    for (int h = 0; h < 2; ++h) {
      typename V::F z[4];
      box_muller<V>(w[h][0], w[h][1], z[0], z[1]);
      box_muller<V>(w[h][2], w[h][3], z[2], z[3]);
      V::store_blocks(out + 4 * V::width * h, z);
    }
  }
};
template <class V> struct Uniforms {
  static constexpr int lanes = 8 * V::width;
  void operator()(float* out, uint64_t block, uint32_t stream, uint64_t key) const {
    typename V::I w[2][4];
    blocks2<V>(block, stream, key, w[0], w[1]);
    for (int h = 0; h < 2; ++h) {
      typename V::F z[4];
      for (int j = 0; j < 4; ++j) z[j] = uniform<V>(w[h][j]);
      V::store_blocks(out + 4 * V::width * h, z);
    }
  }
};
// Double precision and integers are not on the fast path: one block at a time, as the formula reads.
struct NormalsDouble {
  static constexpr int lanes = 4;
  void operator()(double* out, uint64_t block, uint32_t stream, uint64_t key) const {
    uint32_t w[4];
    philox_block(block, stream, key, w);
    box_muller_double(w[0], w[1], out[0], out[1]);
    box_muller_double(w[2], w[3], out[2], out[3]);
  }
};
struct UniformsDouble {
  static constexpr int lanes = 4;
  void operator()(double* out, uint64_t block, uint32_t stream, uint64_t key) const {
    uint32_t w[4];
    philox_block(block, stream, key, w);
    for (int j = 0; j < 4; ++j) out[j] = static_cast<double>(w[j] >> 8) * 0x1p-24;
  }
};
struct Integers {
  static constexpr int lanes = 4;
  uint64_t high;  // 2^32: the raw words
  void operator()(int64_t* out, uint64_t block, uint32_t stream, uint64_t key) const {
    uint32_t w[4];
    philox_block(block, stream, key, w);
    for (int j = 0; j < 4; ++j) out[j] = static_cast<int64_t>((w[j] * static_cast<unsigned __int128>(high)) >> 32);
  }
};

struct Range {
  int64_t begin, end;
};
// Chunks are aligned in the numbering of the noise, so that a chunk starts with a whole block.
inline Range chunk_range(const Grid& g, int64_t chunk) {
  const int64_t shift = g.per_sample ? 0 : static_cast<int64_t>(g.first % kChunk);
  const int64_t begin = chunk * kChunk - shift, end = begin + kChunk;
  return {begin < 0 ? 0 : begin, end > g.n ? g.n : end};
}

template <class Fill, class A>
void fill_range(const Grid& g, Range r, uint32_t stream, A* z, const Fill& make) {
  if (!g.per_sample) {
    const uint64_t key = g.keys ? static_cast<uint64_t>(*g.keys) : g.key;
    fill(z, g.first + static_cast<uint64_t>(r.begin), r.end - r.begin, stream, key, make);
    return;
  }
  for (int64_t e = r.begin; e < r.end;) {
    const int64_t s = e / g.sample, stop = (s + 1) * g.sample < r.end ? (s + 1) * g.sample : r.end;
    fill(z + (e - r.begin), g.first + static_cast<uint64_t>(e - s * g.sample), stop - e, stream,
         static_cast<uint64_t>(g.keys[s]), make);
    e = stop;
  }
}

template <class V> void normals(const Grid& g, Range r, uint32_t stream, float* z) {
  fill_range(g, r, stream, z, Normals<V>{});
}
template <class V> void normals(const Grid& g, Range r, uint32_t stream, double* z) {
  fill_range(g, r, stream, z, NormalsDouble{});
}
template <class V> void uniforms(const Grid& g, Range r, uint32_t stream, float* z) {
  fill_range(g, r, stream, z, Uniforms<V>{});
}
template <class V> void uniforms(const Grid& g, Range r, uint32_t stream, double* z) {
  fill_range(g, r, stream, z, UniformsDouble{});
}

}  // namespace
}  // namespace dgf
