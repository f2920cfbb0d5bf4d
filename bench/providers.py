"""Everybody who computes something from hidden states and an LM head: ours, torch, and the peers.

A provider is a function of a `Problem` that returns a differentiable loss. It imports its library
when it is built, and a library that is not there (or not for this machine) is a reason, never an
error: `build` gives both. Peers are timed on the work of theirs that is nearest to ours, named by
`objective`:

    hdpo    both advantages, each with its own surrogate
    grpo    the accuracy advantage alone (one value a sequence), on-policy
    ce      cross-entropy of the labels, no advantages: less work than a loss of RL
    floor   no loss at all, the bare matrix products over the active rows

Legend: N tokens in sequences of L, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from metis_kernels import HDPOConfig, HDPOTargets, linear_cross_entropy, linear_hdpo_loss
from metis_kernels.linear_hdpo import linear_hdpo_ref

CONFIG = HDPOConfig()
IGNORED = -100


@dataclass(frozen=True)
class Problem:
    """One step's worth of an LM head, with logits as peaked as a trained model's."""

    hidden: Tensor
    """[N, H], a leaf."""
    weight: Tensor
    """[V, H], a leaf."""
    label: Tensor
    """[N]"""
    acc: Tensor
    """[N] constant over a sequence; 0 for the inactive ones."""
    tool: Tensor
    """[N] likewise."""
    length: int
    """L"""

    @classmethod
    def make(
        cls, tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: str,
        active: float = 1.0, length: int = 256, frozen: bool = False, peak: float = 12.0,
    ) -> Problem:  # fmt: skip
        """peak: by how much the likeliest logit of a row stands out of noise of about 1. At
        V = 151,936 the mean entropy is 7.6 nats at 12, 2.4 at 14, 1.1 at 15, 0.4 at 16 and 0.1 at
        17.5. A language model's logits are other: from 1 nat on three times as many columns are
        live there, and a filter of columns loses 10 to 200 times less (LOG.md). Judge one on
        `bench.samples`."""
        length = min(length, tokens)
        gen = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=gen, device=device)

        weight = normal(vocab, hidden)
        label = torch.randint(0, vocab, (tokens,), generator=gen, device=device)
        states = normal(tokens, hidden) / hidden**0.5
        direction = weight[label]
        states += peak * direction / direction.square().sum(1, keepdim=True)
        sequences = tokens // length
        carries = torch.arange(sequences, device=device) < round(active * sequences)
        acc, tool = (normal(sequences) * carries for _ in range(2))
        return cls(
            states.to(dtype).requires_grad_(),
            weight.to(dtype).requires_grad_(not frozen),
            label,
            acc.repeat_interleave(length),
            tool.repeat_interleave(length),
            length,
        )

    @property
    def active(self) -> Tensor:
        """[N] bool"""
        return (self.acc != 0) | (self.tool != 0)

    @property
    def ignoring_label(self) -> Tensor:
        """[N] label, with IGNORED where there is no loss."""
        return torch.where(self.active, self.label, IGNORED)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(x for x in (self.hidden, self.weight) if x.requires_grad)

    def targets(self, tool: bool = True) -> HDPOTargets:
        """n counts all tokens, so that the gradient of a row does not depend on the others."""
        n = self.label.numel()
        other = self.tool if tool else torch.zeros_like(self.tool)
        return HDPOTargets(None, self.label, None, self.acc, other, n, n)

    def head(self, tokens: int) -> Problem:
        """The first tokens alone, as new leaves."""
        hidden = self.hidden.detach()[:tokens].requires_grad_()
        cut = {name: getattr(self, name)[:tokens] for name in ("label", "acc", "tool")}
        return replace(self, hidden=hidden, length=min(self.length, tokens), **cut)


@dataclass(frozen=True)
class Provider:
    name: str
    objective: str
    run: Callable[[Problem], Tensor]


Build = Callable[[], Callable[[Problem], Tensor]]
_BUILDERS: dict[str, tuple[str, Build]] = {}


def provider(name: str, objective: str) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        _BUILDERS[name] = (objective, build)
        return build

    return add


def names() -> list[str]:
    return list(_BUILDERS)


def build(name: str) -> tuple[Provider | None, str]:
    """(the provider, "") or (None, why it is not here)."""
    objective, maker = _BUILDERS[name]
    try:
        return Provider(name, objective, maker()), ""
    except Exception as error:  # a library that does not fit the others may raise anything
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def reference(problem: Problem, objective: str) -> Tensor:
    """The objective in float64, dense: what every provider's gradient is held against."""
    if objective in ("hdpo", "grpo"):
        targets = problem.targets(tool=objective == "hdpo")
        return linear_hdpo_ref(problem.hidden, problem.weight, targets, CONFIG)[0]
    logits = problem.hidden.double() @ problem.weight.double().t()
    return F.cross_entropy(logits, problem.ignoring_label, ignore_index=IGNORED)


# ---- ours ----------------------------------------------------------------------------------------


@provider("ours", "hdpo")
def _ours():
    def run(p: Problem) -> Tensor:
        return linear_hdpo_loss(p.hidden, p.weight, p.targets(), CONFIG)[0]

    return run


