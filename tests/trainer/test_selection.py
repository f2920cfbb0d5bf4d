"""Dynamic sampling, counterfactual rollouts and the measures of the implicit curriculum."""

import json

import pytest
import torch

import metis_kernels as mk
from trainer.cli import main
from trainer.collect import Collector
from trainer.config import ConfigError, load
from trainer.interrupt import never
from trainer.rl import _measures
from trainer.selection import (
    channel_shares,
    group_advantages,
    group_modes,
    group_records,
    has_signal,
    pass_rates,
)
from trainer.types import Question, Rollout


def _config(*settings):
    return load(None, ["rl.group_size=4", "rl.prompts=2", *settings]).rl


def _rollout(correct, calls, *, mode="allowed", name="q", tokens=3):
    question = Question(name, "kind", "?", (), "7")
    rollout = Rollout(question, 0, [5] * (tokens + 1), [False] + [True] * tokens, [], [], 1)
    rollout.correct, rollout.formatted = correct, True
    rollout.calls, rollout.mode = calls, mode
    return rollout


def _group(*outcomes, name="q"):
    return [_rollout(correct, calls, name=name) for correct, calls in outcomes]


SILENT = [(True, 1)] * 4
MIXED = [(True, 1), (False, 1), (True, 1), (False, 0)]
ECONOMY = [(True, 1), (True, 0), (True, 1), (True, 1)]

# ---- counterfactual rollouts ---------------------------------------------------------------------


def test_a_group_is_the_policys_own_and_then_the_forced_ones():
    config = _config("rl.group_size=6", "rl.forced_calls=2", "rl.forced_answers=1")
    assert group_modes(config) == ["allowed"] * 3 + ["forced"] * 2 + ["forbidden"]
    assert group_modes(_config()) == ["allowed"] * 4


def test_two_rollouts_at_least_are_the_policys_own():
    with pytest.raises(ConfigError, match="3 forced rollouts leave 1 of group_size 4"):
        _config("rl.forced_calls=2", "rl.forced_answers=1")


def test_what_is_forced_is_in_the_accuracy_channel_alone():
    """A rare call among right answers would be the odd one out of the tool channel."""
    config = _config("rl.group_size=5", "rl.forced_calls=1")
    own = [_rollout(True, 0), _rollout(False, 0), _rollout(False, 0), _rollout(True, 0)]
    forced = _rollout(True, 1, mode="forced")
    advantages = group_advantages([*own, forced], config)
    assert advantages.tool.abs().sum() == 0 and not advantages.qualifies[4]
    assert advantages.acc[4] == advantages.acc[0] > 0 > advantages.acc[1]


def test_a_group_that_never_calls_learns_that_a_call_is_right():
    config = _config("rl.group_size=5", "rl.forced_calls=1")
    direct = [_rollout(False, 0) for _ in range(4)]
    assert not has_signal(group_advantages([*direct, _rollout(False, 0)], config), config).any()
    advantages = group_advantages([*direct, _rollout(True, 1, mode="forced")], config)
    assert has_signal(advantages, config).all()
    assert advantages.acc[4] > 0 > advantages.acc[0]


def test_rates_are_of_what_the_policy_did_by_itself():
    config = _config("rl.forced_calls=1", "rl.forced_answers=1")
    group = [
        _rollout(True, 0),
        _rollout(False, 0),
        _rollout(True, 1, mode="forced"),
        _rollout(False, 0, mode="forbidden"),
    ]
    values = _measures(group, config, [])
    assert (values["accuracy"], values["tool_rate"]) == (0.5, 0.0)
    assert (values["forced_call_accuracy"], values["forced_answer_accuracy"]) == (1.0, 0.0)
    (record,) = group_records(3, group, config, [False])
    assert (record["rollouts"], record["pass_rate"], record["tool_rate"]) == (2, 0.5, 0.0)
    assert record["forced_call_accuracy"] == 1.0 and not record["dropped"]


# ---- dynamic sampling ----------------------------------------------------------------------------


class Stream:
    """A task and its player: question n comes out as outcomes[n] says."""

    def __init__(self, *outcomes):
        self.outcomes, self.asked = outcomes, []

    def train(self, seed, start, count):
        self.asked.append((start, count))
        return [Question(str(n), "kind", "?", (), "7") for n in range(start, start + count)]

    def play(self, engine, questions, seeds, *, modes, stopping):
        self.seeds = seeds
        numbers = [int(question.id) for question in questions]
        seen: dict[int, int] = {}
        rollouts = []
        for number, mode in zip(numbers, modes, strict=True):
            place = seen[number] = seen.get(number, -1) + 1
            correct, calls = self.outcomes[number % len(self.outcomes)][place]
            rollouts.append(_rollout(correct, calls, mode=mode, name=str(number)))
        return rollouts


def _collected(stream, config, position=0):
    return Collector(stream, stream, None, config, 0, never).collect(1, position)


def _ids(rollouts):
    return [rollout.question.id for rollout in rollouts[::4]]


def test_groups_without_signal_are_replaced():
    stream = Stream(SILENT, MIXED, SILENT, ECONOMY, MIXED)
    collected = _collected(stream, _config("rl.resample=3"))
    assert stream.asked == [(0, 2), (2, 1), (3, 1)]
    assert _ids(collected.played) == ["0", "1", "2", "3"]
    assert _ids(collected.rollouts) == ["1", "3"]
    assert collected.dropped == [True, False, True, False]


