"""Questions played with tools allowed, forbidden and forced."""

import contextlib
import json

import pytest
import torch

from trainer.agents import LocalAgent
from trainer.chat import ANSWER_OPEN, CALL_OPEN, first_action
from trainer.engines.hf import HFEngine, Sampled
from trainer.rollout import Limits, Player
from trainer.tasks.glyphs import tools
from trainer.tasks.glyphs.questions import draft

CALL = (
    '<reason>hm</reason>\n<tool_call>{"name": "python", "arguments": {"code": "6 * 2"}}</tool_call>'
)
ANSWER = "<reason>so</reason>\n<answer>12</answer>"


@pytest.fixture(scope="module")
def player(vlm):
    with Player(vlm, tools.toolbox(0.0, 0.0), Limits(max_new_tokens=48)) as player:
        yield player


class Scripted:
    """Says one text a turn, the same to all; text behind an opening comes from `behind`."""

    def __init__(self, vlm, *turns, behind=()):
        self.vlm, self.turns, self.behind = vlm, list(turns), list(behind)

    def batch_size(self, max_tokens):
        return 256

    def open(self):
        return contextlib.nullcontext(self)

    def turn(self, keys, sequences, seeds, max_new_tokens, openings=None):
        if openings:
            self.asked = [self.vlm.tokenizer.decode(ids) for ids in openings]
            self.context = [self.vlm.tokenizer.decode(ids) for ids, _ in sequences]
            told = [
                self._sampled(text, ids) for text, ids in zip(self.behind, openings, strict=True)
            ]
            return told
        text = self.turns.pop(0)
        return [self._sampled(text) for _ in sequences]

    def _sampled(self, text, opening=()):
        ids = [*opening, *self.vlm.encode(text)]
        logprob = [-0.25] * len(opening) + [-0.5] * (len(ids) - len(opening))
        stop = "call" if text.endswith("</tool_call>") else "answer"
        return Sampled(ids, logprob, stop, range(len(opening)))


def _question(kind="product_hard", index=0):
    return draft("heldout", index, kind).question


@pytest.mark.parametrize(
    ("turn", "action"),
    [
        (CALL, ("call", CALL.index(CALL_OPEN))),
        (ANSWER, ("answer", ANSWER.index(ANSWER_OPEN))),
        ("<reason>use <tool_call>?</reason>\n<answer>1</answer>", ("answer", 34)),
        ("<answer>1</answer><tool_call>{}</tool_call>", ("answer", 0)),
        ("<tool_call>{}", ("call", 0)),
        ("<reason>nothing</reason>", None),
        ("", None),
    ],
)
def test_the_first_action_of_a_turn(turn, action):
    assert first_action(turn) == action


def test_an_answer_becomes_a_call_where_one_is_forced(vlm, player):
    rest = CALL.partition(CALL_OPEN)[2]
    engine = Scripted(vlm, ANSWER, ANSWER, behind=[rest])
    (rollout,) = player.play(engine, [_question()], [0], modes=["forced"])
    assert engine.asked == [CALL_OPEN]
    assert engine.context[0].endswith("<reason>so</reason>\n")
    assert rollout.turns[0].text == "<reason>so</reason>\n" + CALL_OPEN + rest
    assert rollout.turns[0].observation.text == "12"
    assert (rollout.calls, rollout.answer, rollout.mode) == (1, "12", "forced")
    opened = [n for n, logprob in enumerate(rollout.logprob) if logprob == -0.25]
    assert [vlm.tokenizer.decode(rollout.ids[n]) for n in opened] == [CALL_OPEN]
    assert rollout.policy[opened[0]] and rollout.forced == -0.25  # and it is learned from
    assert rollout.formatted


def test_a_call_becomes_an_answer_where_calls_are_forbidden(vlm, player):
    engine = Scripted(vlm, CALL, behind=["13</answer>"])
    (rollout,) = player.play(engine, [_question()], [0], modes=["forbidden"])
    assert engine.asked == [ANSWER_OPEN]
    assert rollout.turns[0].text == "<reason>hm</reason>\n<answer>13</answer>"
    assert (rollout.calls, rollout.answer, rollout.status) == (0, "13", "ok")
    assert rollout.sampled_tokens == sum(rollout.policy)
    assert rollout.sampled_tokens + rollout.prompt_tokens == len(rollout.ids)


def test_a_call_within_a_begun_answer_is_not_executed(vlm, player):
    engine = Scripted(vlm, CALL, behind=['13"}}</tool_call>'])
    (rollout,) = player.play(engine, [_question()], [0], modes=["forbidden"])
    assert (rollout.status, rollout.calls, len(rollout.turns)) == ("truncated", 1, 1)
    assert rollout.turns[0].observation is None


