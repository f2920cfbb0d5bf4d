// Which instruction set this processor has, of those that were compiled.

#include <cstring>

#include "row_kernels.h"

namespace metis {

#define METIS_DECLARE(isa) extern const RowKernels row_kernels_##isa;
METIS_DECLARE(baseline)
#if defined(METIS_X86)
METIS_DECLARE(avx2)
METIS_DECLARE(avx512)
METIS_DECLARE(avx512bf16)
#endif

namespace {

struct Choice {
  const RowKernels* kernels;
  bool runs;
};

}  // namespace

const RowKernels* row_kernels(const char* name) {
  const Choice choices[] = {
#if defined(METIS_X86)
      {&row_kernels_avx512bf16,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16")},
      {&row_kernels_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {&row_kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&row_kernels_baseline, true},
  };
  for (const Choice& choice : choices)
    if (choice.runs && (name == nullptr || std::strcmp(name, choice.kernels->name) == 0))
      return choice.kernels;
  return nullptr;
}

}  // namespace metis
