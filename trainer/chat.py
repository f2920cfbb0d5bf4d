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
from typing import Any, Literal

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


def attempts_call(turn: str) -> bool:
    """Whether a turn calls a tool, well or badly: a tag of a call stands behind its reason. What
    is said of tools inside <reason></reason> is no call."""
    action = _action(turn)
    return CALL_OPEN in action or CALL_CLOSE in action


def first_action(turn: str) -> tuple[Literal["call", "answer"], int] | None:
    """What a turn does first and where its tag begins; None where it neither calls nor answers."""
    action = _action(turn)
    found = {"call": action.find(CALL_OPEN), "answer": action.find(ANSWER_OPEN)}
    opened = [(at, name) for name, at in found.items() if at >= 0]
    if not opened:
        return None
    at, name = min(opened)
    return name, len(turn) - len(action) + at


def find_calls(turn: str) -> tuple[list[str], str | None]:
    """(the inside of every closed call of a turn, what is wrong with how they stand, or None).

    A turn may call or answer, and nothing follows a call. A tag inside a JSON string of a call is
    text of that call.
    """
    action = _action(turn)
    calls: list[str] = []
    position = 0
    while True:
        opening = action.find(CALL_OPEN, position)
        stray = action.find(CALL_CLOSE, position, None if opening < 0 else opening)
        if stray >= 0:
            return calls, f"{CALL_CLOSE} without a {CALL_OPEN} before it"
        if opening < 0:
            break
        start = opening + len(CALL_OPEN)
        closing = _closing(action, start)
        if closing < 0:
            return calls, f"{CALL_OPEN} is never closed: a call ends with {CALL_CLOSE}"
        calls.append(action[start:closing].strip())
        position = closing + len(CALL_CLOSE)
    if calls and action[position:].strip():
        return calls, f"there is text behind {CALL_CLOSE}: a call ends the turn"
    return calls, None


def find_call(text: str) -> str | None:
    """The inside of the one tool call with which a turn ends, or None where it ends otherwise."""
    calls, fault = find_calls(text)
    return calls[0] if len(calls) == 1 and fault is None else None


def _action(turn: str) -> str:
    """What a turn does: the text behind its reason, all of it where it has no closed reason."""
    before, closed, after = turn.partition(REASON_CLOSE)
    return after if closed and before.lstrip().startswith(REASON_OPEN) else turn


_STRING_OR_CLOSE = re.compile(rf'"[^"\\]*(?:\\.[^"\\]*)*"?|{re.escape(CALL_CLOSE)}', re.DOTALL)


def _closing(action: str, start: int) -> int:
    """Where the call that begins at `start` is closed: outside of its strings, or, where quotes do
    not pair, at the first closing tag; -1 where there is none."""
    for match in _STRING_OR_CLOSE.finditer(action, start):
        if match[0] == CALL_CLOSE:
            return match.start()
    return action.find(CALL_CLOSE, start)


def find_answer(text: str) -> str | None:
    """The answer of a turn, or None. Only text that the policy wrote in its last turn may be
    passed: whatever a tool printed is never an answer.

    Of several the last one that is closed counts, and that one alone; inside it nothing is opened
    again ("<answer>7 <answer>8</answer>" is 8), and it ends at the first </answer>.
    """
    opening = text.rfind(ANSWER_OPEN, 0, max(text.rfind(ANSWER_CLOSE), 0))
    if opening < 0:
        return None
    start = opening + len(ANSWER_OPEN)
    return text[start : text.index(ANSWER_CLOSE, start)].strip()


def is_formatted(turns: Sequence[str]) -> bool:
    """r_fmt: over the policy's own text alone, the tags balance and none is empty, every turn
    reasons first, and the last turn gives one answer after its last </reason>.

    Source: reward_manager/metis.py of the reference, which counts observations as well.
    """
    if not turns:
        return False
    text = "".join(turns)
    pairs = ((REASON_OPEN, REASON_CLOSE), (CALL_OPEN, CALL_CLOSE), (ANSWER_OPEN, ANSWER_CLOSE))
    if any(text.count(opening) != text.count(closing) for opening, closing in pairs):
        return False
    if any(re.search(rf"{opening}\s*{closing}", text) for opening, closing in pairs):
        return False
    if any(not turn.lstrip().startswith(REASON_OPEN) for turn in turns):
        return False
    after = turns[-1].rpartition(REASON_CLOSE)[2]
    return after.count(ANSWER_OPEN) == 1 and bool(find_answer(after))


class SpecialTokens:
    """The tokens of a tokenizer that steer a model, and how text from outside is kept from them.

    tokenizer: of transformers. Special are those that it calls so, and those that were added to it
    as markup (<tool_call>, <|fim_prefix|>); not added words or runs of spaces.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        unknown = tokenizer.unk_token_id  # what any odd character may become: it steers nothing
        added = dict(tokenizer.added_tokens_decoder)
        marked = {
            index for index, token in added.items() if token.special or _markup(token.content)
        }
        self.ids = frozenset(marked | set(tokenizer.all_special_ids)) - {unknown}
        """The ids that no text from outside may be encoded to."""
        texts = {
            added[index].content if index in added else tokenizer.convert_ids_to_tokens(index)
            for index in self.ids
        }
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        self._any = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def escape(self, text: str) -> str:
        """The text, in which no special token can be found, as text or by the tokenizer.

        A space behind its first character breaks a special token ("< |im_end|>"); text without one
        stays as it is. Lone surrogates, which no tokenizer takes, become U+FFFD.

        Not the tokenizer's own split_special_tokens: that only keeps added tokens from being looked
        for, and a model whose vocabulary lists them as pieces (Unigram) finds them all the same.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for _ in range(4):  # a space may complete another token that has one in it
            if not self._any.search(text):
                break
            text = self._any.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        else:
            text = self._any.sub("\ufffd", text)
        if self._found(text):
            # A tokenizer that folds text before it looks for tokens. Nothing then looks like one.
            text = " ".join(re.sub(r"[^\w\s]", "\ufffd", text))
        if self._found(text):
            raise ValueError(f"the tokenizer makes special tokens of {ascii(text[:80])}")
        return text

    def _found(self, text: str) -> bool:
        return not self.ids.isdisjoint(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _markup(token: str) -> bool:
    """Not a word, a number or a run of spaces (of which some tokenizers write one as \u2581)."""
    return not all(c.isalnum() or c.isspace() or c == "\u2581" for c in token)
