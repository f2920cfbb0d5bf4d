"""The tool server under test, as a process of its own, and its tools.

    python tool_server.py '{"port": 0, "token": null, "limits": {"queue": 4}, "ended": FILE}'

It prints its URL. Every session that its tools are told has ended is a line of FILE.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from trainer.tools import FunctionTool, Toolbox, ToolError, ToolInfraError
from trainer.tools.client import httpx
from trainer.types import Observation, Session

ROOT = Path(__file__).resolve().parents[2]
UNAVAILABLE = Observation("Error: the tool is unavailable", status="infra_error")
"""What a trajectory sees of infrastructure that failed."""


# --- The tools ------------------------------------------------------------------------------------


@FunctionTool
def shout(session: Session, text: str, times: int = 1) -> str:
    """Say it louder."""
    return f"{text.upper() * times} (seed {session.seed}, call {session.calls})"


@FunctionTool
def flip(session: Session, image: int) -> list:
    """Flip image number `image`."""
    if not 1 <= image <= len(session.images):
        raise ToolError(f"there is no image_{image}")
    return ["flipped", session.images[image - 1].transpose(Image.Transpose.FLIP_LEFT_RIGHT)]


@FunctionTool
def describe(session: Session) -> str:
    """What images there are, and whether they are those of another session."""
    return " ".join(f"{i.mode}{i.size}{i.getpixel((0, 0))}@{id(i)}" for i in session.images)


@FunctionTool
async def wait(seconds: float) -> str:
    """Wait."""
    await asyncio.sleep(seconds)
    return f"waited {seconds:g}"


@FunctionTool
def hang() -> str:
    """Never return, and take no notice of being cancelled."""
    time.sleep(60)
    return "never"


@FunctionTool
def broken(kind: str) -> str:
    """Fail."""
    raise {"infra": ToolInfraError, "bug": KeyError, "policy": ToolError}[kind]("because")


class Counter:
    """Counts its calls, for every session and in all, and notes which sessions have ended."""

    name = "count"

    def __init__(self, ended: str | None = None):
        self.of: dict[str, int] = {}
        self.total = 0
        self.ended = ended

    async def call(self, session: Session, seconds: float = 0.0) -> Observation:
        """Count the calls."""
        self.total += 1
        self.of[session.id] = self.of.get(session.id, 0) + 1
        await asyncio.sleep(seconds)
        return Observation(f"{self.of[session.id]} of {self.total}")

    async def end(self, session: Session) -> None:
        self.of.pop(session.id, None)
        if self.ended:
            with open(self.ended, "a") as file:
                file.write(session.id + "\n")


def toolbox(ended: str | None = None) -> Toolbox:
    return Toolbox([shout, flip, describe, wait, hang, broken, Counter(ended)], max_text=500)


class Process:
    """The server as a process; `url` is where it answers."""

    def __init__(self, **settings):
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **os.environ}
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(settings)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http"), "the server has not started"

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = 15.0) -> int:
        """SIGTERM; -> exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop(5.0)
        self.kill()
        self.process.stdout.close()


# --- What tests say to it -------------------------------------------------------------------------


def call(name, **arguments):
    return json.dumps({"name": name, "arguments": arguments})


def client(server):
    return httpx.Client(base_url=server.url, trust_env=False)


def picture(colour=(1, 2, 3), size=(8, 6), mode="RGB"):
    return Image.new("RGB", size, colour).convert(mode)


def metric(client, name):
    """The value of a sample of GET /metrics, 0 where there is none."""
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.rpartition(" ")[2])
    return 0.0


def wait_for_calls(client, running, queued=0, seconds=10.0):
    """Until so many calls run at the server and so many wait for their turn."""
    end = time.monotonic() + seconds
    while True:
        found = [metric(client, f"metis_tools_calls_{state}") for state in ("running", "queued")]
        if found == [running, queued]:
            return
        assert time.monotonic() < end, found
        time.sleep(0.01)


def opened(http, **body):
    return http.post("/sessions", json=body).json()["id"]


if __name__ == "__main__":
    from trainer.tools.server import serve
    from trainer.tools.service import ServerLimits

    given = json.loads(sys.argv[1])
    serve(
        toolbox(given.get("ended")),
        port=given.get("port", 0),
        token=given.get("token"),
        limits=ServerLimits(**given.get("limits", {})),
        ready=lambda url: print(url, flush=True),
    )
    os._exit(0)  # a tool that hangs is left behind, as `metis tools serve` leaves it
