"""The row pass in torch operations: the plain one, on any device, in any dtype.

With s_j the scaled logits (softcap, then temperature) of a row and p their softmax,

    dL/ds_j = g (1[j = label] - p_j) - h p_j (log p_j + entropy)
    dL/dz_j = dL/ds_j / temperature * (1 - tanh(z_j / softcap)^2, where there is a softcap)

Legend: C rows of a chunk, V vocabulary; z a raw logit. A leaf: it imports torch and _rows, whose
`RowPass` has the contract.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metis_kernels._rows import FLOOR, Head, RowPass, row_sum


def run(
    logits: Tensor,
    target: Tensor,
    label: Tensor,
    head: Head,
    coefficient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]] | None,
    mark: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    s, slope = _scaled(logits, target, label, head, slope=coefficient is not None)
    chosen = s.gather(1, label.unsqueeze(1)).squeeze(1)
    peak, total, moment, probs = _reduce(s)
    log_total = total.log()
    # A softcap would make a finite logprob of a broken hidden state; its target shows what it is.
    logprob = torch.where(torch.isfinite(target), chosen - peak - log_total, float("nan"))
    entropy = log_total - moment / total
    if coefficient is not None:
        g, h = coefficient(logprob, entropy)
        alive = torch.isfinite(logprob)
        _write(logits, label, head, s, probs, slope, total, entropy, alive, g, h, mark)
    return logprob, entropy


def statistics(
    logits: Tensor, target: Tensor, label: Tensor, head: Head
) -> tuple[Tensor, Tensor, Tensor]:
    s, _ = _scaled(logits.clone(), target, label, head, slope=False)
    return _reduce(s)[:3]


def gradient(
    logits: Tensor,
    target: Tensor,
    label: Tensor,
    head: Head,
    peak: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    alive: Tensor,
    g: Tensor,
    h: Tensor | None,
    mark: tuple[Tensor, float] | None = None,
) -> None:
    s, slope = _scaled(logits, target, label, head, slope=True)
    s.sub_(peak.unsqueeze(1)).clamp_(min=FLOOR)
    _write(logits, label, head, s, s.exp(), slope, log_total.exp(), entropy, alive, g, h, mark)


ROW_PASS = RowPass(run, statistics, gradient, copies=2)


def _here(label: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """(label [C, 1] with 0 for another rank's, whether it is ours [C, 1])."""
    label = label.unsqueeze(1)
    here = (label >= 0) & (label < vocab)
    return torch.where(here, label, 0), here


def _scaled(
    logits: Tensor, target: Tensor, label: Tensor, head: Head, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """(s [C, V] in work dtype, ds/dz times the temperature, None where it is 1 or not wanted).
    Consumes logits."""
    work, wanted = torch.promote_types(logits.dtype, torch.float32), slope
    s = logits.to(work)
    # The exact target takes its place in the sum too, so that logprob <= 0 holds in any dtype.
    label, here = _here(label, s.shape[1])
    s.scatter_(1, label, torch.where(here, target.to(work).unsqueeze(1), s.gather(1, label)))
    slope = None
    if head.softcap is not None:
        s.div_(head.softcap).tanh_()
        slope = 1 - s.square() if wanted else None
        s.mul_(head.softcap)
    return s.div_(head.temperature), slope


def _reduce(s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(peak [C], total [C], moment [C], exp(s - peak) [C, V]); s becomes s - peak, floored."""
    peak = s.amax(1)
    s.sub_(peak.unsqueeze(1)).clamp_(min=FLOOR)
    probs = s.exp()
    return peak, row_sum(probs), row_sum(s * probs), probs


def _write(
    logits: Tensor,
    label: Tensor,
    head: Head,
    shifted: Tensor,
    probs: Tensor,
    slope: Tensor | None,
    total: Tensor,
    entropy: Tensor,
    alive: Tensor,
    g: Tensor,
    h: Tensor | None,
    mark: tuple[Tensor, float] | None,
) -> None:
    """d(logits) in the place of logits; shifted [C, V] is s - peak, probs its exp, total [C] their
    sum. Consumes shifted and probs."""
    g = g.to(probs.dtype).unsqueeze(1)
    if h is None:
        probs.mul_(-g / total.unsqueeze(1))
    else:
        # shifted - log total is log p.
        h = h.to(probs.dtype).unsqueeze(1)
        shifted.sub_((total.log() - entropy).unsqueeze(1)).mul_(-h).sub_(g)
        probs.div_(total.unsqueeze(1)).mul_(shifted)
    label, here = _here(label, logits.shape[1])
    probs.scatter_add_(1, label, torch.where(here, g, 0))
    if slope is not None:
        probs.mul_(slope)
    probs.div_(head.temperature).masked_fill_(~alive.unsqueeze(1), 0)
    logits.copy_(probs)
    if mark is not None:
        live, eps = mark
        size = g.abs() if h is None else g.abs() + h.abs()
        live.masked_fill_((probs.abs_() > eps / head.temperature * size).any(0), 1)
