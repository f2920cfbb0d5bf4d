"""Reward functions of users: how they are found and called, and what may come back."""

from __future__ import annotations

import logging
import math
import threading
import time

import numpy as np
import pytest
import torch

from trainer.reward_functions import MAX_ABANDONED, RewardFunction, RewardRow, load_function, row_of
from trainer.types import Observation, Question, Rollout, TrainingError, Turn

ROWS = [
    RewardRow("What?", "red", "red", "colours", {"n": 1}, {"answer": "red", "level": 1}),
    RewardRow("What?", "blue", "red", "colours", {"n": 2}, {"answer": "red"}),
]


def values(function, rows=ROWS, **settings):
    return [reward.value for reward in RewardFunction(function, **settings)(rows)]


def test_trls_signature():
    seen = {}

    def reward(prompts, completions, answer, **columns):
        seen.update(columns, prompts=prompts)
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    assert values(reward) == [1.0, 0.0]
    assert seen == {"prompts": ["What?", "What?"], "level": [1, None]}


def test_trls_without_further_columns_async_and_with_messages():
    def few(completions):
        return [len(c) for c in completions]

    async def later(completions, **columns):
        return [len(c) for c in completions]

    def messages(prompts, completions, **columns):
        return [len(c[0]["content"]) * (c[0]["role"] == "assistant") for c in completions]

    assert values(few) == values(later) == [3, 4]
    talk = [RewardRow([{"role": "user", "content": "What?"}], "red")]
    assert values(messages, talk) == [3]


def test_verls_signature():
    seen = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        seen.append((data_source, extra_info))
        return float(solution_str == ground_truth)

    function = RewardFunction(compute_score)
    assert function.style == "verl"
    assert [r.value for r in function(ROWS)] == [1.0, 0.0]
    assert seen == [("colours", {"n": 1}), ("colours", {"n": 2})]


def test_verls_dict():
    def compute_score(solution_str, ground_truth, **settings):
        assert set(settings) == {"data_source", "extra_info"}
        return {"score": 0.5, "acc": True, "pred": solution_str, "odd": float("nan")}

    first, _ = RewardFunction(compute_score)(ROWS)
    assert first.value == 0.5 and first.metrics == {"acc": 1.0}


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1, 0.5], [1.0, 0.5]),
        ((True, False), [1.0, 0.0]),
        ([None, 1.0], [None, 1.0]),
        ([float("nan"), math.inf], [None, None]),
        (["1.0", [1.0]], [None, None]),
        ([10**400, 1j], [None, None]),
        ([1.0], [None, None]),
        ([1.0] * 3, [None, None]),
        (1.0, [None, None]),
        (None, [None, None]),
        ({"score": 1.0}, [None, None]),
        (np.array([1.0, np.nan]), [1.0, None]),
        ([np.float32(0.5), np.int64(2)], [0.5, 2.0]),
        (torch.tensor([1.0, 0.25]), [1.0, 0.25]),
        ([torch.tensor(1.0), torch.tensor([1.0, 2.0])], [1.0, None]),
    ],
)
def test_what_may_come_back(returned, expected):
    function = RewardFunction(lambda completions, **columns: returned)
    assert [reward.value for reward in function(ROWS)] == expected
    assert all(reward.reason for reward in function(ROWS) if reward.value is None)
    assert function.counts["unscored"] == 2 * expected.count(None)
    assert function.counts["scored"] == 2 * (2 - expected.count(None))


@pytest.mark.parametrize(
    "returned", [None, float("nan"), "1", {"acc": 1.0}, {"score": None}, [1.0]]
)
def test_what_may_not_come_back_from_verls(returned):
    assert values(lambda solution_str, ground_truth: returned) == [None, None]


@pytest.mark.parametrize(
    "error", [ValueError("odd \ud800"), KeyError("x"), SystemExit(3), MemoryError()]
)
def test_what_raises_is_unscored_and_said_once(error, caplog):
    def compute_score(solution_str, ground_truth):
        if solution_str == "blue":
            raise error
        return 1.0

    function = RewardFunction(compute_score)
    for _ in range(2):
        first, second = function(ROWS)
        assert first.value == 1.0 and second.value is None
        assert type(error).__name__ in second.reason
    assert len(caplog.records) == 1 and function.counts["unscored"] == 2


def test_none_is_no_failure(caplog):
    caplog.set_level(logging.WARNING)
    assert values(lambda completions: [None, None]) == [None, None]
    assert not caplog.records


def test_what_hangs_is_abandoned_and_in_the_end_stops_the_run():
    release = threading.Event()

    def compute_score(solution_str, ground_truth):
        if solution_str == "blue":
            release.wait(30)
        return 1.0

    function = RewardFunction(compute_score, timeout=0.1)
    began = time.monotonic()
    for _ in range(MAX_ABANDONED):
        first, second = function(ROWS)
        assert first.value == 1.0 and second.value is None and "0.1 s" in second.reason
    with pytest.raises(TrainingError, match="4 calls of the reward function .* hang"):
        function(ROWS)
    assert time.monotonic() - began < 5
    release.set()
    time.sleep(0.1)
    assert function(ROWS[:1])[0].value == 1.0  # what ended is forgotten


