"""The tests of the C++ core, with AddressSanitizer and UndefinedBehaviorSanitizer in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pybind11 = pytest.importorskip("pybind11")

LOAD = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("metis_kernels._C", {path!r})
spec = importlib.util.spec_from_loader("metis_kernels._C", loader)
module = sys.modules["metis_kernels._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from metis_kernels import _cpp
assert _cpp._C is module, _cpp._C
"""
"""In front of a program: the extension at path takes the place of the installed one."""


@pytest.fixture(scope="module")
def extension(tmp_path_factory) -> Path:
    """The extension, compiled with both sanitizers."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed: pip install cmake")
    build = tmp_path_factory.mktemp("sanitized")
    configure = [
        "cmake", "-S", ROOT, "-B", build, "-DMETIS_SANITIZE=ON",
        f"-DPYTHON_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", build, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return next(build.glob("_C*.so"))


def run(extension: Path, program: str) -> subprocess.CompletedProcess[str]:
    """A Python program with the sanitized extension."""
    libraries = [
        subprocess.run(
            ["c++", f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the second for exceptions to be seen by it
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("the compiler has no libasan.so to load before Python")
    environment = dict(os.environ, LD_PRELOAD=" ".join(libraries), OMP_NUM_THREADS="2")
    # What Python and torch never free is not what is looked for here.
    environment |= dict(ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1")
    return subprocess.run(
        [sys.executable, "-c", LOAD.format(path=str(extension)) + program],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tests", ["test_cpp.py", "test_packing.py"])
def test_nothing_reads_or_writes_where_it_must_not(extension, tests):
    program = "import pytest; sys.exit(pytest.main(['-q', '-x', '-s', '-p', 'no:cacheprovider', "
    done = run(extension, program + f"'tests/{tests}']))")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_a_sanitizer_that_finds_something_says_so(extension):
    program = """
import torch
z, row = torch.zeros(64), torch.zeros(1)
tensor = lambda name, x, shape: _cpp._C.Tensor(
    name, x.data_ptr(), str(x.dtype)[6:], shape, [shape[-1], 1][-len(shape):])
per_row = [tensor(n, row, [1]) for n in ("peak", "total", "moment")]
label = torch.zeros(1, dtype=torch.int64)
_cpp._C.row_statistics(
    tensor("logits", z, [1, 4096]), tensor("target", row, [1]), tensor("label", label, [1]),
    *per_row, _cpp._C.HeadOptions(1.0, 0.0), _cpp._C.Runtime(1, ""))
"""
    done = run(extension, program)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr
