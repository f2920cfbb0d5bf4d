"""Trajectories with the demo's base model and its real tools."""

import asyncio
import contextlib
import json

import numpy as np
import pytest
import torch

from trainer.engines.hf import HFEngine, Sampled
from trainer.rollout import Limits, Player, TemplateError
from trainer.tasks.glyphs import tools
from trainer.tasks.glyphs.demonstrations import Script
from trainer.tasks.glyphs.questions import KINDS, draft
from trainer.tools import Toolbox
from trainer.types import Observation, Session, TrainingError


@pytest.fixture(scope="module")
def player(vlm):
    with Player(vlm, tools.toolbox(failures=0.0, distractions=0.0)) as player:
        yield player


class Scripted:
    """An engine that says what it is told, one text a turn: for what a policy rarely does."""

    def __init__(self, vlm, *turns):
        self.vlm, self.turns = vlm, list(turns)

    def batch_size(self, max_tokens):
        return 256

    def open(self):
        return contextlib.nullcontext(self)

    def turn(self, keys, sequences, seeds, max_new_tokens):
        text, stop = self.turns.pop(0)
        ids = self.vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [Sampled(ids, [-0.5] * len(ids), stop) for _ in sequences]


def _question(kind="product_hard", index=0):
    return draft("heldout", index, kind).question


def _call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>", "call"


ANSWER = ("<reason>so</reason>\n<answer>12</answer>", "answer")


def test_the_prompt_of_the_demo_is_short(vlm, player):
    """A system prompt that the tokenizer has not seen falls apart into bytes: then the base model
    has to be made again."""
    rollout = player._begin(_question(), 0)
    assert rollout.prompt_length < 64
    assert rollout.ids.count(vlm.image_token_id) == 16


def test_sampled_ids_are_kept_and_only_the_template_is_added(vlm, player):
    engine = Scripted(vlm, _call("python", code="6 * 2"), ANSWER)
    (rollout,) = player.play(engine, [_question()], [0])
    written = [i for i, mine in zip(rollout.ids, rollout.policy, strict=True) if mine]
    expected = []
    for text in (_call("python", code="6 * 2")[0], ANSWER[0]):
        expected += vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert written == expected
    whole = vlm.tokenizer.decode(rollout.ids)
    assert (
        "</tool_call><|im_end|>\n<|im_start|>user\n12<|im_end|>\n<|im_start|>assistant\n" in whole
    )
    given = [lp for lp, mine in zip(rollout.logprob, rollout.policy, strict=True) if not mine]
    assert set(given) == {0.0}
    assert (rollout.calls, rollout.status, rollout.answer) == (1, "ok", "12")


def test_an_image_that_a_tool_shows_is_seen_and_can_be_used(vlm, player):
    engine = Scripted(
        vlm,
        _call("python", code="image_1.crop((0, 0, 32, 32))"),
        _call("python", code="image_2.size"),
        ANSWER,
    )
    (rollout,) = player.play(engine, [_question("glyph_small")], [0])
    assert [image.size for image in rollout.images] == [(128, 128), (32, 32)]
    assert rollout.ids.count(vlm.image_token_id) == 32
    assert rollout.turns[1].observation.text == "(32, 32)"
    vlm.collate([(rollout.ids, rollout.images)])  # asserts that placeholders and images agree


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<tool_call>{broken</tool_call>", "Error"),
        ('<tool_call>{"name": "shell", "arguments": {}}</tool_call>', "no tool"),
        ('<tool_call>{"name": "python", "arguments": {"code": 3}}</tool_call>', "code"),
        ("no opening tag</tool_call>", "Error"),
    ],
)
def test_a_malformed_call_is_an_observation_and_counts(vlm, player, text, says):
    engine = Scripted(vlm, (text, "call"), ANSWER)
    (rollout,) = player.play(engine, [_question()], [0])
    assert rollout.turns[0].call is None
    assert says in rollout.turns[0].observation.text
    assert (rollout.calls, rollout.status) == (1, "ok")


