// Sinusoidal embeddings: the sines and cosines of every number of x times every frequency.
#include "op.h"

namespace dgf {
namespace {

Tensor sinusoids(Tensor x, Tensor frequencies) {
  const int64_t N = x.numel(), half = frequencies.numel(), sizes[2] = {N, 2 * half}, strides[2] = {2 * half, 1};
  for (const Tensor& v : {x, frequencies})
    STD_TORCH_CHECK(v.is_cpu() && v.is_contiguous() && v.dim() == 1 && dtype_of(v) == Dtype::f32,
                    "diffgan_fast: embedded numbers and frequencies are float32 vectors");
  Tensor out = uninitialized(x, 2, sizes, strides);
  const auto *in = static_cast<const float*>(x.data_ptr()), *w = static_cast<const float*>(frequencies.data_ptr());
  auto* o = static_cast<float*>(out.data_ptr());
  torch::stable::parallel_for(0, N, kChunk / (half + 1) + 1, [&](int64_t begin, int64_t end) {
    kernels().sinusoids(end - begin, half, in + begin, w, o + begin * 2 * half);
  });
  return out;
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CPU, m) { m.impl("sinusoids", TORCH_BOX(&dgf::sinusoids)); }
