// Counter-based random tensors, and the choice of the instruction set.
#include <cstdlib>
#include <cstring>
#include <string>

#include "../philox.h"
#include "op.h"

namespace dgf {
namespace {

struct Choice {
  Kernels table;
  const char* name;
};

// The best set that this processor has; DIFFGAN_FAST_CPU = baseline | avx2 | avx512 forces one. An unknown or unavailable
// name is reported by Python when it loads the library (diffgan_fast/_native.py).
Choice choose() {
#ifdef DGF_X86
  const char* wanted = std::getenv("DIFFGAN_FAST_CPU");
  const auto may = [&](const char* name) { return !wanted || std::strcmp(wanted, name) == 0; };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && may("avx512")) return {avx512_kernels(), "avx512"};
  if (avx2 && may("avx2")) return {avx2_kernels(), "avx2"};
#endif
  return {baseline_kernels(), "baseline"};
}

const Choice& choice() {
  static const Choice c = choose();
  return c;
}

void random_(Tensor out, int64_t key, MaybeTensor key_t, int64_t stream, int64_t first, int64_t draw, int64_t high) {
  STD_TORCH_CHECK(out.is_contiguous(), "diffgan_fast: random tensors are made contiguous");
  const Grid g = make_grid(out, key, key_t, first);
  const Draw kind = static_cast<Draw>(draw);
  const bool integers = kind == Draw::bits || kind == Draw::integers;
  STD_TORCH_CHECK(!integers || out.scalar_type() == ScalarType::Long, "diffgan_fast: integers are int64");
  const Dtype dtype = integers ? Dtype::f32 : dtype_of(out);
  void* data = out.data_ptr();
  for_chunks(g, [&](int64_t c) {
    kernels().random(g, kind, dtype, static_cast<uint32_t>(stream), static_cast<uint64_t>(high), data, c);
    return true;
  });
}

// [n, 4] counters and [n, 2] keys, words as int64, to [n, 4] words: what the known-answer tests call.
Tensor philox4x32_rows(Tensor counter, Tensor key) {
  STD_TORCH_CHECK(counter.is_contiguous() && key.is_contiguous() && counter.size(1) == 4 && key.size(1) == 2 &&
                      counter.size(0) == key.size(0),
                  "diffgan_fast: counter is [n, 4] and key [n, 2], contiguous");
  Tensor out = uninitialized_like(counter);
  const auto *c = static_cast<const int64_t*>(counter.data_ptr()), *k = static_cast<const int64_t*>(key.data_ptr());
  auto* o = static_cast<int64_t*>(out.data_ptr());
  for (int64_t i = 0; i < counter.size(0); ++i) {
    uint32_t w[4];
    for (int j = 0; j < 4; ++j) w[j] = static_cast<uint32_t>(c[4 * i + j]);
    philox4x32<Scalar>(w, static_cast<uint32_t>(k[2 * i]), static_cast<uint32_t>(k[2 * i + 1]));
    for (int j = 0; j < 4; ++j) o[4 * i + j] = w[j];
  }
  return out;
}

Tensor fold_each(int64_t key, MaybeTensor key_t, int64_t word, MaybeTensor word_t) {
  const Folding f = make_folding(key, key_t, word, word_t);
  Tensor out = uninitialized_like(key_t ? *key_t : *word_t);
  auto* o = static_cast<int64_t*>(out.data_ptr());
  for (int64_t i = 0; i < out.numel(); ++i) o[i] = f.at(i);
  return out;
}

std::string cpu_instruction_set() { return instruction_set(); }

}  // namespace

const Kernels& kernels() { return choice().table; }
const char* instruction_set() { return choice().name; }

}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CPU, m) {
  m.impl("random_", TORCH_BOX(&dgf::random_));
  m.impl("fold_in", TORCH_BOX(&dgf::fold_each));
  m.impl("philox4x32", TORCH_BOX(&dgf::philox4x32_rows));
}
STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&dgf::cpu_instruction_set));
}
