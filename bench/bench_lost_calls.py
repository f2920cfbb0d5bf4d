"""Whether counterfactual rollouts bring back calls that a policy has lost.

    OMP_NUM_THREADS=1 python -m bench.bench_lost_calls --jobs 2     (half an hour on two cores)
    python -m bench.render

Makes a policy that answers medium digits without the look that they need: the demo's cold start,
then 60 steps with a coupled reward. From there `metis rl` goes on for 60 steps of HDPO, with
counterfactual rollouts and without, over the seeds. What the held-out questions say of each is
collected in lost_calls.json, beside the other results. Exits 1 where the most forcing leaves more
than half of the missed calls on any seed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.bench_demo import RESULTS, metis, write

ARMS = {"HDPO": 0, "HDPO, 2 + 2 of 16 forced": 2, "HDPO, 4 + 4 of 16 forced": 4}
"""Arm -> rollouts of a group that are made to call, and as many that are made to answer."""
STEPS = "rl.steps=60"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--reuse", action="store_true", help="runs that are complete are kept")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cold = metis(args, "sft", "lost-cold")
    coupled = ("rl.reward=coupled", "rl.coupled_alpha=1")
    lost = metis(args, "rl", "lost-policy", f"model.path={cold / 'sft'}", STEPS, *coupled)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))

    def run(arm: str, seed: int) -> dict[str, Any]:
        count = ARMS[arm]
        forced = (f"rl.forced_calls={count}", f"rl.forced_answers={count}")
        path = f"model.path={lost / 'final'}"
        name = f"lost-forced{count}-{seed}"
        folder = metis(args, "rl", name, path, STEPS, f"seed={seed}", *forced)
        return {"arm": arm, "seed": seed, "final": _final(folder)}

    with ThreadPoolExecutor(args.jobs) as pool:
        pairs = [(arm, seed) for seed in args.seeds for arm in ARMS]
        runs = list(pool.map(lambda pair: run(*pair), pairs))
    write(args.out / "lost_calls.json", {"lost": _final(lost), "runs": runs})
    worse = [seed for seed in args.seeds if not helps(runs, seed)]
    print(f"no help on the seeds {worse}" if worse else f"it helps on {len(args.seeds)} seeds")
    return 1 if worse else 0


def _final(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())["final"]


def helps(runs: list[dict[str, Any]], seed: int) -> bool:
    """Whether at most half as many needed calls are missed with the most forcing as without any,
    and more answers are right."""
    alone, *_, forced = (
        next(run["final"] for run in runs if run["seed"] == seed and run["arm"] == arm)
        for arm in ARMS
    )
    fewer = forced["missed_rate"] <= alone["missed_rate"] / 2
    return fewer and forced["accuracy"] > alone["accuracy"]


if __name__ == "__main__":
    sys.exit(main())
