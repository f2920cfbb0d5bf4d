#include "row_pass.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "parallel.h"
#include "row_kernels.h"

namespace metis {
namespace {

constexpr double kExpLimit = 60.0;  // where hdpo.py stops the exponent of a ratio
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A chunk whose rows can be taken one by one.
struct Chunk {
  char* logits;
  std::int64_t count, vocab, stride;  // stride in bytes
  bool half;
  const float* target;
  const std::int64_t* label;
  HeadOptions head;
  const RowKernels* kernels;

  Chunk(const Tensor& logits_, const Tensor& target_, const Tensor& label_,
        const HeadOptions& head_, const Runtime& runtime)
      : head(head_) {
    half = logits_.dtype == "bfloat16";
    if (logits_.shape.size() != 2 || logits_.shape[1] < 1 || !(half || logits_.dtype == "float32"))
      refuse(logits_, "float32 or bfloat16 [C, V], V >= 1");
    count = logits_.shape[0];
    vocab = logits_.shape[1];
    expect(logits_, logits_.dtype, logits_.shape);
    expect(target_, "float32", {count});
    expect(label_, "int64", {count});
    logits = logits_.data<char>();
    stride = logits_.strides[0] * width();
    target = target_.data<const float>();
    label = label_.data<const std::int64_t>();
    kernels = row_kernels(runtime.isa.empty() ? nullptr : runtime.isa.c_str());
    if (kernels == nullptr)
      throw std::invalid_argument("this processor does not run isa \"" + runtime.isa + "\"");
    if (runtime.threads < 1)
      throw std::invalid_argument("threads must be >= 1, got " + std::to_string(runtime.threads));
  }

  std::int64_t width() const { return half ? 2 : 4; }

  Row row(std::int64_t i) const {
    return {logits + i * stride, vocab, label[i], target[i], head.temperature, head.softcap};
  }

  Statistics statistics(std::int64_t i) const { return kernels->statistics[half](row(i)); }

  // The second pass over row i, with marks where they are asked for.
  void gradient(std::int64_t i, RowGradient to, const std::optional<Live>& live) const {
    to.live = live ? live->columns.data<void>() : nullptr;
    to.bound = live ? live->eps / head.temperature * (std::fabs(to.g) + std::fabs(to.h)) : 0;
    kernels->gradient[half](row(i), to);
  }

  void clear(void* out) const { std::memset(out, 0, vocab * width()); }

  void check(const std::optional<Live>& live) const {
    if (live) expect(live->columns, half ? "int16" : "int32", {vocab});
  }
};

// The gradients of the loss with respect to logprob and entropy.
struct Slope {
  float g, h;
};

// `hdpo.hdpo_coefficient` of single tokens.
class HDPOSlope {
 public:
  HDPOSlope(const HDPOInputs& inputs, std::int64_t count)
      : old_(data_of<const float>(inputs.old_logprob)),
        ref_(data_of<const float>(inputs.ref_logprob)),
        is_weight_(data_of<const float>(inputs.is_weight)),
        acc_(inputs.acc_advantage.data<const float>()),
        tool_(inputs.tool_advantage.data<const float>()),
        options_(inputs.options) {
    expect(inputs.acc_advantage, "float32", {count});
    expect(inputs.tool_advantage, "float32", {count});
    expect(inputs.old_logprob, "float32", {count});
    expect(inputs.ref_logprob, "float32", {count});
    expect(inputs.is_weight, "float32", {count});
  }

  Slope operator()(std::int64_t i, float logprob, float entropy) const {
    const HDPOOptions& o = options_;
    const double log_ratio = old_ ? double{logprob} - old_[i] : 0;
    const double ref_gap = ref_ ? double{ref_[i]} - logprob : 0;
    const double weight = is_weight_ ? is_weight_[i] : 1;
    const double everything =
        log_ratio + ref_gap + weight + acc_[i] + tool_[i] + (o.entropy_coef > 0 ? entropy : 0);
    if (!std::isfinite(logprob) || !std::isfinite(everything)) return {0, 0};
    const double ratio = std::exp(std::min(log_ratio, kExpLimit));
    double g = 0;
    if (log_ratio <= kExpLimit)
      g = -ratio * weight * (o.w_acc * pull(acc_[i], ratio) + o.w_tool * pull(tool_[i], ratio));
    if (ref_ && ref_gap <= kExpLimit) g -= o.kl_coef * std::expm1(ref_gap);
    return {static_cast<float>(g), static_cast<float>(-o.entropy_coef)};
  }

 private:
  // An advantage where its surrogate is unclipped, else 0.
  double pull(double advantage, double ratio) const {
    const HDPOOptions& o = options_;
    const bool kept =
        advantage > 0 ? ratio <= 1 + o.clip_high : 1 - o.clip_low <= ratio && ratio <= o.dual_clip;
    return kept ? advantage : 0;
  }

