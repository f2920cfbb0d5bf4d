"""Writes the numbers of bench/results/ into the README, between their markers.

python -m bench.render           writes;  --check exits 1 where the README is stale
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"


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


def _spread(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {"demo": demo, "compare": compare}


def render(text: str) -> str:
    """The README with every block written anew from its results; without results it stays."""
    for name, write in BLOCKS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        block = write(json.loads(path.read_text()))
        pattern = re.compile(rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no block for {name}: <!-- {name}: ... -->")
        text = pattern.sub(lambda m, block=block: f"{m[1]}\n{block}\n\n{m[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = README.read_text()
    rendered = render(text)
    if args.check:
        return int(text != rendered)
    README.write_text(rendered)
    return 0


if __name__ == "__main__":
    sys.exit(main())
