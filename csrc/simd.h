// Vectors of floats, as wide as the instruction set that a file is compiled for, in the compiler's
// own vector types: one source for AVX-512, AVX2, SSE2 and NEON.
//
// Included by files that are compiled once per instruction set (CMakeLists.txt). Everything here has
// internal linkage, and nothing of the standard library that would be emitted out of line may be
// used beside it: the linker would keep one copy of it, maybe the one with AVX-512 in it.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace metis {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * kWidth)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kWidth)));

inline Floats splat(float x) { return Floats{} + x; }

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// bf16 is the upper half of a float.
inline Floats load(const std::uint16_t* from) {
  Halves v;
  std::memcpy(&v, from, sizeof v);
  return (Floats)(__builtin_convertvector(v, Bits) << 16);
}

inline void store(std::uint16_t* to, Floats v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(to, &half, sizeof half);
#else
  const Bits bits = (Bits)v;
  const Bits even = (bits >> 16) & 1;
  const Bits rounded = (bits + 0x7fff + even) >> 16;  // to the nearest, ties to even
  const Halves half = __builtin_convertvector((v == v) ? rounded : (Bits{} + 0x7fc0), Halves);
  std::memcpy(to, &half, sizeof half);
#endif
}

inline float widen(float x) { return x; }

inline float widen(std::uint16_t x) {
  const std::uint32_t bits = std::uint32_t{x} << 16;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

template <class T>
inline void store_one(T* to, float x) {
  T lanes[kWidth];
  store(lanes, splat(x));
  *to = lanes[0];
}

typedef float HalfFloats __attribute__((vector_size(2 * kWidth)));
typedef double Doubles __attribute__((vector_size(4 * kWidth)));

// The sum of many vectors, in double: a policy that is sure of itself is 1 and a tail of less than a
// float's rounding of it.
struct Sum {
  Doubles low = {}, high = {};

  void add(Floats v) {
    HalfFloats halves[2];
    std::memcpy(halves, &v, sizeof v);
    low += __builtin_convertvector(halves[0], Doubles);
    high += __builtin_convertvector(halves[1], Doubles);
  }

  double value() const {
    const Doubles both = low + high;
    double lanes[kWidth / 2], all = 0;
    std::memcpy(lanes, &both, sizeof both);
    for (double lane : lanes) all += lane;
    return all;
  }
};

inline Floats larger(Floats a, Floats b) { return (a > b) ? a : b; }

inline float largest(Floats v) {
  float lanes[kWidth];
  store(lanes, v);
  float most = lanes[0];
  for (int i = 1; i < kWidth; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// Below this exp is 0 here. (The smallest normal float is exp(-87.3).)
constexpr float kExpFloor = -87.0f;

// exp(x) for x <= 88 to one and a half units in the last place; a NaN passes.
//
// x = n log 2 + r with |r| <= log(2) / 2, a polynomial in r, and n added to the exponent. The
// constant 1.5 * 2^23 leaves n, rounded, in the lowest bits of a float.
inline Floats exp(Floats x) {
  const Floats shift = splat(12582912.0f);
  const Floats n = x * 1.44269504088896341f + shift;
  const Floats whole = n - shift;
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Floats scaled = (Floats)((Bits)p + ((Bits)n << 23));
  return (x < kExpFloor) ? Floats{} : scaled;
}

// exp(x) - 1 for x <= 0, to a few units in the last place near zero too.
inline Floats expm1(Floats x) {
  const Floats near =
      x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))));
  return (x > -0.25f) ? near : exp(x) - 1.0f;
}

// To a unit in the last place: near 0 by expm1, elsewhere as what is missing to 1.
inline Floats tanh(Floats x) {
  const Floats size = (x < 0.0f) ? -x : x;
  const Floats gap = expm1(-2.0f * size), e = exp(-2.0f * size);
  const Floats t = (size < 0.5f) ? -gap / (gap + 2.0f) : 1.0f - (e + e) / (e + 1.0f);
  return (x < 0.0f) ? -t : t;
}

}  // namespace
}  // namespace metis