def test_infrastructure_that_fails_leaves_the_rollout_unscored(vlm):
    class Broken(tools.Unreliable):
        async def call(self, session, **arguments):
            return Observation("down", status="infra_error")

    box = tools.toolbox()
    box._tools["python"] = Broken(box.tools[0])
    with Player(vlm, box) as player:
        engine = Scripted(vlm, _call("python", code="1"))
        (rollout,) = player.play(engine, [_question()], [0])
    assert rollout.status == "tool_infra" and not rollout.scored


class Ledger:
    """A tool that keeps account of sessions: which called it, and which were ended how often."""

    name = "python"

    def __init__(self, failure=None):
        self.failure = failure
        self.called, self.ended = [], []

    async def call(self, session: Session, code: str) -> Observation:
        """Run it."""
        self.called.append(session.id)
        number = len(self.called)
        await asyncio.sleep(0.001 * number)
        if number == 2 and self.failure is not None:
            raise self.failure
        return Observation("1")

    async def end(self, session):
        await asyncio.sleep(0.001)
        self.ended.append(session.id)


def _ledger(failure=None):
    ledger = Ledger(failure)
    return ledger, Toolbox([ledger])


def test_every_session_is_ended_once_when_its_trajectory_is_over(vlm):
    ledger, box = _ledger()
    call = _call("python", code="1")
    with Player(vlm, box, Limits(max_tokens=4096)) as player:
        engine = Scripted(vlm, call, ANSWER)
        player.play(engine, [_question()] * 3, [0, 1, 2])
        assert len(set(ledger.ended)) == 3 and sorted(ledger.called) == sorted(ledger.ended)
        player.play(Scripted(vlm, ANSWER), [_question()], [0])
        player.play(Scripted(vlm, *[call] * 4), [_question()], [0])
        drafts = [draft("train", n, "sum_easy") for n in range(2)]
        scripts = [Script(one, np.random.default_rng(0)) for one in drafts]
        player.demonstrate([one.question for one in drafts], scripts)
        assert len(set(ledger.ended)) == len(ledger.ended) == 7


def test_a_session_is_ended_as_soon_as_its_own_trajectory_is_over(vlm):
    ledger, box = _ledger()
    open_while_playing = []

    class Uneven(Scripted):
        def turn(self, keys, sequences, seeds, max_new_tokens):
            open_while_playing.append((len(keys), len(ledger.ended)))
            text, stop = _call("python", code="1")
            done = self.vlm.tokenizer(ANSWER[0], add_special_tokens=False)["input_ids"]
            ids = self.vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
            first = Sampled(done, [0.0] * len(done), "answer")
            return [first, *[Sampled(ids, [0.0] * len(ids), stop)] * (len(keys) - 1)]

    with Player(vlm, box, Limits(max_turns=3, max_tokens=4096)) as player:
        player.play(Uneven(vlm), [_question()] * 3, [0, 1, 2])
    assert open_while_playing == [(3, 0), (2, 1), (1, 2)]
    assert len(ledger.ended) == 3


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemError, None])
def test_sessions_are_ended_when_playing_breaks_off(vlm, failure, monkeypatch):
    ledger, box = _ledger()
    call = _call("python", code="1")
    with Player(vlm, box, Limits(max_tokens=4096)) as player:
        if failure is None:  # asked to stop between turns
            polled = iter([False, True])
            with pytest.raises(KeyboardInterrupt):
                player.play(
                    Scripted(vlm, call, call),
                    [_question()] * 2,
                    [0, 1],
                    stopping=lambda: next(polled),
                )
        else:
            engine = Scripted(vlm, call, call)
            turn = engine.turn

            def breaks(*arguments):
                if len(engine.turns) == 1:
                    raise failure
                return turn(*arguments)

            monkeypatch.setattr(engine, "turn", breaks)
            with pytest.raises(failure):
                player.play(engine, [_question()] * 2, [0, 1])
        assert len(ledger.called) == 2 and sorted(ledger.ended) == sorted(ledger.called)


def test_an_interrupt_in_the_middle_of_a_call_ends_all_and_leaves_no_call(vlm):
    ledger, box = _ledger(KeyboardInterrupt())
    call = _call("python", code="1")
    with Player(vlm, box, Limits(max_tokens=4096)) as player:
        with pytest.raises(KeyboardInterrupt):
            player.play(Scripted(vlm, call), [_question()] * 4, range(4))
        assert not player._loop.running()
        assert len(set(ledger.ended)) == len(ledger.ended) == 4
        (after,) = player.play(Scripted(vlm, call, ANSWER), [_question()], [0])
        assert after.status == "ok" and len(ledger.ended) == 5


