// Small fully connected networks, a whole one in one parallel region: a thread takes a block of rows through all layers
// while they stay in its cache.
//
//   z_0 = W_0 x + b_0,   z_i = [z_{i-1}] + W_i f(z_{i-1}) + b_i  (the term in brackets where `skip`),
//   out = W_last f(z) + b_last,   f(z) = z for z > 0, else slope z
//
// The weights' gradients are products over all rows. They are a second parallel region, cut along the inputs of the
// layers, so that no result depends on the number of threads.
#include <cmath>
#include <tuple>
#include <vector>

#include "factors.h"

namespace dgf {
namespace {

// Rows of a block, in whole tiles: what a layer reads and writes then stays in a second-level cache.
constexpr int64_t kRows = 22 * kTileRows;

template <class A> struct Net {
  std::vector<const A*> weights, biases;
  std::vector<int64_t> widths;  // of the input, then of each layer's output
  A slope;
  bool skip;

  int64_t layers() const { return static_cast<int64_t>(weights.size()); }
  int64_t hidden() const { return widths[1]; }
  int64_t inputs() const { return widths.front(); }
  int64_t outputs() const { return widths.back(); }
  // Layers first … last - 1 as right factors of what goes forward, or of what goes back.
  std::vector<Factor<A>> factors(bool forward, int64_t first, int64_t last) const {
    std::vector<Factor<A>> all;
    for (int64_t i = first; i < last; ++i) {
      const auto w = static_cast<size_t>(i);
      const int64_t in = widths[w], out = widths[w + 1];
      all.push_back({weights[w], forward, forward ? in : out, forward ? out : in});
    }
    return all;
  }
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

int64_t row_blocks(int64_t n) { return (n + kRows - 1) / kRows; }

// one(first row, rows) of block b of n rows
template <class One> void of_block(int64_t b, int64_t n, One&& one) {
  one(b * kRows, b * kRows + kRows < n ? kRows : n - b * kRows);
}

template <class One> void for_rows(int64_t n, One&& one) {
  for_tasks(row_blocks(n), [&](int64_t b) { of_block(b, n, one); });
}

// f(z_0) … f(z_{layers-2}) of a block of rows; that of z_i stands at actives + i * stride.
template <class A>
void hidden_layers(const Net<A>& net, const Factors<A>& forward, int64_t m, const A* x, A* actives, int64_t stride) {
  const int64_t last = net.layers() - 2;
  Room<A> z(net.skip ? m * net.hidden() : 0);
  for (int64_t i = 0; i <= last; ++i) {
    Finish<A> f;
    f.bias = net.biases[static_cast<size_t>(i)];
    f.slope = net.slope;
    f.active = actives + i * stride;
    if (net.skip && i > 0) f.add = z;
    if (net.skip && i < last) f.out = z;
    multiply(m, i == 0 ? x : actives + (i - 1) * stride, forward[i], f);
  }
}

// Gradients of z_{layers-2} … z_0 of a block of rows, given that of its output; that of z_i stands at deltas + i * stride.
// `back`: the factors of layers 1 … layers - 1, from `first` on.
template <class A>
void hidden_gradients(const Net<A>& net, const Factors<A>& back, int64_t first, int64_t m, const A* above, const A* actives,
                      A* deltas, int64_t stride) {
  for (int64_t i = net.layers() - 1; i >= 1; --i) {
    Finish<A> f;
    f.gate = actives + (i - 1) * stride;
    f.slope = net.slope;
    f.add = net.skip && i < net.layers() - 1 ? above : nullptr;
    f.out = deltas + (i - 1) * stride;
    multiply(m, above, back[first + i - 1], f);
    above = f.out;
  }
}

// The output, and where `keep` asks for them f(z_0) …, [layers - 1, N, hidden], else an empty tensor.
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
    const Factors<A> forward(net.factors(true, 0, L));
    for_rows(N, [&](int64_t r, int64_t m) {
      Room<A> scratch(keep ? 0 : (L - 1) * m * H);
      A* actives = keep ? kept + r * H : scratch;
      const int64_t stride = keep ? N * H : m * H;
      hidden_layers(net, forward, m, in + r * net.inputs(), actives, stride);
      Finish<A> f;
      f.bias = net.biases.back();
      f.out = o + r * K;
      multiply<A>(m, actives + (L - 2) * stride, forward[L - 1], f);
    });
    return {out, hidden};
  });
}

