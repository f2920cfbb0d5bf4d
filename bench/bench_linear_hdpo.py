"""linear_hdpo_loss against dense torch autograd and against its bare matrix products.

    python -m bench.bench_linear_hdpo --rows 512 --hidden 256 --vocab 32000 --active 1.0 0.3

One measurement is forward and backward, with gradients for hidden and weight. "products" is the
three matrix products over the active rows alone, in one piece each: a floor, not a competitor.
"active" is the share of tokens with an advantage. "rows" in every line: tokens offered.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from bench import harness
from metis_kernels import HDPOConfig, HDPOTargets, linear_hdpo_loss
from metis_kernels.linear_hdpo import linear_hdpo_ref

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GATE = {"float32": 1e-5, "bfloat16": 5e-2}
"""Largest relative difference (2-norm) of the gradients at which a shape is timed. Plain torch in
the same dtype is no better than this itself; the tests judge against float64."""


def problem(args: argparse.Namespace, active: float):
    """(hidden, weight, targets): peaked logits, ratios near 1, as in a step of training."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(args.vocab, args.hidden, generator=gen)
    label = torch.randint(0, args.vocab, (args.rows,), generator=gen)
    hidden = torch.randn(args.rows, args.hidden, generator=gen) / args.hidden**0.5
    direction = weight[label]
    hidden += 12 * direction / direction.square().sum(1, keepdim=True)
    carries = torch.arange(args.rows) < round(active * args.rows)
    acc = torch.randn(args.rows, generator=gen) * carries
    tool = torch.randn(args.rows, generator=gen) * carries
    targets = HDPOTargets(None, label, None, acc, tool, args.rows, args.rows)
    leaves = [x.to(device, DTYPES[args.dtype]).requires_grad_() for x in (hidden, weight)]
    return *leaves, targets.to(device)


def variants(args: argparse.Namespace, active: float) -> dict[str, Callable[[], None]]:
    hidden, weight, targets = problem(args, active)
    config = HDPOConfig()
    index = targets.live_index(config)
    rows, plain_weight = hidden.detach()[index], weight.detach()

    def backward(loss: torch.Tensor) -> None:
        torch.autograd.grad(loss, (hidden, weight))

    def products() -> None:
        logits = rows @ plain_weight.t()
        _ = logits @ plain_weight
        _ = logits.t() @ rows

    return {
        "dense": lambda: backward(
            linear_hdpo_ref(hidden, weight, targets, config, dtype=hidden.dtype)[0]
        ),
        "torch": lambda: backward(
            linear_hdpo_loss(hidden, weight, targets, config, impl="torch")[0]
        ),
        "products": products,
    }


def check(args: argparse.Namespace, active: float) -> None:
    """Refuses to time what is wrong: gradients of both against each other, in this very shape."""
    hidden, weight, targets = problem(args, active)
    config = HDPOConfig()
    mine, _ = linear_hdpo_loss(hidden, weight, targets, config, impl="torch")
    dense, _ = linear_hdpo_ref(hidden, weight, targets, config, dtype=hidden.dtype)
    for a, b in zip(
        torch.autograd.grad(mine, (hidden, weight)),
        torch.autograd.grad(dense, (hidden, weight)),
        strict=True,
    ):
        gap = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)
        if not gap <= GATE[args.dtype]:
            limit = GATE[args.dtype]
            raise SystemExit(f"gradients differ by {float(gap):.1e} > {limit}: not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--active", type=float, nargs="+", default=[1.0, 0.3])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file to write the results into")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        print(harness.peak_bytes(variants(args, args.active[0])[args.probe]))
        return

    records = []
    shape = ["--rows", args.rows, "--hidden", args.hidden, "--vocab", args.vocab]
    shape = [str(x) for x in [*shape, "--dtype", args.dtype]]
    for active in args.active:
        check(args, active)
        times = harness.measure(variants(args, active), args.rounds)
        floor, dense = times["products"]["median_ms"], times["dense"]["median_ms"]
        print(
            f"rows {args.rows}  hidden {args.hidden}  vocab {args.vocab}  {args.dtype}  "
            f"active {active:.0%}  on {harness.device_name()}"
        )
        for name, t in times.items():
            peak = harness.peak_in_subprocess(
                "bench.bench_linear_hdpo", name, [*shape, "--active", str(active)]
            )
            print(
                f"  {name:9} {t['median_ms']:9.1f} ms ({t['p20_ms']:.1f} to {t['p80_ms']:.1f})"
                f"  {t['median_ms'] / dense:5.2f} x dense  {t['median_ms'] / floor:5.2f} x products"
                f"  peak +{peak / 2**20:.0f} MiB"
            )
            records.append({
                "rows": args.rows, "hidden": args.hidden, "vocab": args.vocab,
                "dtype": args.dtype, "active": active, "variant": name, "peak_bytes": peak, **t,
            })  # fmt: skip
    if args.out:
        harness.write(args.out, "linear_hdpo", records)


if __name__ == "__main__":
    main()
