"""bench/aot.py: every kernel compiles for every architecture, and none spills. No GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def aot(*arguments: str) -> subprocess.CompletedProcess:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_kernel_compiles_without_a_spill():
    done = aot()
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = ("row_kernel", "statistics_kernel", "gradient_kernel", "logprobs.forward_kernel")
    kernels += ("logprobs.backward_kernel", "advantages_kernel", "merge_kernel")
    assert all(name in done.stdout for name in kernels)
    assert all(f"sm_{architecture}" in done.stdout for architecture in (80, 90, 100))
    assert done.stdout.rstrip().endswith("no spill")


def test_a_name_that_no_kernel_has_is_no_success():
    done = aot("--only", "no such kernel")
    assert done.returncode == 1
