"""The nouns of an LM head over rows of hidden states, and the contract of a row pass.

An implementation of the linear operators is one `RowPass`: what happens to a chunk of logits
[C, V] between the product that makes it and the products that use its gradient. _torch.py has the
plain one, _triton.py the one for GPUs; _sweep.py is the loop around them.

Legend: S tokens, T rows of hidden, H hidden, V vocabulary (of this rank), C rows of a chunk; "work"
is the dtype of sums: float64 for float64 inputs, else float32. A leaf: it imports torch and hdpo's
helpers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metis_kernels.hdpo import HDPOConfig, HDPOTargets, check_range, hdpo_coefficient

FLOOR = -1e4
"""exp of it is 0 in fp32 and fp64, and 0 * FLOOR is 0 where 0 * -inf would be NaN."""


@dataclass(frozen=True)
class Head:
    """What turns a row of hidden into the logits of a softmax: softcap, then temperature."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    temperature: float = 1.0
    softcap: float | None = None
    logits_dtype: torch.dtype | None = None
    """None: that of weight. A wider one than hidden's computes the products in it too."""

    @property
    def work_dtype(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, self.logits_dtype or self.weight.dtype)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of the gradients that a sweep returns. Rounded by it on a CPU, where most of them are
        then done (an upstream gradient of 1 is seen to be 1); on a GPU, which nobody is to wait
        for, the product with the upstream gradient rounds them."""
        return self.work_dtype if self.weight.is_cuda else self.weight.dtype

    def scaled(self, logits: Tensor) -> Tensor:
        """What the softmax sees of raw logits."""
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature


@dataclass(frozen=True)
class Shard:
    """This rank's share of a head that is cut over the vocabulary, in the order of the ranks and
    into equal parts; the hidden states and targets are the same on all of them."""

    group: torch.distributed.ProcessGroup
    first: int
    """The label of this rank's first row of weight."""

    @classmethod
    def named(cls, name: str | None, vocab: int) -> Shard | None:
        """By the name of a process group: an operator takes no object."""
        if name is None:
            return None
        group = torch.distributed.distributed_c10d._resolve_process_group(name)
        return cls(group, torch.distributed.get_rank(group) * vocab)

    def sum(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self.group)
        return values


