"""hdpo_advantages: microseconds for the rollouts of a step.

python -m bench.bench_advantages --rollouts 2048 --group-size 16
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from bench import harness
from metis_kernels import _impl, hdpo_advantages, tool_reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, nargs="+", default=[128, 2048, 16_384])
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON file to write the results into")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    records = []
    for count in args.rollouts:
        gen = torch.Generator(device).manual_seed(0)
        correct = torch.rand(count, generator=gen, device=device) < 0.7
        calls = torch.randint(0, 4, (count,), generator=gen, device=device)
        group = torch.arange(count, device=device) // args.group_size
        group = group[torch.randperm(count, generator=gen, device=device)]
        given = (0.9 * correct + 0.1, tool_reward(calls, correct), correct, group)
        exact = hdpo_advantages(*given, impl="torch")
        variants: dict[str, Callable[[], None]] = {}
        for impl in _impl.IMPLEMENTATIONS:
            if _impl.unavailable_reason("hdpo_advantages", impl, device) is None:
                mine = hdpo_advantages(*given, impl=impl)
                if not (
                    torch.allclose(mine.tool, exact.tool) and torch.allclose(mine.acc, exact.acc)
                ):
                    raise SystemExit(f"{impl}: advantages differ from torch's: not timed")
                variants[impl] = lambda impl=impl, given=given: hdpo_advantages(*given, impl=impl)
        for name, t in harness.measure(variants, args.rounds).items():
            records.append({"impl": name, "rollouts": count, "group_size": args.group_size, **t})
            print(f"  {count:6} rollouts  {name:7} {1e3 * t['median_ms']:9.1f} us")
    if args.out:
        harness.write(args.out, "advantages", records)


if __name__ == "__main__":
    main()
