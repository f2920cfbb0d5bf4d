"""The run folder, strict JSON, progress on a terminal and in a file, and a full disk."""

from __future__ import annotations

import errno
import io
import json
import math
import os

import numpy
import pytest
import torch
import yaml
from rich.console import Console

from trainer import log as log_module
from trainer.log import RUN_FILES, RunError, RunLog, open_run, strict_json


def strict(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def read_lines(path) -> list[dict]:
    return [strict(line) for line in path.read_text().splitlines()]


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=100, **options)


@pytest.fixture
def folder(tmp_path):
    return open_run(tmp_path / "runs", "demo")


# ---- the folder


def test_open_run_creates_the_folder_and_leaves_it_empty(tmp_path):
    folder = open_run(tmp_path / "a" / "b", "demo")
    assert folder == tmp_path / "a" / "b" / "demo"
    assert list(folder.iterdir()) == []


def test_an_existing_run_is_refused(tmp_path, folder):
    (folder / "config.yaml").write_text("kept")
    with pytest.raises(RunError, match="demo' exists already. Choose another name, or .*overwrite"):
        open_run(tmp_path / "runs", "demo")
    assert (folder / "config.yaml").read_text() == "kept"


def test_overwrite_removes_only_what_a_run_writes(tmp_path, folder):
    for name in RUN_FILES:
        (folder / name).write_text("old")
    for name in ("sft", "final", "compare", "notes"):
        (folder / name / "deep").mkdir(parents=True)
        (folder / name / "deep" / "weights").write_text("old")
    (folder / "thoughts.txt").write_text("mine")
    assert open_run(tmp_path / "runs", "demo", overwrite=True) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "thoughts.txt"]
    assert (folder / "notes" / "deep" / "weights").read_text() == "old"


def test_overwrite_removes_links_and_not_what_they_point_at(tmp_path, folder):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("mine")
    (elsewhere / "config").write_text("mine")
    (folder / "sft").symlink_to(elsewhere)
    (folder / "config.yaml").symlink_to(elsewhere / "config")
    (folder / "summary.json").symlink_to(tmp_path / "dangling")
    open_run(tmp_path / "runs", "demo", overwrite=True)
    assert list(folder.iterdir()) == []
    assert sorted(path.name for path in elsewhere.iterdir()) == ["config", "weights"]


def test_overwrite_refuses_a_folder_that_is_no_run(tmp_path):
    data = tmp_path / "data"
    (data / "sft").mkdir(parents=True)
    (data / "sft" / "train.jsonl").write_text("mine")
    with pytest.raises(RunError, match="does not look like a run .*'sft' is not removed"):
        open_run(tmp_path, "data", overwrite=True)
    assert (data / "sft" / "train.jsonl").read_text() == "mine"


def test_overwrite_removes_nothing_when_a_file_of_the_run_is_a_folder(tmp_path, folder):
    (folder / "metrics.jsonl").write_text("old")
    (folder / "compare.json").mkdir()
    with pytest.raises(RunError, match="compare.json' is a folder.*nothing was removed"):
        open_run(tmp_path / "runs", "demo", overwrite=True)
    assert (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../up", "/root", "nul\0"])
def test_names_that_leave_the_root_are_refused(tmp_path, name):
    with pytest.raises(RunError, match="not a plain folder name"):
        open_run(tmp_path, name, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(RunError, match=r"file' is a file.*Choose another root"):
            open_run(root, "demo")
    with pytest.raises(RunError, match="file' is a file. Choose another run name"):
        open_run(tmp_path, "file", overwrite=True)
    with pytest.raises(RunError, match="too long"):
        open_run(tmp_path, "x" * 300)


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "disk is full. Free some space"),
        (errno.EACCES, "not writable"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "Input/output error. Choose another root"),
    ],
)
def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    tmp_path, monkeypatch, number, words
):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=words):
        open_run(tmp_path, "demo")
    assert list((tmp_path / "demo").iterdir()) == []


# ---- what is written


def test_metrics_are_strict_json_line_by_line(folder):
    with RunLog(folder) as log:
        log.metrics(
            "rl",
            3,
            loss=torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True),
            accuracy=numpy.float32(0.25),
            calls=numpy.int64(7),
            double=numpy.float64(1.5),
            grad_norm=math.nan,
            ratio_max=torch.tensor(math.inf),
            **{"tool_rate/glyph_small": -math.inf, "accuracy/x": 1, "list": [1.0, math.nan]},
        )
        # Readable while the run goes on.
        (line,) = read_lines(folder / "metrics.jsonl")
        log.metrics("rl", 4, loss=0.0)
    assert line.pop("seconds") >= 0
    assert line == {
        "stage": "rl",
        "step": 3,
        "loss": 0.5,
        "accuracy": 0.25,
        "calls": 7,
        "double": 1.5,
        "grad_norm": None,
        "ratio_max": None,
        "tool_rate/glyph_small": None,
        "accuracy/x": 1,
        "list": [1.0, None],
        "nonfinite": ["grad_norm", "ratio_max", "tool_rate/glyph_small", "list"],
    }
    first, second = read_lines(folder / "metrics.jsonl")
    assert "nonfinite" not in second and second["seconds"] >= first["seconds"]


def test_reserved_and_unknown_values_are_refused(folder):
    log = RunLog(folder)
    with pytest.raises(ValueError, match="'seconds' is written by the log"):
        log.metrics("rl", 0, seconds=1.0)
    with pytest.raises(TypeError, match="cannot log model: a object has no JSON form"):
        log.metrics("rl", 0, model=object())
    assert not (folder / "metrics.jsonl").exists()


