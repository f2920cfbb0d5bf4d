"""How a number comes about: correct first, then interleaved times, memory in its own process.

A benchmark is a module with `variants(args) -> dict[str, Callable[[], None]]`, each a closure over
the same inputs that runs the whole of what is timed. `main` in it hands them to `measure` and
`peak_bytes`, and the result to `write`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import metis_kernels
from metis_kernels import _triton

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


FLUSH_BYTES = 256 << 20
"""Written between two measurements on a GPU: five times what its L2 cache holds."""


def measure(
    variants: dict[str, Callable[[], None]],
    rounds: int = 15,
    before: Callable[[], None] = lambda: None,
    warmup: int = 2,
) -> dict[str, dict[str, float]]:
    """Milliseconds per variant: median, 20th and 80th percentile.

    Each round runs every variant once, in turn from another start, so that a machine that slows
    down slows all of them. before runs ahead of each, off the clock. On a GPU the clock is the
    device's, and caches are cold.
    """
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    clock = _gpu_milliseconds if torch.cuda.is_available() else _cpu_milliseconds
    for step in range(warmup + rounds):
        for i in range(len(names)):
            name = names[(i + step) % len(names)]
            before()
            taken = clock(variants[name])
            if step >= warmup:
                times[name].append(taken)
    return {
        name: {
            "median_ms": statistics.median(t),
            "p20_ms": statistics.quantiles(t, n=5)[0],
            "p80_ms": statistics.quantiles(t, n=5)[3],
        }
        for name, t in times.items()
    }


def _cpu_milliseconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _gpu_milliseconds(run: Callable[[], None]) -> float:
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_bytes(run: Callable[[], None]) -> int:
    """Bytes that run adds at its peak to what this process holds.

    On the CPU this is resident memory (Linux), so it includes BLAS's own buffers, and one call per
    process: an allocator that has grown stays grown.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # 5 resets the high-water mark of resident memory.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def peak_in_subprocess(module: str, variant: str, arguments: list[str]) -> int:
    """`peak_bytes` of one variant of a benchmark module, in a fresh process whose malloc gives
    blocks back: else resident memory counts what has long been freed."""
    command = [sys.executable, "-m", module, *arguments, "--probe", variant]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def stamp() -> dict[str, object]:
    """Where and with what the numbers were taken."""
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": None if _triton.triton is None else _triton.triton.__version__,
        "metis_kernels": metis_kernels.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(
            _git("status", "--porcelain", "--", "metis_kernels", "bench", ":(exclude)bench/results")
        ),
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {os.cpu_count()} cores"
    return platform.processor() or "unknown"


def write(path: Path, benchmark: str, records: list[dict]) -> None:
    """Sets benchmark's entry in the JSON file at path; other benchmarks' entries stay."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content[benchmark] = {"stamp": stamp(), "records": records}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: memory can be measured on Linux only")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()