@pytest.mark.parametrize(
    ("mode", "turns"),
    [("forbidden", (ANSWER,)), ("forced", (CALL, ANSWER)), ("allowed", (CALL, ANSWER))],
)
def test_what_the_policy_does_by_itself_is_left_alone(vlm, player, mode, turns):
    engine = Scripted(vlm, *turns)
    (rollout,) = player.play(engine, [_question()], [0], modes=[mode])
    assert rollout.forced is None and len(rollout.turns) == len(turns)
    assert rollout.policy[rollout.prompt_length]


def test_an_action_in_the_middle_of_a_token_is_cut_there(vlm, player):
    """Tokenizers for which <answer> is no token of its own: what lies between is written again."""
    ids = vlm.encode("<reason>so</reason>\n<answer>1")
    at = len("<reason>so</rea")
    cut, between = player._cut(Sampled(ids, [0.0] * len(ids), "answer"), at)
    assert vlm.tokenizer.decode(cut.ids) + between == "<reason>so</reason>\n<answer>1"[:at]


def test_a_turn_stays_within_its_limit(vlm):
    rest = CALL.partition(CALL_OPEN)[2] + " " * 200
    with Player(vlm, tools.toolbox(0.0, 0.0), Limits(max_new_tokens=12)) as player:
        engine = Scripted(vlm, ANSWER, behind=[rest])
        (rollout,) = player.play(engine, [_question()], [0], modes=["forced"])
    assert rollout.status == "truncated"
    assert len(rollout.ids) - rollout.prompt_length == 12


def test_the_engine_tells_how_likely_what_it_was_forced_to_was(vlm):
    """Against a forward over the whole sequence; rows without an opening are not touched."""
    engine = HFEngine(vlm, temperature=0.7)
    with Player(vlm, tools.toolbox(0.0, 0.0)) as player:
        rollouts = [player._begin(_question(index=n), 0) for n in range(3)]
    sequences = [(r.ids, r.images) for r in rollouts]
    opening = vlm.encode("<reason>It is")
    seeds = [(n,) for n in range(3)]
    with engine.open() as generation:
        free = generation.turn(range(3), sequences, seeds, 12)
    with engine.open() as generation:
        told = generation.turn(range(3), sequences, seeds, 12, [[], opening, []])
    assert told[0] == free[0] and told[2].ids == free[2].ids
    assert told[1].ids[: len(opening)] == opening and told[1].forced == range(len(opening))
    ids = sequences[1][0] + told[1].ids
    inputs = vlm.collate([(ids, sequences[1][1])])
    with torch.no_grad():
        logits = vlm.model(**inputs).logits[0].float()
    logits[:, engine.forbidden] = -torch.inf
    logprob = torch.log_softmax(logits / 0.7, -1)
    start = len(sequences[1][0])
    expected = [float(logprob[start - 1 + n, token]) for n, token in enumerate(told[1].ids)]
    assert told[1].logprob == pytest.approx(expected, abs=2e-4)


def test_neighbours_of_a_forced_rollout_are_as_without_it(vlm, player):
    engine = HFEngine(vlm)
    questions = [_question("sum_easy", n) for n in range(6)]
    free = player.play(engine, questions, range(6))
    modes = ["allowed", "forced", "allowed", "forbidden", "forced", "allowed"]
    mixed = player.play(engine, questions, range(6), modes=modes)
    for before, after in zip(free, mixed, strict=True):
        if after.mode == "allowed":
            assert after.ids == before.ids
        elif after.forced is not None:
            assert json.dumps(after.turns[0].text).count(CALL_OPEN) == (after.mode == "forced")
    assert all(r.model_seconds > 0 for r in mixed)


def test_a_player_without_tools_is_asked_for_direct_answers_alone(vlm):
    with Player(vlm, None) as direct, Player(vlm, tools.toolbox()) as player:
        agent = LocalAgent("base", HFEngine(vlm), player, direct)
        (rollout,) = agent.play([_question("sum_easy")], [0], mode="direct")
        assert rollout.mode == "direct" and rollout.calls == 0
        with pytest.raises(ValueError, match="no tools cannot play the mode 'forced'"):
            direct.play(agent.engine, [_question()], [0], modes=["forced"])
        with pytest.raises(ValueError, match="tools cannot play the mode 'direct'"):
            player.play(agent.engine, [_question()], [0], modes=["direct"])
