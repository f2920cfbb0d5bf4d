"""What a tool is: a name, a typed `call`, and the JSON schema that follows from the two.

    class Clock:
        name = "clock"

        async def call(self, session: Session, zone: str) -> Observation:
            '''Tell the time.

            Args:
                zone: an IANA time zone
            '''
            return Observation(...)

The docstring is what the policy reads. `FunctionTool` makes a tool of a plain typed function.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from PIL import Image
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from trainer.types import Observation, Session


class ToolError(Exception):
    """The policy's own fault. The message is shown to it; the call counts."""


class CallError(ToolError):
    """The call is malformed: the message says what is wrong with it."""


class ToolInfraError(Exception):
    """Nobody's fault: a process, a server or a disk failed. The rollout is not scored."""


class Tool(Protocol):
    """A tool names its arguments as typed parameters of `call`, after the session.

    A tool may also have

    close()         plain or async: its toolbox calls it once, at the end
    end(session)    likewise, once for every trajectory that is over: frees what it holds for it
    spec            a ToolSpec, where the schema comes from elsewhere (a server)
    call_timeout    seconds of wall clock after which the toolbox cancels a call, queueing included;
                    None: the tool bounds its calls itself. Without it the toolbox's own holds
    timeout_status  "tool_error" where a call that slow is the policy's fault; else "infra_error"
    idempotent      True: a call that failed with ToolInfraError may be made again
    """

    name: str

    async def call(self, session: Session, **arguments: Any) -> Observation:
        """Answer one call.

        Raises ToolError for what the policy did wrong and ToolInfraError for what it did not.
        Every other exception is taken for a bug of the tool: it is logged, the policy goes free.
        """


@dataclass(frozen=True)
class ToolSpec:
    """How a tool is called.

    schema is in the function form of OpenAI and Qwen: {"type": "function", "function": {...}}.
    validate takes decoded JSON arguments, returns keyword arguments, or raises CallError.
    """

    name: str
    schema: dict[str, Any]
    validate: Callable[[Mapping[str, Any]], dict[str, Any]]


def spec_of(tool: Tool) -> ToolSpec:
    """The tool's own `spec`, or the one that its `call` implies. Raises TypeError for a `call`
    that is not fully typed or has no docstring."""
    spec = getattr(tool, "spec", None)
    return spec if isinstance(spec, ToolSpec) else spec_from_signature(tool.call, tool.name)


def spec_from_signature(function: Callable[..., Any], name: str) -> ToolSpec:
    """A spec from type hints and a docstring with an optional `Args:` section.

    A first parameter of type Session is not an argument. Arguments are strict: "3" is no int.
    Raises TypeError where a name, a hint or the docstring is missing or cannot be a schema.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise TypeError(f"a tool's name is 1 to 64 of A-Z a-z 0-9 _ -, got {name!r}")
    description, about = _read_docstring(inspect.getdoc(function) or "")
    if not description:
        raise TypeError(f"tool {name!r} has no docstring: the policy would not know what it does")
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in _arguments(function, hints):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"tool {name!r}: parameter {parameter} cannot be given by name")
        if parameter.name not in hints:
            raise TypeError(f"tool {name!r}: parameter {parameter.name!r} has no type")
        field = hints[parameter.name]
        if parameter.name in about:
            field = Annotated[field, Field(description=about[parameter.name])]
        optional = parameter.default is not parameter.empty
        fields[parameter.name] = NotRequired[field] if optional else field
    # A TypedDict and not a model: an argument may be called "schema" or "copy", and what was not
    # given stays away, so that the function's own default applies.
    arguments_type = TypedDict("Arguments", fields)  # type: ignore[operator]
    arguments_type.__pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[attr-defined]
    adapter = TypeAdapter(arguments_type)

    def validate(arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            # By way of JSON: strict JSON knows that an array may be a tuple and a string an enum.
            return dict(adapter.validate_json(json.dumps(arguments)))
        except ValidationError as error:
            raise CallError(_explain(error, name, list(fields))) from None

    parameters = _without_titles(adapter.json_schema())
    parameters.pop("additionalProperties", None)
    parameters = {"type": "object", "properties": {}, "required": [], **parameters}
    schema = {"name": name, "description": description, "parameters": parameters}
    return ToolSpec(name, {"type": "function", "function": schema}, validate)


class FunctionTool:
    """A tool made of a typed function, sync (it then runs in a thread) or async.

        @FunctionTool
        def add(a: int, b: int) -> str:
            '''Add two integers.'''
            return str(a + b)

    The function may take the Session first. It may return an Observation, text, an image, or a
    list of texts and images; anything else is shown by `str`. The images it returns become the
    session's. The rules of `Tool.call` for exceptions hold.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        self.function = function
        self.name = name or function.__name__
        self.spec = spec_from_signature(function, self.name)
        hints = typing.get_type_hints(function)
        self._takes_session = len(_arguments(function, hints)) < len(_parameters(function))

    async def call(self, session: Session, **arguments: Any) -> Observation:
        first = (session,) if self._takes_session else ()
        if inspect.iscoroutinefunction(self.function):
            value = await self.function(*first, **arguments)
        else:
            value = await asyncio.to_thread(self.function, *first, **arguments)
        if isinstance(value, Observation):
            return value
        parts = value if isinstance(value, (list, tuple)) else [value]
        images = tuple(part for part in parts if isinstance(part, Image.Image))
        texts = [str(part) for part in parts if not isinstance(part, Image.Image)]
        session.images.extend(images)
        return Observation("\n".join(texts), images)


