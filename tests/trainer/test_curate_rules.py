"""What reading a trajectory tells, texts and pictures compared, duplicates, shares."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from curate_rows import answered, conversation, noise, python
from PIL import Image

from trainer.curate.duplicates import Asked, Kept, find_duplicates
from trainer.curate.journal import Journal
from trainer.curate.looks import Look, distance, look
from trainer.curate.pipeline import quotas
from trainer.curate.rows import coldstart_line, digest, known_answer, recorded_seed, rl_line
from trainer.curate.rubric import DIMENSIONS, parse_review
from trainer.curate.rules import read
from trainer.curate.texts import agree, is_silent, said, tells_failure
from trainer.data import Example, Picture
from trainer.data.layouts import LAYOUTS, read_row
from trainer.images import ImageLimits
from trainer.log import RunError

CROP = python("image_1.crop((0, 0, 9, 9))")


def verdict(*turns, **about):
    one = conversation(*turns, **about)
    drop = read(one, [look(picture.open()) for picture in one.pictures], 6, 2.5)
    return drop and drop.reason


@pytest.mark.parametrize(
    "turns",
    [
        (answered("7"),),
        (CROP, "<image>", answered("7")),
        (python("37 * 58"), "2146", answered("2146")),
        (python("x = 3"), "(no output)", python("print(x * 2)"), "6", answered("6")),
        (CROP, "Error: the tool is busy, try again.", CROP, "<image>", answered("7")),
        (python("print('<answer>', image_1.size)"), "< answer> (48, 48)", answered("7")),
        (python("1234 + 4321", "The chart says 1234 and 4321."), "5555", answered("5555")),
        (python("round(np.mean([2, 4]), 2)"), "3.0", answered("3")),
    ],
)
def test_sound_trajectories_pass(turns):
    question = "<image>\nWhat is 37 * 58?"
    assert verdict(*turns, question=question, images=[noise(1)] * (turns.count("<image>"))) is None


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((CROP, "<answer>7</answer>"), "answer_from_tool"),
        ((CROP, "< answer>7< /answer>", "<reason>Good.</reason>"), "answer_from_tool"),
        ((python("print('<answer>7</answer>')"), "<answer>7</answer>"), "answer_from_tool"),
        ((CROP, "nothing"), "truncated"),
        ((CROP, "nothing", "<reason>Now I know.</reason>"), "truncated"),
        ((CROP, "nothing", "<reason>Now I know"), "truncated"),
        ((CROP, "nothing", "<reason>Now I know.</reason>\n<answer>7"), "truncated"),
        ((CROP, "nothing", "<reason>Now.</reason>\n<answer> </answer>"), "truncated"),
        (('<reason>So.</reason>\n<tool_call>{"name": "py',), "truncated"),
        ((CROP,), "truncated"),
        (("<reason>Hm.</reason>", "go on", answered("7")), "unsupported"),
        ((CROP, "so", CROP, "so", answered("7")), "pointless"),
        ((CROP, "Code execution result:\nstdout:\nstderr:", answered("7")), "pointless"),
        ((python("x = 3"), "(no output)", answered("3")), "pointless"),
        ((python("print('I look.')"), "I look.", answered("7")), "pointless"),
        ((python("'done'"), "done", answered("7")), "pointless"),
        ((python("print(1, [2, 3])"), "1 [2, 3]", answered("7")), "pointless"),
        ((python("sum(range(4567))"), "10426461", answered("7")), "pointless"),
    ],
)
def test_each_flaw_has_its_reason(turns, reason):
    assert verdict(*turns) == reason


def test_a_picture_shown_again_is_pointless_and_a_part_of_it_is_not():
    jpeg = io.BytesIO()
    noise(0).save(jpeg, "JPEG", quality=80)
    again = Image.open(io.BytesIO(jpeg.getvalue())).convert("RGB")
    assert (
        verdict(python("image_1.copy()"), "<image>", answered("7"), images=[again]) == "pointless"
    )
    part = noise(0).crop((0, 0, 24, 24))
    assert verdict(CROP, "<image>", answered("7"), images=[part]) is None


def test_texts_agree_but_for_white_space_heads_addresses_and_rounding():
    assert said("Code execution result:\nstdout:5\nstderr:") == "5"
    assert agree("Code execution result:\nstdout:5\nstderr:", "5", 0)
    assert agree("0.3333333  a\nb", "0.33333334 a b", 1e-6)
    assert not agree("0.333", "0.334", 1e-6)
    assert not agree("12", "13", 0.5)  # of whole numbers every digit counts
    assert not agree("White", "Violet", 1)
    assert not agree("5 6", "5", 1)
    assert agree("<f at 0x7f00aa11bb22>", "<f at 0x7f00aa11bb99>", 0)
    assert agree("", "(no output)", 0) and is_silent("stdout:\nstderr:")
    assert tells_failure("stdout:\nstderr: Traceback (most recent call last):\n  NameError: x")
    assert tells_failure("NameError: name 'x' is not defined")
    assert not tells_failure("The error bars are small")


def test_a_picture_looks_like_itself_in_another_encoding_alone():
    one = noise(5, (200, 160))
    grain = np.asarray(one) + np.random.default_rng(0).normal(0, 3, (160, 200, 3))
    again = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
    assert distance(look(one), look(again)).within(6, 2.5)
    assert distance(look(one), look(one.resize((100, 80)))).within(6, 2.5)
    for other in (noise(6, (200, 160)), one.rotate(90), one.point(lambda level: level // 2)):
        assert not distance(look(one), look(other)).within(6, 2.5)
    assert Look.from_json(json.loads(json.dumps(look(one).to_json()))) == look(one)


def test_duplicates_are_near_in_words_numbers_and_every_picture():
    a, b = look(noise(1)), look(noise(2))
    rows = [
        Asked(0, "How many of the red birds sit on the long fence?", (a,)),
        Asked(1, "How many of the red birds sit on the long fence ?", (a,)),
        Asked(2, "How many of the red birds sit on the long fence?", (b,)),
        Asked(3, "What is the colour of the car?", (a,)),
        Asked(4, "How many of the red birds sit on the long fence?", (a, b)),
        Asked(5, "What is 12 + 34, if you add the two numbers to one another?", ()),
        Asked(6, "What is 12 + 35, if you add the two numbers to one another?", ()),
        Asked(7, "what is 12 + 34, if you add the two numbers to one another", ()),
    ]
    found = find_duplicates(rows, Kept(jaccard=0.9, bits=6, grey=2.5))
    assert {number: match.of for number, match in found.items()} == {1: 0, 7: 5}


def test_no_ability_takes_more_than_its_share_allows():
    assert quotas({"a": 10, "b": 10}, {"a": 50, "b": 50}, 1.0) == {"a": 10, "b": 10}
    assert quotas({"a": 90, "b": 10}, {"a": 50, "b": 50}, 2.0) == {"a": 90, "b": 10}
    cut = quotas({"a": 90, "b": 10, "c": 20}, {"a": 40, "b": 30, "c": 30}, 1.25)
    assert cut["b"] == 10 and cut["a"] <= 0.5 * sum(cut.values()) and cut["c"] <= 20
    assert cut["a"] + 1 > 0.5 * (sum(cut.values()) - 1)  # and as many as that allows
    assert quotas({}, {}, 2.0) == {}


def test_a_review_is_exactly_a_review():
    passed = {name: "PASS" for name in DIMENSIONS} | {"reason": "fine"}
    assert parse_review(json.dumps(passed)) == ("correct", "fine")
    failed = passed | {"reasoning_coherence": "FAIL", "tool_use_rationale": "FAIL"}
    outcome = parse_review(json.dumps(failed))
    assert outcome == ("incorrect", "reasoning_coherence, tool_use_rationale: fine")
    for broken in (
        "PASS",
        json.dumps([passed]),
        json.dumps(passed | {"more": 1}),
        json.dumps(passed | {"visual_relevance": "MAYBE"}),
        json.dumps({**passed, "reason": 3}),
        json.dumps(passed) + " so",
        json.dumps(passed)[:-1] + ', "reason": "twice"}',
    ):
        assert parse_review(broken) is None


def test_a_trajectory_is_written_as_it_was_read():
    info = {"seed": 5, "answer": "7"}
    for text in ("a picture: <image>", "none"):
        one = conversation(
            CROP,
            text,
            answered("7"),
            images=[noise(3)] * text.count("<image>"),
            id="x/1",
            kind="math",
            extra_info=info,
        )
        again = _again("metis-coldstart", coldstart_line(one))
        assert again == one and digest(again) == digest(one)
        assert (recorded_seed(again), known_answer(again)) == (5, "7")


def test_a_placeholder_in_a_tools_text_stays_text():
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read it."}]},
        {"role": "assistant", "content": [{"type": "text", "text": CROP}]},
        {"role": "user", "content": [{"type": "text", "text": "the file says <image>"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answered("7")}]},
    ]
    given = {
        "messages": json.dumps(messages),
        "images": coldstart_line(conversation(CROP))["images"],
    }
    one = _again("metis-coldstart", given)
    again = _again("metis-coldstart", coldstart_line(one))
    assert again.messages == one.messages and len(again.pictures) == 1


def test_a_question_is_written_as_it_was_read():
    picture = io.BytesIO()
    noise(1).save(picture, "PNG")
    extra = {"data_source": "set", "extra_info": {"index": "3", "pass8": 0}}
    one = Example(
        "set/3",
        "math",
        "How many?",
        (Picture(picture.getvalue()),),
        "7",
        extra=extra,
        also=("VII",),
    )
    again = _again("metis-rl", rl_line(one, {"pass_rate": 0.5}))
    assert (again.id, again.kind, again.text, again.answer) == ("set/3", "math", "How many?", "7")
    assert again.pictures[0].read() == picture.getvalue() and again.also == ("VII",)
    assert again.extra["extra_info"] == {"index": "3", "pass8": 0, "pass_rate": 0.5}


def _again(layout, line):
    return read_row(LAYOUTS[layout], json.loads(json.dumps(line)), Path(), ImageLimits())


def test_a_torn_line_costs_itself_and_two_cannot_write_at_a_time(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.put("a", "rules", {"drop": None})
    journal.put("a", "rules", "another word")
    with pytest.raises(RunError, match="another curation works in"):
        Journal(path)
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"key": "b", "stage": "rules", "val')
    journal = Journal(path)
    journal.put("c", "execute", None)
    journal.close()
    again = Journal(path)
    assert "b" not in again and "c" in again and len(again) == 2
    assert again.get("a") == {"drop": None} and again.get("c") is None
    again.close()
