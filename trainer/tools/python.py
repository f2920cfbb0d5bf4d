"""The python tool: the policy's code runs in a sandbox, in a process forked from a warm one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import queue
import signal
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from trainer.tools import sandbox as walls
from trainer.tools._python_pool import Request, Worker, read_result
from trainer.tools.protocol import ToolInfraError, spec_from_signature
from trainer.tools.toolbox import ImageLimits
from trainer.types import Observation, Session

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
"""Past the code's own limit, for the fork, the clean-up and the transfer: then the worker hangs."""


class PythonTool:
    """Runs Python code in a sandbox: see `sandbox` for its walls, SECURITY.md for what they hold.

    A pool of workers, each a sandboxed process that has numpy and PIL imported (and matplotlib,
    from the first code that names it), forks a child for every session, in which variables,
    imports and files live from call to call; with persistent=False, one for every call. The child
    has no network, a private working directory, nothing else to write to, nothing to read but the
    system's and the interpreter's programs, and limits on time (wall clock, then SIGKILL for all
    that it started), memory, processes, files and disk. Its result is a frame whose every size is
    checked, with pixels as raw RGB: nothing is unpickled and nothing decoded.

    A call that times out or crashes ends its session's process; the next one starts a new one, and
    says that the state is lost. `end` frees what a session holds. Raises SandboxError on a machine
    that cannot hold the code, unless `unsafe_no_sandbox`.

    Random generators are seeded by the session and the number of the call that starts a process,
    and string hashes are fixed, so the same calls give the same observations. A worker remembers
    images that it was sent: an image must not be changed in place once it is a session's.
    """

    name = "python"

    def __init__(
        self,
        *,
        timeout: float = 10.0,
        memory: int = 1 << 30,
        file_size: int = 16 << 20,
        workers: int | None = None,
        max_text: int = 8_192,
        images: ImageLimits | None = None,
        persistent: bool = True,
        max_sessions: int = 64,
        processes: int = 64,
        disk: int = 32 << 20,
        unsafe_no_sandbox: bool | None = None,
        sandbox: walls.Sandbox | None = None,
    ):
        """timeout: seconds of wall clock per call. memory: bytes of address space per process
        beside the interpreter's own, and of memory for all processes of a call together.
        file_size: bytes of one file; disk: of all that a session writes. processes: with threads,
        per call. workers: sandboxes, and calls at a time; None: two, or one on a single core.
        max_text: characters kept of what the code prints. max_sessions: that are alive at a time;
        the one unused for longest makes room. unsafe_no_sandbox: None is what
        `sandbox.permit_unsafe` was told. sandbox: instead of the machine's own (`sandbox.probe`).
        Nothing starts before the first call."""
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout must be positive and finite, got {timeout}")
        if memory < 1 or file_size < 0 or max_text < 1:
            raise ValueError("memory and max_text must be positive, file_size not negative")
        if disk < 1 or processes < 1 or max_sessions < 1:
            raise ValueError("disk, processes and max_sessions must be positive")
        workers = min(2, os.cpu_count() or 1) if workers is None else workers
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.sandbox = walls.choose(unsafe_no_sandbox) if sandbox is None else sandbox
        self.timeout = timeout
        self.max_text = max_text
        self.persistent = persistent
        self.images = images or ImageLimits()
        sessions = -(-max_sessions // workers) if persistent else 0
        self._limits = {
            "seconds": timeout,
            "memory": memory,
            "file": file_size,
            "disk": disk,
            "processes": processes,
            "sessions": sessions,
            "files": 128 + 4 * sessions,
            "text": max_text,
            "images": self.images.count,
            "pixels": self.images.pixels,
            # A character is at most 12 in JSON (an escaped surrogate pair); then sizes and names.
            "header": 12 * (max_text + 1100) + 64 * self.images.count + 1024,
            "body": 3 * self.images.pixels * self.images.count,
        }
        if not persistent:
            self.spec = spec_from_signature(one_call, self.name)
        # As many threads as workers: each takes a free worker and gives it back itself, so a
        # cancelled caller leaves no worker in the middle of a reply. They outlive every worker,
        # for a worker dies with the thread that started it (--die-with-parent).
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="python-tool")
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._workers = [Worker(self._limits, self.sandbox) for _ in range(workers)]
        for worker in self._workers:
            self._free.put(worker)
        self._homes = [_Home(worker, sessions) for worker in self._workers] if persistent else []
        self._states: OrderedDict[str, _State] = OrderedDict()
        self._lock = threading.Lock()

    async def call(self, session: Session, code: str) -> Observation:
        """Run Python code and return what it prints and shows. The images so far are image_1, image_2, ... (PIL); np, math and Image are imported. The value of a last expression is shown; show(image) shows an image, and open matplotlib figures are shown. Variables, imports and files are kept from call to call.

        Args:
            code: Python code
        """  # noqa: E501
        seed = session.seed + session.calls
        if self.persistent:
            request = Request(code, session.images, seed, session.id)
            state = self._state(session.id)
            future = state.home.threads.submit(self._answer_in, state, request)
            future.add_done_callback(state.home.done)  # also of one cancelled before its turn
        else:
            request = Request(code, session.images, seed)
            future = self._threads.submit(self._answer, request)
        observation = await asyncio.wrap_future(future)
        session.images.extend(observation.images)
        return observation

    def run(self, code: str, images: Sequence[Image.Image] = (), seed: int = 0) -> Observation:
        """One call in a process of its own, without a session, blocking. Raises ToolInfraError
        where no worker answers."""
        return self._threads.submit(self._answer, Request(code, images, seed)).result()

    async def end(self, session: Session) -> None:
        """End a session's process and remove its files. Nothing for one that has none."""
        with self._lock:
            state = self._states.pop(session.id, None)
        if state is not None:
            loop = asyncio.get_running_loop()
            with contextlib.suppress(RuntimeError):  # closed: then nothing is left of it
                await loop.run_in_executor(state.home.threads, state.home.end, session.id)

    def close(self) -> None:
        """Waits for calls that are running, then ends the workers. Calls after it raise."""
        for threads in (self._threads, *(home.threads for home in self._homes)):
            threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            with worker.lock:
                worker.stop()
        self._states.clear()

    def __enter__(self) -> PythonTool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- A process for every call ---

    def _answer(self, request: Request) -> Observation:
        worker = self._free.get()
        try:
            with worker.lock:
                try:
                    header, frame = worker.exchange(request, self.timeout + GRACE_SECONDS)
                except ToolInfraError as error:
                    log.warning("%s; starting another", error)
                    if self._homes:
                        self._homes[self._workers.index(worker)].lost()
                    header, frame = worker.exchange(request, self.timeout + GRACE_SECONDS)
        finally:
            self._free.put(worker)
        return self._observation(header, frame)

    # --- A process for every session ---

    def _state(self, key: str) -> _State:
        """What is known of a session; a new one goes where the fewest are."""
        with self._lock:
            state = self._states.get(key)
            if state is None:
                # Those that were never ended, of trajectories long gone, are not kept for ever.
                while len(self._states) >= 10_000:
                    self._states.popitem(last=False)
                counts = {id(home): 0 for home in self._homes}
                for other in self._states.values():
                    counts[id(other.home)] += other.live
                home = min(self._homes, key=lambda home: (home.waiting, counts[id(home)]))
                state = self._states[key] = _State(home)
            self._states.move_to_end(key)
            state.home.waits()
            return state

    def _answer_in(self, state: _State, request: Request) -> Observation:
        home = state.home
        with home.worker.lock:
            header, frame, note = home.exchange(state, request, self.timeout + GRACE_SECONDS)
        observation = self._observation(header, frame)
        if note:
            text = f"[variables and files of earlier calls are lost: {note}]\n{observation.text}"
            return Observation(text, observation.images, observation.status)
        return observation

    # --- What the policy sees ---

    def _observation(self, header: dict[str, Any], frame: bytearray) -> Observation:
        """What the policy sees of a worker's reply."""
        limits, ended = self._limits, header["ended"]
        if ended == "timeout":
            return _error(f"Error: timed out after {self.timeout:g} s")
        if ended == "memory":
            return _error(f"Error: more than {limits['memory'] >> 20:,} MB of memory in all")
        if ended == "processes":
            return _error(f"Error: more than {limits['processes']} processes and threads")
        if ended == "disk":
            return _error(f"Error: more than {limits['disk'] >> 20:,} MB of files, or too many")
        if ended == "died":
            return _error(f"Error: the process ended without a result{_by(header['signal'])}")
        try:
            if ended == "malformed":
                raise ValueError("too long")
            text, error, images = read_result(frame, limits)
        except (ValueError, RecursionError):
            # RecursionError: brackets by the thousand. The code wrote this; so it gets the blame.
            return _error("Error: the process wrote a malformed result")
        return observe(text, error, images)


