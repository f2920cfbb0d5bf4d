"""Writes the numbers of bench/results/ into the README, between their markers, and the pictures.

    python -m bench.render       writes;  --check exits 1 where the README or a picture is stale

What whole runs of the trainer left has a block each (`bench.render_runs`). Timings are told by what
a file holds and not by its name: those of whole steps share a block (`bench.render_steps`), those
of the kernels another, file after file, each with its pictures next to it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import render_runs, render_steps
from bench.markdown import NOTHING, figures, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"


# ---- timings -------------------------------------------------------------------------------------

Record = dict[str, Any]
Entries = dict[str, dict[str, Any]]
"""benchmark -> {"stamp": ..., "records": [...]}, as `bench.harness.write` leaves it"""

BENCHMARKS = ("linear_hdpo", "filter", "cpu_rows", "demo_step", "logprobs", "advantages")
NO_TIMINGS = (
    "No timings are recorded: `bash bench/run_gpu.sh` takes them on a machine with a GPU, "
    "`python -m bench.render` brings them here."
)
LEGEND = (
    "Times are medians of forward and backward together. Objective: hdpo has both advantages, each "
    "with its own surrogate; grpo the accuracy advantage alone; ce is the cross-entropy of the "
    "labels; floor the bare matrix products over the rows that carry loss, whose operations "
    "TFLOP/s counts. Peak is what a step adds to the memory held. Gradient error is the largest "
    "relative difference from float64, over the first tokens."
)


def timings(results: Path, names: Iterable[str] = BENCHMARKS) -> dict[str, Entries]:
    """Stem of a file -> what it holds of the benchmarks; files that hold none are left out."""
    found = {}
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        entries = {
            name: content[name]
            for name in names
            if isinstance(content, dict) and _is_entry(content.get(name))
        }
        if entries:
            found[path.stem] = entries
    return found


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and bool(value.get("stamp")) and bool(value.get("records"))


def kernels(found: dict[str, Entries]) -> str:
    """The block of the timings: every device's, or a sentence on how to take them."""
    if not found:
        return NO_TIMINGS
    legend = [LEGEND] * any("linear_hdpo" in entries for entries in found.values())
    return "\n\n".join([*legend, *(_device(stem, entries) for stem, entries in found.items())])


def steps(found: dict[str, Entries]) -> str:
    """The block of whole steps and what they are made of, device after device."""
    parts = []
    for entries in found.values():
        parts.append(_stamps(entries))
        for name, entry in entries.items():
            parts += render_steps.TABLES[name](entry["records"])
    return "\n\n".join(parts)


def pictures(found: dict[str, Entries]) -> dict[str, str]:
    """Name in bench/results -> text, of every SVG that `kernels` links to."""
    # Drawing needs what the trainer needs, and a machine that only measures may lack it.
    from bench import plots

    drawn = {}
    for stem, entries in found.items():
        for name, cases in _pictured(stem, entries).items():
            varied = len(cases) > 1
            words = f"{entries['linear_hdpo']['stamp']['device']}: {_setting(cases[0][0], varied)}"
            drawn[name] = plots.active(words, cases) if varied else plots.providers(words, cases[0])
    return drawn


def _pictured(stem: str, entries: Entries) -> dict[str, list[list[Record]]]:
    """Name of a picture -> the cases that it shows."""
    cases = _cases(entries)
    if not cases:
        return {}
    shown = {f"{stem}-providers.svg": cases[:1]}
    shares = [case for case in cases if _differs_in_share_alone(case[0], cases[0][0])]
    if len({case[0]["active"] for case in shares}) > 1:
        shown[f"{stem}-active.svg"] = shares
    return shown


def _cases(entries: Entries, benchmark: str = "linear_hdpo") -> list[list[Record]]:
    """The records of a benchmark, cut where a case begins: with the bare products."""
    cases: list[list[Record]] = []
    for record in entries.get(benchmark, {"records": []})["records"]:
        if record["provider"] == "products":
            cases.append([])
        cases[-1].append(record)
    return cases


def _is_rival(record: Record) -> bool:
    return record["provider"] != "products" and not record["provider"].startswith("ours")


def _differs_in_share_alone(one: Record, other: Record) -> bool:
    same = all(one[key] == other[key] for key in ("head", "tokens", "frozen", "dtype"))
    # Entropy tells apart what was peaked differently; it is measured, so it is never quite equal.
    return same and math.isclose(one["entropy"], other["entropy"], rel_tol=0.02)


