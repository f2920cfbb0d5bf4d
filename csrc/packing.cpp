#include "packing.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <utility>

#include "parallel.h"

namespace metis {
namespace {

using std::int64_t;

template <class T>
const T* at(std::uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("packing: " + what); }

// The first index in [from, stop) whose byte is not zero, or stop.
int64_t next_set(const unsigned char* mask, int64_t from, int64_t stop) {
  for (; from + 8 <= stop; from += 8) {
    std::uint64_t word;
    std::memcpy(&word, mask + from, 8);
    if (word != 0) break;
  }
  while (from < stop && mask[from] == 0) ++from;
  return from;
}

// Calls visit(start, stop) for each run of bytes in [0, length) that are not zero.
template <class Visit>
void for_each_run(const unsigned char* mask, int64_t length, const Visit& visit) {
  for (int64_t start = next_set(mask, 0, length); start < length;) {
    const void* zero = std::memchr(mask + start, 0, length - start);
    const int64_t stop = zero ? static_cast<const unsigned char*>(zero) - mask : length;
    visit(start, stop);
    start = next_set(mask, stop, length);
  }
}

// The first index at which a and b differ, or length.
int64_t common(const int64_t* a, const int64_t* b, int64_t length) {
  constexpr int64_t kBlock = 1024;
  if (a == b) return length;
  int64_t i = 0;
  while (i < length) {
    const int64_t size = std::min(kBlock, length - i);
    if (std::memcmp(a + i, b + i, size * sizeof(int64_t)) != 0) break;
    i += size;
  }
  while (i < length && a[i] == b[i]) ++i;
  return i;
}

void lower(std::atomic<int64_t>& least, int64_t value) {
  int64_t seen = least;
  while (value < seen && !least.compare_exchange_weak(seen, value)) {
  }
}

// memcpy may not be given a null pointer, which an empty tensor has.
template <class T>
void copy(const T* from, int64_t count, T* to) {
  if (count > 0) std::memcpy(to, from, count * sizeof(T));
}

}  // namespace

Rollouts::Rollouts(std::vector<int64_t> length, Addresses ids, Addresses policy,
                   Addresses positions, std::vector<int64_t> stride, int64_t axes,
                   std::vector<float> acc_advantage, std::vector<float> tool_advantage,
                   std::array<Addresses, 3> per_token, int threads)
    : length_(std::move(length)),
      ids_(std::move(ids)),
      policy_(std::move(policy)),
      positions_(std::move(positions)),
      stride_(std::move(stride)),
      axes_(axes),
      acc_advantage_(std::move(acc_advantage)),
      tool_advantage_(std::move(tool_advantage)),
      per_token_(std::move(per_token)),
      threads_(threads),
      policy_tokens_(length_.size()) {
  const std::size_t count = length_.size();
  const auto optional = [&](std::size_t size) { return size == 0 || size == count; };
  bool equal = ids_.size() == count && policy_.size() == count &&
               acc_advantage_.size() == count && tool_advantage_.size() == count &&
               optional(positions_.size()) && stride_.size() == positions_.size();
  for (const Addresses& column : per_token_) equal = equal && optional(column.size());
  if (!equal) fail("the columns differ in length");
  if (axes_ < 1 || (positions_.empty() && axes_ != 1)) fail("expected one axis or positions");
  for_each_row(static_cast<int64_t>(count), threads_, [&](int64_t i) {
    std::array<int64_t, 3> found{-1, -1, 0};
    for_each_run(at<unsigned char>(policy_[i]), length_[i], [&](int64_t start, int64_t stop) {
      if (found[2] == 0) found[0] = start;
      found[1] = stop - 1;
      found[2] += stop - start;
    });
    policy_tokens_[i] = found;
  });
}

void Rollouts::check_member(int64_t rollout) const {
  if (rollout < 0 || rollout >= static_cast<int64_t>(length_.size()))
    fail("there is no rollout " + std::to_string(rollout));
  if (policy_tokens_[rollout][0] < 1)
    fail("rollout " + std::to_string(rollout) + " has no policy token, or one at index 0");
}

std::vector<int64_t> Rollouts::common_prefixes(
    const std::vector<std::vector<int64_t>>& groups) const {
  // The first of each group against every other one: the first stays in the cache. What another
  // thread has found for the group already bounds the search; the least is the same in any order.
  struct Pair {
    std::size_t group;
    int64_t first, other;
  };
  std::vector<Pair> pairs;
  std::vector<std::atomic<int64_t>> least(groups.size());
  for (std::size_t g = 0; g < groups.size(); ++g) {
    if (groups[g].empty()) fail("a group is empty");
    for (const int64_t member : groups[g]) check_member(member);
    least[g] = kept(groups[g][0]);
    for (std::size_t i = 1; i < groups[g].size(); ++i) {
      lower(least[g], kept(groups[g][i]));
      pairs.push_back({g, groups[g][0], groups[g][i]});
    }
  }
  for_each_row(static_cast<int64_t>(pairs.size()), threads_, [&](int64_t i) {
    const auto [group, first, other] = pairs[i];
    int64_t same = common(at<int64_t>(ids_[first]), at<int64_t>(ids_[other]), least[group]);
    if (!positions_.empty()) {
      const int64_t *a = at<int64_t>(positions_[first]), *b = at<int64_t>(positions_[other]);
      for (int64_t axis = 0; axis < axes_; ++axis)
        same = common(a + axis * stride_[first], b + axis * stride_[other], same);
    }
    lower(least[group], same);
  });
  return {least.begin(), least.end()};
}

// Tokens [start, stop) of a rollout go to rows from `row` on; a member brings its targets too.
struct Rollouts::Job {
  const PackingBatch* batch;
  int64_t rollout, start, stop, row;
  int64_t member;      // its number in the batch; -1 for a group's prefix
  int64_t prefix_row;  // where the prefix of its group lies
  int64_t target;      // where its targets go
};

void Rollouts::plan(const PackingBatch& batch, std::vector<Job>& jobs) const {
  const int64_t members = static_cast<int64_t>(batch.members.size());
  if (batch.sizes.size() != batch.prefixes.size() ||
      std::accumulate(batch.sizes.begin(), batch.sizes.end(), int64_t{0}) != members)
    fail("prefixes, sizes and members of a batch disagree");
  int64_t row = 0, target = 0, member = 0;
  for (std::size_t g = 0; g < batch.prefixes.size(); ++g) {
    const int64_t prefix = batch.prefixes[g], prefix_row = row;
    if (batch.sizes[g] < 1 || prefix < 0) fail("a group has no member or a negative prefix");
    for (int64_t i = 0; i < batch.sizes[g]; ++i, ++member) {
      const int64_t rollout = batch.members[member];
      check_member(rollout);
      if (prefix > kept(rollout)) fail("a prefix is longer than a rollout of its group");
      if (i == 0) {
        jobs.push_back({&batch, rollout, 0, prefix, row, -1, prefix_row, 0});
        row += prefix;
      }
      jobs.push_back({&batch, rollout, prefix, kept(rollout), row, member, prefix_row, target});
      row += kept(rollout) - prefix;
      target += policy_tokens_[rollout][2];
    }
  }
  expect(batch.ids, "int64", {row});
  expect(batch.positions, "int64", {axes_, row});
  for (const Tensor* t : {&batch.row, &batch.label, &batch.sequence}) expect(*t, "int64", {target});
  for (const Tensor* t : {&batch.acc_advantage, &batch.tool_advantage})
    expect(*t, "float32", {target});
  const Optional* given[] = {&batch.old_logprob, &batch.ref_logprob, &batch.is_weight};
  for (std::size_t k = 0; k < 3; ++k) {
    expect(*given[k], "float32", {target});
    if (*given[k] && per_token_[k].empty()) fail("the rollouts have no " + (*given[k])->name);
  }
}

void Rollouts::copy_tokens(const Job& job) const {
  const int64_t size = job.stop - job.start;
  copy(at<int64_t>(ids_[job.rollout]) + job.start, size, job.batch->ids.data<int64_t>() + job.row);
  const Tensor& positions = job.batch->positions;
  for (int64_t axis = 0; axis < axes_ && size > 0; ++axis) {
    int64_t* to = positions.data<int64_t>() + axis * positions.strides[0] + job.row;
    if (positions_.empty()) {
      std::iota(to, to + size, job.start);
    } else {
      const int64_t* from = at<int64_t>(positions_[job.rollout]) + axis * stride_[job.rollout];
      copy(from + job.start, size, to);
    }
  }
}

void Rollouts::write_targets(const Job& job) const {
  const PackingBatch& batch = *job.batch;
  const int64_t prefix = job.start;
  const int64_t* ids = at<int64_t>(ids_[job.rollout]);
  int64_t* row = batch.row.data<int64_t>() + job.target;
  int64_t* label = batch.label.data<int64_t>() + job.target;
  const std::array<float*, 3> outputs = {data_of<float>(batch.old_logprob),
                                         data_of<float>(batch.ref_logprob),
                                         data_of<float>(batch.is_weight)};
  int64_t done = 0;
  for_each_run(at<unsigned char>(policy_[job.rollout]), job.stop + 1,
               [&](int64_t start, int64_t stop) {
                 // Token t is predicted by the row of token t - 1, which may be a prefix's.
                 const int64_t size = stop - start;
                 const int64_t inside = std::clamp<int64_t>(prefix - (start - 1), 0, size);
                 int64_t* to = row + done;
                 std::iota(to, to + inside, job.prefix_row + start - 1);
                 std::iota(to + inside, to + size, job.row + (start - 1 + inside - prefix));
                 copy(ids + start, size, label + done);
                 for (std::size_t k = 0; k < outputs.size(); ++k)
                   if (outputs[k] != nullptr)
                     copy(at<float>(per_token_[k][job.rollout]) + start, size,
                          outputs[k] + job.target + done);
                 done += size;
               });
  std::fill_n(batch.sequence.data<int64_t>() + job.target, done, job.member);
  std::fill_n(batch.acc_advantage.data<float>() + job.target, done, acc_advantage_[job.rollout]);
  std::fill_n(batch.tool_advantage.data<float>() + job.target, done, tool_advantage_[job.rollout]);
}

void Rollouts::assemble(const std::vector<PackingBatch>& batches) const {
  std::vector<Job> jobs;
  for (const PackingBatch& batch : batches) plan(batch, jobs);
  for_each_row(static_cast<int64_t>(jobs.size()), threads_, [&](int64_t i) {
    copy_tokens(jobs[i]);
    if (jobs[i].member >= 0) write_targets(jobs[i]);
  });
}

}  // namespace metis