async def one_call(session: Session, code: str) -> Observation:
    """Run Python code and return what it prints and shows. The images so far are image_1, image_2, ... (PIL); np, math and Image are imported. The value of a last expression is shown; show(image) shows an image. Variables are not kept between calls.

    Args:
        code: Python code
    """  # noqa: E501
    raise NotImplementedError  # only its signature and docstring: what a policy reads


@dataclass
class _State:
    """What is known of a session."""

    home: _Home
    live: bool = False
    """A process holds variables of it."""
    note: str = ""
    """Why its variables are lost, until the policy has been told."""
    broken: bool = False
    """They are lost and it is nobody's fault: the next call is an infrastructure error."""


class _Home:
    """A worker and the sessions that live on it. One thread: a session's calls keep their order."""

    def __init__(self, worker: Worker, sessions: int):
        self.worker = worker
        self.sessions = sessions
        self.live: OrderedDict[str, _State] = OrderedDict()
        self.waiting = 0
        """Calls that run or wait to."""
        self.threads = ThreadPoolExecutor(1, thread_name_prefix="python-session")
        self._lock = threading.Lock()

    def waits(self) -> None:
        with self._lock:
            self.waiting += 1

    def done(self, _: object) -> None:
        with self._lock:
            self.waiting -= 1

    def exchange(
        self, state: _State, request: Request, seconds: float
    ) -> tuple[dict[str, Any], bytearray, str]:
        """One call of a session: the worker's reply, and a note where its state was lost.

        Raises ToolInfraError where it was lost by no fault of the policy's."""
        key = request.session
        if state.broken:
            state.broken = False
            raise ToolInfraError("the session's python process was lost with its worker")
        if key not in self.live:
            while len(self.live) >= self.sessions:
                oldest, other = self.live.popitem(last=False)
                other.live, other.note = False, "the session was idle and others needed its place"
                request.end.append(oldest)
        try:
            header, frame = self.worker.exchange(request, seconds)
        except ToolInfraError as error:
            had_state = state.live
            self.lost()
            state.broken = False
            if had_state:
                raise
            log.warning("%s; starting another", error)
            request.end.clear()
            header, frame = self.worker.exchange(request, seconds)
        note = ""
        if header["fresh"] and (state.live or state.note):
            note = state.note or "the process had ended"
        state.live = header["ended"] == "result"
        state.note = "" if state.live else "the last call ended the process"
        if state.live:
            self.live[key] = state
            self.live.move_to_end(key)
        else:
            self.live.pop(key, None)
        return header, frame, note

    def lost(self) -> None:
        """The worker has gone, and with it every session on it."""
        for state in self.live.values():
            state.live, state.broken = False, True
        self.live.clear()

    def end(self, key: str) -> None:
        with self.worker.lock:
            if self.live.pop(key, None) is None or not self.worker.running:
                return
            try:
                self.worker.exchange(Request(None, end=[key]), GRACE_SECONDS)
            except ToolInfraError as error:
                log.warning("%s", error)
                self.lost()


def observe(text: str, error: str | None, images: tuple[Image.Image, ...]) -> Observation:
    """The observation of code that ran: what it printed, how it failed, what it showed."""
    if error is not None:
        text = f"{text.rstrip()}\n{error}" if text.strip() else error
        return Observation(text, images, "tool_error")
    return Observation(text.rstrip("\n") or ("" if images else "(no output)"), images)


def _error(text: str) -> Observation:
    return Observation(text, status="tool_error")


def _by(number: int) -> str:
    try:
        # SIGKILL is how every call's process ends that had closed its end of the pipe: it is ours.
        return f" ({signal.Signals(number).name})" if number not in (0, signal.SIGKILL) else ""
    except ValueError:
        return f" (signal {number})"  # real-time signals have no name