def test_a_script_that_breaks_ends_the_sessions(vlm):
    class Breaks:
        def next_turn(self, observation):
            if observation is not None:
                raise ZeroDivisionError
            return [(_call("python", code="1")[0], True)]

    ledger, box = _ledger()
    with Player(vlm, box, Limits(max_tokens=4096)) as player:
        with pytest.raises(ZeroDivisionError):
            player.demonstrate([_question()] * 2, [Breaks(), Breaks()])
        assert len(set(ledger.ended)) == len(ledger.ended) == 2


def test_a_player_without_tools_has_nothing_to_end(vlm):
    with Player(vlm, None) as player:
        (rollout,) = player.play(Scripted(vlm, ANSWER), [_question()], [0])
        (called,) = player.play(Scripted(vlm, _call("python", code="1")), [_question()], [0])
    assert (rollout.status, called.status, called.calls) == ("ok", "truncated", 1)


def test_nothing_of_the_demo_is_escaped(vlm, player):
    """Its prompts, schemas and observations are encoded as they are written."""
    assert player._escaped(player.toolbox.schemas()) == player.toolbox.schemas()
    for kind in KINDS:
        question = _question(kind)
        assert player._escaped(question.text) == question.text
        script = Script(draft("heldout", 0, kind), np.random.default_rng(0))
        (rollout,) = player.demonstrate([question], [script])
        said = rollout.turns[0].observation.text
        assert player._escaped(said) == said


def test_limits_truncate(vlm, player):
    call = _call("python", code="1")
    player.limits, before = Limits(max_turns=2), player.limits
    try:
        (many,) = player.play(Scripted(vlm, call, call), [_question()], [0])
        player.limits = Limits(max_tokens=70)
        show = _call("python", code="image_1")
        (long,) = player.play(Scripted(vlm, show), [_question("glyph_small")], [0])
    finally:
        player.limits = before
    (endless,) = player.play(Scripted(vlm, ("<reason>and", "length")), [_question()], [0])
    assert [r.status for r in (many, long, endless)] == ["truncated"] * 3
    assert many.calls == 2, "a call that was asked for counts, executed or not"
    assert long.ids.count(vlm.image_token_id) == 16 == 16 * len(long.images)


def test_the_policy_cannot_forge_a_prompt(vlm):
    engine = HFEngine(vlm)
    for token in ("<|im_start|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>"):
        assert vlm.tokenizer.convert_tokens_to_ids(token) in engine.forbidden
    for token in ("<|im_end|>", "<tool_call>", "</tool_call>"):
        assert vlm.tokenizer.convert_tokens_to_ids(token) not in engine.forbidden


def test_a_template_that_rewrites_history_is_refused(vlm, player, monkeypatch):
    render = player._render

    def forgetful(messages):
        text = render(messages)
        return text.replace("emblem", "") if len(messages) > 2 else text

    monkeypatch.setattr(player, "_render", forgetful)
    engine = Scripted(vlm, _call("python", code="1"))
    with pytest.raises(TemplateError, match="only appends"):
        player.play(engine, [_question("emblem")], [0])


def test_a_trajectory_is_a_function_of_its_seed_not_of_its_batch(vlm, player):
    engine = HFEngine(vlm, temperature=1.0)
    questions = [_question(kind, 1) for kind in KINDS] * 2
    seeds = list(range(len(questions)))
    together = player.play(engine, questions, seeds)
    backwards = player.play(engine, questions[::-1], seeds[::-1])[::-1]
    alone = [player.play(engine, [q], [s])[0] for q, s in zip(questions, seeds, strict=True)]
    assert [r.ids for r in together] == [r.ids for r in backwards] == [r.ids for r in alone]
    other = player.play(engine, questions, [seed + 100 for seed in seeds])
    assert [r.ids for r in together] != [r.ids for r in other]


