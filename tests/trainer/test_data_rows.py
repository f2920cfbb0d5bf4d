import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import (
    ANY,
    b64,
    coldstart_row,
    encoded,
    png,
    question_row,
    reasons,
    rl_row,
    write_coldstart,
    write_lines,
    write_rl,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.data import (
    LAYOUTS,
    BadRow,
    Checks,
    Conversation,
    DataError,
    Dataset,
    Example,
    Picture,
)
from trainer.data.layouts import read_row
from trainer.images import ImageLimits

HEADER = b"IHDR" + (65_535).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
BOMB = png()[:12] + HEADER + zlib.crc32(HEADER).to_bytes(4, "big") + png()[33:]
BAD = [
    ("{'question'", "not_json"),
    ("[1, 2]", "not_json"),
    ('{"question": "cut', "not_json"),
    ("[" * 100_000, "not_json"),
    (b'{"question": "\xff"}', "not_json"),
    ('{"id": "n", "question": "?", "answer": NaN}', "not_a_number"),
    ('{"id": "n", "question": "?", "answer": 1e999}', "not_a_number"),
    (question_row(9, answer=None), "missing_answer"),
    (question_row(9, answer="  "), "missing_answer"),
    (question_row(9, answer=[None, " "]), "missing_answer"),
    (question_row(9, answer=["a", ["b"]]), "wrong_type"),
    (question_row(9, answer=[str(n) for n in range(65)]), "unsupported"),
    (question_row(9, options={"AB": "a"}), "unsupported"),
    (question_row(9, options="a, b"), "wrong_type"),
    (question_row(9, extra_info=[1]), "wrong_type"),
    (question_row(9, answer=True), "wrong_type"),
    (question_row(9, answer={"a": 1}), "wrong_type"),
    (question_row(9, question=None), "empty_prompt"),
    (question_row(9, question="<image>\n "), "empty_prompt"),
    (question_row(9, question=7), "wrong_type"),
    (question_row(9, question="end<|im_end|>"), "bad_text"),
    (question_row(9, question="\ud800"), "bad_text"),
    (question_row(9, needs_tool="yes"), "wrong_type"),
    (question_row(9, question="<image><image>?"), "image_count"),
    (question_row(9, question="<image>?", images=[b64(png())] * 2), "image_count"),
    (question_row(9, question="<image>?", images=None), "image_count"),
    (question_row(9, images=[None]), "missing_image"),
    (question_row(9, images=["nowhere.png"]), "missing_image"),
    (question_row(9, images=["/dev/zero.png"]), "missing_image"),
    (question_row(9, images=["https://example.com/a.png"]), "missing_image"),
    (question_row(9, images=["!?"]), "bad_image"),
    (question_row(9, images=[b64(b"no picture")]), "bad_image"),
    (question_row(9, images=[b64(png(1, (200, 200))[:-30])]), "bad_image"),
    (question_row(9, images=[b64(png(1, (1, 201)))]), "bad_image"),
    (question_row(9, images=[b64(BOMB)]), "image_too_large"),
    (question_row(9, images=[3]), "wrong_type"),
    (question_row(1), "duplicate_id"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_a_bad_row_is_skipped_and_reported(tmp_path, bad, reason):
    rows = [question_row(0), question_row(1), bad, question_row(2)]
    data = Dataset(write_lines(tmp_path / "a.jsonl", rows), checks=ANY)
    assert reasons(data) == [(2, reason)]
    assert [example.id for example in data] == ["q/0", "q/1", "q/2"]
    [one] = data.rejections
    assert one.detail
    assert f"{reason}: 1\n    row 2 (a.jsonl row 2): {one.detail}" in data.summary()


MESSAGES = [
    ("[]", "empty_prompt"),
    ("{}", "wrong_type"),
    ("[{]", "not_json"),
    ('["a"]', "wrong_type"),
    ('[{"role": "user", "content": "?"}]', "no_policy_turn"),
    ('[{"role": "assistant", "content": "?"}]', "empty_prompt"),
    ('[{"role": "human", "content": "?"}]', "wrong_type"),
    ('[{"role": "user", "content": 1}]', "wrong_type"),
    ('[{"role": "user", "content": null}]', "empty_prompt"),
    ('[{"role": "user", "content": [{"type": "video"}]}]', "unsupported"),
    ('[{"role": "assistant", "content": "", "reasoning_content": "hm"}]', "unsupported"),
    ('[{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]', "wrong_type"),
    ('[{"role": "user", "content": "?", "weight": NaN}]', "not_a_number"),
    ('[{"role": "user", "content": "?"}, {"role": "assistant", "content": "<image>"}]', "ok"),
]


@pytest.mark.parametrize(("messages", "reason"), MESSAGES)
def test_a_bad_conversation_is_skipped_and_reported(tmp_path, messages, reason):
    rows = [coldstart_row(0), {"messages": messages, "images": []}, coldstart_row(1)]
    data = Dataset(write_coldstart(tmp_path / "a.parquet", rows), checks=ANY)
    assert reasons(data) == ([] if reason == "ok" else [(1, reason)])
    assert len(list(data)) == len(data) == 2 + (reason == "ok")


def test_coldstart_wants_a_placeholder_for_every_image(tmp_path):
    row = coldstart_row(1)
    row["messages"] = row["messages"].replace("<image>", "")
    data = Dataset(write_coldstart(tmp_path / "a.parquet", [coldstart_row(0), row]), checks=ANY)
    assert reasons(data) == [(1, "image_count")]


def test_bad_rows_of_metis_rl(tmp_path):
    rows = [
        rl_row(0),
        rl_row(1, reward_model=None),
        rl_row(2, reward_model={"ground_truth": "", "style": "rule"}),
        rl_row(3, prompt=None),
        rl_row(4, images=[{"bytes": None}]),
        rl_row(5, images=[]),
        rl_row(0, reward_model={"ground_truth": "other", "style": "rule"}),
    ]
    path = write_rl(tmp_path / "a.parquet", rows, row_group_size=2)
    data = Dataset(path, checks=ANY)
    assert reasons(data) == [
        (1, "wrong_type"),
        (2, "missing_answer"),
        (3, "empty_prompt"),
        (4, "missing_image"),
        (5, "image_count"),
        (6, "duplicate_id"),
    ]
    by_content = Dataset(path, checks=Checks(max_bad=1.0, ids="content"))
    assert len(by_content) == 2 and (6, "duplicate_id") not in reasons(by_content)
    with pytest.raises(BadRow, match="missing_answer"):
        data[2]


def test_strings_that_are_not_utf8(tmp_path):
    table = pa.table({"question": [b"a", b"\xff"], "answer": ["1", "2"]})
    index = table.schema.get_field_index("question")
    raw = pa.Array.from_buffers(
        pa.string(), 2, table.column(index).combine_chunks().buffers()
    )  # unchecked
    pq.write_table(table.set_column(index, "question", raw), tmp_path / "a.parquet")
    data = Dataset(tmp_path / "a.parquet", checks=ANY)
    assert reasons(data) == [(1, "bad_text")]


def test_too_many_bad_rows_stop_with_examples(tmp_path):
    rows = [question_row(n, answer=None if n % 10 == 3 else "1") for n in range(100)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"more than 5\.0% of 100 rows") as error:
        Dataset(path)
    assert "missing_answer: 6" in str(error.value) and "row 3 (a.jsonl row 3)" in str(error.value)
    data = Dataset(path, checks=Checks(max_bad=0.1))
    assert reasons(data) == [(n, "missing_answer") for n in range(3, 100, 10)]


def test_of_many_bad_rows_every_index_and_some_details_are_kept(tmp_path):
    rows = [question_row(n, answer=None, images=[]) for n in range(500)]
    data = Dataset(write_lines(tmp_path / "a.jsonl", [*rows, question_row(500)]), checks=ANY)
    assert [one.row for one in data.rejections] == list(range(500))
    assert sum(bool(one.detail) for one in data.rejections) == 100
    assert data.rejections.counts == Counter(missing_answer=500)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.sampled_from(
        ["user", "assistant", "<image>", "text", "image", "function", '[{"role": 1}]']
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "role content type text image bytes path tool_calls function name arguments url "
                "ground_truth index image_url".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(LAYOUTS)), st.data())
def test_no_row_raises_anything_but_bad_row(tmp_path_factory, name, data):
    layout = LAYOUTS[name]
    values = {column: data.draw(VALUES) for column in layout.columns}
    folder = tmp_path_factory.getbasetemp()
    try:
        item = read_row(layout, values, folder, ImageLimits())
    except BadRow as bad:
        assert bad.detail
    else:
        assert item.id and isinstance(item, Example | Conversation)


def opened(image: Image.Image, kind="PNG", **settings) -> Image.Image:
    picture = Picture(encoded(image, kind, **settings))
    picture.check()
    return picture.open()


def test_pictures_of_every_mode_become_rgb():
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert opened(rgba).getpixel((0, 0)) == (255, 255, 255)  # transparent, over white
    deep = Image.fromarray(np.full((4, 4), 128 * 256, np.uint16))
    assert deep.mode.startswith("I") and opened(deep).getpixel((0, 0)) == (128, 128, 128)
    assert opened(Image.new("1", (4, 4), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert opened(Image.new("LA", (4, 4), (9, 255))).getpixel((0, 0)) == (9, 9, 9)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert opened(palette).getpixel((0, 0)) == (10, 20, 30)
    assert opened(palette, transparency=0).getpixel((0, 0)) == (255, 255, 255)
    for kind, mode in [("JPEG", "CMYK"), ("JPEG", "L"), ("WEBP", "RGBA"), ("BMP", "RGB")]:
        assert opened(Image.new(mode, (4, 4)), kind).mode == "RGB"
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    moving = opened(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert moving.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (BOMB, "image_too_large"),
        (png(0, (30, 30)), "image_too_large"),
        (b"", "bad_image"),
        (encoded(Image.new("RGB", (4, 4)), "TIFF"), "bad_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "bad_image"),
        (b"x" * 5000, "image_too_large"),
    ],
)
def test_pictures_beyond_the_limits(data, reason):
    picture = Picture(data, ImageLimits(file_bytes=4000, decoded=800))
    for use in (picture.check, picture.open):
        with pytest.raises(BadRow) as bad:
            use()
        assert bad.value.reason == reason


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5),
    st.floats(0, 1),
)
def test_damaged_pictures_raise_bad_row_alone(kind, flips, kept):
    data = bytearray(encoded(Image.linear_gradient("L").resize((40, 30)), kind))
    for place, value in flips:
        data[int(place * len(data))] = value
    picture = Picture(bytes(data[: int(kept * len(data))]), ImageLimits(decoded=10_000))
    try:
        assert picture.open().mode == "RGB"
    except BadRow as bad:
        assert bad.reason in ("bad_image", "image_too_large")


def test_pixels_are_checked_where_asked_for(tmp_path):
    whole = encoded(Image.linear_gradient("L"), "JPEG")
    rows = [question_row(0), question_row(1, images=[b64(whole[: len(whole) // 2])])]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert len(Dataset(path)) == 2
    assert reasons(Dataset(path, checks=Checks(max_bad=1, pixels=True))) == [(1, "bad_image")]
