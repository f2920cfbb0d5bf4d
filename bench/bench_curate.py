"""Whether curation finds what is wrong with raw trajectories, and how fast it runs them again.

    python -m bench.bench_curate                                   (a minute, printed)
    python -m bench.bench_curate --out bench/results/curate.json   (and written)

The rows are those of trainer.tasks.glyphs.raw: trajectories of the demo's tools with planted flaws,
each labelled. Model and judge are left out, so the flaw that takes a model to see (solvable) counts
for nothing here. Exits 1 where a target of TARGETS is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import harness
from trainer.chat import turn_text
from trainer.config import CurateConfig
from trainer.curate.duplicates import Kept
from trainer.curate.execute import Tolerance
from trainer.curate.journal import Journal
from trainer.curate.pipeline import Curation, Plan
from trainer.curate.stages import Answer, Execution, Reading
from trainer.data import Dataset
from trainer.log import Progress, RunLog
from trainer.loop import every
from trainer.tasks import load_task
from trainer.tasks.glyphs.raw import write_raw
from trainer.types import Session

TARGETS = {"precision": 0.99, "recall": 0.99, "executed_per_second": 100.0}
"""At least. Trajectories are those that reach the execution; the sandbox has been started."""
NAMES = {"tool_answer": "answer_from_tool"}
"""Flaw -> reason, where the two differ."""


_CALL = turn_text("", call=("python", {"code": "1"}))


class Timed(RunLog):
    """Says nothing, and notes how long each stage took."""

    def __init__(self, folder: Path):
        super().__init__(folder, console=Console(quiet=True))
        self.rates: dict[str, float] = {}
        """Stage -> rows a second, of its first round, which has nearly all rows."""

    @contextlib.contextmanager
    def progress(self, stage: str, total: int) -> Iterator[Progress]:
        start = time.perf_counter()
        with super().progress(stage, total) as bar:
            yield bar
        self.rates.setdefault(stage, total / (time.perf_counter() - start))


def curate(raw: Path, folder: Path) -> tuple[Curation, Timed]:
    """The rule stages and the execution, with the defaults of the settings."""
    one = CurateConfig()
    toolbox = load_task("glyphs").toolbox()
    tolerance = Tolerance(one.number_tolerance, one.picture_bits, one.picture_grey, one.recovered)
    bits, grey = one.duplicate_bits, one.duplicate_grey
    plan = Plan(
        Reading(bits=bits, grey=grey, max_answer=one.max_answer),
        [Execution(toolbox, tolerance, one.sessions, "glyphs"), Answer()],
        duplicates=lambda: Kept(jaccard=one.duplicate_text, bits=bits, grey=grey),
    )
    log = Timed(folder)
    curation = Curation(Dataset(raw), plan, Journal(folder / "journal.jsonl"), log)
    try:
        starting = [toolbox.execute_turn(_CALL, Session([], seed)) for seed in range(4)]
        curation._loop.run(every(starting))
        curation.run()
    finally:
        curation.close(toolbox)
    return curation, log


def score(curation: Curation, labels: dict[str, str | None]) -> dict[str, Any]:
    """Precision and recall of what is dropped, and of every flaw how many rows were dropped and how
    many for its reason."""
    told = [fate for fate in curation.fates if labels[fate.id] != "solvable"]
    dropped = {fate.id for fate in told if fate.verdict != "kept"}
    flawed = {fate.id for fate in told if labels[fate.id] is not None}
    flaws: dict[str, dict[str, int]] = {}
    for fate in told:
        flaw = labels[fate.id]
        if flaw is not None:
            counts = flaws.setdefault(flaw, {"rows": 0, "dropped": 0, "for its reason": 0})
            counts["rows"] += 1
            counts["dropped"] += fate.id in dropped
            counts["for its reason"] += fate.reason == NAMES.get(flaw, flaw)
    return {
        "precision": len(dropped & flawed) / len(dropped),
        "recall": len(dropped & flawed) / len(flawed),
        "sound_rows": len(told) - len(flawed),
        "sound_rows_dropped": len(dropped - flawed),
        "flaws": dict(sorted(flaws.items())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2_000, help="rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write the results into")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = write_raw(folder / "raw", args.seed, args.count)
        found = map(json.loads, (raw.parent / "labels.jsonl").open())
        labels = {one["id"]: one["flaw"] for one in found}
        curation, log = curate(raw, folder)
    record = {
        "rows": args.count,
        "seed": args.seed,
        **score(curation, labels),
        "read_per_second": log.rates["rules"],
        "executed_per_second": log.rates["execute"],
    }
    print(json.dumps(record, indent=1))
    missed = [name for name, least in TARGETS.items() if record[name] < least]
    for name in missed:
        print(f"{name} is {record[name]:.4g}, at least {TARGETS[name]:g} is wanted: MISSED")
    if args.out:
        harness.write(args.out, "curate", [record])
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
