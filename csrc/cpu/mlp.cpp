// Small fully connected networks, a whole one in one parallel region: a thread takes a block of rows through all layers
// while they stay in its cache. Products go through the BLAS that torch itself is linked with.
//
//   z_0 = W_0 x + b_0,   z_i = [z_{i-1}] + W_i f(z_{i-1}) + b_i  (the term in brackets where `skip`),
//   out = W_last f(z) + b_last,   f(z) = z for z > 0, else slope z
//
// The weights' gradients are products over all rows. They are a second parallel region, cut along the outputs of the
// layers, so that no result depends on the number of threads.
#include <cmath>
#include <tuple>
#include <vector>

#include "op.h"

extern "C" {
// Weak: a torch whose BLAS does not show these has no fused networks, and Python takes the plain ones.
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                                  const int*, const float*, const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                                  const double*, const int*, const double*, const int*, const double*, double*, const int*);
}

namespace dgf {
namespace {

constexpr int64_t kRows = 128;   // of a block: what every layer reads and writes then stays in a second-level cache
constexpr int64_t kOutputs = 64;  // of a layer, whose weights' gradient is one task

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

// Row-major products. BLAS is column-major, so the factors change places.
// c [m, n] = beta c + a [m, k] w^T, w [n, k]
template <class A> void times_transposed(int64_t m, int64_t n, int64_t k, const A* a, const A* w, A beta, A* c) {
  gemm("T", "N", int(n), int(m), int(k), w, int(k), a, int(k), beta, c, int(n));
}
// c [m, k] = a [m, n] w [n, k]
template <class A> void times(int64_t m, int64_t n, int64_t k, const A* a, const A* w, A* c) {
  gemm("N", "N", int(k), int(m), int(n), w, int(k), a, int(n), A(0), c, int(k));
}
// c [n, k] = a^T b over m rows, of a's columns first … first + n and b [m, k]
template <class A>
void transposed_times(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b, A* c) {
  gemm("N", "T", int(k), int(n), int(m), b, int(k), a, int(lda), A(0), c, int(k));
}

template <class A> struct Net {
  std::vector<const A*> weights, biases;
  std::vector<int64_t> widths;  // of the input, then of each layer's output
  A slope;
  bool skip;

  int64_t layers() const { return static_cast<int64_t>(weights.size()); }
  int64_t hidden() const { return widths[1]; }
  int64_t inputs() const { return widths.front(); }
  int64_t outputs() const { return widths.back(); }
  int64_t parameters() const {  // of a flat gradient: weights and biases, layer by layer
    int64_t n = 0;
    for (size_t i = 1; i < widths.size(); ++i) n += widths[i] * (widths[i - 1] + 1);
    return n;
  }
};

// The network of a call's lists, with everything checked. `biases` may be empty where only slopes matter.
template <class A>
Net<A> make_net(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, double slope,
                bool skip) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "diffgan_fast: x must be a contiguous [N, D]");
  STD_TORCH_CHECK(weights.size() >= 2 && (biases.empty() || biases.size() == weights.size()),
                  "diffgan_fast: expected two or more layers, each with a weight and a bias");
  Net<A> net{{}, {}, {x.size(1)}, static_cast<A>(slope), skip};
  const auto fits = [&](const Tensor& v) {
    return v.is_cpu() && v.is_contiguous() && v.scalar_type() == x.scalar_type();
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    STD_TORCH_CHECK(fits(w) && w.dim() == 2 && w.size(1) == net.widths.back() &&
                        (i == 0 || i + 1 == weights.size() || w.size(0) == net.widths[1]),
                    "diffgan_fast: weights have the wrong shape, type, layout or device");
    net.widths.push_back(w.size(0));
    net.weights.push_back(static_cast<const A*>(w.data_ptr()));
    if (biases.empty()) continue;
    STD_TORCH_CHECK(fits(biases[i]) && biases[i].dim() == 1 && biases[i].size(0) == w.size(0),
                    "diffgan_fast: biases have the wrong shape, type, layout or device");
    net.biases.push_back(static_cast<const A*>(biases[i].data_ptr()));
  }
  return net;
}

template <class Fn> auto with_real(const Tensor& x, Fn&& f) {
  if (dtype_of(x) == Dtype::f64) return f(double());
  STD_TORCH_CHECK(dtype_of(x) == Dtype::f32, "diffgan_fast: fused networks are float32 or float64");
  return f(float());
}

// one(first row, rows) for blocks of rows, on torch's threads.
template <class One> void for_rows(int64_t n, One&& one) {
  torch::stable::parallel_for(0, (n + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) one(b * kRows, b * kRows + kRows < n ? kRows : n - b * kRows);
  });
}