  const float *old_, *ref_, *is_weight_, *acc_, *tool_;
  HDPOOptions options_;
};

}  // namespace

void row_pass(const Tensor& logits, const Tensor& target, const Tensor& label,
              const Tensor& logprob, const Tensor& entropy, const HeadOptions& head,
              const std::optional<Given>& given, const std::optional<HDPOInputs>& hdpo,
              const std::optional<Live>& live, const Runtime& runtime) {
  const Chunk chunk(logits, target, label, head, runtime);
  expect(logprob, "float32", {chunk.count});
  expect(entropy, "float32", {chunk.count});
  chunk.check(live);
  std::optional<HDPOSlope> of_loss;
  if (hdpo) of_loss.emplace(*hdpo, chunk.count);
  if (given) {
    expect(given->logprob_grad, "float32", {chunk.count});
    expect(given->entropy_grad, "float32", {chunk.count});
  }
  const float* g = given ? given->logprob_grad.data<const float>() : nullptr;
  const float* h = given ? data_of<const float>(given->entropy_grad) : nullptr;
  float *logprobs = logprob.data<float>(), *entropies = entropy.data<float>();

  for_each_row(chunk.count, runtime.threads, [&](std::int64_t i) {
    const Statistics s = chunk.statistics(i);
    const double log_total = std::log(s.total);
    // A softcap would make a finite logprob of a broken hidden state; its target shows what it is.
    const double logprob = double{s.chosen} - s.peak - log_total;
    logprobs[i] = std::isfinite(chunk.target[i]) ? static_cast<float>(logprob) : kNaN;
    entropies[i] = static_cast<float>(log_total - s.moment / s.total);
    if (!g && !of_loss) return;
    void* out = chunk.logits + i * chunk.stride;
    if (!std::isfinite(logprobs[i])) {
      chunk.clear(out);
      return;
    }
    const Slope slope =
        of_loss ? (*of_loss)(i, logprobs[i], entropies[i]) : Slope{g[i], h ? h[i] : 0};
    RowGradient to{};
    to.out = out;
    to.peak = s.peak;
    to.log_total = static_cast<float>(log_total);
    to.over_total = static_cast<float>(1 / s.total);
    to.entropy = entropies[i];
    to.g = slope.g;
    to.h = slope.h;
    chunk.gradient(i, to, live);
  });
}

void row_statistics(const Tensor& logits, const Tensor& target, const Tensor& label,
                    const Tensor& peak, const Tensor& total, const Tensor& moment,
                    const HeadOptions& head, const Runtime& runtime) {
  const Chunk chunk(logits, target, label, head, runtime);
  for (const Tensor* t : {&peak, &total, &moment}) expect(*t, "float32", {chunk.count});
  for_each_row(chunk.count, runtime.threads, [&](std::int64_t i) {
    const Statistics s = chunk.statistics(i);
    peak.data<float>()[i] = s.peak;
    total.data<float>()[i] = static_cast<float>(s.total);
    moment.data<float>()[i] = static_cast<float>(s.moment);
  });
}

void row_gradient(const Tensor& logits, const Tensor& d_logits, const Tensor& target,
                  const Tensor& label, const Tensor& peak, const Tensor& log_total,
                  const Tensor& entropy, const Tensor& alive, const Given& given,
                  const HeadOptions& head, const std::optional<Live>& live,
                  const Runtime& runtime) {
  const Chunk chunk(logits, target, label, head, runtime);
  expect(d_logits, logits.dtype, logits.shape);
  for (const Tensor* t : {&peak, &log_total, &entropy, &given.logprob_grad})
    expect(*t, "float32", {chunk.count});
  expect(given.entropy_grad, "float32", {chunk.count});
  expect(alive, "bool", {chunk.count});
  chunk.check(live);
  const float* h = data_of<const float>(given.entropy_grad);
  char* first = d_logits.data<char>();
  const std::int64_t stride = d_logits.strides[0] * chunk.width();
  for_each_row(chunk.count, runtime.threads, [&](std::int64_t i) {
    void* out = first + i * stride;
    if (!alive.data<const bool>()[i]) {
      chunk.clear(out);
      return;
    }
    RowGradient to{};
    to.out = out;
    to.peak = peak.data<const float>()[i];
    to.log_total = log_total.data<const float>()[i];
    to.over_total = static_cast<float>(std::exp(-double{to.log_total}));
    to.entropy = entropy.data<const float>()[i];
    to.g = given.logprob_grad.data<const float>()[i];
    to.h = h ? h[i] : 0;
    chunk.gradient(i, to, live);
  });
}

}  // namespace metis
