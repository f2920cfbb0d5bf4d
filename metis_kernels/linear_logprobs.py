"""Linear head -> logprob and entropy of each token, without logits in memory; and cross-entropy.

`linear_logprobs` lets autograd do anything with its two outputs, and so computes logits again in
the backward: 8 S V H operations. `linear_cross_entropy` knows its gradient in the forward: 6 S V H.

Legend: T rows of hidden, H hidden, V vocabulary, S tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis_kernels import _cpp, _impl, _ops, _rows, _torch, _triton
from metis_kernels.hdpo import inverse_count

IGNORE_INDEX = -100
"""A label that means: no token here. torch's own convention."""


def linear_logprobs_ref(
    hidden: Tensor,
    weight: Tensor,
    label: Tensor,
    row: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Dense, by autograd; dtype float64 is the oracle, a narrower one plain torch in it."""
    hidden = hidden.to(dtype)
    rows = hidden if row is None else hidden.index_select(0, row)
    logits = torch.nn.functional.linear(
        rows, weight.to(dtype), None if bias is None else bias.to(dtype)
    ).to(torch.promote_types(dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, -1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    return logp.gather(1, label.long().unsqueeze(1)).squeeze(1), entropy


for _operator in ("linear_logprobs", "linear_cross_entropy"):
    _impl.register(_operator, "triton", _triton.ROW_PASS, _triton.unavailable)
    _impl.register(_operator, "cpp", _cpp.ROW_PASS, _cpp.unavailable)
    _impl.register(_operator, "torch", _torch.ROW_PASS)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    label: Tensor,
    row: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    impl: str = "auto",
    chunk_bytes: int | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    grad_filter: float | str | None = None,
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) of label [S] under softmax(hidden[row] @ weight.T + bias), fp32 each.

    hidden [T, H], weight [V, H], bias [V] in one floating dtype (fp64 in, fp64 out); label [S] and
    row [S] integers; without row, token s belongs to row s. hidden [B, T, H] with label [B, T] and
    no row gives [B, T]. Both outputs are differentiable in hidden, weight and bias. Options and
    precision as in `linear_hdpo_loss`. A token whose logprob is not finite passes no gradient on:
    its logprob is the report. process_group and grad_filter (of the backward) as there. Raises
    ValueError where shapes, dtypes, devices or (on the CPU) ranges disagree, RuntimeError where
    impl cannot run here.
    """
    shape = label.shape
    hidden, label = _rows.flatten_batch(hidden, label, row)
    head = _rows.Head(weight, bias, temperature, softcap, logits_dtype)
    group, parts = _ops.group_of(process_group)
    _rows.check_head(hidden, head, label, row, parts=parts)
    logprob, entropy = _ops.recompute(
        hidden, head, label, row, "linear_logprobs", impl, chunk_bytes, group, grad_filter
    )
    return logprob.view(shape), entropy.view(shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    label: Tensor,
    row: Tensor | None = None,
    *,
    n: Tensor | float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    impl: str = "auto",
    chunk_bytes: int | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    grad_filter: float | str | None = None,
) -> Tensor:
    """-1 / n * sum of the logprobs of label [S], 0-d: the loss of supervised fine-tuning.

    n is the number of tokens of the whole optimizer batch, a number or a 0-d tensor, so that the
    gradient does not depend on how the batch was cut; default: the labels here that are not -100.
    n = 0 gives exactly 0. A label of -100 is no token: its row never reaches the head (finding them
    is one synchronisation on a GPU). Otherwise shapes, options and errors are `linear_logprobs`'s,
    except that a non-finite logprob is in the loss (which then is not finite either) while its
    token still passes no gradient on.
    """
    hidden, label = _rows.flatten_batch(hidden, label, row)
    head = _rows.Head(weight, bias, temperature, softcap, logits_dtype)
    group, parts = _ops.group_of(process_group)
    _rows.check_head(hidden, head, label, row, ignored=IGNORE_INDEX, parts=parts)
    if n is None:
        n = (label != IGNORE_INDEX).sum()
    if isinstance(n, Tensor):
        if n.dim() != 0:
            raise ValueError(f"expected n 0-d, got {list(n.shape)}")
    elif not 0 <= n < float("inf"):
        raise ValueError(f"n must be a finite count >= 0, got {n}")
    scale = inverse_count(n, torch.empty((), dtype=head.work_dtype, device=hidden.device))

    wants = _rows.Wants.of(hidden, head)
    with torch.no_grad():
        logprob, _, *grads = _ops.row_sweep(
            hidden, weight, bias, row, label, (-scale).expand(label.shape), None, IGNORE_INDEX,
            temperature, softcap, logits_dtype, list(wants), "linear_cross_entropy", impl,
            chunk_bytes, group, *_ops.filter_of(grad_filter),
        )  # fmt: skip
    loss = torch.where(scale > 0, -logprob.sum() * scale, 0)
    if any(wants):
        grads = (g if wanted else None for g, wanted in zip(grads, wants, strict=True))
        loss = _ops.GradientInForward.apply(loss, hidden, weight, bias, *grads)
    return loss
