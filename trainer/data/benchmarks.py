"""Layouts of benchmarks, as their files are published.

    vstar      V*Bench, test_questions.jsonl: image (a path), text (question and options), category,
               label (a letter), question_id
    hr-bench   HR-Bench 4K and 8K, TSV or parquet: index, question, A, B, C, D, answer (a letter),
               category, cycle_category, image (base64)
    mathvista  MathVista, parquet: pid, question, query, choices, answer, question_type,
               answer_type, unit, precision, decoded_image, metadata

Sources: the dataset cards of craigwu/vstar_bench, DreamMr/HR-Bench and AI4Math/MathVista.
"""

from __future__ import annotations

import re
from typing import Any

from trainer.data.examples import Example
from trainer.data.pictures import BadRow, Picture
from trainer.data.rows import (
    LETTERS,
    Layout,
    Row,
    mapping_of,
    options_of,
    scalar,
    text_of,
    truths_of,
    with_options,
)

_OPTION_LINE = re.compile(r"^\(([A-Z])\)[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
MAX_DECIMALS = 12


def _read_vstar(row: Row) -> Example:
    """The question ends with the benchmark's own sentence that asks for the letter."""
    text = text_of(row.get("text"), "text").strip()
    options = dict(_OPTION_LINE.findall(text))
    if list(options) != list(LETTERS[: len(options)]) or len(options) < 2:
        raise BadRow("unsupported", "text has no lines (A), (B), ... of options")
    kind = text_of(row.get("category"), "category", 200)
    stated = f"{kind}/{scalar(row.get('question_id'), 'question_id')}"
    letter = _letter(row.get("label"), "label", options)
    return _example(row, stated, kind, text, letter, options, row.images("image"))


def _read_hr_bench(row: Row) -> Example:
    """A question is there four times with its options in four orders (cycle_category)."""
    options = options_of({letter: row.get(letter) for letter in "ABCD"}, "options")
    text = text_of(row.get("question"), "question").strip()
    if not text:
        raise BadRow("empty_prompt", "the question has no text")
    letter = _letter(row.get("answer"), "answer", options)
    kind = row.get("category")
    kind = "all" if kind is None else text_of(kind, "category", 200)
    cycle = row.get("cycle_category")
    extra = {} if cycle is None else {"cycle_category": scalar(cycle, "cycle_category")}
    text = with_options(text, options)
    stated = row.get("index")
    return _example(row, stated, kind, text, letter, options, row.images("image"), extra)


def _read_mathvista(row: Row) -> Example:
    """The text is the benchmark's own `query`, which shows the choices, the unit and how precise
    the answer shall be; `question` with these behind it where there is none."""
    metadata = mapping_of(row.get("metadata") or {}, "metadata")
    kind = metadata.get("task") or row.get("question_type")
    kind = "all" if kind is None else text_of(kind, "metadata.task", 200)
    choices = row.get("choices")
    options = options_of(choices, "choices") if choices else {}
    [answer, *also] = truths_of(row.get("answer"), "answer")
    if options and answer not in options.values():
        raise BadRow("missing_answer", f"answer {answer[:40]!r} is none of the choices")
    unit, query = row.get("unit"), row.get("query")
    if query is None:
        text = text_of(row.get("question"), "question").strip()
        text = with_options(text + (f" (Unit: {unit})" if unit else ""), options)
    else:
        text = text_of(query, "query").strip()
    if not text:
        raise BadRow("empty_prompt", "the question has no text")
    extra: dict[str, Any] = {
        name: found
        for name in ("answer_type", "unit", "metadata")
        if (found := row.get(name)) is not None
    }
    if extra.get("answer_type") == "float" and row.get("precision") is not None:
        extra["decimals"] = _decimals(row.get("precision"))
    images = row.images("decoded_image", "image")
    return _example(row, row.get("pid"), kind, text, answer, options, images, extra, tuple(also))


def _example(
    row: Row,
    stated: Any,
    kind: str,
    text: str,
    answer: str,
    options: dict[str, str],
    pictures: list[Picture],
    extra: dict[str, Any] | None = None,
    also: tuple[str, ...] = (),
) -> Example:
    if not pictures:
        raise BadRow("missing_image", "the row has no image")
    return Example(
        row.id(stated, text, answer, *pictures),
        kind or "all",
        text,
        tuple(pictures),
        answer,
        extra=extra or {},
        also=also,
        options=options,
    )


def _letter(value: Any, name: str, options: dict[str, str]) -> str:
    if value is None:
        raise BadRow("missing_answer", f"{name} is null")
    letter = scalar(value, name).strip("(). ").upper()
    if letter not in options:
        raise BadRow("missing_answer", f"{name} is {letter[:40]!r}, none of the options")
    return letter


def _decimals(value: Any) -> int:
    text = scalar(value, "precision")
    if not text.isdecimal() or int(text) > MAX_DECIMALS:
        raise BadRow("wrong_type", f"precision is {text!r}, not 0 to {MAX_DECIMALS} decimals")
    return int(text)


BENCHMARKS = (
    Layout(
        "vstar",
        ("image", "text", "label", "question_id"),
        ("category",),
        "questions",
        _read_vstar,
    ),
    Layout(
        "hr-bench",
        ("index", "question", "answer", "A", "B", "image"),
        ("C", "D", "category", "cycle_category"),
        "questions",
        _read_hr_bench,
    ),
    Layout(
        "mathvista",
        ("pid", "question", "answer", "answer_type"),
        (
            "query", "choices", "question_type", "unit", "precision", "decoded_image", "image",
            "metadata",
        ),
        "questions",
        _read_mathvista,
    ),
)  # fmt: skip
