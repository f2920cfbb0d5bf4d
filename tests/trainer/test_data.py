import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import (
    ABILITIES,
    ANY,
    SYSTEM,
    b64,
    coldstart_row,
    colour,
    png,
    question_row,
    reasons,
    rl_row,
    trajectory,
    write_coldstart,
    write_lines,
    write_rl,
)

from trainer.data import (
    LAYOUTS,
    BadRow,
    Conversation,
    DataError,
    Dataset,
    Example,
)
from trainer.data.layouts import find_layout


def test_metis_rl_as_it_is(tmp_path):
    data = Dataset(write_rl(tmp_path / "train.parquet", [rl_row(n) for n in range(8)]))
    assert (len(data), len(data.rejections), data.yields) == (8, 0, "questions")
    assert [found.name for found in data.layouts] == ["metis-rl"]
    assert sorted(data.kinds) == sorted(ABILITIES)
    for number, example in enumerate(data):
        assert isinstance(example, Example)
        question = example.question()
        assert question.id == f"vthinker-sft/source_index_{number}"
        assert question.text == f"What is written in box {number}?"
        assert question.kind == ABILITIES[number % 4]
        assert question.answer == f"{number}/264"
        assert question.needs_tool is None
        [image] = question.images
        assert (image.size, image.mode, image.getpixel((3, 3))) == ((12, 9), "RGB", colour(number))
        assert example.extra["extra_info"]["pass8"] == 0


def test_metis_coldstart_as_it_is(tmp_path):
    data = Dataset(write_coldstart(tmp_path / "sft.parquet", [coldstart_row(n) for n in range(5)]))
    assert [found.name for found in data.layouts] == ["metis-coldstart"]
    for number, conversation in enumerate(data):
        assert isinstance(conversation, Conversation)
        messages, pictures = trajectory(number)
        assert [m.speaker for m in conversation.messages] == (
            "system question policy observation policy observation policy".split()
        )
        assert [m.shown for m in conversation.messages] == [(), (0,), (), (1,), (), (), ()]
        assert [p.source for p in conversation.pictures] == pictures
        assert conversation.messages[0].text == SYSTEM
        turns = conversation.turns
        assert [turn.text for turn in turns] == [m["content"] for m in messages[2::2]]
        assert turns[0].observation is conversation.messages[3]
        assert turns[1].observation.text == messages[5]["content"]
        assert turns[2].observation is None
        assert conversation.answer == str(number + 1)
        asked = conversation.example()
        assert asked.text == f"Add one to the number in box {number}."
        assert asked.answer == str(number + 1) and len(asked.pictures) == 1
        assert conversation.chat()[3]["content"] == [
            {"type": "text", "text": "Code execution result:\nstdout:\n"},
            {"type": "image"},
        ]
    assert len({conversation.id for conversation in data}) == 5


def test_a_conversation_of_a_million_characters_and_fifteen_pictures(tmp_path):
    messages, _ = trajectory(0)
    messages[1]["content"] = "<image>" * 15 + "x" * 1_500_000
    messages[3]["content"] = "nothing"
    row = {"messages": json.dumps(messages), "images": [b64(png(n)) for n in range(15)]}
    [conversation] = Dataset(write_coldstart(tmp_path / "a.parquet", [row]))
    assert conversation.messages[1].shown == tuple(range(15))
    assert len(conversation.messages[1].text) == 1_500_000