// (gradient of x, flat gradient of weights and biases), each empty where it is not wanted. `hidden` holds f(z), which is
// above 0 where z is, as no slope is below 0.
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
    const auto *actives = static_cast<const A*>(hidden.data_ptr()), *in = static_cast<const A*>(x.data_ptr());
    const auto* g = static_cast<const A*>(grad.data_ptr());
    A* gx = want_x ? static_cast<A*>(grad_x.data_ptr()) : nullptr;
    const int64_t lowest = want_x ? 0 : 1;
    const Factors<A> back(net.factors(false, lowest, L));
    Room<A> deltas((L - 1) * N * H);  // gradients of z_0 …
    for_rows(N, [&](int64_t r, int64_t m) {
      hidden_gradients<A>(net, back, 1 - lowest, m, g + r * K, actives + r * H, deltas + r * H, N * H);
      if (!gx) return;
      Finish<A> f;
      f.out = gx + r * net.inputs();
      multiply<A>(m, deltas + r * H, back[0], f);
    });
    if (want_parameters) {
      std::vector<Gradient<A>> all;
      A* out = static_cast<A*>(flat.data_ptr());
      for (int64_t i = 0; i < L; ++i) {
        const int64_t o = net.widths[static_cast<size_t>(i) + 1], k = net.widths[static_cast<size_t>(i)];
        const A* delta = i == L - 1 ? g : deltas + i * N * H;
        all.push_back({delta, i == 0 ? in : actives + (i - 1) * N * H, o, k, out, out + o * k, N});
        out += o * (k + 1);
      }
      gradients(N, all);
    }
    return {grad_x, flat};
  });
}

// Three passes of a gradient penalty through a network without skips: masks, g = sum of the outputs' gradients with
// respect to x's first `judged` columns, and the tangent along v = weight dP/dg. See diffgan_fast/ops/penalty.py.
template <class A> struct Penalty {
  const Net<A>& net;
  const Factors<A>&forward, &back;  // of all layers but the last
  int64_t rows, judged;
  double center, weight;
  // all rows': gradients and tangents, layers `stride` apart, v, and the outputs' gradients
  A *deltas, *tangents, *v, *ones;
  int64_t stride;
  std::vector<A> top{};            // the gradient of the outputs' sum at the last hidden layer
  std::vector<double> squares{};  // (||g|| - center)^2 of each row

  Penalty& prepare() {
    STD_TORCH_CHECK(judged >= 1 && judged <= net.inputs() && net.biases.size() == net.weights.size(),
                    "diffgan_fast: judged columns must be 1 … the input's, and every layer must have a bias");
    const int64_t H = net.hidden();
    top.resize(static_cast<size_t>(H));
    for (int64_t k = 0; k < net.outputs(); ++k)
      for (int64_t j = 0; j < H; ++j) top[static_cast<size_t>(j)] += net.weights.back()[k * H + j];
    squares.resize(static_cast<size_t>(rows));
    return *this;
  }

  void block(int64_t r, int64_t m, const A* x) {
    const int64_t D = net.inputs(), H = net.hidden(), K = net.outputs(), L = net.layers();
    Room<A> actives((L - 1) * m * H);
    hidden_layers<A>(net, forward, m, x, actives, m * H);
    const auto through = [&](int64_t i, A* out) {  // the slopes of layer i
      Finish<A> f;
      f.gate = actives + i * m * H;
      f.slope = net.slope;
      f.stride = H;
      f.out = out + i * stride + r * H;
      return f;
    };
    finish_all<A>(m, H, top.data(), 0, through(L - 2, deltas));
    for (int64_t i = L - 3; i >= 0; --i)
      multiply<A>(m, deltas + (i + 1) * stride + r * H, back[i + 1], through(i, deltas));
    A* h = v + r * D;
    Finish<A> f;
    f.out = h;
    multiply<A>(m, deltas + r * H, back[0], f);
    for (int64_t n = 0; n < m; ++n) {
      double sum = 0;
      for (int64_t j = 0; j < judged; ++j) sum += double(h[n * D + j]) * double(h[n * D + j]);
      const double norm = std::sqrt(sum), scale = 2 * weight / double(rows);
      squares[static_cast<size_t>(r + n)] = center == 0 ? sum : (norm - center) * (norm - center);
      const double factor = center == 0 ? scale : norm > 0 ? scale * (norm - center) / norm : 0;
      for (int64_t j = 0; j < D; ++j) h[n * D + j] = j < judged ? static_cast<A>(factor * h[n * D + j]) : A(0);
      for (int64_t k = 0; k < K; ++k) ones[(r + n) * K + k] = A(1);
    }
    for (int64_t i = 0; i < L - 1; ++i) {
      multiply<A>(m, h, forward[i], through(i, tangents));
      h = tangents + i * stride + r * H;
    }
  }

  double mean() const {
    double total = 0;
    for (double s : squares) total += s;
    return total / double(rows);
  }
};

