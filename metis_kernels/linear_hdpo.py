"""Linear head -> logprob -> HDPO loss, with the gradient computed in the forward.

The loss's gradient with respect to a token's logprob is one scalar, known as soon as the logprob is
(`hdpo_coefficient`). So the backward needs no second pass over the vocabulary: three matrix
products, 6 S V H operations, and no logits beyond one chunk.

Legend: T rows of hidden, H hidden, V vocabulary, S tokens that carry loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from metis_kernels import _cpp, _impl, _ops, _rows, _torch, _triton
from metis_kernels._sweep import sweep_selected
from metis_kernels.hdpo import HDPOConfig, HDPOStats, HDPOTargets, as_count, hdpo_loss


def linear_hdpo_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: HDPOTargets,
    config: HDPOConfig,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, HDPOStats]:
    """Dense and differentiable by autograd: every logit of every token in memory.

    dtype float64 is the oracle; a narrower one is what plain torch gives in it (products and logits
    in dtype, log_softmax in at least fp32), the yardstick for errors and speed.
    """
    hidden = hidden.to(dtype)
    rows = hidden if targets.row is None else hidden.index_select(0, targets.row)
    logits = torch.nn.functional.linear(
        rows, weight.to(dtype), None if bias is None else bias.to(dtype)
    ).to(torch.promote_types(dtype, torch.float32))
    if config.softcap is not None:
        logits = config.softcap * torch.tanh(logits / config.softcap)
    logp = torch.log_softmax(logits / config.temperature, -1)
    logprob = logp.gather(1, targets.label.long().unsqueeze(1)).squeeze(1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    return hdpo_loss(logprob, targets, config, entropy)


_impl.register("linear_hdpo_loss", "triton", _triton.ROW_PASS, _triton.unavailable)
_impl.register("linear_hdpo_loss", "cpp", _cpp.ROW_PASS, _cpp.unavailable)
_impl.register("linear_hdpo_loss", "torch", _torch.ROW_PASS)


def run_hdpo_sweep(
    hidden, weight, bias, row, label, live, old_logprob, acc_advantage, tool_advantage,
    ref_logprob, is_weight, n_acc, n_tool, w_acc, w_tool, clip_low, clip_high, dual_clip, kl_coef,
    entropy_coef, temperature, softcap, logits_dtype, wants, impl, chunk_bytes, group, eps,
    guarded,
):  # fmt: skip
    """(logprob [S], entropy [S], d_hidden, d_weight, d_bias): a sweep over the tokens that carry
    loss. NaN for the other tokens; a gradient that nobody wants is empty.

    `hdpo_sweep` is it as one opaque operator, so that a compiled caller sees neither the choice of
    the tokens nor the chunks: how many there are changes from batch to batch.
    """
    config = HDPOConfig(
        w_acc=w_acc, w_tool=w_tool, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
        kl_coef=kl_coef, entropy_coef=entropy_coef,
    )  # fmt: skip
    targets = HDPOTargets(
        row, label, old_logprob, acc_advantage, tool_advantage, n_acc, n_tool, ref_logprob,
        is_weight,
    )  # fmt: skip
    return sweep_selected(
        hidden,
        _rows.Head(weight, bias, temperature, softcap, logits_dtype),
        label,
        row,
        _rows.HDPOCoefficient(targets, config),
        _rows.Wants(*wants),
        _ops.loop_of(
            "linear_hdpo_loss", impl, hidden, len(weight), chunk_bytes, group, eps, guarded
        ),
        select=targets.live_index(config) if live is None else live,
        fill=float("nan"),
    )


hdpo_sweep = torch.library.custom_op(
    "metis_kernels::hdpo_sweep",
    run_hdpo_sweep,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor? row, Tensor label, Tensor? live, "
    "Tensor? old_logprob, Tensor acc_advantage, Tensor tool_advantage, Tensor? ref_logprob, "
    "Tensor? is_weight, Tensor n_acc, Tensor n_tool, float w_acc, float w_tool, float clip_low, "
    "float clip_high, float? dual_clip, float kl_coef, float entropy_coef, float temperature, "
    "float? softcap, ScalarType? logits_dtype, bool[] wants, str impl, int? chunk_bytes, "
    "str? group, float? eps, bool guarded) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@hdpo_sweep.register_fake
def _(hidden, weight, bias, row, label, *rest):
    return _ops.fake_sweep(hidden, weight, label, wants=rest[-6])


def linear_hdpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: HDPOTargets,
    config: HDPOConfig,
    *,
    bias: Tensor | None = None,
    impl: str = "auto",
    chunk_bytes: int | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    grad_filter: float | str | None = None,
) -> tuple[Tensor, HDPOStats]:
    """The HDPO loss of hidden [T, H] under the head weight [V, H], bias [V]: (loss 0-d, stats).

    hidden ([B, T, H] counts as [B T, H]), weight and bias share a floating dtype; targets are [S],
    and a row may repeat. The result equals `hdpo_loss` of the logprobs, and is differentiable in
    hidden, weight and bias; what does not require a gradient costs none, and under no_grad nothing
    does. Tokens that carry no loss never reach the head: their logprob and entropy are NaN in the
    stats. A token whose logprob is not finite leaves loss and gradients as if it were absent, and
    is counted in stats.n_nonfinite.

    Precision: logits in config.logits_dtype (None: that of hidden), log-sum-exp and gradient sums
    in fp32 (fp64 for fp64), the label's logit as an fp32 dot product. config.logits_dtype=float32
    with bf16 inputs widens a copy of weight on the CPU; on a GPU it costs no copy.
    chunk_bytes bounds what exists of logits at a time (default: `_sweep.chunk_rows`).
    ratio="sequence" needs all logprobs of a response before any gradient, so it computes logits
    twice (8 S V H operations).

    The first ratio: logprobs from `linear_logprobs` with the same head and options equal, bitwise
    on the CPU, those that this function computes from unchanged weights.

    process_group: the head is cut over the vocabulary. Every rank passes its rows of weight and
    bias, equally many and in the order of the ranks, and otherwise the same arguments; all get the
    whole loss and d_hidden (already summed), each the gradient of its own rows.

    grad_filter: None is exact. With a number eps, columns of d(logits) in which no row of a chunk
    exceeds eps of its own coefficient stay out of the two backward products, and what they held is
    given back to d_hidden along their mean (`_filter.py`); on a language model's own logits 80 to
    98 % of the columns at 1 to 0.1 nats. "auto" is 2.4e-4, and all columns for a chunk in which
    half are live or more would be lost than rounding to bf16 loses. The host reads one number a
    chunk, after the next chunk's product has been launched.

    On a GPU, finding the tokens that carry loss is one synchronisation, and none for targets that
    came there by `HDPOTargets.to`. Raises ValueError where shapes, dtypes, devices or (on the CPU)
    ranges disagree, RuntimeError where impl cannot run here.
    """
    if targets.label is None:
        raise ValueError("expected targets.label [S], got None")
    hidden, _ = _rows.flatten_batch(hidden, targets.label, targets.row)
    head = _rows.Head(weight, bias, config.temperature, config.softcap, config.logits_dtype)
    group, parts = _ops.group_of(process_group)
    _rows.check_head(hidden, head, targets.label, targets.row, parts=parts)
    targets.validate(hidden.shape[0], parts * weight.shape[0], hidden.device)
    if config.ratio == "sequence":
        return _by_sequence(hidden, head, targets, config, impl, chunk_bytes, group, grad_filter)
    wants = _rows.Wants.of(hidden, head)
    with torch.no_grad():
        logprob, entropy, *grads = hdpo_sweep(
            hidden, weight, bias, targets.row, targets.label, targets.known_live(config),
            targets.old_logprob, targets.acc_advantage, targets.tool_advantage,
            targets.ref_logprob, targets.is_weight,
            as_count(targets.n_acc, hidden.device), as_count(targets.n_tool, hidden.device),
            config.w_acc, config.w_tool, config.clip_low, config.clip_high, config.dual_clip,
            config.kl_coef, config.entropy_coef, config.temperature, config.softcap,
            config.logits_dtype, list(wants), impl, chunk_bytes, group,
            *_ops.filter_of(grad_filter),
        )  # fmt: skip
    loss, stats = hdpo_loss(logprob, targets, config, entropy)
    if any(wants):
        grads = (g if wanted else None for g, wanted in zip(grads, wants, strict=True))
        loss = _ops.GradientInForward.apply(loss, hidden, weight, bias, *grads)
    return loss, stats


def _by_sequence(
    hidden: Tensor,
    head: _rows.Head,
    targets: HDPOTargets,
    config: HDPOConfig,
    impl: str,
    chunk_bytes: int | None,
    group: str | None,
    grad_filter: float | str | None,
) -> tuple[Tensor, HDPOStats]:
    """The loss where a token's ratio waits for its whole response."""
    live = None if torch.compiler.is_compiling() else targets.live_index(config)
    if live is None or len(live) == targets.label.numel():
        logprob, entropy = _ops.recompute(
            hidden,
            head,
            targets.label,
            targets.row,
            "linear_hdpo_loss",
            impl,
            chunk_bytes,
            group,
            grad_filter,
        )
        return hdpo_loss(logprob, targets, config, entropy)
    if targets.row is None:
        targets = replace(targets, row=torch.arange(len(targets.label), device=hidden.device))
    active = targets.take(live)
    logprob, entropy = _ops.recompute(
        hidden,
        head,
        active.label,
        active.row,
        "linear_hdpo_loss",
        impl,
        chunk_bytes,
        group,
        grad_filter,
    )
    loss, stats = hdpo_loss(logprob, active, config, entropy)
    spread = {
        name: value.new_full(targets.label.shape, float("nan")).index_copy(0, live, value)
        for name, value in (("logprob", stats.logprob), ("entropy", stats.entropy))
    }
    return loss, replace(stats, **spread)
