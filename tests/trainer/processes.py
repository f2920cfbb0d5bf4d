"""`metis` in a process of its own that starts at once: forked from one that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "trainer.cli", "trainer.config", "trainer.sft", "trainer.rl", "trainer.evaluate",
        "trainer.report", "trainer.records", "trainer.tasks.glyphs", "trainer.tasks.file",
        "trainer.engines.remote", "trainer.curate.report", "trainer.curate.models", "imagehash",
        "data_files",
    ]
)  # fmt: skip


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def start(
    arguments: Sequence[object],
    out: Path,
    err: Path | None = None,
    *,
    cwd: Path | None = None,
    file_bytes: int | None = None,
) -> multiprocessing.Process:
    """`metis ARGUMENTS` in a process group of its own. What it says is added to the file out, its
    complaints to err (None: to out). file_bytes: no file may become longer, as on a full disk."""
    words = [str(argument) for argument in arguments]
    given = (words, str(out), str(err or out), cwd and str(cwd), file_bytes)
    process = _CONTEXT.Process(target=_run, args=given)
    process.start()
    return process


def metis(*arguments: object, cwd: Path) -> Done:
    """`metis ARGUMENTS` from beginning to end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(arguments, out, err, cwd=cwd)
        process.join(240)
        if process.exitcode is None:
            process.kill()
            process.join()
        return Done(process.exitcode, out.read_text(), err.read_text())


def _run(words: list[str], out: str, err: str, cwd: str | None, file_bytes: int | None) -> None:
    os.setpgrp()
    for path, descriptor in ((out, 1), (err, 2)):
        with open(path, "ab", buffering=0) as file:
            os.dup2(file.fileno(), descriptor)
    if cwd is not None:
        os.chdir(cwd)
    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    os.environ["HF_HUB_OFFLINE"] = "1"
    from trainer.cli import main

    sys.exit(main(words))
