"""linear_hdpo_loss against everybody, and against its bare matrix products.

    python -m bench.bench_linear_hdpo                          the suite for this machine
    python -m bench.bench_linear_hdpo --head small --tokens 512 --providers "ours" "torch eager"
    python -m bench.bench_linear_hdpo --samples FILE.pt        real logits, sharper and sharper

One measurement is forward and backward, with gradients for hidden and (unless frozen) weight.
Before a provider is timed its gradients are held against float64 on the first rows of the very
problem; one that is wrong is not timed. "x floor": the time over that of the bare products over the
active rows. TFLOP/s counts the floor's operations, whatever a provider does beyond them.

--samples takes hidden states and head of a language model (bench/samples.py writes the file), which
is what a filter of columns has to be judged on. With --temperature it is one case, for everybody.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench import harness, providers, samples, shapes
from bench.providers import Problem, Provider
from bench.samples import Samples
from bench.shapes import Case
from metis_kernels import linear_logprobs
from metis_kernels._filter import AUTO_EPS, LOST

GATE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest relative difference (2-norm) of a gradient from float64's at which a provider is timed.
Plain torch in the same dtype is no better than this itself; the tests judge closer."""
GATE_FILTERED = 2 * LOST
"""The same for what filters columns, where that is more: its guard allows LOST, judged on a few
rows."""
GATE_TOKENS = 256
GATE_SAMPLES = 2048
"""Likewise of samples: which columns are live, and what the others hold, is known of many rows
together."""
DENSE_BYTES = 8 << 30
"""What the float64 logits of those may take."""

load = cache(Samples.load)
"""A suite takes one file at many temperatures."""


def problem(case: Case) -> Problem:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, case.dtype)
    if case.samples is not None:
        return samples.problem(
            load(case.samples), case.temperature, case.tokens, dtype, device, case.active,
            frozen=case.frozen,
        )  # fmt: skip
    hidden, vocab = shapes.HEADS[case.head]
    return Problem.make(
        case.tokens, hidden, vocab, dtype, device, case.active, frozen=case.frozen, peak=case.peak
    )


def step(provider: Provider, given: Problem) -> Callable[[], None]:
    return lambda: torch.autograd.grad(provider.run(given), given.leaves)


