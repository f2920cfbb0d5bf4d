"""The conversation as text: system prompt, protocol tags, and how a turn is read.

The protocol is the reference's (Accio-Lab/Metis): every turn of the policy is

    <reason> ... </reason>
    <tool_call> {"name": ..., "arguments": {...}} </tool_call>     or     <answer> ... </answer>

and a tool's observation comes back as a user message. The tiny model of the demo and Qwen3-VL-8B
go through the same functions; only the tokenizer and its chat template differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

REASON_OPEN, REASON_CLOSE = "<reason>", "</reason>"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"

_INTRODUCTION = (
    "You solve problems about images. Be right first, and spend a tool call only where "
    "it earns its cost."
)
_TOOLS = "# Tools\n\nThese functions may be called, one in a turn:\n<tools>\n{schemas}\n</tools>"
_GUIDELINES = """# Decision Guidelines

- Think inside <reason></reason> before every step.
- What you can see, know or work out safely needs no tool: answer at once.
- Otherwise call the tool that gives what is missing: code to look closer or to calculate, \
text search for facts, image search for what an image shows.
- Never repeat a call that has told you what you need."""
_FORMAT = """# Output Format

<reason>your thinking</reason>
then either one call
<tool_call>{"name": "...", "arguments": {...}}</tool_call>
or the answer, as short as possible
<answer>your answer</answer>"""
_FORMAT_DIRECT = """# Output Format

<reason>your thinking</reason>
<answer>your answer</answer>"""


def system_prompt(schemas: Sequence[dict[str, Any]]) -> str:
    """The system message for a policy that has these tools (JSON schemas); with none, it is told
    to answer directly."""
    if not schemas:
        return "\n\n".join((_INTRODUCTION, _FORMAT_DIRECT))
    lines = "\n".join(json.dumps(schema) for schema in schemas)
    return "\n\n".join((_INTRODUCTION, _TOOLS.format(schemas=lines), _GUIDELINES, _FORMAT))


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """A tool call as the policy writes it."""
    return f"{CALL_OPEN}{json.dumps({'name': name, 'arguments': arguments})}{CALL_CLOSE}"


def turn_text(reason: str, *, call: tuple[str, dict] | None = None, answer: str = "") -> str:
    """A whole turn of the policy: a reason, then a call or an answer."""
    action = call_text(*call) if call else f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"
    return f"{REASON_OPEN}{reason}{REASON_CLOSE}\n{action}"


def find_call(text: str) -> str | None:
    """The inside of the tool call with which a turn ends, or None where it ends otherwise."""
    if not text.rstrip().endswith(CALL_CLOSE) or CALL_OPEN not in text:
        return None
    return text[text.index(CALL_OPEN) + len(CALL_OPEN) : text.rindex(CALL_CLOSE)].strip()


def find_answer(text: str) -> str | None:
    """The inside of the last <answer> of a turn, or None. Only text that the policy wrote in its
    last turn may be passed: whatever a tool printed is never an answer."""
    found = re.findall(
        f"{re.escape(ANSWER_OPEN)}((?:(?!{re.escape(ANSWER_OPEN)}).)*?){re.escape(ANSWER_CLOSE)}",
        text,
        flags=re.DOTALL,
    )
    return found[-1].strip() if found else None


def is_formatted(turns: Sequence[str]) -> bool:
    """r_fmt: over the policy's own text alone, reason and tool_call tags balance, every turn
    reasons first, and the last turn gives a non-empty answer after its last </reason>.

    Source: reward_manager/metis.py of the reference, which counts observations as well.
    """
    if not turns:
        return False
    text = "".join(turns)
    pairs = ((REASON_OPEN, REASON_CLOSE), (CALL_OPEN, CALL_CLOSE), (ANSWER_OPEN, ANSWER_CLOSE))
    if any(text.count(opening) != text.count(closing) for opening, closing in pairs):
        return False
    if any(not turn.lstrip().startswith(REASON_OPEN) for turn in turns):
        return False
    after = turns[-1].rpartition(REASON_CLOSE)[2]
    return after.count(ANSWER_OPEN) == 1 and bool(find_answer(after))