def test_resampling_has_a_cap_and_fills_up_with_what_there_is():
    stream = Stream(SILENT, SILENT, MIXED, SILENT, SILENT)
    collected = _collected(stream, _config("rl.resample=1"))
    assert stream.asked == [(0, 2), (2, 2)]
    assert _ids(collected.rollouts) == ["0", "2"]
    assert collected.dropped == [False, True, False, True]


def test_without_resampling_groups_are_taken_as_they_come():
    stream = Stream(SILENT, SILENT, MIXED)
    collected = _collected(stream, _config(), position=4)
    assert stream.asked == [(4, 2)]
    assert collected.rollouts == collected.played and not any(collected.dropped)


def test_replacements_have_seeds_of_their_own():
    stream = Stream(SILENT, MIXED, MIXED)
    _collected(stream, _config("rl.resample=1"))
    again = Stream(MIXED, MIXED, MIXED)
    _collected(again, _config("rl.prompts=3"))
    assert stream.seeds == again.seeds[8:]


@pytest.mark.parametrize(
    ("settings", "economy"),
    [((), True), (("rl.loss.w_tool=0",), False), (("rl.reward=coupled",), True)],
)
def test_a_signal_is_one_that_the_loss_takes(settings, economy):
    """Coupled: calls are part of the one reward, so a group that differs in them has a signal."""
    config = _config(*settings)
    rollouts = _group(*SILENT) + _group(*MIXED) + _group(*ECONOMY)
    signal = has_signal(group_advantages(rollouts, config), config)
    assert signal.tolist() == [False, True, economy]


# ---- the implicit curriculum ---------------------------------------------------------------------


def test_shares_are_those_of_the_gradient():
    config = _config("rl.loss.w_tool=0.5")
    rollouts = _group(*MIXED) + _group(*ECONOMY)
    for number, rollout in enumerate(rollouts):  # of different lengths
        rollout.policy += [True] * number
    advantages = group_advantages(rollouts, config)
    values = channel_shares(rollouts, advantages, config)
    tokens = torch.tensor([sum(rollout.policy) for rollout in rollouts])
    rows = torch.repeat_interleave(torch.arange(len(rollouts)), tokens)
    n_acc, n_tool = mk.hdpo_normalizers(advantages, tokens, tool_norm="qualifying")
    pull = []
    for weight_acc, weight_tool in ((1.0, 0.0), (0.0, 0.5)):
        logprob = torch.full((len(rows),), -1.0, requires_grad=True)
        targets = mk.HDPOTargets(
            row=torch.arange(len(rows)),
            label=torch.zeros(len(rows), dtype=torch.long),
            old_logprob=None,
            acc_advantage=advantages.acc[rows],
            tool_advantage=advantages.tool[rows],
            n_acc=n_acc,
            n_tool=n_tool,
        )
        loss, _ = mk.hdpo_loss(
            logprob, targets, mk.HDPOConfig(w_acc=weight_acc, w_tool=weight_tool)
        )
        loss.backward()
        pull.append(float(logprob.grad.abs().sum()))
    assert values["gradient_share/tool"] == pytest.approx(pull[1] / sum(pull), rel=1e-5)
    assert values["gradient_share/acc"] + values["gradient_share/tool"] == pytest.approx(1)
    # MIXED has two right rollouts that called as often: no signal in the tool channel.
    assert (values["groups/acc_signal"], values["groups/tool_signal"]) == (0.5, 0.5)


def test_a_step_without_signal_has_no_shares():
    config = _config()
    rollouts = _group(*SILENT)
    values = channel_shares(rollouts, group_advantages(rollouts, config), config)
    assert values["gradient_share/tool"] is None and values["groups/tool_signal"] == 0.0


def test_pass_rates_by_group():
    rollouts = _group(*SILENT) + _group(*MIXED) + _group(*[(False, 0)] * 4)
    rollouts[4].status = "unscored"
    for rollout in rollouts[:2]:
        rollout.correct, rollout.mode = False, "forced"
    values = pass_rates(rollouts, _config())
    assert values == {"groups/all_right": 1 / 3, "groups/all_wrong": 1 / 3}


def test_a_run_writes_the_history_of_its_prompts(tmp_path):
    settings = ["rl.steps=2", "rl.prompts=2", "rl.group_size=4", "evaluate.questions=8"]
    settings += ["rl.forced_calls=1", "rl.forced_answers=1", "rl.resample=1", "model.path=glyphs"]
    assert main(["rl", "--runs", str(tmp_path), *settings]) == 0
    lines = (tmp_path / "rl" / "groups.jsonl").read_text().splitlines()
    groups = [json.loads(line) for line in lines]
    metrics = [json.loads(m) for m in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if row["stage"] == "rl"]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        mine = [group for group in groups if group["step"] == row["step"]]
        assert len(mine) == 2 + row["resampled"]
        assert sum(group["dropped"] for group in mine) == row["resampled"]
        assert all(group["rollouts"] <= 2 for group in mine)
    questions = [group["question"] for group in groups]
    assert len(set(questions)) == len(questions), "the stream goes on where a step left it"