def _device(stem: str, entries: Entries) -> str:
    """All that one file says."""
    parts = [_stamps(entries)]
    cases = _cases(entries)
    full = [case for case in cases if any(_is_rival(record) for record in case)]
    for case in full or cases[:1]:
        parts += _everybody(case)
    if len(cases) > max(len(full), 1):
        parts += _ours(cases)
    if "filter" in entries:
        parts += _filtered(_cases(entries, "filter"))
    if "cpu_rows" in entries:
        parts += _cpu_rows(entries["cpu_rows"]["records"])
    if "demo_step" in entries:
        parts.append(_demo_step(entries["demo_step"]["records"]))
    if "logprobs" in entries:
        parts += _logprobs(entries["logprobs"]["records"])
    if "advantages" in entries:
        parts.append(_advantages(entries["advantages"]["records"]))
    for name, shown in _pictured(stem, entries).items():
        what = "Time against active share" if len(shown) > 1 else "Time per provider"
        device = entries["linear_hdpo"]["stamp"]["device"]
        parts.append(f"![{what} on {device}](bench/results/{name})")
    return "\n\n".join(parts)


def _stamps(entries: Entries) -> str:
    """Where and with what: once where all benchmarks agree, otherwise by benchmark."""
    said: dict[str, list[str]] = {}
    for benchmark, entry in entries.items():
        stamp = entry["stamp"]
        triton = f"triton {stamp['triton']}" if stamp["triton"] else "no triton"
        commit = f"commit `{stamp['commit'][:7]}`" if stamp["commit"] else "no commit"
        commit += " with changes" * bool(stamp["dirty"])
        words = f"**{stamp['device']}**, torch {stamp['torch']}, {triton}, {commit}"
        said.setdefault(words, []).append(benchmark)
    if len(said) == 1:
        return f"{next(iter(said))}."
    return "; ".join(f"{words} ({', '.join(names)})" for words, names in said.items()) + "."


def _setting(record: Record, varied: bool = False) -> str:
    """A case in words; without its active share where that varies."""
    share = "" if varied else f", {record['active']:.0%} active"
    frozen = ", head frozen" * record["frozen"]
    return (
        f"{record['head']}, {record['tokens']:,} tokens{share}{frozen}, {record['dtype']}, "
        f"entropy {record['entropy']:.2f} nats"
    )


def _everybody(case: list[Record]) -> list[str]:
    """Everybody on one case, fastest first, and who was not timed."""
    timed = [r for r in case if "median_ms" in r]
    timed.sort(key=lambda r: (r["provider"] != "products", r["median_ms"]))
    columns = "provider, objective, ms, x products, TFLOP/s, peak MiB, gradient error"
    rows = [
        [r["provider"], r["objective"], *_measured(r), _error(r.get("gradient_error"))]
        for r in timed
    ]
    parts = [f"`linear_hdpo_loss`, {_setting(case[0])}:", table(columns.split(", "), rows)]
    reasons: dict[str, list[str]] = {}
    for record in case:
        if "median_ms" not in record:
            # A library's own text, shown as code so that nothing in it is read as markup.
            reason = record["skipped"].replace("`", "'")
            reasons.setdefault(reason, []).append(record["provider"])
    if reasons:
        lines = [f"- {', '.join(names)}: `{reason}`" for reason, names in reasons.items()]
        parts.append("\n".join(["Not timed:", "", *lines]))
    return parts


def _ours(cases: list[list[Record]]) -> list[str]:
    """Ours in every case, and filtered where that was timed, too."""
    filtered = [_record(case, "ours filtered") for case in cases]
    columns = ["head", "tokens", "active", "head frozen", "entropy, nats"]
    columns += ["ms", "x products", "TFLOP/s", "peak MiB", "ms, filtered"]
    rows = []
    for case, other in zip(cases, filtered, strict=True):
        first = case[0]
        rows.append([
            first["head"], f"{first['tokens']:,}", f"{first['active']:.0%}",
            "yes" if first["frozen"] else "no", f"{first['entropy']:.2f}",
            *_measured(_record(case, "ours")), figures(other.get("median_ms")),
        ])  # fmt: skip
    if not any("median_ms" in other for other in filtered):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
        return ["`ours` in every case:", table(columns, rows)]
    return ['`ours` in every case; filtered: `grad_filter="auto"`:', table(columns, rows)]


def _filtered(cases: list[list[Record]]) -> list[str]:
    """What `grad_filter="auto"` saves and loses on a language model's own logits."""
    rows = []
    for case in cases:
        plain, other = _record(case, "ours"), _record(case, "ours filtered")
        rows.append([
            f"{case[0]['temperature']:g}", f"{case[0]['entropy']:.2f}",
            f"{other['live_share']:.1%}" if "live_share" in other else NOTHING,
            *(figures(r.get("of_floor")) for r in (plain, other)),
            *(_error(r.get("gradient_error")) for r in (plain, other)),
        ])  # fmt: skip
    first = cases[0][0]
    columns = "temperature, entropy (nats), live columns, x products, x products filtered"
    columns += ", gradient error, gradient error filtered"
    return [
        f'`grad_filter="auto"` on the logits of {first["head"]}, {first["tokens"]:,} tokens, '
        f"{first['dtype']}, sharpened by a temperature:",
        table(columns.split(", "), rows),
    ]


