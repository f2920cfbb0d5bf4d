"""Sessions, calls and their limits: what the tool server does, without HTTP.

A session is one trajectory's: its images, its seed, its calls, one at a time. A call is a task of
its own, so a client that goes away and comes back with the same key finds it running, or done.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from trainer.tools.toolbox import Toolbox
from trainer.tools.wire import IDENTIFIER, SHARED_LIMITS
from trainer.types import Session, ToolCall

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerLimits:
    """What one server takes on. All must be positive."""

    concurrency: int = 256
    """Calls that run at a time; a tool may have limits of its own below that."""
    queue: int = 1024
    """Calls that wait for their turn; further ones are refused with 429."""
    sessions: int = 4096
    idle_seconds: float = 1800.0
    """Without a request, after which a session is ended: its trainer is gone."""
    lifetime_seconds: float = 6 * 3600.0
    """After which a session is ended in any case."""
    stop_seconds: float = 30.0
    """That running calls have to finish in when the server is stopped."""
    images: int = 64
    """Of a session, those that its tools made included."""
    image_pixels: int = 1 << 26
    """Of one uploaded image."""
    image_bytes: int = 8 << 30
    """Of the pixels of all sessions; the images that several share count once."""
    calls: int = 1000
    """Of a session."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{limit.name} must be positive and finite, got {value}")


class Refused(Exception):
    """A request that is not carried out. `status` is HTTP's, `retry` the seconds to wait."""

    def __init__(self, status: int, message: str, retry: int | None = None):
        super().__init__(message)
        self.status = status
        self.retry = retry


class Measures:
    """What GET /metrics shows."""

    def __init__(self, service: ToolService):
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"metis_tools_{name}", text, registry=registry).set_function(value)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"metis_tools_{name}", text, labels, registry=registry)

        self.calls = counter("calls", "Calls that were answered", "tool", "status")
        self.refused = counter("refused", "Requests that were refused", "status")
        self.ended = counter("sessions_ended", "Sessions that ended, and why", "why")
        self.uploads = counter("image_uploads", "Images that were uploaded")
        self.replayed = counter("calls_replayed", "Calls that were answered from memory")
        self.seconds = Histogram(
            "metis_tools_call_seconds",
            "From the start of a call to its answer, without the wait for a turn",
            ["tool"],
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=registry,
        )
        gauge("sessions", "Sessions that are open", lambda: len(service.hosted))
        gauge("calls_running", "Calls that run", lambda: service.gate.running)
        gauge("calls_queued", "Calls that wait for their turn", lambda: service.gate.queued)
        gauge("image_bytes", "Bytes of the pixels that sessions hold", lambda: service.held_bytes())


class Gate:
    """`concurrency` calls at a time, `queue` behind them; whoever comes then is refused at once."""

    def __init__(self, limits: ServerLimits):
        self.limits = limits
        self.taken = 0
        """Places that are taken: calls that run or wait."""
        self.running = 0
        self.closed = False
        self.mean_seconds = 0.1
        self._turn = asyncio.Semaphore(limits.concurrency)

    @property
    def queued(self) -> int:
        return self.taken - self.running

    def take(self) -> None:
        """Raises Refused where there is no place. A place that is taken must be `run`."""
        if self.taken >= self.limits.concurrency + self.limits.queue:
            wait = self.taken * self.mean_seconds / self.limits.concurrency
            seconds = min(max(1, math.ceil(wait)), 30)
            raise Refused(429, f"{self.taken:,} calls run or wait already", seconds)
        self.taken += 1

    async def run(self, work: Callable[[], Any]) -> Any:
        try:
            async with self._turn:
                if self.closed:
                    raise Refused(503, "the server is stopping", 1)
                self.running += 1
                start = time.perf_counter()
                try:
                    return await work()
                finally:
                    self.running -= 1
                    spent = time.perf_counter() - start
                    self.mean_seconds += 0.05 * (spent - self.mean_seconds)
        finally:
            self.taken -= 1


@dataclass(eq=False)
class Hosted:
    """A session on the server."""

    session: Session
    began: float
    used: float
    answers: dict[str, tuple[bytes, asyncio.Task[dict[str, Any]]]] = field(default_factory=dict)
    """Key of a call -> digest of what was asked, and the task that answers it."""
    running: asyncio.Task[dict[str, Any]] | None = None


