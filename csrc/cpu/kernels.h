// The loops behind the CPU ops, written once for every instruction set: baseline.cpp, avx2.cpp and avx512.cpp
// include this with their own vector type V. Noise is generated a chunk at a time into a buffer that stays in the first-level cache; the
// arithmetic around it is plain loops that the compiler vectorises for the file's instruction set.
#pragma once
#include <cstring>
#include <limits>

#include "core.h"
#include "norms.h"
#include "numbers.h"
#include "products.h"
#include "sinusoids.h"

namespace dgf {
namespace {

// ---- element types: what is loaded and stored, and the type that arithmetic is done in ----

struct F32 {
  using T = float;
  using A = float;
  static A load(T v) { return v; }
  static T store(A v) { return v; }
};
struct F64 {
  using T = double;
  using A = double;
  static A load(T v) { return v; }
  static T store(A v) { return v; }
};
struct BF16 {
  using T = uint16_t;
  using A = float;
  static A load(T v) { return Scalar::from_bits(static_cast<uint32_t>(v) << 16); }
  static T store(A v) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t b = Scalar::bits(v);
    return v != v ? T(0x7fc0) : static_cast<T>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
  }
};
struct F16 {
  using T = uint16_t;
  using A = float;
#ifdef __F16C__
  static A load(T v) { return _cvtsh_ss(v); }
  static T store(A v) { return _cvtss_sh(v, 0); }
#else
  static A load(T v) {  // scaling by 2^112 moves the exponent and normalises subnormals in one multiplication
    const uint32_t magnitude = static_cast<uint32_t>(v & 0x7fffu) << 13, sign = static_cast<uint32_t>(v & 0x8000u) << 16;
    if (magnitude >= 0x0f800000u) return Scalar::from_bits(sign | magnitude | 0x70000000u);
    return Scalar::from_bits(sign | Scalar::bits(Scalar::from_bits(magnitude) * 0x1p112f));
  }
  static T store(A v) {
    const uint32_t b = Scalar::bits(v), sign = (b >> 16) & 0x8000u;
    uint32_t a = b & 0x7fffffffu;
    if (a > 0x7f800000u) return static_cast<T>(sign | 0x7e00u);
    if (a >= 0x477ff000u) return static_cast<T>(sign | 0x7c00u);
    if (a < 0x38800000u) {  // subnormal: let one float addition round to the last place 2^-24
      const uint32_t r = Scalar::bits(Scalar::from_bits(a) + 0.5f);
      return static_cast<T>(sign | (r - 0x3f000000u));
    }
    a += 0xc8000fffu + ((a >> 13) & 1u);
    return static_cast<T>(sign | (a >> 13));
  }
#endif
};

// Calls f with the struct of a dtype.
template <class Fn>
auto with_dtype(Dtype d, Fn&& f) {
  switch (d) {
    case Dtype::f64: return f(F64{});
    case Dtype::f16: return f(F16{});
    case Dtype::bf16: return f(BF16{});
    default: return f(F32{});
  }
}

template <class A> inline A madd(A a, A b, A c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return sizeof(A) == 4 ? __builtin_fmaf(a, b, c) : __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// ---- random numbers ----

template <class V> void random_chunk(const Grid& g, Draw draw, Dtype dtype, uint32_t stream, uint64_t high, void* out,
                                     int64_t chunk) {
  const Range r = chunk_range(g, chunk);
  if (draw == Draw::bits || draw == Draw::integers) {
    fill_range(g, r, stream, static_cast<int64_t*>(out) + r.begin, Integers{high});
    return;
  }
  with_dtype(dtype, [&](auto element) {
    using E = decltype(element);
    using A = typename E::A;
    auto* o = static_cast<typename E::T*>(out) + r.begin;
    const auto make = [&](A* z) {
      if (draw == Draw::normal) {
        normals<V>(g, r, stream, z);
      } else {
        uniforms<V>(g, r, stream, z);
      }
    };
    if constexpr (sizeof(A) == sizeof(typename E::T)) {
      make(o);
    } else {
      alignas(64) A z[kChunk];
      make(z);
      for (int64_t i = 0; i < r.end - r.begin; ++i) o[i] = E::store(z[i]);
    }
  });
}

// ---- coefficient rows ----

// The row of element e, or null where it is out of range or undefined (its first entry is NaN).
template <class A> inline const A* row_of(const Grid& g, int columns, int64_t e) {
  const int64_t group = e / g.inner;
  const int64_t i = g.t ? g.t[group] : (g.row < 0 ? group : g.row);
  if (i < 0 || i >= g.n_rows) return nullptr;
  const A* row = static_cast<const A*>(g.rows) + i * columns;
  return row[0] == row[0] ? row : nullptr;
}

// Calls body(e, length, offset in memory, stride, row) for runs of elements with one coefficient row and one stride.
template <class A, class Body>
bool for_runs(const Grid& g, Range r, int columns, Body&& body) {
  for (int64_t e = r.begin; e < r.end;) {
    const A* row = row_of<A>(g, columns, e);
    if (!row) return false;
    int64_t stop = !g.t && g.row >= 0 ? r.end : (e / g.inner + 1) * g.inner;
    int64_t offset = e, stride = 1;
    if (g.plane) {
      const int64_t image = g.plane * g.channels, plane_end = (e / g.plane + 1) * g.plane;
      if (plane_end < stop) stop = plane_end;
      offset = e / image * image + e % g.plane * g.channels + e / g.plane % g.channels;
      stride = g.channels;
    }
    if (stop > r.end) stop = r.end;
    body(e, stop - e, offset, stride, row);
    e = stop;
  }
  return true;
}

// Whether any row of the range has a noise scale other than 0. Rows that have none skip the noise.
template <class A> bool wants_noise(const Grid& g, Range r, int columns, int column) {
  for (int64_t e = r.begin; e < r.end; e = (e / g.inner + 1) * g.inner) {
    const A* row = row_of<A>(g, columns, e);
    if (row && row[column] != A(0)) return true;
    if (!g.t && g.row >= 0) break;
  }
  return false;
}

// f(memory index, index in the run) over one run; contiguous runs get their own loop, which vectorises.
template <class F> inline void over(int64_t length, int64_t offset, int64_t stride, F&& f) {
  if (stride == 1) {
    for (int64_t i = 0; i < length; ++i) f(offset + i, i);
  } else {
    for (int64_t i = 0; i < length; ++i) f(offset + i * stride, i);
  }
}

// ---- forward noising: out = a x + s sigma z;  rows (a, s) ----

template <class V>
bool add_noise_chunk(const Grid& g, Dtype dtype, const void* x_, double sigma_, void* out_, void* noise_, int64_t chunk) {
  return with_dtype(dtype, [&](auto element) {
    using E = decltype(element);
    using A = typename E::A;
    const Range r = chunk_range(g, chunk);
    auto* __restrict x = static_cast<const typename E::T*>(x_);
    auto* __restrict out = static_cast<typename E::T*>(out_);
    auto* __restrict noise = static_cast<typename E::T*>(noise_);
    alignas(64) A z[kChunk];
    if (noise || wants_noise<A>(g, r, 2, 1)) normals<V>(g, r, 0, z);
    return for_runs<A>(g, r, 2, [&](int64_t e, int64_t length, int64_t offset, int64_t stride, const A* row) {
      const A a = row[0], s = row[1] * static_cast<A>(sigma_);
      const A* __restrict zr = z + (e - r.begin);
      if (noise) over(length, offset, stride, [=](int64_t m, int64_t i) { noise[m] = E::store(zr[i]); });
      if (s == A(0)) {
        over(length, offset, stride, [=](int64_t m, int64_t) { out[m] = E::store(a * E::load(x[m])); });
      } else {
        over(length, offset, stride, [=](int64_t m, int64_t i) { out[m] = E::store(madd(s, zr[i], a * E::load(x[m]))); });
      }
    });
  });
}

// ---- a pair (x_{t-1}, x_t), t >= 1: previous = a0 x + s0 z0, current = a1 previous + s1 z1;  rows (a0, s0, a1, s1) ----

template <class V>
bool noise_pair_chunk(const Grid& g, Dtype dtype, const void* x_, void* previous_, void* current_, int64_t chunk) {
  return with_dtype(dtype, [&](auto element) {
    using E = decltype(element);
    using A = typename E::A;
    const Range r = chunk_range(g, chunk);
    auto* __restrict x = static_cast<const typename E::T*>(x_);
    auto* __restrict previous = static_cast<typename E::T*>(previous_);
    auto* __restrict current = static_cast<typename E::T*>(current_);
    alignas(64) A z0[kChunk], z1[kChunk];
    normals<V>(g, r, 0, z0);
    normals<V>(g, r, 1, z1);
    return for_runs<A>(g, r, 4, [&](int64_t e, int64_t length, int64_t offset, int64_t stride, const A* row) {
      const A a0 = row[0], s0 = row[1], a1 = row[2], s1 = row[3];
      const A *__restrict y0 = z0 + (e - r.begin), *__restrict y1 = z1 + (e - r.begin);
      over(length, offset, stride, [=](int64_t m, int64_t i) {
        const A p = s0 == A(0) ? a0 * E::load(x[m]) : madd(s0, y0[i], a0 * E::load(x[m]));
        previous[m] = E::store(p);
        current[m] = E::store(madd(s1, y1[i], a1 * p));
      });
    });
  });
}

// ---- a reverse step;  rows (A, B, s, G, px, pe, c0, cx) ----
// e' = e_uncond + guidance_scale (e - e_uncond) + logit_scale G logit_grad
// out = A x + B e' + s z, or with clipping x0 = clamp(px x + pe e', -1, 1), out = c0 x0 + cx x + s z

template <class V>
bool step_chunk(const Grid& g, Dtype dtype, const StepArgs& args, int64_t chunk) {
  return with_dtype(dtype, [&](auto element) {
    using E = decltype(element);
    using A = typename E::A;
    using T = typename E::T;
    const Range r = chunk_range(g, chunk);
    auto* __restrict x = static_cast<const T*>(args.x);
    auto* __restrict eps = static_cast<const T*>(args.e);
    auto* __restrict uncond = static_cast<const T*>(args.e_uncond);
    auto* __restrict grad = static_cast<const T*>(args.logit_grad);
    auto* __restrict out = static_cast<T*>(args.out);
    const A guidance = static_cast<A>(args.guidance_scale), logit_scale = static_cast<A>(args.logit_scale);
    const bool clip = args.clip;
    alignas(64) A z[kChunk], guided[kChunk];
    if (wants_noise<A>(g, r, 8, 2)) normals<V>(g, r, 0, z);
    return for_runs<A>(g, r, 8, [&](int64_t k, int64_t length, int64_t offset, int64_t stride, const A* row) {
      const A a = row[0], b = row[1], s = row[2], w = logit_scale * row[3];
      const A px = row[4], pe = row[5], c0 = row[6], cx = row[7];
      const A* __restrict zr = z + (k - r.begin);
      A* __restrict e = guided + (k - r.begin);
      if (uncond) {
        over(length, offset, stride, [=](int64_t m, int64_t i) {
          const A u = E::load(uncond[m]);
          e[i] = madd(guidance, E::load(eps[m]) - u, u);
        });
      } else if (grad) {
        over(length, offset, stride, [=](int64_t m, int64_t i) { e[i] = E::load(eps[m]); });
      }
      if (grad) over(length, offset, stride, [=](int64_t m, int64_t i) { e[i] = madd(w, E::load(grad[m]), e[i]); });
      const auto combine = [=](auto prediction, auto noise) {
        if (clip) {
          over(length, offset, stride, [=](int64_t m, int64_t i) {
            const A v = E::load(x[m]), x0 = madd(px, v, pe * prediction(m, i));
            const A c = x0 < A(-1) ? A(-1) : (x0 > A(1) ? A(1) : x0);
            out[m] = E::store(noise(i, madd(c0, c, cx * v)));
          });
        } else {
          over(length, offset, stride, [=](int64_t m, int64_t i) {
            out[m] = E::store(noise(i, madd(a, E::load(x[m]), b * prediction(m, i))));
          });
        }
      };
      const auto with_noise = [=](auto prediction) {
        if (s == A(0)) {
          combine(prediction, [](int64_t, A v) { return v; });
        } else {
          combine(prediction, [=](int64_t i, A v) { return madd(s, zr[i], v); });
        }
      };
      if (uncond || grad) {
        with_noise([=](int64_t, int64_t i) { return e[i]; });
      } else {
        with_noise([=](int64_t m, int64_t) { return E::load(eps[m]); });
      }
    });
  });
}

// The sum of the squares of at(0) ... at(length - 1), in double precision and always in the same order.
template <class At> double sum_of_squares(int64_t length, At&& at) {
  double part[8] = {0};  // eight running sums, so that the compiler may use a vector of them
  const auto square = [&](int64_t i) {
    const double v = static_cast<double>(at(i));
    return v * v;
  };
  int64_t i = 0;
  for (; i + 8 <= length; i += 8)
    for (int j = 0; j < 8; ++j) part[j] += square(i + j);
  for (; i < length; ++i) part[0] += square(i);
  double sum = 0;
  for (double p : part) sum += p;
  return sum;
}

// ---- a residual against regenerated noise: r = x + b y + s z;  rows (w, b, s). Writes scale w r to `out` and adds up
// w r^2 to `sum`, each where it is given ----

template <class V>
bool residual_chunk(const Grid& g, Dtype dtype, const void* x_, const void* y_, double scale, void* out_, double* sum,
                    int64_t chunk) {
  return with_dtype(dtype, [&](auto element) {
    using E = decltype(element);
    using A = typename E::A;
    using T = typename E::T;
    const Range r = chunk_range(g, chunk);
    auto* __restrict x = static_cast<const T*>(x_);
    auto* __restrict y = static_cast<const T*>(y_);
    auto* __restrict out = static_cast<T*>(out_);
    alignas(64) A z[kChunk];
    if (wants_noise<A>(g, r, 3, 2)) normals<V>(g, r, 0, z);
    double total = 0;
    const bool ok = for_runs<A>(g, r, 3, [&](int64_t e, int64_t length, int64_t offset, int64_t stride, const A* row) {
      const A w = row[0], b = row[1], s = row[2];
      A* __restrict d = z + (e - r.begin);
      if (s == A(0)) std::memset(d, 0, static_cast<size_t>(length) * sizeof(A));
      if (y) {
        over(length, offset, stride, [=](int64_t m, int64_t i) { d[i] = madd(b, E::load(y[m]), madd(s, d[i], E::load(x[m]))); });
      } else {
        over(length, offset, stride, [=](int64_t m, int64_t i) { d[i] = madd(s, d[i], E::load(x[m])); });
      }
      if (out) {
        const A factor = static_cast<A>(scale) * w;
        over(length, offset, stride, [=](int64_t m, int64_t i) { out[m] = E::store(factor * d[i]); });
      }
      if (sum) total += static_cast<double>(w) * sum_of_squares(length, [=](int64_t i) { return d[i]; });
    });
    if (sum) *sum = total;
    return ok;
  });
}

// ---- samples as a whole. In both layouts the elements of a sample lie together in memory, so that elements are
// numbered here by their place in memory ----

// body(sample, begin, end) for the samples, or parts of samples, of a range.
template <class Body> void for_samples(const Grid& g, Range r, Body&& body) {
  int64_t s = r.begin / g.sample;
  for (int64_t e = r.begin; e < r.end; ++s) {
    const int64_t end = (s + 1) * g.sample < r.end ? (s + 1) * g.sample : r.end;
    body(s, e, end);
    e = end;
  }
}

// out = u real + (1 - u) fake, with u the uniform number `first` + sample
template <class V>
void interpolate_chunk(const Grid& g, Dtype dtype, const void* real_, const void* fake_, void* out_, int64_t chunk) {
  with_dtype(dtype, [&](auto element) {
    using E = decltype(element);
    using A = typename E::A;
    const Range r = chunk_range(g, chunk);
    auto* __restrict real = static_cast<const typename E::T*>(real_);
    auto* __restrict fake = static_cast<const typename E::T*>(fake_);
    auto* __restrict out = static_cast<typename E::T*>(out_);
    alignas(64) A u[kChunk];
    const int64_t first = r.begin / g.sample, last = (r.end - 1) / g.sample;
    const bool many = !g.per_sample && last - first >= 8;  // worth a vector
    if (many) uniforms<V>(g, {first, last + 1}, 0, u);
    for (int64_t s = first; !many && s <= last; ++s) {
      const uint64_t number = g.per_sample ? 0 : g.first + static_cast<uint64_t>(s);
      uint32_t w[4];
      philox_block(number / 4, 0, g.keys ? static_cast<uint64_t>(g.keys[g.per_sample ? s : 0]) : g.key, w);
      u[s - first] = static_cast<A>(w[number % 4] >> 8) * static_cast<A>(0x1p-24);
    }
    for_samples(g, r, [&](int64_t s, int64_t begin, int64_t end) {
      const A a = u[s - first], b = A(1) - a;
      for (int64_t i = begin; i < end; ++i) out[i] = E::store(madd(a, E::load(real[i]), b * E::load(fake[i])));
    });
  });
}

// Sums of squares of the pieces begin .. end: every sample is cut into `pieces` of kChunk elements, the last shorter.
inline void square_sums(const Grid& g, Dtype dtype, const void* x_, int64_t pieces, double* sums, int64_t begin,
                        int64_t end) {
  with_dtype(dtype, [&](auto element) {
    using E = decltype(element);
    auto* __restrict x = static_cast<const typename E::T*>(x_);
    int64_t s = begin / pieces, within = begin % pieces * kChunk;
    for (int64_t i = begin; i < end; ++i) {
      const auto* from = x + s * g.sample + within;
      const int64_t left = g.sample - within;
      sums[i] = sum_of_squares(left < kChunk ? left : kChunk, [=](int64_t k) { return E::load(from[k]); });
      within += kChunk;
      if (within >= g.sample) {
        within = 0;
        ++s;
      }
    }
  });
}

// out = factor of the sample x
inline void scale_samples_chunk(const Grid& g, Dtype dtype, const void* x_, const double* factors, void* out_,
                                int64_t chunk) {
  with_dtype(dtype, [&](auto element) {
    using E = decltype(element);
    using A = typename E::A;
    auto* __restrict x = static_cast<const typename E::T*>(x_);
    auto* __restrict out = static_cast<typename E::T*>(out_);
    for_samples(g, chunk_range(g, chunk), [&](int64_t s, int64_t begin, int64_t end) {
      const A factor = static_cast<A>(factors[s]);
      for (int64_t i = begin; i < end; ++i) out[i] = E::store(factor * E::load(x[i]));
    });
  });
}

template <class V> Kernels kernels_of() {
  return {random_chunk<V>,      add_noise_chunk<V>, noise_pair_chunk<V>, step_chunk<V>, residual_chunk<V>,
          interpolate_chunk<V>, square_sums,        scale_samples_chunk, sinusoids<V>,  group_norm_silu_part<V>,
          group_norm_silu_grad_part<V>, finish<V>, nullptr, nullptr, nullptr, nullptr};
}

}  // namespace
}  // namespace dgf
