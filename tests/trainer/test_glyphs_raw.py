"""Raw trajectories: each flaw is there, in the stated share, and nothing else is wrong."""

import asyncio
import json
from collections import Counter

import imagehash
import pytest

from trainer.chat import attempts_call, find_answer, find_call
from trainer.data import Conversation, Dataset
from trainer.tasks.glyphs import tools
from trainer.tasks.glyphs.questions import KINDS
from trainer.tasks.glyphs.raw import DIRECT_SHARE, FLAWS, write_raw
from trainer.types import Session

COUNT = 160


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_raw(tmp_path_factory.mktemp("raw"), 3, COUNT)


@pytest.fixture(scope="module")
def labels(path):
    rows = [json.loads(line) for line in (path.parent / "labels.jsonl").open()]
    return {row["id"]: row for row in rows}


@pytest.fixture(scope="module")
def rows(path):
    data = Dataset(path)
    assert [found.name for found in data.layouts] == ["metis-coldstart"]
    assert (len(data), len(data.rejections)) == (COUNT, 0)
    return {row.id: row for row in data}


@pytest.fixture(scope="module")
def executed(rows, loop):
    """id -> the observations of its calls, made anew in a session of the recorded seed."""

    async def again(row: Conversation):
        session = Session(asked(row), row.extra["extra_info"]["seed"])
        turns = [turn.text for turn in row.turns if attempts_call(turn.text)]
        return [(await toolbox.execute_turn(text, session))[1] for text in turns]

    async def all_of_them():
        return await asyncio.gather(*map(again, rows.values()))

    toolbox = tools.toolbox()
    yield dict(zip(rows, loop.run_until_complete(all_of_them()), strict=True))
    loop.run_until_complete(toolbox.close())


def asked(row: Conversation):
    [question] = [m for m in row.messages if m.speaker == "question"]
    return [row.pictures[n].open() for n in question.shown]


def recorded(row: Conversation):
    return [
        (turn.observation.text, [row.pictures[n].open().tobytes() for n in turn.observation.shown])
        for turn in row.turns
        if turn.observation is not None
    ]


def told(observations):
    return [(one.text, [image.tobytes() for image in one.images]) for one in observations]


def of(flaw, rows, labels):
    found = [row for name, row in rows.items() if labels[name]["flaw"] == flaw]
    assert found
    return found


def truth(row):
    return row.extra["extra_info"]["answer"]


def test_flaws_have_their_shares_and_rows_their_labels(rows, labels):
    assert list(rows) == list(labels)
    counts = Counter(label["flaw"] for label in labels.values())
    assert counts.pop(None) == COUNT - sum(counts.values())
    assert counts == {name: round(share * COUNT) for name, share in FLAWS.items()}


