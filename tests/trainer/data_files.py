"""Small files in the exact layouts of the data sets that trainer.data reads."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from trainer.data import Checks, Dataset

ANY = Checks(max_bad=1.0)


def reasons(data: Dataset) -> list[tuple[int, str]]:
    return [(one.row, one.reason) for one in data.rejections]


SYSTEM = "You are an efficient problem-solving agent.\n\n# Tools\nYou have access to ..."

RL_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        (
            "prompt",
            pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())])),
        ),
        ("images", pa.list_(pa.struct([("bytes", pa.binary())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("answer", pa.string()),
                    ("index", pa.string()),
                    ("pass8", pa.int64()),
                    ("question", pa.string()),
                ]
            ),
        ),
    ]
)
COLDSTART_SCHEMA = pa.schema([("messages", pa.string()), ("images", pa.list_(pa.string()))])


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def png(number: int = 0, size: tuple[int, int] = (12, 9)) -> bytes:
    """A picture of one colour that depends on the number."""
    return encoded(Image.new("RGB", size, colour(number)))


def colour(number: int) -> tuple[int, int, int]:
    return (number % 256, number // 256 % 256, 77)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


ABILITIES = ("math", "perception", "search", "reasoning")


def rl_row(number: int, **changes) -> dict:
    question = f"<image>\nWhat is written in box {number}?"
    row = {
        "data_source": "vthinker-sft",
        "prompt": [
            {"content": SYSTEM, "role": "system"},
            {"content": question, "role": "user"},
        ],
        "images": [{"bytes": png(number)}],
        "ability": ABILITIES[number % 4],
        "reward_model": {"ground_truth": f"{number}/264", "style": "rule"},
        "extra_info": {
            "answer": f"{number}/264",
            "index": f"source_index_{number}",
            "pass8": 0,
            "question": question,
        },
    }
    return row | changes


def write_rl(path: Path, rows: Sequence[dict], **settings) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows), RL_SCHEMA), path, **settings)
    return path


def trajectory(number: int) -> tuple[list[dict], list[bytes]]:
    """A question, a crop, a sum, an answer: the messages and their two pictures."""
    crop = {"name": "python", "arguments": {"code": "image_1.crop((0, 0, 4, 4))"}}
    add = {"name": "python", "arguments": {"code": f"print({number} + 1)"}}
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"<image>\nAdd one to the number in box {number}."},
        {
            "role": "assistant",
            "content": f"<reason>Closer.</reason>\n<tool_call>{json.dumps(crop)}</tool_call>",
        },
        {"role": "user", "content": "Code execution result:\nstdout:\n<image>"},
        {
            "role": "assistant",
            "content": f"<reason>Now I add.</reason>\n<tool_call>{json.dumps(add)}</tool_call>",
        },
        {"role": "user", "content": f"Code execution result:\nstdout:{number + 1}\nstderr:"},
        {
            "role": "assistant",
            "content": f"<reason>Done.</reason>\n<answer>{number + 1}</answer>",
        },
    ]
    return messages, [png(number), png(number + 1000, (4, 4))]


def coldstart_row(number: int, **changes) -> dict:
    messages, pictures = trajectory(number)
    return {"messages": json.dumps(messages), "images": [b64(p) for p in pictures]} | changes


def write_coldstart(path: Path, rows: Sequence[dict], **settings) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows), COLDSTART_SCHEMA), path, **settings)
    return path


def question_row(number: int, **changes) -> dict:
    row = {
        "id": f"q/{number}",
        "question": f"What is {number} + 1?",
        "answer": str(number + 1),
        "images": [b64(png(number))],
        "kind": "sum",
        "needs_tool": False,
    }
    return row | changes


def vstar_row(number: int, **changes) -> dict:
    """The picture lies beside the file: see write_vstar."""
    text = (
        f"What is the colour of box {number}?\n(A) red\n(B) dark blue\n(C) green\n(D) grey\n"
        "Answer with the option's letter from the given choices directly."
    )
    category = ("direct_attributes", "relative_position")[number % 2]
    row = {
        "image": f"{category}/box_{number}.jpg",
        "text": text,
        "category": category,
        "label": "ABCD"[number % 4],
        "question_id": str(number // 2),
    }
    return row | changes


def write_vstar(folder: Path, rows: Sequence[dict]) -> Path:
    for number, row in enumerate(rows):
        picture = folder / row["image"]
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(encoded(Image.new("RGB", (40, 30), colour(number)), "JPEG"))
    return write_lines(folder / "test_questions.jsonl", rows)


HR_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        *((name, pa.string()) for name in ("question", "answer", "category", "A", "B", "C", "D")),
        ("cycle_category", pa.string()),
        ("image", pa.string()),
    ]
)


def hr_row(number: int, **changes) -> dict:
    """A question comes four times, its options in four orders."""
    texts = ["27B", 'a "quoted"\nsign', "tab\there", "27E"]
    turned = [texts[(place - number) % 4] for place in range(4)]
    row = {
        "index": number,
        "question": f"What is written above door {number // 4}?",
        "answer": "ABCD"[number % 4],
        "category": ("single", "cross")[number // 4 % 2],
        **dict(zip("ABCD", turned, strict=True)),
        "cycle_category": str(number % 4),
        "image": b64(encoded(Image.new("RGB", (40, 30), colour(number // 4)), "JPEG")),
    }
    return row | changes


def write_hr(path: Path, rows: Sequence[dict], **settings) -> Path:
    """As TSV or as parquet, by the path's suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows), HR_SCHEMA), path, **settings)
        return path
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(HR_SCHEMA.names)
        writer.writerows([row[name] for name in HR_SCHEMA.names] for row in rows)
    return path


_METADATA = pa.struct(
    [
        *((name, pa.string()) for name in ("category", "context", "grade", "language", "source")),
        ("img_height", pa.int64()),
        ("img_width", pa.int64()),
        ("skills", pa.list_(pa.string())),
        ("split", pa.string()),
        ("task", pa.string()),
    ]
)
MATHVISTA_SCHEMA = pa.schema(
    [
        ("pid", pa.string()),
        ("question", pa.string()),
        ("image", pa.string()),
        ("decoded_image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("choices", pa.list_(pa.string())),
        ("unit", pa.string()),
        ("precision", pa.float64()),
        ("answer", pa.string()),
        ("question_type", pa.string()),
        ("answer_type", pa.string()),
        ("metadata", _METADATA),
        ("query", pa.string()),
    ]
)


def mathvista_row(number: int, **changes) -> dict:
    """A free-form question; `changes` make it a multiple choice."""
    question = f"How long is line {number}?"
    row = {
        "pid": str(number),
        "question": question,
        "image": f"images/{number}.jpg",
        "decoded_image": {"bytes": png(number), "path": None},
        "choices": None,
        "unit": "cm",
        "precision": 1.0,
        "answer": f"{number}.5",
        "question_type": "free_form",
        "answer_type": "float",
        "metadata": {"task": "geometry problem solving", "skills": ["geometry reasoning"]},
        "query": f"Hint: Give one decimal place.\nQuestion: {question} (Unit: cm)",
    }
    return row | changes


def write_mathvista(path: Path, rows: Sequence[dict], **settings) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows), MATHVISTA_SCHEMA), path, **settings)
    return path


def write_lines(path: Path, rows: Sequence[dict | str | bytes]) -> Path:
    """Objects become JSON; text and bytes are lines as they are."""
    with path.open("wb") as file:
        for row in rows:
            line = json.dumps(row) if isinstance(row, dict) else row
            file.write(line.encode() if isinstance(line, str) else line)
            file.write(b"\n")
    return path
