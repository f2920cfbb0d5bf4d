"""The loop of _sweep.py as operators of torch, and the autograd functions around them.

A leaf: it imports torch and the leaves that the loop is made of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metis_kernels import _impl
from metis_kernels._filter import Filter
from metis_kernels._rows import Given, Head, Shard, Wants
from metis_kernels._sweep import Loop, sweep_selected


def group_of(process_group: torch.distributed.ProcessGroup | None) -> tuple[str | None, int]:
    """(name, how many ranks) of a group over which a head is cut: an operator takes no object."""
    if process_group is None:
        return None, 1
    return process_group.group_name, process_group.size()


def filter_of(grad_filter: float | str | None) -> tuple[float | None, bool]:
    """(eps, guarded) of a `Filter`, likewise."""
    chosen = Filter.of(grad_filter)
    return (None, False) if chosen is None else (chosen.eps, chosen.guarded)


def loop_of(
    operator: str,
    impl: str,
    hidden: Tensor,
    vocab: int,
    chunk_bytes: int | None,
    group: str | None,
    eps: float | None,
    guarded: bool,
) -> Loop:
    """From what an operator was given. Raises RuntimeError where impl cannot run here."""
    return Loop(
        _impl.implementation(operator, impl, hidden.device, hidden.dtype),
        chunk_bytes,
        Shard.named(group, vocab),
        None if eps is None else Filter(eps, guarded),
    )


def run_row_sweep(
    hidden, weight, bias, row, label, logprob_grad, entropy_grad, ignored, temperature, softcap,
    logits_dtype, wants, operator, impl, chunk_bytes, group, eps, guarded,
):  # fmt: skip
    """(logprob [S], entropy [S], d_hidden, d_weight, d_bias): a sweep with gradients [S] that are
    known beforehand, over the tokens whose label is not `ignored`; the others have zeros.
    `row_sweep` is it as one opaque operator, so that a compiled caller sees no chunks. A gradient
    that nobody wants is empty.
    """
    return sweep_selected(
        hidden,
        Head(weight, bias, temperature, softcap, logits_dtype),
        label,
        row,
        None if logprob_grad is None else Given(logprob_grad, entropy_grad),
        Wants(*wants),
        loop_of(operator, impl, hidden, len(weight), chunk_bytes, group, eps, guarded),
        select=None if ignored is None else (label != ignored).nonzero().flatten(),
        fill=0.0,
    )


row_sweep = torch.library.custom_op(
    "metis_kernels::row_sweep",
    run_row_sweep,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor? row, Tensor label, "
    "Tensor? logprob_grad, Tensor? entropy_grad, int? ignored, float temperature, float? softcap, "
    "ScalarType? logits_dtype, bool[] wants, str operator, str impl, int? chunk_bytes, "
    "str? group, float? eps, bool guarded) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def fake_sweep(
    hidden: Tensor, weight: Tensor, label: Tensor, wants: Sequence[bool]
) -> tuple[Tensor, ...]:
    """What a sweep's operator returns, by shape and dtype."""
    work, dtype = Head(weight).work_dtype, Head(weight).gradient_dtype
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    gradients = (
        hidden.new_empty(shape, dtype=dtype) if wanted else hidden.new_empty(0)
        for shape, wanted in zip(shapes, wants, strict=True)
    )
    return *(hidden.new_empty(label.shape, dtype=work) for _ in range(2)), *gradients


@row_sweep.register_fake
def _(hidden, weight, bias, row, label, *rest):
    return fake_sweep(hidden, weight, label, wants=rest[6])


class GradientInForward(torch.autograd.Function):
    """Hangs gradients that the forward has already computed onto a loss.

    Backward multiplies them with the upstream gradient and rounds them (on a CPU the forward has:
    `Head.gradient_dtype`), in one pass, or in none where it sees that the upstream gradient is 1.
    """

    @staticmethod
    def forward(ctx, loss, hidden, weight, bias, d_hidden, d_weight, d_bias):
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtype = hidden.dtype
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        scaled = (_rounded(g, ctx.dtype, upstream) for g in ctx.saved_tensors)
        return None, *scaled, None, None, None


class Recompute(torch.autograd.Function):
    """(logprob [S], entropy [S]) with logits in neither forward's nor backward's memory."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, row, label, options):
        ctx.save_for_backward(hidden, weight, bias, row, label)
        ctx.options = options
        ctx.set_materialize_grads(False)
        given = (hidden, weight, bias, row, label, None, None, None)
        logprob, entropy, *_ = row_sweep(*given, *options[:3], [False] * 3, *options[3:])
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logprob, d_entropy):
        if d_logprob is None and d_entropy is None:
            return (None,) * 6
        if d_logprob is None:
            d_logprob = torch.zeros_like(d_entropy)
        wants = list(ctx.needs_input_grad[:3])
        given = (*ctx.saved_tensors, d_logprob, d_entropy, None)
        _, _, *grads = row_sweep(*given, *ctx.options[:3], wants, *ctx.options[3:])
        dtype = ctx.saved_tensors[0].dtype
        grads = (g.to(dtype) if wanted else None for g, wanted in zip(grads, wants, strict=True))
        return *grads, None, None, None


def recompute(
    hidden: Tensor,
    head: Head,
    label: Tensor,
    row: Tensor | None,
    operator: str,
    impl: str,
    chunk_bytes: int | None,
    group: str | None,
    grad_filter: float | str | None,
) -> tuple[Tensor, Tensor]:
    """`Recompute` on checked inputs, with an implementation that is registered for operator."""
    options = (head.temperature, head.softcap, head.logits_dtype, operator, impl, chunk_bytes)
    options += (group, *filter_of(grad_filter))
    return Recompute.apply(hidden, head.weight, head.bias, row, label, options)


def _rounded(gradient: Tensor | None, dtype: torch.dtype, factor: Tensor) -> Tensor | None:
    """gradient times a 0-d factor, rounded to dtype as it is written."""
    if gradient is None:
        return None
    looks = not (factor.is_cuda or torch.compiler.is_compiling())  # it costs nothing
    if looks and gradient.dtype == dtype and factor == 1:
        return gradient  # autograd copies what it is to keep and others hold, too
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor.to(gradient.dtype), out=out)
