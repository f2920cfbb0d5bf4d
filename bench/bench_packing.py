"""pack: milliseconds for the rollouts of a step, that the device may be waiting for.

python -m bench.bench_packing --rollouts 2048 --tokens 20000 --prefix 16000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from bench import harness
from metis_kernels import _impl
from metis_kernels.packing import ImageSpan, PackedBatch, Trajectory, pack

IMAGE = 1000
"""Placeholders of an image; a prompt is half images, half text."""


def rollouts(groups: int, size: int, tokens: int, prefix: int) -> list[list[Trajectory]]:
    """Groups whose prompts have M-RoPE positions, each rollout's in memory of its own. Behind the
    prompt the policy and its tools take turns of 500 tokens."""
    gen = torch.Generator().manual_seed(0)
    steps = torch.arange(tokens)
    policy = (steps >= prefix) & ((steps - prefix) // 500 % 2 == 0)
    policy[-1] = True
    starts = range(0, prefix - IMAGE + 1, 2 * IMAGE)
    positions = steps.repeat(3, 1)
    for start in starts:
        positions[1:, start : start + IMAGE] = start + torch.arange(IMAGE) // 32
    made = []
    for g in range(groups):
        prompt = torch.randint(0, 150_000, (prefix,), generator=gen)
        group = []
        for r in range(size):
            answer = torch.randint(0, 150_000, (tokens - prefix,), generator=gen)
            answer[0] = r  # so that the common prefix is the prompt exactly
            group.append(
                Trajectory(
                    torch.cat([prompt, answer]),
                    policy.clone(),
                    acc_advantage=(-1.0) ** r,
                    tool_advantage=0.5,
                    images=tuple(ImageSpan(s, s + IMAGE, key=g * prefix + s) for s in starts),
                    positions=positions.clone(),
                )
            )
        made.append(group)
    return made


def same(a: PackedBatch, b: PackedBatch) -> bool:
    """Whether two batches are equal in every field, to the bit."""
    pairs = ((x, getattr(b, name)) for name, x in vars(a).items())
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=2048)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=20_000, help="of a rollout")
    parser.add_argument("--prefix", type=int, default=16_000, help="of them shared by the group")
    parser.add_argument("--max-tokens", type=int, default=131_072)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file to write the results into")
    args = parser.parse_args()
    count = args.rollouts // args.group_size
    groups = rollouts(count, args.group_size, args.tokens, args.prefix)
    exact = pack(groups, args.max_tokens, impl="torch")
    variants: dict[str, Callable[[], object]] = {}
    for impl in ("cpp", "torch"):
        reason = _impl.unavailable_reason("packing", impl, "cpu")
        if reason is not None:
            print(f"  {impl}: not timed: {reason}")
            continue
        mine = pack(groups, args.max_tokens, impl=impl)
        if len(mine) != len(exact) or not all(map(same, mine, exact)):
            raise SystemExit(f"{impl}: batches differ from torch's: not timed")
        variants[impl] = lambda impl=impl: pack(groups, args.max_tokens, impl=impl)
        del mine
    batches, rows = len(exact), sum(b.T for b in exact)
    unshared = sum(b.layout.rollout_tokens for b in exact)
    del exact  # 300 MB that a trainer would not hold while it packs
    records = []
    print(f"{harness.device_name()}, {torch.get_num_threads()} threads")
    for name, t in harness.measure(variants, args.rounds).items():
        records.append({
            "impl": name, "rollouts": args.rollouts, "group_size": args.group_size,
            "tokens": args.tokens, "prefix": args.prefix, "max_tokens": args.max_tokens,
            "batches": batches, "rows": rows, "rows_unshared": unshared, **t,
        })  # fmt: skip
        print(
            f"  {args.rollouts} rollouts of {args.tokens:,} tokens -> {batches} batches, "
            f"{rows:,} rows for {unshared:,}  {name:6} {t['median_ms']:8.1f} ms "
            f"({t['p20_ms']:.1f} to {t['p80_ms']:.1f})"
        )
    if args.out:
        harness.write(args.out, "packing", records)


if __name__ == "__main__":
    main()
