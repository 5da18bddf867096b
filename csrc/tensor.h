// Between torch's tensors and the kernels of any device: checks, and the Grid of a call. Nothing is read from the data.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "grid.h"
#include "philox.h"

namespace dgf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// An uninitialised tensor on x's device, of x's type or of the type whose code is given. torch::stable::empty_like does
// the same through the dispatcher by name, which takes longer than a small op.
inline Tensor uninitialized(const Tensor& x, int64_t dim, const int64_t* sizes, const int64_t* strides,
                            const int32_t* type = nullptr) {
  int32_t dtype, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, type ? *type : dtype, device_type, device_index, &out));
  return Tensor(out);
}

// One of x's shape and layout.
inline Tensor uninitialized_like(const Tensor& x) { return uninitialized(x, x.dim(), x.sizes().data(), x.strides().data()); }

// A vector of n elements.
inline Tensor uninitialized_vector(const Tensor& x, int64_t n) {
  const int64_t stride = 1;
  return uninitialized(x, 1, &n, &stride);
}

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: STD_TORCH_CHECK(false, "diffgan_fast: expected float32, float64, float16 or bfloat16");
  }
}

// The type of coefficients: that of the arithmetic.
inline ScalarType wide_type(const Tensor& x) {
  return dtype_of(x) == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
}

// One number (dim = 0), or a vector of n (dim = 1), of the type of the arithmetic on x.
inline Tensor uninitialized_wide(const Tensor& x, int64_t dim, int64_t n = 1) {
  const int32_t type = dtype_of(x) == Dtype::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const int64_t stride = 1;
  return uninitialized(x, dim, &n, &stride, &type);
}

inline bool same_device(const Tensor& x, const Tensor& y) { return x.device() == y.device(); }

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
  g.inner = g.n > 0 ? g.n : 1;
  if (!x.is_contiguous()) {
    STD_TORCH_CHECK(is_channels_last(x), "diffgan_fast: expected a contiguous or channels_last tensor");
    g.channels = x.size(1);
    g.plane = x.size(2) * x.size(3);
  }
  g.key = static_cast<uint64_t>(key);
  g.first = static_cast<uint64_t>(first);
  if (key_t) {
    STD_TORCH_CHECK(same_device(x, *key_t) && key_t->scalar_type() == ScalarType::Long && key_t->is_contiguous(),
                    "diffgan_fast: the key must be int64, contiguous and on x's device");
    g.per_sample = key_t->numel() != 1;
    STD_TORCH_CHECK(!g.per_sample || (x.dim() && key_t->numel() == x.size(0)),
                    "diffgan_fast: expected one key, or one a sample");
    g.keys = static_cast<const int64_t*>(key_t->data_ptr());
  }
  return g;
}

inline void set_rows(Grid& g, const Tensor& x, const Tensor& rows, int64_t columns, const MaybeTensor& t, int64_t row) {
  STD_TORCH_CHECK(same_device(x, rows) && rows.dim() == 2 && rows.size(1) == columns && rows.is_contiguous() &&
                      rows.scalar_type() == wide_type(x),
                  "diffgan_fast: coefficient rows have the wrong shape, type, layout or device");
  g.rows = rows.data_ptr();
  g.n_rows = rows.size(0);
  g.row = row;
  int64_t groups = g.n_rows;
  if (t) {
    STD_TORCH_CHECK(same_device(x, *t) && t->is_contiguous() && t->scalar_type() == ScalarType::Long,
                    "diffgan_fast: t must be int64, contiguous and on x's device");
    g.t = static_cast<const int64_t*>(t->data_ptr());
    groups = t->numel();
  }
  if (t || row < 0) {
    STD_TORCH_CHECK(groups > 0 ? g.n % groups == 0 : g.n == 0, "diffgan_fast: t does not divide x into equal parts");
    g.inner = groups > 0 && g.n > 0 ? g.n / groups : 1;
  }
}

// Keys and words of `fold_in`: each an int64 tensor, or the number beside it where there is none.
struct Folding {
  const int64_t* keys = nullptr;
  const int64_t* words = nullptr;
  int64_t key, word;

  DGF_HD int64_t at(int64_t i) const {
    return fold_in(static_cast<uint64_t>(keys ? keys[i] : key), static_cast<uint64_t>(words ? words[i] : word));
  }
};

inline Folding make_folding(int64_t key, const MaybeTensor& key_t, int64_t word, const MaybeTensor& word_t) {
  for (const MaybeTensor& v : {key_t, word_t})
    STD_TORCH_CHECK(!v || (v->scalar_type() == ScalarType::Long && v->is_contiguous()),
                    "diffgan_fast: keys and data are int64 and contiguous");
  STD_TORCH_CHECK(key_t || word_t, "diffgan_fast: expected a key or data on the device");
  STD_TORCH_CHECK(!key_t || !word_t || (key_t->numel() == word_t->numel() && same_device(*key_t, *word_t)),
                  "diffgan_fast: as many keys as data, on one device");
  Folding f;
  if (key_t) f.keys = static_cast<const int64_t*>(key_t->data_ptr());
  if (word_t) f.words = static_cast<const int64_t*>(word_t->data_ptr());
  f.key = key;
  f.word = word;
  return f;
}

// The data of a tensor that must match x in shape, type and layout; null where it is absent.
inline const void* data_like(const Tensor& x, const MaybeTensor& y, const char* name) {
  if (!y) return nullptr;
  bool same = same_device(x, *y) && y->dim() == x.dim() && y->scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d)
    same = y->size(d) == x.size(d) && (x.size(d) == 1 || y->stride(d) == x.stride(d));
  STD_TORCH_CHECK(same, "diffgan_fast: ", name, " must match x in shape, dtype, device and memory format");
  return y->data_ptr();
}

}  // namespace dgf
