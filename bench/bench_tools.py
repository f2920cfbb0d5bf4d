"""What a call of the python tool costs, and what ten thousand of them leave behind.

    python -m bench.bench_tools                        (half a minute, printed)
    python -m bench.bench_tools --calls 10000 --out FILE    (two minutes, and written)

The call is numpy's mean of a crop of a photograph of 3840 x 2160, which comes back as an image. Its
cost is above that of a bare child: a process of the same libraries forks, the child does the same
work, its pixels come back over a pipe; no sandbox, no limits, no parsing. Exits 1 where a target of
TARGETS is missed or something is left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from bench import harness
from trainer.tools import PythonTool
from trainer.tools._processes import children
from trainer.types import Session

CODE = "crop = image_1.crop((1000, 1000, 1256, 1256))\nprint(np.asarray(crop).mean())\ncrop"

TARGETS = {
    "call_over_fork_ms": ("<=", 5.0),
    "new_session_ms": ("<=", 15.0),
    "calls_per_second": (">=", 150.0),
    "session_calls_per_second": (">=", 150.0),
}

BARE = """
import os, sys
import numpy, numpy.fft, numpy.linalg, numpy.random
from PIL import Image
image = Image.new("RGB", (3840, 2160))
while sys.stdin.buffer.readline():
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        crop = image.crop((1000, 1000, 1256, 1256))
        text = str(numpy.asarray(crop).mean()).encode()
        with os.fdopen(write, "wb") as pipe:
            pipe.write(crop.tobytes() + text)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    sys.stdout.buffer.write(len(data).to_bytes(8, "big") + data)
    sys.stdout.buffer.flush()
"""


class Bare:
    """A process that does nothing but fork."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", BARE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def __call__(self) -> None:
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        size = int.from_bytes(self.process.stdout.read(8), "big")
        self.process.stdout.read(size)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def latencies(rounds: int, image: Image.Image) -> dict[str, Any]:
    """Medians of one call at a time, in turn, in milliseconds."""
    bare = Bare()
    with (
        contextlib.closing(asyncio.new_event_loop()) as loop,
        PythonTool(workers=1, persistent=False) as once,
        PythonTool(workers=1) as kept,
    ):
        session = Session([image])
        ended: list[Session] = []

        def new_session() -> None:
            ended.append(Session([image]))
            loop.run_until_complete(kept.call(ended[-1], "1"))

        def before() -> None:  # off the clock
            session.images[1:] = []
            while ended:
                loop.run_until_complete(kept.end(ended.pop()))

        variants = {
            "bare fork": bare,
            "one call": lambda: once.run(CODE, [image]),
            "session's call": lambda: loop.run_until_complete(kept.call(session, CODE)),
            "new session": new_session,
        }
        times = harness.measure(variants, rounds, before=before, warmup=5)
        line = once.sandbox.describe()
    bare.close()
    return {
        "sandbox": line,
        "times": times,
        "call_over_fork_ms": times["one call"]["median_ms"] - times["bare fork"]["median_ms"],
        "new_session_ms": times["new session"]["median_ms"],
    }


def throughput(calls: int, image: Image.Image) -> dict[str, float]:
    """Calls a second, as many at a time as there are cores, 16 in flight."""

    async def rate(tool: PythonTool, sessions: list[Session], count: int) -> float:
        async def one(session: Session) -> None:
            for _ in range(count // len(sessions)):
                session.images[1:] = []
                observation = await tool.call(session, CODE)
                assert len(observation.images) == 1, observation

        await asyncio.gather(*(tool.call(session, "1") for session in sessions))  # warm
        start = time.perf_counter()
        await asyncio.gather(*map(one, sessions))
        return count // len(sessions) * len(sessions) / (time.perf_counter() - start)

    rates = {}
    for name, persistent in (("calls_per_second", False), ("session_calls_per_second", True)):
        with PythonTool(workers=os.cpu_count(), persistent=persistent) as tool:
            rates[name] = asyncio.run(rate(tool, [Session([image]) for _ in range(16)], calls))
    return rates


def state(tool: PythonTool, folder: str) -> dict[str, int]:
    """What there is of this process, of the tool's workers and of files."""
    family = [os.getpid()]
    for pid in family:
        family += children(pid)
    descriptors = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family)
    files = sum(len(files) for _, _, files in os.walk(folder))
    inside = 0  # of the workers' own file systems, which only root can look into
    for worker in children(os.getpid()) if tool.sandbox.bwrap else ():
        for zygote in children(worker):
            for _, folders, found in os.walk(f"/proc/{zygote}/root/tmp"):
                inside += len(folders) + len(found)
    return {
        "processes": len(family),
        "descriptors": descriptors,
        "files": files,
        "files inside": inside,
    }


def leaks(calls: int, image: Image.Image) -> dict[str, Any]:
    """State before and after so many calls, one in sixteen of which misbehaves."""
    codes = [CODE] * 13 + [
        "1 / 0",
        "import os\nopen('file', 'w').write('x' * 9999)\nif os.fork() == 0:\n os.setsid()\n"
        " while True: pass",
        "import os\nos._exit(1)",
    ]

    async def main(tool: PythonTool, count: int) -> None:
        async def trajectory(number: int) -> None:
            session = Session([image])
            for turn in range(4):
                session.images[1:] = []
                await tool.call(session, codes[(4 * number + turn) % len(codes)])
            await tool.end(session)

        for start in range(0, count // 4, 64):
            numbers = range(start, min(start + 64, count // 4))
            await asyncio.gather(*map(trajectory, numbers))

    record: dict[str, Any] = {"calls": calls}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            for name, persistent in (("one process a call", False), ("sessions", True)):
                with PythonTool(workers=2, persistent=persistent) as tool:
                    asyncio.run(main(tool, 128))
                    before = state(tool, folder)
                    asyncio.run(main(tool, calls))
                    record[name] = {"before": before, "after": state(tool, folder)}
        finally:
            del os.environ["TMPDIR"]
            tempfile.tempdir = None
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--throughput", type=int, default=1000, help="calls to count per second")
    parser.add_argument("--calls", type=int, default=1000, help="calls that must leave nothing")
    parser.add_argument("--out", type=Path, help="JSON file to write the results into")
    args = parser.parse_args()
    image = Image.radial_gradient("L").resize((3840, 2160)).convert("RGB")
    record = latencies(args.rounds, image)
    print(record["sandbox"])
    for name, times in record["times"].items():
        low, middle, high = (times[key] for key in ("p20_ms", "median_ms", "p80_ms"))
        print(f"{name:>16}  {middle:6.2f} ms   (p20 {low:.2f}, p80 {high:.2f})")
    record |= throughput(args.throughput, image)
    missed = []
    for name, (sign, bound) in TARGETS.items():
        holds = record[name] <= bound if sign == "<=" else record[name] >= bound
        print(f"{name:>26}  {record[name]:7.2f}  {sign} {bound:g}  {'ok' if holds else 'MISSED'}")
        missed += [] if holds else [name]
    record["leaks"] = leaks(args.calls, image)
    for name in ("one process a call", "sessions"):
        before, after = record["leaks"][name]["before"], record["leaks"][name]["after"]
        print(
            f"{args.calls:,} calls, {name}: {after}" + ("" if before == after else f" != {before}")
        )
        missed += [] if before == after else [name]
    if args.out:
        harness.write(args.out, "tools", [record])
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
