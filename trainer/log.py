"""The run folder and what is written into it while a run goes on.

    runs/<name>/config.yaml      what was asked for, every default resolved
                metrics.jsonl    one line per optimizer step: stage, step, seconds, values
                rollouts.jsonl   one line per kept trajectory
                answers.jsonl    of an evaluation: one line per question, mode and sample
                eval.json        and all that was computed of them
                summary.json     written once, at the end, whole or not at all
                report.html      made from the files above by `report.py`

Every line is on its way to the disk when the call returns, so that a killed run can be read.
Every JSON line is strict: a NaN becomes null and its name is listed under `nonfinite`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from trainer.table import arbitration_table

RUN_FILES = (
    "config.yaml", "metrics.jsonl", "rollouts.jsonl", "summary.json", "report.html",
    "pareto.svg", "demo.svg", "compare.json", "groups.jsonl", "eval.json", "answers.jsonl",
)  # fmt: skip
"""The files that this program writes. Overwriting a run removes these, RUN_FOLDERS, and no more."""

RUN_FOLDERS = ("sft", "final", "compare", "raw", "curated", "uncurated")

RESERVED = ("stage", "step", "seconds", "nonfinite")


class RunError(Exception):
    """A run folder cannot be used or written. The message gives the value and the mend."""


# ---------------------------------------------------------------------------------------------
# The folder


def open_run(root: str | Path, name: str, overwrite: bool = False) -> Path:
    """Create `root/name` before any work is done, and return it.

    With `overwrite`, an earlier run's own files (RUN_FILES, RUN_FOLDERS) are removed first and
    whatever else lies there stays. A folder that holds none of RUN_FILES is not taken for a run:
    its `sft` or `final` may be somebody's data, so it is refused rather than cleared.
    """
    if not name or name in (".", "..") or Path(name).name != name or "\0" in name:
        raise RunError(f"run name {name!r} is not a plain folder name: use something like 'demo'")
    root = Path(root)
    folder = root / name
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        blocker = next((p for p in (root, *root.parents) if p.exists() and not p.is_dir()), root)
        raise RunError(
            f"cannot make a run folder in '{root}': '{blocker}' is a file. "
            "Choose another root, or move that file away."
        ) from error
    except OSError as error:
        raise _folder_error(root, error) from error
    try:
        folder.mkdir()
    except FileExistsError as error:
        if not folder.is_dir():
            raise RunError(f"'{folder}' is a file. Choose another run name.") from error
        if not overwrite:
            raise RunError(
                f"run folder '{folder}' exists already. Choose another name, or pass overwrite "
                "to replace the run in it."
            ) from error
        _clear(folder)
    except OSError as error:
        raise _folder_error(folder, error) from error
    _probe(folder)
    return folder


def _clear(folder: Path) -> None:
    """Remove an earlier run's own files. A link is removed, never followed."""
    own = [folder / name for name in RUN_FILES if os.path.lexists(folder / name)]
    nested = [folder / name for name in RUN_FOLDERS if os.path.lexists(folder / name)]
    if nested and not own:
        raise RunError(
            f"'{folder}' does not look like a run (it holds none of {', '.join(RUN_FILES[:4])}), "
            f"so its '{nested[0].name}' is not removed. Choose another run name."
        )
    odd = [path for path in own if path.is_dir() and not path.is_symlink()]
    if odd:
        raise RunError(
            f"'{odd[0]}' is a folder where a run has a file: nothing was removed. "
            "Choose another run name, or move that folder away."
        )
    try:
        # config.yaml, the first in RUN_FILES, goes last: a removal that fails half-way leaves a
        # folder that is still known as a run, and can be tried again.
        for path in [*nested, *reversed(own)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise _folder_error(folder, error) from error


def _probe(folder: Path) -> None:
    """Write and remove one small file: better to hear of a full disk now than after an hour."""
    path = folder / ".writable"
    try:
        with open(path, "wb") as handle:
            handle.write(b"x" * 4096)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise _folder_error(folder, error) from error
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


_MEND = {
    errno.ENOSPC: "the disk is full. Free some space, or choose a root on another disk.",
    errno.EDQUOT: "the disk quota is used up. Free some space, or choose another root.",
    errno.EACCES: "it is not writable. Choose another root, or change its permissions.",
    errno.EPERM: "it is not writable. Choose another root, or change its permissions.",
    errno.EROFS: "the file system is read-only. Choose another root.",
    errno.ENAMETOOLONG: "the name is too long. Choose a shorter run name.",
}


def _folder_error(path: Path, error: OSError) -> RunError:
    mend = _MEND.get(error.errno or 0, f"{error.strerror or error}. Choose another root.")
    return RunError(f"cannot write in '{path}': {mend}")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: a temporary neighbour, fsync, rename. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # "replace": decoded model output may hold lone surrogates, which have no UTF-8.
        with open(temporary, "wb") as handle:
            handle.write(text.encode("utf-8", "replace"))
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


# ---------------------------------------------------------------------------------------------
# Strict JSON


def plain(value: Any, name: str = "", nonfinite: list[str] | None = None) -> Any:
    """`value` in JSON's own types: tensors and numpy values unpacked, NaN and inf as None.

    The dotted names of what was not finite are appended to `nonfinite`.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # YAML knows no subclasses
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        if nonfinite is not None and name not in nonfinite:
            nonfinite.append(name)
        return None
    if isinstance(value, Mapping):
        dot = f"{name}." if name else ""
        return {str(k): plain(v, f"{dot}{k}", nonfinite) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [plain(item, name, nonfinite) for item in items]
    if hasattr(value, "tolist"):  # torch tensors and numpy arrays; a 0-d one gives a scalar
        return plain(value.tolist(), name, nonfinite)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"cannot log {name or 'a value'}: a {type(value).__name__} has no JSON form")


def strict_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    nonfinite: list[str] = []
    out = plain(record, nonfinite=nonfinite)
    if nonfinite:
        out["nonfinite"] = nonfinite
    return json.dumps(out, allow_nan=False, indent=indent)


# ---------------------------------------------------------------------------------------------
# The log


class RunLog:
    """Everything that a run writes down, and what it shows on the terminal.

    Example:

        with RunLog(open_run("runs", "demo")) as log:
            log.config(config)
            with log.progress("rl", total=300) as bar:
                for step in range(300):
                    log.metrics("rl", step, loss=loss, tool_rate=rate)
                    bar.advance(loss=loss, tool_rate=rate)
            log.summary({"status": "complete", ...})
    """

    def __init__(self, folder: str | Path, *, console: Console | None = None) -> None:
        self.folder = Path(folder)
        self.console = console or Console()
        self._started = time.monotonic()
        self._handles: dict[str, Any] = {}
        self._safe: dict[str, int] = {}  # file -> lines written by this log; 0 for a whole file
        self._bars: _Bars | None = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.close()
        except RunError:
            if kind is None:  # never hide the error that ended the run behind this one
                raise

    def close(self) -> None:
        """Close the files. Safe to call twice."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        handles, self._handles = self._handles, {}
        failed: tuple[str, OSError] | None = None
        for name, handle in handles.items():
            try:
                handle.close()
            except OSError as error:
                failed = (name, error)
        if failed is not None:
            raise self._error(*failed) from failed[1]

    @property
    def seconds(self) -> float:
        """Seconds since this log was made."""
        return time.monotonic() - self._started

    @contextlib.contextmanager
    def timed(self, summary: dict[str, Any], name: str) -> Iterator[None]:
        """Adds the seconds that are spent within to summary["stages"][name]."""
        start = self.seconds
        try:
            yield
        finally:
            stages = summary.setdefault("stages", {})
            stages[name] = round(stages.get(name, 0.0) + self.seconds - start, 1)

    def config(self, mapping: Mapping[str, Any]) -> None:
        """Write config.yaml, in the mapping's own order."""
        text = yaml.safe_dump(plain(mapping), sort_keys=False, allow_unicode=True)
        self._whole("config.yaml", text)

    def metrics(self, stage: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl. Values may be 0-d tensors or numpy scalars."""
        taken = [name for name in RESERVED if name in values]
        if taken:
            raise ValueError(f"metrics: {taken[0]!r} is written by the log itself: rename yours")
        head = {"stage": stage, "step": int(step), "seconds": round(self.seconds, 3)}
        self._append("metrics.jsonl", {**head, **values})

    def rollouts(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append each record as one line of rollouts.jsonl."""
        for record in records:
            self._append("rollouts.jsonl", record)

    def groups(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append each record as one line of groups.jsonl."""
        for record in records:
            self._append("groups.jsonl", record)

    def answers(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append each record as one line of answers.jsonl."""
        for record in records:
            self._append("answers.jsonl", record)

    def evaluation(self, mapping: Mapping[str, Any]) -> None:
        """Write eval.json, whole or not at all."""
        self._whole("eval.json", strict_json(mapping, indent=1) + "\n")

    def summary(self, mapping: Mapping[str, Any]) -> None:
        """Write summary.json, whole or not at all."""
        self._whole("summary.json", strict_json(mapping, indent=1) + "\n")

    def _whole(self, name: str, text: str) -> None:
        try:
            write_whole(self.folder / name, text)
        except OSError as error:
            raise self._error(name, error) from error
        self._safe[name] = 0

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        data = (strict_json(record) + "\n").encode()
        try:
            if name not in self._handles:
                # Unbuffered: after an error no half line waits in memory for the next write.
                self._handles[name] = open(self.folder / name, "ab", buffering=0)
            handle = self._handles[name]
            end = os.fstat(handle.fileno()).st_size
            left = memoryview(data)
            try:
                while left:
                    left = left[handle.write(left) :]
            except OSError:
                with contextlib.suppress(OSError):  # a device cannot be cut
                    os.ftruncate(handle.fileno(), end)
                raise
        except OSError as error:
            raise self._error(name, error) from error
        self._safe[name] = self._safe.get(name, 0) + 1

    def _error(self, name: str, error: OSError) -> RunError:
        safe = [
            f"{lines} line{'s' * (lines != 1)} of {file}" if lines else file
            for file, lines in self._safe.items()
        ]
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "Free some space and run again." if full else "Check the folder and run again."
        return RunError(
            f"could not write '{self.folder / name}': {error.strerror or error}. "
            f"Already safe in '{self.folder}': {', '.join(safe) or 'nothing'}. {mend}"
        )

    # ---- the terminal

    def say(self, text: str) -> None:
        """Print one line, above the progress bar if there is one. Nothing in it is markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, stage: str, total: int) -> Iterator[Progress]:
        """A bar on a terminal; elsewhere a line now and then. Bars nest."""
        if not self.console.is_terminal:
            lines = _Lines(stage, total, self.say)
            yield Progress(lines.update)
            lines.close()
            return
        outermost = self._bars is None
        if self._bars is None:
            self._bars = _Bars(self.console)
            self._bars.start()
        bars = self._bars
        task = bars.add_task(stage, total=total)
        try:
            yield Progress(lambda n, numbers: bars.update(task, advance=n, numbers=numbers))
        finally:
            if outermost:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task)

    def table(
        self,
        title: str,
        before: Mapping[str, Any],
        after: Mapping[str, Any] | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> None:
        """Print an evaluation, or two side by side, by kind of question and in total. `base` is
        the evaluation of the base model without tools."""
        self.console.print(arbitration_table(title, before, after, base))


class Muted(RunLog):
    """The log of a process that leaves writing and speaking to another."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, console=Console(quiet=True))

    def _whole(self, name: str, text: str) -> None:
        pass

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        pass


class Progress:
    """What `RunLog.progress` hands out."""

    def __init__(self, update: Callable[[int, dict[str, Any]], Any]) -> None:
        self._update = update

    def advance(self, n: int = 1, /, **numbers: Any) -> None:
        """`n` steps further. `numbers` (floats or 0-d tensors) are shown beside the bar; they are
        read only when the line is drawn, so that a device is not waited for at every step."""
        self._update(n, numbers)


_FIRST = ("reward", "accuracy", "tool_rate", "tokens_per_second", "loss")


def _numbers(numbers: Mapping[str, Any]) -> str:
    """`reward 0.81 · accuracy 93.1 % · ...`: the familiar ones first, then the rest."""
    names = [n for n in _FIRST if n in numbers] + [n for n in numbers if n not in _FIRST]
    out = []
    for name in names:
        value = plain(numbers[name])
        if value is None:
            shown = "not finite"
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            shown = str(value)
        elif name == "accuracy" or name.endswith(("_rate", "_share")) or "rate/" in name:
            shown = f"{value:.1%}".replace("%", " %")
        elif name == "tokens_per_second":
            shown = f"{value:,.0f}"
        else:
            shown = f"{value:.4g}"
        label = "tok/s" if name == "tokens_per_second" else name.replace("_", " ")
        out.append(f"{label} {shown}")
    return " · ".join(out)


class _Bars(RichProgress):
    """rich's bars, with a second line for the numbers of the stage that moved last."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan"),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta", style="dim"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
            refresh_per_second=4,
        )

    def get_renderables(self) -> Iterator[Any]:
        yield self.make_tasks_table(self.tasks)
        # The innermost stage that has something to show speaks.
        shown = [task.fields["numbers"] for task in self.tasks if task.fields.get("numbers")]
        if shown:
            yield Text(_numbers(shown[-1]), style="dim", no_wrap=True, overflow="ellipsis")


class _Lines:
    """Progress for a log file: at most a line in five seconds, about one in every tenth of the
    way, and never half a minute of silence."""

    def __init__(self, stage: str, total: int, say: Callable[[str], None]) -> None:
        self.stage, self.total, self.say = stage, total, say
        self.done = 0
        self.numbers: dict[str, Any] = {}
        self.started = self.last = time.monotonic()
        self.tenth = 0
        self.said = -1

    def update(self, n: int, numbers: dict[str, Any]) -> None:
        self.done += n
        self.numbers = numbers or self.numbers
        quiet = time.monotonic() - self.last
        tenth = 10 * self.done // max(self.total, 1)
        if (quiet >= 5 and tenth > self.tenth) or quiet >= 30:
            self.line()

    def line(self) -> None:
        now = time.monotonic()
        self.last, self.said = now, self.done
        self.tenth = 10 * self.done // max(self.total, 1)
        elapsed = now - self.started
        parts = [f"{self.stage} {self.done}/{self.total}", f"{elapsed:.0f} s"]
        if 0 < self.done < self.total:
            parts.append(f"eta {elapsed / self.done * (self.total - self.done):.0f} s")
        if self.numbers:
            parts.append(_numbers(self.numbers))
        self.say(" · ".join(parts))

    def close(self) -> None:
        if self.said != self.done:
            self.line()
