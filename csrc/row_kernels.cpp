// The two passes over one row of logits. Compiled once per instruction set, as METIS_ISA.
//
// With p the softmax of s = softcap(z) / temperature,
//
//     dL/ds_j = g (1[j = label] - p_j) - h p_j (log p_j + entropy)
//     dL/dz_j = dL/ds_j / temperature * (1 - tanh(z_j / softcap)^2, where there is a softcap)
//
// A row is visited in blocks that fit the first-level cache twice over. It is read once from
// memory: the second pass finds it in the second-level cache, for real vocabularies.

#include "row_kernels.h"

#include <type_traits>

#include "simd.h"

namespace metis {
namespace {

constexpr int kBlock = 2048;
constexpr int kUnroll = 4;
constexpr int kStep = kUnroll * kWidth;
static_assert(kBlock % kStep == 0);

constexpr float kLowest = -3.4e38f;  // below every finite logit, and what it is subtracted from stays

struct Block {
  alignas(64) float s[kBlock];      // scaled, -inf past the end
  alignas(64) float slope[kBlock];  // ds/dz times the temperature; where there is a softcap
};

// What happens to a logit before the softmax. Divided by, not multiplied with an inverse: torch
// rounds once, and so does this.
enum Scaling { kPlain, kTemperature, kSoftcap };

// The columns [start, start + kBlock) of a row; returns how many of them exist.
template <class T, Scaling kScaling>
int fill(Block& block, const Row& row, std::int64_t start) {
  const T* from = static_cast<const T*>(row.logits) + start;
  const int count = row.vocab - start < kBlock ? static_cast<int>(row.vocab - start) : kBlock;
  const auto scale = [&](Floats z, float* s, float* slope) {
    if constexpr (kScaling == kSoftcap) {
      const Floats t = tanh(z / row.softcap);
      store(slope, 1.0f - t * t);
      z = t * row.softcap;
    }
    store(s, kScaling == kPlain ? z : z / row.temperature);
  };
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) scale(load(from + i), block.s + i, block.slope + i);
  if (i < count) {
    T rest[kWidth] = {};
    for (int j = i; j < count; ++j) rest[j - i] = from[j];
    scale(load(rest), block.s + i, block.slope + i);
  }
  const std::int64_t label = row.label - start;
  if (label >= 0 && label < count) {
    // Its exact value takes part in the sum too: then logprob <= 0 whatever logits were rounded to.
    float s[kWidth], slope[kWidth] = {};
    scale(splat(row.target), s, slope);
    block.s[label] = s[0];
    block.slope[label] = slope[0];
  }
  const int whole = (count + kStep - 1) / kStep * kStep;
  for (i = count; i < whole; ++i) block.s[i] = -__builtin_inff();
  return count;
}

template <class T, Scaling kScaling>
Statistics statistics_of(const Row& row) {
  Block block;
  Statistics all{kLowest, 0.0, 0.0, 0.0f};
  for (std::int64_t start = 0; start < row.vocab; start += kBlock) {
    const int count = fill<T, kScaling>(block, row, start);
    const std::int64_t label = row.label - start;
    if (label >= 0 && label < count) all.chosen = block.s[label];
    Floats most[kUnroll];
    for (Floats& m : most) m = splat(all.peak);
    for (int i = 0; i < count; i += kStep)
      for (int u = 0; u < kUnroll; ++u) most[u] = larger(load(block.s + i + u * kWidth), most[u]);
    const float peak = largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
    if (peak > all.peak) {
      const double gap = static_cast<double>(all.peak) - peak;
      float lanes[kWidth];
      store(lanes, exp(splat(gap < 2 * kExpFloor ? 2 * kExpFloor : static_cast<float>(gap))));
      const double shrink = lanes[0];
      all.moment = shrink == 0 ? 0 : (all.moment + gap * all.total) * shrink;
      all.total *= shrink;
      all.peak = peak;
    }
    Sum total, moment;
    for (int i = 0; i < count; i += kStep) {
      Floats e[kUnroll], m[kUnroll];
      for (int u = 0; u < kUnroll; ++u) {
        Floats x = load(block.s + i + u * kWidth) - peak;
        x = (x < 2 * kExpFloor) ? splat(2 * kExpFloor) : x;  // 0 * -inf would be NaN
        e[u] = exp(x);
        m[u] = e[u] * x;
      }
      for (int u = 0; u < kUnroll; ++u) total.add(e[u]);
      moment.add((m[0] + m[1]) + (m[2] + m[3]));
    }
    all.total += total.value();
    all.moment += moment.value();
  }
  return all;
}

template <class T>
using Mark = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int16_t>;

template <class T>
void mark(const RowGradient& to, const float* d, std::int64_t start, int count) {
  Mark<T>* live = static_cast<Mark<T>*>(to.live) + start;
  for (int i = 0; i < count; ++i)
    // Several threads may set a column, all of them to 1.
    if (d[i] > to.bound || -d[i] > to.bound) __atomic_store_n(live + i, 1, __ATOMIC_RELAXED);
}

template <class T, Scaling kScaling>
void gradient_of(const Row& row, const RowGradient& to) {
  Block block;
  const float shift = to.entropy - to.log_total, over_temperature = 1.0f / row.temperature;
  for (std::int64_t start = 0; start < row.vocab; start += kBlock) {
    const int count = fill<T, kScaling>(block, row, start);
    T* out = static_cast<T*>(to.out) + start;
    const std::int64_t label = row.label - start;
    const bool has_label = label >= 0 && label < count;
    const float label_s = has_label ? block.s[label] : 0.0f;
    // What flows off column by column; what flows to the label, `own`, is g there and 0 elsewhere.
    const auto flow = [&](Floats s, float own) {
      Floats x = s - to.peak;
      x = (x < 2 * kExpFloor) ? splat(2 * kExpFloor) : x;
      const Floats p = exp(x) * to.over_total;
      return (own - p * (to.g + to.h * (x + shift))) * over_temperature;
    };
    Floats most = {};
    const auto derive = [&](int i) {
      Floats d = flow(load(block.s + i), 0.0f);
      if constexpr (kScaling == kSoftcap) d *= load(block.slope + i);
      most = larger((d < 0.0f) ? -d : d, most);
      store(block.s + i, d);
      return d;
    };
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) store(out + i, derive(i));
    if (i < count) {
      T rest[kWidth];
      store(rest, derive(i));
      for (int j = i; j < count; ++j) out[j] = rest[j - i];
    }
    if (has_label) {
      float lanes[kWidth];
      store(lanes, flow(splat(label_s), to.g));
      block.s[label] = kScaling == kSoftcap ? lanes[0] * block.slope[label] : lanes[0];
      store_one(out + label, block.s[label]);
    }
    if (to.live != nullptr && (has_label || largest(most) > to.bound))
      mark<T>(to, block.s, start, count);
  }
}

template <class T>
Statistics statistics(const Row& row) {
  if (row.softcap > 0) return statistics_of<T, kSoftcap>(row);
  return row.temperature == 1 ? statistics_of<T, kPlain>(row) : statistics_of<T, kTemperature>(row);
}

template <class T>
void gradient(const Row& row, const RowGradient& to) {
  if (row.softcap > 0)
    gradient_of<T, kSoftcap>(row, to);
  else if (row.temperature == 1)
    gradient_of<T, kPlain>(row, to);
  else
    gradient_of<T, kTemperature>(row, to);
}

}  // namespace

#define METIS_NAME_OF(isa) #isa
#define METIS_NAME(isa) METIS_NAME_OF(isa)
#define METIS_KERNELS_OF(isa) row_kernels_##isa
#define METIS_KERNELS(isa) METIS_KERNELS_OF(isa)

extern const RowKernels METIS_KERNELS(METIS_ISA);
const RowKernels METIS_KERNELS(METIS_ISA) = {
    METIS_NAME(METIS_ISA),
    {statistics<float>, statistics<std::uint16_t>},
    {gradient<float>, gradient<std::uint16_t>},
};

}  // namespace metis