def first_rows(case: Case, given: Problem) -> Problem:
    """Those on which gradients, entropy and live columns are looked at."""
    if case.samples is None:
        return given.head(GATE_TOKENS)
    rows = min(GATE_SAMPLES, DENSE_BYTES // (8 * len(given.weight)), given.label.numel())
    return given.head(max(rows // given.length, 1) * given.length)  # whole sequences


def gradient_error(provider: Provider, small: Problem) -> float:
    """Largest relative error of its gradients."""
    mine = torch.autograd.grad(provider.run(small), small.leaves)
    exact = torch.autograd.grad(providers.reference(small, provider.objective), small.leaves)
    pairs = ((a.double(), b.double()) for a, b in zip(mine, exact, strict=True))
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def gate(case: Case, name: str) -> float:
    """Largest gradient error at which a provider is timed."""
    return max(GATE[case.dtype], GATE_FILTERED if name == "ours filtered" else 0)


def run_case(case: Case, rounds: int) -> list[dict[str, Any]]:
    given = problem(case)
    small = first_rows(case, given)
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
            record["gradient_error"] = gradient_error(provider, small)
            if name == "ours filtered":
                record["live_share"] = live_share(small)
            if not record["gradient_error"] <= gate(case, name):
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
    flops = (4 if case.frozen else 6) * int(given.active.sum()) * given.weight.numel()
    records.insert(0, {"provider": "products", "objective": "floor"})
    for record in records:
        if record["provider"] in times:
            record |= times[record["provider"]]
            record["of_floor"] = record["median_ms"] / times["products"]["median_ms"]
            record["tflops"] = flops / record["median_ms"] / 1e9
            record["peak_bytes"] = peak(case, record["provider"], steps[record["provider"]])
    shape = described(case, given) | {"entropy": entropy(small)}
    return [shape | record for record in records]


def described(case: Case, given: Problem) -> dict[str, Any]:
    """The case, as a record has it."""
    head = case.head if case.samples is None else load(case.samples).source
    shape = {"head": head, "tokens": given.label.numel(), "active": case.active}
    shape |= {"frozen": case.frozen, "dtype": case.dtype}
    if case.samples is not None:
        shape |= {"samples": head, "temperature": case.temperature}
    return shape


@torch.no_grad()
def live_share(small: Problem) -> float:
    """Of the columns, what `grad_filter="auto"` may not drop where all these rows are one chunk.

    By its definition, and not by what the library did: chunks are smaller where memory is small,
    and a guarded filter that sees too much lost takes all columns.
    """
    active = small.active
    live = torch.zeros(len(small.weight), dtype=torch.bool, device=active.device)
    labels = small.label[active].split(samples.ROWS)
    for logp, label in zip(
        samples.log_softmax(small.hidden[active], small.weight), labels, strict=True
    ):
        # d(logits) over its row's coefficient is the label's one less the probabilities.
        d_logits = logp.exp()
        d_logits[torch.arange(len(label), device=label.device), label] -= 1
        live |= (d_logits.abs() > AUTO_EPS).any(0)
    return float(live.double().mean())


@torch.no_grad()
def entropy(small: Problem) -> float:
    """Mean, in nats."""
    return float(linear_logprobs(small.hidden, small.weight, small.label)[1].mean())


def peak(case: Case, name: str, run: Callable[[], None]) -> int:
    if torch.cuda.is_available():
        return harness.peak_bytes(run)
    flags = ["--tokens", str(case.tokens), "--active", str(case.active), "--dtype", case.dtype]
    flags += ["--frozen"] * case.frozen
    if case.samples is None:
        flags += ["--head", case.head, "--peak", str(case.peak)]
    else:
        # resolve: the probe runs in another folder.
        flags += ["--samples", str(case.samples.resolve()), "--temperature", str(case.temperature)]
    return harness.peak_in_subprocess("bench.bench_linear_hdpo", name, flags)


def show(records: list[dict[str, Any]]) -> None:
    first = records[0]
    temperature = f" at temperature {first['temperature']:g}" if "samples" in first else ""
    print(
        f"{first['head']}{temperature}  {first['tokens']} tokens, {first['active']:.0%} active"
        f"{', head frozen' * first['frozen']}  {first['dtype']}, entropy {first['entropy']:.2f}  "
        f"on {harness.device_name()}"
    )
    for r in records:
        if "median_ms" not in r:
            print(f"  {r['provider']:30} not timed: {r['skipped']}")
            continue
        error = f"{r['gradient_error']:.1e}" if "gradient_error" in r else "-"
        error += f"  {r['live_share']:.1%} of the columns live" if "live_share" in r else ""
        print(
            f"  {r['provider']:30} {r['median_ms']:8.2f} ms ({r['p20_ms']:.2f} to "
            f"{r['p80_ms']:.2f})  {r['of_floor']:5.2f} x floor  {r['tflops']:6.2f} TFLOP/s  "
            f"peak +{r['peak_bytes'] / 2**20:,.0f} MiB  error {error}",
            flush=True,
        )


def cases(args: argparse.Namespace) -> tuple[Case, ...]:
    """What is to be measured."""
    chosen = args.providers and tuple(args.providers)
    tokens, active = args.tokens, args.active
    if args.samples:
        case = Case("", tokens, active, args.frozen, args.dtype, samples=args.samples)
        if args.temperature is not None:
            return (replace(case, temperature=args.temperature, providers=chosen),)
        case = replace(case, providers=chosen or shapes.FILTERED)
        return tuple(replace(case, temperature=t) for t in shapes.TEMPERATURES)
    if args.head:
        return (Case(args.head, tokens, active, args.frozen, args.dtype, args.peak, chosen),)
    return shapes.GPU if torch.cuda.is_available() else shapes.CPU


def check(args: argparse.Namespace) -> None:
    """Raises OSError or ValueError for flags that do not go together, and a file of no use."""
    if args.temperature is not None and args.samples is None:
        raise ValueError("--temperature is that of samples: give --samples FILE.pt, too")
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        raise ValueError(f"--temperature must be a finite number > 0, got {args.temperature}")
    if args.samples is not None:
        load(args.samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--head", choices=shapes.HEADS, help="one case instead of the suite")
    which.add_argument(
        "--samples", type=Path, metavar="FILE.pt", help="real logits, written by bench.samples"
    )
    parser.add_argument(
        "--temperature", type=float, help="of the samples; default: " + str(shapes.TEMPERATURES)
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of samples: at most")
    parser.add_argument("--active", type=float, default=1.0)
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--dtype", choices=GATE, default="bfloat16")
    parser.add_argument("--peak", type=float, default=12.0, help="see bench.providers.Problem.make")
    parser.add_argument("--providers", nargs="+", choices=providers.names())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file to write the results into")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        check(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    suite = cases(args)
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
        harness.write(args.out, "filter" if args.samples else "linear_hdpo", records)


if __name__ == "__main__":
    main()