def test_more_questions_than_a_batch_are_played_in_parts(vlm, player):
    questions = [_question(kind, 1) for kind in KINDS]
    whole = player.play(HFEngine(vlm), questions, range(len(questions)))
    parts = player.play(HFEngine(vlm, max_batch=3), questions, range(len(questions)))
    assert [r.ids for r in parts] == [r.ids for r in whole]
    assert [r.question.id for r in parts] == [q.id for q in questions]


def test_sampling_follows_the_distribution(vlm):
    """The inverse CDF: over many uniforms, the first token's frequencies are its probabilities."""
    engine = HFEngine(vlm, temperature=1.0)
    ids = vlm.encode("<|im_start|>assistant\n<reason>It may be ")
    count = 512
    sampled = engine.generate([(ids, [])] * count, [(n, 0) for n in range(count)], 1)
    with torch.no_grad():
        logits = vlm.model(**vlm.collate([(ids, [])])).logits[0, -1].float()
    logits[engine.forbidden] = -torch.inf
    probability = torch.softmax(logits, -1)
    frequency = np.bincount([s.ids[0] for s in sampled], minlength=len(probability)) / count
    assert np.abs(frequency - probability.numpy()).max() < 0.08
    for one in sampled[:20]:
        assert one.logprob[0] == pytest.approx(probability[one.ids[0]].log().item(), abs=1e-3)


def test_the_sampled_logprobs_are_those_of_the_training_path(vlm, player):
    from metis_kernels import linear_logprobs

    rollouts = player.play(HFEngine(vlm), [_question(kind, 2) for kind in KINDS], range(8))
    compared = 0
    for rollout in rollouts:
        inputs = vlm.collate([(rollout.ids, rollout.images)])
        row = torch.tensor(rollout.policy).nonzero()[:, 0] - 1
        label = torch.tensor(rollout.ids)[row + 1]
        with torch.no_grad():
            hidden = vlm.model.model(**inputs, use_cache=False).last_hidden_state[0]
            logprob, _ = linear_logprobs(hidden, vlm.head, label, row)
        sampled = torch.tensor(rollout.logprob)[row + 1]
        assert (sampled - logprob).abs().max() < 1e-4
        compared += len(row)
    assert compared > 30


def test_demonstrations_train_on_what_the_script_wrote(vlm, player):
    drafts = [draft("train", n, kind) for n, kind in enumerate(KINDS)]
    scripts = [Script(one, np.random.default_rng(n)) for n, one in enumerate(drafts)]
    rollouts = player.demonstrate([one.question for one in drafts], scripts)
    for rollout in rollouts:
        assert rollout.correct and rollout.formatted and rollout.calls == 1
        written = [i for i, mine in zip(rollout.ids, rollout.policy, strict=True) if mine]
        text = vlm.tokenizer.decode(written)
        assert text.startswith("<reason>") and text.endswith("</answer>")
        if rollout.question.kind == "glyph_medium":
            assert text.startswith("<reason>It may be ")


def test_text_and_images_must_agree(vlm):
    with pytest.raises(ValueError, match="1 image placeholders but 0 images"):
        vlm.encode("<|vision_start|><|image_pad|><|vision_end|>")


@pytest.mark.parametrize("room", [3, 17])
def test_no_trajectory_is_longer_than_it_may_be(vlm, room):
    """Not by a turn either: what is packed must fit."""
    question = _question()
    with Player(vlm, None) as player:
        prompt = player.play(HFEngine(vlm), [question], [0])[0].prompt_length
    limits = Limits(max_new_tokens=32, max_tokens=prompt + room)
    with Player(vlm, None, limits) as player:
        rollouts = player.play(HFEngine(vlm, temperature=3.0), [question] * 8, range(8))
    assert all(len(rollout.ids) <= prompt + room for rollout in rollouts)
    full = [rollout for rollout in rollouts if len(rollout.ids) == prompt + room]
    assert full and any(rollout.status == "truncated" for rollout in full)


def test_a_question_that_leaves_no_room_is_refused(vlm):
    with (
        Player(vlm, None, Limits(max_tokens=16)) as player,
        pytest.raises(TrainingError, match="may have 16: raise rollout.max_tokens"),
    ):
        player.play(HFEngine(vlm), [_question()], [0])