// The gradient penalty of a network without skips, and its flat gradient (of the weights; the biases' is 0), from four
// passes and no graph.
std::tuple<Tensor, Tensor> mlp_penalty(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, double slope,
                                       int64_t judged, double center) {
  return with_real(x, [&](auto real) -> std::tuple<Tensor, Tensor> {
    using A = decltype(real);
    const Net<A> net = make_net<A>(x, weights, biases, slope, false);
    const int64_t N = x.size(0), D = net.inputs(), H = net.hidden(), K = net.outputs(), L = net.layers();
    int64_t count = 0;
    for (size_t i = 0; i < net.weights.size(); ++i) count += net.widths[i] * net.widths[i + 1];
    Tensor flat = uninitialized_vector(x, count), mean = uninitialized(x, 0, nullptr, nullptr);
    const A* in = static_cast<const A*>(x.data_ptr());
    const Factors<A> forward(net.factors(true, 0, L - 1)), back(net.factors(false, 0, L - 1));
    Room<A> deltas((L - 1) * N * H), tangents((L - 1) * N * H), v(N * D), ones(N * K);
    Penalty<A> penalty{net, forward, back, N, judged, center, 1.0, deltas, tangents, v, ones, N * H};
    penalty.prepare();
    for_rows(N, [&](int64_t r, int64_t m) { penalty.block(r, m, in + r * D); });
    *static_cast<A*>(mean.data_ptr()) = static_cast<A>(penalty.mean());
    std::vector<Gradient<A>> all;
    A* out = static_cast<A*>(flat.data_ptr());
    for (int64_t i = 0; i < L; ++i) {
      const int64_t o = net.widths[static_cast<size_t>(i) + 1], k = net.widths[static_cast<size_t>(i)];
      const A* delta = i == L - 1 ? ones : deltas + i * N * H;
      all.push_back({delta, i == 0 ? v : tangents + (i - 1) * N * H, o, k, out, nullptr, 0});
      out += o * k;
    }
    gradients(N, all);
    return {mean, flat};
  });
}

// ---- a critic's step ----

struct Judgement {
  double loss, slope;
};

// What a logit z costs the critic, which pushes those of real samples up: see diffgan_fast/adversarial.py.
Judgement judge(int64_t loss, bool real, double z) {
  const double s = real ? -1 : 1, y = s * z;
  switch (loss) {
    case 0: return {(y > 0 ? y : 0) + std::log1p(std::exp(-std::fabs(y))), s / (1 + std::exp(-y))};
    case 1: return {y > -1 ? 1 + y : 0, y > -1 ? s : 0};
    case 2: return {0.5 * (real ? z - 1 : z) * (real ? z - 1 : z), real ? z - 1 : z};
    default: return {y, s};
  }
}

