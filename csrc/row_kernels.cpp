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

constexpr float kLowest = -3.4e38f;  // where a running maximum starts; finite, for -inf - -inf

// What happens to a logit before the softmax. Divided by, not multiplied with an inverse: torch
// rounds once, and so does this.
enum Scaling { kPlain, kTemperature, kSoftcap };

// s of logits z; slope becomes ds/dz times the temperature.
template <Scaling kScaling>
Floats scaled(Floats z, const Row& row, Floats& slope) {
  if constexpr (kScaling == kSoftcap) {
    const Floats t = tanh(z / row.softcap);
    slope = 1.0f - t * t;
    z = t * row.softcap;
  }
  return kScaling == kPlain ? z : z / row.temperature;
}

struct Block {
  alignas(64) float s[kBlock];  // -inf past the end
};

// The columns [start, start + kBlock) of a row; returns how many of them exist, and the largest.
template <class T, Scaling kScaling>
int fill(Block& block, const Row& row, std::int64_t start, float& top) {
  const T* from = static_cast<const T*>(row.logits) + start;
  const int count = row.vocab - start < kBlock ? static_cast<int>(row.vocab - start) : kBlock;
  Floats most = splat(kLowest), slope;
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Floats s = scaled<kScaling>(load(from + i), row, slope);
    store(block.s + i, s);
    most = larger(s, most);
  }
  if (i < count) {
    T rest[kWidth] = {};
    for (int j = i; j < count; ++j) rest[j - i] = from[j];
    store(block.s + i, scaled<kScaling>(load(rest), row, slope));
  }
  const int whole = (count + kStep - 1) / kStep * kStep;
  for (int j = count; j < whole; ++j) block.s[j] = -__builtin_inff();
  const std::int64_t label = row.label - start;
  if (label >= 0 && label < count) {
    // Its exact value takes part in the sum too: then logprob <= 0 whatever logits were rounded to.
    float s[kWidth];
    store(s, scaled<kScaling>(splat(row.target), row, slope));
    block.s[label] = s[0];
    most = splat(kLowest);
    i = 0;
  }
  for (; i < whole; i += kWidth) most = larger(load(block.s + i), most);
  top = largest(most);
  return count;
}

template <class T>
constexpr int kLine = 64 / sizeof(T);  // columns of a cache line

// Asks for the memory of the next block while this one is computed on.
template <class T>
void prefetch(const T* here) {
  __builtin_prefetch(here + kBlock);
}

// Sums e and e (s - peak) over a block, which came from the logits at `from`. kPrecise: where some
// e is near 1, beside which the others are less than a float's rounding.
template <bool kPrecise, class T>
void add_up(const Block& block, const T* from, int count, Statistics& all) {
  Sum exact;
  Floats total[kUnroll] = {}, moment[kUnroll] = {};
  for (int i = 0; i < count; i += kStep) {
    for (int u = 0; u < kStep; u += kLine<T>) prefetch(from + i + u);
    for (int u = 0; u < kUnroll; ++u) {
      const Floats x = larger(splat(kExpFloor), load(block.s + i + u * kWidth) - all.peak);
      const Floats e = exp(x);
      moment[u] += e * x;
      if constexpr (kPrecise)
        exact.add(e);
      else
        total[u] += e;
    }
  }
  if constexpr (!kPrecise)
    for (const Floats& t : total) exact.add(t);
  Sum moments;
  for (const Floats& m : moment) moments.add(m);
  all.total += exact.value();
  all.moment += moments.value();
}

template <class T, Scaling kScaling>
Statistics statistics_of(const Row& row) {
  Block block;
  Statistics all{kLowest, 0.0, 0.0, 0.0f};
  for (std::int64_t start = 0; start < row.vocab; start += kBlock) {
    float top;
    const int count = fill<T, kScaling>(block, row, start, top);
    const std::int64_t label = row.label - start;
    if (label >= 0 && label < count) all.chosen = block.s[label];
    if (top > all.peak) {
      const float gap = all.peak - top;
      float shrink[kWidth];
      store(shrink, exp(splat(gap < kExpFloor ? kExpFloor : gap)));
      all.moment = shrink[0] == 0 ? 0 : (all.moment + double{gap} * all.total) * shrink[0];
      all.total *= shrink[0];
      all.peak = top;
    }
    const T* from = static_cast<const T*>(row.logits) + start;
    if (top > all.peak - 4)
      add_up<true>(block, from, count, all);
    else
      add_up<false>(block, from, count, all);
  }
  return all;
}

