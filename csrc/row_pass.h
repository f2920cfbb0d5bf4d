// The row pass over a chunk of logits [C, V], and its two halves; `metis_kernels._rows.RowPass` is
// the contract. Legend: C rows, V vocabulary; all numbers of a row are float32 [C], labels int64.

#pragma once

#include <cstdint>
#include <string>

#include "common.h"

namespace metis {

struct HeadOptions {
  float temperature;
  float softcap;  // 0: none
};

// What `HDPOConfig` and the counts of a batch say.
struct HDPOOptions {
  double w_acc, w_tool;  // already over n_acc, n_tool
  double clip_low, clip_high;
  double dual_clip;              // infinity: none
  double kl_coef, entropy_coef;  // already over n_acc
};

struct HDPOInputs {
  Optional old_logprob;
  Tensor acc_advantage, tool_advantage;
  Optional ref_logprob, is_weight;
  HDPOOptions options;
};

struct Given {
  Tensor logprob_grad;
  Optional entropy_grad;
};

struct Live {
  Tensor columns;  // [V], an integer as wide as a logit
  float eps;
};

struct Runtime {
  int threads;
  std::string isa;  // empty: the fastest
};

// Writes logprob and entropy and, where there is a coefficient, d(logits) over the logits.
void row_pass(const Tensor& logits, const Tensor& target, const Tensor& label,
              const Tensor& logprob, const Tensor& entropy, const HeadOptions& head,
              const std::optional<Given>& given, const std::optional<HDPOInputs>& hdpo,
              const std::optional<Live>& live, const Runtime& runtime);

void row_statistics(const Tensor& logits, const Tensor& target, const Tensor& label,
                    const Tensor& peak, const Tensor& total, const Tensor& moment,
                    const HeadOptions& head, const Runtime& runtime);

// alive is bool [C]: zeros are written in the other rows. d_logits may be the logits.
void row_gradient(const Tensor& logits, const Tensor& d_logits, const Tensor& target,
                  const Tensor& label, const Tensor& peak, const Tensor& log_total,
                  const Tensor& entropy, const Tensor& alive, const Given& given,
                  const HeadOptions& head, const std::optional<Live>& live, const Runtime& runtime);

}  // namespace metis
