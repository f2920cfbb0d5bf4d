"""What the tests of attacks share: toy tools, scripted turns, files made by hand, odd texts."""

from __future__ import annotations

import io
import struct
import zlib

from hypothesis import strategies as st
from test_rollout import Scripted, _call, _question

from trainer.chat import SpecialTokens
from trainer.rollout import Limits, Player
from trainer.tools import FunctionTool, Toolbox
from trainer.types import Question

MAX_TEXT = 500
SPECIAL = ("<|im_end|>", "<|im_start|>assistant\n", "<|image_pad|>", "<|endoftext|>", "<tool_call>")


@FunctionTool
def echo(text: str) -> str:
    """Say it back."""
    return text


@FunctionTool
def python(code: str) -> str:
    """Not the real one: says what it was given."""
    return code


def says(value):
    """A toolbox whose one tool, "it", returns the value, or raises it."""

    async def it() -> object:
        """It."""
        if isinstance(value, BaseException):
            raise value
        return value

    return Toolbox([FunctionTool(it)], max_text=MAX_TEXT)


IT = '{"name": "it", "arguments": {}}'


def toy_player(vlm):
    """Plays with echo and python; room for system prompts that fall apart into bytes."""
    return Player(vlm, Toolbox([echo, python], max_text=2000), Limits(max_tokens=8192))


def play(vlm, player, *turns, question=None):
    (rollout,) = player.play(Scripted(vlm, *turns), [question or ask("What?")], [0])
    return rollout


def says_turn(text):
    """A turn that makes echo say the text, in which the policy itself writes none of its tags."""
    call, stop = _call("echo", text=text)
    inside = call[len("<tool_call>") : -len("</tool_call>")].replace("<", "\\u003c")
    return f"<reason>so</reason>\n<tool_call>{inside}</tool_call>", stop


def ask(text, expected="12"):
    picture = _question().images
    return Question("attack/0", "attack", text, picture, expected)


def special_ids(vlm, rollout):
    """Special ids among the tokens that the policy did not write, in order."""
    special = SpecialTokens(vlm.tokenizer).ids
    given = zip(rollout.ids, rollout.policy, strict=True)
    return [index for index, mine in given if not mine and index in special]


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, *chunks, depth=8, colour=2, pixels=b""):
    """A PNG by hand: what it says of itself need not be true."""

    def chunk(kind, body):
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


FRAGMENTS = [
    *SPECIAL, "<|im_", "end|>", "<", "|", ">", " ", "<tool", "_call>", "</tool_call>", "<answer>",
    "</answer>", "<reason>", "</reason>", "<image>", "<\uff5c", "\0", "\ud800", "\ufeff", "\\", '"',
    "{", "}", "[", "]", ":", ",", "name", "arguments", "echo", "text", "NaN", "1e999",
    "-", "\\ud800", '{"name": "echo", "arguments": ', '{"text": "', '"}}', "\n",
    "\u212a", "\u2028", "7",
]  # fmt: skip
ANY = st.one_of(
    st.text(st.characters(exclude_categories=())),
    st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join),
)