@provider("ours filtered", "hdpo")
def _ours_filtered():
    def run(p: Problem) -> Tensor:
        return linear_hdpo_loss(p.hidden, p.weight, p.targets(), CONFIG, grad_filter="auto")[0]

    return run


@provider("ours torch", "hdpo")
def _ours_torch():
    def run(p: Problem) -> Tensor:
        return linear_hdpo_loss(p.hidden, p.weight, p.targets(), CONFIG, impl="torch")[0]

    return run


@provider("ours ce", "ce")
def _ours_ce():
    return lambda p: linear_cross_entropy(p.hidden, p.weight, p.ignoring_label)


# ---- torch ---------------------------------------------------------------------------------------


def dense(p: Problem) -> Tensor:
    return linear_hdpo_ref(p.hidden, p.weight, p.targets(), CONFIG, dtype=p.hidden.dtype)[0]


@provider("torch eager", "hdpo")
def _eager():
    return dense


@provider("torch.compile", "hdpo")
def _compile():
    return torch.compile(dense)


@provider("torch F.linear_cross_entropy", "ce")
def _torch_linear_cross_entropy():
    function = F.linear_cross_entropy  # torch >= 2.13
    return lambda p: function(p.hidden, p.weight, p.ignoring_label, ignore_index=IGNORED)


# ---- peers ---------------------------------------------------------------------------------------


def on_policy(p: Problem, logprob: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
    """GRPO's loss for a peer that gives logprobs: of `rows`, which leave out nothing but zeros."""
    ratio = (logprob - logprob.detach()).exp()
    return -(ratio * p.acc[rows]).sum() / len(p.label)


@provider("Liger fused GRPO", "grpo")
def _liger_grpo():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # It cuts rows and columns itself. With the default of one sequence a chunk every sequence would
    # have a d(weight) of its own, in fp32 and as large as the head, to be added up in bf16.
    given = dict(beta=0.0, use_ref_model=False, loss_type="dapo", chunk_size=2**31)
    loss = LigerFusedLinearGRPOLoss(**given)

    def run(p: Problem) -> Tensor:
        shape = (-1, p.length)
        label = p.label.view(shape)
        hidden = p.hidden.view(*label.shape, -1)
        mask = torch.ones_like(label)
        return loss(hidden, p.weight, label, mask, p.acc.view(shape)[:, 0])[0]

    return run


@provider("Liger Triton GRPO on logits", "grpo")
def _liger_triton_grpo():
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def run(p: Problem) -> Tensor:
        label = p.label.view(-1, p.length)
        hidden = F.pad(p.hidden.view(*label.shape, -1), (0, 0, 0, 1))
        logits = hidden @ p.weight.t()
        acc = p.acc.view(label.shape)[:, 0].contiguous()
        given = dict(temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.2, reduce=True)
        mask = torch.ones_like(label)
        return triton_grpo_loss(logits, None, None, label, acc, mask, **given)[0]

    return run


@provider("Liger FLCE", "ce")
def _liger_flce():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)
    return lambda p: loss(p.weight, p.hidden, p.ignoring_label)


@provider("Liger FLCE CuTe", "ce")
def _liger_flce_cute():
    import cutlass.cute  # noqa: F401
    from liger_kernel.functional import fused_linear_cross_entropy as function

    # The same loop over chunks with another kernel in it. Without a name it would fall back.
    given = dict(ignore_index=IGNORED, impl="nvidia-cutedsl")
    return lambda p: function(p.hidden, p.weight, p.ignoring_label, **given)[0]


@provider("Liger FLSCE", "grpo")
def _liger_flsce():
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    return lambda p: on_policy(p, -Function.apply(p.hidden, p.weight, p.ignoring_label))


@provider("CCE", "ce")
def _cce():
    from cut_cross_entropy import linear_cross_entropy as cce

    return lambda p: cce(p.hidden, p.weight, p.ignoring_label)


@provider("TRL chunked log-prob", "grpo")
def _trl():
    from trl.kernels import ChunkedLogProbFunction as Function

    # Temperature, columns of a chunk, softcap, scale, outputs: as its GRPO trainer calls it.
    given = (1.0, 32_768, None, 1.0, ("entropy",))

    def run(p: Problem) -> Tensor:
        live = p.active
        out = Function.apply(p.hidden[live], p.weight, None, p.label[live], *given)
        return on_policy(p, out[0], live)

    return run


@provider("verl Triton", "grpo")
def _verl():
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy as function

    return lambda p: on_policy(p, function(p.hidden, p.weight, p.label, 1.0, "none")[0])


@provider("QuACK", "ce")
def _quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as function

    return lambda p: function(p.hidden, p.weight, p.ignoring_label, ignore_index=IGNORED)


# ---- the floor -----------------------------------------------------------------------------------


def products(p: Problem) -> None:
    """What any method that computes no logit twice has to multiply: three products, two where the
    head is frozen, over the active rows in one piece."""
    rows, weight = p.hidden.detach()[p.active], p.weight.detach()
    logits = rows @ weight.t()
    _ = logits @ weight
    if p.weight.requires_grad:
        _ = logits.t() @ rows
