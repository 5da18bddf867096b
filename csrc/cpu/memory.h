// The memory that ops work in, and the parallel loop over their tasks.
#pragma once
#include <atomic>
#include <cstdlib>
#include <vector>

#include "op.h"

namespace dgf {
namespace {

// Memory of a call that the thread's next ones use again: fresh pages take as long as the loops that fill them.
class Memory {
 public:
  explicit Memory(int64_t bytes) {
    auto& spare = spares();
    auto best = spare.end();
    for (auto it = spare.begin(); it != spare.end(); ++it)
      if (it->bytes >= bytes && (best == spare.end() || it->bytes < best->bytes)) best = it;
    if (best != spare.end()) {
      block_ = *best;
      spare.erase(best);
    } else {
      block_ = {std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)), bytes};
      STD_TORCH_CHECK(block_.data, "diffgan_fast: can't allocate memory: ", bytes, " bytes");
    }
  }
  ~Memory() {
    int64_t kept = block_.bytes;
    for (const Block& b : spares()) kept += b.bytes;
    if (kept <= kKept) {
      spares().push_back(block_);
    } else {
      std::free(block_.data);
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return block_.data; }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };
  struct Spares : std::vector<Block> {
    ~Spares() {
      for (Block& b : *this) std::free(b.data);
    }
  };
  static constexpr int64_t kKept = 64 << 20;  // bytes a thread
  static Spares& spares() {
    thread_local Spares all;
    return all;
  }
  Block block_;
};

template <class A> class Room : Memory {
 public:
  explicit Room(int64_t n) : Memory((n + 1) * static_cast<int64_t>(sizeof(A))) {}
  operator A*() const { return static_cast<A*>(data()); }
};

// one(task) for all tasks, on torch's threads. Tasks differ in size: who is free takes the next.
template <class One> void for_tasks(int64_t tasks, One&& one) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) one(i);
  });
}

}  // namespace
}  // namespace dgf
