"""shared_prefix_attention: forward and backward of a group of rollouts, against not sharing.

    python -m bench.bench_prefix_attention --prompt 1024 8192 --response 1024 --group-size 16

Everybody is credited with the work that has to be done, 4 Hq D multiplications and additions for
each pair of query and key that sees one another (`layout.pairs`), 2.5 times that for backward; what
somebody does beyond it makes them slower. "of flash": this rate, over that of the flash kernel
alone on one causal sequence with as many pairs, in the same run.

    ours IMPL   what shared_prefix_attention does
    unshared    each rollout with its own copy of the prompt: one causal call of variable length
    dense mask  torch's attention under a [T, T] mask
    flex        flex_attention, compiled, with a block mask (made off the clock); CUDA
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bench import harness
from metis_kernels import _impl
from metis_kernels._layout import PrefixLayout
from metis_kernels.prefix_attention import (
    OPERATOR,
    shared_prefix_attention,
    shared_prefix_attention_ref,
)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
GATE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""Largest absolute difference of outputs and gradients from float64's at which somebody is timed;
of gradients relative to the largest."""
PEERS = ("dense mask", "flex", "unshared")
"""Whose failure is a reason, and no end of the rest."""
BACKWARD = 2.5
"""Work of a backward over that of its forward: five products for two."""


def group(prompt: int, response: int, size: int) -> PrefixLayout:
    return PrefixLayout((prompt,), ((response,) * size,))


def inputs(
    layout: PrefixLayout, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, upstream), scores as peaked as a trained model's."""
    gen = torch.Generator(device).manual_seed(0)

    def normal(count: int) -> Tensor:
        shape = (layout.tokens, count, head_dim)
        return torch.randn(shape, generator=gen, device=device, dtype=torch.float32)

    q, k, v = 2 * normal(heads[0]), normal(heads[1]), normal(heads[1])
    leaves = (x.to(dtype).requires_grad_() for x in (q, k, v))
    return *leaves, normal(heads[0]).to(dtype)


def sees(layout: PrefixLayout, device: str) -> Callable[..., Tensor]:
    """Of one group, as flex_attention asks: (batch, head, query, key) -> bool."""
    (prompt,), (lengths,) = layout.prefixes, layout.responses
    segment = torch.repeat_interleave(torch.tensor([prompt, *lengths], device=device))

    def seen(batch, head, query, key):
        own = segment[query] == segment[key]
        return (own | (segment[key] == 0)) & (query >= key)

    return seen


def flex(layout: PrefixLayout, device: str) -> Attend:
    """Compiled and its mask made at the first call: in the warm-up."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    @cache
    def mask():
        given = (sees(layout, device), None, None, layout.tokens, layout.tokens)
        return torch.compile(create_block_mask)(*given, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(*heads, block_mask=mask(), enable_gqa=True)[0].transpose(0, 1)

    return attend


def attentions(layout: PrefixLayout, device: str, dtype: torch.dtype) -> dict[str, Attend]:
    """Who takes the packed rows."""
    chosen: dict[str, Attend] = {}
    for impl in _impl.names(OPERATOR):
        if _impl.unavailable_reason(OPERATOR, impl, device, dtype) is None:
            name = "dense mask" if impl == "dense" else f"ours {impl}"
            chosen[name] = lambda *x, impl=impl: shared_prefix_attention(*x, layout, impl=impl)
    if device == "cuda":
        chosen["flex"] = flex(layout, device)
    return chosen


def check(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str) -> set[str]:
    """Whose outputs and gradients on a small group are right. A peer's error is no end of ours."""
    layout = group(150, 45, 4)
    *leaves, upstream = inputs(layout, heads, head_dim, dtype, device)
    exact = results(lambda *x: shared_prefix_attention_ref(*x, layout), leaves, upstream)
    right = set()
    for name, attend in attentions(layout, device, dtype).items():
        try:
            got = results(attend, leaves, upstream)
        except Exception as error:  # a compiler may raise anything
            if not name.startswith(PEERS):
                raise
            print(f"{name}: not timed, {why(error)}")
            continue
        worst = max(
            float((a.double() - b).abs().max()) / max(float(b.abs().max()), 1.0)
            for a, b in zip(got, exact, strict=True)
        )
        if not worst <= GATE[dtype]:
            raise SystemExit(f"{name}: {worst:.1e} off float64's: not timed")
        right.add(name)
    return right