PROTOCOL_TAGS = ("answer", "tool_call", "tool_response", "reason", "think", "image", "video")
"""Tags that mean something in a trajectory. Text from a tool must not contain one."""

_OPENING = re.compile(rf"<(?=[|\uff5c]|\s*/?\s*(?:{'|'.join(PROTOCOL_TAGS)})\b)", re.IGNORECASE)
_UNSPEAKABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def neutralise(text: str, markers: Iterable[str] = ()) -> str:
    """Tool text that no template, tokenizer or parser can take for the policy's or the user's.

    A space after the bracket breaks <|im_end|>, <answer> and their like: "< |im_end|>". Nothing is
    deleted, so no marker can be put together from the rest of others. Control characters, NUL and
    lone surrogates become U+FFFD. `markers`: further literal tokens to break, such as "[INST]".
    """
    text = _UNSPEAKABLE.sub("\ufffd", text.replace("\r\n", "\n"))
    text = _OPENING.sub("< ", text)
    for marker in markers:
        if len(marker) > 1:
            text = text.replace(marker, f"{marker[0]} {marker[1:]}")
    return text


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _arguments(function: Callable[..., Any], hints: dict[str, Any]) -> list[inspect.Parameter]:
    """The parameters that the policy fills in: all but a leading Session."""
    parameters = _parameters(function)
    if parameters and hints.get(parameters[0].name) is Session:
        return parameters[1:]
    return parameters


def _read_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """The description on one line, and what the `Args:` section says of each parameter."""
    sections = re.split(r"^(Args|Returns|Raises|Yields|Example):[ ]*$", docstring, flags=re.M)
    named = dict(zip(sections[1::2], sections[2::2], strict=True))
    entries = re.split(r"^ {1,4}(\w+)(?: \([^)]*\))?:", named.get("Args", ""), flags=re.M)
    pairs = zip(entries[1::2], entries[2::2], strict=True)
    return " ".join(sections[0].split()), {name: " ".join(text.split()) for name, text in pairs}


def _without_titles(node: Any) -> Any:
    """A JSON schema without pydantic's generated titles. A property named "title" stays."""
    if isinstance(node, list):
        return [_without_titles(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {name: _without_titles(item) for name, item in value.items()}
        if key in ("properties", "$defs")
        else _without_titles(value)
        for key, value in node.items()
        if key != "title"
    }


def _explain(error: ValidationError, tool: str, known: list[str]) -> str:
    """The first thing that is wrong, in one line that the policy can act on."""
    first = error.errors(include_url=False, include_context=False, include_input=True)[0]
    path = ".".join(str(part) for part in first["loc"])
    path = path if len(path) <= 64 else path[:64] + "..."
    takes = f"{tool} takes {', '.join(known) if known else 'no arguments'}"
    if first["type"] == "missing":
        return f"missing argument {path!r}; {takes}"
    if first["type"] == "extra_forbidden":
        return f"unknown argument {path!r}{nearest(path, known)}; {takes}"
    given = type(first["input"]).__name__
    problem = first["msg"][:1].lower() + first["msg"][1:200]
    return f"argument {path!r}: {problem}, got {given}"


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'python'?)" for a slip of the pen, else ""."""
    by_folded = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(name[:64].casefold(), by_folded, n=1)
    return f" (did you mean {by_folded[close[0]]!r}?)" if close else ""
