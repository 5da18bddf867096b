// Reverse steps: DDPM, DDIM and the posterior differ only in their coefficient rows.
#include "op.h"

namespace dgf {
namespace {

Tensor step(Tensor x, Tensor e, MaybeTensor e_uncond, MaybeTensor logit_grad, Tensor rows, MaybeTensor t, int64_t row,
            double guidance_scale, double logit_scale, bool clip, int64_t key, MaybeTensor key_t, int64_t first) {
  Grid g = make_grid(x, key, key_t, first);
  set_rows(g, x, rows, 8, t, row);
  const Dtype dtype = dtype_of(x);
  Tensor out = uninitialized_like(x);
  const StepArgs args{x.data_ptr(),
                      data_like(x, e, "the prediction"),
                      data_like(x, e_uncond, "eps_uncond"),
                      data_like(x, logit_grad, "logit_grad"),
                      out.data_ptr(),
                      guidance_scale,
                      logit_scale,
                      clip};
  for_chunks(g, [&](int64_t c) { return kernels().step(g, dtype, args, c); });
  return out;
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CPU, m) { m.impl("step", TORCH_BOX(&dgf::step)); }
