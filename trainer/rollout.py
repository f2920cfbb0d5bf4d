"""Trajectories: the policy's turns and the tools' observations, token in, token out.

A sampled id is kept as it was sampled and never tokenized again. After a turn only what the chat
template adds (end of turn, the observation as a user message, start of the next turn) is appended;
that the template's rendering of n + 1 messages begins with that of n is asserted every time. The
loss mask grows together with the ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.chat import CALL_CLOSE, CALL_OPEN, find_call, system_prompt
from trainer.engines.hf import HFEngine, Sampled
from trainer.model import VisionLanguageModel
from trainer.reward import score
from trainer.tools import Toolbox
from trainer.types import Observation, Question, Rollout, Session, Turn

_SENTINEL = "\u241fturn\u241f"


class TemplateError(RuntimeError):
    """The chat template rewrites earlier turns, so sampled tokens cannot be kept."""


@dataclass(frozen=True)
class Limits:
    max_turns: int = 4
    """Turns of the policy; a trajectory that would need more is truncated."""
    max_new_tokens: int = 32
    """Tokens of one turn."""
    max_tokens: int = 1024
    """Tokens of a trajectory, prompt and observations included."""


class Script(Protocol):
    """A scripted policy: see trainer.tasks for one."""

    def next_turn(self, observation: Observation | None) -> list[tuple[str, bool]]:
        """Pieces of the next turn, each with whether it is trained on."""


class Player:
    """Plays questions with one toolbox and one model's chat format."""

    def __init__(
        self,
        vlm: VisionLanguageModel,
        toolbox: Toolbox | None,
        limits: Limits | None = None,
    ):
        """toolbox: None is a policy without tools, which is told to answer directly."""
        self.vlm = vlm
        self.toolbox = toolbox
        self.limits = limits or Limits()
        self.system = system_prompt(toolbox.schemas() if toolbox else ())
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        if self.toolbox is not None:
            self._loop.run_until_complete(self.toolbox.close())
        self._loop.close()

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def play(
        self,
        engine: HFEngine,
        questions: Sequence[Question],
        seeds: Sequence[int],
        *,
        stopping: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        """One scored rollout a question. `stopping` is polled between turns; once it is true,
        KeyboardInterrupt is raised, for a half-played batch is of no use."""
        # A trajectory's KV is held until it ends, so a part is played to its end before the next.
        size = engine.batch_size(self.limits.max_tokens + self.limits.max_new_tokens)
        rollouts: list[Rollout] = []
        for start in range(0, len(questions), size):
            part = slice(start, start + size)
            rollouts += self._play(engine, questions[part], seeds[part], stopping)
        return rollouts

    def _play(
        self,
        engine: HFEngine,
        questions: Sequence[Question],
        seeds: Sequence[int],
        stopping: Callable[[], bool],
    ) -> list[Rollout]:
        rollouts = [self._begin(q, seed) for q, seed in zip(questions, seeds, strict=True)]
        sessions = [self._session(rollout) for rollout in rollouts]
        active = list(range(len(rollouts)))
        with engine.open() as generation:
            for number in range(self.limits.max_turns):
                if stopping():
                    raise KeyboardInterrupt
                if not active:
                    break
                turns = generation.turn(
                    active,
                    [(rollouts[i].ids, rollouts[i].images) for i in active],
                    [(rollouts[i].seed, number) for i in active],
                    self.limits.max_new_tokens,
                )
                last = number == self.limits.max_turns - 1
                calls = []
                for i, sampled in zip(active, turns, strict=True):
                    if self._take(rollouts[i], sampled, last=last):
                        calls.append(i)
                observed = self._execute([(rollouts[i], sessions[i]) for i in calls])
                active = [i for i, goes_on in zip(calls, observed, strict=True) if goes_on]
        for rollout in rollouts:
            score(rollout)
        return rollouts

    def demonstrate(self, questions: Sequence[Question], scripts: Sequence[Script]):
        """Plays scripts against the real tools -> rollouts whose `policy` mask is what to train on.

        logprob is 0 everywhere: nothing was sampled.
        """
        rollouts = [self._begin(question, n) for n, question in enumerate(questions)]
        sessions = [self._session(rollout) for rollout in rollouts]
        last: dict[int, Observation | None] = dict.fromkeys(range(len(rollouts)))
        active = list(range(len(rollouts)))
        while active:
            calls = []
            for i in active:
                rollout, ids, policy = rollouts[i], [], []
                pieces = scripts[i].next_turn(last[i])
                for text, trained in pieces:
                    new = self.vlm.encode(text)
                    ids += new
                    policy += [trained] * len(new)
                text = "".join(piece for piece, _ in pieces)
                stop = "call" if find_call(text) is not None else "answer"
                self._append(rollout, ids, policy, [0.0] * len(ids))
                rollout.turns.append(Turn(text))
                if stop == "call":
                    calls.append(i)
            observed = self._execute([(rollouts[i], sessions[i]) for i in calls])
            active = [i for i, goes_on in zip(calls, observed, strict=True) if goes_on]
            for i in active:
                last[i] = rollouts[i].turns[-1].observation
        for rollout in rollouts:
            score(rollout)
        return rollouts

    # ---- the conversation ------------------------------------------------------------------------

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self.vlm.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def _opening(self, question: Question) -> list[dict[str, Any]]:
        content = [{"type": "image"} for _ in question.images]
        content.append({"type": "text", "text": question.text})
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": content},
        ]

    def _begin(self, question: Question, seed: int) -> Rollout:
        ids = self.vlm.encode(self._render(self._opening(question)), question.images)
        given = [False] * len(ids)
        return Rollout(
            question, seed, ids, given, [0.0] * len(ids), list(question.images), len(ids)
        )

    def _session(self, rollout: Rollout) -> Session:
        # One list of images for both: what a tool shows is what the model sees.
        return Session(rollout.images, seed=rollout.seed)

    def _suffix(self, question: Question, observation: Observation) -> str:
        """What the template puts between the policy's turn and its next one."""
        content = [{"type": "text", "text": observation.text}] if observation.text else []
        content += [{"type": "image"} for _ in observation.images]
        opening = self._opening(question)
        text = self._render(
            [
                *opening,
                {"role": "assistant", "content": _SENTINEL},
                {"role": "user", "content": content},
            ]
        )
        before, found, after = text.partition(_SENTINEL)
        if not found or before != self._render(opening):
            raise TemplateError(
                "the chat template changes earlier messages when later ones are added; tokens "
                "cannot be kept as sampled. Use a template that only appends."
            )
        return after

    @staticmethod
    def _append(
        rollout: Rollout, ids: Sequence[int], policy: Sequence[bool], logprob: Sequence[float]
    ) -> None:
        rollout.ids.extend(ids)
        rollout.policy.extend(policy)
        rollout.logprob.extend(logprob)
        assert len(rollout.ids) == len(rollout.policy) == len(rollout.logprob)

    def _take(self, rollout: Rollout, sampled: Sampled, *, last: bool) -> bool:
        """Appends a sampled turn; true where a call is to be executed."""
        self._append(rollout, sampled.ids, [True] * len(sampled.ids), sampled.logprob)
        ids = sampled.ids[:-1] if sampled.stop == "end" else sampled.ids
        text = self.vlm.tokenizer.decode(ids)
        rollout.turns.append(Turn(text))
        is_call = sampled.stop == "call"
        rollout.calls += is_call
        if sampled.stop == "length" or (is_call and (last or self.toolbox is None)):
            rollout.status = "truncated"
            return False
        return is_call

    def _execute(self, calls: Sequence[tuple[Rollout, Session]]) -> list[bool]:
        """Runs the last turn's call of every rollout at once; false where a rollout ends by it."""
        if not calls:
            return []

        async def every():
            return await asyncio.gather(
                *(self.toolbox.execute(_call_of(r.turns[-1].text), s) for r, s in calls)
            )

        return [
            self._observe(rollout, session, *answer)
            for (rollout, session), answer in zip(
                calls, self._loop.run_until_complete(every()), strict=True
            )
        ]

    def _observe(self, rollout: Rollout, session: Session, call, observation: Observation) -> bool:
        rollout.turns[-1] = Turn(rollout.turns[-1].text, call, observation)
        rollout.calls = session.calls
        if observation.status == "infra_error":
            rollout.status = "tool_infra"
            return False
        suffix = self.vlm.encode(self._suffix(rollout.question, observation), observation.images)
        if len(rollout.ids) + len(suffix) >= self.limits.max_tokens:
            del rollout.images[len(rollout.images) - len(observation.images) :]
            rollout.status = "truncated"
            return False
        self._append(rollout, suffix, [False] * len(suffix), [0.0] * len(suffix))
        return True


def _call_of(text: str) -> str:
    """What the policy put into its call; text without an opening tag is a malformed call."""
    inside = find_call(text)
    return inside if inside is not None else text.replace(CALL_OPEN, "").replace(CALL_CLOSE, "")
