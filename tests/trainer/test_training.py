"""SFT and HDPO, for real and small: a few steps on the demo's base model."""

import json

import pytest
import torch

from metis_kernels import Advantages
from trainer.config import load
from trainer.engines.hf import HFEngine
from trainer.evaluate import measure
from trainer.log import RunLog
from trainer.model import Reference
from trainer.optimizer import optimizer_step
from trainer.rl import optimizer_batches, rl
from trainer.rollout import Limits, Player
from trainer.selection import group_advantages
from trainer.sft import demonstrate, sft
from trainer.tasks import load_task
from trainer.types import Question, Rollout, TrainingError


@pytest.fixture(scope="module")
def task():
    return load_task("glyphs")


@pytest.fixture
def log(tmp_path):
    with RunLog(tmp_path) as log:
        yield log


def _never():
    return False


def _metrics(log, stage):
    log.close()
    lines = (log.folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == stage]


def test_sft_then_two_steps_of_hdpo(fresh_vlm, task, log):
    config = load(
        None,
        [
            "sft.demonstrations=96",
            "sft.steps=6",
            "sft.batch_size=16",
            "rl.steps=2",
            "rl.prompts=2",
            "rl.group_size=4",
            "rl.max_batch_tokens=400",
        ],
    )
    before = {n: p.clone() for n, p in fresh_vlm.model.named_parameters()}
    recorded = []

    def record(stage, step, rollouts, advantages):
        assert isinstance(advantages, Advantages)
        recorded.append((stage, step, len(rollouts)))

    with Player(fresh_vlm, task.toolbox(), Limits()) as player:
        rollouts = demonstrate(task, player, config.sft, 0, log, _never)
        sft(fresh_vlm, rollouts, config.sft, 0, log, _never)
        engine = HFEngine(fresh_vlm)
        rl(fresh_vlm, task, player, engine, config.rl, 0, log, _never, record)
    assert recorded == [("rl", 1, 8), ("rl", 2, 8)]
    losses = [row["loss"] for row in _metrics(log, "sft")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    steps = _metrics(log, "rl")
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert 0 <= row["accuracy"] <= 1 and row["unscored"] == 0
        assert row["nonfinite_tokens"] == 0
        assert row["clip_fraction_acc"] == row["clip_fraction_tool"] == 0.0, "on-policy"
    moved = [n for n, p in fresh_vlm.model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 40


def _group(*outcomes: tuple[bool, int], status="ok") -> list[Rollout]:
    """Rollouts of one question, as (correct, calls)."""
    question = Question("q", "k", "?", (), "1", needs_tool=True)
    return [
        Rollout(
            question,
            0,
            [1] * 6,
            [False] * 2 + [True] * 4,
            [0.0] * 6,
            [],
            2,
            status=status,
            calls=calls,
            correct=correct,
            formatted=True,
        )
        for correct, calls in outcomes
    ]


def _config(*settings):
    return load(None, ["rl.group_size=4", *settings]).rl


def test_advantages_are_decoupled():
    rollouts = _group((True, 0), (True, 1), (True, 1), (False, 0))
    advantages = group_advantages(rollouts, _config())
    assert advantages.acc[3] < 0 < advantages.acc[0] == advantages.acc[1]
    assert advantages.tool[0] > 0 > advantages.tool[1]
    assert advantages.tool[3] == 0, "a wrong answer is never paid for having called no tool"


def test_the_coupled_reward_pays_a_wrong_answer_for_not_calling():
    rollouts = _group((False, 0), (False, 1), (False, 1), (False, 1))
    assert not group_advantages(rollouts, _config()).acc.any()
    coupled = group_advantages(rollouts, _config("rl.reward=coupled", "rl.coupled_alpha=0.5"))
    assert coupled.acc[0] > 0 > coupled.acc[1]


def _rollouts(batch):
    return [rollout for one in batch.batches for rollout in one.rollouts]


def test_what_carries_no_gradient_is_left_out_but_counted(fresh_vlm):
    silent = _group(*[(True, 1)] * 4)
    loud = _group((True, 0), (True, 1), (False, 1), (True, 1))
    config = _config()
    rollouts = silent + loud
    (batch,) = optimizer_batches(
        fresh_vlm, rollouts, group_advantages(rollouts, config), config, config.loss.hdpo(1.0)
    )
    assert sorted(map(id, _rollouts(batch))) == sorted(map(id, loud))
    assert batch.n_acc == 8 * 4 and batch.n_tool == (4 + 3) * 4
    signal = _config("rl.loss.tool_norm=signal").loss.hdpo(1.0)
    (batch,) = optimizer_batches(
        fresh_vlm, rollouts, group_advantages(rollouts, config), config, signal
    )
    assert batch.n_tool == 3 * 4
    with_kl = _config("rl.loss.kl_coef=0.1")
    (batch,) = optimizer_batches(
        fresh_vlm, rollouts, group_advantages(rollouts, with_kl), with_kl, with_kl.loss.hdpo(1.0)
    )
    assert len(_rollouts(batch)) == 8


def test_a_step_without_any_signal_moves_nothing(fresh_vlm):
    rollouts = _group(*[(True, 1)] * 4)
    config = _config()
    loss = config.loss.hdpo(1.0)
    (batch,) = optimizer_batches(
        fresh_vlm, rollouts, group_advantages(rollouts, config), config, loss
    )
    assert batch.batches == []
    measures = batch.backward(fresh_vlm, loss)
    assert measures["loss"] == measures["active_tokens"] == measures["approx_kl"] == 0
    optimizer = torch.optim.AdamW(fresh_vlm.model.parameters(), 1e-3, weight_decay=0.0)
    weights = {n: p.clone() for n, p in fresh_vlm.model.named_parameters()}
    assert optimizer_step(fresh_vlm.model, optimizer, 1e-3, 1.0) == 0
    assert all(torch.equal(p, weights[n]) for n, p in fresh_vlm.model.named_parameters())


def test_what_could_not_be_scored_is_nowhere(fresh_vlm):
    rollouts = _group((True, 0), (True, 1), (False, 1), (True, 1))
    rollouts[1].status = "tool_infra"
    config = _config()
    advantages = group_advantages(rollouts, config)
    assert advantages.acc[1] == advantages.tool[1] == 0
    (batch,) = optimizer_batches(fresh_vlm, rollouts, advantages, config, config.loss.hdpo(1.0))
    assert rollouts[1] not in _rollouts(batch) and batch.n_acc == 3 * 4
    assert measure(rollouts)["unscored"] == 1 and measure(rollouts)["n"] == 3


def test_a_truncated_rollout_is_wrong_and_never_qualifies():
    rollouts = _group((True, 0), (True, 1), (True, 1), (True, 1))
    rollouts[0].status = "truncated"
    advantages = group_advantages(rollouts, _config())
    assert advantages.tool[0] == 0 and not advantages.qualifies[0]


def _played(fresh_vlm, task, config, count=4):
    with Player(fresh_vlm, task.toolbox(), Limits()) as player:
        questions = [q for q in task.train(0, 0, count) for _ in range(config.group_size)]
        # Hot, so that the rollouts of a group differ and their gradients do not cancel.
        engine = HFEngine(fresh_vlm, temperature=3.0)
        return player.play(engine, questions, range(len(questions)))


def _gradient(vlm):
    return torch.cat([p.grad.flatten() for p in vlm.model.parameters() if p.grad is not None])


def test_the_gradient_does_not_depend_on_the_cut(fresh_vlm, task):
    """One micro-batch or many: with the normalisers of the whole batch, the same gradient."""
    gradients = []
    config = _config("rl.loss.w_tool=0.5")
    rollouts = _played(fresh_vlm, task, config)
    for rollout, correct in zip(rollouts, [True, False, True, True] * 4, strict=True):
        rollout.correct = correct  # the base model is wrong too often to compare anything
    rollouts[0].calls = 2
    for tokens in (100_000, 90):
        config = _config("rl.loss.w_tool=0.5", f"rl.max_batch_tokens={tokens}")
        loss = config.loss.hdpo(1.0)
        (batch,) = optimizer_batches(
            fresh_vlm, rollouts, group_advantages(rollouts, config), config, loss
        )
        batch.backward(fresh_vlm, loss)
        gradients.append(_gradient(fresh_vlm))
        fresh_vlm.model.zero_grad()
    assert len(batch.batches) > 4
    whole, cut = gradients
    assert whole.norm() > 1e-3
    assert (whole - cut).norm() / whole.norm() < 1e-4


def test_with_several_updates_the_first_ratio_is_one(fresh_vlm, task):
    config = _config("rl.updates=2")
    loss = config.loss.hdpo(1.0)
    rollouts = _played(fresh_vlm, task, config)
    for rollout, correct in zip(rollouts, [True, False, True, True] * 4, strict=True):
        rollout.correct = correct
    batches = optimizer_batches(
        fresh_vlm, rollouts, group_advantages(rollouts, config), config, loss
    )
    assert len(batches) == 2
    mine, others = (set(map(id, _rollouts(batch))) for batch in batches)
    assert mine and others and not mine & others
    for batch in batches:
        batch.score_old(fresh_vlm, loss)
    optimizer = torch.optim.SGD(fresh_vlm.model.parameters(), lr=1.0)
    first = batches[0].backward(fresh_vlm, loss)
    assert first["approx_kl"] == 0 and first["clip_fraction_acc"] == 0
    optimizer_step(fresh_vlm.model, optimizer, 1.0, 1.0)
    assert batches[1].backward(fresh_vlm, loss)["approx_kl"] > 0, "the policy has moved"


def test_kl_to_the_reference_has_a_gradient_where_nothing_else_has(fresh_vlm, task):
    config = _config("rl.loss.kl_coef=1.0")
    loss = config.loss.hdpo(1.0)
    rollouts = _played(fresh_vlm, task, config, count=1)
    for rollout in rollouts:
        rollout.correct, rollout.calls = True, 1
    (batch,) = optimizer_batches(
        fresh_vlm, rollouts, group_advantages(rollouts, config), config, loss
    )
    reference = Reference(fresh_vlm)
    batch.backward(fresh_vlm, loss, reference)
    assert _gradient(fresh_vlm).norm() < 1e-5, "at the reference itself the KL is at its minimum"
    with torch.no_grad():
        for weight in fresh_vlm.model.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    fresh_vlm.model.zero_grad()
    batch.backward(fresh_vlm, loss, reference)
    assert _gradient(fresh_vlm).norm() > 1e-3


def test_a_gradient_that_is_not_finite_changes_nothing(fresh_vlm, task, log):
    weights = {n: p.clone() for n, p in fresh_vlm.model.named_parameters()}
    optimizer = torch.optim.AdamW(fresh_vlm.model.parameters(), 1e-3)
    for weight in fresh_vlm.model.parameters():
        weight.grad = torch.full_like(weight, torch.nan)
    norm = optimizer_step(fresh_vlm.model, optimizer, 1e-3, 1.0)
    assert not torch.isfinite(norm)
    assert all(torch.equal(p, weights[n]) for n, p in fresh_vlm.model.named_parameters())
    assert all(p.grad is None for p in fresh_vlm.model.parameters())


def test_a_run_whose_gradients_stay_broken_gives_up(fresh_vlm, task, log, monkeypatch):
    import trainer.rl as module

    def broken(model, optimizer, lr, max_grad_norm):
        return torch.tensor(torch.nan)

    monkeypatch.setattr(module, "optimizer_step", broken)
    config = load(None, ["rl.steps=9", "rl.prompts=1", "rl.group_size=2"]).rl
    steps = []
    with (
        Player(fresh_vlm, task.toolbox(), Limits()) as player,
        pytest.raises(TrainingError, match="not finite 3 times in a row at step 3"),
    ):
        engine = HFEngine(fresh_vlm)
        rl(fresh_vlm, task, player, engine, config, 0, log, _never, lambda *a: steps.append(a))
    assert len(steps) == 2


def test_stopping_ends_within_a_step(fresh_vlm, task, log):
    config = load(None, ["rl.prompts=1", "rl.group_size=2"]).rl
    seen = []
    with Player(fresh_vlm, task.toolbox(), Limits()) as player, pytest.raises(KeyboardInterrupt):
        engine = HFEngine(fresh_vlm)
        stopping = lambda: len(seen) >= 1  # noqa: E731
        rl(fresh_vlm, task, player, engine, config, 0, log, stopping, lambda *a: seen.append(a))
    assert len(seen) == 1


def test_measure_tells_redundant_from_missed():
    def one(kind, needs, calls, correct):
        (rollout,) = _group((correct, calls))
        rollout.question = Question("q", kind, "?", (), "1", needs_tool=needs)
        return rollout

    measures = measure(
        [
            one("easy", False, 0, True),
            one("easy", False, 2, True),
            one("hard", True, 1, True),
            one("hard", True, 0, False),
            one("hard", True, 1, False),
            one("hard", True, 1, True),
        ]
    )
    assert measures["redundant_rate"] == 1 / 2
    assert measures["missed_rate"] == 1 / 4
    assert measures["needed_rate"] == 4 / 6
    assert measures["tool_rate"] == 4 / 6 and measures["calls"] == 5 / 6
    assert measures["by_kind"]["hard"]["accuracy"] == 1 / 2
    assert measures["by_kind"]["hard"]["direct_accuracy"] == 0.0
    assert measures["by_kind"]["hard"]["called_accuracy"] == 2 / 3
