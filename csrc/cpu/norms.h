// Group norm and SiLU in one, of tensors that lie in memory as [N, H, W, C]: loops over a part of a sample, all of its
// pixels by some of its channels, small enough to stay in the second-level cache. Plain loops that the compiler
// vectorises for the instruction set of the file that includes this.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core.h"

namespace dgf {
namespace {

constexpr int64_t kSummed = 64;  // pixels that are summed in float; their sums are summed in double

// 1 / (1 + exp(-z)). Cody and Waite's reduction, Taylor's polynomial on |r| <= log(2) / 2; error below 2e-7 of the value.
inline float sigmoid(float z) {
  float x = -z;
  x = x > 87.0f ? 87.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f;  // n: the nearest integer
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 1.0f / 5040;
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return 1.0f / (1.0f + p * power);
}

// Row k of `totals`, each of `channels`, becomes the sum over all pixels of row k that `add` adds a pixel to.
template <int ROWS, class Add> void sum_pixels(const NormPart& p, double* totals, Add&& add) {
  alignas(64) float sums[ROWS][kNormChannels];
  std::fill_n(totals, ROWS * p.channels, 0.0);
  for (int64_t begin = 0; begin < p.pixels; begin += kSummed) {
    for (auto& row : sums) std::fill_n(row, p.channels, 0.0f);
    for (int64_t i = begin; i < std::min(begin + kSummed, p.pixels); ++i) add(i * p.stride, sums);
    for (int k = 0; k < ROWS; ++k)
      for (int64_t c = 0; c < p.channels; ++c) totals[k * p.channels + c] += double(sums[k][c]);
  }
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
inline void norm_line(const NormPart& p, float* factor, float* offset) {
  for (int64_t c = 0; c < p.channels; ++c) {
    const float mean = p.stats[2 * (c / p.per_group)], rstd = p.stats[2 * (c / p.per_group) + 1];
    factor[c] = rstd * p.scale[c];
    offset[c] = p.bias[c] - factor[c] * (mean - (p.shift ? p.shift[c] : 0.0f));
  }
}

// out = silu(scale (x + shift - mean) / sqrt(variance + eps) + bias); stats receives mean and 1 / sqrt(...) of a group
inline void group_norm_silu_part(const NormPart& p, float eps, float* __restrict stats) {
  alignas(64) float center[kNormChannels], factor[kNormChannels], offset[kNormChannels];
  double sums[kNormChannels];
  const double count = static_cast<double>(p.pixels * p.per_group);
  sum_pixels<1>(p, sums, [&](int64_t at, auto& rows) {
    for (int64_t c = 0; c < p.channels; ++c) rows[0][c] += p.x[at + c];
  });
  if (p.shift)
    for (int64_t c = 0; c < p.channels; ++c) sums[c] += double(p.shift[c]) * static_cast<double>(p.pixels);
  sum_groups(p, sums, [&](int64_t g, double sum) { stats[2 * g] = static_cast<float>(sum / count); });
  for (int64_t c = 0; c < p.channels; ++c) center[c] = stats[2 * (c / p.per_group)] - (p.shift ? p.shift[c] : 0.0f);
  sum_pixels<1>(p, sums, [&](int64_t at, auto& rows) {
    for (int64_t c = 0; c < p.channels; ++c) {
      const float off = p.x[at + c] - center[c];
      rows[0][c] += off * off;
    }
  });
  sum_groups(p, sums, [&](int64_t g, double sum) { stats[2 * g + 1] = static_cast<float>(1 / std::sqrt(sum / count + double(eps))); });
  NormPart done = p;
  done.stats = stats;
  norm_line(done, factor, offset);
  for (int64_t i = 0; i < p.pixels; ++i) {
    const float* __restrict x = p.x + i * p.stride;
    float* __restrict out = p.out + i * p.stride;
    for (int64_t c = 0; c < p.channels; ++c) {
      const float z = factor[c] * x[c] + offset[c];
      out[c] = z * sigmoid(z);
    }
  }
}

// out: the gradient of x; of scale, bias and shift (which may be null) what this sample adds to it
inline void group_norm_silu_grad_part(const NormPart& p, const float* grad_, double* scale, double* bias, float* shift) {
  alignas(64) float factor[kNormChannels], offset[kNormChannels], center[kNormChannels], slope[kNormChannels],
      level[kNormChannels];
  double sums[3 * kNormChannels], of_group[2 * kNormChannels];
  norm_line(p, factor, offset);
  for (int64_t c = 0; c < p.channels; ++c) center[c] = p.stats[2 * (c / p.per_group)] - (p.shift ? p.shift[c] : 0.0f);
  // sums of dz, dz (x - center) and x - center over the pixels; dz waits in out
  sum_pixels<3>(p, sums, [&](int64_t at, auto& rows) {
    const float *__restrict x = p.x + at, *__restrict grad = grad_ + at;
    float* __restrict out = p.out + at;
    for (int64_t c = 0; c < p.channels; ++c) {
      const float z = factor[c] * x[c] + offset[c], s = sigmoid(z), off = x[c] - center[c];
      const float dz = grad[c] * (s + z * s * (1.0f - s));
      out[c] = dz;
      rows[0][c] += dz;
      rows[1][c] += dz * off;
      rows[2][c] += off;
    }
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
  for (int64_t i = 0; i < p.pixels; ++i) {
    const float* __restrict x = p.x + i * p.stride;
    float* __restrict out = p.out + i * p.stride;
    for (int64_t c = 0; c < p.channels; ++c) out[c] = factor[c] * out[c] + (slope[c] * (x[c] - center[c]) + level[c]);
  }
}

}  // namespace
}  // namespace dgf
