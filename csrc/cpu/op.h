// Between torch's tensors and the kernels: checks, the Grid of a call, and the parallel loop over its chunks.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <optional>

#include "core.h"

namespace dgf {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

const Kernels& kernels();       // those of the instruction set in use (random.cpp)
const char* instruction_set();  // "avx2" or "baseline"

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return Dtype::f32;
    case torch::headeronly::ScalarType::Double: return Dtype::f64;
    case torch::headeronly::ScalarType::Half: return Dtype::f16;
    case torch::headeronly::ScalarType::BFloat16: return Dtype::bf16;
    default: STD_TORCH_CHECK(false, "diffgan_fast: expected float32, float64, float16 or bfloat16");
  }
}

// Whether x is laid out as [N, H, W, C] in memory. Strides of dimensions of size 1 say nothing.
inline bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4) return false;
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

inline Grid make_grid(const Tensor& x, int64_t key, const MaybeTensor& key_t, int64_t first) {
  Grid g;
  g.n = x.numel();
  g.sample = x.dim() && x.size(0) ? g.n / x.size(0) : 1;
  if (!x.is_contiguous()) {
    STD_TORCH_CHECK(is_channels_last(x), "diffgan_fast: expected a contiguous or channels_last tensor");
    g.channels = x.size(1);
    g.plane = x.size(2) * x.size(3);
  }
  g.key = static_cast<uint64_t>(key);
  g.first = static_cast<uint64_t>(first);
  if (key_t) {
    STD_TORCH_CHECK(key_t->is_cpu() && key_t->scalar_type() == torch::headeronly::ScalarType::Long,
                    "diffgan_fast: the key must be int64 on x's device");
    const auto* keys = static_cast<const int64_t*>(key_t->data_ptr());
    if (key_t->numel() == 1) {
      g.key = static_cast<uint64_t>(keys[0]);
    } else {
      STD_TORCH_CHECK(x.dim() && key_t->numel() == x.size(0), "diffgan_fast: expected one key, or one a sample");
      g.keys = keys;
    }
  }
  return g;
}

inline void set_rows(Grid& g, const Tensor& x, const Tensor& rows, int64_t columns, const MaybeTensor& t, int64_t row) {
  const auto wanted = dtype_of(x) == Dtype::f64 ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
  STD_TORCH_CHECK(rows.is_cpu() && rows.dim() == 2 && rows.size(1) == columns && rows.is_contiguous() &&
                      rows.scalar_type() == wanted,
                  "diffgan_fast: coefficient rows have the wrong shape, type, layout or device");
  g.rows = rows.data_ptr();
  g.n_rows = rows.size(0);
  g.row = row;
  int64_t groups = g.n_rows;
  if (t) {
    STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->scalar_type() == torch::headeronly::ScalarType::Long,
                    "diffgan_fast: t must be int64, contiguous and on x's device");
    g.t = static_cast<const int64_t*>(t->data_ptr());
    groups = t->numel();
  }
  if (t || row < 0) {
    STD_TORCH_CHECK(groups > 0 ? g.n % groups == 0 : g.n == 0, "diffgan_fast: t does not divide x into equal parts");
    g.inner = groups > 0 && g.n > 0 ? g.n / groups : 1;
  } else {
    g.inner = g.n > 0 ? g.n : 1;
  }
}

// The data of a tensor that must match x in shape, type and layout; null where it is absent.
inline const void* data_like(const Tensor& x, const MaybeTensor& y, const char* name) {
  if (!y) return nullptr;
  bool same = y->is_cpu() && y->dim() == x.dim() && y->scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d)
    same = y->size(d) == x.size(d) && (x.size(d) == 1 || y->stride(d) == x.stride(d));
  STD_TORCH_CHECK(same, "diffgan_fast: ", name, " must match x in shape, dtype, device and memory format");
  return y->data_ptr();
}

inline int64_t chunks(const Grid& g) {
  return g.n == 0 ? 0 : ((g.keys ? 0 : static_cast<int64_t>(g.first % kChunk)) + g.n + kChunk - 1) / kChunk;
}

// Runs one(chunk) -> bool for all chunks on torch's threads. False means a coefficient row that does not exist.
template <class One>
void for_chunks(const Grid& g, One&& one) {
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, chunks(g), 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      if (!one(c)) ok.store(false, std::memory_order_relaxed);
  });
  STD_TORCH_CHECK(ok.load(), "diffgan_fast: t is out of range");
}

}  // namespace dgf
