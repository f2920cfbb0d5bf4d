"""The C++ core against torch on this CPU: the row pass, the whole loss, a step of the demo.

    python -m bench.bench_cpu              rows and loss, printed
    python -m bench.bench_cpu --only step --model runs/demo/sft
    python -m bench.bench_cpu --out FILE   and written; the README quotes those of bench/results/

The row pass goes from a chunk of raw logits to logprob, entropy and d(logits). "of copy": the time
in which torch copies the chunk, in the same run, over this one. Both have to read it once and to
write it once. Rivals: autograd through log_softmax and gather; the same by hand in place, without
entropy, which is the least that eager torch can do; our own row pass in torch.

The loss is `bench.bench_linear_hdpo`'s cases `shapes.CPU_CORE`. The step is the demo's RL, whose
loss is computed in C++ at every other step and in torch at those between.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import metis_kernels as mk
from bench import bench_linear_hdpo, harness, shapes
from metis_kernels import _cpp, _torch
from metis_kernels._rows import Given, Head

ROWS = ((512, 32_000), (128, 151_936))
"""(C, V) of the chunks."""
GATE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest difference from float64's d(logits), whose largest is about 1, at which it is timed."""


def autograd(logits: Tensor, label: Tensor, g: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    logp = torch.log_softmax(leaf, -1, dtype=torch.float32)
    chosen = logp.gather(1, label.unsqueeze(1)).squeeze(1)
    return torch.autograd.grad(chosen, leaf, g)[0]


def in_place(logits: Tensor, label: Tensor, g: Tensor) -> Tensor:
    z = logits.float()  # itself where it is fp32; in bf16 a softmax would be a hundredth off
    z.sub_(torch.logsumexp(z, 1, keepdim=True)).exp_().mul_(-g.unsqueeze(1))
    z.scatter_add_(1, label.unsqueeze(1), g.unsqueeze(1))
    return logits.copy_(z)


def variants(logits: Tensor, label: Tensor, g: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each takes logits, which it may destroy, and returns d(logits)."""
    target = logits.gather(1, label.unsqueeze(1)).squeeze(1).float()
    head, given = Head(logits), Given(g)

    def ours(run: Callable, isa: str = "") -> Callable[[Tensor], Tensor]:
        def call(z: Tensor) -> Tensor:
            with mock.patch.object(_cpp, "ISA", isa):
                run(z, target, label, head, given)
            return z

        return call

    found = {"torch autograd": lambda z: autograd(z, label, g)}
    found["torch in place"] = lambda z: in_place(z, label, g)
    found["ours torch"] = ours(_torch.run)
    for index, isa in enumerate(_cpp.instruction_sets()):
        found["ours cpp" if index == 0 else f"ours cpp {isa}"] = ours(_cpp.run, isa)
    return found


def rows(rounds: int) -> list[dict]:
    records = []
    for (count, vocab), dtype in ((r, d) for r in ROWS for d in GATE):
        gen = torch.Generator().manual_seed(0)
        logits = torch.randn(count, vocab, generator=gen)
        label = torch.randint(0, vocab, (count,), generator=gen)
        logits[torch.arange(count), label] += 12
        logits, g = logits.to(dtype), torch.randn(count, generator=gen)
        exact = autograd(logits[:16].double(), label[:16], g[:16].double())
        scratch, other = logits.clone(), logits.clone()
        steps: dict[str, Callable] = {"copy": lambda a=other, b=logits: a.copy_(b)}
        for name, run in variants(logits, label, g).items():
            small = variants(logits[:16], label[:16], g[:16])[name](logits[:16].clone())
            error = float((small.double() - exact).abs().max())
            if not error <= GATE[dtype]:
                raise SystemExit(f"{name}: d(logits) are {error:.1e} off float64's: not timed")
            steps[name] = lambda run=run, z=scratch: run(z)
        times = harness.measure(steps, rounds, lambda a=scratch, b=logits: a.copy_(b))
        for name, t in times.items():
            records.append({
                "variant": name, "rows": count, "vocab": vocab,
                "dtype": str(dtype).removeprefix("torch."),
                "of_copy": times["copy"]["median_ms"] / t["median_ms"],
                "of_ours": t["median_ms"] / times["ours cpp"]["median_ms"], **t,
            })  # fmt: skip
            show(records[-1])
    return records


def demo_step(model: Path, steps: int) -> list[dict]:
    """Milliseconds of a step of RL and of the loss in it (with the head's gradients), by impl."""
    import trainer.rl
    from trainer import cli

    taken, names, exact = [], ("cpp", "torch"), mk.linear_hdpo_loss
    end_of_step = trainer.rl.optimizer_step

    def loss(*given, **options):
        start = time.perf_counter()
        out = exact(*given, impl=names[len(taken) % 2], **options)
        seconds[0] += time.perf_counter() - start
        return out

    def ended(*given):
        taken.append(seconds[0])
        seconds[0] = 0.0
        return end_of_step(*given)

    seconds = [0.0]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(mk, "linear_hdpo_loss", loss),
        mock.patch.object(trainer.rl, "optimizer_step", ended),
    ):
        settings = [f"model.path={model.resolve()}", f"rl.steps={steps}"]
        status = cli.main(["rl", "--runs", folder, "--name", "step", *settings])
        if status:
            raise SystemExit(f"metis rl ended with {status}")
        lines = Path(folder, "step", "metrics.jsonl").read_text().splitlines()
    metrics = [m for m in map(json.loads, lines) if m["stage"] == "rl"]
    records = []
    for index, name in enumerate(names):
        whole = [m["rollout_seconds"] + m["update_seconds"] for m in metrics]
        ours, step = taken[index::2][1:], whole[index::2][1:]  # the first of each warms up
        records.append({
            "impl": name, "steps": len(step), "loss_ms": 1e3 * statistics.median(ours),
            "step_ms": 1e3 * statistics.median(step), "share": sum(ours) / sum(step),
        })  # fmt: skip
        r = records[-1]
        print(f"  {name:6} {r['loss_ms']:7.1f} ms of {r['step_ms']:7.1f} ms: {r['share']:.1%}")
    return records


def show(r: dict) -> None:
    print(
        f"  {r['rows']:4} x {r['vocab']:7,} {r['dtype']:9} {r['variant']:20} "
        f"{r['median_ms']:8.2f} ms ({r['p20_ms']:.2f} to {r['p80_ms']:.2f})  "
        f"{r['of_copy']:5.2f} of copy  {r['of_ours']:5.2f} x ours",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="of the row pass; the loss: a third")
    parser.add_argument("--only", choices=("rows", "loss", "step"))
    parser.add_argument("--model", type=Path, default=Path("runs/demo/sft"), help="of the step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, help="JSON file to write the results into")
    args = parser.parse_args()
    reason = _cpp.unavailable(torch.device("cpu"))
    if reason is not None:
        raise SystemExit(f"bench_cpu measures the C++ core, and {reason}")
    print(f"{harness.device_name()}, {torch.get_num_threads()} threads, {_cpp.instruction_sets()}")
    if args.only in (None, "rows"):
        measured = rows(args.rounds)
        if args.out:
            harness.write(args.out, "cpu_rows", measured)
    if args.only in (None, "loss"):
        measured = []
        for case in shapes.CPU_CORE:
            measured += bench_linear_hdpo.run_case(case, max(args.rounds // 3, 2))
            bench_linear_hdpo.show(measured[-len(case.providers) - 1 :])
        if args.out:
            harness.write(args.out, "linear_hdpo", measured)
    if args.only == "step":
        measured = demo_step(args.model, args.steps)
        if args.out:
            harness.write(args.out, "demo_step", measured)


if __name__ == "__main__":
    main()
