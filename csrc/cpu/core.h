// What the CPU kernels and their callers agree on. No torch here: files compiled for one instruction set include only
// this, <immintrin.h> and philox.h, and are reached through the table of function pointers at the end.
#pragma once
#include "../grid.h"

namespace dgf {

// Work is cut into chunks of the numbering of the elements.
constexpr int64_t kChunk = 2048;

struct StepArgs {
  const void *x, *e, *e_uncond, *logit_grad;  // the last two may be null
  void* out;
  double guidance_scale, logit_scale;
  bool clip;
};

// Kernels work on one chunk (`square_sums`: on pieces of samples). Those that read coefficient rows return false if one
// is out of range or undefined.
struct Kernels {
  void (*random)(const Grid&, Draw, Dtype, uint32_t stream, uint64_t high, void* out, int64_t chunk);
  bool (*add_noise)(const Grid&, Dtype, const void* x, double sigma, void* out, void* noise, int64_t chunk);
  bool (*noise_pair)(const Grid&, Dtype, const void* x, void* previous, void* current, int64_t chunk);
  bool (*step)(const Grid&, Dtype, const StepArgs&, int64_t chunk);
  bool (*residual)(const Grid&, Dtype, const void* x, const void* y, double scale, void* out, double* sum, int64_t chunk);
  void (*interpolate)(const Grid&, Dtype, const void* real, const void* fake, void* out, int64_t chunk);
  void (*square_sums)(const Grid&, Dtype, const void* x, int64_t pieces, double* sums, int64_t begin, int64_t end);
  void (*scale_samples)(const Grid&, Dtype, const void* x, const double* factors, void* out, int64_t chunk);
};

Kernels baseline_kernels();
#ifdef DGF_AVX2
Kernels avx2_kernels();
#endif

}  // namespace dgf
