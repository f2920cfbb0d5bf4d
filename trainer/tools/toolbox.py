"""The tools of a run: reads the policy's calls, runs them, and bounds what comes back."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import math
import re
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from PIL import Image

from trainer.chat import find_calls
from trainer.images import ImageLimits, to_rgb
from trainer.tools.protocol import (
    CallError,
    Tool,
    ToolError,
    ToolInfraError,
    nearest,
    neutralise,
    spec_of,
)
from trainer.types import Observation, ObservationStatus, Session, ToolCall

log = logging.getLogger(__name__)

MAX_DEPTH = 32
"""Levels of brackets in a call. Past it the text is refused before it is decoded."""
CANCEL_SECONDS = 2.0
"""For a cancelled call to give way; a call that does not is left behind."""
END_SECONDS = 30.0
"""For a tool to free what it holds for a trajectory."""
NAMED = 32
"""Names of tools that an error lists, at most."""

_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


class Toolbox:
    """The tools that a policy may call.

        async with Toolbox([PythonTool(), TextSearch(passages)]) as toolbox:
            call, observation = await toolbox.execute('{"name": "python", ...}', session)
            await toolbox.end(session)

    `execute` takes what stands inside <tool_call></tool_call>, `execute_turn` a whole turn.
    Afterwards `session.images` is what it was plus exactly the images of the observation: the
    n-th image that the policy has seen is image_n, always.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        max_text: int = 10_000,
        max_call: int = 32_768,
        images: ImageLimits | None = None,
        markers: Iterable[str] = (),
        max_calls_per_turn: int = 1,
        call_timeout: float | None = 300.0,
        retries: int = 2,
        backoff: float = 0.5,
    ):
        """max_text: characters of tool text that reach the policy. max_call: characters of a call.
        markers: further literal tokens, broken up in tool text besides the usual ones.
        max_calls_per_turn: a turn with more is refused whole (the trainer's own sampler ends a turn
        at its first call). call_timeout: seconds of wall clock for a call of a tool that states
        none of its own; None: no limit. retries: how often a call of an idempotent tool is made
        again after a failure of its infrastructure, the first time `backoff` seconds later, then
        twice as late each time.
        Raises TypeError for a tool without types or docstring, ValueError for two of one name and
        for a number out of range."""
        if max_calls_per_turn < 1 or retries < 0 or backoff < 0:
            raise ValueError(
                "max_calls_per_turn must be at least 1, retries and backoff not negative; got "
                f"{max_calls_per_turn}, {retries}, {backoff}"
            )
        self.tools = list(tools)
        self.max_text = max_text
        self.max_call = max_call
        self.images = images or ImageLimits()
        self.markers = tuple(markers)
        self.max_calls_per_turn = max_calls_per_turn
        self.call_timeout = call_timeout
        self.retries = retries
        self.backoff = backoff
        self._tools = {tool.name: tool for tool in self.tools}
        self._specs = {tool.name: spec_of(tool) for tool in self.tools}
        if len(self._tools) < len(self.tools):
            names = ", ".join(tool.name for tool in self.tools)
            raise ValueError(f"tools need distinct names, got {names}")
        for tool in self.tools:
            _checked_timeout(tool, call_timeout)

    def schemas(self) -> list[dict[str, Any]]:
        """The tools as a chat template wants them, in the order given."""
        return [self._specs[tool.name].schema for tool in self.tools]

    def parse(self, text: str) -> ToolCall:
        """The call that `text`, what stands between <tool_call> and </tool_call>, spells out.

        Raises CallError, whose message is for the policy. Strict: what is not exactly
        {"name": <a tool>, "arguments": {<its arguments, of their types>}} is not a call.
        """
        if len(text) > self.max_call:
            raise CallError(
                f"the call has {len(text):,} characters, at most {self.max_call:,} are allowed"
            )
        _check_depth(text)
        call = _decode(text)
        if not isinstance(call, dict):
            raise CallError(f"the call must be a JSON object, got {_json_type(call)}")
        for key in ("name", "arguments"):
            if key not in call:
                raise CallError(f'the call has no "{key}"; it takes "name" and "arguments"')
        if len(call) > 2:
            extra = next(key for key in call if key not in ("name", "arguments"))
            raise CallError(f'unknown key {_short(extra)}; a call takes "name" and "arguments"')
        name, arguments = call["name"], call["arguments"]
        if not isinstance(name, str):
            raise CallError(f'"name" must be a string, got {_json_type(name)}')
        if name not in self._specs:
            known = ", ".join(list(self._specs)[:NAMED]) or "none"
            more = f" and {len(self._specs) - NAMED} more" if len(self._specs) > NAMED else ""
            meant = nearest(name, self._specs)
            raise CallError(f"there is no tool {_short(name)}{meant}; the tools are: {known}{more}")
        if not isinstance(arguments, dict):
            raise CallError(f'"arguments" must be an object, got {_json_type(arguments)}')
        return ToolCall(name, self._specs[name].validate(arguments))

    async def execute(self, text: str, session: Session) -> tuple[ToolCall | None, Observation]:
        """Parse and run one call; None for a call that could not be parsed.

        Every attempt counts in `session.calls`. Never raises for what a call or a tool did wrong:
        that is the observation's status. Cancellation passes through.
        """
        session.calls += 1
        shown = len(session.images)
        call = None
        try:
            try:
                call = self.parse(text)
                observation = self._bound(await self._run(call, session))
            except ToolError as error:
                observation = self._bound(Observation(f"Error: {error}", status="tool_error"))
        except ToolInfraError as error:
            log.error("tool %s failed: %s", call and call.name, error)
            observation = _UNAVAILABLE
        except Exception:
            # A bug of the tool or of ours. The policy must not be punished for it, and a run of
            # days must not end by it: the rollout goes unscored and the log has the traceback.
            log.exception("tool %s raised", call and call.name)
            observation = _UNAVAILABLE
        session.images[shown:] = observation.images
        return call, observation

    async def execute_turn(
        self, turn: str, session: Session
    ) -> tuple[ToolCall | None, Observation]:
        """Run what a turn of the policy calls (the whole text of the turn, which calls something).

        A turn with too many calls, with a tag that is not closed or with text behind its call is
        one malformed call: nothing of it is run. Where several calls are allowed they run one after
        another up to the first that fails, their observations become one, and the call that is
        returned is the first.
        """
        calls, fault = find_calls(turn)
        if fault is None and len(calls) > self.max_calls_per_turn:
            fault = (
                f"the turn has {len(calls):,} calls, at most {self.max_calls_per_turn} may be made "
                "in one turn; none was run"
            )
        if fault is not None or not calls:
            session.calls += 1
            text = f"Error: {fault or 'the turn has no call'}"
            return None, self._bound(Observation(text, status="tool_error"))
        first, observation = await self.execute(calls[0], session)
        if len(calls) == 1:
            return first, observation
        shown = len(session.images) - len(observation.images)
        parts = [observation]
        for text in calls[1:]:
            if parts[-1].status != "ok":
                break
            parts.append((await self.execute(text, session))[1])
        left = len(calls) - len(parts)
        texts = [part.text for part in parts]
        if left:
            texts.append(f"[{left} further calls were not run]")
        images = tuple(image for part in parts for image in part.images)
        observation = self._bound(Observation("\n\n".join(texts), images, parts[-1].status))
        session.images[shown:] = observation.images
        return first, observation

    async def end(self, session: Session) -> None:
        """The trajectory is over: every tool frees what it holds for it. A tool that fails or does
        not return is logged, never raised: what it holds is its own until it is closed."""
        for tool in self._tools.values():
            end = getattr(tool, "end", None)
            if end is None:
                continue
            try:
                ending = end(session)
                if inspect.isawaitable(ending):
                    await _limited(ending, END_SECONDS)
            except _Late:
                log.error("tool %s did not end a session in %g s", tool.name, END_SECONDS)
            except Exception:
                log.exception("tool %s could not end a session", tool.name)

    async def close(self) -> None:
        """Close every tool that has a `close`, also where one of them fails; the first such error
        is raised at the end. Safe to call twice if the tools' are."""
        failure: Exception | None = None
        for tool in self.tools:
            close = getattr(tool, "close", None)
            if close is None:
                continue
            try:
                closing = close()
                if inspect.isawaitable(closing):
                    await closing
            except Exception as error:
                log.error("tool %s could not be closed: %s", tool.name, error)
                failure = failure or error
        if failure is not None:
            raise failure

    async def __aenter__(self) -> Toolbox:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _bound(self, observation: Observation) -> Observation:
        """The observation as the policy may see it: within the limits, without live markers."""
        images, notes = _fit(observation.images, self.images)
        text = "\n".join([observation.text, *notes]) if observation.text else "\n".join(notes)
        return replace(observation, text=self._harmless(text), images=images)

    def _harmless(self, text: str) -> str:
        limit = self.max_text
        if len(text) <= limit:
            return cut(neutralise(text, self.markers), limit)
        # What is cut away is never looked at: a tool may have said a gigabyte.
        head, note, tail = _ends(text, limit)
        head, tail = neutralise(head, self.markers), neutralise(tail, self.markers)
        return head[: limit - limit // 2] + note + tail[max(len(tail) - limit // 2, 0) :]

    async def _run(self, call: ToolCall, session: Session) -> Observation:
        """The tool's own observation, after as many attempts as the tool allows."""
        tool = self._tools[call.name]
        shown = len(session.images)
        attempts = 1 + (self.retries if getattr(tool, "idempotent", False) is True else 0)
        for attempt in range(attempts):
            last = attempt == attempts - 1
            try:
                observation = await self._attempt(tool, call, session)
                if observation.status != "infra_error" or last:
                    return observation
                log.warning("tool %s: infrastructure error; trying again", call.name)
            except ToolInfraError as error:
                if last:
                    raise
                log.warning("tool %s: %s; trying again", call.name, error)
            del session.images[shown:]
            await asyncio.sleep(self.backoff * 2**attempt)
        raise AssertionError("unreachable")

    async def _attempt(self, tool: Tool, call: ToolCall, session: Session) -> Observation:
        seconds = getattr(tool, "call_timeout", self.call_timeout)
        try:
            observation = await _limited(tool.call(session, **call.arguments), seconds)
        except _Late:
            status: ObservationStatus = getattr(tool, "timeout_status", "infra_error")
            log.warning("a call of tool %s took more than %g s", call.name, seconds)
            if status == "tool_error":
                return Observation(f"Error: timed out after {seconds:g} s", status=status)
            return _UNAVAILABLE
        if not isinstance(observation, Observation):
            raise TypeError(f"{call.name} returned {type(observation).__name__}")
        return observation


_UNAVAILABLE = Observation("Error: the tool is unavailable", status="infra_error")


class _Late(Exception):
    """The time that was given is over. Not TimeoutError: a tool may raise that by itself."""


async def _limited(awaitable: Awaitable[Any], seconds: float | None) -> Any:
    """What the awaitable gives. Raises _Late, and cancels it, where that takes too long, and
    RuntimeError where it tries to end the program or cancels itself."""
    task = asyncio.ensure_future(_contained(awaitable))
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        await _cancel(task)
        raise
    if not done:
        await _cancel(task)
        raise _Late
    if task.cancelled():
        raise RuntimeError("the call cancelled itself")
    return task.result()


async def _contained(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except SystemExit as error:  # it would end the event loop, and the run
        raise RuntimeError(f"the call tried to exit: {error}") from error


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancels, and waits for it a little: whoever ignores it must not hold up the trajectory."""
    task.cancel()
    await asyncio.wait({task}, timeout=CANCEL_SECONDS)
    if not task.done():
        log.error("a call that was cancelled goes on")
        task.add_done_callback(lambda late: late.cancelled() or late.exception())
    elif not task.cancelled():
        task.exception()  # seen, so that asyncio does not complain


def _checked_timeout(tool: Tool, default: float | None) -> None:
    seconds = getattr(tool, "call_timeout", default)
    status = getattr(tool, "timeout_status", "infra_error")
    if seconds is not None and not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"call_timeout of tool {tool.name!r} must be positive, got {seconds}")
    if status not in ("tool_error", "infra_error"):
        raise ValueError(
            f"timeout_status of {tool.name!r} must be tool_error or infra_error, got {status!r}"
        )


def cut(text: str, limit: int) -> str:
    """At most `limit` characters of the text, its head and its tail, with a note between them."""
    return text if len(text) <= limit else "".join(_ends(text, limit))


def _ends(text: str, limit: int) -> tuple[str, str, str]:
    """Head, note and tail of a text that is too long."""
    head = (limit + 1) // 2
    tail = text[len(text) - (limit - head) :]
    return text[:head], f"\n[{len(text) - limit:,} characters cut]\n", tail


def _fit(
    images: Sequence[Image.Image], limits: ImageLimits
) -> tuple[tuple[Image.Image, ...], list[str]]:
    """The images as RGB within the limits, and a note on each thing that was done to them."""
    fitted: list[Image.Image] = []
    notes: list[str] = []
    for image in images[: limits.count]:
        width, height = image.size
        strip = min(width, height) < 1 or max(width, height) > limits.aspect * min(width, height)
        if strip or width * height > limits.decoded:
            notes.append(f"[image of {width}x{height} pixels not shown]")
            continue
        try:
            image = to_rgb(image)
        except Exception:  # Pillow's decoders raise whatever they stumble on
            notes.append(f"[image of {width}x{height} pixels not shown: it is broken]")
            continue
        if width * height > limits.pixels:
            scale = math.sqrt(limits.pixels / (width * height))
            size = (max(1, int(width * scale)), max(1, int(height * scale)))
            notes.append(f"[image scaled from {width}x{height} to {size[0]}x{size[1]} pixels]")
            image = image.resize(size)
        fitted.append(image)
    if len(images) > limits.count:
        notes.append(f"[{len(images) - limits.count:,} more images not shown]")
    return tuple(fitted), notes


def _check_depth(text: str) -> None:
    """Before decoding: the decoder's own recursion must not be the limit."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        bracket = match[0]
        depth += (bracket in "[{") - (bracket in "]}")
        if depth > MAX_DEPTH:
            raise CallError(f"the call is nested deeper than {MAX_DEPTH} levels")


def _decode(text: str) -> Any:
    """Decoded JSON, without the liberties that `json` takes. Raises CallError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        decoded: dict[str, Any] = {}
        for key, value in pairs:
            if key in decoded:
                raise CallError(f"duplicate key {_short(key)}")
            decoded[key] = value
        return decoded

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise CallError(f"{_short(number)} is not a finite number")
        return value

    def integer(number: str) -> int:
        if len(number.lstrip("-")) > 18:
            raise CallError(f"{_short(number)} has more than 18 digits")
        return int(number)

    def constant(name: str) -> None:
        raise CallError(f"{name} is not JSON")

    try:
        decoded = json.loads(
            text,
            object_pairs_hook=unique,
            parse_float=finite,
            parse_int=integer,
            parse_constant=constant,
        )
    except json.JSONDecodeError as error:
        raise CallError(f"malformed JSON: {error.msg} (character {error.pos + 1})") from None
    _check_characters(decoded)
    return decoded


def _check_characters(value: Any) -> None:
    """Raises CallError for a string that no file and no pipe could carry."""
    if isinstance(value, str):
        if "\0" in value:
            raise CallError("the call contains a NUL character")
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise CallError("the call contains a lone surrogate")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_characters(key)
            _check_characters(item)
    elif isinstance(value, list):
        for item in value:
            _check_characters(item)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")


def _short(name: str, limit: int = 40) -> str:
    """A quoted name, fit for an error message: printable, and not a megabyte long."""
    return ascii(name) if len(name) <= limit else ascii(name[:limit]) + "..."
