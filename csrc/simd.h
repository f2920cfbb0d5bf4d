// Vectors of floats, as wide as the instruction set that a file is compiled for, in the compiler's
// own vector types: one source for AVX-512, AVX2, SSE2 and NEON.
//
// Included by files that are compiled once per instruction set (CMakeLists.txt). Everything here
// has internal linkage, and nothing of the standard library that would be emitted out of line may
// be used beside it: the linker would keep one copy of it, maybe the one with AVX-512 in it.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
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

// The first of v alone.
template <class T>
inline void store_one(T* to, Floats v) {
  T lanes[kWidth];
  store(lanes, v);
  *to = lanes[0];
}

typedef float HalfFloats __attribute__((vector_size(2 * kWidth)));
typedef double Doubles __attribute__((vector_size(4 * kWidth)));

// The sum of many vectors, in double: a policy that is sure of itself is 1 and a tail of less than
// a float's rounding of it.
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

// While one of these lives, what this thread computes is 0 where it would be less than the smallest
// normal float. A matrix product takes many times as long over such numbers.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8000); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(before_ | (1ull << 24)));
  }
  ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  unsigned long long before_;
#endif
};

// a where a > b, else b: of a NaN in a only b is left, one in b passes.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#else
  return (a > b) ? a : b;
#endif
}

inline float largest(Floats v) {
  float lanes[kWidth];
  store(lanes, v);
  float most = lanes[0];
  for (int i = 1; i < kWidth; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// Below the first, exp is 0 here: 1e-30, so that its product with what else is small in a gradient
// is still a normal number. The second is for what is to be multiplied: 0 times -inf would be NaN.
constexpr float kExpZero = -69.0f;
constexpr float kExpFloor = -174.0f;

// exp(x) for kExpFloor <= x <= 88, as good as x itself was rounded: to half a unit of x in the last
// place. exp(0) is 1, a NaN passes.
//
// x log2(e) = n + r with |r| <= 1/2; 2^r is a polynomial (minimax with constant term 1, relative
// error 2e-9), and n is added to the exponent. 1.5 * 2^23 leaves n, rounded, in a float's low bits.
inline Floats exp(Floats x) {
  const Floats shift = splat(12582912.0f);
  const Floats n = x * 1.44269504088896341f + shift;
  const Floats whole = n - shift;
  const Floats r = x * 1.44269504088896341f - whole;
  Floats p = splat(1.4902517728e-4f);
  p = p * r + 1.3389582129e-3f;
  p = p * r + 9.6200179571e-3f;
  p = p * r + 5.5503651828e-2f;
  p = p * r + 2.4022636856e-1f;
  p = p * r + 6.9314718334e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(kExpZero), _CMP_NLT_UQ);
  return (Floats)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)whole);
#else
  const Floats scaled = (Floats)((Bits)p + ((Bits)n << 23));
  return (x < kExpZero) ? Floats{} : scaled;
#endif
}

// exp(x) - 1 for kExpFloor <= x <= 0, to a few units in the last place near zero too.
inline Floats expm1(Floats x) {
  const Floats near =
      x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))));
  return (x > -0.25f) ? near : exp(x) - 1.0f;
}

// To a unit in the last place: near 0 by expm1, elsewhere as what is missing to 1.
inline Floats tanh(Floats x) {
  const Floats size = (x < 0.0f) ? -x : x;
  const Floats twice = larger(splat(kExpFloor), -2.0f * size);
  const Floats gap = expm1(twice), e = exp(twice);
  const Floats t = (size < 0.5f) ? -gap / (gap + 2.0f) : 1.0f - (e + e) / (e + 1.0f);
  return (x < 0.0f) ? -t : t;
}

}  // namespace
}  // namespace metis
