// The noise-prediction loss against noise that is made again, never read.
#include <tuple>

#include "core.cuh"

namespace dgf {
namespace {

// r = x + b y + s z;  rows (w, b, s)
template <class E>
struct Residual {
  using A = typename E::A;
  const void *x, *y;  // y may be null

  // body(j, w, r) for the unit's numbers.
  template <class U, class Body>
  DGF_HD void each(const Work& w, const U& u, Body&& body) const {
    typename E::T xs[U::size], ys[U::size] = {};
    A z[U::size] = {};
    u.load(x, xs);
    if (y) u.load(y, ys);
    const Rows<U, 3> rows(w, u);
    if (rows.noisy(2)) u.normals(0, z);
    rows.each([&](int j, const auto& row) {
      const A s = row[2];
      A r = E::load(xs[j]);
      if (s != A(0)) r = madd(s, z[j], r);
      if (y) r = madd(row[1], E::load(ys[j]), r);
      body(j, row[0], r);
    });
  }
};

// out = scale w r
template <class E>
struct ScaledResidual {
  using A = typename E::A;
  Residual<E> residual;
  const void* scale;  // one number on the device
  void* out;

  template <class U>
  DGF_HD void operator()(const Work& w, const U& u) const {
    const A factor = *static_cast<const A*>(scale);
    A result[U::size];
    residual.each(w, u, [&](int j, A weight, A r) { result[j] = factor * weight * r; });
    u.store(out, result);
  }
};

// ---- the sum of w r^2. The cut into blocks depends on the data alone and every sum has its place, so that the result
// is always the same: squares of a unit in the type of the arithmetic, all else in double ----

constexpr int kRepeats = 4;  // units a thread
constexpr int kFinal = 1024;

// The sum of the threads' values, in thread 0.
template <int kSize>
__device__ double block_sum(double v) {
  __shared__ double part[kSize / 32];
  for (int step = 16; step > 0; step /= 2) v += __shfl_down_sync(0xffffffffu, v, step);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < kSize / 32 ? part[threadIdx.x] : 0.0;
    for (int step = 16; step > 0; step /= 2) v += __shfl_down_sync(0xffffffffu, v, step);
  }
  return v;
}

template <class E, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    sum_units(const __grid_constant__ Work w, const __grid_constant__ Residual<E> residual, void* kept, double* partial) {
  using A = typename E::A;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kThreads * kRepeats) + threadIdx.x;
  double total = 0;
#pragma unroll 1
  for (int k = 0; k < kRepeats; ++k) {
    const int64_t i = begin + k * kThreads;
    Unit<E, kPacked> u;
    if (i >= w.units || !u.locate(w, i)) continue;
    A sum = 0, weighted[Unit<E, kPacked>::size];
    residual.each(w, u, [&](int j, A weight, A r) {
      weighted[j] = weight * r;
      sum = madd(weighted[j], r, sum);
    });
    if (kept) u.store(kept, weighted);
    total += static_cast<double>(sum);
  }
  total = block_sum<kThreads>(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

template <class A>
__global__ void __launch_bounds__(kFinal) mean_of_partials(const double* partial, unsigned count, int64_t n,
                                                            void* out) {
  double total = 0;
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < count; i += kFinal) total += partial[i];
  total = block_sum<kFinal>(total);
  if (threadIdx.x == 0) *static_cast<A*>(out) = static_cast<A>(total / static_cast<double>(n));
}

Tensor residual(Tensor x, MaybeTensor y, Tensor rows, MaybeTensor t, int64_t row, Tensor scale, int64_t key,
                MaybeTensor key_t, int64_t first) {
  Grid g = make_grid(x, key, key_t, first);
  set_rows(g, x, rows, 3, t, row);
  STD_TORCH_CHECK(same_device(x, scale) && scale.numel() == 1 && scale.scalar_type() == rows.scalar_type(),
                  "diffgan_fast: scale is one number of the rows' type on x's device");
  Tensor out = uninitialized_like(x);
  const void *a = x.data_ptr(), *b = data_like(x, y, "x0"), *factor = scale.data_ptr();
  void* o = out.data_ptr();
  with_dtype(dtype_of(x), [&](auto element) {
    using E = decltype(element);
    launch<E>(x, g, {a, b, o}, ScaledResidual<E>{{a, b}, factor, o});
  });
  return out;
}

// The mean, and w r where `keep` asks for it (else an empty tensor).
std::tuple<Tensor, Tensor> residual_mean(Tensor x, MaybeTensor y, Tensor rows, MaybeTensor t, int64_t row, bool keep,
                                         int64_t key, MaybeTensor key_t, int64_t first) {
  Grid g = make_grid(x, key, key_t, first);
  set_rows(g, x, rows, 3, t, row);
  const void *a = x.data_ptr(), *b = data_like(x, y, "x0");
  Tensor kept = keep ? uninitialized_like(x) : uninitialized_vector(x, 0);
  Tensor out = uninitialized(rows, 0, nullptr, nullptr);
  void *k = keep ? kept.data_ptr() : nullptr, *o = out.data_ptr();
  const OnDevice on(x);
  with_dtype(dtype_of(x), [&](auto element) {
    using E = decltype(element);
    with_access<E>(g, {a, b, k}, [&](auto packed, const Work& w) {
      const unsigned blocks = block_count(w.units, kThreads * kRepeats);
      Tensor partial = torch::stable::new_empty(x, {blocks}, ScalarType::Double);
      auto* sums = static_cast<double*>(partial.data_ptr());
      if (blocks) {
        sum_units<E, decltype(packed)::value><<<blocks, kThreads, 0, on.stream()>>>(w, {a, b}, k, sums);
        DGF_CUDA_CHECK(cudaGetLastError());
      }
      mean_of_partials<typename E::A><<<1, kFinal, 0, on.stream()>>>(sums, blocks, g.n, o);
      DGF_CUDA_CHECK(cudaGetLastError());
    });
  });
  return {out, kept};
}

}  // namespace
}  // namespace dgf

STABLE_TORCH_LIBRARY_IMPL(diffgan_fast, CUDA, m) {
  m.impl("residual", TORCH_BOX(&dgf::residual));
  m.impl("residual_mean", TORCH_BOX(&dgf::residual_mean));
}
