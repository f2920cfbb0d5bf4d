"""The tool server under many trajectories at once, some of whose calls are meant to hurt it.

    python -m bench.bench_tool_server                        (60 s, 256 sessions, 5 % hostile)
    python -m bench.bench_tool_server --seconds 8 --sessions 64 --kill

Every trajectory is a session with one image and a few calls, of python (in its sandbox) and of a
tool that costs nothing. Answers are checked, so a lost or swapped one is seen. --kill ends a worker
of the python tool with SIGKILL now and then: its trajectories get infra_error, the others go on.
Printed: calls by kind and status, latencies as the trainer sees them, and what the server counted
itself. Exit code 1 where a call was lost, answered wrongly or run twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from trainer.tools import FunctionTool, PythonTool, Toolbox
from trainer.tools.client import RemoteToolbox, httpx
from trainer.tools.server import serve
from trainer.tools.service import ServerLimits
from trainer.types import Observation, Session

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = {
    "malformed JSON": ('{"name": "python", "arguments": {"code": ', "tool_error"),
    "deep JSON": ("[" * 20_000, "tool_error"),
    "unknown tool": ('{"name": "rm", "arguments": {}}', "tool_error"),
    "endless loop": ("while True: pass", "tool_error"),
    "huge output": ("print('x' * 50_000_000)", "ok"),
    "crash": ("import os; os.kill(os.getpid(), 11)", "tool_error"),
    "memory": ("x = bytearray(1 << 40)", "tool_error"),
}
"""Kind -> what is called (as text, or as code of python), and the status that it must get."""


@FunctionTool
def echo(session: Session, text: str) -> str:
    """Repeat the text."""
    return f"{text} {session.seed} {session.calls}"


def toolbox(timeout: float = 0.5) -> Toolbox:
    return Toolbox([PythonTool(timeout=timeout), echo])


@dataclass
class Tally:
    """What became of the calls."""

    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[str] = field(default_factory=list)
    sessions: int = 0

    def add(self, kind: str, seconds: float, observation: Observation) -> None:
        self.statuses[kind, observation.status] += 1
        self.seconds[kind].append(seconds)

    @property
    def calls(self) -> int:
        return sum(self.statuses.values())

    def count(self, status: str) -> int:
        return sum(n for (_, one), n in self.statuses.items() if one == status)


def _call(name: str, **arguments: object) -> str:
    return json.dumps({"name": name, "arguments": arguments})


async def trajectory(box: RemoteToolbox, seed: int, hostile: float, tally: Tally) -> None:
    """One session of four calls; every ordinary answer is compared with the right one."""
    rng = random.Random(seed)
    picture = Image.new("RGB", (64, 48), (seed % 256, seed // 256 % 256, 7))
    session = Session([picture], seed=seed)
    tally.sessions += 1
    for _ in range(4):
        expected = None
        if rng.random() < hostile:
            kind = rng.choice(list(HOSTILE))
            text, status = HOSTILE[kind]
            text = text if text[0] in "[{" else _call("python", code=text)
        elif rng.random() < 0.5:
            kind, status = "echo", "ok"
            text, expected = _call("echo", text="hello"), f"hello {seed} {session.calls + 1}"
        else:
            kind, status = "python", "ok"
            code = f"print(image_1.size, image_1.getpixel((3, 3))[0], {seed} * 7)"
            text = _call("python", code=code)
            expected = f"(64, 48) {seed % 256} {seed * 7}"
        start = time.perf_counter()
        _, observation = await box.execute(text, session)
        tally.add(kind, time.perf_counter() - start, observation)
        if observation.status == "infra_error":
            break
        # Behind a note, where the session's process had to be started again.
        right = expected is None or observation.text.splitlines()[-1] == expected
        if observation.status != status or not right:
            tally.wrong.append(f"{kind}: {observation.status} {observation.text[:200]!r}")
    await box.end(session)


async def load(url: str, sessions: int, seconds: float, hostile: float) -> Tally:
    """`sessions` trajectories at a time for so many seconds, each to its end."""
    tally, end = Tally(), time.monotonic() + seconds
    numbers = iter(range(1, 1 << 40))

    async def one(box: RemoteToolbox) -> None:
        while time.monotonic() < end:
            await trajectory(box, next(numbers), hostile, tally)

    async with RemoteToolbox(url) as box:
        await asyncio.gather(*(one(box) for _ in range(sessions)))
    return tally


def metrics(url: str) -> dict[str, float]:
    """Sums of the server's samples by name."""
    totals: dict[str, float] = defaultdict(float)
    for line in httpx.get(f"{url}/metrics", trust_env=False).text.splitlines():
        if not line.startswith("#") and "_bucket" not in line:
            name = line.partition("{")[0].partition(" ")[0]
            totals[name] += float(line.rpartition(" ")[2])
    return totals


