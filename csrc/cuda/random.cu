// Counter-based random tensors.
#include "core.cuh"

namespace dgf {
namespace {

struct I64 {
  using T = int64_t;
  using A = int64_t;
  static DGF_HD T store(A v) { return v; }
};

DGF_HD void uniform_word(uint32_t w, float& v) { v = uniform<Lane>(w); }
DGF_HD void uniform_word(uint32_t w, double& v) { v = static_cast<double>(w >> 8) * 0x1p-24; }

template <class E>
struct Uniforms {
  void* out;
  uint32_t stream;

  template <class U>
  DGF_HD void operator()(const Work&, const U& u) const {
    typename E::A v[U::size];
#pragma unroll
    for (int part = 0; part < U::size / 4; ++part) {
      uint32_t w[4];
      u.words(stream, part, w);
#pragma unroll
      for (int j = 0; j < 4; ++j) uniform_word(w[j], v[4 * part + j]);
    }
    u.store(out, v);
  }
};

template <class E>
struct Normals {
  void* out;
  uint32_t stream;

  template <class U>
  DGF_HD void operator()(const Work&, const U& u) const {
    typename E::A v[U::size];
    u.normals(stream, v);
    u.store(out, v);
  }
};

struct Integers {
  void* out;
  uint32_t stream;
  uint64_t high;  // 2^32: the raw words

  template <class U>
  DGF_HD void operator()(const Work&, const U& u) const {
    uint32_t w[4];
    int64_t v[4];
    u.words(stream, 0, w);
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = static_cast<int64_t>((w[j] * high) >> 32);  // below 2^64 since high <= 2^32
    u.store(out, v);
  }
};

void random_(Tensor out, int64_t key, MaybeTensor key_t, int64_t stream, int64_t first, int64_t draw, int64_t high) {
  STD_TORCH_CHECK(out.is_contiguous(), "diffgan_fast: random tensors are made contiguous");
  const Grid g = make_grid(out, key, key_t, first);
  const Draw kind = static_cast<Draw>(draw);
  const auto words = static_cast<uint32_t>(stream);
  void* data = out.data_ptr();
  if (kind == Draw::bits || kind == Draw::integers) {
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Long, "diffgan_fast: integers are int64");
    launch<I64>(out, g, {data}, Integers{data, words, static_cast<uint64_t>(high)});
    return;
  }
  with_dtype(dtype_of(out), [&](auto element) {
    using E = decltype(element);
    if (kind == Draw::normal) {
      launch<E>(out, g, {data}, Normals<E>{data, words});
    } else {
      launch<E>(out, g, {data}, Uniforms<E>{data, words});
    }
  });
}

__global__ void __launch_bounds__(kThreads)
    philox_rows(const int64_t* counter, const int64_t* key, int64_t* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  uint32_t w[4];
  for (int j = 0; j < 4; ++j) w[j] = static_cast<uint32_t>(counter[4 * i + j]);
  philox4x32<Lane>(w, static_cast<uint32_t>(key[2 * i]), static_cast<uint32_t>(key[2 * i + 1]));
  for (int j = 0; j < 4; ++j) out[4 * i + j] = w[j];
}

// [n, 4] counters and [n, 2] keys, words as int64, to [n, 4] words: what the known-answer tests call.
Tensor philox4x32_rows(Tensor counter, Tensor key) {
  for (const Tensor& v : {counter, key})
    STD_TORCH_CHECK(v.dim() == 2 && v.is_contiguous() && v.scalar_type() == ScalarType::Long && same_device(counter, v),
                    "diffgan_fast: counter and key are int64 matrices, contiguous and on one device");
  const int64_t n = counter.size(0);
  STD_TORCH_CHECK(counter.size(1) == 4 && key.size(1) == 2 && key.size(0) == n,
                  "diffgan_fast: counter is [n, 4] and key [n, 2]");
  Tensor out = uninitialized_like(counter);
  if (n == 0) return out;
  const OnDevice on(counter);
  philox_rows<<<block_count(n, kThreads), kThreads, 0, on.stream()>>>(
      static_cast<const int64_t*>(counter.data_ptr()), static_cast<const int64_t*>(key.data_ptr()),
      static_cast<int64_t*>(out.data_ptr()), n);
  DGF_CUDA_CHECK(cudaGetLastError());
  return out;
}

__global__ void __launch_bounds__(kThreads) fold_rows(Folding f, int64_t* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) out[i] = f.at(i);
}

Tensor fold_each(int64_t key, MaybeTensor key_t, int64_t word, MaybeTensor word_t) {
  const Folding f = make_folding(key, key_t, word, word_t);
  Tensor out = uninitialized_like(key_t ? *key_t : *word_t);
  const int64_t n = out.numel();
  if (n == 0) return out;
  const OnDevice on(out);
  fold_rows<<<block_count(n, kThreads), kThreads, 0, on.stream()>>>(f, static_cast<int64_t*>(out.data_ptr()), n);
  DGF_CUDA_CHECK(cudaGetLastError());
  return out;
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CUDA, m) {
  m.impl("random_", TORCH_BOX(&dgf::random_));
  m.impl("fold_in", TORCH_BOX(&dgf::fold_each));
  m.impl("philox4x32", TORCH_BOX(&dgf::philox4x32_rows));
}
