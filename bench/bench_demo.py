"""The demo over several seeds, for the record: what the README says about it.

    python -m bench.bench_demo --seeds 0 1 2      (about three minutes a seed on two cores)
    python -m bench.bench_demo --curate           (about ten minutes a seed)
    python -m bench.bench_demo --compare          (about forty minutes)
    python -m bench.render

Runs `metis demo` as a user does and collects the summaries in bench/results/demo.json; the picture
of the first seed becomes bench/results/demo.svg. Exits 1 where a seed misses a bar.

--curate runs `metis demo --curate`, whose cold start is from raw trajectories, as they are and
curated, and collects bench/results/curated.json. Exits 1 where curation does not pay.

--compare runs `metis demo --compare` instead, HDPO beside GRPO and a coupled reward from one cold
start, and leaves bench/results/compare.json and bench/results/pareto.svg. Nothing is asked of it:
whatever comes out is the result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

BARS = {
    "tool rate after SFT >= 0.95": lambda s: s["sft"]["tool_rate"] >= 0.95,
    "redundant calls <= 0.05": lambda s: s["final"]["redundant_rate"] <= 0.05,
    "missed calls <= 0.10": lambda s: s["final"]["missed_rate"] <= 0.10,
    "accuracy not below SFT's": lambda s: s["final"]["accuracy"] >= s["sft"]["accuracy"],
    "under ten minutes": lambda s: s["seconds"] < 600,
}


CURATED_BARS = {
    "a better cold start than from raw trajectories": lambda s: (
        s["sft"]["accuracy"] > s["uncurated"]["accuracy"]
    ),
    **{name: BARS[name] for name in ("redundant calls <= 0.05", "missed calls <= 0.10")},
    "accuracy not below SFT's": BARS["accuracy not below SFT's"],
}


def missed_bars(summary: dict[str, Any]) -> list[str]:
    """The bars that a run does not meet."""
    bars = CURATED_BARS if "uncurated" in summary else BARS
    return [name for name, holds in bars.items() if not holds(summary)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--compare", action="store_true", help="the arms instead of the seeds")
    parser.add_argument("--curate", action="store_true", help="from raw trajectories")
    parser.add_argument("--reuse", action="store_true", help="runs that are complete are kept")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.compare:
        return compare(args)
    summaries, missed = [], []
    name, options = ("curated", ["--curate"]) if args.curate else ("demo", [])
    for seed in args.seeds:
        folder = metis(args, "demo", f"bench-{name}-{seed}", "--seed", str(seed), *options)
        summary = json.loads((folder / "summary.json").read_text())
        summaries.append(summary)
        missed += [f"seed {seed}: {bar}" for bar in missed_bars(summary)]
        if seed == args.seeds[0] and not args.curate:
            subprocess.run([sys.executable, "-m", "trainer", "report", str(folder)], check=True)
            shutil.copy(folder / "demo.svg", args.out / "demo.svg")
    write(args.out / f"{name}.json", {"runs": summaries})
    print("\n".join(missed) or f"every bar met by {len(summaries)} seeds")
    return 1 if missed else 0


def compare(args: argparse.Namespace) -> int:
    """The arms from one cold start, that of the first seed."""
    folder = metis(args, "demo", "bench-compare", "--compare", "--seed", str(args.seeds[0]))
    write(args.out / "compare.json", json.loads((folder / "compare.json").read_text()))
    shutil.copy(folder / "pareto.svg", args.out / "pareto.svg")
    return 0


def metis(args: argparse.Namespace, command: str, name: str, *options: str) -> Path:
    """`metis COMMAND` -> its run folder. args: runs, and reuse, with which a run that is complete
    is kept."""
    folder = args.runs / name
    summary = folder / "summary.json"
    if args.reuse and summary.exists() and json.loads(summary.read_text())["status"] == "complete":
        return folder
    program = [sys.executable, "-m", "trainer", command, "--name", name, *options]
    subprocess.run([*program, "--runs", str(args.runs), "--overwrite"], check=True)
    return folder


def write(path: Path, content: dict[str, Any]) -> None:
    machine = {"cores": os.cpu_count(), "processor": _processor()}
    path.write_text(json.dumps({"machine": machine} | content, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