// ---- the loops between the products. Their arguments are plain values and restricted pointers, so that they vectorise ----

template <class A> inline A slope_at(A z, A slope) { return z > A(0) ? A(1) : slope; }

// out = f(z)
template <class A> void activate(int64_t n, A slope, const A* __restrict z, A* __restrict out) {
  for (int64_t j = 0; j < n; ++j) out[j] = z[j] * slope_at(z[j], slope);
}

// out = row, or x + row
template <class A>
void add_row(int64_t m, int64_t width, const A* __restrict x, const A* __restrict row, A* __restrict out) {
  for (int64_t r = 0; r < m; ++r, out += width) {
    if (x) {
      for (int64_t j = 0; j < width; ++j) out[j] = x[r * width + j] + row[j];
    } else {
      for (int64_t j = 0; j < width; ++j) out[j] = row[j];
    }
  }
}

// out = g f'(z), or g f'(z) + x
template <class A>
void scale_by_slope(int64_t n, A slope, const A* __restrict z, const A* __restrict g, const A* __restrict x,
                    A* __restrict out) {
  if (x) {
    for (int64_t j = 0; j < n; ++j) out[j] = g[j] * slope_at(z[j], slope) + x[j];
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = g[j] * slope_at(z[j], slope);
  }
}

// z_0 … z_{layers-2} of a block of rows; z_i stands at hidden + i * stride. With stride 0 each overwrites the last.
// `active` holds f(z) of the last one afterwards.
template <class A> void hidden_layers(const Net<A>& net, int64_t m, const A* x, A* hidden, int64_t stride, A* active) {
  const int64_t H = net.hidden();
  add_row<A>(m, H, nullptr, net.biases[0], hidden);
  times_transposed(m, H, net.inputs(), x, net.weights[0], A(1), hidden);
  activate(m * H, net.slope, hidden, active);
  for (int64_t i = 1; i < net.layers() - 1; ++i) {
    const A* z = hidden;
    hidden += stride;
    const A* bias = net.biases[static_cast<size_t>(i)];
    if (net.skip && stride == 0) {
      for (int64_t r = 0; r < m; ++r)
        for (int64_t j = 0; j < H; ++j) hidden[r * H + j] += bias[j];
    } else {
      add_row<A>(m, H, net.skip ? z : nullptr, bias, hidden);
    }
    times_transposed(m, H, H, active, net.weights[static_cast<size_t>(i)], A(1), hidden);
    activate(m * H, net.slope, hidden, active);
  }
}

std::tuple<Tensor, Tensor> mlp(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, double slope, bool skip,
                               bool keep) {
  return with_real(x, [&](auto real) -> std::tuple<Tensor, Tensor> {
    using A = decltype(real);
    const Net<A> net = make_net<A>(x, weights, biases, slope, skip);
    const int64_t N = x.size(0), H = net.hidden(), K = net.outputs(), L = net.layers();
    const int64_t sizes[3] = {L - 1, N, H}, out_sizes[2] = {N, K};
    const int64_t strides[3] = {N * H, H, 1}, out_strides[2] = {K, 1};
    Tensor hidden = keep ? uninitialized(x, 3, sizes, strides) : uninitialized_vector(x, 0);
    Tensor out = uninitialized(x, 2, out_sizes, out_strides);
    const A* in = static_cast<const A*>(x.data_ptr());
    A *kept = keep ? static_cast<A*>(hidden.data_ptr()) : nullptr, *o = static_cast<A*>(out.data_ptr());
    for_rows(N, [&](int64_t r, int64_t m) {
      std::vector<A> scratch(static_cast<size_t>((keep ? 1 : 2) * m * H));
      A* z = keep ? kept + r * H : scratch.data() + m * H;
      hidden_layers(net, m, in + r * net.inputs(), z, keep ? N * H : 0, scratch.data());
      add_row<A>(m, K, nullptr, net.biases.back(), o + r * K);
      times_transposed(m, K, H, scratch.data(), net.weights.back(), A(1), o + r * K);
    });
    return {out, hidden};
  });
}

// A weight's gradient delta^T h over all rows, in tasks of kOutputs outputs. Tasks of one number lie in all layers, so
// that neighbouring threads get equal shares.
struct Product {
  const void *delta, *h;
  void *weight, *bias;  // bias may be null
  int64_t outputs, inputs;
};

