"""The folder of a curation: opened, gone on with or refused, and what is written into it.

asked.json       what was asked for: a run goes on where the same is asked for again
journal.jsonl    what was found out, by content: see journal.py
dataset.jsonl    the rows that are kept
curation.jsonl   one line for every row that went in: kept, dropped or bad, and why
report.html      how many, and examples of each reason
summary.json     the counts; written last
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.curate.pipeline import Curation
from trainer.curate.rows import coldstart_line, rl_line
from trainer.data import Conversation, Dataset
from trainer.log import RunError, plain, write_whole

ASKED, JOURNAL, SUMMARY = "asked.json", "journal.jsonl", "summary.json"
OUTPUTS = ("dataset.jsonl", "curation.jsonl", "report.html", SUMMARY)

_HOW = (
    "base_url", "concurrency", "timeout", "max_calls", "max_tokens", "key_variable", "cache",
    "window", "minimum", "max_unscored", "sessions", "cache_bytes", "max_cache_bytes", "device",
)  # fmt: skip
"""Settings that change how the work is done, and not what comes of it."""


def asked_for(command: str, settings: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    """What asked.json holds: settings that matter, and the input files by content."""

    def what(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        return {key: what(value) for key, value in tree.items() if key not in _HOW}

    inputs = [{"path": str(path), "sha256": _sha256(path)} for path in files]
    return {"command": command, "settings": plain(what(settings)), "inputs": inputs}


def _sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            hashed.update(piece)
    return hashed.hexdigest()


def check_folder(folder: Path, *, overwrite: bool) -> dict[str, Any] | None:
    """What was asked for in this folder before, if anything was. Raises RunError for one that is
    finished or holds other things."""
    if not folder.is_dir():
        if folder.exists():
            raise RunError(f"'{folder}' is a file: give another folder as --out")
        return None
    before = _read(folder / ASKED)
    if before is None and any(not one.name.startswith(".") for one in folder.iterdir()):
        raise RunError(
            f"'{folder}' holds no curation ({ASKED} is missing) and is not empty: give another "
            "folder as --out"
        )
    if (folder / SUMMARY).exists() and not overwrite:
        raise RunError(
            f"the curation in '{folder}' is finished: give another folder as --out, or --overwrite"
        )
    return before


def open_folder(folder: Path, asked: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Makes the folder of a curation, or goes on with it -> whether it was begun before.

    overwrite: what an earlier one wrote is removed, but for the journal, whose entries hold for
    whoever asks the same of the same rows. Raises RunError as `check_folder` does, for a folder
    that was begun with other settings or inputs, and for one that cannot be written.
    """
    before = check_folder(folder, overwrite=overwrite)
    if before is not None and not overwrite:
        if different := _differences(before, asked):
            raise RunError(
                f"'{folder}' was begun with other settings or inputs: {'; '.join(different)}. "
                "Ask for the same to go on, give another folder as --out, or --overwrite (what is "
                "the same is not done again)"
            )
        return True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in reversed(OUTPUTS):
            (folder / name).unlink(missing_ok=True)
        write_whole(folder / ASKED, json.dumps(asked, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"cannot write in '{folder}': {error.strerror or error}") from error
    return before is not None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RunError(f"'{path}' cannot be read as JSON: give another folder as --out")
    return found


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        dot = f"{name}." if name and name != "settings" else ""
        return [
            line
            for key in dict.fromkeys([*before, *now])
            for line in _differences(before.get(key), now.get(key), f"{dot}{key}")
        ]
    if name == "inputs" and before != now:
        return ["the input files are others, or their contents"]
    return [] if before == now else [f"{name} was {before!r}, now {now!r}"]


# ---- what comes out ------------------------------------------------------------------------------


def curation_lines(curation: Curation) -> Iterator[dict[str, Any]]:
    """One for every row that went in."""
    for fate in curation.fates:
        path, row = place(curation.data, fate.number)
        yield {
            "id": fate.id,
            "path": str(path),
            "row": row,
            "hash": fate.digest,
            "verdict": fate.verdict,
            "stage": fate.stage or None,
            "reason": fate.reason or None,
            "detail": fate.detail or None,
        }


def kept_lines(curation: Curation) -> Iterator[dict[str, Any]]:
    """The rows that are kept, in the layouts of Metis-ColdStart and Metis-RL."""
    for fate in curation.fates:
        if fate.verdict != "kept":
            continue
        item = curation.data[fate.number]
        if isinstance(item, Conversation):
            yield coldstart_line(item)
        else:
            drawn = curation.values.get("pass_rate", {}).get(fate.number)
            yield rl_line(item, {"pass_rate": drawn["right"] / drawn["drawn"]} if drawn else {})


def place(data: Dataset, number: int) -> tuple[Path, int]:
    """The file of a row, and its number in it, from 0."""
    for source in data.sources:
        if number < len(source):
            return source.path, number
        number -= len(source)
    raise IndexError(number)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> int:
    """Writes JSON lines whole or not at all, one in memory at a time -> how many. Raises
    RunError."""
    temporary = path.with_name(f".{path.name}.tmp")
    count = 0
    try:
        with temporary.open("wb") as file:
            for line in lines:
                text = json.dumps(line, ensure_ascii=False, allow_nan=False)
                file.write(text.encode("utf-8", "replace") + b"\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return count
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunError(
            f"'{path}' cannot be written: {error.strerror or error}. What was found out is safe in "
            f"'{path.parent / JOURNAL}': free some space, and run the same command again"
        ) from error
