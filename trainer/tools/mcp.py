"""Tools of any MCP server (Model Context Protocol), through the official SDK.

    tools = MCPTools.connect(command=["uvx", "some-server"])      a process of ours, over stdio
    tools = MCPTools.connect(url="http://host:8000/mcp")          streamable HTTP
    async with Toolbox([PythonTool(), *tools]) as toolbox: ...

The connection lives on a thread with an event loop of its own: it is opened here, used from
whichever loop the trajectories run on, and opened again after a failure.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import concurrent.futures
import contextlib
import json
import logging
import re
import shlex
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio
import httpx2
import jsonschema
from jsonschema.protocols import Validator
from jsonschema.validators import extend, validator_for
from mcp import Client, MCPError, StdioServerParameters, types
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from PIL import Image
from referencing import Registry

from trainer.images import ImageError, ImageLimits, open_image
from trainer.tools.protocol import CallError, ToolError, ToolInfraError, ToolSpec, neutralise
from trainer.types import Observation, Session

log = logging.getLogger(__name__)

MOST_TOOLS = 1_000
"""Of one server; it may list them in pages."""
SILENT = 3
"""Calls in a row without an answer in time, after which the server is taken to hang."""
_TRANSPORT = (OSError, EOFError, httpx2.HTTPError, anyio.BrokenResourceError)
_TRANSPORT += (anyio.ClosedResourceError, anyio.EndOfStream)


class MCPTools:
    """How to get the tools of a server: `MCPTools.connect`."""

    @classmethod
    def connect(
        cls,
        *,
        command: Sequence[str] | None = None,
        url: str | None = None,
        environment: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        names: Sequence[str] | None = None,
        timeout: float = 60.0,
        start_seconds: float = 60.0,
        images: ImageLimits | None = None,
    ) -> list[MCPTool]:
        """The server's tools, in its order. Blocks until it has answered.

        command: program and arguments of a server over stdio; it gets a few harmless variables of
        our environment and those of `environment`. url: of a server over streamable HTTP; headers
        go with every request (Authorization). names: of the tools that are wanted; None: all.
        timeout: seconds for a call. start_seconds: for the server to start and list its tools.
        images: what is decoded of the images in its answers.

        The tools share the connection; closing one of them, as a toolbox does, closes it. Raises
        ValueError for wrong arguments and for tools that cannot be offered, ToolInfraError where
        the server cannot be reached.
        """
        if (command is None) == (url is None) or command == []:
            raise ValueError("an MCP server is either a command or a url")
        if command is not None and headers:
            raise ValueError("headers are for a url: a command has an environment")
        if url is not None and environment:
            raise ValueError("an environment is for a command: a url has headers")
        if command is not None:
            program, *arguments = command
            server = StdioServerParameters(
                command=program, args=arguments, env=dict(environment or {})
            )
            name = shlex.join(command)[:80]
            # What it says on stderr goes where ours began: a notebook's or a test's is no file.
            connection = _Connection(
                lambda: stdio_client(server, sys.__stderr__), name, timeout, start_seconds, True
            )
        else:
            fixed = dict(headers or {})
            connection = _Connection(
                lambda: _http(url, fixed, timeout), url, timeout, start_seconds, False
            )
        try:
            listed = connection.wait(connection.list(), start_seconds)
            return _tools(listed, names, connection, images or ImageLimits())
        except BaseException:
            connection.close()
            raise


def _tools(
    listed: list[types.Tool],
    names: Sequence[str] | None,
    connection: _Connection,
    images: ImageLimits,
) -> list[MCPTool]:
    found = {tool.name: tool for tool in listed}
    if missing := [name for name in names or () if name not in found]:
        have = ", ".join(found) or "none"
        raise ValueError(f"the server has no tool {missing[0]!r}; its tools are: {have}")
    wanted = [found[name] for name in names] if names is not None else listed
    tools = [MCPTool(tool, connection, images) for tool in wanted]
    if len({tool.name for tool in tools}) < len(tools):
        have = ", ".join(tool.name for tool in tools)
        raise ValueError(f"tools of the server have the same name here: {have}; choose by names=")
    return tools


class MCPTool:
    """One tool of a server.

    What its code reports as an error is `tool_error`: MCP means such errors to be seen by the
    policy. What the connection or the protocol fails at is ToolInfraError, and the next call opens
    the connection anew. A call is made again by the toolbox only where the server says that the
    tool only reads, or is idempotent.
    """

    call_timeout = None
    """The connection has its own."""

    def __init__(self, tool: types.Tool, connection: _Connection, images: ImageLimits):
        """Raises ValueError for a schema that is none."""
        self.remote_name = tool.name
        self.name = re.sub(r"[^A-Za-z0-9_-]", "_", tool.name)[:64]
        self.spec = spec_of_mcp(tool, self.name)
        hints = tool.annotations
        self.idempotent = bool(hints and (hints.read_only_hint or hints.idempotent_hint))
        self._connection = connection
        self._images = images

    async def call(self, session: Session, **arguments: Any) -> Observation:
        result = await self._connection.call(self.remote_name, arguments)
        texts, images = await asyncio.to_thread(_contents, result, self._images)
        text = "\n".join(texts)
        if result.is_error:
            return Observation(f"Error: {text or 'the tool failed'}", images, "tool_error")
        session.images.extend(images)
        return Observation(text or ("" if images else "(no output)"), images)

    async def close(self) -> None:
        await asyncio.to_thread(self._connection.close)


# ---- arguments -----------------------------------------------------------------------------------


def spec_of_mcp(tool: types.Tool, name: str) -> ToolSpec:
    """How the tool is called. Arguments are strict: those that the schema does not name are
    refused, and 1.0 is no integer. Raises ValueError for a schema that is none."""
    schema = tool.input_schema
    try:
        validator = _validator(schema)
    except jsonschema.SchemaError as error:
        message = f"the schema of the server's tool {tool.name!r} is none: {error.message}"
        raise ValueError(message) from None
    properties = schema.get("properties", {})
    known = list(properties)
    takes = f"{name} takes {', '.join(known) if known else 'no arguments'}"
    open_ended = "additionalProperties" in schema or "patternProperties" in schema

    def validate(arguments: Mapping[str, Any]) -> dict[str, Any]:
        if not open_ended:
            for key in arguments:
                if key not in properties:
                    raise CallError(f"unknown argument {_short(key)}; {takes}")
        try:
            error = jsonschema.exceptions.best_match(validator.iter_errors(dict(arguments)))
        except Exception as broken:  # a reference that leads nowhere, a pattern that is none
            raise ToolInfraError(f"the schema of {tool.name!r} fails: {broken}") from broken
        if error is not None:
            raise CallError(_explain(error, takes))
        return dict(arguments)

    parameters = {"type": "object", "properties": {}, "required": [], **_harmless(schema)}
    for key in ("title", "$schema", "additionalProperties"):
        parameters.pop(key, None)
    description = " ".join(neutralise(tool.description or tool.title or name).split())
    function = {"name": name, "description": description, "parameters": parameters}
    return ToolSpec(name, {"type": "function", "function": function}, validate)


def _validator(schema: dict[str, Any]) -> Validator:
    """Raises SchemaError. References never lead out of the schema: nothing is fetched."""
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    checker = kind.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return extend(kind, type_checker=checker)(schema, registry=Registry())


def _explain(error: jsonschema.ValidationError, takes: str) -> str:
    """In one line that the policy can act on."""
    path = ".".join(str(part) for part in error.absolute_path)
    message = error.message if len(error.message) <= 200 else error.message[:200] + "..."
    if path:
        return f"argument {_short(path)}: {message}; {takes}"
    return f"{message}; {takes}"


def _short(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:64] + "...")


def _harmless(node: Any) -> Any:
    """The schema, with no description that could speak for somebody in the system prompt. What
    has a meaning for validation stays as it is."""
    if isinstance(node, list):
        return [_harmless(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: neutralise(value)
        if key in ("description", "title") and isinstance(value, str)
        else _harmless(value)
        for key, value in node.items()
    }


# ---- results -------------------------------------------------------------------------------------


def _contents(
    result: types.CallToolResult, limits: ImageLimits
) -> tuple[list[str], tuple[Image.Image, ...]]:
    """Texts and images of a result. What cannot be shown is named, never dropped in silence."""
    texts: list[str] = []
    images: list[Image.Image] = []

    def picture(data: str) -> None:
        if len(images) >= limits.count:
            texts.append("[image not shown: too many]")
            return
        try:
            if len(data) > 4 * (limits.file_bytes // 3 + 1):
                raise ImageError("the file is too long")
            images.append(open_image(base64.b64decode(data, validate=True), limits))
        except (ImageError, binascii.Error, ValueError) as error:
            texts.append(f"[image not shown: {error}]")

    for block in result.content:
        if isinstance(block, types.TextContent):
            texts.append(block.text)
        elif isinstance(block, types.ImageContent):
            picture(block.data)
        elif isinstance(block, types.EmbeddedResource):
            resource = block.resource
            if isinstance(resource, types.TextResourceContents):
                texts.append(resource.text)
            elif (resource.mime_type or "").startswith("image/"):
                picture(resource.blob)
            else:
                texts.append(f"[{resource.mime_type or 'a resource'} not shown]")
        elif isinstance(block, types.ResourceLink):
            texts.append(f"[{block.uri}]")
        else:
            texts.append(f"[{block.type} not shown]")
    if not result.content and result.structured_content is not None:
        texts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return texts, tuple(images)


# ---- the connection ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _http(url: str, headers: dict[str, str], timeout: float):
    """A transport for one connection: with our headers, and answers as long as images are."""
    client = httpx2.AsyncClient(headers=headers, timeout=httpx2.Timeout(30.0, read=timeout + 30.0))
    transport = streamable_http_client(url, http_client=client, max_sse_event_size=256 << 20)
    async with client, transport as streams:
        yield streams


class _Connection:
    """A client of one server, on a thread of its own, that is made anew after it has failed."""

    def __init__(
        self,
        server: Callable[[], Any],
        name: str,
        timeout: float,
        start_seconds: float,
        is_process: bool,
    ):
        """server: makes what the SDK's Client takes; a transport can be used once only."""
        self._server = server
        self._name = name
        self._timeout = timeout
        self._start_seconds = start_seconds
        self._is_process = is_process
        self._live: _Live | None = None
        self._silent = 0
        self._closed = False
        self._closing = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._lock = asyncio.Lock()
        # A daemon: a trainer that dies of an exception must not wait for it.
        self._thread = threading.Thread(target=self._run, name=f"mcp {name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    # -- from other threads

    def wait(self, coroutine: Any, seconds: float) -> Any:
        """Its result, blocking. Raises ToolInfraError where that takes too long."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(seconds)
        except concurrent.futures.TimeoutError:  # TimeoutError itself, since Python 3.11
            future.cancel()
            raise ToolInfraError(
                f"the MCP server {self._name} did not answer in {seconds:g} s"
            ) from None

    async def call(self, name: str, arguments: dict[str, Any]) -> types.CallToolResult:
        """Raises ToolError or ToolInfraError. Cancelling it cancels the call at the server."""
        if self._closed:
            raise ToolInfraError(f"the connection to the MCP server {self._name} is closed")
        coroutine = self._request(lambda client: client.call_tool(name, arguments))
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def close(self) -> None:
        """Ends the server where it is a process of ours. May be called twice."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(ToolInfraError):
            self.wait(self._leave(), 15.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)

    # -- on the connection's own thread

    async def list(self) -> list[types.Tool]:
        tools: list[types.Tool] = []
        cursor = None
        while True:
            page = await self._request(lambda client, at=cursor: client.list_tools(cursor=at))
            tools += page.tools
            cursor = page.next_cursor
            if not cursor:
                return tools
            if len(tools) > MOST_TOOLS:
                raise ValueError(f"the server has more than {MOST_TOOLS:,} tools; choose by names=")

    async def _request(self, ask: Callable[[Client], Any]) -> Any:
        live = await self._connected()
        live.calls += 1
        try:
            answer = await ask(live.client)
        except MCPError as error:
            if error.code == types.INVALID_PARAMS:
                raise ToolError(str(error)[:1000]) from None
            self._silent += error.code == types.REQUEST_TIMEOUT
            if self._broken(error.code):
                self._drop(live)
            raise self._failed(f"{error} ({error.code})") from error
        except Exception as error:
            if isinstance(error, _TRANSPORT):
                self._drop(live)
            raise self._failed(f"{type(error).__name__} {error}") from error
        finally:
            live.calls -= 1
            live.leave()
        self._silent = 0
        return answer

    def _broken(self, code: int) -> bool:
        """Whether an error of the protocol means that the connection is of no more use."""
        if code == types.REQUEST_TIMEOUT:
            return self._silent >= SILENT
        # Over HTTP a server that was started again answers with many a code, and to connect anew
        # costs nothing; over stdio it costs the process, so only its end counts.
        return code == types.CONNECTION_CLOSED or not self._is_process

    def _failed(self, reason: str) -> ToolInfraError:
        return ToolInfraError(f"the MCP server {self._name} failed: {reason[:300]}")

    async def _connected(self) -> _Live:
        async with self._lock:
            if self._live is None:
                opened: asyncio.Future[_Live] = self._loop.create_future()
                # The SDK's scopes must be left by the task that has entered them.
                holder = asyncio.create_task(self._hold(opened))
                try:
                    self._live = await asyncio.wait_for(opened, self._start_seconds)
                except asyncio.TimeoutError:
                    holder.cancel()
                    raise self._failed(f"no connection in {self._start_seconds:g} s") from None
                self._live.holder = holder
                self._silent = 0
            return self._live

    async def _hold(self, opened: asyncio.Future[_Live]) -> None:
        live = None
        try:
            async with Client(self._server(), read_timeout_seconds=self._timeout) as client:
                live = _Live(client)
                if not opened.done():
                    opened.set_result(live)
                await live.over.wait()
        except Exception as error:  # groups of exceptions among them
            reason = self._failed(_innermost(error))
            if opened.done():
                log.warning("%s", reason)
            else:
                opened.set_exception(reason)
        finally:
            if not opened.done():
                opened.set_exception(self._failed("it went away"))
            if live is not None and self._live is live:
                self._live = None

    def _drop(self, live: _Live) -> None:
        """No new calls for a connection that has failed; the next one makes another."""
        if self._live is live:
            log.warning("the connection to the MCP server %s is made anew", self._name)
            self._live = None
        live.dropped = True

    async def _leave(self) -> None:
        live, self._live = self._live, None
        if live is not None and live.holder is not None:
            live.over.set()
            await asyncio.wait([live.holder], timeout=10.0)


class _Live:
    """A client that is connected."""

    def __init__(self, client: Client):
        self.client = client
        self.over = asyncio.Event()
        self.holder: asyncio.Task[None] | None = None
        self.calls = 0
        self.dropped = False

    def leave(self) -> None:
        """Over, once it was dropped and the last of its calls has ended: others may be alive."""
        if self.dropped and self.calls == 0:
            self.over.set()


def _innermost(error: BaseException) -> str:
    while inner := getattr(error, "exceptions", None):
        error = inner[0]
    return f"{type(error).__name__} {error}".strip()
