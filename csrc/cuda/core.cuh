// What the CUDA kernels share: how work is cut into threads, memory access, coefficient rows, noise, and the launch.
//
// The noise decides the cut: a thread owns one run of consecutive noise numbers that begins with a whole Philox block,
// its *unit*. An op is a functor of one unit; `launch` calls it for all units of a Grid. Access is of two kinds:
//
//   packed   contiguous tensors whose units are whole and aligned: 16 bytes an access, 4 floats or 8 halves a unit
//   general  any shift, tail, channels_last or double: one Philox block a unit, element by element
//
// Ops that move few bytes an element are bound by instructions, not by memory: what runs for every element is counted.
// Everything but the kernels also compiles for the host, where it can be tested without a GPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlfcn.h>

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "../philox.h"
#include "../tensor.h"

#define DGF_CUDA_CHECK(call)                                                                             \
  do {                                                                                                   \
    const cudaError_t error_ = (call);                                                                   \
    STD_TORCH_CHECK(error_ == cudaSuccess, "diffgan_fast: ", cudaGetErrorName(error_), ": ",             \
                    cudaGetErrorString(error_));                                                         \
  } while (0)

namespace dgf {
namespace {

constexpr int kThreads = 256;

// ---- element types: what is loaded and stored, and the type that arithmetic is done in ----

struct F32 {
  using T = float;
  using A = float;
  static DGF_HD A load(T v) { return v; }
  static DGF_HD T store(A v) { return v; }
};
struct F64 {
  using T = double;
  using A = double;
  static DGF_HD A load(T v) { return v; }
  static DGF_HD T store(A v) { return v; }
};
struct F16 {
  using T = __half;
  using A = float;
  static DGF_HD A load(T v) { return __half2float(v); }
  static DGF_HD T store(A v) { return __float2half_rn(v); }
};
struct BF16 {
  using T = __nv_bfloat16;
  using A = float;
  static DGF_HD A load(T v) { return __bfloat162float(v); }
  static DGF_HD T store(A v) { return __float2bfloat16_rn(v); }
};

// Calls f with the struct of a dtype.
template <class Fn>
void with_dtype(Dtype d, Fn&& f) {
  switch (d) {
    case Dtype::f64: return f(F64{});
    case Dtype::f16: return f(F16{});
    case Dtype::bf16: return f(BF16{});
    default: return f(F32{});
  }
}

DGF_HD float madd(float a, float b, float c) { return fmaf(a, b, c); }
DGF_HD double madd(double a, double b, double c) { return fma(a, b, c); }

// ---- noise ----

// philox.h with the GPU's own square root (relative error 2^-23) and logarithm.
struct Lane : Scalar {
  static DGF_HD F sqrt(F a) {
#ifdef __CUDA_ARCH__
    float r;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
    return r;
#else
    return sqrtf(a);
#endif
  }
};

// ln u. The hardware's log2 is good to 2^-22 (CUDA C++ Programming Guide: absolute above 1/2, relative below). Near
// u = 1, where r = sqrt(-2 ln u) is small, that would not do, and three terms of the series take over. Taken over all
// 2^23 values of u, these bounds, the square root's and the polynomials' leave a normal within 2.8e-6 of the formula.
template <>
DGF_HD float log_unit<Lane>(float u) {
#ifdef __CUDA_ARCH__
  float log2u;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2u) : "f"(u));
#else
  const float log2u = log2f(u);
#endif
  const float v = 1.0f - u;  // exact
  return v < 0.015625f ? -v * fmaf(v, fmaf(v, 1.0f / 3, 0.5f), 1.0f) : 0.693147181f * log2u;
}

DGF_HD void normal_pair(uint32_t w0, uint32_t w1, float& c, float& s) { box_muller<Lane>(w0, w1, c, s); }

