// Products of small matrices on the CPU: ours (products.h) for float32 where this processor has them, else those of the
// BLAS that torch itself is linked with.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "memory.h"
#include "products.h"

extern "C" {
// Weak: a torch whose BLAS does not show these has no fused networks, and Python takes the plain ones.
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                                  const int*, const float*, const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                                  const double*, const int*, const double*, const int*, const double*, double*, const int*);
}

namespace dgf {
namespace {

constexpr int64_t kInputs = 64;  // of a layer, whose weights' gradient is one task
constexpr int64_t kDepth = 128;  // rows that a weights' gradient adds up at a time, for the same reason

inline void gemm(const char* ta, const char* tb, int m, int n, int k, const float* a, int lda, const float* b, int ldb,
                 float beta, float* c, int ldc) {
  const float one = 1;
  sgemm_(ta, tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
}
inline void gemm(const char* ta, const char* tb, int m, int n, int k, const double* a, int lda, const double* b, int ldb,
                 double beta, double* c, int ldc) {
  const double one = 1;
  dgemm_(ta, tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
}

inline void finish(int64_t rows, int64_t width, const float* sums, int64_t stride, int64_t r, int64_t j,
                   const Finish<float>& f) {
  kernels().finish(rows, width, sums, stride, r, j, f);
}
inline void finish(int64_t rows, int64_t width, const double* sums, int64_t stride, int64_t r, int64_t j,
                   const Finish<double>& f) {
  for (int64_t e = r * f.stride + j; rows > 0; --rows, sums += stride, e += f.stride)
    finish_row(width, sums, at(f.bias, j), at(f.gate, e), at(f.add, e), f.slope, at(f.out, e), at(f.active, e));
}
// The whole of a product that stands in `sums`, rows `stride` apart (0: one row for all).
template <class A> void finish_all(int64_t m, int64_t n, const A* sums, int64_t stride, const Finish<A>& f) {
  for (int64_t j = 0; j < n; j += kPanel) finish(m, n - j < kPanel ? n - j : kPanel, sums + j, stride, 0, j, f);
}

// A right factor [k, n]: w itself, or the transpose of w [n, k]. `panels` is null where a BLAS makes the product.
template <class A> struct Factor {
  const A* w;
  bool transposed;
  int64_t k, n;
  A* panels = nullptr;

  int64_t blocks() const { return (n + kPanel - 1) / kPanel; }
};

// The factors of a call, in panels where our own product takes them. One parallel region for all.
template <class A> class Factors {
 public:
  explicit Factors(std::vector<Factor<A>> all) : all_(std::move(all)), room_(size()) {
    if constexpr (std::is_same_v<A, float>) {
      if (!kernels().product) return;
      std::vector<std::pair<const Factor<A>*, int64_t>> tasks;
      A* out = room_;
      for (auto& f : all_) {
        f.panels = out;
        out += f.blocks() * kPanel * f.k;
        for (int64_t p = 0; p < f.blocks(); ++p) tasks.emplace_back(&f, p);
      }
      torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 8, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const auto& [f, p] = tasks[static_cast<size_t>(i)];
          kernels().pack(f->w, f->transposed, f->k, f->n, f->transposed ? f->k : f->n, p, f->panels + p * kPanel * f->k);
        }
      });
    }
  }
  const Factor<A>& operator[](int64_t i) const { return all_[static_cast<size_t>(i)]; }

 private:
  int64_t size() const {
    int64_t n = 0;
    if (std::is_same_v<A, float> && kernels().product)
      for (const auto& f : all_) n += f.blocks() * kPanel * f.k;
    return n;
  }
  std::vector<Factor<A>> all_;
  Room<A> room_;
};

// The product of a [m, k] and a factor.
template <class A> void multiply(int64_t m, const A* a, const Factor<A>& b, Finish<A> f) {
  f.stride = b.n;
  if constexpr (std::is_same_v<A, float>) {
    if (b.panels) {
      kernels().product(m, b.n, b.k, a, b.k, 1, b.panels, f);
      return;
    }
  }
  // Row-major: BLAS is column-major, so the factors change places.
  A* sums = f.out ? f.out : f.active;
  const bool onto = f.add == sums && !f.gate;
  if (onto) f.add = nullptr;
  gemm(b.transposed ? "T" : "N", "N", int(b.n), int(m), int(b.k), b.w, int(b.transposed ? b.k : b.n), a, int(b.k),
       A(onto), sums, int(b.n));
  if (f.bias || f.gate || f.add || f.active) finish_all(m, b.n, sums, b.n, f);
}

// A layer's gradient delta^T h over all rows, delta [N, outputs] and h [N, inputs], and the sums of delta over `biased`.
template <class A> struct Gradient {
  const A *delta, *h;
  int64_t outputs, inputs;
  A *weight, *bias;  // bias may be null
  int64_t biased;    // first rows, of which the bias's gradient is the sum
};

// Columns first … first + n of a layer's gradient.
template <class A> void weight_gradient(int64_t N, const Gradient<A>& g, int64_t first, int64_t n) {
  A* out = g.weight + first;
  if constexpr (std::is_same_v<A, float>) {
    if (kernels().product) {
      Room<A> panels(kDepth * kInputs);
      if (N == 0)
        for (int64_t r = 0; r < g.outputs; ++r) std::fill_n(out + r * g.inputs, n, A(0));
      for (int64_t r = 0; r < N; r += kDepth) {
        const int64_t depth = N - r < kDepth ? N - r : kDepth;
        for (int64_t p = 0; p * kPanel < n; ++p)
          kernels().pack(g.h + r * g.inputs + first, false, depth, n, g.inputs, p, panels + p * kPanel * depth);
        Finish<A> f;
        f.add = r ? out : nullptr;
        f.out = out;
        f.stride = g.inputs;
        kernels().product(g.outputs, n, depth, g.delta + r * g.outputs, 1, g.outputs, panels, f);
      }
      return;
    }
  }
  gemm("N", "T", int(n), int(g.outputs), int(N), g.h + first, int(g.inputs), g.delta, int(g.outputs), A(0), out,
       int(g.inputs));
}

template <class A> void bias_gradient(const Gradient<A>& g) {
  std::fill_n(g.bias, g.outputs, A(0));
  for (int64_t r = 0; r < g.biased; ++r) {
    const A* __restrict delta = g.delta + r * g.outputs;
    A* __restrict bias = g.bias;
    for (int64_t j = 0; j < g.outputs; ++j) bias[j] += delta[j];
  }
}

template <class A> void gradients(int64_t N, const std::vector<Gradient<A>>& all) {
  std::vector<std::pair<const Gradient<A>*, int64_t>> tasks;
  for (const auto& g : all)
    for (int64_t first = 0; first < g.inputs; first += kInputs) tasks.emplace_back(&g, first);
  for_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const auto& [g, first] = tasks[static_cast<size_t>(i)];
    weight_gradient(N, *g, first, g->inputs - first < kInputs ? g->inputs - first : kInputs);
    if (first == 0 && g->bias) bias_gradient(*g);
  });
}

}  // namespace
}  // namespace dgf
