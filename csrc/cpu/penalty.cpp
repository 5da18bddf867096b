// What a gradient penalty is made of: a point between each real and fake sample, and the norms of samples.
#include <cmath>
#include <tuple>
#include <vector>

#include "op.h"

namespace dgf {
namespace {

// Calls f with a zero of the type of the arithmetic.
template <class F>
void with_wide(Dtype d, F&& f) {
  d == Dtype::f64 ? f(0.0) : f(0.0f);
}

Tensor interpolate(Tensor real, Tensor fake, int64_t key, MaybeTensor key_t, int64_t first_sample) {
  const Grid g = make_grid(real, key, key_t, first_sample);
  const Dtype dtype = dtype_of(real);
  Tensor out = uninitialized_like(real);
  const void *a = real.data_ptr(), *b = data_like(real, fake, "fake");
  void* o = out.data_ptr();
  for_chunks(g, [&](int64_t c) {
    kernels().interpolate(g, dtype, a, b, o, c);
    return true;
  });
  return out;
}

// The mean of (norm - center)^2, and the norms.
// Partial sums stand in the order of the pieces, whatever the number of threads: the result is always the same.
std::tuple<Tensor, Tensor> gradient_norm(Tensor x, double center) {
  const Grid g = make_grid(x, 0, std::nullopt, 0);
  const Dtype dtype = dtype_of(x);
  const int64_t samples = x.size(0), pieces = (g.sample + kChunk - 1) / kChunk;
  const int64_t each = g.sample < kChunk ? g.sample : kChunk;
  const void* data = x.data_ptr();
  std::vector<double> sums(static_cast<size_t>(samples * pieces));
  torch::stable::parallel_for(0, samples * pieces, 4 * kChunk / (each + 1) + 1, [&](int64_t begin, int64_t end) {
    kernels().square_sums(g, dtype, data, pieces, sums.data(), begin, end);
  });
  Tensor mean = uninitialized_wide(x, 0), norms = uninitialized_wide(x, 1, samples);
  with_wide(dtype, [&](auto zero) {
    using A = decltype(zero);
    auto* out = static_cast<A*>(norms.data_ptr());
    const double* sum = sums.data();
    double total = 0;
    for (int64_t s = 0; s < samples; ++s) {
      double square = 0;
      for (int64_t p = 0; p < pieces; ++p) square += *sum++;
      const double norm = std::sqrt(square), off = norm - center;
      total += center == 0 ? square : off * off;
      out[s] = static_cast<A>(norm);
    }
    *static_cast<A*>(mean.data_ptr()) = static_cast<A>(total / static_cast<double>(samples));
  });
  return {mean, norms};
}

// scale (2 / N) (1 - center / norm) x, where 1 - center / 0 counts as 0, and as 1 for center 0.
Tensor gradient_norm_grad(Tensor x, Tensor norms, Tensor scale, double center) {
  const Grid g = make_grid(x, 0, std::nullopt, 0);
  const Dtype dtype = dtype_of(x);
  const int64_t samples = x.size(0);
  for (const Tensor& v : {norms, scale})
    STD_TORCH_CHECK(v.is_cpu() && v.is_contiguous() && v.scalar_type() == wide_type(x),
                    "diffgan_fast: norms and scale have the type of the arithmetic");
  STD_TORCH_CHECK(norms.numel() == samples && scale.numel() == 1, "diffgan_fast: one norm a sample, and one scale");
  std::vector<double> factors(static_cast<size_t>(samples));
  with_wide(dtype, [&](auto zero) {
    using A = decltype(zero);
    const auto* norm = static_cast<const A*>(norms.data_ptr());
    const double all = *static_cast<const A*>(scale.data_ptr()) * 2.0 / static_cast<double>(samples);
    for (int64_t s = 0; s < samples; ++s) {
      const double v = norm[s], ratio = center == 0 ? 1 : (v == 0 ? 0 : (v - center) / v);
      factors[static_cast<size_t>(s)] = all * ratio;
    }
  });
  Tensor out = uninitialized_like(x);
  const void* data = x.data_ptr();
  void* o = out.data_ptr();
  for_chunks(g, [&](int64_t c) {
    kernels().scale_samples(g, dtype, data, factors.data(), o, c);
    return true;
  });
  return out;
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CPU, m) {
  m.impl("interpolate", TORCH_BOX(&dgf::interpolate));
  m.impl("gradient_norm", TORCH_BOX(&dgf::gradient_norm));
  m.impl("gradient_norm_grad", TORCH_BOX(&dgf::gradient_norm_grad));
}
