"""linear_hdpo_loss against everybody, and against its bare matrix products.

    python -m bench.bench_linear_hdpo                          the suite for this machine
    python -m bench.bench_linear_hdpo --head small --tokens 512 --providers "ours" "torch eager"

One measurement is forward and backward, with gradients for hidden and (unless frozen) weight.
Before a provider is timed its gradients are held against float64 on the first rows of the very
problem; one that is wrong is not timed. "x floor": the time over that of the bare products over the
active rows. TFLOP/s counts the floor's operations, whatever a provider does beyond them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import harness, providers, shapes
from bench.providers import Problem, Provider
from bench.shapes import Case
from metis_kernels import linear_logprobs

GATE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest relative difference (2-norm) of a gradient from float64's at which a provider is timed.
Plain torch in the same dtype is no better than this itself; the tests judge closer."""
GATE_TOKENS = 256


def problem(case: Case) -> Problem:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, vocab = shapes.HEADS[case.head]
    dtype = getattr(torch, case.dtype)
    return Problem.make(
        case.tokens, hidden, vocab, dtype, device, case.active, frozen=case.frozen, peak=case.peak
    )


def step(provider: Provider, given: Problem) -> Callable[[], None]:
    return lambda: torch.autograd.grad(provider.run(given), given.leaves)


def gradient_error(provider: Provider, given: Problem) -> float:
    """Largest relative error of its gradients over the first rows."""
    small = given.head(GATE_TOKENS)
    mine = torch.autograd.grad(provider.run(small), small.leaves)
    exact = torch.autograd.grad(providers.reference(small, provider.objective), small.leaves)
    pairs = ((a.double(), b.double()) for a, b in zip(mine, exact, strict=True))
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def run_case(case: Case, rounds: int) -> list[dict[str, Any]]:
    given = problem(case)
    records: list[dict[str, Any]] = []
    steps: dict[str, Callable[[], None]] = {"products": lambda: providers.products(given)}
    for name in case.providers or providers.names():
        provider, why = providers.build(name)
        record: dict[str, Any] = {"provider": name}
        records.append(record)
        if provider is None:
            record["skipped"] = why
            continue
        record["objective"] = provider.objective
        try:
            record["gradient_error"] = gradient_error(provider, given)
            if not record["gradient_error"] <= GATE[case.dtype]:
                record["skipped"] = f"gradients are {record['gradient_error']:.1e} off float64's"
                continue
            step(provider, given)()
        except Exception as error:
            if name.startswith("ours"):
                raise
            # A peer may not run on this GPU or with this version: that is a result, too.
            record["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        steps[name] = step(provider, given)
    times = harness.measure(steps, rounds)
    hidden, vocab = shapes.HEADS[case.head]
    flops = (4 if case.frozen else 6) * int(given.active.sum()) * hidden * vocab
    records.insert(0, {"provider": "products", "objective": "floor"})
    for record in records:
        if record["provider"] in times:
            record |= times[record["provider"]]
            record["of_floor"] = record["median_ms"] / times["products"]["median_ms"]
            record["tflops"] = flops / record["median_ms"] / 1e9
            record["peak_bytes"] = peak(case, record["provider"], steps[record["provider"]])
    shape = {"head": case.head, "tokens": case.tokens, "active": case.active}
    shape |= {"frozen": case.frozen, "dtype": case.dtype, "entropy": entropy(given)}
    return [shape | record for record in records]


@torch.no_grad()
def entropy(given: Problem) -> float:
    """Mean over the first tokens, in nats."""
    small = given.head(GATE_TOKENS)
    return float(linear_logprobs(small.hidden, small.weight, small.label)[1].mean())


def peak(case: Case, name: str, run: Callable[[], None]) -> int:
    if torch.cuda.is_available():
        return harness.peak_bytes(run)
    flags = ["--head", case.head, "--tokens", str(case.tokens), "--active", str(case.active)]
    flags += ["--dtype", case.dtype, "--peak", str(case.peak), *["--frozen"] * case.frozen]
    return harness.peak_in_subprocess("bench.bench_linear_hdpo", name, flags)


def show(records: list[dict[str, Any]]) -> None:
    first = records[0]
    print(
        f"{first['head']}  {first['tokens']} tokens, {first['active']:.0%} active"
        f"{', head frozen' * first['frozen']}  {first['dtype']}, entropy {first['entropy']:.2f}  "
        f"on {harness.device_name()}"
    )
    for r in records:
        if "median_ms" not in r:
            print(f"  {r['provider']:30} not timed: {r['skipped']}")
            continue
        error = f"{r['gradient_error']:.1e}" if "gradient_error" in r else "-"
        print(
            f"  {r['provider']:30} {r['median_ms']:8.2f} ms ({r['p20_ms']:.2f} to "
            f"{r['p80_ms']:.2f})  {r['of_floor']:5.2f} x floor  {r['tflops']:6.2f} TFLOP/s  "
            f"peak +{r['peak_bytes'] / 2**20:,.0f} MiB  error {error}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", choices=shapes.HEADS, help="one case instead of the suite")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--active", type=float, default=1.0)
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--dtype", choices=GATE, default="bfloat16")
    parser.add_argument("--peak", type=float, default=12.0, help="see bench.providers.Problem.make")
    parser.add_argument("--providers", nargs="+", choices=providers.names())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file to write the results into")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    suite = shapes.GPU if torch.cuda.is_available() else shapes.CPU
    if args.head:
        chosen = args.providers and tuple(args.providers)
        suite = (
            Case(args.head, args.tokens, args.active, args.frozen, args.dtype, args.peak, chosen),
        )
    if args.probe:
        given = problem(suite[0])
        if args.probe == "products":
            print(harness.peak_bytes(lambda: providers.products(given)))
        else:
            print(harness.peak_bytes(step(providers.build(args.probe)[0], given)))
        return
    records = []
    for case in suite:
        measured = run_case(case, args.rounds)
        show(measured)
        records += measured
    if args.out:
        harness.write(args.out, "linear_hdpo", records)


if __name__ == "__main__":
    main()
