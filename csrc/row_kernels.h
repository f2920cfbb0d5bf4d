// What is done to one row of logits, once per instruction set.

#pragma once

#include <cstdint>

namespace metis {

// A row of logits z [V] and what the softmax sees of it: s = softcap(z) / temperature.
struct Row {
  const void* logits;
  std::int64_t vocab;
  std::int64_t label;  // outside [0, vocab): another rank's
  float target;        // the label's raw logit, in the place of the one in logits
  float temperature;
  float softcap;  // 0: none
};

// max s, sum e, sum e (s - peak), with e = exp(s - peak); and the label's s, where it is ours
struct Statistics {
  float peak;
  double total;
  double moment;
  float chosen;
};

// What the second pass takes of the first, the loss's gradients with respect to the row's logprob
// (g) and entropy (h), and where d(logits) go.
struct RowGradient {
  void* out;  // may be the logits themselves
  float peak;
  float log_total;
  float over_total;  // exp(-log_total), less rounded
  float entropy;
  float g;
  float h;
  // Columns in which |d logit| > bound are set to 1, as wide an integer as a logit is; or null.
  void* live;
  float bound;
};

struct RowKernels {
  const char* name;
  Statistics (*statistics[2])(const Row&);  // of fp32, of bf16
  void (*gradient[2])(const Row&, const RowGradient&);
};

// The fastest that this processor runs, or the one of that name: null where it cannot.
const RowKernels* row_kernels(const char* name = nullptr);

}  // namespace metis
