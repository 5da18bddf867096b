// Plain C++: any processor, one lane at a time.
#include "kernels.h"

namespace dgf {
namespace {

struct Plain : Scalar {
  static void counters(uint64_t block, I& lo, I& hi) {
    lo = static_cast<uint32_t>(block);
    hi = static_cast<uint32_t>(block >> 32);
  }
  static I nearest(F a) { return static_cast<I>(static_cast<int32_t>(std::lrintf(a))); }
  static F div(F a, F b) { return a / b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F load(const float* p) { return *p; }
  static F load(const float* p, int64_t) { return *p; }
  static void store(float* p, F v) { *p = v; }
  static void store(float* p, int64_t, F v) { *p = v; }
  static F slope_at(F z, float slope) { return dgf::slope_at(z, slope); }
  static void store_blocks(float* out, const F z[4]) {
    for (int j = 0; j < 4; ++j) out[j] = z[j];
  }
};

}  // namespace

Kernels baseline_kernels() { return kernels_of<Plain>(); }

}  // namespace dgf
