"""The tools of a run: reads the policy's calls, runs them, and bounds what comes back."""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from PIL import Image

from trainer.tools.protocol import CallError, Tool, ToolError, ToolInfraError, neutralise, spec_of
from trainer.types import Observation, Session, ToolCall

log = logging.getLogger(__name__)

MAX_DEPTH = 32
"""Levels of brackets in a call. Past it the text is refused before it is decoded."""

_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


@dataclass(frozen=True)
class ImageLimits:
    """What one observation may show."""

    count: int = 8
    """Images; those past it are not shown."""
    pixels: int = 5120 * 32 * 32
    """Pixels of one image; a larger one is scaled down."""
    aspect: float = 200.0
    """Longer side / shorter side; a longer strip is not shown: image processors refuse it."""


class Toolbox:
    """The tools that a policy may call.

        async with Toolbox([PythonTool(), TextSearch(passages)]) as toolbox:
            call, observation = await toolbox.execute('{"name": "python", ...}', session)

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
    ):
        """max_text: characters of tool text that reach the policy. max_call: characters of a call.
        markers: the tokenizer's special tokens, broken up in tool text besides the usual ones.
        Raises TypeError for a tool without types or docstring, ValueError for two of one name."""
        self.tools = list(tools)
        self.max_text = max_text
        self.max_call = max_call
        self.images = images or ImageLimits()
        self.markers = tuple(markers)
        self._tools = {tool.name: tool for tool in self.tools}
        self._specs = {tool.name: spec_of(tool) for tool in self.tools}
        if len(self._tools) < len(self.tools):
            names = ", ".join(tool.name for tool in self.tools)
            raise ValueError(f"tools need distinct names, got {names}")

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
            known = ", ".join(self._specs) or "none"
            raise CallError(f"there is no tool {_short(name)}; the tools are: {known}")
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
            call = self.parse(text)
            observation = await self._tools[call.name].call(session, **call.arguments)
            if not isinstance(observation, Observation):
                raise TypeError(f"{call.name} returned {type(observation).__name__}")
            observation = self._bound(observation)
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

    async def close(self) -> None:
        """Close every tool that has a `close`. Safe to call twice if the tools' are."""
        for tool in self.tools:
            close = getattr(tool, "close", None)
            if close is not None:
                closing = close()
                if inspect.isawaitable(closing):
                    await closing

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
        text = cut(neutralise(text, self.markers), self.max_text)
        return replace(observation, text=text, images=images)


_UNAVAILABLE = Observation("Error: the tool is unavailable", status="infra_error")


def cut(text: str, limit: int) -> str:
    """At most `limit` characters of the text, its head and its tail, with a note between them."""
    if len(text) <= limit:
        return text
    head = (limit + 1) // 2
    tail = text[len(text) - (limit - head) :]
    return f"{text[:head]}\n[{len(text) - limit:,} characters cut]\n{tail}"


def _fit(
    images: Sequence[Image.Image], limits: ImageLimits
) -> tuple[tuple[Image.Image, ...], list[str]]:
    """The images as RGB within the limits, and a note on each thing that was done to them."""
    fitted: list[Image.Image] = []
    notes: list[str] = []
    for image in images[: limits.count]:
        width, height = image.size
        if min(width, height) < 1 or max(width, height) > limits.aspect * min(width, height):
            notes.append(f"[image of {width}x{height} pixels not shown]")
            continue
        if width * height > limits.pixels:
            scale = math.sqrt(limits.pixels / (width * height))
            size = (max(1, int(width * scale)), max(1, int(height * scale)))
            notes.append(f"[image scaled from {width}x{height} to {size[0]}x{size[1]} pixels]")
            image = image.convert("RGB").resize(size)
        fitted.append(image if image.mode == "RGB" else image.convert("RGB"))
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
        if len(number) > 19:
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
