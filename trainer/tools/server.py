"""`metis tools serve`: a toolbox over HTTP, for trainers on other machines.

wire.py lists the requests, service.py does the work. Here are HTTP, the guard at the door, and the
process: it binds to this machine alone unless a token is set, and SIGTERM ends it gracefully (it
takes no more, finishes the calls that run, ends the sessions).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from trainer.images import ImageError, ImageLimits, open_image, to_rgb
from trainer.tools.service import Refused, ServerLimits, ToolService
from trainer.tools.toolbox import Toolbox
from trainer.tools.wire import KEY_HEADER, RAW, png, raw_image

BODY_SECONDS = 60.0
"""For a client to send what it began to send."""
LINGER_BYTES, LINGER_SECONDS = 1 << 20, 1.0
UPLOADS = 8
"""Bodies with images that are read at a time. The others wait in the sockets, not in memory."""
SHORTEST_TOKEN = 16
CLOSE = {"Connection": "close"}
"""On what is refused unread: else its body would be read to the end, however far that is."""
READ = "metis.read"
"""Set in a request's scope when its body was read to the end."""


class Opening(BaseModel):
    """Body of POST /sessions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | None = None
    """The client's own name for the trajectory: opening it twice is opening it once."""
    seed: int = Field(0, ge=-(1 << 63), lt=1 << 63)


# ---- requests ------------------------------------------------------------------------------------