template <class T>
using Mark = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int16_t>;

// Several threads may set a column, all of them to 1.
template <class T>
void mark(const RowGradient& to, std::int64_t column) {
  __atomic_store_n(static_cast<Mark<T>*>(to.live) + column, Mark<T>{1}, __ATOMIC_RELAXED);
}

// kEntropy: with a gradient of the entropy. kMark: with marks.
template <class T, Scaling kScaling, bool kEntropy, bool kMark>
void gradient_of(const Row& row, const RowGradient& to) {
  const T* from = static_cast<const T*>(row.logits);
  T* out = static_cast<T*>(to.out);
  const float shift = to.entropy - to.log_total, over_temperature = 1.0f / row.temperature;
  const float factor = -to.g * to.over_total * over_temperature;
  const auto derive = [&](Floats z, float own, bool whole) {
    Floats slope;
    const Floats s = scaled<kScaling>(z, row, slope);
    const Floats x = larger(splat(kExpFloor), s - to.peak);
    Floats d = exp(x) * factor;
    if (kEntropy || whole) {
      const Floats p = exp(x) * to.over_total;
      d = (own - p * (to.g + to.h * (x + shift))) * over_temperature;
    }
    return kScaling == kSoftcap ? d * slope : d;
  };
  const auto note = [&](Floats d, std::int64_t i, int count) {
    if (!kMark || largest(larger(d, -d)) <= to.bound) return;
    float lanes[kWidth];
    store(lanes, d);
    for (int j = 0; j < count; ++j)
      if (lanes[j] > to.bound || -lanes[j] > to.bound) mark<T>(to, i + j);
  };
  // The label's own logit is not the one to go by: its exact value is, and comes last.
  std::int64_t i = 0;
  for (; i + kWidth <= row.vocab; i += kWidth) {
    prefetch(from + i);
    const Floats d = derive(load(from + i), 0.0f, false);
    store(out + i, d);
    note(d, i, kWidth);
  }
  if (i < row.vocab) {
    const int count = static_cast<int>(row.vocab - i);
    T rest[kWidth] = {};
    for (int j = 0; j < count; ++j) rest[j] = from[i + j];
    const Floats d = derive(load(rest), 0.0f, false);
    store(rest, d);
    for (int j = 0; j < count; ++j) out[i + j] = rest[j];
    note(d, i, count);
  }
  if (row.label >= 0 && row.label < row.vocab) {
    const Floats d = derive(splat(row.target), to.g, true);
    store_one(out + row.label, d);
    note(d, row.label, 1);
  }
}

template <class T, Scaling kScaling>
void gradient_in(const Row& row, const RowGradient& to) {
  const bool entropy = to.h != 0, marks = to.live != nullptr;
  if (entropy)
    marks ? gradient_of<T, kScaling, true, true>(row, to)
          : gradient_of<T, kScaling, true, false>(row, to);
  else
    marks ? gradient_of<T, kScaling, false, true>(row, to)
          : gradient_of<T, kScaling, false, false>(row, to);
}

template <class T>
Statistics statistics(const Row& row) {
  const FlushSubnormals flush;
  if (row.softcap > 0) return statistics_of<T, kSoftcap>(row);
  return row.temperature == 1 ? statistics_of<T, kPlain>(row) : statistics_of<T, kTemperature>(row);
}

template <class T>
void gradient(const Row& row, const RowGradient& to) {
  const FlushSubnormals flush;
  if (row.softcap > 0)
    gradient_in<T, kSoftcap>(row, to);
  else if (row.temperature == 1)
    gradient_in<T, kPlain>(row, to);
  else
    gradient_in<T, kTemperature>(row, to);
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