// A critic's loss on real and fake samples, plus `weight` times its gradient penalty at `between` (which may have no
// rows); the logits of real, then fake samples; the loss's flat gradient. Every weight becomes panels once, and every
// layer's gradient is one product.
std::tuple<Tensor, Tensor, Tensor> mlp_critic(Tensor real, Tensor fake, Tensor between, std::vector<Tensor> weights,
                                              std::vector<Tensor> biases, double slope, int64_t loss, int64_t judged,
                                              double center, double weight) {
  return with_real(real, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using A = decltype(zero);
    const Net<A> net = make_net<A>(real, weights, biases, slope, false);
    const int64_t D = net.inputs(), H = net.hidden(), K = net.outputs(), L = net.layers();
    for (const Tensor& x : {fake, between})
      STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.dim() == 2 && x.size(1) == D &&
                          x.scalar_type() == real.scalar_type(),
                      "diffgan_fast: real, fake and between must be alike");
    STD_TORCH_CHECK(fake.size(0) == real.size(0), "diffgan_fast: expected as many fake samples as real ones");
    STD_TORCH_CHECK(loss >= 0 && loss <= 3, "diffgan_fast: there is no such loss");
    const int64_t N = 2 * real.size(0), M = between.size(0), R = N + M, out_size[2] = {N, K}, out_strides[2] = {K, 1};
    Tensor mean = uninitialized(real, 0, nullptr, nullptr), flat = uninitialized_vector(real, net.parameters());
    Tensor logits = uninitialized(real, 2, out_size, out_strides);
    A* z = static_cast<A*>(logits.data_ptr());
    // rows of real, fake and penalised samples; the last have v and tangents in place of inputs and layers
    Room<A> inputs(R * D), actives((L - 1) * R * H), deltas((L - 1) * R * H), ends(R * K);
    std::copy_n(static_cast<const A*>(real.data_ptr()), N / 2 * D, inputs + 0);
    std::copy_n(static_cast<const A*>(fake.data_ptr()), N / 2 * D, inputs + N / 2 * D);
    const A* middle = static_cast<const A*>(between.data_ptr());
    const Factors<A> forward(net.factors(true, 0, L)), back(net.factors(false, 0, L));
    Penalty<A> penalty{net,          forward,      back,         M,           judged, center, weight,
                       deltas + N * H, actives + N * H, inputs + N * D, ends + N * K, R * H};
    penalty.prepare();
    std::vector<double> losses(static_cast<size_t>(N * K));
    const double count = double(N / 2 * K);
    const auto judge_rows = [&](int64_t r, int64_t m) {
      hidden_layers<A>(net, forward, m, inputs + r * D, actives + r * H, R * H);
      Finish<A> f;
      f.bias = net.biases.back();
      f.out = z + r * K;
      multiply<A>(m, actives + (L - 2) * R * H + r * H, forward[L - 1], f);
      for (int64_t e = r * K; e < (r + m) * K; ++e) {
        const Judgement of = judge(loss, e < N / 2 * K, double(z[e]));
        losses[static_cast<size_t>(e)] = of.loss;
        ends[e] = static_cast<A>(of.slope / count);
      }
      hidden_gradients<A>(net, back, 1, m, ends + r * K, actives + r * H, deltas + r * H, R * H);
    };
    const int64_t first = row_blocks(M);  // those of the penalty take longest
    for_tasks(first + row_blocks(N), [&](int64_t b) {
      if (b < first) {
        of_block(b, M, [&](int64_t r, int64_t m) { penalty.block(r, m, middle + r * D); });
      } else {
        of_block(b - first, N, judge_rows);
      }
    });
    double total = 0;
    for (double l : losses) total += l;
    *static_cast<A*>(mean.data_ptr()) = static_cast<A>(total / count + (M ? weight * penalty.mean() : 0));
    std::vector<Gradient<A>> all;
    A* out = static_cast<A*>(flat.data_ptr());
    for (int64_t i = 0; i < L; ++i) {
      const int64_t o = net.widths[static_cast<size_t>(i) + 1], k = net.widths[static_cast<size_t>(i)];
      const A *delta = i == L - 1 ? ends : deltas + i * R * H, *h = i == 0 ? inputs : actives + (i - 1) * R * H;
      all.push_back({delta, h, o, k, out, out + o * k, N});
      out += o * (k + 1);
    }
    gradients(R, all);
    return {mean, logits, flat};
  });
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CPU, m) {
  if (!sgemm_ || !dgemm_) return;
  m.impl("mlp", TORCH_BOX(&dgf::mlp));
  m.impl("mlp_backward", TORCH_BOX(&dgf::mlp_backward));
  m.impl("mlp_penalty", TORCH_BOX(&dgf::mlp_penalty));
  m.impl("mlp_critic", TORCH_BOX(&dgf::mlp_critic));
}
