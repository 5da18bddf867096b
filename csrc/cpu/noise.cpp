// Forward noising.
#include "op.h"

namespace dgf {
namespace {

std::tuple<Tensor, Tensor> add_noise(Tensor x, Tensor rows, MaybeTensor t, int64_t row, double sigma, int64_t key,
                                     MaybeTensor key_t, int64_t first, bool return_noise) {
  Grid g = make_grid(x, key, key_t, first);
  set_rows(g, x, rows, 2, t, row);
  const Dtype dtype = dtype_of(x);
  Tensor out = uninitialized_like(x);
  Tensor noise = return_noise ? uninitialized_like(x) : uninitialized_vector(x, 0);
  const void* in = x.data_ptr();
  void *o = out.data_ptr(), *z = return_noise ? noise.data_ptr() : nullptr;
  for_chunks(g, [&](int64_t c) { return kernels().add_noise(g, dtype, in, sigma, o, z, c); });
  return {out, noise};
}

std::tuple<Tensor, Tensor> noise_pair(Tensor x, Tensor rows, MaybeTensor t, int64_t row, int64_t key, MaybeTensor key_t,
                                      int64_t first) {
  Grid g = make_grid(x, key, key_t, first);
  set_rows(g, x, rows, 4, t, row);
  const Dtype dtype = dtype_of(x);
  Tensor previous = uninitialized_like(x), current = uninitialized_like(x);
  const void* in = x.data_ptr();
  void *p = previous.data_ptr(), *q = current.data_ptr();
  for_chunks(g, [&](int64_t c) { return kernels().noise_pair(g, dtype, in, p, q, c); });
  return {previous, current};
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CPU, m) {
  m.impl("add_noise", TORCH_BOX(&dgf::add_noise));
  m.impl("noise_pair", TORCH_BOX(&dgf::noise_pair));
}