def _cpu_rows(records: list[Record]) -> list[str]:
    """The row pass alone: milliseconds, and how many times that of ours."""
    chunks = list(dict.fromkeys((r["rows"], r["vocab"], r["dtype"]) for r in records))
    cell = {
        (r["variant"], r["rows"], r["vocab"], r["dtype"]): f"{figures(r['median_ms'])} "
        f"({figures(r['of_ours'])})"
        for r in records
    }
    names = dict.fromkeys(r["variant"] for r in records)
    rows = [[name, *(cell.get((name, *chunk), NOTHING) for chunk in chunks)] for name in names]
    columns = [f"{count} x {vocab:,}, {dtype}" for count, vocab, dtype in chunks]
    return [
        "The row pass alone, from raw logits to logprob, entropy and d(logits) in their place: ms "
        "(and times ours); copy: the logits copied, that is read and written once:",
        table(["", *columns], rows),
    ]


def _demo_step(records: list[Record]) -> str:
    said = (
        f"{r['impl']} {figures(r['loss_ms'])} of {figures(r['step_ms'])} ms ({r['share']:.1%})"
        for r in records
    )
    return f"The loss within a step of the demo's RL, step by step in turn: {'; '.join(said)}."


def _record(case: list[Record], provider: str) -> Record:
    return next((r for r in case if r["provider"] == provider), {})


def _measured(record: Record) -> list[str]:
    """Time, over the floor, TFLOP/s and peak of a record; one that was not timed has none."""
    if "median_ms" not in record:
        return [NOTHING] * 4
    shown = [figures(record[key]) for key in ("median_ms", "of_floor", "tflops")]
    return [*shown, f"{record['peak_bytes'] / 2**20:,.0f}"]


def _logprobs(records: list[Record]) -> list[str]:
    first = records[0]
    passes = {"": NOTHING, "forward": "forward", "both": "forward, backward"}
    rows = []
    for record in records:
        name, _, which = record["variant"].rpartition(", ")
        name, which = (name, which) if name else ("copy of the logits", "")
        shown = (record[key] for key in ("median_ms", "gigabytes_per_second", "of_copy"))
        rows.append([name, passes[which], *map(figures, shown)])
    return [
        f"`logprobs` of {first['tokens']:,} x {first['vocab']:,} logits, {first['dtype']}; GB/s "
        "counts what has to be moved:",
        table(["implementation", "pass", "ms", "GB/s", "of a copy's GB/s"], rows),
    ]


def _advantages(records: list[Record]) -> str:
    """One line: microseconds by implementation and number of rollouts."""
    counts = list(dict.fromkeys(r["rollouts"] for r in records))
    taken = {(r["impl"], r["rollouts"]): 1e3 * r["median_ms"] for r in records}
    said = (
        f"{impl} {' / '.join(figures(taken.get((impl, count))) for count in counts)}"
        for impl in dict.fromkeys(r["impl"] for r in records)
    )
    return (
        f"`hdpo_advantages` of {' / '.join(f'{count:,}' for count in counts)} rollouts in groups "
        f"of {records[0]['group_size']}, in µs: {'; '.join(said)}."
    )


def _error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1e}"


# ---- the page ------------------------------------------------------------------------------------


def render(text: str, results: Path = RESULTS) -> str:
    """The README with every block written anew from results. Without demo.json or the like its own
    stays; the block of the timings then says that there are none."""
    for name, write in render_runs.BLOCKS.items():
        path = results / f"{name}.json"
        if path.exists():
            text = _put(text, name, write(json.loads(path.read_text())))
    whole = timings(results, render_steps.TABLES)
    if whole:
        text = _put(text, "steps", steps(whole))
    return _put(text, "kernels", kernels(timings(results)))


def _put(text: str, name: str, block: str) -> str:
    pattern = re.compile(rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no block for {name}: <!-- {name}: ... -->")
    return pattern.sub(lambda m: f"{m[1]}\n{block}\n\n{m[2]}", text)


def written(readme: Path, results: Path) -> dict[Path, str]:
    """Everything that this module writes: path -> text."""
    drawn = pictures(timings(results))
    return {readme: render(readme.read_text(), results)} | {
        results / name: text for name, text in drawn.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = {
        path: text
        for path, text in written(README, RESULTS).items()
        if not path.exists() or path.read_text() != text
    }
    if args.check:
        return int(bool(stale))
    for path, text in stale.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