def why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def results(attend: Attend, leaves: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def variants(
    args: argparse.Namespace, prompt: int, device: str, dtype: torch.dtype, right: set[str]
) -> dict[str, tuple[Callable[[], object], int]]:
    """name -> (what is timed, the pairs that it is credited with)"""
    layout = group(prompt, args.response, args.group_size)
    chosen: dict[str, tuple[Callable[[], object], int]] = {}

    def add(name: str, attend: Attend, rows: PrefixLayout, pairs: int) -> None:
        *leaves, upstream = inputs(rows, tuple(args.heads), args.head_dim, dtype, device)
        plain = [x.detach() for x in leaves]
        try:
            attend(*plain)
        except Exception as error:  # of memory, say
            if not name.startswith(PEERS):
                raise
            print(f"  {name}: not timed, {why(error)}")
            return

        def both() -> object:
            return torch.autograd.grad(attend(*leaves), leaves, upstream)

        chosen[f"{name}, forward"] = (lambda: attend(*plain)), pairs
        chosen[f"{name}, both"] = both, pairs

    for name, attend in attentions(layout, device, dtype).items():
        if name not in right:
            continue
        if name == "dense mask" and layout.tokens > args.dense_tokens:
            print(f"  dense mask: not timed, {layout.tokens} rows > --dense-tokens")
            continue
        add(name, attend, layout, layout.pairs)
    apart = PrefixLayout((0,) * args.group_size, ((prompt + args.response,),) * args.group_size)
    add("unshared", lambda *x: shared_prefix_attention(*x, apart), apart, layout.pairs)
    whole = PrefixLayout((0,), ((math.isqrt(2 * layout.pairs),),))
    add("flash alone", lambda *x: shared_prefix_attention(*x, whole), whole, whole.pairs)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    prompts = [1024, 4096, 8192, 24_576] if on_gpu else [128, 512]
    parser.add_argument("--prompt", type=int, nargs="+", default=prompts)
    parser.add_argument("--response", type=int, default=1024 if on_gpu else 64)
    parser.add_argument("--group-size", type=int, default=16 if on_gpu else 8)
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8] if on_gpu else [8, 2])
    parser.add_argument("--head-dim", type=int, default=128 if on_gpu else 64)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--dense-tokens", type=int, default=24_576, help="rows of a mask at most")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file to write the results into")
    args = parser.parse_args()
    device, dtype = "cuda" if on_gpu else "cpu", getattr(torch, args.dtype)
    right = check(tuple(args.heads), args.head_dim, dtype, device)
    records = []
    for prompt in args.prompt:
        layout = group(prompt, args.response, args.group_size)
        print(
            f"prompt {prompt}, {args.group_size} responses of {args.response}: "
            f"{layout.tokens} rows for {layout.rollout_tokens}"
        )
        timed = variants(args, prompt, device, dtype, right)
        times = harness.measure({name: run for name, (run, _) in timed.items()}, args.rounds)
        rate = {}
        for name, t in times.items():
            work = timed[name][1] * 4 * args.heads[0] * args.head_dim
            rate[name] = work * (1 + BACKWARD * name.endswith("both")) / t["median_ms"] / 1e9
        for name, t in times.items():
            of_flash = rate[name] / rate[f"flash alone, {name.rpartition(', ')[2]}"]
            records.append({
                "variant": name, "prompt": prompt, "response": args.response,
                "group_size": args.group_size, "tokens": layout.tokens,
                "rollout_tokens": layout.rollout_tokens, "pairs": timed[name][1],
                "heads": args.heads, "head_dim": args.head_dim, "dtype": args.dtype,
                "tflops": rate[name], "of_flash": of_flash, **t,
            })  # fmt: skip
            print(
                f"  {name:22} {t['median_ms']:10.3f} ms ({t['p20_ms']:.3f} to {t['p80_ms']:.3f})  "
                f"{rate[name]:8.3f} TFLOP/s  {of_flash:5.2f} of flash"
            )
    if args.out:
        harness.write(args.out, "prefix_attention", records)


if __name__ == "__main__":
    main()