def kill_a_worker(server: int, rng: random.Random) -> bool:
    """SIGKILL for one process below the server; False where there is none."""
    below = psutil.Process(server).children(recursive=True)
    if not below:
        return False
    try:
        rng.choice(below).send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True


def start(limits: ServerLimits | None = None) -> tuple[subprocess.Popen[str], str]:
    """The server as a process of its own, and its URL."""
    command = [sys.executable, "-m", "bench.bench_tool_server", "--serve"]
    limits = limits or ServerLimits()
    command += ["--limits", json.dumps(vars(limits))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    url = process.stdout.readline().strip()
    if not url.startswith("http"):
        process.kill()
        raise RuntimeError("the server has not started")
    return process, url


def run(
    sessions: int, seconds: float, hostile: float, kill: bool, limits: ServerLimits | None = None
) -> tuple[Tally, dict[str, float]]:
    """Starts a server, loads it, stops it. Returns what the client saw and what the server did."""
    process, url = start(limits)
    try:
        killed = 0

        async def killing() -> None:
            nonlocal killed
            rng = random.Random(0)
            while True:
                await asyncio.sleep(seconds / 5)
                killed += await asyncio.to_thread(kill_a_worker, process.pid, rng)

        async def both() -> Tally:
            task = asyncio.create_task(killing()) if kill else None
            try:
                return await load(url, sessions, seconds, hostile)
            finally:
                if task is not None:
                    task.cancel()

        began = time.monotonic()
        tally = asyncio.run(both())
        server = dict(metrics(url))
        server["wall_seconds"] = time.monotonic() - began
        server["workers_killed"] = killed
        server["descriptors"] = psutil.Process(process.pid).num_fds()
        server["rss_mib"] = psutil.Process(process.pid).memory_info().rss / (1 << 20)
        process.terminate()
        server["exit_code"] = process.wait(60)
        return tally, server
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def faults(tally: Tally, server: dict[str, float], kill: bool) -> list[str]:
    """What is not as it must be; empty where nothing was lost."""
    found = list(dict.fromkeys(tally.wrong))[:10]
    if server["metis_tools_calls_total"] != tally.calls:
        found.append(f"{tally.calls} calls, but the server ran {server['metis_tools_calls_total']}")
    if server["metis_tools_sessions"] or server["metis_tools_calls_running"]:
        found.append("the server still holds sessions or calls")
    if server["metis_tools_sessions_ended_total"] != tally.sessions:
        ended = server["metis_tools_sessions_ended_total"]
        found.append(f"{tally.sessions} sessions were opened and {ended:.0f} ended")
    if tally.count("infra_error") and not kill:
        found.append(f"{tally.count('infra_error')} calls got infra_error")
    if server["exit_code"] != 0:
        found.append(f"the server's exit code is {server['exit_code']}")
    return found


def show(tally: Tally, server: dict[str, float]) -> None:
    print(f"{'kind':16} {'calls':>7} {'ok':>7} {'tool_error':>10} {'infra':>6} ", end="")
    print(f"{'p50':>8} {'p95':>8} {'p99':>8} {'max':>8}  (ms)")
    for kind, seconds in sorted(tally.seconds.items()):
        counts = [tally.statuses[kind, s] for s in ("ok", "tool_error", "infra_error")]
        p50, p95, p99 = np.percentile(seconds, (50, 95, 99)) * 1e3
        print(f"{kind:16} {sum(counts):7} {counts[0]:7} {counts[1]:10} {counts[2]:6} ", end="")
        print(f"{p50:8.1f} {p95:8.1f} {p99:8.1f} {max(seconds) * 1e3:8.1f}")
    wall = server["wall_seconds"]
    print(
        f"{tally.calls} calls of {tally.sessions} trajectories in {wall:.1f} s "
        f"({tally.calls / wall:.0f}/s); refused with 429 and asked again: "
        f"{server.get('metis_tools_refused_total', 0):.0f}; python workers killed: "
        f"{server['workers_killed']:.0f}; server at the end: {server['rss_mib']:.0f} MiB, "
        f"{server['descriptors']:.0f} descriptors, exit code {server['exit_code']:.0f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--hostile", type=float, default=0.05)
    parser.add_argument("--queue", type=int, default=ServerLimits.queue)
    parser.add_argument("--concurrency", type=int, default=ServerLimits.concurrency)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--limits", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        limits = ServerLimits(**json.loads(args.limits))
        serve(toolbox(), port=0, limits=limits, ready=lambda url: print(url, flush=True))
        return 0
    limits = ServerLimits(queue=args.queue, concurrency=args.concurrency)
    tally, server = run(args.sessions, args.seconds, args.hostile, args.kill, limits)
    print(f"{os.cpu_count()} cores, {args.sessions} sessions, {100 * args.hostile:g} % hostile")
    show(tally, server)
    found = faults(tally, server, args.kill)
    for fault in found:
        print(f"FAULT: {fault}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
