// Group norm, SiLU and the shift before them, forward and backward, of tensors that lie in memory as [N, H, W, C].
#include <tuple>

#include "memory.h"

namespace dgf {
namespace {

// How channels are cut: whole groups, about kNormChannels of them, whatever the number of threads.
struct Norm {
  int64_t N, C, pixels, groups, per_group, part, parts;
  bool per_sample;  // scale and bias have a row a sample

  Norm(const Tensor& x, const Tensor& scale, const Tensor& bias, const MaybeTensor& shift, int64_t groups)
      : N(x.size(0)), C(x.size(1)), pixels(x.size(2) * x.size(3)), groups(groups), per_sample(scale.dim() == 2) {
    STD_TORCH_CHECK(dtype_of(x) == Dtype::f32 && is_channels_last(x) && x.numel() > 0,
                    "diffgan_fast: x must be float32 in channels_last, and not empty");
    STD_TORCH_CHECK(groups > 0 && C % groups == 0 && C / groups <= kNormChannels, "diffgan_fast: impossible groups");
    const auto fits = [&](const Tensor& v, bool rows) {
      return v.is_cpu() && v.is_contiguous() && dtype_of(v) == Dtype::f32 && v.numel() == (rows ? N * C : C);
    };
    STD_TORCH_CHECK(fits(scale, per_sample) && fits(bias, per_sample) && (!shift || fits(*shift, true)),
                    "diffgan_fast: scale, bias or shift does not fit x");
    per_group = C / groups;
    part = std::min(groups, kNormChannels / per_group);
    parts = (groups + part - 1) / part;
  }

  int64_t tasks() const { return N * parts; }
  int64_t sample(int64_t task) const { return task / parts; }
  int64_t group(int64_t task) const { return task % parts * part; }
  int64_t row(int64_t task) const { return sample(task) * C + group(task) * per_group; }  // of a tensor [N, C]

  NormPart at(int64_t task, const float* x, const float* scale, const float* bias, const float* shift, const float* stats,
              float* out) const {
    const int64_t g = group(task), c = g * per_group, offset = sample(task) * pixels * C + c;
    const int64_t affine = per_sample ? row(task) : c;
    return {pixels,       C,    std::min(part, groups - g) * per_group, per_group, x + offset, scale + affine,
            bias + affine, shift ? shift + row(task) : nullptr, stats ? stats + 2 * (sample(task) * groups + g) : nullptr,
            out + offset};
  }
};

const float* floats(const Tensor& v) { return static_cast<const float*>(v.data_ptr()); }
const float* floats(const MaybeTensor& v) { return v ? floats(*v) : nullptr; }
float* floats_of(Tensor& v) { return static_cast<float*>(v.data_ptr()); }

// silu(scale norm(x + shift) + bias), and of each sample and group its mean and 1 / sqrt(variance + eps): [2 N groups].
std::tuple<Tensor, Tensor> group_norm_silu(Tensor x, Tensor scale, Tensor bias, MaybeTensor shift, int64_t groups,
                                           double eps) {
  const Norm n(x, scale, bias, shift, groups);
  Tensor out = uninitialized_like(x), stats = uninitialized_vector(x, 2 * n.N * groups);
  const float *from = floats(x), *a = floats(scale), *b = floats(bias), *s = floats(shift);
  float *to = floats_of(out), *st = floats_of(stats);
  for_tasks(n.tasks(), [&](int64_t task) {
    kernels().group_norm_silu(n.at(task, from, a, b, s, nullptr, to), static_cast<float>(eps),
                              st + 2 * (n.sample(task) * groups + n.group(task)));
  });
  return {out, stats};
}

// The gradients of x, scale, bias and shift (empty where there is none).
std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_grad(Tensor grad, Tensor x, Tensor scale, Tensor bias,
                                                                MaybeTensor shift, Tensor stats, int64_t groups) {
  const Norm n(x, scale, bias, shift, groups);
  STD_TORCH_CHECK(grad.is_cpu() && dtype_of(grad) == Dtype::f32 && is_channels_last(grad) && grad.numel() == x.numel() &&
                      stats.numel() == 2 * n.N * groups,
                  "diffgan_fast: grad or stats does not fit x");
  Tensor dx = uninitialized_like(x), dscale = uninitialized_like(scale), dbias = uninitialized_like(bias);
  Tensor dshift = uninitialized_vector(x, shift ? n.N * n.C : 0);
  const float *from = floats(x), *a = floats(scale), *b = floats(bias), *s = floats(shift), *st = floats(stats),
              *g = floats(grad);
  float *to = floats_of(dx), *ds = shift ? floats_of(dshift) : nullptr;
  Room<double> of_scale(n.N * n.C), of_bias(n.N * n.C);
  for_tasks(n.tasks(), [&](int64_t task) {
    const NormPart part = n.at(task, from, a, b, s, st, to);
    kernels().group_norm_silu_grad(part, g + (part.x - from), of_scale + n.row(task), of_bias + n.row(task),
                                   ds ? ds + n.row(task) : nullptr);
  });
  const int64_t rows = n.per_sample ? n.N : 1, summed = n.per_sample ? 1 : n.N;
  float *da = floats_of(dscale), *db = floats_of(dbias);
  for (int64_t i = 0; i < rows * n.C; ++i) {
    double total_a = 0, total_b = 0;
    for (int64_t k = 0; k < summed; ++k) {
      total_a += of_scale[i + k * n.C];
      total_b += of_bias[i + k * n.C];
    }
    da[i] = static_cast<float>(total_a);
    db[i] = static_cast<float>(total_b);
  }
  return {dx, dscale, dbias, dshift};
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&dgf::group_norm_silu));
  m.impl("group_norm_silu_grad", TORCH_BOX(&dgf::group_norm_silu_grad));
}
