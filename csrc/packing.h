// Rollouts -> packed batches: which tokens carry loss, the prefix that a group shares, the copying.
//
// Everything here is bound by memory: ids and positions are read once where they are compared and
// once where they are copied, in runs, by the C library's own vector code.

#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "common.h"

namespace metis {

// Where a batch goes: G groups, M members in the order of its layout, T rows, S targets, A axes.
struct PackingBatch {
  std::vector<std::int64_t> prefixes;  // [G] tokens of each group's prefix
  std::vector<std::int64_t> sizes;     // [G] members of each group
  std::vector<std::int64_t> members;   // [M] numbers of rollouts
  Tensor ids;                          // [T] int64
  Tensor positions;                    // [A, T] int64
  Tensor row, label, sequence;         // [S] int64
  Tensor acc_advantage, tool_advantage;          // [S] float32
  Optional old_logprob, ref_logprob, is_weight;  // [S] float32
};

// Memory of N rollouts, column by column; Python has checked dtypes and keeps all of it alive.
class Rollouts {
 public:
  using Addresses = std::vector<std::uintptr_t>;

  // positions may be empty: 0..n-1, one axis. Axis a of rollout i starts stride[i] * a elements
  // behind positions[i]. per_token: old_logprob, ref_logprob, is_weight; each may be empty.
  Rollouts(std::vector<std::int64_t> length, Addresses ids, Addresses policy, Addresses positions,
           std::vector<std::int64_t> stride, std::int64_t axes, std::vector<float> acc_advantage,
           std::vector<float> tool_advantage, std::array<Addresses, 3> per_token, int threads);

  // [N] (first, last, count) of the policy's tokens; (-1, -1, 0) where there is none. A rollout's
  // tokens before `last` are what the other functions see of it.
  const std::vector<std::array<std::int64_t, 3>>& policy_tokens() const { return policy_tokens_; }

  // For each group, the longest prefix that its rollouts have in common, in ids and positions.
  std::vector<std::int64_t> common_prefixes(
      const std::vector<std::vector<std::int64_t>>& groups) const;

  // Fills the tensors of batches.
  void assemble(const std::vector<PackingBatch>& batches) const;

 private:
  struct Job;

  std::int64_t kept(std::int64_t rollout) const { return policy_tokens_[rollout][1]; }
  void check_member(std::int64_t rollout) const;
  void plan(const PackingBatch& batch, std::vector<Job>& jobs) const;
  void copy_tokens(const Job& job) const;
  void write_targets(const Job& job) const;

  std::vector<std::int64_t> length_;
  Addresses ids_, policy_, positions_;
  std::vector<std::int64_t> stride_;
  std::int64_t axes_;
  std::vector<float> acc_advantage_, tool_advantage_;
  std::array<Addresses, 3> per_token_;
  int threads_;
  std::vector<std::array<std::int64_t, 3>> policy_tokens_;
};

}  // namespace metis
