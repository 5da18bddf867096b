// Reverse steps: DDPM, DDIM and the posterior differ only in their coefficient rows.
#include "core.cuh"

namespace dgf {
namespace {

// Rows (A, B, s, G, px, pe, c0, cx):
//   e' = e_uncond + guidance_scale (e - e_uncond) + logit_scale G logit_grad
//   out = A x + B e' + s z, or with clipping x0 = clamp(px x + pe e', -1, 1), out = c0 x0 + cx x + s z
template <class E>
struct Step {
  using A = typename E::A;
  const void *x, *e, *e_uncond, *logit_grad;  // the last two may be null
  void* out;
  A guidance_scale, logit_scale;
  bool clip;

  template <class U>
  DGF_HD void operator()(const Work& w, const U& u) const {
    typename E::T xs[U::size], es[U::size], us[U::size] = {}, gs[U::size] = {};
    A z[U::size] = {}, result[U::size];
    u.load(x, xs);
    u.load(e, es);
    if (e_uncond) u.load(e_uncond, us);
    if (logit_grad) u.load(logit_grad, gs);
    const Rows<U, 8> rows(w, u);
    if (rows.noisy(2)) u.normals(0, z);
    rows.each([&](int j, const auto& row) {
      const A s = row[2], now = E::load(xs[j]);
      A guided = E::load(es[j]), mean;
      if (e_uncond) guided = madd(guidance_scale, guided - E::load(us[j]), E::load(us[j]));
      if (logit_grad) guided = madd(logit_scale * row[3], E::load(gs[j]), guided);
      if (clip) {
        const A x0 = madd(row[4], now, row[5] * guided);
        const A inside = x0 < A(-1) ? A(-1) : (x0 > A(1) ? A(1) : x0);  // NaN stays NaN
        mean = madd(row[6], inside, row[7] * now);
      } else {
        mean = madd(row[0], now, row[1] * guided);
      }
      result[j] = s == A(0) ? mean : madd(s, z[j], mean);
    });
    u.store(out, result);
  }
};

Tensor step(Tensor x, Tensor e, MaybeTensor e_uncond, MaybeTensor logit_grad, Tensor rows, MaybeTensor t, int64_t row,
            double guidance_scale, double logit_scale, bool clip, int64_t key, MaybeTensor key_t, int64_t first) {
  Grid g = make_grid(x, key, key_t, first);
  set_rows(g, x, rows, 8, t, row);
  Tensor out = uninitialized_like(x);
  const void *a = x.data_ptr(), *b = data_like(x, e, "the prediction");
  const void *c = data_like(x, e_uncond, "eps_uncond"), *d = data_like(x, logit_grad, "logit_grad");
  void* o = out.data_ptr();
  with_dtype(dtype_of(x), [&](auto element) {
    using E = decltype(element);
    using A = typename E::A;
    const Step<E> op{a, b, c, d, o, static_cast<A>(guidance_scale), static_cast<A>(logit_scale), clip};
    launch<E>(x, g, {a, b, c, d, o}, op);
  });
  return out;
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CUDA, m) { m.impl("step", TORCH_BOX(&dgf::step)); }