def test_messages_of_parts_with_tool_calls_and_tools(tmp_path):
    # What a data set of another tool becomes in parquet: every part and call has every key.
    call = {
        "type": "function",
        "function": {"name": "text_search", "arguments": {"query": "b3", "code": None}},
    }
    part = {"type": "image", "text": None}
    messages = [
        {"role": "user", "content": [part, {"type": "text", "text": "Who owns <image>?"}]},
        {"role": "assistant", "content": [], "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "Ada"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "<answer>Ada</answer>"}]},
    ]
    tools = [{"type": "function", "function": {"name": "text_search", "description": None}}]
    table = pa.Table.from_pylist(
        [{"messages": messages, "images": [{"bytes": png(), "path": None}], "tools": tools}]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    data = Dataset(tmp_path)
    [conversation] = data
    assert data.layouts[0].name == "messages"
    assert [m.speaker for m in conversation.messages] == [
        "question",
        "policy",
        "observation",
        "policy",
    ]
    assert conversation.messages[0].parts == (0, "Who owns <image>?")  # text, beside real parts
    assert conversation.turns[0].text == (
        '<tool_call>{"name": "text_search", "arguments": {"query": "b3"}}</tool_call>'
    )
    assert conversation.tools == ({"type": "function", "function": {"name": "text_search"}},)


def test_a_user_who_asks_again_is_no_observation(tmp_path):
    said = [("user", "One?"), ("assistant", "Yes."), ("user", "Two?"), ("assistant", "No.")]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    [conversation] = Dataset(write_lines(tmp_path / "a.jsonl", [row]))
    assert [m.speaker for m in conversation.messages] == ["question", "policy"] * 2
    with pytest.raises(BadRow, match="2 questions"):
        conversation.example()


def test_what_follows_an_observation_is_one_too(tmp_path):
    call = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    said = [("user", "One?"), ("assistant", call), ("tool", "2"), ("user", "3"), ("assistant", "4")]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    [conversation] = Dataset(write_lines(tmp_path / "a.jsonl", [row]))
    speakers = [m.speaker for m in conversation.messages]
    assert speakers == ["question", "policy", "observation", "observation", "policy"]


def test_nan_in_a_column_that_is_not_read(tmp_path):
    line = json.dumps(question_row(0, score=float("nan")))
    assert "NaN" in line and len(Dataset(write_lines(tmp_path / "a.jsonl", [line]))) == 1


def test_a_path_to_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    rows = [question_row(0), question_row(1, images=["pipe.png"])]
    data = Dataset(write_lines(tmp_path / "a.jsonl", rows), checks=ANY)
    assert reasons(data) == [(1, "missing_image")]


def test_prompts_and_completions(tmp_path):
    text = {"prompt": "Sky?", "solution": "blue", "image": b64(png())}
    parts = {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Compare "},
                    {
                        "type": "image_url",
                        "image_url": {"url": "data:image/png;base64," + b64(png(1))},
                    },
                    {"type": "text", "text": " with "},
                    {"type": "image", "image": b64(png(2))},
                    {"type": "text", "text": " please"},
                ],
            },
        ],
        "solution": 0,
    }
    first, second = Dataset(write_lines(tmp_path / "a.jsonl", [text, parts]))
    assert (first.text, first.answer, len(first.pictures)) == ("Sky?", "blue", 1)
    assert second.text == "Compare image_1 with image_2 please"
    assert second.answer == "0"  # falsy, and an answer
    assert [p.open().getpixel((0, 0)) for p in second.pictures] == [colour(1), colour(2)]
    pair = {"prompt": "Sky?", "completion": [{"role": "assistant", "content": "blue"}]}
    [conversation] = Dataset(write_lines(tmp_path / "b.jsonl", [pair]))
    assert [m.speaker for m in conversation.messages] == ["question", "policy"]


def test_our_own_lines_with_paths_and_base64(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(5))
    rows = [
        question_row(
            0, images=["pictures/a.png", b64(png(6)), "data:image/png;base64," + b64(png(7))]
        ),
        question_row(1, images=[], answer=2.0, needs_tool=True),
        {"question": "Which?\n<image>", "answer": 3.5, "images": b64(png(8)), "ability": "look"},
        {
            "question": "Wrapped?",
            "answer": "x",
            "images": [b64(png(9))[:40] + "\n" + b64(png(9))[40:]],
        },
    ]
    first, second, third, fourth = Dataset(write_lines(tmp_path / "a.jsonl", rows))
    assert [p.open().getpixel((0, 0)) for p in first.pictures] == [colour(n) for n in (5, 6, 7)]
    assert (first.id, first.needs_tool, second.needs_tool) == ("q/0", False, True)
    assert (second.answer, third.answer) == ("2", "3.5")
    assert (third.text, third.kind, fourth.kind) == ("Which?", "look", "all")
    assert fourth.pictures[0].open().getpixel((0, 0)) == colour(9)


def test_placeholders_within_the_text_become_names(tmp_path):
    row = question_row(
        0, question="<image><image> Is <image> like <image>?", images=[b64(png())] * 4
    )
    [example] = Dataset(write_lines(tmp_path / "a.jsonl", [row]))
    assert example.text == "Is image_3 like image_4?"


STRING, LIST = "string", "list<element: struct<content: string, role: string>>"


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"prompt": LIST, "reward_model": "struct", "images": LIST}, "metis-rl"),
        ({"messages": STRING, "images": "list<element: string>"}, "metis-coldstart"),
        ({"messages": "large_string", "images": LIST}, "metis-coldstart"),
        ({"messages": LIST, "images": LIST}, "messages"),
        ({"messages": STRING}, "messages"),
        ({"prompt": LIST, "completion": LIST}, "completion"),
        ({"prompt": STRING, "answer": STRING}, "prompt"),
        ({"question": STRING, "answer": STRING, "more": STRING}, "questions"),
    ],
)
def test_the_layout_follows_from_the_columns(columns, name):
    assert find_layout(columns).name == name
    assert find_layout(columns, name).name == name


def test_an_unknown_layout_lists_columns_and_layouts(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"chosen": "a", "rejected": ["b"], "prompt": "c"}])
    with pytest.raises(DataError) as error:
        Dataset(path)
    for word in ["a.jsonl", "chosen (string)", "rejected (list)", *LAYOUTS, "reward_model"]:
        assert word in str(error.value)
    with pytest.raises(DataError, match="layout 'questions'"):
        Dataset(path, layout="questions")
    with pytest.raises(DataError, match="no layout 'parquet'.*metis-rl"):
        Dataset(path, layout="parquet")
