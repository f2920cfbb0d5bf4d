"""What whole runs of the trainer left, as blocks of the README: demo.json, curated.json,
compare.json and lost_calls.json of bench/results/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def demo(record: dict[str, Any]) -> str:
    """The demo's picture and its table over seeds."""
    runs = record["runs"]
    before = [run["sft"] for run in runs]
    after = [run["final"] for run in runs]
    minutes = _spread([run["seconds"] / 60 for run in runs], "{:.1f}")
    rows = [
        ("tool rate", "tool_rate"),
        ("redundant calls (where none is needed)", "redundant_rate"),
        ("missed calls (none where one is needed)", "missed_rate"),
        ("accuracy", "accuracy"),
        ("calls per question", "calls"),
    ]
    lines = [
        "![Tool rate and accuracy over the steps of HDPO](bench/results/demo.svg)",
        "",
        f"{before[0]['n']} held-out questions ({before[0]['needed_rate']:.0%} need a tool); "
        f"seeds {', '.join(str(run['seed']) for run in runs)}; {minutes} minutes each on "
        f"{record['machine']['cores']} cores ({record['machine']['processor']}). "
        "Range over the seeds:",
        "",
        "| | after SFT | after HDPO |",
        "|---|---|---|",
    ]
    for label, key in rows:
        form = "{:.2f}" if key == "calls" else "{:.1%}"
        cells = (_spread([one[key] for one in side], form) for side in (before, after))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        "| kind of question | needs a tool | right by itself | tool rate, SFT | tool rate, HDPO "
        "| accuracy, SFT | accuracy, HDPO |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, first in after[0]["by_kind"].items():
        alone = _spread([run["base"]["by_kind"][kind]["accuracy"] for run in runs], "{:.0%}")
        cells = [alone]
        for key in ("tool_rate", "accuracy"):
            for side in (before, after):
                cells.append(_spread([one["by_kind"][kind][key] for one in side], "{:.0%}"))
        needs = "yes" if first["needs_tool"] else "no"
        lines.append(f"| `{kind}` | {needs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(record: dict[str, Any]) -> str:
    """HDPO beside the other arms: picture and table over seeds."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for entry in record["arms"]:
        arms.setdefault(entry["name"], []).append(entry["final"])
    start = record["arms"][0]["sft"]
    columns = ("tool_rate", "redundant_rate", "missed_rate", "accuracy")
    lines = [
        "![Accuracy against tool rate, arm by arm](bench/results/pareto.svg)",
        "",
        f"One cold start, then seeds {', '.join(map(str, record['seeds']))} of each arm "
        f"({start['needed_rate']:.0%} of the questions need a tool). Range over the seeds:",
        "",
        "| | tool rate | redundant calls | missed calls | accuracy | tool rate, `glyph_medium` "
        "| accuracy, `glyph_medium` |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, finals in ({"cold start": [start]} | arms).items():
        cells = [_spread([final[key] for final in finals], "{:.1%}") for key in columns]
        medium = [final["by_kind"]["glyph_medium"] for final in finals]
        cells += [_spread([m[key] for m in medium], "{:.0%}") for key in ("tool_rate", "accuracy")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curated(record: dict[str, Any]) -> str:
    """The cold start from raw and from curated trajectories, and what HDPO makes of the latter."""
    runs = record["runs"]
    reasons = {reason for run in runs for reason in run["curation"]["reasons"]}
    count = {
        reason: _spread([run["curation"]["reasons"].get(reason, 0) for run in runs], "{}")
        for reason in sorted(reasons)
    }
    kept = _spread([run["curation"]["kept"] for run in runs], "{}")
    lines = [
        f"{runs[0]['curation']['rows']:,} raw trajectories a seed, {kept} kept. Dropped: "
        + ", ".join(f"{reason} {number}" for reason, number in count.items())
        + f". Seeds {', '.join(str(run['seed']) for run in runs)}; "
        f"{runs[0]['sft']['n']} held-out questions, range over the seeds:",
        "",
        "| | tool rate | redundant calls | missed calls | calls per question | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    stages = {
        "cold start, raw": "uncurated", "cold start, curated": "sft", "then HDPO": "final"
    }  # fmt: skip
    for words, key in stages.items():
        side = [run[key] for run in runs]
        cells = [
            _spread([one[name] for one in side], form)
            for name, form in (
                ("tool_rate", "{:.1%}"),
                ("redundant_rate", "{:.1%}"),
                ("missed_rate", "{:.1%}"),
                ("calls", "{:.2f}"),
                ("accuracy", "{:.1%}"),
            )
        ]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    gains = _spread(
        [run["sft"]["accuracy"] - run["uncurated"]["accuracy"] for run in runs], "{:+.1%}"
    )
    return "\n".join([*lines, "", f"Curation alone, seed by seed: {gains} accuracy."])


def lost_calls(record: dict[str, Any]) -> str:
    """A policy that has lost calls, and what HDPO makes of it, with forced openings and without."""
    seeds = sorted({run["seed"] for run in record["runs"]})
    lines = [
        f"{record['lost']['n']} held-out questions; seeds {', '.join(map(str, seeds))}, range over "
        "them:",
        "",
        "| | missed calls | redundant calls | tool rate | accuracy |",
        "|---|---|---|---|---|",
    ]
    arms = {"the policy that has lost them": [record["lost"]]}
    for run in record["runs"]:
        arms.setdefault(f"60 steps of {run['arm']}", []).append(run["final"])
    for words, side in arms.items():
        cells = [
            _spread([one[name] for one in side], "{:.1%}")
            for name in ("missed_rate", "redundant_rate", "tool_rate", "accuracy")
        ]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "curated": curated,
    "compare": compare,
    "lost_calls": lost_calls,
}