class Wants(NamedTuple):
    """Which gradients somebody waits for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @classmethod
    def of(cls, hidden: Tensor, head: Head) -> Wants:
        """None at all under no_grad, whatever the inputs say."""
        if not torch.is_grad_enabled():
            return cls()
        bias = head.bias is not None and head.bias.requires_grad
        return cls(hidden.requires_grad, head.weight.requires_grad, bias)


class Coefficient(Protocol):
    """Gradients of a loss with respect to logprob and entropy, for any of its S rows."""

    def rows(self, start: int, stop: int) -> Coefficient: ...

    def take(self, index: Tensor) -> Coefficient: ...

    def __call__(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class Given:
    """A `Coefficient` that is known beforehand: an upstream gradient."""

    logprob_grad: Tensor
    """[S]"""
    entropy_grad: Tensor | None = None
    """[S] or None"""

    def rows(self, start: int, stop: int) -> Given:
        h = self.entropy_grad
        return Given(self.logprob_grad[start:stop], None if h is None else h[start:stop])

    def take(self, index: Tensor) -> Given:
        h = self.entropy_grad
        return Given(self.logprob_grad[index], None if h is None else h[index])

    def __call__(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.logprob_grad, self.entropy_grad


@dataclass(frozen=True)
class HDPOCoefficient:
    """The `Coefficient` of the HDPO loss: dL/dlogprob and dL/dentropy of any slice of its tokens.

    A row pass may call it, or read its fields and do the same arithmetic itself.
    """

    targets: HDPOTargets
    config: HDPOConfig

    def rows(self, start: int, stop: int) -> HDPOCoefficient:
        index = torch.arange(start, stop, device=self.targets.acc_advantage.device)
        return self.take(index)

    def take(self, index: Tensor) -> HDPOCoefficient:
        return replace(self, targets=self.targets.take(index))

    def __call__(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        return hdpo_coefficient(logprob, self.targets, self.config, entropy)


def check_head(
    hidden: Tensor,
    head: Head,
    label: Tensor,
    row: Tensor | None,
    ignored: int | None = None,
    parts: int = 1,
) -> None:
    """Raises ValueError unless hidden [T, H], weight [V, H], bias [V], label [S], row [S] agree. A
    label of `ignored` is in range; weight is one of `parts` of the vocabulary."""
    weight = head.weight
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [T, H] and weight [V, H] of one H, "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"expected a vocabulary of at least 1, got weight {list(weight.shape)}")
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(
            f"expected hidden and weight in one floating dtype, got {hidden.dtype} and "
            f"{weight.dtype}"
        )
    if head.bias is not None:
        if head.bias.shape != weight.shape[:1]:
            raise ValueError(
                f"expected bias [{weight.shape[0]}] as weight {list(weight.shape)} has it, "
                f"got {list(head.bias.shape)}"
            )
        if head.bias.dtype != weight.dtype:
            raise ValueError(f"expected bias in {weight.dtype}, got {head.bias.dtype}")
    if not 0 < head.temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number > 0, got {head.temperature}")
    if head.softcap is not None and not 0 < head.softcap < float("inf"):
        raise ValueError(f"softcap must be a finite number > 0 or None, got {head.softcap}")
    if head.logits_dtype not in (None, torch.float32, weight.dtype):
        raise ValueError(f"logits_dtype must be None or torch.float32, got {head.logits_dtype}")
    if label.dim() != 1:
        raise ValueError(f"expected label [S], got {list(label.shape)}")
    if row is not None and row.shape != label.shape:
        raise ValueError(f"expected row {list(label.shape)} as label is, got {list(row.shape)}")
    if row is None and label.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"without row, label s belongs to row s: expected label [{hidden.shape[0]}] as hidden "
            f"{list(hidden.shape)} has it, got {list(label.shape)}"
        )
    named = {"weight": weight, "bias": head.bias, "label": label, "row": row}
    for name, value in named.items():
        if value is not None and value.device != hidden.device:
            raise ValueError(f"expected {name} on {hidden.device} as hidden is, got {value.device}")
    for name, value in (("label", label), ("row", row)):
        if value is not None and (value.dtype == torch.bool or value.is_floating_point()):
            raise ValueError(f"expected {name} in an integer dtype, got {value.dtype}")
    if ignored is not None and label.device.type == "cpu":
        label = torch.where(label == ignored, 0, label)
    check_range("label", label, parts * weight.shape[0], "entries of the vocabulary")
    check_range("row", row, hidden.shape[0], "rows of hidden")


def flatten_batch(hidden: Tensor, label: Tensor, row: Tensor | None) -> tuple[Tensor, Tensor]:
    """hidden [B, T, H] as [B T, H]; a label [B, T] without row as [B T]. 2-D hidden as it is."""
    if hidden.dim() == 3:
        if row is None and label.shape == hidden.shape[:2]:
            label = label.reshape(-1)
        hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden, label


@dataclass(frozen=True)
class RowPass:
    """An implementation of the row pass over a chunk of logits [C, V].

    run(logits, target, label, head, coefficient, mark) -> (logprob, entropy)

        logits [C, V]     the raw products in head.dtype; holds d(logits) afterwards
        target [C]        the label's raw logit, an fp32 dot product; the one in logits is ignored
        label [C]         int64
        coefficient       None (no gradient is wanted), or f(logprob [C], entropy [C]) -> (g, h):
                          the loss's gradients with respect to both, h None where it is all zero
        mark              None, or (live [V], eps): sets live to 1 in every column where some row
                          has |d logit| > eps (|g| + |h|) / temperature; an integer of the width
                          of logits
        logprob, entropy  [C] in work dtype

    A row whose target is not finite has a logprob of NaN, and a row whose logprob is not finite
    leaves zeros in its row of d(logits).

    statistics and gradient are its two halves, for a head that is cut over the vocabulary. With s
    the scaled logits, a label outside [0, V) is another rank's:

    statistics(logits, target, label, head) -> (peak, total, moment)
                          [C] each: max s, sum e, sum e (s - peak), with e = exp(s - peak)
    gradient(logits, target, label, head, peak, log_total, entropy, alive, g, h, mark)
                          writes d(logits), zeros in a row that is not alive
    """

    run: Callable[..., tuple[Tensor, Tensor]]
    statistics: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[..., None]
    copies: int
    """Copies of a chunk in work dtype that it makes beside the logits."""


def row_sum(x: Tensor) -> Tensor:
    """x.sum(1), in the order of summation that it has among other rows even where it is alone.

    (torch splits a sum of a single output across threads, and no other.)
    """
    return x.sum(1) if len(x) != 1 else x.expand(2, -1).sum(1)[:1]
