// What a gradient penalty is made of: a point between each real and fake sample, and the norms of samples.
//
// In both layouts the elements of a sample lie together in memory, so that elements are numbered here by their place in
// memory, and a Grid's groups are its samples.
#include <tuple>

#include "core.cuh"

namespace dgf {
namespace {

inline Grid by_sample(const Tensor& x) {
  Grid g = make_grid(x, 0, std::nullopt, 0);
  g.plane = 0;
  g.channels = 1;
  g.inner = g.sample > 0 ? g.sample : 1;
  return g;
}

// body(j, of(sample)) for the unit's numbers.
template <class U, class Of, class Body>
DGF_HD void each_sample(const Work& w, const U& u, Of&& of, Body&& body) {
  int64_t sample = u.group, left = (sample + 1) * w.g.inner - (u.element + u.low);
  auto v = of(sample);
#pragma unroll
  for (int j = 0; j < U::size; ++j) {
    if (!u.has(j)) continue;
    if (!U::packed && left-- == 0) {
      v = of(++sample);
      left = w.g.inner - 1;
    }
    body(j, v);
  }
}

// out = u real + (1 - u) fake
template <class E>
struct Interpolate {
  using A = typename E::A;
  const void *real, *fake;
  void* out;
  Grid draw;  // its numbers count samples

  // u, the uniform number `first` + sample, or number 0 of the sample's own key.
  DGF_HD A uniform_of(int64_t sample) const {
    const uint64_t number = draw.per_sample ? 0 : draw.first + static_cast<uint64_t>(sample);
    const int64_t owner = draw.per_sample ? sample : 0;
    uint32_t w[4];
    philox_block(number / 4, 0, draw.keys ? static_cast<uint64_t>(draw.keys[owner]) : draw.key, w);
    const uint32_t low = number & 1 ? w[1] : w[0], high = number & 1 ? w[3] : w[2];  // registers have no index
    return static_cast<A>((number & 2 ? high : low) >> 8) * static_cast<A>(0x1p-24);
  }

  template <class U>
  DGF_HD void operator()(const Work& w, const U& u) const {
    typename E::T a[U::size], b[U::size];
    A result[U::size];
    u.load(real, a);
    u.load(fake, b);
    each_sample(
        w, u, [&](int64_t sample) { return uniform_of(sample); },
        [&](int j, A v) { result[j] = madd(v, E::load(a[j]), (A(1) - v) * E::load(b[j])); });
    u.store(out, result);
  }
};

// out = scale (2 / N) (1 - center / norm) x, where 1 - center / 0 counts as 0, and as 1 for center 0.
template <class E>
struct NormGradient {
  using A = typename E::A;
  const void *x, *norms, *scale;
  void* out;
  A center, each;  // 2 / N