template <class A> void products(int64_t N, const std::vector<Product>& all) {
  int64_t most = 0;
  for (const Product& p : all) most = p.outputs > most ? p.outputs : most;
  const int64_t layers = static_cast<int64_t>(all.size()), blocks = (most + kOutputs - 1) / kOutputs;
  torch::stable::parallel_for(0, layers * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Product& p = all[static_cast<size_t>(task % layers)];
      const int64_t first = task / layers * kOutputs;
      if (first >= p.outputs) continue;
      const int64_t n = p.outputs - first < kOutputs ? p.outputs - first : kOutputs;
      const A* delta = static_cast<const A*>(p.delta) + first;
      transposed_times(N, n, p.inputs, delta, p.outputs, static_cast<const A*>(p.h),
                       static_cast<A*>(p.weight) + first * p.inputs);
      if (!p.bias) continue;
      A* bias = static_cast<A*>(p.bias) + first;
      for (int64_t j = 0; j < n; ++j) bias[j] = A(0);
      for (int64_t r = 0; r < N; ++r)
        for (int64_t j = 0; j < n; ++j) bias[j] += delta[r * p.outputs + j];
    }
  });
}

// (gradient of x, flat gradient of weights and biases), each empty where it is not wanted.
std::tuple<Tensor, Tensor> mlp_backward(Tensor grad, Tensor x, Tensor hidden, std::vector<Tensor> weights, double slope,
                                        bool skip, bool want_x, bool want_parameters) {
  return with_real(x, [&](auto real) -> std::tuple<Tensor, Tensor> {
    using A = decltype(real);
    const Net<A> net = make_net<A>(x, weights, {}, slope, skip);
    const int64_t N = x.size(0), H = net.hidden(), K = net.outputs(), L = net.layers();
    STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == N * K && grad.scalar_type() == x.scalar_type() &&
                        hidden.is_contiguous() && hidden.numel() == (L - 1) * N * H,
                    "diffgan_fast: the gradient or the hidden layers do not fit x");
    Tensor grad_x = want_x ? uninitialized_like(x) : uninitialized_vector(x, 0);
    Tensor flat = uninitialized_vector(x, want_parameters ? net.parameters() : 0);
    const auto *z = static_cast<const A*>(hidden.data_ptr()), *in = static_cast<const A*>(x.data_ptr());
    const auto* g = static_cast<const A*>(grad.data_ptr());
    A* gx = want_x ? static_cast<A*>(grad_x.data_ptr()) : nullptr;
    // what the products need of every layer: its output's gradient and its input, for all rows
    const size_t kept = want_parameters ? static_cast<size_t>((L - 1) * N * H) : 0;
    Tensor store = uninitialized_vector(x, static_cast<int64_t>(2 * kept));
    A* deltas = static_cast<A*>(store.data_ptr());
    A* actives = deltas + kept;
    for_rows(N, [&](int64_t r, int64_t m) {
      std::vector<A> scratch(static_cast<size_t>(2 * m * H));
      const A* above = g + r * K;  // gradient of layer i's output
      for (int64_t i = L - 1; i >= 1; --i) {
        A* product = scratch.data();
        times(m, i == L - 1 ? K : H, H, above, net.weights[static_cast<size_t>(i)], product);
        A* delta = want_parameters ? deltas + ((i - 1) * N + r) * H : scratch.data() + m * H;
        A* active = want_parameters ? actives + ((i - 1) * N + r) * H : nullptr;
        const A* zi = z + ((i - 1) * N + r) * H;
        scale_by_slope(m * H, net.slope, zi, product, skip && i < L - 1 ? above : nullptr, delta);
        if (active) activate(m * H, net.slope, zi, active);
        above = delta;
      }
      if (gx) times(m, H, net.inputs(), above, net.weights[0], gx + r * net.inputs());
    });
    if (want_parameters) {
      std::vector<Product> all;
      A* out = static_cast<A*>(flat.data_ptr());
      for (int64_t i = 0; i < L; ++i) {
        const int64_t o = net.widths[static_cast<size_t>(i) + 1], k = net.widths[static_cast<size_t>(i)];
        const A* delta = i == L - 1 ? g : deltas + i * N * H;
        all.push_back({delta, i == 0 ? in : actives + (i - 1) * N * H, out, out + o * k, o, k});
        out += o * (k + 1);
      }
      products<A>(N, all);
    }
    return {grad_x, flat};
  });
}

// slopes = f'(z), then z = g f'(z)
template <class A> void turn(int64_t n, A slope, const A* __restrict g, A* __restrict z, A* __restrict slopes) {
  for (int64_t j = 0; j < n; ++j) {
    const A s = slope_at(z[j], slope);
    slopes[j] = s;
    z[j] = g[j] * s;
  }
}

template <class A> void multiply(int64_t n, const A* __restrict x, A* __restrict out) {
  for (int64_t j = 0; j < n; ++j) out[j] *= x[j];
}

