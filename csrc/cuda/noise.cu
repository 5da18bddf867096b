// Forward noising.
#include "core.cuh"

namespace dgf {
namespace {

// out = a x + s sigma z;  rows (a, s)
template <class E>
struct AddNoise {
  using A = typename E::A;
  const void* x;
  void *out, *noise;  // noise may be null
  A sigma;

  template <class U>
  DGF_HD void operator()(const Work& w, const U& u) const {
    typename E::T in[U::size];
    A z[U::size] = {}, result[U::size];
    u.load(x, in);
    const Rows<U, 2> rows(w, u);
    if (noise || rows.noisy(1)) u.normals(0, z);
    if (noise) u.store(noise, z);
    rows.each([&](int j, const auto& row) {
      const A s = row[1] * sigma, mean = row[0] * E::load(in[j]);
      result[j] = s == A(0) ? mean : madd(s, z[j], mean);
    });
    u.store(out, result);
  }
};

// A pair (x_{t-1}, x_t), t >= 1: previous = a0 x + s0 z0, current = a1 previous + s1 z1;  rows (a0, s0, a1, s1)
template <class E>
struct NoisePair {
  using A = typename E::A;
  const void* x;
  void *previous, *current;

  template <class U>
  DGF_HD void operator()(const Work& w, const U& u) const {
    typename E::T in[U::size];
    A z[U::size], p[U::size], q[U::size];
    u.load(x, in);
    const Rows<U, 4> rows(w, u);
    u.normals(0, z);
    rows.each([&](int j, const auto& row) {
      const A s = row[1], mean = row[0] * E::load(in[j]);
      p[j] = s == A(0) ? mean : madd(s, z[j], mean);
    });
    u.store(previous, p);
    u.normals(1, z);
    rows.each([&](int j, const auto& row) { q[j] = madd(row[3], z[j], row[2] * p[j]); });
    u.store(current, q);
  }
};

std::tuple<Tensor, Tensor> add_noise(Tensor x, Tensor rows, MaybeTensor t, int64_t row, double sigma, int64_t key,
                                     MaybeTensor key_t, int64_t first, bool return_noise) {
  Grid g = make_grid(x, key, key_t, first);
  set_rows(g, x, rows, 2, t, row);
  Tensor out = uninitialized_like(x);
  Tensor noise = return_noise ? uninitialized_like(x) : uninitialized_vector(x, 0);
  const void* in = x.data_ptr();
  void *o = out.data_ptr(), *z = return_noise ? noise.data_ptr() : nullptr;
  with_dtype(dtype_of(x), [&](auto element) {
    using E = decltype(element);
    launch<E>(x, g, {in, o, z}, AddNoise<E>{in, o, z, static_cast<typename E::A>(sigma)});
  });
  return {out, noise};
}

std::tuple<Tensor, Tensor> noise_pair(Tensor x, Tensor rows, MaybeTensor t, int64_t row, int64_t key, MaybeTensor key_t,
                                      int64_t first) {
  Grid g = make_grid(x, key, key_t, first);
  set_rows(g, x, rows, 4, t, row);
  Tensor previous = uninitialized_like(x), current = uninitialized_like(x);
  const void* in = x.data_ptr();
  void *p = previous.data_ptr(), *q = current.data_ptr();
  with_dtype(dtype_of(x), [&](auto element) {
    using E = decltype(element);
    launch<E>(x, g, {in, p, q}, NoisePair<E>{in, p, q});
  });
  return {previous, current};
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CUDA, m) {
  m.impl("add_noise", TORCH_BOX(&dgf::add_noise));
  m.impl("noise_pair", TORCH_BOX(&dgf::noise_pair));
}
