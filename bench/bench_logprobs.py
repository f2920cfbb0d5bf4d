"""logprobs from logits: the time against that of moving the bytes that have to be moved.

    python -m bench.bench_logprobs --tokens 8192 --vocab 151936 --dtype bfloat16

forward reads the logits once; backward reads them once more and writes their gradient. "of copy":
the bandwidth that this makes, over that of a copy of the logits in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from bench import harness
from metis_kernels import _impl, logprobs

GATE = 1e-3
"""Largest absolute difference of a logprob from float64's at which an implementation is timed."""


def eager(logits: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp = torch.log_softmax(logits, -1, dtype=torch.float32)
    chosen = logp.gather(1, label.unsqueeze(1)).squeeze(1)
    return chosen, torch.special.entr(logp.exp()).sum(-1)


def implementations(device: str, dtype: torch.dtype) -> dict[str, Callable]:
    chosen: dict[str, Callable] = {"torch eager": eager}
    for impl in _impl.IMPLEMENTATIONS:
        if _impl.unavailable_reason("logprobs", impl, device, dtype) is None:
            chosen[f"ours {impl}"] = lambda z, y, impl=impl: logprobs(z, y, impl=impl)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 256)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file to write the results into")
    args = parser.parse_args()
    device, dtype = "cuda" if on_gpu else "cpu", getattr(torch, args.dtype)
    gen = torch.Generator(device).manual_seed(0)
    logits = torch.randn(args.tokens, args.vocab, generator=gen, device=device)
    label = torch.randint(0, args.vocab, (args.tokens,), generator=gen, device=device)
    logits[torch.arange(args.tokens, device=device), label] += 12
    logits = logits.to(dtype).requires_grad_()
    upstream = torch.randn(args.tokens, generator=gen, device=device)

    exact, _ = eager(logits.detach()[:64].double(), label[:64])
    variants = {"copy": lambda: logits.detach().clone()}
    for name, run in implementations(device, dtype).items():
        error = float((run(logits.detach()[:64], label[:64])[0] - exact).abs().max())
        if not error <= GATE:
            raise SystemExit(f"{name}: logprobs differ from float64's by {error:.1e}: not timed")
        variants[f"{name}, forward"] = lambda run=run: run(logits.detach(), label)
        variants[f"{name}, both"] = lambda run=run: torch.autograd.grad(
            run(logits, label), logits, (upstream, upstream)
        )
    times = harness.measure(variants, args.rounds)
    size = logits.numel() * logits.element_size()
    rate = {"copy": 2, "forward": 1, "both": 3}
    copied = 2 * size / times["copy"]["median_ms"]
    records = []
    for name, t in times.items():
        moved = size * rate[name.rpartition(", ")[2]] / t["median_ms"]
        records.append({
            "variant": name, "tokens": args.tokens, "vocab": args.vocab, "dtype": args.dtype,
            "gigabytes_per_second": moved / 1e6, "of_copy": moved / copied, **t,
        })  # fmt: skip
        print(
            f"  {name:24} {t['median_ms']:9.3f} ms ({t['p20_ms']:.3f} to {t['p80_ms']:.3f})  "
            f"{moved / 1e6:8.1f} GB/s  {moved / copied:5.2f} of copy"
        )
    if args.out:
        harness.write(args.out, "logprobs", records)


if __name__ == "__main__":
    main()