// The formula in double precision. sincospi takes the angle in half turns, where w1 is exact and needs no reduction.
DGF_HD void normal_pair(uint32_t w0, uint32_t w1, double& c, double& s) {
  const double r = ::sqrt(-2.0 * ::log((static_cast<double>(w0 >> 9) + 0.5) * 0x1p-23));
  sincospi(static_cast<double>(w1) * 0x1p-31, &s, &c);
  c *= r;
  s *= r;
}

// ---- the cut into units ----

// Division by a number known at launch, without a division: a / d = floor(2a m / 2^64) >> s for a < 2^63, with
// s = ceil(log2 d) and m = floor(2^(63+s) / d) + 1 (Granlund and Montgomery 1994).
struct Divider {
  uint64_t magic = 0;
  int64_t divisor = 1;
  int shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(d) {
    while (uint64_t{1} << shift < static_cast<uint64_t>(d)) ++shift;
    magic = static_cast<uint64_t>((static_cast<unsigned __int128>(1) << (63 + shift)) / static_cast<uint64_t>(d)) + 1;
  }
  DGF_HD int64_t operator()(int64_t a) const {
    const uint64_t twice = 2 * static_cast<uint64_t>(a);
#ifdef __CUDA_ARCH__
    return static_cast<int64_t>(__umul64hi(twice, magic) >> shift);
#else
    return static_cast<int64_t>(static_cast<uint64_t>((static_cast<unsigned __int128>(twice) * magic) >> 64) >> shift);
#endif
  }
};

// A Grid as threads see it. A segment is a stretch of consecutive noise numbers with one key and one stride in memory:
// a plane of a channels_last tensor, a sample with a key of its own, or the whole tensor. Every segment gets the same
// number of units; where segments do not begin with a whole block, two share a block and both compute it.
struct Work {
  Grid g;
  int64_t units;        // of all segments
  int64_t segment;      // elements of one
  Divider per_segment;  // units of one
  Divider channels;     // neighbouring threads take neighbouring channels, so that channels_last access is coalesced
  Divider inner;        // what shares a row: units for packed access, else elements
  int64_t row;          // the row of group 0 if there is no t
  bool one_row;         // for all elements
};

inline Work make_work(const Grid& g, int unit, bool packed) {
  Work w;
  w.g = g;
  w.segment = g.plane ? g.plane : (g.per_sample ? g.sample : g.n);
  if (w.segment == 0) w.segment = 1;  // an empty tensor
  const bool same_shift = w.segment == g.n || w.segment % 4 == 0 || (g.per_sample && g.channels == 1);
  const int64_t shift = same_shift ? static_cast<int64_t>(g.first % 4) : 3;
  const int64_t each = (w.segment + shift + unit - 1) / unit;
  w.units = g.n / w.segment * each;
  w.per_segment = Divider(each);
  w.channels = Divider(g.channels);
  w.inner = Divider(packed ? g.inner / unit : g.inner);
  w.row = g.row < 0 ? 0 : g.row;
  w.one_row = g.inner == g.n;
  return w;
}

// One thread's share.
template <class E, bool kPacked>
struct Unit {
  using T = typename E::T;
  using A = typename E::A;
  static constexpr bool packed = kPacked;
  static constexpr int size = kPacked ? 16 / sizeof(T) : 4;

  int64_t element;         // the logical index of number 0, which may lie before the segment
  int64_t offset, stride;  // of number 0 in memory
  int low, high;           // numbers low .. high are ours
  int64_t group;           // of number `low`: elements of a group share a row
  uint64_t block, key;

