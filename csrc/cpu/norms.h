// Group norm and SiLU in one, of tensors that lie in memory as [N, H, W, C]: loops over a part of a sample, all of its
// pixels by some of its channels, small enough to stay in the second-level cache. V holds neighbouring channels of a
// pixel; the last of a part may have fewer than V::width.
#pragma once
#include <algorithm>
#include <cmath>

#include "core.h"

namespace dgf {
namespace {

constexpr int64_t kSummed = 64;  // pixels that are summed in float; their sums are summed in double

// 1 / (1 + exp(-z)). Cody and Waite's reduction, Taylor's polynomial on |r| <= log(2) / 2; error below 2e-7 of the value.
template <class V> inline typename V::F sigmoid(typename V::F z) {
  using F = typename V::F;
  const F x = V::min(V::max(V::sub(V::splat(0.0f), z), V::splat(-87.0f)), V::splat(87.0f));
  const typename V::I count = V::nearest(V::mul(x, V::splat(1.44269504f)));
  const F n = V::to_float(count);
  const F r = V::fma(n, V::splat(-0x1.7f7d1cp-20f), V::fma(n, V::splat(-0x1.62e4p-1f), x));
  F p = V::splat(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = V::fma(p, r, V::splat(c));
  const F power = V::from_bits(V::template shl<23>(V::add(count, V::splat(127u))));
  return V::div(V::splat(1.0f), V::fma(p, power, V::splat(1.0f)));
}

// Numbers of a part's channels, with room for a whole vector behind the last.
struct alignas(64) Channels {
  float of[kNormChannels] = {};
  float& operator[](int64_t c) { return of[c]; }
  template <class V> typename V::F at(int64_t c) const { return V::load(of + c); }
};

// Adds VECTORS vectors of channels from c on; see sum_pixels.
template <class V, int ROWS, int VECTORS, class Add>
inline void sum_column(const NormPart& p, int64_t c, double* totals, const Add& add) {
  for (int64_t begin = 0; begin < p.pixels; begin += kSummed) {
    typename V::F sums[VECTORS][ROWS];
    for (auto& rows : sums)
      for (auto& row : rows) row = V::splat(0.0f);
    for (int64_t i = begin; i < std::min(begin + kSummed, p.pixels); ++i)
      for (int v = 0; v < VECTORS; ++v) add(i * p.stride, c + v * V::width, sums[v]);
    for (int v = 0; v < VECTORS; ++v)
      for (int k = 0; k < ROWS; ++k) {
        float lanes[V::width];
        V::store(lanes, sums[v][k]);
        for (int64_t j = 0, at = c + v * V::width; j < V::width && at + j < p.channels; ++j)
          totals[k * p.channels + at + j] += double(lanes[j]);
      }
  }
}

// Row k of `totals`, each of p.channels, becomes the sum over all pixels of row k that add(offset of the pixel, channel,
// rows) adds a vector to. Two vectors at a time: with eight lanes they are a cache line.
template <class V, int ROWS, class Add> void sum_pixels(const NormPart& p, double* totals, const Add& add) {
  std::fill_n(totals, ROWS * p.channels, 0.0);
  int64_t c = 0;
  for (; c + V::width < p.channels; c += 2 * V::width) sum_column<V, ROWS, 2>(p, c, totals, add);
  if (c < p.channels) sum_column<V, ROWS, 1>(p, c, totals, add);
}

// out[i] = value(offset of the pixel, channel) for all pixels and channels
template <class V, class Value> void each_vector(const NormPart& p, const Value& value) {
  for (int64_t at = 0; at < p.pixels * p.stride; at += p.stride)
    for (int64_t c = 0; c < p.channels; c += V::width) V::store(p.out + at + c, p.channels - c, value(at, c));
}

// one(g, sum) for each group: the sum of its channels' values.
template <class One> void sum_groups(const NormPart& p, const double* values, One&& one) {
  for (int64_t g = 0, c = 0; c < p.channels; ++g) {
    double sum = 0;
    for (const int64_t end = c + p.per_group; c < end; ++c) sum += values[c];
    one(g, sum);
  }
}

// silu(z) and its argument are z = factor x + offset, one of each a channel
inline void norm_line(const NormPart& p, Channels& factor, Channels& offset) {
  for (int64_t c = 0; c < p.channels; ++c) {
    const float mean = p.stats[2 * (c / p.per_group)], rstd = p.stats[2 * (c / p.per_group) + 1];
    factor[c] = rstd * p.scale[c];
    offset[c] = p.bias[c] - factor[c] * (mean - (p.shift ? p.shift[c] : 0.0f));
  }
}

// out = silu(scale (x + shift - mean) / sqrt(variance + eps) + bias); stats receives mean and 1 / sqrt(...) of a group
template <class V> void group_norm_silu_part(const NormPart& p, float eps, float* stats) {
  using F = typename V::F;
  Channels center, factor, offset;
  double sums[kNormChannels];
  const double count = static_cast<double>(p.pixels * p.per_group);
  const auto x = [&](int64_t at, int64_t c) { return V::load(p.x + at + c, p.channels - c); };
  sum_pixels<V, 1>(p, sums, [&](int64_t at, int64_t c, F* rows) { rows[0] = V::add(rows[0], x(at, c)); });
  if (p.shift)
    for (int64_t c = 0; c < p.channels; ++c) sums[c] += double(p.shift[c]) * static_cast<double>(p.pixels);
  sum_groups(p, sums, [&](int64_t g, double sum) { stats[2 * g] = static_cast<float>(sum / count); });
  for (int64_t c = 0; c < p.channels; ++c) center[c] = stats[2 * (c / p.per_group)] - (p.shift ? p.shift[c] : 0.0f);
  sum_pixels<V, 1>(p, sums, [&](int64_t at, int64_t c, F* rows) {
    const F off = V::sub(x(at, c), center.at<V>(c));
    rows[0] = V::fma(off, off, rows[0]);
  });
  sum_groups(p, sums, [&](int64_t g, double sum) {
    stats[2 * g + 1] = static_cast<float>(1 / std::sqrt(sum / count + double(eps)));
  });
  NormPart done = p;
  done.stats = stats;
  norm_line(done, factor, offset);
  each_vector<V>(p, [&](int64_t at, int64_t c) {
    const F z = V::fma(factor.at<V>(c), x(at, c), offset.at<V>(c));
    return V::mul(z, sigmoid<V>(z));
  });
}

// out: the gradient of x; of scale, bias and shift (which may be null) what this sample adds to it
template <class V>
void group_norm_silu_grad_part(const NormPart& p, const float* grad, double* scale, double* bias, float* shift) {
  using F = typename V::F;
  Channels factor, offset, center, slope, level;
  double sums[3 * kNormChannels], of_group[2 * kNormChannels];
  norm_line(p, factor, offset);
  for (int64_t c = 0; c < p.channels; ++c) center[c] = p.stats[2 * (c / p.per_group)] - (p.shift ? p.shift[c] : 0.0f);
  const auto vector = [&](const float* from, int64_t at, int64_t c) { return V::load(from + at + c, p.channels - c); };
  // sums of dz, dz (x - center) and x - center over the pixels; dz waits in out
  sum_pixels<V, 3>(p, sums, [&](int64_t at, int64_t c, F* rows) {
    const F x = vector(p.x, at, c), off = V::sub(x, center.at<V>(c));
    const F z = V::fma(factor.at<V>(c), x, offset.at<V>(c)), s = sigmoid<V>(z);
    const F dz = V::mul(vector(grad, at, c), V::fma(V::mul(z, s), V::sub(V::splat(1.0f), s), s));
    V::store(p.out + at + c, p.channels - c, dz);
    rows[0] = V::add(rows[0], dz);
    rows[1] = V::fma(dz, off, rows[1]);
    rows[2] = V::add(rows[2], off);
  });
  const double *dz = sums, *dz_off = sums + p.channels, *off = sums + 2 * p.channels;
  const double count = static_cast<double>(p.pixels * p.per_group);
  for (int64_t c = 0; c < p.channels; ++c) {
    const double rstd = p.stats[2 * (c / p.per_group) + 1];
    bias[c] = dz[c];
    scale[c] = dz_off[c] * rstd;
    of_group[c] = bias[c] * double(p.scale[c]);
    of_group[p.channels + c] = scale[c] * double(p.scale[c]);
  }
  // dx = factor dz - rstd (mean(scale dz) + n mean(scale dz n)), n = (x - center) rstd
  for (int64_t first = 0; first < p.channels; first += p.per_group) {
    double mean = 0, tilt = 0;
    for (int64_t c = first; c < first + p.per_group; ++c) {
      mean += of_group[c] / count;
      tilt += of_group[p.channels + c] / count;
    }
    const double rstd = p.stats[2 * (first / p.per_group) + 1];
    for (int64_t c = first; c < first + p.per_group; ++c) {
      slope[c] = static_cast<float>(-rstd * rstd * tilt);
      level[c] = static_cast<float>(-rstd * mean);
      if (shift)
        shift[c] = static_cast<float>(rstd * double(p.scale[c]) * dz[c] - rstd * rstd * tilt * off[c] -
                                      rstd * mean * static_cast<double>(p.pixels));
    }
  }
  each_vector<V>(p, [&](int64_t at, int64_t c) {
    const F off = V::sub(vector(p.x, at, c), center.at<V>(c));
    return V::fma(factor.at<V>(c), vector(p.out, at, c), V::fma(slope.at<V>(c), off, level.at<V>(c)));
  });
}

}  // namespace
}  // namespace dgf
