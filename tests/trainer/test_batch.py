"""Micro-batches of rollouts that were really played, pictures and tool calls among them."""

from __future__ import annotations

import pytest
import torch

from metis_kernels import unpack
from trainer.batch import pack, trajectory
from trainer.engines.hf import HFEngine
from trainer.rollout import Limits, Player
from trainer.tasks import load_task

GROUP = 3
TEMPERATURE = 2.0


@pytest.fixture(scope="module")
def groups(vlm):
    """Groups of demonstrations (they call tools) and of sampled rollouts, of one question each."""
    task = load_task("glyphs")
    with Player(vlm, task.toolbox(), Limits()) as player:
        questions, scripts = task.demonstrations(0, 24, 0.0)
        shown = [[rollout] for rollout in player.demonstrate(questions, scripts)]
        asked = [question for question in task.train(0, 0, 4) for _ in range(GROUP)]
        played = player.play(HFEngine(vlm, temperature=TEMPERATURE), asked, range(len(asked)))
    return shown + [played[i : i + GROUP] for i in range(0, len(played), GROUP)]


def test_there_are_pictures_in_prompts_and_in_answers(groups):
    counts = {len(rollout.images) for group in groups for rollout in group}
    assert counts == {1, 2}


@pytest.mark.parametrize("max_tokens", [100_000, 300])
def test_every_rollout_is_there_once_and_every_batch_fits(vlm, groups, max_tokens):
    batches = pack(vlm, groups, max_tokens, keep_all=True)
    assert all(batch.packed.T <= max_tokens for batch in batches)
    found = [id(rollout) for batch in batches for rollout in batch.rollouts]
    assert sorted(found) == sorted(id(rollout) for group in groups for rollout in group)
    assert (len(batches) == 1) == (max_tokens == 100_000)


def test_rows_labels_and_pictures_are_those_of_the_rollouts(vlm, groups):
    for batch in pack(vlm, groups, 400, keep_all=True):
        packed = batch.packed
        for member, rollout in enumerate(batch.rollouts):
            mine = packed.sequence == member
            wrote = [i for i, policy in enumerate(rollout.policy) if policy]
            assert packed.label[mine].tolist() == [rollout.ids[i] for i in wrote]
            before = packed.ids[packed.row[mine]].tolist()
            assert before == [rollout.ids[i - 1] for i in wrote]
        placeholders = int((packed.ids == vlm.image_token_id).sum())
        assert placeholders == sum(vlm.image_tokens(image) for image in batch.images)


def test_a_question_is_looked_at_once_a_group(vlm, groups):
    (batch,) = pack(vlm, groups[-4:], 100_000, keep_all=True)
    asked = {id(i) for group in groups[-4:] for i in group[0].question.images}
    assert sum(id(image) in asked for image in batch.images) == len(asked)
    assert batch.packed.T < sum(len(r.ids) for group in groups[-4:] for r in group)


@torch.no_grad()
def test_hidden_states_are_those_of_each_rollout_alone(vlm, groups):
    for batch in pack(vlm, groups, 2000, keep_all=True):
        hidden = batch.hidden(vlm)
        pieces = unpack(batch.packed, hidden)
        for rollout, (prefix, response) in zip(batch.rollouts, pieces, strict=True):
            alone = vlm.model.model(
                **vlm.collate([(rollout.ids, rollout.images)]), use_cache=False
            ).last_hidden_state[0]
            mine = torch.cat([prefix, response])
            torch.testing.assert_close(mine, alone[: len(mine)], rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_sampled_logprobs_are_those_of_the_packed_batch(vlm, groups):
    """What the engine wrote down while it sampled, turn by turn with its cache."""
    forbidden = HFEngine(vlm).protocol.forbidden
    for batch in pack(vlm, groups[-4:], 100_000, keep_all=True):
        packed = batch.packed
        logits = batch.hidden(vlm)[packed.row] @ vlm.head.T / TEMPERATURE
        logits[:, forbidden] = -torch.inf  # the engine never samples these
        logprob = logits.log_softmax(-1).gather(1, packed.label[:, None])[:, 0]
        for member, rollout in enumerate(batch.rollouts):
            sampled = torch.tensor(rollout.logprob)[torch.tensor(rollout.policy)]
            torch.testing.assert_close(
                logprob[packed.sequence == member], sampled, atol=1e-4, rtol=0
            )


def test_a_trajectory_has_a_span_for_every_picture(vlm, groups):
    for group in groups:
        for rollout in group:
            one = trajectory(vlm, rollout)
            assert len(one.images) == len(rollout.images)
            for span, image in zip(one.images, rollout.images, strict=True):
                assert (one.ids[span.start : span.stop] == vlm.image_token_id).all()
                assert span.stop - span.start == vlm.image_tokens(image)


def test_the_grid_is_what_the_image_processor_makes(vlm, groups):
    images = list({id(i): i for group in groups for r in group for i in r.images}.values())
    made = vlm.pixels(images)["image_grid_thw"]
    assert made.tolist() == [list(vlm.grid(image)) for image in images]
