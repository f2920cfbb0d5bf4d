"""Linear head -> logprob -> HDPO loss, with the gradient computed in the forward.

The loss's gradient with respect to a token's logprob is one scalar, known as soon as the logprob is
(`hdpo_coefficient`). So the backward needs no second pass over the vocabulary: three matrix
products, 6 S V H operations, and no logits beyond one chunk.

Legend: T rows of hidden, H hidden, V vocabulary, S tokens that carry loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metis_kernels import _impl, _rows
from metis_kernels.hdpo import HDPOConfig, HDPOStats, HDPOTargets, hdpo_coefficient, hdpo_loss


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


@dataclass(frozen=True)
class HDPOCoefficient:
    """The `Coefficient` of the HDPO loss: dL/dlogprob and dL/dentropy of any slice of its tokens.

    A row pass may call it, or read its fields and do the same arithmetic itself.
    """

    targets: HDPOTargets
    config: HDPOConfig

    def rows(self, start: int, stop: int) -> HDPOCoefficient:
        index = torch.arange(start, stop, device=self.targets.acc_advantage.device)
        return replace(self, targets=self.targets.take(index))

    def __call__(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        return hdpo_coefficient(logprob, self.targets, self.config, entropy)


_impl.register("linear_hdpo_loss", "torch", _rows.row_pass_torch)


def linear_hdpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: HDPOTargets,
    config: HDPOConfig,
    *,
    bias: Tensor | None = None,
    impl: str = "auto",
    chunk_bytes: int | None = None,
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
    chunk_bytes bounds what exists of logits at a time (default: `_rows.chunk_rows`).
    ratio="sequence" needs all logprobs of a response before any gradient, so it computes logits
    twice (8 S V H operations).

    The first ratio: logprobs from `linear_logprobs` with the same head and options equal, bitwise
    on the CPU, those that this function computes from unchanged weights.

    On a GPU, finding the tokens that carry loss is one synchronisation, and none for targets that
    came there by `HDPOTargets.to`. Raises ValueError where shapes, dtypes, devices or (on the CPU)
    ranges disagree, RuntimeError where impl cannot run here.
    """
    if targets.label is None:
        raise ValueError("expected targets.label [S], got None")
    hidden, _ = _rows.flatten_batch(hidden, targets.label, targets.row)
    head = _rows.Head(weight, bias, config.temperature, config.softcap, config.logits_dtype)
    _rows.check_head(hidden, head, targets.label, targets.row)
    targets.validate(hidden.shape[0], weight.shape[0], hidden.device)
    row_pass = _impl.implementation("linear_hdpo_loss", impl, hidden.device)

    live = targets.live_index(config)
    if len(live) == targets.label.numel():
        live = None
    elif targets.row is None:
        targets = replace(targets, row=torch.arange(len(targets.label), device=hidden.device))
    active = targets if live is None else targets.take(live)
    if config.ratio == "sequence":
        logprob, entropy = _rows.recompute(
            hidden, head, active.label, active.row, row_pass, chunk_bytes
        )
        loss, stats = hdpo_loss(logprob, active, config, entropy)
    else:
        wants = _rows.Wants.of(hidden, head)
        logprob, entropy, grads = _rows.sweep(
            hidden,
            head,
            active.label,
            active.row,
            HDPOCoefficient(active, config),
            wants,
            row_pass,
            chunk_bytes,
        )
        loss, stats = hdpo_loss(logprob, active, config, entropy)
        if wants:
            loss = _rows.GradientInForward.apply(loss, hidden, weight, bias, *grads)
    if live is not None:
        stats = replace(
            stats,
            logprob=_spread(stats.logprob, live, targets),
            entropy=_spread(stats.entropy, live, targets),
        )
    return loss, stats


def _spread(values: Tensor, index: Tensor, targets: HDPOTargets) -> Tensor:
    """[S] with values [K] at index [K] and NaN elsewhere."""
    return values.new_full(targets.label.shape, float("nan")).index_copy(0, index, values)