  // Takes unit i. False if it is empty.
  DGF_HD bool locate(const Work& w, int64_t i) {
    const Grid& g = w.g;
    int64_t sample = 0;
    if constexpr (kPacked) {
      offset = element = i * size;
      stride = 1;
      low = 0;
      high = size;
      group = w.one_row ? 0 : w.inner(i);
      int64_t number = element;
      if (g.per_sample) {
        sample = w.per_segment(i);
        number -= sample * w.segment;
      }
      block = (g.first + static_cast<uint64_t>(number)) / 4;
    } else {
      const int64_t rest = w.channels(i), c = i - rest * g.channels;
      sample = w.per_segment(rest);
      const int64_t plane = sample * g.channels + c, within = rest - sample * w.per_segment.divisor;
      const uint64_t number = g.first + static_cast<uint64_t>((g.per_sample ? c : plane) * w.segment);
      const int64_t begin = 4 * within - static_cast<int64_t>(number % 4), left = w.segment - begin;
      element = plane * w.segment + begin;
      stride = g.channels;
      offset = (plane - c) * w.segment + c + begin * stride;
      low = begin < 0 ? static_cast<int>(-begin) : 0;
      high = left < 4 ? static_cast<int>(left) : 4;
      block = number / 4 + static_cast<uint64_t>(within);
      if (low >= high) return false;
      group = w.one_row ? 0 : w.inner(element + low);
    }
    key = g.keys ? static_cast<uint64_t>(g.keys[g.per_sample ? sample : 0]) : g.key;
    return true;
  }

  DGF_HD bool has(int j) const { return kPacked || (j >= low && j < high); }

  // Data stay as they lie in memory until they are used, so that a load waits for nothing.
  DGF_HD void load(const void* from, T v[size]) const {
    const T* p = static_cast<const T*>(from) + offset;
    if constexpr (kPacked) {
      const uint4 raw = *reinterpret_cast<const uint4*>(p);
      memcpy(v, &raw, sizeof raw);
    } else {
#pragma unroll
      for (int j = 0; j < size; ++j)
        if (has(j)) v[j] = p[j * stride];
    }
  }

  DGF_HD void store(void* to, const A v[size]) const {
    T* p = static_cast<T*>(to) + offset;
    if constexpr (kPacked) {
      T packed[size];
#pragma unroll
      for (int j = 0; j < size; ++j) packed[j] = E::store(v[j]);
      uint4 raw;
      memcpy(&raw, packed, sizeof raw);
      *reinterpret_cast<uint4*>(p) = raw;
    } else {
#pragma unroll
      for (int j = 0; j < size; ++j)
        if (has(j)) p[j * stride] = E::store(v[j]);
    }
  }

  DGF_HD void words(uint32_t stream, int part, uint32_t w[4]) const { philox_block(block + part, stream, key, w); }

  DGF_HD void normals(uint32_t stream, A z[size]) const {
#pragma unroll
    for (int part = 0; part < size / 4; ++part) {
      uint32_t w[4];
      words(stream, part, w);
      normal_pair(w[0], w[1], z[4 * part], z[4 * part + 1]);
      normal_pair(w[2], w[3], z[4 * part + 2], z[4 * part + 3]);
    }
  }
};

// ---- coefficient rows ----

template <class A, int kColumns>
struct Row {
  A column[kColumns];
  DGF_HD A operator[](int i) const { return column[i]; }
};

// The rows of a unit: one where access is packed, else nearly always one, more where few elements share a row.
template <class U, int kColumns>
struct Rows {
  using A = typename U::A;
  using RowOf = Row<A, kColumns>;
  const Work& w;
  const U& u;
  const RowOf first;

  DGF_HD Rows(const Work& work, const U& unit) : w(work), u(unit), first(read(unit.group)) {}