// The gradient penalty of a network without skips, and its flat gradient (of the weights; the biases' is 0), from four
// passes and no graph: masks, g = sum of the outputs' gradients with respect to x's first `judged` columns, the tangent
// along v = dP/dg, and the products. See diffgan_fast/ops/penalty.py.
std::tuple<Tensor, Tensor> mlp_penalty(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, double slope,
                                       int64_t judged, double center) {
  return with_real(x, [&](auto real) -> std::tuple<Tensor, Tensor> {
    using A = decltype(real);
    const Net<A> net = make_net<A>(x, weights, biases, slope, false);
    const int64_t N = x.size(0), D = net.inputs(), H = net.hidden(), K = net.outputs(), L = net.layers();
    STD_TORCH_CHECK(judged >= 1 && judged <= D && net.biases.size() == net.weights.size(),
                    "diffgan_fast: judged columns must be 1 … the input's, and every layer must have a bias");
    int64_t count = 0;
    for (size_t i = 0; i < net.weights.size(); ++i) count += net.widths[i] * net.widths[i + 1];
    Tensor flat = uninitialized_vector(x, count), mean = uninitialized(x, 0, nullptr, nullptr);
    const A* in = static_cast<const A*>(x.data_ptr());
    std::vector<A> top(static_cast<size_t>(H));  // the gradient of the outputs' sum at the last hidden layer
    for (int64_t k = 0; k < K; ++k)
      for (int64_t j = 0; j < H; ++j) top[static_cast<size_t>(j)] += net.weights.back()[k * H + j];
    Tensor store = uninitialized_vector(x, 2 * (L - 1) * N * H + N * D + N * K);
    A* deltas = static_cast<A*>(store.data_ptr());  // first the hidden layers, then d out / d z in their place
    A* tangents = deltas + (L - 1) * N * H;
    A* v = tangents + (L - 1) * N * H;
    A* ones = v + N * D;
    std::vector<double> squares(static_cast<size_t>(N));
    for_rows(N, [&](int64_t r, int64_t m) {
      std::vector<A> scratch(static_cast<size_t>(m * H));
      hidden_layers(net, m, in + r * D, deltas + r * H, N * H, scratch.data());
      for (int64_t i = L - 2; i >= 0; --i) {
        A *delta = deltas + (i * N + r) * H, *slopes = tangents + (i * N + r) * H;
        if (i == L - 2) {
          add_row<A>(m, H, nullptr, top.data(), scratch.data());
        } else {
          times(m, H, H, deltas + ((i + 1) * N + r) * H, net.weights[static_cast<size_t>(i + 1)], scratch.data());
        }
        turn(m * H, net.slope, scratch.data(), delta, slopes);
      }
      A* h = v + r * D;
      times(m, H, D, deltas + r * H, net.weights[0], h);
      for (int64_t n = 0; n < m; ++n) {
        double sum = 0;
        for (int64_t j = 0; j < judged; ++j) sum += double(h[n * D + j]) * double(h[n * D + j]);
        const double norm = std::sqrt(sum);
        squares[static_cast<size_t>(r + n)] = center == 0 ? sum : (norm - center) * (norm - center);
        const double factor = center == 0 ? 2.0 / double(N) : norm > 0 ? 2 * (norm - center) / (norm * double(N)) : 0;
        for (int64_t j = 0; j < D; ++j) h[n * D + j] = j < judged ? static_cast<A>(factor * h[n * D + j]) : A(0);
        for (int64_t k = 0; k < K; ++k) ones[(r + n) * K + k] = A(1);
      }
      for (int64_t i = 0; i < L - 1; ++i) {
        times_transposed(m, H, i == 0 ? D : H, h, net.weights[static_cast<size_t>(i)], A(0), scratch.data());
        h = tangents + (i * N + r) * H;
        multiply(m * H, scratch.data(), h);
      }
    });
    double total = 0;
    for (double s : squares) total += s;
    *static_cast<A*>(mean.data_ptr()) = static_cast<A>(total / double(N));
    std::vector<Product> all;
    A* out = static_cast<A*>(flat.data_ptr());
    for (int64_t i = 0; i < L; ++i) {
      const int64_t o = net.widths[static_cast<size_t>(i) + 1], k = net.widths[static_cast<size_t>(i)];
      all.push_back({i == L - 1 ? ones : deltas + i * N * H, i == 0 ? v : tangents + (i - 1) * N * H, out, nullptr, o, k});
      out += o * k;
    }
    products<A>(N, all);
    return {mean, flat};
  });
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CPU, m) {
  if (!sgemm_ || !dgemm_) return;
  m.impl("mlp", TORCH_BOX(&dgf::mlp));
  m.impl("mlp_backward", TORCH_BOX(&dgf::mlp_backward));
  m.impl("mlp_penalty", TORCH_BOX(&dgf::mlp_penalty));
}