class ToolService:
    """The sessions of one toolbox. Lives on one event loop; `start` and `stop` it there."""

    def __init__(self, toolbox: Toolbox, limits: ServerLimits | None = None):
        self.toolbox = toolbox
        self.limits = limits or ServerLimits()
        self.hosted: dict[str, Hosted] = {}
        self.gate = Gate(self.limits)
        self.measures = Measures(self)
        # Decoding is done here, and never on the event loop.
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="tool-server-images")
        self._names = {schema["function"]["name"] for schema in toolbox.schemas()}
        self._running: set[asyncio.Task[dict[str, Any]]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._reaper: asyncio.Task[None] | None = None
        # The rollouts of a question upload the same pixels: kept once, and the python tool's
        # workers, which know an image by its identity, are sent them once.
        self._known: weakref.WeakValueDictionary[bytes, Image.Image] = weakref.WeakValueDictionary()
        self._held, self._counted = 0, -math.inf

    # ---- sessions --------------------------------------------------------------------------------

    def open(self, name: str | None, seed: int) -> tuple[Hosted, bool]:
        """The session of that name and whether it is new. Raises Refused."""
        if self.gate.closed:
            raise Refused(503, "the server is stopping", 1)
        name = uuid.uuid4().hex if name is None else name
        if not IDENTIFIER.fullmatch(name):
            raise Refused(422, "a session's id is 1 to 64 of A-Z a-z 0-9 _ -")
        known = self.hosted.get(name)
        if known is not None:
            if known.session.seed != seed:
                raise Refused(409, f"session {name} exists with seed {known.session.seed}")
            return known, False
        if len(self.hosted) >= self.limits.sessions:
            raise Refused(429, f"{len(self.hosted):,} sessions are open already", 5)
        now = time.monotonic()
        hosted = Hosted(Session([], seed=seed, id=name), now, now)
        self.hosted[name] = hosted
        return hosted, True

    def find(self, name: str) -> Hosted:
        """Raises Refused for a session that is not, or no longer, there."""
        hosted = self.hosted.get(name)
        if hosted is None:
            raise Refused(404, "there is no such session: it was ended, expired or never opened")
        hosted.used = time.monotonic()
        return hosted

    def end(self, name: str, why: str = "deleted") -> None:
        """Forget the session now; its tools free what they hold once its last call is over. A call
        of a session that its client has deleted is given up: nobody waits for the answer."""
        hosted = self.hosted.pop(name, None)
        if hosted is not None:
            if hosted.running is not None and why == "deleted":
                hosted.running.cancel()
            self.measures.ended.labels(why).inc()
            task = asyncio.create_task(self._end(hosted))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _end(self, hosted: Hosted) -> None:
        if hosted.running is not None:
            await asyncio.wait([hosted.running])
        await self.toolbox.end(hosted.session)

    async def _reap(self) -> None:
        """Ends sessions that nobody uses or that are too old."""
        limits = self.limits
        while True:
            await asyncio.sleep(min(5.0, limits.idle_seconds / 4, limits.lifetime_seconds / 4))
            now = time.monotonic()
            for name, hosted in list(self.hosted.items()):
                if now - hosted.began > limits.lifetime_seconds:
                    self.end(name, "lifetime")
                elif hosted.running is None and now - hosted.used > limits.idle_seconds:
                    self.end(name, "idle")

    # ---- images ----------------------------------------------------------------------------------

    def held_bytes(self) -> int:
        """Bytes of the pixels that sessions hold, as of half a second ago at most."""
        now = time.monotonic()
        if now - self._counted > 0.5:
            images = {id(i): i for hosted in self.hosted.values() for i in hosted.session.images}
            sizes = (i.width * i.height * len(i.getbands()) for i in images.values())
            self._held, self._counted = sum(sizes), now
        return self._held

    def place(self, hosted: Hosted, number: int) -> int:
        """Index of image `number`. Raises Refused where it would leave a gap or be one too many."""
        count = len(hosted.session.images)
        if hosted.running is not None:
            raise Refused(409, "a call of the session is running")
        if not 1 <= number <= count + 1:
            raise Refused(409, f"the session has {count} images; the next is number {count + 1}")
        if number > self.limits.images:
            raise Refused(413, f"a session holds at most {self.limits.images} images")
        return number - 1

    async def upload(
        self, hosted: Hosted, number: int, body: bytes, decode: Callable[[bytes], Image.Image]
    ) -> Image.Image:
        """Sets image `number`, and forgets those after it where it is another than was there.

        decode runs in a thread; ImageError passes through. Raises Refused.
        """
        self.place(hosted, number)
        if self.held_bytes() > self.limits.image_bytes:
            raise Refused(429, "the server holds as many pixels as it may", 5)
        loop = asyncio.get_running_loop()
        image = await loop.run_in_executor(self.threads, self._decode, body, decode)
        self.measures.uploads.inc()
        index = self.place(hosted, number)  # again: other requests went on meanwhile
        images = hosted.session.images
        if index == len(images) or images[index] is not image:
            images[index:] = [image]
        return image

    def _decode(self, body: bytes, decode: Callable[[bytes], Image.Image]) -> Image.Image:
        image = decode(body)
        head = f"{image.mode} {image.size}".encode()
        digest = hashlib.sha256(head + b"\0" + image.tobytes()).digest()
        return self._known.setdefault(digest, image)

    # ---- calls -----------------------------------------------------------------------------------

    async def call(
        self, hosted: Hosted, key: str | None, text: str, calls: int | None, images: int | None
    ) -> dict[str, Any]:
        """Answers a call; the same key again gets the same answer, and nothing is run.

        calls: which call of the trajectory this is, for seeds; None: the next. images: how many of
        the session's images there are, the rest being forgotten; None: all. Raises Refused.
        """
        asked = hashlib.sha256(json.dumps([text, calls, images]).encode()).digest()
        key = uuid.uuid4().hex if key is None else key
        if len(key) > 128:
            raise Refused(422, "an idempotency key has at most 128 characters")
        known = hosted.answers.get(key)
        if known is not None:
            if known[0] != asked:
                raise Refused(422, "the idempotency key was used for another call")
            self.measures.replayed.inc()
            return await self._wait(known[1])
        if hosted.running is not None:
            raise Refused(409, "a call of the session is running")
        if len(hosted.answers) >= self.limits.calls:
            raise Refused(403, f"a session makes at most {self.limits.calls:,} calls")
        held = len(hosted.session.images)
        if images is not None and images > held:
            raise Refused(409, f"the session has {held} images, not {images}")
        if self.gate.closed:
            raise Refused(503, "the server is stopping", 1)
        self.gate.take()  # last: what is refused must not be remembered
        if images is not None:
            del hosted.session.images[images:]
        if calls is not None:
            hosted.session.calls = calls - 1
        task = asyncio.create_task(self.gate.run(lambda: self._answer(hosted, text)))
        hosted.answers[key] = asked, task
        hosted.running = task
        self._running.add(task)
        task.add_done_callback(lambda _: self._over(hosted, task))
        return await self._wait(task)

    @staticmethod
    async def _wait(task: asyncio.Task[dict[str, Any]]) -> dict[str, Any]:
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Refused(
                    503, "the call was given up: the server stops, or the session ended", 1
                ) from None
            raise

    def _over(self, hosted: Hosted, task: asyncio.Task[dict[str, Any]]) -> None:
        self._running.discard(task)
        hosted.running = None
        hosted.used = time.monotonic()

    async def _answer(self, hosted: Hosted, text: str) -> dict[str, Any]:
        session, start = hosted.session, time.perf_counter()
        shown = len(session.images)
        call, observation = await self.toolbox.execute(text, session)
        seconds = time.perf_counter() - start
        # Names outside the toolbox never become labels: a policy could make millions of them.
        name = call.name if call is not None and call.name in self._names else "(malformed)"
        self.measures.calls.labels(name, observation.status).inc()
        self.measures.seconds.labels(name).observe(seconds)
        images = [
            {"number": number, "width": image.width, "height": image.height}
            for number, image in enumerate(observation.images, shown + 1)
        ]
        return {
            "call": _plain(call),
            "observation": {
                "text": observation.text,
                "status": observation.status,
                "images": images,
            },
            "calls": session.calls,
            "ms": round(1e3 * seconds, 3),
        }

    # ---- the whole -------------------------------------------------------------------------------

    def start(self) -> None:
        self._reaper = asyncio.create_task(self._reap())

    def drain(self) -> None:
        """Takes no more calls and sessions; those that wait are refused, those that run go on for
        `stop_seconds`."""
        if not self.gate.closed:
            self.gate.closed = True
            asyncio.get_running_loop().call_later(self.limits.stop_seconds, self.cancel)

    def cancel(self) -> None:
        """Gives up on every call that runs: its clients are told 503."""
        for task in self._running:
            task.cancel()

    async def stop(self) -> None:
        """Ends all sessions and closes the toolbox. Calls that still run are given up."""
        self.drain()
        self.cancel()
        if self._reaper is not None:
            self._reaper.cancel()
        for name in list(self.hosted):
            self.end(name, "stopped")
        await asyncio.gather(*self._ending, return_exceptions=True)
        await self.toolbox.close()
        self.threads.shutdown(wait=False, cancel_futures=True)

    def describe(self) -> dict[str, Any]:
        """Answer of GET /tools: the schemas, and the limits that a client must know."""
        return {
            "tools": self.toolbox.schemas(),
            **{name: getattr(self.toolbox, name) for name in SHARED_LIMITS},
            "limits": asdict(self.limits),
        }


def _plain(call: ToolCall | None) -> dict[str, Any] | None:
    """As JSON has it: a tuple is an array, what JSON lacks its text."""
    if call is None:
        return None
    arguments = json.loads(json.dumps(dict(call.arguments), default=str))
    return {"name": call.name, "arguments": arguments}