def test_rows_are_a_function_of_the_seed(path, tmp_path):
    few = {"mismatch": 0.2, "truncated": 0.2, "duplicate": 0.2}
    first, again = (
        write_raw(tmp_path / name, 1, 10, flaws=few).read_text().splitlines() for name in "ab"
    )
    assert first == again
    other = json.loads(path.open().readline())["images"]
    assert other != json.loads(first[0])["images"], "of another seed"
    for flaws, message in [
        ({"untruth": 0.1}, "no flaw 'untruth'; the flaws are: execution_failure"),
        ({"mismatch": -0.1}, "must not be negative"),
        ({"mismatch": 0.5, "solvable": 0.5}, "leave a sound row"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_raw(tmp_path, 0, 10, flaws=flaws)


def test_a_sound_row_is_right_needs_its_tool_and_can_be_executed_again(rows, labels, executed):
    sound = of(None, rows, labels)
    for row in sound:
        assert row.answer == truth(row)
        assert told(executed[row.id]) == recorded(row)
        calls = [find_call(turn.text) for turn in row.turns[:-1]]
        assert all(calls) and bool(calls) is KINDS[row.kind].needs_tool
        statuses = [one.status for one in executed[row.id]]
        assert not statuses or (statuses[-1] == "ok" and "ok" not in statuses[:-1])
    direct = sum(not row.turns[:-1] for row in sound)
    assert 0 < direct < 4 * DIRECT_SHARE * len(sound)
    assert any(len(row.turns) > 2 for row in sound), "none had to call again"


def test_an_execution_failure_is_passed_over(rows, labels, executed):
    for row in of("execution_failure", rows, labels):
        assert told(executed[row.id]) == recorded(row)
        assert executed[row.id][-1].status == "tool_error"
        assert "busy" not in executed[row.id][-1].text, "the tool's fault, not the call's"
        assert row.answer == truth(row)


def test_a_mismatch_is_what_the_answer_follows(rows, labels, executed):
    found = of("mismatch", rows, labels)
    for row in found:
        [(text, images)], [(real, shown)] = recorded(row), told(executed[row.id])
        assert (text, images) != (real, shown)
        assert row.answer and row.answer != truth(row)
        assert images or (row.answer in text and truth(row) in real)
    assert {bool(recorded(row)[0][1]) for row in found} == {True, False}


def test_the_solvable_call_where_none_is_needed(rows, labels, executed):
    for row in of("solvable", rows, labels):
        assert not KINDS[row.kind].needs_tool and len(row.turns) > 1
        assert told(executed[row.id]) == recorded(row) and row.answer == truth(row)


def test_a_pointless_call_tells_nothing_of_the_question(rows, labels, executed):
    found = of("pointless", rows, labels)
    for row in found:
        first, second = executed[row.id]
        assert told([first, second]) == recorded(row) and row.answer == truth(row)
        assert first.status == second.status == "ok"
        detail = labels[row.id]["detail"]
        if detail == "repeated":
            assert find_call(row.turns[0].text) == find_call(row.turns[1].text)
        elif detail == "whole_image":
            assert first.images[0].tobytes() == asked(row)[0].tobytes()
        else:
            assert "image_1" not in row.turns[0].text and truth(row) not in first.text.split()
    assert len({labels[row.id]["detail"] for row in found}) >= 3


def test_a_truncated_row_ends_without_a_turn_that_answers(rows, labels):
    found = of("truncated", rows, labels)
    for row in found:
        last = row.messages[-1]
        assert row.answer is None and find_answer(last.text) is None
        assert last.speaker == (
            "observation" if labels[row.id]["detail"] == "no_turn" else "policy"
        )
        assert find_call(row.turns[-1].text) is None or last.speaker == "observation"
    assert len({labels[row.id]["detail"] for row in found}) == 3


def test_an_answer_from_a_tool_is_never_the_policys(rows, labels):
    for row in of("tool_answer", rows, labels):
        assert row.answer is None and row.messages[-1].speaker == "observation"
        assert find_answer(row.messages[-1].text) == truth(row)
        assert all(find_call(turn.text) for turn in row.turns)


def test_a_duplicate_and_nothing_else_is_near_an_earlier_row(rows, labels, executed):
    def distance(one, other):
        return imagehash.phash(asked(one)[0], hash_size=16) - imagehash.phash(
            asked(other)[0], hash_size=16
        )

    earlier: dict[str, list[Conversation]] = {}
    for row in rows.values():
        text = next(m.text for m in row.messages if m.speaker == "question")
        near = [one for one in earlier.get(text, []) if distance(row, one) <= 24]
        assert bool(near) is (labels[row.id]["flaw"] == "duplicate"), row.id
        for one in near:
            assert labels[one.id]["flaw"] in (None, "duplicate") and truth(one) == truth(row)
            assert asked(one)[0].tobytes() != asked(row)[0].tobytes()
        earlier.setdefault(text, []).append(row)
    for row in of("duplicate", rows, labels):
        assert told(executed[row.id]) == recorded(row) and row.answer == truth(row)