def test_rollouts_keep_hostile_text(folder):
    text = 'line\nbreak "quote" \u2028 \x00 lone \ud800 </script>'
    with RunLog(folder) as log:
        log.rollouts({"step": i, "tokens": [[text, i, True, -math.inf]]} for i in range(2))
    lines = read_lines(folder / "rollouts.jsonl")
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["tokens"][0][0] == text
    assert lines[0]["tokens"][0][3] is None and lines[0]["nonfinite"] == ["tokens"]


def test_config_round_trips_in_order(folder, tmp_path):
    config = {"z": 1, "a": {"rate": numpy.float64(0.5), "path": tmp_path, "pair": (1, 2)}, "ü": "é"}
    with RunLog(folder) as log:
        log.config(config)
    back = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    assert back == {"z": 1, "a": {"rate": 0.5, "path": str(tmp_path), "pair": [1, 2]}, "ü": "é"}
    assert list(back) == ["z", "a", "ü"]


def test_summary_is_whole_or_not_there(folder, monkeypatch):
    log = RunLog(folder)
    log.summary({"seconds": 1.0, "final": {"accuracy": math.nan}})
    summary = strict((folder / "summary.json").read_text())
    assert summary["final"]["accuracy"] is None and summary["nonfinite"] == ["final.accuracy"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="summary.json.*No space left.*Free some space"):
        log.summary({"seconds": 2.0})
    assert strict((folder / "summary.json").read_text()) == summary
    assert [path.name for path in folder.iterdir()] == ["summary.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_says_what_is_safe(folder):
    log = RunLog(folder)
    log.config({"a": 1})
    for step in range(3):
        log.metrics("rl", step, loss=1.0)
    (folder / "rollouts.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError) as caught:
        log.rollouts([{"step": 0}])
    message = str(caught.value)
    assert "rollouts.jsonl': No space left on device" in message
    assert "config.yaml, 3 lines of metrics.jsonl" in message
    assert "Free some space and run again" in message
    log.close()
    log.close()
    assert len(read_lines(folder / "metrics.jsonl")) == 3


def test_a_line_that_does_not_fit_is_taken_back(folder):
    """A disk that fills up within a line leaves the whole lines before it, and no more."""

    class Filling(io.FileIO):
        def write(self, data):
            if len(data) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(bytes(data)[:20])

    log = RunLog(folder)
    log.metrics("rl", 0, loss=1.0)
    log._handles["metrics.jsonl"] = Filling(folder / "metrics.jsonl", "ab")
    with pytest.raises(RunError, match="1 line of metrics.jsonl"):
        log.metrics("rl", 1, loss=2.0)
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [0]


def test_leaving_after_an_error_keeps_that_error(folder):
    with pytest.raises(KeyboardInterrupt), RunLog(folder) as log:
        log.metrics("sft", 0, loss=1.0)
        raise KeyboardInterrupt
    assert len(read_lines(folder / "metrics.jsonl")) == 1


def test_strict_json_sorts_sets_and_keeps_bools():
    assert strict(strict_json({"s": {3, 1}, "b": True, "n": None})) == {
        "s": [1, 3], "b": True, "n": None,
    }  # fmt: skip


# ---- the terminal


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    return now


def test_progress_in_a_file_is_short(folder, clock):
    out = console()
    log = RunLog(folder, console=out)
    with log.progress("rl", 300) as bar:
        for _ in range(300):
            clock[0] += 1
            bar.advance(loss=torch.tensor(0.25), tool_rate=0.4, tokens_per_second=12345.6)
    lines = out.file.getvalue().splitlines()
    assert 10 <= len(lines) <= 12
    assert lines[-1] == "rl 300/300 · 300 s · tool rate 40.0 % · tok/s 12,346 · loss 0.25"
    assert lines[0].startswith("rl 30/300 · 30 s · eta 270 s · tool rate")
    assert "\x1b" not in out.file.getvalue()


def test_progress_in_a_file_breaks_a_long_silence(folder, clock):
    out = console()
    with RunLog(folder, console=out).progress("rl", 1000) as bar:
        for _ in range(4):
            clock[0] += 16
            bar.advance()
    assert [line.split(" · ")[0] for line in out.file.getvalue().splitlines()] == [
        "rl 2/1000",
        "rl 4/1000",
    ]


def test_a_quick_stage_takes_one_line(folder):
    out = console()
    with RunLog(folder, console=out).progress("evaluate", 50) as bar:
        for _ in range(5):
            bar.advance(10, accuracy=math.nan)
    (line,) = out.file.getvalue().splitlines()
    assert line.startswith("evaluate 50/50") and line.endswith("accuracy not finite")


def test_progress_on_a_terminal_nests_and_survives_markup(folder):
    out = console(force_terminal=True)
    with RunLog(folder, console=out) as log:
        with log.progress("rl [red]", 4) as outer:
            outer.advance(reward=0.5, accuracy=0.9)
            with log.progress("evaluate", 2) as inner:
                inner.advance(2)
            log.say("[bold]as it is[/bold]")
            outer.advance(3, reward=0.75, accuracy=1.0)
        with log.progress("again", 1) as bar:
            bar.advance()
    text = out.file.getvalue()
    assert "rl [red]" in text and "[bold]as it is[/bold]" in text
    assert "reward 0.75 · accuracy 100.0 %" in text and "4/4" in text
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_an_interrupted_bar_gives_the_cursor_back(folder):
    out = console(force_terminal=True)
    with pytest.raises(KeyboardInterrupt), RunLog(folder, console=out) as log:
        with log.progress("rl", 4):
            raise KeyboardInterrupt
    assert out.file.getvalue().endswith("\x1b[?25h")