  template <class U>
  DGF_HD void operator()(const Work& w, const U& u) const {
    typename E::T in[U::size];
    A result[U::size];
    u.load(x, in);
    const A all = *static_cast<const A*>(scale) * each;
    each_sample(
        w, u,
        [&](int64_t sample) {
          const A norm = static_cast<const A*>(norms)[sample];
          return center == A(0) ? all : (norm == A(0) ? A(0) : all * ((norm - center) / norm));
        },
        [&](int j, A factor) { result[j] = factor * E::load(in[j]); });
    u.store(out, result);
  }
};

// ---- norms. Samples are cut into pieces, teams of threads sum up pieces, and teams once more the sums of pieces.
// The cut depends on the data alone and every sum has its place, so that the result is always the same: squares of one
// access in the type of the arithmetic, all else in double ----

constexpr int kPiece = 512;  // elements
constexpr int kFinal = 1024;

// The smallest power of two that is at least `work`, and at most a warp, as its logarithm.
inline int team_of(int64_t work) {
  int log = 0;
  while (log < 5 && (int64_t{1} << log) < work) ++log;
  return log;
}

// The sum of the values of a team of 2^log threads, in its first thread. Called by whole warps.
__device__ inline double team_sum(double v, int log) {
  for (int step = (1 << log) / 2; step > 0; step /= 2) v += __shfl_down_sync(0xffffffffu, v, step, 1 << log);
  return v;
}

template <class E, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    sum_pieces(const void* x, int64_t sample, int64_t count, const __grid_constant__ Divider pieces, int team,
               double* sums) {
  using T = typename E::T;
  using A = typename E::A;
  constexpr int kWidth = kPacked ? 16 / sizeof(T) : 1;  // elements an access
  const int64_t piece = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) >> team;
  const int lane = static_cast<int>(threadIdx.x) & ((1 << team) - 1);
  double total = 0;
  if (piece < count) {
    const int64_t s = pieces(piece), begin = (piece - s * pieces.divisor) * kPiece, left = sample - begin;
    const T* from = static_cast<const T*>(x) + s * sample + begin;
    const int length = left < kPiece ? static_cast<int>(left) : kPiece;
#pragma unroll 4
    for (int i = lane * kWidth; i < length; i += kWidth << team) {
      T v[kWidth];
      if constexpr (kPacked) {
        const uint4 raw = *reinterpret_cast<const uint4*>(from + i);
        memcpy(v, &raw, sizeof raw);
      } else {
        v[0] = from[i];
      }
      A sum = 0;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum = madd(E::load(v[j]), E::load(v[j]), sum);
      total += static_cast<double>(sum);
    }
  }
  total = team_sum(total, team);
  if (piece < count && lane == 0) sums[piece] = total;
}

// The norms of all samples from the sums of their pieces, and the mean of (norm - center)^2, in one block.
template <class A>
__global__ void __launch_bounds__(kFinal)
    norms_and_mean(const double* sums, int64_t samples, int64_t pieces, int team, double center, A* norms, A* mean) {
  __shared__ double part[kFinal / 32];
  const int lane = static_cast<int>(threadIdx.x) & ((1 << team) - 1);
  double total = 0;
  for (int64_t first = 0; first < samples; first += kFinal >> team) {
    const int64_t s = first + (threadIdx.x >> team);
    double square = 0;
    if (s < samples) {
#pragma unroll 4
      for (int64_t p = lane; p < pieces; p += 1 << team) square += sums[s * pieces + p];
    }
    square = team_sum(square, team);
    if (s < samples && lane == 0) {
      const double norm = ::sqrt(square), off = norm - center;
      norms[s] = static_cast<A>(norm);
      total += center == 0 ? square : off * off;
    }
  }
  total = team_sum(total, 5);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  total = team_sum(part[threadIdx.x], 5);
  if (threadIdx.x == 0) *mean = static_cast<A>(total / static_cast<double>(samples));
}

Tensor interpolate(Tensor real, Tensor fake, int64_t key, MaybeTensor key_t, int64_t first_sample) {
  const Grid draw = make_grid(real, key, key_t, first_sample);
  Tensor out = uninitialized_like(real);
  const void *a = real.data_ptr(), *b = data_like(real, fake, "fake");
  void* o = out.data_ptr();
  with_dtype(dtype_of(real), [&](auto element) {
    using E = decltype(element);
    launch<E>(real, by_sample(real), {a, b, o}, Interpolate<E>{a, b, o, draw});
  });
  return out;
}

// The mean of (norm - center)^2, and the norms.
std::tuple<Tensor, Tensor> gradient_norm(Tensor x, double center) {
  const Grid g = by_sample(x);
  const int64_t samples = x.size(0), pieces = (g.sample + kPiece - 1) / kPiece, count = samples * pieces;
  Tensor mean = uninitialized_wide(x, 0), norms = uninitialized_wide(x, 1, samples);
  Tensor partial = torch::stable::new_empty(x, {count}, ScalarType::Double);
  const void* data = x.data_ptr();
  auto* sums = static_cast<double*>(partial.data_ptr());
  const OnDevice on(x);
  with_dtype(dtype_of(x), [&](auto element) {
    using E = decltype(element);
    using A = typename E::A;
    with_access<E>(g, {data}, [&](auto packed, const Work&) {
      const int team = team_of(g.sample / 4);
      if (count) {
        sum_pieces<E, decltype(packed)::value><<<block_count(count << team, kThreads), kThreads, 0, on.stream()>>>(
            data, g.sample, count, Divider(pieces), team, sums);
        DGF_CUDA_CHECK(cudaGetLastError());
      }
      norms_and_mean<A><<<1, kFinal, 0, on.stream()>>>(sums, samples, pieces, team_of(pieces), center,
                                                       static_cast<A*>(norms.data_ptr()),
                                                       static_cast<A*>(mean.data_ptr()));
      DGF_CUDA_CHECK(cudaGetLastError());
    });
  });
  return {mean, norms};
}

Tensor gradient_norm_grad(Tensor x, Tensor norms, Tensor scale, double center) {
  const int64_t samples = x.size(0);
  for (const Tensor& v : {norms, scale})
    STD_TORCH_CHECK(same_device(x, v) && v.is_contiguous() && v.scalar_type() == wide_type(x),
                    "diffgan_fast: norms and scale have the type of the arithmetic and are on x's device");
  STD_TORCH_CHECK(norms.numel() == samples && scale.numel() == 1, "diffgan_fast: one norm a sample, and one scale");
  Tensor out = uninitialized_like(x);
  const void *in = x.data_ptr(), *each_norm = norms.data_ptr(), *factor = scale.data_ptr();
  void* o = out.data_ptr();
  with_dtype(dtype_of(x), [&](auto element) {
    using E = decltype(element);
    using A = typename E::A;
    const NormGradient<E> op{in, each_norm, factor, o, static_cast<A>(center), static_cast<A>(2.0 / samples)};
    launch<E>(x, by_sample(x), {in, o}, op);
  });
  return out;
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CUDA, m) {
  m.impl("interpolate", TORCH_BOX(&dgf::interpolate));
  m.impl("gradient_norm", TORCH_BOX(&dgf::gradient_norm));
  m.impl("gradient_norm_grad", TORCH_BOX(&dgf::gradient_norm_grad));
}
