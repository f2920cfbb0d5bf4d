"""What can be told of a trajectory by reading it: cut off, answered by a tool, pointless calls."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from trainer.chat import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    CALL_CLOSE,
    CALL_OPEN,
    REASON_CLOSE,
    REASON_OPEN,
    attempts_call,
    find_answer,
    find_call,
)
from trainer.curate.looks import Look, distance
from trainer.curate.texts import is_silent, tells_failure
from trainer.curate.verdicts import Drop
from trainer.data import BadRow, Conversation, PolicyTurn

_PAIRS = (REASON_OPEN, REASON_CLOSE), (CALL_OPEN, CALL_CLOSE), (ANSWER_OPEN, ANSWER_CLOSE)
_ANSWERED = re.compile(r"<\s?answer>.*?<\s?/answer>", re.DOTALL)
_IMAGE = re.compile(r"image_\d+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_FEW_DIGITS = 3
"""A number of fewer digits may come from anywhere."""


def read(
    conversation: Conversation, looks: Sequence[Look], same_bits: int, same_grey: float
) -> Drop | None:
    """The first thing that is wrong with a trajectory, or None. looks: of its pictures; same_bits,
    same_grey: within which two of one size are the same picture."""
    return (
        _answered_by_tool(conversation)
        or _cut_off(conversation)
        or _unsupported(conversation)
        or _pointless(conversation, looks, same_bits, same_grey)
    )


def _answered_by_tool(conversation: Conversation) -> Drop | None:
    if any(find_answer(_outside_of_calls(turn.text)) for turn in conversation.turns):
        return None
    told = [m for m in conversation.messages if m.speaker == "observation"]
    if any(_ANSWERED.search(message.text) for message in told):
        return Drop("answer_from_tool", "an <answer> stands in an observation alone")
    return None


def _cut_off(conversation: Conversation) -> Drop | None:
    last = conversation.messages[-1]
    if last.speaker != "policy":
        return Drop("truncated", f"the last message is of role {last.role}, not the policy's")
    for number, turn in enumerate(conversation.turns, 1):
        action = _outside_of_calls(turn.text)
        for opening, closing in _PAIRS:
            if action.count(opening) != action.count(closing):
                return Drop("truncated", f"turn {number}: {opening} and {closing} do not pair")
    if attempts_call(last.text):
        return Drop("truncated", "the last turn calls a tool; nothing came back")
    if not find_answer(last.text):
        return Drop("truncated", "the last turn has no answer")
    return None


def _outside_of_calls(text: str) -> str:
    """A turn without the inside of its call, whose code may have any tag in a string."""
    call = find_call(text)
    return text if call is None else text.replace(call, "", 1)


def _unsupported(conversation: Conversation) -> Drop | None:
    try:
        conversation.example()
    except BadRow as bad:
        return Drop("unsupported", bad.detail)
    for number, turn in enumerate(conversation.turns[:-1], 1):
        if not attempts_call(turn.text):
            return Drop("unsupported", f"turn {number} calls nothing, and another one follows")
        if turn.observation is None:
            return Drop("unsupported", f"turn {number} calls a tool, and nothing came back")
    return None


# --- Pointless calls ------------------------------------------------------------------------------


def _pointless(
    conversation: Conversation, looks: Sequence[Look], same_bits: int, same_grey: float
) -> Drop | None:
    seen: dict[str, int] = {}
    calls = conversation.turns[:-1]
    for number, turn in enumerate(calls, 1):
        if turn.observation is None or tells_failure(turn.observation.text):
            continue  # what fails is for the execution to tell, and may be tried again
        call = _parsed(turn.text)
        key = json.dumps(call, sort_keys=True) if call else turn.text
        if key in seen:
            return Drop("pointless", f"call {number} repeats call {seen[key]}")
        seen[key] = number
        why = (
            _tells_nothing(turn, calls[number:])
            or _shown_before(turn, looks, same_bits, same_grey)
            or _constant(conversation, number, call)
        )
        if why:
            return Drop("pointless", f"call {number}: {why}")
    return None


def _parsed(turn: str) -> dict[str, Any] | None:
    try:
        call = json.loads(find_call(turn) or "")
    except (ValueError, RecursionError):
        return None
    return call if isinstance(call, dict) else None


def code_of(call: dict[str, Any] | None) -> ast.Module | None:
    """The Python code of a call, where it is one and can be parsed."""
    arguments = call.get("arguments") if call else None
    code = arguments.get("code") if isinstance(arguments, dict) else None
    if not isinstance(code, str):
        return None
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _tells_nothing(turn: PolicyTurn, later: Sequence[PolicyTurn]) -> str:
    """Silence, unless it is a step: a name that it sets is used by a later call."""
    if turn.observation.shown or not is_silent(turn.observation.text):
        return ""
    code = code_of(_parsed(turn.text))
    made = _names(code, ast.Store) if code else set()
    used = [found for one in later if (found := code_of(_parsed(one.text)))]
    if any(made & _names(one, ast.Load) for one in used):
        return ""
    return "the observation is empty"


def _names(code: ast.Module, context: type[ast.expr_context]) -> set[str]:
    found = {n.id for n in ast.walk(code) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}
    if context is ast.Store:
        found |= {n.name for n in ast.walk(code) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        found |= {
            (alias.asname or alias.name).split(".")[0]
            for n in ast.walk(code)
            if isinstance(n, ast.Import | ast.ImportFrom)
            for alias in n.names
        }
    return found


def _shown_before(turn: PolicyTurn, looks: Sequence[Look], bits: int, grey: float) -> str:
    """Every picture of it is one that was shown already, in the same size."""
    shown = turn.observation.shown
    if not shown:
        return ""
    for one in shown:
        before = (
            other
            for other in range(one)
            if looks[other].size == looks[one].size
            and distance(looks[other], looks[one]).within(bits, grey)
        )
        same = next(before, None)
        if same is None:
            return ""
    return f"it shows image_{same + 1} again"


def _constant(conversation: Conversation, number: int, call: dict[str, Any] | None) -> str:
    """Code whose result is in its own text, or that has no input from the conversation."""
    code = code_of(call)
    if code is None:
        return ""
    if code.body and all(_is_literal(statement) for statement in code.body):
        return "the code prints a literal"
    text = str(call["arguments"]["code"])
    if _IMAGE.search(text) or number > 1 and _names(code, ast.Load) - _CALCULATING:
        return ""
    numbers = {n for n in _NUMBER.findall(text) if len(n) >= _FEW_DIGITS}
    known = set(_NUMBER.findall(_said_before(conversation, number)))
    if numbers and not numbers & known:
        shown = ", ".join(sorted(numbers)[:3])
        return f"its numbers ({shown}) stand neither in the question nor in what came after"
    return ""


_CALCULATING = frozenset(
    "print sum range len str int float abs round min max pow list sorted math np".split()
)


def _is_literal(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Expr):
        return False
    value = statement.value
    printed = isinstance(value, ast.Call) and getattr(value.func, "id", "") == "print"
    parts = value.args if printed and not value.keywords else [value]
    return all(_is_constant(part) for part in parts)


def _is_constant(node: ast.expr) -> bool:
    """A literal; a sum of literals is a calculation."""
    return isinstance(node, ast.Constant) or (
        isinstance(node, ast.List | ast.Tuple) and all(map(_is_constant, node.elts))
    )


def _said_before(conversation: Conversation, number: int) -> str:
    """The conversation up to call `number`, without the code of that call."""
    texts, calls = [], 0
    for message in conversation.messages:
        if message.speaker == "policy":
            calls += 1
            if calls == number:
                return "\n".join([*texts, _outside_of_calls(message.text)])
        if message.speaker != "system":
            texts.append(message.text)
    return "\n".join(texts)
