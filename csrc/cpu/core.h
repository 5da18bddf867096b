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

// Products of matrices: the right factor comes in panels of this many columns, each [k, kPanel].
constexpr int64_t kPanel = 16;

// What becomes of a product's elements, with f(z) = z for z > 0, else slope z:
//   v = (sum + bias) f'(gate) + add,   out = v,   active = f(v)
// Each pointer may be null. All but bias [n] are matrices of rows `stride` apart; add may be out.
template <class A> struct Finish {
  const A *bias = nullptr, *gate = nullptr, *add = nullptr;
  A slope = 0;
  int64_t stride = 0;
  A *out = nullptr, *active = nullptr;
};

// Some channels of one sample, in whole groups; pixels are `stride` apart. Pointers are those of the first channel (stats:
// of the first group: its mean and 1 / standard deviation). shift may be null.
constexpr int64_t kNormChannels = 64;
struct NormPart {
  int64_t pixels, stride, channels, per_group;
  const float *x, *scale, *bias, *shift, *stats;
  float* out;
};

constexpr int64_t kWinogradInputs = 16;  // whose weights are transformed at a time

// The weights of a 3x3 convolution, by the distances of neighbours in their four dimensions.
struct WinogradWeights {
  const float* data;
  int64_t output, input, down, right;
};

// A product of matrices [rows, k] [k, panel]. Element (r, i) stands at a + r row + i column, the second factor's row i at
// b + i step, in vectors that are `vector` apart, and the result's row r at out + r to.
struct MatrixProduct {
  int64_t rows, k;
  const float* a;
  int64_t row, column;
  const float* b;
  int64_t step, vector;
  float* out;
  int64_t to;
};

// See winograd.h. Products come in panels of `panel` columns; `rows` of them are made at a time.
struct Winograd {
  int64_t panel, rows;
  void (*patch)(const float* const* pixels, int64_t channels, float* out, int64_t step);
  void (*weights)(WinogradWeights, int64_t inputs, int64_t outputs, float* out, int64_t step, int64_t row);
  void (*tile)(const float* m, int64_t step, const float* bias, int64_t channels, int64_t height, int64_t width, float* out,
               int64_t down, int64_t right);
  void (*product)(const MatrixProduct&);
  void (*tile_back)(const float* const* pixels, int64_t channels, float* out, int64_t step, float* sums);
  void (*weights_back)(const float* u, int64_t step, int64_t runs, int64_t run, int64_t inputs, float* out);
  void (*add_product)(const MatrixProduct&);
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
  void (*sinusoids)(int64_t n, int64_t half, const float* x, const float* frequencies, float* out);
  void (*group_norm_silu)(const NormPart&, float eps, float* stats);
  void (*group_norm_silu_grad)(const NormPart&, const float* grad, double* scale, double* bias, float* shift);
  // of products.h; all but `finish` are null where torch's own libraries are faster
  void (*finish)(int64_t rows, int64_t width, const float* sums, int64_t stride, int64_t r, int64_t j, const Finish<float>&);
  void (*pack)(const float* w, bool transposed, int64_t k, int64_t n, int64_t stride, int64_t panel, float* out);
  void (*product)(int64_t m, int64_t n, int64_t k, const float* a, int64_t row, int64_t column, const float* panels,
                  const Finish<float>&);
  void (*add_outer)(int64_t rows, int64_t k, const float* a, const float* b, float* sums);
  const Winograd* winograd;  // null without vectors
};

Kernels baseline_kernels();
#ifdef DGF_X86
Kernels avx2_kernels();
Kernels avx512_kernels();
#endif

}  // namespace dgf
