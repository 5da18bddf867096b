// What the CPU kernels and their callers agree on. No torch here: files compiled for one instruction set include only
// this, <immintrin.h> and philox.h, and are reached through the table of function pointers at the end.
#pragma once
#include <cstdint>

namespace dgf {

enum class Dtype { f32, f64, f16, bf16 };
enum class Draw { bits, uniform, normal, integers };

// Elements are numbered by their place in the contiguous [N, C, ...] tensor, whatever the memory format; work is cut
// into chunks of that numbering. Element e draws noise number first + e, and takes its coefficients from a row of
// `rows` [n_rows, columns]: row t[e / inner] where t is given, else `row`, or row e / inner where row is -1.
struct Grid {
  int64_t n = 0;       // elements
  int64_t sample = 1;  // elements of one sample
  int64_t inner = 1;   // elements that share a coefficient row
  int64_t plane = 0;   // channels_last: H*W, else 0
  int64_t channels = 1;
  const int64_t* t = nullptr;
  int64_t row = 0;
  const void* rows = nullptr;  // float, or double for Dtype::f64
  int64_t n_rows = 0;
  uint64_t key = 0;
  const int64_t* keys = nullptr;  // one key a sample; noise is then numbered within the sample
  uint64_t first = 0;
};

constexpr int64_t kChunk = 2048;

struct StepArgs {
  const void *x, *e, *e_uncond, *logit_grad;  // the last two may be null
  void* out;
  double guidance_scale, logit_scale;
  bool clip;
};

// Every kernel works on one chunk and returns false if a coefficient row is out of range or undefined.
struct Kernels {
  void (*random)(const Grid&, Draw, Dtype, uint32_t stream, uint64_t high, void* out, int64_t chunk);
  bool (*add_noise)(const Grid&, Dtype, const void* x, double sigma, void* out, void* noise, int64_t chunk);
  bool (*noise_pair)(const Grid&, Dtype, const void* x, void* previous, void* current, int64_t chunk);
  bool (*step)(const Grid&, Dtype, const StepArgs&, int64_t chunk);
  bool (*residual)(const Grid&, Dtype, const void* x, const void* y, double scale, void* out, double* sum, int64_t chunk);
};

Kernels baseline_kernels();
#ifdef DGF_AVX2
Kernels avx2_kernels();
#endif

}  // namespace dgf
