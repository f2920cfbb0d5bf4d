"""bench/aot.py: every kernel compiles for every architecture, and none spills in a loop. No GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def aot(*arguments: str) -> subprocess.CompletedProcess:
    return python("-m", "bench.aot", *arguments)


def test_every_kernel_compiles_without_a_spill():
    done = aot()
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = ("row_kernel", "statistics_kernel", "gradient_kernel", "logprobs.forward_kernel")
    kernels += ("logprobs.backward_kernel", "advantages_kernel", "merge_kernel")
    assert all(name in done.stdout for name in kernels)
    assert all(f"sm_{architecture}" in done.stdout for architecture in (80, 90, 100))
    assert done.stdout.rstrip().endswith("no spill in a loop")


SPILLS = """
from dataclasses import replace
from bench import aot
case = next(case for case in aot.cases() if case.name.startswith("row_kernel hdpo entropy softcap"))
big = replace(case, constants=case.constants | {"BLOCK": 2048}, warps=1)  # 64 columns a thread
found = aot.compile_case(big, 90)
assert found.stack and found.looped > 50, found  # triton 3.8: 100, 3.9: 232

def counted(*lines):
    return aot.local_accesses_in_loops("\\n".join(lines))

loop = [".L_x_1:", "  LDG.E R1 ;", "  @!P0 BRA `(.L_x_1) ;"]
assert counted("  STL [R1], R20 ;", "  BRA `(.L_x_2) ;", *loop, ".L_x_2:", "  LDL R20, [R1] ;") == 0
assert counted(*loop[:2], "  STL [R1], R20 ;", "  LDL R20, [R1] ;", loop[2]) == 2
"""


def test_a_spill_in_a_loop_is_seen():
    done = python("-c", SPILLS)
    assert done.returncode == 0, done.stderr


def test_a_name_that_no_kernel_has_is_no_success():
    done = aot("--only", "no such kernel")
    assert done.returncode == 1
