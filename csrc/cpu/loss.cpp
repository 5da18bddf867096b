// The noise-prediction loss against noise that is made again, never read.
#include <tuple>
#include <vector>

#include "op.h"

namespace dgf {
namespace {

Tensor residual(Tensor x, MaybeTensor y, Tensor rows, MaybeTensor t, int64_t row, Tensor scale, int64_t key,
                MaybeTensor key_t, int64_t first) {
  Grid g = make_grid(x, key, key_t, first);
  set_rows(g, x, rows, 3, t, row);
  const Dtype dtype = dtype_of(x);
  Tensor out = uninitialized_like(x);
  const void *a = x.data_ptr(), *b = data_like(x, y, "x0");
  void* o = out.data_ptr();
  STD_TORCH_CHECK(scale.is_cpu() && scale.numel() == 1 && scale.scalar_type() == rows.scalar_type(),
                  "diffgan_fast: scale is one number of the rows' type");
  const double factor = dtype == Dtype::f64 ? *static_cast<const double*>(scale.data_ptr())
                                            : *static_cast<const float*>(scale.data_ptr());
  for_chunks(g, [&](int64_t c) { return kernels().residual(g, dtype, a, b, factor, o, nullptr, c); });
  return out;
}

// The mean, and w r where `keep` asks for it (else an empty tensor).
// Partial sums stand in the order of the chunks, whatever the number of threads: the result is always the same.
std::tuple<Tensor, Tensor> residual_mean(Tensor x, MaybeTensor y, Tensor rows, MaybeTensor t, int64_t row, bool keep,
                                         int64_t key, MaybeTensor key_t, int64_t first) {
  Grid g = make_grid(x, key, key_t, first);
  set_rows(g, x, rows, 3, t, row);
  const Dtype dtype = dtype_of(x);
  const void *a = x.data_ptr(), *b = data_like(x, y, "x0");
  Tensor kept = keep ? uninitialized_like(x) : uninitialized_vector(x, 0);
  void* o = keep ? kept.data_ptr() : nullptr;
  std::vector<double> partial(static_cast<size_t>(chunks(g)));
  for_chunks(g, [&](int64_t c) { return kernels().residual(g, dtype, a, b, 1.0, o, &partial[static_cast<size_t>(c)], c); });
  double total = 0;
  for (double p : partial) total += p;
  total /= static_cast<double>(g.n);
  Tensor out = uninitialized(rows, 0, nullptr, nullptr);
  if (dtype == Dtype::f64) {
    *static_cast<double*>(out.data_ptr()) = total;
  } else {
    *static_cast<float*>(out.data_ptr()) = static_cast<float>(total);
  }
  return {out, kept};
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CPU, m) {
  m.impl("residual", TORCH_BOX(&dgf::residual));
  m.impl("residual_mean", TORCH_BOX(&dgf::residual_mean));
}
