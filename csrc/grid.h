// The words in which ops and their kernels talk about a tensor: its element type, and how its elements are numbered,
// draw noise and find their coefficients. No torch here, for kernels compiled for one instruction set.
#pragma once
#include <cstdint>

namespace dgf {

enum class Dtype { f32, f64, f16, bf16 };
enum class Draw { bits, uniform, normal, integers };

// Elements are numbered by their place in the contiguous [N, C, ...] tensor, whatever the memory format. Element e
// draws noise number first + e, and takes its coefficients from a row of `rows` [n_rows, columns]: row t[e / inner]
// where t is given, else `row`, or row e / inner where row is -1.
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
  const int64_t* keys = nullptr;  // wins over `key`: one key, or one a sample
  bool per_sample = false;        // one key a sample: noise is numbered within the sample
  uint64_t first = 0;
};

}  // namespace dgf
