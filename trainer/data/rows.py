"""A row as layouts see it: its columns by name, and values that are checked when they are taken."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.data.examples import Conversation, Example
from trainer.data.pictures import BadRow, Picture, picture
from trainer.images import ImageLimits
from trainer.verify import MAX_TRUTHS

MAX_TEXT = 8_000_000
"""Characters of a message; Metis-ColdStart has conversations of 1.5 million."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext|vision_\w+|image_pad|video_pad)\|>")


@dataclass(frozen=True)
class Layout:
    name: str
    needs: tuple[str, ...]
    """Columns by which it is known."""
    takes: tuple[str, ...]
    """Further columns that it reads."""
    yields: Literal["questions", "conversations"]
    read: Callable[[Row], Example | Conversation]
    any_of: tuple[str, ...] = ()
    """Columns of which at least one must be there, too."""

    @property
    def columns(self) -> tuple[str, ...]:
        return self.needs + self.takes

    def fits(self, columns: Mapping[str, str]) -> bool:
        found = set(columns)
        return set(self.needs) <= found and (not self.any_of or bool(found & set(self.any_of)))


@dataclass(frozen=True)
class Row:
    values: Mapping[str, Any]
    folder: Path
    """Of the file: paths of images are relative to it."""
    limits: ImageLimits
    strict: bool
    """Whether every image needs a placeholder."""
    content_ids: bool
    """Whether an id that the row states is passed over."""

    def get(self, *names: str) -> Any:
        """The first of these columns that is not null."""
        return next((v for name in names if (v := self.values.get(name)) is not None), None)

    def images(self, *names: str) -> list[Picture]:
        """Of the first of these columns that has any; "images" and "image" unless others are
        named."""
        found = self.get(*(names or ("images", "image")))
        if found is None:
            return []
        if not isinstance(found, list):
            found = [found]
        return [picture(one, self.folder, self.limits) for one in found]

    def kind(self) -> str:
        found = self.get("kind", "ability", "data_source")
        return "all" if found is None else text_of(found, "kind", 200) or "all"

    def extra(self) -> dict[str, Any]:
        """data_source and extra_info, where there are any."""
        found: dict[str, Any] = {}
        if (source := self.get("data_source")) is not None:
            found["data_source"] = text_of(source, "data_source", 200)
        if (info := self.get("extra_info")) is not None:
            found["extra_info"] = mapping_of(info, "extra_info")
        return found

    def id(self, stated: Any, *content: Any) -> str:
        """The id that the row states, or a hash of what it holds."""
        if stated is not None and not self.content_ids:
            return scalar(stated, "id")
        digest = hashlib.blake2b(digest_size=12)
        for one in content:
            data = one.read() if isinstance(one, Picture) else repr(one).encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def scalar(value: Any, name: str) -> str:
    """A string or number as text: 0 is "0" and an answer like any other. Raises BadRow."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRow("not_a_number", f"{name} is {value}")
        value = int(value) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow("wrong_type", f"{name} is {type(value).__name__}, not text or a number")
    return text_of(str(value), name)


def truths_of(value: Any, name: str) -> list[str]:
    """A right answer, or several of which any will do, each once. Raises BadRow where there is none
    and for more than MAX_TRUTHS."""
    given = value if isinstance(value, list) else [value]
    if len(given) > MAX_TRUTHS:
        raise BadRow("unsupported", f"{name} has {len(given):,} answers, at most {MAX_TRUTHS}")
    texts = [scalar(one, name) for one in given if one is not None]
    found = list(dict.fromkeys(text for text in texts if text.strip()))
    if not found:
        raise BadRow("missing_answer", f"{name} is {'blank' if texts else 'null'}")
    return found


def options_of(value: Any, name: str) -> dict[str, str]:
    """Options of a multiple choice as letter -> text: from {"A": text}, or from texts that become
    A, B, ...; nulls are none. Raises BadRow."""
    if isinstance(value, list):
        if len(value) > len(LETTERS):
            raise BadRow("unsupported", f"{name} has {len(value)} options, at most {len(LETTERS)}")
        value = dict(zip(LETTERS, value, strict=False))
    given = mapping_of(value, name)
    found = {str(key).strip("(). ").upper(): one for key, one in given.items() if one is not None}
    if unknown := [letter for letter in found if len(letter) != 1 or letter not in LETTERS]:
        raise BadRow("unsupported", f"{name} has an option {unknown[0]!r}; options are letters")
    return {letter: scalar(found[letter], f"{name}.{letter}") for letter in sorted(found)}


def with_options(text: str, options: Mapping[str, str]) -> str:
    """The question and, below it, its options."""
    return "\n".join([text, *(f"{letter}. {option}" for letter, option in options.items())])


def lists_options(text: str) -> bool:
    """Whether a question shows options A and B, each on a line of its own."""
    return all(re.search(rf"^[ \t]*\(?{letter}[.:)]", text, re.MULTILINE) for letter in "AB")


def text_of(value: Any, name: str, limit: int = MAX_TEXT) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{name} is {type(value).__name__}, not text")
    if len(value) > limit:
        raise BadRow("bad_text", f"{name} has {len(value):,} characters, at most {limit:,}")
    if found := _CONTROL.search(value):
        raise BadRow("bad_text", f"{name} has {found.group()!r} in it, which ends or opens turns")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow("bad_text", f"{name} cannot be encoded: {error.reason}") from None
    return value


def mapping_of(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRow("wrong_type", f"{name} is {type(value).__name__}, not an object")
    return value
