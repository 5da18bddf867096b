// Products of small matrices with what follows them (biases, slopes, sums) applied while their result is in the
// first-level cache, and no copy of the left factor: what a BLAS cannot do. The right factor is cut into panels of 16
// columns beforehand, once for all rows.
#pragma once
#include <utility>

#include "core.h"

namespace dgf {
namespace {

constexpr int kTileRows = 6;  // of a weights' gradient at a time: 6 x 16 numbers fill twelve vector registers

template <class A> inline A slope_at(A z, A slope) { return z > A(0) ? A(1) : slope; }

// `length` numbers of one row of a product.
template <class A>
void finish_row(int64_t length, const A* sums, const A* bias, const A* gate, const A* add, A slope, A* out, A* active) {
  for (int64_t j = 0; j < length; ++j) {
    A v = sums[j];
    if (bias) v += bias[j];
    if (gate) v *= slope_at(gate[j], slope);
    if (add) v += add[j];
    if (out) out[j] = v;
    if (active) active[j] = v * slope_at(v, slope);
  }
}

// A whole panel's width of it, by vectors: with its branches no compiler makes them of the loop above.
template <class V>
void finish_panel(const float* sums, const float* bias, const float* gate, const float* add, float slope, float* out,
                  float* active) {
  for (int64_t j = 0; j < kPanel; j += V::width) {
    typename V::F v = V::load(sums + j);
    if (bias) v = V::add(v, V::load(bias + j));
    if (gate) v = V::mul(v, V::slope_at(V::load(gate + j), slope));
    if (add) v = V::add(v, V::load(add + j));
    if (out) V::store(out + j, v);
    if (active) V::store(active + j, V::mul(v, V::slope_at(v, slope)));
  }
}

template <class A> inline const A* at(const A* p, int64_t i) { return p ? p + i : nullptr; }
template <class A> inline A* at(A* p, int64_t i) { return p ? p + i : nullptr; }

// A tile of a product at row r and column j of it: `sums` [rows, stride].
template <class V>
void finish(int64_t rows, int64_t width, const float* sums, int64_t stride, int64_t r, int64_t j, const Finish<float>& f) {
  for (int64_t i = 0; i < rows; ++i, sums += stride) {
    const int64_t e = (r + i) * f.stride + j;
    if (width == kPanel) {
      finish_panel<V>(sums, at(f.bias, j), at(f.gate, e), at(f.add, e), f.slope, at(f.out, e), at(f.active, e));
    } else {
      finish_row(width, sums, at(f.bias, j), at(f.gate, e), at(f.add, e), f.slope, at(f.out, e), at(f.active, e));
    }
  }
}

// Panel p of a right factor [k, n] given as w [k, n], or as w [n, k] where `transposed`; columns beyond n are 0.
template <class V>
void pack(const float* w, bool transposed, int64_t k, int64_t n, int64_t stride, int64_t p, float* out) {
  const int64_t first = p * kPanel, columns = n - first < kPanel ? n - first : kPanel;
  int64_t i = 0;
  if (transposed && columns == kPanel) {
    for (; i + 8 <= k; i += 8)
      for (int64_t c = 0; c < kPanel; c += 8) V::transpose8(w + (first + c) * stride + i, stride, out + i * kPanel + c);
  }
  for (; !transposed && columns == kPanel && i < k; ++i)
    for (int64_t c = 0; c < kPanel; c += V::width) V::store(out + i * kPanel + c, V::load(w + i * stride + first + c));
  for (; i < k; ++i)
    for (int64_t c = 0; c < kPanel; ++c)
      out[i * kPanel + c] = c >= columns ? 0.0f : transposed ? w[(first + c) * stride + i] : w[i * stride + first + c];
}

// R rows of out = a b, or where `ADD` of out += a b, for a panel b of P vectors; see MatrixProduct. Not inlined: constants
// of what is around it would take registers from the sums.
template <class V, int R, int P, bool ADD>
__attribute__((noinline)) void multiply(const MatrixProduct& p, int64_t first) {
  typename V::F c[R][P];
  float* out = p.out + first * p.to;
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < P; ++v) c[r][v] = ADD ? V::load(out + r * p.to + v * V::width) : V::splat(0.0f);
  const float *a = p.a + first * p.row, *b = p.b;
  for (int64_t i = 0; i < p.k; ++i, a += p.column, b += p.step) {
    typename V::F columns[P];
    for (int v = 0; v < P; ++v) columns[v] = V::load(b + v * p.vector);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const typename V::F x = V::splat(a[r * p.row]);
      for (int v = 0; v < P; ++v) c[r][v] = V::fma(x, columns[v], c[r][v]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < P; ++v) V::store(out + r * p.to + v * V::width, c[r][v]);
}

// As many rows as the registers hold the sums of: 6 x 2 vectors of 16 registers, 14 x 2 of 32.
template <class V> constexpr int kRowsAtATime = V::width < 16 ? 6 : 14;

struct Multiplies {
  void (*of[14])(const MatrixProduct&, int64_t);
};
template <class V, int P, bool ADD, int... R> constexpr Multiplies multiplies(std::integer_sequence<int, R...>) {
  return {{multiply<V, R + 1, P, ADD>...}};
}

template <class V, int P, bool ADD> void multiply_rows(const MatrixProduct& p) {
  constexpr int most = kRowsAtATime<V>;
  static constexpr Multiplies table = multiplies<V, P, ADD>(std::make_integer_sequence<int, most>());
  for (int64_t r = 0; r < p.rows; r += most) table.of[(p.rows - r < most ? p.rows - r : most) - 1](p, r);
}

template <class V>
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t row, int64_t column, const float* packed,
             const Finish<float>& f) {
  // as many panels as two vectors are
  constexpr int64_t most = kRowsAtATime<V>, wide = 2 * V::width;
  alignas(64) float sums[most * wide];
  for (int64_t j = 0; j < n; j += wide) {
    const bool two = n - j > V::width;
    const int64_t vector = V::width < kPanel ? V::width : k * kPanel;
    for (int64_t r = 0; r < m; r += most) {
      const int64_t rows = m - r < most ? m - r : most;
      const MatrixProduct p{rows, k, a + r * row, row, column, packed + j * k, kPanel, vector, sums, wide};
      two || V::width < kPanel ? multiply_rows<V, 2, false>(p) : multiply_rows<V, 1, false>(p);
      for (int64_t c = 0; c < wide && j + c < n; c += kPanel)
        finish<V>(rows, n - j - c < kPanel ? n - j - c : kPanel, sums + c, wide, r, j + c, f);
    }
  }
}

// sums [R, 16] += a^T b, a [k, R] and b [k, 16].
template <class V, int R>
__attribute__((noinline)) void add_outer_tile(int64_t k, const float* a, const float* b, float* sums) {
  typename V::F c[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    c[r][0] = V::load(sums + r * kPanel);
    c[r][1] = V::load(sums + r * kPanel + 8);
  }
  for (int64_t i = 0; i < k; ++i, a += R, b += kPanel) {
    const typename V::F b0 = V::load(b), b1 = V::load(b + 8);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const typename V::F x = V::splat(a[r]);
      c[r][0] = V::fma(x, b0, c[r][0]);
      c[r][1] = V::fma(x, b1, c[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    V::store(sums + r * kPanel, c[r][0]);
    V::store(sums + r * kPanel + 8, c[r][1]);
  }
}

template <class V> void add_outer(int64_t rows, int64_t k, const float* a, const float* b, float* sums) {
  switch (rows) {
    case 6: add_outer_tile<V, 6>(k, a, b, sums); break;
    case 5: add_outer_tile<V, 5>(k, a, b, sums); break;
    case 4: add_outer_tile<V, 4>(k, a, b, sums); break;
    case 3: add_outer_tile<V, 3>(k, a, b, sums); break;
    case 2: add_outer_tile<V, 2>(k, a, b, sums); break;
    default: add_outer_tile<V, 1>(k, a, b, sums);
  }
}

}  // namespace
}  // namespace dgf
