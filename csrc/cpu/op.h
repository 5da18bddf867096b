// What the CPU ops share: the kernels in use, and the parallel loop over the chunks of a call.
#pragma once
#include <atomic>

#include "../tensor.h"
#include "core.h"

namespace dgf {

const Kernels& kernels();       // those of the instruction set in use (random.cpp)
const char* instruction_set();  // "avx512", "avx2" or "baseline"

inline int64_t chunks(const Grid& g) {
  return g.n == 0 ? 0 : ((g.per_sample ? 0 : static_cast<int64_t>(g.first % kChunk)) + g.n + kChunk - 1) / kChunk;
}

// Runs one(chunk) -> bool for all chunks on torch's threads. False means a coefficient row that does not exist.
template <class One>
void for_chunks(const Grid& g, One&& one) {
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, chunks(g), 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      if (!one(c)) ok.store(false, std::memory_order_relaxed);
  });
  STD_TORCH_CHECK(ok.load(), "diffgan_fast: t is out of range");
}

}  // namespace dgf
