"""Tables of what a whole step is made of: the update, attention, packing, generation.

`bench.render` puts them into the README's block "steps", device after device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bench.markdown import NOTHING, figures, table

Record = dict[str, Any]
WAYS = {
    "padded": "padded, unshared, all logits",
    "packed": "packed, unshared, recomputing head over all rows",
    "ours": "packed behind shared prompts",
}


def step(records: list[Record]) -> Iterable[str]:
    """Every way in every case, in times of the first."""
    first = records[0]
    cases = list(dict.fromkeys(_case(r) for r in records))
    rows = []
    for case in cases:
        mine = [r for r in records if _case(r) == case]
        base = next(r for r in mine if "median_ms" in r)
        for r in mine:
            head = [f"{r['prompt']:,} + {r['response']:,}", f"{r['active']:.0%}", WAYS[r["way"]]]
            if "skipped" in r:
                rows.append([*head, r["skipped"], *[NOTHING] * 4])
                continue
            rows.append([
                *head, figures(r["median_ms"]), figures(r["median_ms"] / base["median_ms"]),
                f"{r['tokens_per_second']:,.0f}", f"{r['peak_bytes'] / 2**20:,.0f}",
                figures(r["peak_bytes"] / base["peak_bytes"]),
            ])  # fmt: skip
    columns = "prompt + response, active, way, ms, x first, tokens/s, peak MiB, x first"
    micro = {"group": "a group each", "tokens": f"{first['max_tokens']:,} tokens each"}
    return [
        f"One whole update ({first['model']}, {first['groups']} groups of {first['group_size']}, "
        f"{first['dtype']}, {first['tool_share']:.0%} of a response tool output, micro-batches of "
        f"{micro[first['micro']]}), forward to optimizer; peak is what it adds:",
        table(columns.split(", "), rows),
    ]


def _case(record: Record) -> tuple:
    return tuple(record[key] for key in ("prompt", "image", "response", "active"))


def attention(records: list[Record]) -> Iterable[str]:
    """Forward and backward together, in each length of prompt."""
    both = [r for r in records if r["variant"].endswith(", both")]
    first = both[0]
    rows = [
        [
            f"{r['prompt']:,}", r["variant"].removesuffix(", both"), figures(r["median_ms"]),
            figures(r["tflops"]), figures(r["of_flash"]),
        ]
        for r in both
    ]  # fmt: skip
    heads = "/".join(map(str, first["heads"]))
    return [
        f"`shared_prefix_attention`, forward and backward, {first['group_size']} responses of "
        f"{first['response']:,} tokens, {heads} heads of {first['head_dim']}, {first['dtype']}; "
        "of flash: of the rate of one plain causal call with as many pairs:",
        table(["prompt", "way", "ms", "TFLOP/s", "of flash"], rows),
    ]


def packing(records: list[Record]) -> Iterable[str]:
    first = records[0]
    said = ", ".join(f"{r['impl']} {figures(r['median_ms'])} ms" for r in records)
    return [
        f"`pack` of {first['rollouts']:,} rollouts of {first['tokens']:,} tokens with M-RoPE "
        f"positions, {first['prefix']:,} of them shared by a group: {said}; "
        f"{first['rows_unshared'] / 1e6:.1f} million rows become {first['rows'] / 1e6:.1f}."
    ]


def generation(records: list[Record]) -> Iterable[str]:
    (record,) = records
    kept = record["kept"]
    engine, whole = record["the engine alone"], record["rollouts, tools included"]
    return [
        f"Rollouts of {record['prompts']} questions x {record['group_size']} with a tool call: "
        f"`model.generate` anew every turn {engine['plain_s']:.2f} s, with prompts encoded once "
        f"and keys and values kept {engine['kept_s']:.2f} s ({engine['ratio']:.1f} times faster; "
        f"with the tools {whole['ratio']:.1f}); {record['same']:.1%} of the trajectories are the "
        "same. "
        f"{kept['prefill_tokens']:,.0f} tokens were encoded, {kept['shared_tokens']:,.0f} saved by "
        f"sharing and {kept['kept_tokens']:,.0f} by keeping."
    ]


def tools(records: list[Record]) -> Iterable[str]:
    (record,) = records
    call, session, new = (
        f"{record['times'][name]['median_ms']:.1f} ms"
        for name in ("one call", "session's call", "new session")
    )
    walls = record["sandbox"].removeprefix("python sandbox: ")
    rates = (f"{record[name]:,.0f}" for name in ("calls_per_second", "session_calls_per_second"))
    return [
        f"A call of the python tool ({walls}; numpy, a crop of a 4k picture): {call} in a process "
        f"of its own, {record['call_over_fork_ms']:+.1f} ms over a bare forked child; {session} in "
        f"a session that lives, {new} to begin one; {' and '.join(rates)} calls a second. After "
        f"{record['leaks']['calls']:,} calls of each kind there are as many processes, descriptors "
        "and files as before."
    ]


TABLES: dict[str, Callable[[list[Record]], Iterable[str]]] = {
    "step": step,
    "prefix_attention": attention,
    "packing": packing,
    "generation": generation,
    "tools": tools,
}
"""Benchmark -> its part of the page, in the order in which they stand."""