def make_app(service: ToolService, token: str | None = None) -> FastAPI:
    """The routes. Without a token only requests to a loopback name are answered."""
    app = FastAPI(title="metis tools", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, token=token)
    limits = service.limits
    uploads = asyncio.Semaphore(UPLOADS)
    # Every character of a call may be escaped, astral ones as two times six.
    call_bytes = 12 * service.toolbox.max_call + 4096

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        service.measures.refused.labels(str(error.status)).inc()
        headers = {"Retry-After": str(error.retry)} if error.retry is not None else {}
        if not request.scope.get(READ):
            await _linger(request)
            headers |= CLOSE
        return JSONResponse({"error": str(error)}, error.status, headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        stopping = service.gate.closed
        content = {"status": "stopping" if stopping else "ok", "sessions": len(service.hosted)}
        return JSONResponse(content, 503 if stopping else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = generate_latest(service.measures.registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/tools")
    async def tools() -> dict[str, Any]:
        return service.describe()

    @app.post("/sessions")
    async def open_session(request: Request) -> JSONResponse:
        body = await _json(request, 4096)
        try:
            opening = Opening.model_validate(body)
        except ValidationError as error:
            raise Refused(422, _first(error)) from None
        hosted, new = service.open(opening.id, opening.seed)
        content = {
            "id": hosted.session.id,
            "images": len(hosted.session.images),
            "idle_seconds": limits.idle_seconds,
            "lifetime_seconds": limits.lifetime_seconds,
        }
        return JSONResponse(content, 201 if new else 200)

    @app.delete("/sessions/{name}")
    async def end_session(name: str) -> Response:
        service.end(name)  # of a session that is gone already, too: DELETE may be repeated
        return Response(status_code=204)

    @app.put("/sessions/{name}/images/{number}")
    async def upload(request: Request, name: str, number: int) -> dict[str, int]:
        hosted = service.find(name)
        service.place(hosted, number)  # before anything is read
        decode = _decoder(request, limits.image_pixels)
        async with uploads:
            body = await _body(request, 4 * limits.image_pixels)
            try:
                image = await service.upload(hosted, number, body, decode)
            except ImageError as error:
                raise Refused(422, str(error)) from None
        return {"number": number, "width": image.width, "height": image.height}

    @app.get("/sessions/{name}/images/{number}")
    async def download(name: str, number: int, format: str = "raw") -> Response:
        images = service.find(name).session.images
        if not 1 <= number <= len(images):
            raise Refused(404, f"the session has {len(images)} images")
        encode: Callable[[Any], bytes] = {
            "raw": lambda image: to_rgb(image).tobytes(),
            "png": png,
        }.get(format)
        if encode is None:
            raise Refused(422, f"format must be raw or png, got {format[:20]!r}")
        image = images[number - 1]
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(service.threads, encode, image)
        headers = {"X-Image-Size": f"{image.width}x{image.height}"}
        return Response(data, media_type=RAW if format == "raw" else "image/png", headers=headers)

    @app.post("/sessions/{name}/calls")
    async def call(request: Request, name: str) -> JSONResponse:
        hosted = service.find(name)
        text, calls, images = _call_of(await _json(request, call_bytes))
        key = request.headers.get(KEY_HEADER)
        return JSONResponse(await service.call(hosted, key, text, calls, images))

    return app


def _decoder(request: Request, max_pixels: int) -> Callable[[bytes], Any]:
    """What makes an image of the body, by the request's type and query. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != RAW:
        # The aspect is the tools' own affair: a question's picture is what it is.
        limits = ImageLimits(decoded=max_pixels, file_bytes=4 * max_pixels, aspect=max_pixels)
        return partial(open_image, limits=limits)
    query = request.query_params
    try:
        width, height = int(query["width"]), int(query["height"])
    except (KeyError, ValueError):
        raise Refused(422, "raw pixels take ?mode=RGB&width=W&height=H") from None
    mode = query.get("mode", "RGB")
    return partial(raw_image, mode=mode, width=width, height=height, max_pixels=max_pixels)


def _call_of(body: Any) -> tuple[str, int | None, int | None]:
    """Text, number of the call, and number of images of a call's body.

    By hand, for pydantic takes no lone surrogates, and a policy's text may hold some: the toolbox
    shall say so. Raises Refused.
    """
    if not isinstance(body, dict) or not body.keys() <= {"text", "name", "arguments", *_COUNTS}:
        raise Refused(422, "a call is {text} or {name, arguments}, and calls, images beside it")
    for key in _COUNTS:
        value = body.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < 1 << 31):
            raise Refused(422, f"{key} must be a count, got {value!r:.40}")
    if "text" in body:
        text = body["text"]
        if not isinstance(text, str) or "name" in body or "arguments" in body:
            raise Refused(422, "text must be a string, without name and arguments beside it")
    else:
        text = json.dumps({key: body[key] for key in ("name", "arguments") if key in body})
    return text, body.get("calls"), body.get("images")


_COUNTS = ("calls", "images")


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))[:64]}: {first['msg'][:200]}"


async def _json(request: Request, limit: int) -> Any:
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise Refused(415, "the body must be application/json")
    body = await _body(request, limit)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {str(error)[:200]}") from None


async def _linger(request: Request) -> None:
    """Reads a little of a body that is refused: a client that is still sending when the connection
    is closed would see a reset, and not the answer."""

    async def rest() -> None:
        size = 0
        while size < LINGER_BYTES:
            message = await request.receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                return

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), LINGER_SECONDS)


async def _body(request: Request, limit: int) -> bytes:
    """The whole body, of which never more than the limit is read. Raises Refused."""
    too_long = Refused(413, f"the body is longer than {limit:,} bytes")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length[:19]) > limit:
        raise too_long

    async def read() -> bytes:
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_long
            chunks.append(chunk)
        request.scope[READ] = True
        return b"".join(chunks)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body took longer than {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise Refused(400, "the client went away") from None


# ---- who may come in -----------------------------------------------------------------------------


class Guard:
    """Asks for the token. Without one it keeps browsers out: a web page that its user looks at may
    send requests to this machine, and these tools run code."""

    def __init__(self, app: ASGIApp, token: str | None):
        self.app = app
        self.expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refused = self._refused(scope["path"], dict(scope["headers"]))
            if refused is not None:
                status, text = refused
                headers = CLOSE | ({"WWW-Authenticate": "Bearer"} if status == 401 else {})
                await JSONResponse({"error": text}, status, headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refused(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        if self.expected is not None:
            given = headers.get(b"authorization", b"")
            if path != "/health" and not hmac.compare_digest(given, self.expected):
                return 401, "the token is missing or wrong"
            return None
        if b"origin" in headers or b"sec-fetch-site" in headers:
            return 403, "no requests from web pages: set a token"
        host = headers.get(b"host", b"").decode("latin-1")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if not is_loopback(name):  # a name that an attacker lets point here
            return 403, f"without a token the server is called localhost, not {host[:60]!r}"
        return None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


# ---- the process ---------------------------------------------------------------------------------


class _Uvicorn(uvicorn.Server):
    """Stops as the service wants it: once gracefully, twice at once, with exit code 0."""

    def __init__(self, config: uvicorn.Config, service: ToolService):
        super().__init__(config)
        self.service = service

    @contextmanager
    def capture_signals(self):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.ask)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def ask(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.drain()
        await super().shutdown(sockets)


class ToolServer:
    """A toolbox over HTTP: `run` it until SIGTERM or SIGINT, or have it on a thread for a while:

    with ToolServer(toolbox, port=0) as server:
        ... RemoteToolbox(server.url) ...

    Either way the toolbox is closed at the end.
    """

    def __init__(
        self,
        toolbox: Toolbox,
        host: str = "127.0.0.1",
        port: int = 8765,
        *,
        token: str | None = None,
        limits: ServerLimits | None = None,
    ):
        """port: 0 takes a free one. token: what clients must know. Raises ValueError for one that
        is too short, and for none where others than this machine could connect; OSError where the
        address cannot be bound."""
        if token is None and not is_loopback(host):
            raise ValueError(
                f"whoever can reach {host} could run code here: set a token, or bind to 127.0.0.1"
            )
        if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii()):
            raise ValueError(f"a token has at least {SHORTEST_TOKEN} ASCII characters")
        self.toolbox = toolbox
        self.token = token
        self.limits = limits or ServerLimits()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=2048)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._listener.getsockname()[1]}"
        self._uvicorn: _Uvicorn | None = None
        self._thread: threading.Thread | None = None

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serves until it is told to stop. ready is called once requests are taken."""
        loop = asyncio.new_event_loop()
        # Tools that are plain functions run here. Not asyncio.run: at the end that waits for
        # threads, and a function that hangs must not keep the server from stopping.
        loop.set_default_executor(ThreadPoolExecutor(self.limits.concurrency, "tool-server"))
        try:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(self._serve(ready))
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    async def _serve(self, ready: Callable[[], None]) -> None:
        service = ToolService(self.toolbox, self.limits)
        config = uvicorn.Config(
            make_app(service, self.token),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # Longer than a trainer's pause between two turns, so that connections are used again.
            timeout_keep_alive=120,
            # By then the service has given up on its calls, and their clients have been told.
            timeout_graceful_shutdown=math.ceil(self.limits.stop_seconds) + 2,
        )
        self._uvicorn = _Uvicorn(config, service)
        service.start()
        announcing = asyncio.create_task(self._announce(ready))
        try:
            await self._uvicorn.serve([self._listener])
        finally:
            announcing.cancel()
            await service.stop()

    async def _announce(self, ready: Callable[[], None]) -> None:
        while not self._uvicorn.started:
            await asyncio.sleep(0.01)
        ready()

    def __enter__(self) -> ToolServer:
        ready = threading.Event()
        # A daemon: a program that ends by an exception must not wait for it.
        self._thread = threading.Thread(target=self.run, args=(ready.set,), daemon=True)
        self._thread.start()
        while not ready.wait(0.1):
            if not self._thread.is_alive():
                raise RuntimeError("the tool server has not started: the traceback above says why")
        return self

    def __exit__(self, *_: object) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()


def serve(
    toolbox: Toolbox,
    host: str = "127.0.0.1",
    port: int = 8765,
    *,
    token: str | None = None,
    limits: ServerLimits | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serves until SIGTERM or SIGINT; twice stops at once. ready is called with the URL once
    requests are taken. Raises as ToolServer does."""
    server = ToolServer(toolbox, host, port, token=token, limits=limits)
    server.run(lambda: ready(server.url))
