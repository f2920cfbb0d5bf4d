"""A toolbox on another machine: used as `Toolbox` is, with the tools of `metis tools serve`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
import uuid
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, get_args

from PIL import Image

from trainer.images import ImageError
from trainer.tools.protocol import ToolInfraError
from trainer.tools.toolbox import Toolbox
from trainer.tools.wire import (
    KEY_HEADER,
    RAW,
    SHARED_LIMITS,
    TOKEN_VARIABLE,
    encode_image,
    raw_image,
)
from trainer.types import Observation, ObservationStatus, Session, ToolCall

try:
    import httpx2 as httpx
except ImportError:  # Python 3.10
    import httpx  # type: ignore[no-redef]

log = logging.getLogger(__name__)

POOLS = 16
"""Of connections to the server."""
FAREWELL_SECONDS = 5.0
"""For telling the server that a session is over. It would find out by itself, later."""

_UNAVAILABLE = Observation("Error: the tool is unavailable", status="infra_error")


class _Gone(Exception):
    """The server does not know the session."""


@dataclass
class _Remote:
    """What the server has of a session."""

    images: list[Image.Image] = field(default_factory=list)
    """The very images, in order: what is in the session beyond or instead of them is uploaded."""
    called: bool = False
    """A call was sent. From then on its tools may hold state, and a lost session stays lost."""


class RemoteToolbox(Toolbox):
    """The tools of a server, to be used wherever a Toolbox is.

        async with RemoteToolbox("http://tools-1:8765", token=...) as toolbox:
            call, observation = await toolbox.execute('{"name": "python", ...}', session)

    The server parses and bounds as a local toolbox would. An image goes to it once a session; one
    that a tool made comes back once. A call carries a key, so that sending it again after a lost
    answer does not run it again. A full server (429) is asked again until `patience` is used up.
    A server that is down, slow or broken is `infra_error`, as a broken tool is: the rollout is not
    scored, training goes on, and later sessions find the server when it is back.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 120.0,
        patience: float = 300.0,
        retries: int = 3,
    ):
        """token: None is what METIS_TOOLS_TOKEN holds, if anything. timeout: seconds for an answer;
        a call that takes longer is asked after again, not run again. patience: seconds that one
        `execute` may take in all. retries: failed connections in a row, of one request. Raises
        ValueError for a URL that is none. Nothing is sent before the first use."""
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"{url!r} is no URL: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"a tool server's URL is http://host:port, got {url!r}")
        super().__init__([])  # its limits are the server's: see _learn
        self.url = url.rstrip("/")
        self.patience = patience
        self.attempts = retries + 1
        token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
            "timeout": httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=patience),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
            # Made once, for it takes longer than many a call.
            "verify": httpx.create_ssl_context() if parsed.scheme == "https" else False,
            # A proxy of the environment is for the internet; tools are reached directly.
            "trust_env": False,
        }
        self._clients: list[httpx.AsyncClient] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._about: dict[str, Any] | None = None
        self._remotes: dict[str, _Remote] = {}
        # Its own: retries must not shift the random numbers of anybody else.
        self._random = random.Random()

    # ---- the interface of Toolbox ----------------------------------------------------------------

    def schemas(self) -> list[dict[str, Any]]:
        """The server's tools, as a chat template wants them; asked for once, blocking. Raises
        ToolInfraError where the server cannot be asked."""
        if self._about is None:
            with httpx.Client(**self._options) as client:
                reason = ""
                for attempt in range(self.attempts):
                    time.sleep(self._pause(attempt) if attempt else 0)
                    try:
                        response = client.get("/tools")
                    except httpx.HTTPError as error:
                        reason = _describe(error)
                        continue
                    if response.status_code < 500 and response.status_code != 429:
                        break
                    reason = _said(response)
                else:
                    raise ToolInfraError(f"no answer from the tool server at {self.url}: {reason}")
            self._learn(response)
        return self._about["tools"]

    async def execute(self, text: str, session: Session) -> tuple[ToolCall | None, Observation]:
        """As `Toolbox.execute`. The call that comes back is as JSON has it: tuples are lists."""
        try:
            deadline = time.monotonic() + self.patience
            if self._about is None:
                self._learn(await self._request("GET", "/tools", deadline))
            if len(text) > self.max_call:  # more than the server would read: it is refused here
                return await super().execute(text, session)
            session.calls += 1
            call, observation = await self._execute(text, session, deadline)
        except ToolInfraError as error:
            log.error("tool server %s: %s", self.url, error)
            return None, _UNAVAILABLE
        except Exception:
            # As in Toolbox: a bug of ours must not end a run of days, nor punish the policy.
            log.exception("tool server %s", self.url)
            return None, _UNAVAILABLE
        session.images.extend(observation.images)
        return call, observation

    async def end(self, session: Session) -> None:
        """Tell the server that the trajectory is over. Never raises: it finds out in any case."""
        if self._remotes.pop(session.id, None) is None:
            return
        try:
            path = f"/sessions/{session.id}"
            response = await self._http(path).delete(path, timeout=FAREWELL_SECONDS)
            if response.status_code >= 400:
                log.warning("ending session %s: %s", session.id, _said(response))
        except Exception as error:
            log.warning("ending session %s: %s", session.id, _describe(error))

    async def close(self) -> None:
        """Ends the sessions that are open and closes the connections."""
        sessions = [Session([], id=name) for name in self._remotes]
        await asyncio.gather(*(self.end(session) for session in sessions))
        if self._loop is asyncio.get_running_loop():
            await asyncio.gather(*(client.aclose() for client in self._clients))
        self._clients = []

    async def __aenter__(self) -> RemoteToolbox:
        await asyncio.to_thread(self.schemas)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # ---- one call --------------------------------------------------------------------------------

    async def _execute(
        self, text: str, session: Session, deadline: float
    ) -> tuple[ToolCall | None, Observation]:
        """Raises ToolInfraError."""
        remote = self._remotes.get(session.id)
        if remote is None or not remote.called:
            remote = await self._open(session, remote, deadline)
        path = f"/sessions/{session.id}"
        try:
            await self._upload(path, session, remote, deadline)
            body = {"text": text, "calls": session.calls, "images": len(session.images)}
            # In ASCII: a policy may write lone surrogates, and the server says what is wrong there.
            content = json.dumps(body).encode()
            headers = {KEY_HEADER: uuid.uuid4().hex, "Content-Type": "application/json"}
            remote.called = True
            response = await self._request(
                "POST", f"{path}/calls", deadline, content=content, headers=headers
            )
            call, observation, sizes = _read_answer(response)
            images = [
                await self._download(path, number, size, deadline)
                for number, size in enumerate(sizes, len(remote.images) + 1)
            ]
        except _Gone:
            raise ToolInfraError(f"the server has lost session {session.id}") from None
        remote.images += images
        return call, Observation(observation.text, tuple(images), observation.status)

    async def _open(self, session: Session, known: _Remote | None, deadline: float) -> _Remote:
        """The session on the server. Before its first call it may be opened as often as needed: a
        server that was started again has none of the images, which its answer tells."""
        body = {"id": session.id, "seed": session.seed}
        response = await self._request("POST", "/sessions", deadline, json=body)
        held = _json_of(response).get("images")
        remote = known if known is not None and held == len(known.images) else _Remote()
        self._remotes[session.id] = remote
        return remote

    async def _upload(self, path: str, session: Session, remote: _Remote, deadline: float) -> None:
        """Sends what the server has not. What it has and the session not is forgotten by the call's
        number of images."""
        same = 0
        for mine, theirs in zip(session.images, remote.images, strict=False):
            if mine is not theirs:
                break
            same += 1
        del remote.images[same:]
        for number, image in enumerate(session.images[same:], same + 1):
            body, query = await asyncio.to_thread(encode_image, image)
            await self._request(
                "PUT",
                f"{path}/images/{number}",
                deadline,
                content=body,
                params=query,
                headers={"Content-Type": RAW},
            )
            remote.images.append(image)

    async def _download(
        self, path: str, number: int, size: tuple[int, int], deadline: float
    ) -> Image.Image:
        response = await self._request("GET", f"{path}/images/{number}", deadline)
        width, height = size
        try:
            return await asyncio.to_thread(
                raw_image, response.content, "RGB", width, height, width * height
            )
        except ImageError as error:
            raise ToolInfraError(f"image {number} of the server: {error}") from None

    # ---- one request -----------------------------------------------------------------------------

    async def _request(
        self, method: str, path: str, deadline: float, **options: Any
    ) -> httpx.Response:
        """A response below 400. Every request here may be sent again: a call for its key, others by
        nature. Raises _Gone for 404, ToolInfraError for all else."""
        failures = refusals = 0
        while True:
            try:
                response = await self._http(path).request(method, path, **options)
            except httpx.HTTPError as error:
                failures += 1
                reason, pause = _describe(error), self._pause(failures)
            else:
                if response.status_code < 400:
                    return response
                reason = _said(response)
                if response.status_code == 404:
                    raise _Gone(reason)
                if response.status_code == 429:
                    refusals += 1
                    asked = response.headers.get("retry-after", "1")
                    pause = max(float(asked) if asked.isdigit() else 1.0, self._pause(refusals))
                elif response.status_code >= 500:
                    failures += 1
                    pause = self._pause(failures)
                else:
                    raise ToolInfraError(reason)
            if failures >= self.attempts:
                raise ToolInfraError(f"{reason} ({failures} attempts)")
            if time.monotonic() + pause > deadline:
                raise ToolInfraError(f"{reason}; gave up after {self.patience:g} s")
            await asyncio.sleep(pause)

    def _pause(self, attempt: int) -> float:
        """Seconds before another attempt: longer each time, and never all clients at once."""
        return min(0.1 * 2**attempt, 5.0) * self._random.uniform(0.5, 1.5)

    def _http(self, path: str) -> httpx.AsyncClient:
        """The client of the session, on the running loop: connections do not outlive their loop.

        Several, each with its pool: for every request a pool looks at all of its connections.
        """
        loop = asyncio.get_running_loop()
        if not self._clients or self._loop is not loop:
            self._clients = [httpx.AsyncClient(**self._options) for _ in range(POOLS)]
            self._loop = loop
        session = path.split("/")[2:3]
        return self._clients[hash(*session) % POOLS if session else 0]

    def _learn(self, response: httpx.Response) -> None:
        """Takes in the answer to GET /tools."""
        if response.status_code >= 400:
            raise ToolInfraError(f"the tool server at {self.url} refuses: {_said(response)}")
        about = _json_of(response)
        limits = {name: about.get(name) for name in SHARED_LIMITS}
        if not isinstance(about.get("tools"), list) or any(
            type(limit) is not int for limit in limits.values()
        ):
            raise ToolInfraError(f"{self.url} answers, but not as a tool server does")
        for name, limit in limits.items():
            setattr(self, name, limit)
        self._about = about


def _read_answer(
    response: httpx.Response,
) -> tuple[ToolCall | None, Observation, list[tuple[int, int]]]:
    """Call, observation without images, and the images' sizes. Raises ToolInfraError where the
    answer is not what a server of ours gives."""
    answer = _json_of(response)
    try:
        given, observed = answer["call"], answer["observation"]
        call = None if given is None else ToolCall(given["name"], dict(given["arguments"]))
        observation = Observation(observed["text"], (), observed["status"])
        sizes = [(image["width"], image["height"]) for image in observed["images"]]
        if (
            not isinstance(observation.text, str)
            or observation.status not in get_args(ObservationStatus)
            or any(type(side) is not int or side < 1 for size in sizes for side in size)
        ):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise ToolInfraError("the server's answer to a call is malformed") from None
    return call, observation, sizes


def _json_of(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ToolInfraError("the server's answer is no JSON object")
    return value


def _said(response: httpx.Response) -> str:
    """Status and error of a response, in one line."""
    try:
        text = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        text = response.text
    return f"{response.status_code}: {' '.join(text.split())[:300]}"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()[:300]