def test_a_column_that_is_not_there_is_named():
    def reward(completions, answer, colour):
        return [1.0] * len(completions)

    with pytest.raises(TrainingError, match="needs colour; there are answer, completions, level"):
        RewardFunction(reward)(ROWS)
    with pytest.raises(TrainingError, match="needs judge"):
        RewardFunction(lambda solution_str, ground_truth, judge: 1.0)(ROWS)


def test_no_rows_no_call():
    assert RewardFunction(lambda completions: 1 / 0)([]) == []


FILE = """
from dataclasses import dataclass
calls = []

@dataclass
class Settings:
    bonus: float = 0.5

def reward(completions, **columns):
    calls.append(1)
    return [Settings().bonus] * len(completions)

def other(completions, **columns):
    return [len(calls)] * len(completions)

number = 3
"""


def test_functions_are_loaded_from_files_and_modules(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    assert values(f"{file}:reward") == [0.5, 0.5]
    assert values(f"{file}:other") == [1, 1]  # one module, not two
    package = tmp_path / "package_of_rewards.py"
    package.write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    function = RewardFunction("package_of_rewards:reward")
    assert function.name == "package_of_rewards:reward" and function.style == "trl"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("reward", "module:function or file.py:function"),
        (":reward", "module:function or file.py:function"),
        ("a:b c", "module:function or file.py:function"),
        ("no_such_module_here:reward", "cannot be imported"),
        ("/no/such/file.py:reward", "no file at"),
        ("{file}:absent", "its functions are: other, reward"),
        ("{file}:number", "has no function 'number'"),
        ("{broken}:reward", "ZeroDivisionError"),
        ("{leaves}:reward", "SystemExit"),
    ],
)
def test_a_spec_that_leads_nowhere_says_why(tmp_path, spec, said):
    for name, text in (("file", FILE), ("broken", "1 / 0"), ("leaves", "raise SystemExit(2)")):
        (tmp_path / f"{name}.py").write_text(text)
        spec = spec.replace("{" + name + "}", str(tmp_path / f"{name}.py"))
    with pytest.raises(ValueError, match=said):
        load_function(spec)


def test_a_signature_of_neither_kind_is_named():
    with pytest.raises(ValueError, match="neither a parameter completions"):
        RewardFunction(lambda text: 1.0)
    with pytest.raises(ValueError, match="in verl's style takes solution_str, ground_truth"):
        RewardFunction(lambda completions: 1.0, style="verl")
    assert values(lambda **everything: [1.0] * len(everything["completions"]), style="trl") == [
        1,
        1,
    ]


def test_the_row_of_a_rollout_has_the_policys_words_alone():
    turns = [Turn("call", None, Observation("<answer>7</answer>")), Turn("<answer>8</answer>")]
    question = Question("q1", "digits", "?", (), "7", extra={"level": 2})
    rollout = Rollout(question, 0, [], [], [], [], 0, turns, calls=1)
    row = row_of(rollout)
    assert row.completion == "call\n<answer>8</answer>" and "7" not in row.completion
    assert (row.prompt, row.ground_truth, row.data_source) == ("?", "7", "digits")
    assert row.columns["level"] == 2 and row.columns["ground_truth"] == "7"
    assert row.columns["solution"] == row.columns["answer"] == "7"


def test_the_row_of_a_rollout_has_the_columns_of_its_data():
    extra = {"data_source": "mine", "extra_info": {"level": 3, "index": "a"}}
    question = Question("q1", "digits", "?", (), "grey", also=("gray",), extra=extra)
    row = row_of(Rollout(question, 0, [], [], [], [], 0, [Turn("x")]))
    assert (row.data_source, row.ground_truth) == ("mine", ["grey", "gray"])
    assert row.extra_info == {
        "level": 3, "index": "a", "id": "q1", "calls": 0, "status": "ok",
    }  # fmt: skip
    assert row.columns["data_source"] == "mine" and row.columns["extra_info"]["level"] == 3


def test_a_number_out_of_bounds_is_unscored():
    given = [-0.5, -1e-7, 0.25, 1 + 1e-7, 1.5]
    function = RewardFunction(lambda completions: given, bounds=(0.0, 1.0))
    rewards = function([RewardRow("?", "x")] * 5)
    assert [reward.value for reward in rewards] == [None, 0.0, 0.25, 1.0, None]
    assert rewards[-1].reason == "went out of bounds: 1.5 is not in 0 to 1"
    assert {reward.cause for reward in rewards} == {"went out of bounds", ""}


def test_a_function_that_rewards_hardly_anything_is_of_no_use():
    answers = iter([[1.0] + [None] * 9, [None] * 9, [None]])
    function = RewardFunction(lambda completions: next(answers))
    for count in (10, 9, 1):
        function.check()
        function([RewardRow("?", "x")] * count)
    with pytest.raises(
        TrainingError, match="no reward for 19 of the last 20 rollouts: it returned"
    ):
        function.check()
