"""What the columns of a file mean: each layout reads a row as a question or as a conversation.

    metis-rl         data_source, prompt, images, ability, reward_model, extra_info: the files of
                     Accio-Lab/Metis-RL, and of verl
    metis-coldstart  messages (a JSON string), images (base64): the files of
                     Accio-Lab/Metis-ColdStart
    messages         messages (a list), images or image, tools: conversations, as TRL trains on them
    completion       prompt, completion, images or image, tools: likewise
    vstar, hr-bench, mathvista
                     benchmarks: see trainer.data.benchmarks
    prompt           prompt (text or messages), answer | solution | ground_truth, images or image
    questions        question, answer, images or image, kind | ability, needs_tool, id: our own

A right answer may be a list, of which any one will do. `options` (a list, or {"A": text, ...})
makes a prompt or a question a multiple choice; they are shown below a text that does not list them
itself. data_source and extra_info are kept for reward functions.

Every value is checked; what does not fit raises BadRow. Images stand where a placeholder does:
"<image>" in text, or a part {"type": "image"}. Where a row has images and no placeholder at all,
they stand before the first text of the user (TRL's convention), except in metis-coldstart, whose
images belong to several turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.chat import CALL_OPEN, call_text
from trainer.data.benchmarks import BENCHMARKS
from trainer.data.examples import Conversation, Example, Message, Speaker, question_text
from trainer.data.pictures import BadRow, Picture, picture
from trainer.data.rows import (
    Layout,
    Row,
    lists_options,
    mapping_of,
    options_of,
    scalar,
    text_of,
    truths_of,
    with_options,
)
from trainer.data.sources import DataError, decode_json
from trainer.images import ImageLimits

PLACEHOLDER = "<image>"
_NAMED = ("answer", "solution", "ground_truth")


@dataclass(frozen=True)
class _Hole:
    """Where an image stands in a message."""

    value: Any = None
    """The image itself; None: the next one of the images column."""


def _read_metis_rl(row: Row) -> Example:
    reward = mapping_of(row.get("reward_model"), "reward_model")
    truths = truths_of(reward.get("ground_truth"), "reward_model.ground_truth")
    extra = {"data_source": "metis-rl", "extra_info": {}} | row.extra()
    stated = extra["extra_info"].get("index")
    if stated is not None:
        stated = f"{extra['data_source']}/{scalar(stated, 'extra_info.index')}"
    return _example(row, "prompt", truths, stated, extra)


def _read_prompt(row: Row) -> Example:
    return _example(row, "prompt", _truths(row), row.get("id"), row.extra())


def _read_question(row: Row) -> Example:
    return _example(row, "question", _truths(row), row.get("id"), row.extra())


def _truths(row: Row) -> list[str]:
    return truths_of(row.get(*_NAMED), "the answer")


def _example(
    row: Row, column: str, truths: Sequence[str], stated: Any, extra: Mapping[str, Any]
) -> Example:
    needs_tool = row.get("needs_tool")
    if needs_tool is not None and not isinstance(needs_tool, bool):
        raise BadRow("wrong_type", f"needs_tool is {needs_tool!r}, not true, false or null")
    messages, pictures = _messages(row, column)
    said = [message for message in messages if message.speaker != "system"]
    if len(said) != 1 or said[0].speaker != "question":
        raise BadRow("unsupported", f"a prompt of {len(said)} turns; one question is read")
    text = question_text(said[0].parts)
    if not text:
        raise BadRow("empty_prompt", "the question has no text")
    options = {}
    if (given := row.get("options")) is not None:
        options = options_of(given, "options")
        if not lists_options(text):
            text = with_options(text, options)
    return Example(
        row.id(stated, text, *truths, *pictures),
        row.kind(),
        text,
        tuple(pictures),
        truths[0],
        needs_tool,
        extra,
        tuple(truths[1:]),
        options,
    )


def _read_messages(row: Row) -> Conversation:
    return _conversation(row, *_messages(row, "messages"))


def _read_completion(row: Row) -> Conversation:
    return _conversation(row, *_messages(row, "prompt", "completion"))


def _conversation(row: Row, messages: list[Message], pictures: list[Picture]) -> Conversation:
    if not any(message.speaker == "policy" for message in messages):
        raise BadRow("no_policy_turn", f"{len(messages)} messages, none of role assistant")
    asked = [message.text for message in messages if message.speaker == "question"]
    if not asked or not asked[0].strip():
        raise BadRow("empty_prompt", "no message of the user, or one without text")
    tools = row.get("tools")
    tools = decode_json(tools) if isinstance(tools, str) else tools
    if not isinstance(tools or [], list) or not all(isinstance(tool, dict) for tool in tools or []):
        raise BadRow("wrong_type", "tools must be a list of JSON schemas")
    said = [(message.role, message.parts) for message in messages]
    return Conversation(
        row.id(row.get("id"), said, *pictures),
        row.kind(),
        tuple(messages),
        tuple(pictures),
        tuple(_without_nulls(tools or [])),
        row.extra(),
    )


def _messages(row: Row, *columns: str) -> tuple[list[Message], list[Picture]]:
    """The messages of these columns, one behind the other, and the pictures in their order."""
    given = row.images()
    raw = [one for column in columns for one in _message_list(row, column)]
    contents = [_content(message) for message in raw]
    in_parts = any(not isinstance(part, str) for parts in contents for part in parts)
    if not in_parts:
        contents = [
            parts if message["role"] == "assistant" else _split(parts)
            for message, parts in zip(raw, contents, strict=True)
        ]
    holes = sum(not isinstance(part, str) for parts in contents for part in parts)
    if holes == 0 and given and not row.strict:
        first = next((n for n, message in enumerate(raw) if message["role"] == "user"), None)
        if first is None:
            raise BadRow("empty_prompt", "no message of the user")
        contents[first] = [_Hole()] * len(given) + contents[first]
        holes = len(given)
    pictures, queue = [], iter(given)
    messages: list[Message] = []
    for message, parts in zip(raw, contents, strict=True):
        numbered: list[str | int] = []
        for part in parts:
            if isinstance(part, str):
                numbered.append(text_of(part, "content"))
                continue
            if part.value is None:
                taken = next(queue, None)
            else:
                taken = picture(part.value, row.folder, row.limits)
            if taken is None:
                raise BadRow("image_count", f"{holes} placeholders but {len(given)} images")
            numbered.append(len(pictures))
            pictures.append(taken)
        before = messages[-1] if messages else None
        messages.append(Message(message["role"], _speaker(message, before), tuple(numbered)))
    if next(queue, None) is not None:
        raise BadRow("image_count", f"{holes} placeholders but {len(given)} images")
    return messages, pictures


def _speaker(message: Mapping[str, Any], before: Message | None) -> Speaker:
    role = message["role"]
    if role == "system":
        return "system"
    if role == "assistant":
        return "policy"
    answers = before is not None and (
        before.speaker == "observation" or (before.speaker == "policy" and CALL_OPEN in before.text)
    )
    return "observation" if role == "tool" or answers else "question"


def _message_list(row: Row, column: str) -> list[dict[str, Any]]:
    value = row.get(column)
    if value is None:
        raise BadRow("empty_prompt", f"{column} is null")
    if isinstance(value, str):
        plain = column != "messages" and not value.lstrip().startswith("[{")
        if plain:
            role = "assistant" if column == "completion" else "user"
            return [{"role": role, "content": value}]
        value = decode_json(value)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BadRow("wrong_type", f"{column} is not a list of messages")
    if not value:
        raise BadRow("empty_prompt", f"{column} has no message")
    for one in value:
        if one.get("role") == "developer":
            one["role"] = "system"
        if one.get("role") not in ("system", "user", "assistant", "tool"):
            raise BadRow("wrong_type", f"{column} has a message of role {one.get('role')!r}")
    return value


def _content(message: Mapping[str, Any]) -> list[str | _Hole]:
    content, calls = message.get("content"), message.get("tool_calls")
    if message.get("reasoning_content") or message.get("thinking"):
        raise BadRow("unsupported", "thoughts in a field of their own; write them into content")
    if content is None and not calls:
        raise BadRow("empty_prompt", f"a message of role {message['role']} is null")
    if isinstance(content, str) or content is None:
        content = [{"type": "text", "text": content or ""}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadRow("wrong_type", "content is neither a string nor a list of parts")
    if not isinstance(calls or [], list):
        raise BadRow("wrong_type", f"tool_calls is {type(calls).__name__}, not a list")
    parts = [_part(part) for part in content]
    return parts + [call_text(*_call(call)) for call in calls or []]


def _part(part: Mapping[str, Any]) -> str | _Hole:
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadRow("wrong_type", f"text is {type(part.get('text')).__name__}")
        return part["text"]
    if kind == "image":
        return _Hole(next((v for name in ("image", "url", "path") if (v := part.get(name))), None))
    if kind == "image_url":
        return _Hole(mapping_of(part.get("image_url"), "image_url").get("url"))
    raise BadRow("unsupported", f"content of type {kind!r}")


def _split(parts: list[str]) -> list[str | _Hole]:
    """Cuts texts at their placeholders."""
    result: list[str | _Hole] = []
    for text in parts:
        for number, piece in enumerate(text.split(PLACEHOLDER)):
            result += ([_Hole()] if number else []) + ([piece] if piece else [])
    return result


def _call(call: Any) -> tuple[str, dict[str, Any]]:
    """A call in the form of OpenAI: {"function": {"name", "arguments": object or JSON}}."""
    function = mapping_of(mapping_of(call, "a tool call").get("function") or call, "a tool call")
    name, arguments = function.get("name"), function.get("arguments")
    if isinstance(arguments, str):
        arguments = decode_json(arguments)
    if not isinstance(name, str) or not isinstance(arguments or {}, dict):
        raise BadRow("wrong_type", "a tool call needs a name and an object of arguments")
    # Parquet gives every call the arguments of all others, as nulls.
    return name, _without_nulls(arguments or {})


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


_IMAGES = ("images", "image")
_ABOUT = ("id", "kind", "ability", "data_source", "extra_info", "needs_tool")
_ASKED = (*_NAMED, "options", *_IMAGES, *_ABOUT)
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "metis-rl",
            ("prompt", "reward_model"),
            ("data_source", "images", "ability", "extra_info"),
            "questions",
            _read_metis_rl,
        ),
        Layout(
            "metis-coldstart",
            ("messages", "images"),
            _ABOUT + ("tools",),
            "conversations",
            _read_messages,
        ),
        Layout(
            "messages",
            ("messages",),
            _IMAGES + _ABOUT + ("tools",),
            "conversations",
            _read_messages,
        ),
        Layout(
            "completion",
            ("prompt", "completion"),
            _IMAGES + _ABOUT + ("tools",),
            "conversations",
            _read_completion,
        ),
        *BENCHMARKS,
        Layout("prompt", ("prompt",), _ASKED, "questions", _read_prompt, _NAMED),
        Layout("questions", ("question",), _ASKED, "questions", _read_question, _NAMED),
    )
}


def find_layout(columns: Mapping[str, str], name: str | None = None, where: str = "") -> Layout:
    """The named layout, or the first whose columns are there; raises DataError where they are not.

    columns: name -> type, in words.
    """
    if name is not None and name not in LAYOUTS:
        raise DataError(f"there is no layout {name!r}; the layouts are: {', '.join(LAYOUTS)}")
    for layout in (LAYOUTS[name],) if name else LAYOUTS.values():
        if not layout.fits(columns):
            continue
        if layout.name == "metis-coldstart" and not name and "list" in columns["messages"]:
            continue
        return layout
    known = "\n".join(f"  {one.name}: {', '.join(_asked(one))}" for one in LAYOUTS.values())
    found = ", ".join(f"{column} ({kind})" for column, kind in columns.items()) or "none"
    expected = f"the layout {name!r}" if name else "any layout"
    raise DataError(
        f"{where}: the columns are not those of {expected}\nfound: {found}\nlayouts known:\n{known}"
    )


def _asked(layout: Layout) -> list[str]:
    return [*layout.needs, *(["/".join(layout.any_of)] if layout.any_of else [])]


def read_row(
    layout: Layout,
    values: Mapping[str, Any],
    folder: Path,
    limits: ImageLimits,
    *,
    content_ids: bool = False,
) -> Example | Conversation:
    """One row. folder: what paths of images are relative to. content_ids: the id is a hash of what
    the row holds, whatever id it states. Raises BadRow."""
    strict = layout.name == "metis-coldstart"
    return layout.read(Row(values, folder, limits, strict, content_ids))