  // All NaN where the row does not exist.
  DGF_HD RowOf read(int64_t group) const {
    const int64_t index = w.g.t ? w.g.t[group] : w.row + group;
    const A* from = static_cast<const A*>(w.g.rows) + index * kColumns;
    const bool exists = static_cast<uint64_t>(index) < static_cast<uint64_t>(w.g.n_rows);
    const A nan = static_cast<A>(Scalar::from_bits(0x7fc00000u));
    RowOf row;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) row.column[k] = exists ? from[k] : nan;
    return row;
  }

  // How many elements the first group still has, from the unit's first on.
  DGF_HD int64_t left() const { return (u.group + 1) * w.g.inner - (u.element + u.low); }
  DGF_HD bool single() const { return U::packed || w.one_row || left() >= u.high - u.low; }

  // Whether noise is needed, if its scale stands in `column`.
  DGF_HD bool noisy(int column) const { return first[column] != A(0) || !single(); }

  // body(j, row) for the unit's numbers.
  template <class Body>
  DGF_HD void each(Body&& body) const {
    if (single()) {
#pragma unroll
      for (int j = 0; j < U::size; ++j)
        if (u.has(j)) body(j, first);
      return;
    }
    RowOf row = first;
    int64_t group = u.group, rest = left();
#pragma unroll
    for (int j = 0; j < U::size; ++j) {
      if (!u.has(j)) continue;
      if (rest == 0) {
        row = read(++group);
        rest = w.g.inner;
      }
      --rest;
      body(j, row);
    }
  }
};

// ---- launching ----

template <class E, bool kPacked, class Op>
__global__ void __launch_bounds__(kThreads) map_units(const __grid_constant__ Work w, const __grid_constant__ Op op) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  Unit<E, kPacked> u;
  if (i < w.units && u.locate(w, i)) op(w, u);
}

// torch's current stream. A CPU build of torch has no such function, so it is not linked but looked up.
inline cudaStream_t current_stream(int32_t device) {
  static const auto get = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* found = library ? dlsym(library, name) : nullptr;
    return reinterpret_cast<decltype(&aoti_torch_get_current_cuda_stream)>(found ? found : dlsym(RTLD_DEFAULT, name));
  }();
  STD_TORCH_CHECK(get, "diffgan_fast: this torch has no CUDA: aoti_torch_get_current_cuda_stream was not found");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "diffgan_fast: torch gave no stream for CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

// Makes a tensor's device current, and the device before it when it goes.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) {
    const int device = x.get_device_index();
    stream_ = current_stream(device);
    DGF_CUDA_CHECK(cudaGetDevice(&before_));
    moved_ = before_ != device;
    if (moved_) DGF_CUDA_CHECK(cudaSetDevice(device));
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaStream_t stream() const { return stream_; }

 private:
  int before_ = 0;
  bool moved_ = false;
  cudaStream_t stream_ = nullptr;
};

// Blocks of `each` pieces of work, as a launch takes them.
inline unsigned block_count(int64_t pieces, int64_t each) {
  const int64_t blocks = (pieces + each - 1) / each;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "diffgan_fast: the tensor is too large");
  return static_cast<unsigned>(blocks);
}

// Whether packed access is possible: every unit whole and of one row, every access on a 16-byte boundary.
template <class E>
bool packs(const Grid& g, std::initializer_list<const void*> data) {
  constexpr int64_t unit = 16 / sizeof(typename E::T);
  if (g.plane || g.first % 4 || (g.per_sample ? g.sample : g.n) % unit || g.inner % unit) return false;
  for (const void* p : data)
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return true;
}

// Calls run(packed, work) with packed access where the type and the data allow it; `packed` is a type with a value.
template <class E, class Run>
void with_access(const Grid& g, std::initializer_list<const void*> data, Run&& run) {
  if constexpr (sizeof(typename E::T) <= 4) {
    if (packs<E>(g, data)) return run(std::true_type{}, make_work(g, 16 / sizeof(typename E::T), true));
  }
  run(std::false_type{}, make_work(g, 4, false));
}

// Runs op on all units. `data` are the tensors that it touches.
template <class E, class Op>
void launch(const Tensor& x, const Grid& g, std::initializer_list<const void*> data, const Op& op) {
  if (g.n == 0) return;
  const OnDevice on(x);
  with_access<E>(g, data, [&](auto packed, const Work& w) {
    map_units<E, decltype(packed)::value><<<block_count(w.units, kThreads), kThreads, 0, on.stream()>>>(w, op);
    DGF_CUDA_CHECK(cudaGetLastError());
  });
}

}  // namespace
}  // namespace dgf
