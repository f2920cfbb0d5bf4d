"""Trajectories: the policy's turns and the tools' observations, token in, token out.

A sampled id is kept as it was sampled and never tokenized again. After a turn only what the chat
template adds (end of turn, the observation as a user message, start of the next turn) is appended;
that the template's rendering of n + 1 messages begins with that of n is asserted every time. The
loss mask grows together with the ids.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.chat import (
    ANSWER_OPEN,
    CALL_OPEN,
    SpecialTokens,
    attempts_call,
    first_action,
    system_prompt,
)
from trainer.engines.hf import HFEngine, Sampled
from trainer.grade import Grader
from trainer.interrupt import never
from trainer.loop import Loop, every
from trainer.model import VisionLanguageModel
from trainer.reward import grade, score
from trainer.tools import Toolbox
from trainer.types import Mode, Observation, Question, Rollout, Session, TrainingError, Turn

TAGS = {"answer": ANSWER_OPEN, "call": CALL_OPEN}
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


@dataclass(frozen=True)
class Recorded:
    """A trajectory as it was recorded: nothing is run. It ends at the first turn that nothing came
    back on."""

    turns: Sequence[Turn]


class Player:
    """Plays questions with one toolbox and one model's chat format.

    Text from outside (questions, what tools say of themselves, observations) cannot be tokenized to
    a special token: see SpecialTokens. The session of a trajectory is ended when the trajectory is
    over, once, whatever ends it.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        toolbox: Toolbox | None,
        limits: Limits | None = None,
        grader: Grader | None = None,
    ):
        """toolbox: None is a policy without tools, which is told to answer directly. grader: None
        is the task's own rule (`reward.matches`)."""
        self.vlm = vlm
        self.grader = grader
        self.toolbox = toolbox
        self.limits = limits or Limits()
        self._special = SpecialTokens(vlm.tokenizer)
        self.system = system_prompt(self._escaped(toolbox.schemas()) if toolbox else ())
        self._loop = Loop()

    def close(self) -> None:
        try:
            if self.toolbox is not None:
                self._loop.run(self.toolbox.close())
        finally:
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
        modes: Sequence[Mode] | None = None,
        stopping: Callable[[], bool] = never,
    ) -> list[Rollout]:
        """One scored rollout a question. modes: how each is played (None: all "allowed").
        `stopping` is polled between turns; once it is true, KeyboardInterrupt is raised, for a
        half-played batch is of no use.

        Raises ValueError for a mode that this player's tools, or its lack of them, rule out.
        """
        modes = list(modes) if modes is not None else ["allowed"] * len(questions)
        impossible = {"forbidden", "forced"} if self.toolbox is None else {"direct"}
        if wrong := impossible & set(modes):
            having = "no tools" if self.toolbox is None else "tools"
            raise ValueError(f"a player with {having} cannot play the mode {min(wrong)!r}")
        # A trajectory's KV is held until it ends, so a part is played to its end before the next.
        size = engine.batch_size(self.limits.max_tokens)
        rollouts: list[Rollout] = []
        for start in range(0, len(questions), size):
            part = slice(start, start + size)
            rollouts += self._play(engine, questions[part], seeds[part], modes[part], stopping)
        return rollouts

    def _play(
        self,
        engine: HFEngine,
        questions: Sequence[Question],
        seeds: Sequence[int],
        modes: Sequence[Mode],
        stopping: Callable[[], bool],
    ) -> list[Rollout]:
        rollouts = [self._begin(q, seed) for q, seed in zip(questions, seeds, strict=True)]
        for rollout, mode in zip(rollouts, modes, strict=True):
            rollout.mode = mode
        active = list(range(len(rollouts)))
        redirected: set[int] = set()
        with self._sessions(rollouts) as sessions, engine.open() as generation:
            for number in range(self.limits.max_turns):
                if stopping():
                    raise KeyboardInterrupt
                if not active:
                    break
                start = time.perf_counter()
                turns = generation.turn(
                    # What was redirected does not go on from what the engine knows of it.
                    [i + len(rollouts) * (i in redirected) for i in active],
                    [(rollouts[i].ids, rollouts[i].images) for i in active],
                    [(rollouts[i].seed, number) for i in active],
                    min(self.limits.max_new_tokens, max(self._room(rollouts[i]) for i in active)),
                )
                if number == 0:
                    redirected = self._redirect(engine, rollouts, turns)
                _share_time([rollouts[i] for i in active], turns, time.perf_counter() - start)
                last = number == self.limits.max_turns - 1
                calls = []
                for i, sampled in zip(active, turns, strict=True):
                    if self._take(rollouts[i], sampled, last=last):
                        calls.append(i)
                active = self._execute(calls, rollouts, sessions)
        for rollout in rollouts:
            rollout.sampled_tokens = sum(rollout.policy)
            rollout.prompt_tokens = len(rollout.ids) - rollout.sampled_tokens
            score(rollout)
        if self.grader is not None:
            self._loop.run(grade(rollouts, self.grader))
        return rollouts

    def _redirect(
        self, engine: HFEngine, rollouts: Sequence[Rollout], turns: list[Sampled]
    ) -> set[int]:
        """Where a first turn does not do what the rollout's mode asks for, it is cut behind its
        reason, the wanted action is opened, and the policy goes on from there. Replaces such turns
        in place -> the numbers of their rollouts. A turn that does nothing at all stays."""
        wanted = {"forbidden": "answer", "forced": "call"}
        cuts: dict[int, Sampled] = {}
        openings: list[list[int]] = []
        if wanted.keys().isdisjoint(rollout.mode for rollout in rollouts):
            return set()
        for i, (rollout, sampled) in enumerate(zip(rollouts, turns, strict=True)):
            action = first_action(self.vlm.tokenizer.decode(sampled.ids))
            if action is None:
                continue
            name, at = action
            want = wanted.get(rollout.mode, name)
            if want != name:
                cuts[i], between = self._cut(sampled, at)
                openings.append(self.vlm.encode(between + TAGS[want]))
        if not cuts:
            return set()
        left = [self.limits.max_new_tokens - len(cut.ids) for cut in cuts.values()]
        with engine.open() as generation:
            endings = generation.turn(
                list(cuts),
                [(rollouts[i].ids + cut.ids, rollouts[i].images) for i, cut in cuts.items()],
                [(rollouts[i].seed, 0, 1) for i in cuts],
                max(1, *left),
                openings,
            )
        for (i, cut), ending, room in zip(cuts.items(), endings, left, strict=True):
            turns[i] = _joined(cut, ending, room)
        return set(cuts)

    def _cut(self, sampled: Sampled, at: int) -> tuple[Sampled, str]:
        """The ids that lie wholly before place `at` of a turn's text, and the text between."""
        decode = self.vlm.tokenizer.decode
        text = decode(sampled.ids)
        # Of how many ids the text is longer than `at`: one too many.
        counts = range(len(sampled.ids) + 1)
        count = bisect_right(counts, at, key=lambda n: len(decode(sampled.ids[:n]))) - 1
        while not text.startswith(before := decode(sampled.ids[:count])):  # half a character
            count -= 1
        return Sampled(sampled.ids[:count], sampled.logprob[:count], "length"), text[
            len(before) : at
        ]

    def demonstrate(
        self, questions: Sequence[Question], scripts: Sequence[Script | Recorded]
    ) -> list[Rollout]:
        """Plays scripts against the real tools, and recordings against none -> rollouts whose
        `policy` mask is what to train on. What does not fit into a trajectory is cut and truncated,
        all of it where the question alone does not.

        logprob is 0 everywhere: nothing was sampled.
        """
        rollouts = [self._opened(question, n) for n, question in enumerate(questions)]
        for rollout in rollouts:
            if self._room(rollout) <= 0:
                rollout.status = "truncated"
        last: dict[int, Observation | None] = dict.fromkeys(range(len(rollouts)))
        active = []
        for i, (rollout, script) in enumerate(zip(rollouts, scripts, strict=True)):
            if isinstance(script, Recorded):
                self._recite(rollout, script)
            elif rollout.status == "ok":
                active.append(i)
        with self._sessions(rollouts) as sessions:
            while active:
                calls = []
                for i in active:
                    text = self._say(rollouts[i], scripts[i].next_turn(last[i]))
                    if attempts_call(text) and rollouts[i].status == "ok":
                        calls.append(i)
                active = self._execute(calls, rollouts, sessions)
                for i in active:
                    last[i] = rollouts[i].turns[-1].observation
        for rollout in rollouts:
            score(rollout)
        return rollouts

    def _recite(self, rollout: Rollout, recorded: Recorded) -> None:
        for turn in recorded.turns:
            if rollout.status != "ok":
                return
            self._say(rollout, [(turn.text, True)])
            rollout.calls += attempts_call(turn.text)
            if turn.observation is None or rollout.status != "ok":
                return
            rollout.turns[-1] = turn
            rollout.images += turn.observation.images
            self._tell(rollout, turn.observation)

    def _say(self, rollout: Rollout, pieces: Sequence[tuple[str, bool]]) -> str:
        """Appends a turn of a script, as far as there is room; its text."""
        ids, policy = [], []
        for piece, trained in pieces:
            new = self.vlm.encode(piece)
            ids += new
            policy += [trained] * len(new)
        room = self._room(rollout)
        if len(ids) > room:
            ids, policy = ids[:room], policy[:room]
            rollout.status = "truncated"
        self._append(rollout, ids, policy, [0.0] * len(ids))
        text = "".join(piece for piece, _ in pieces)
        rollout.turns.append(Turn(text))
        return text

    # ---- sessions --------------------------------------------------------------------------------

    @contextmanager
    def _sessions(self, rollouts: Sequence[Rollout]) -> Iterator[dict[int, Session]]:
        """The sessions of trajectories by their number, of those that are not over; what is left of
        them at the end, or at an error, is ended."""
        # One list of images for both: what a tool shows is what the model sees.
        sessions = {i: Session(r.images, seed=r.seed) for i, r in enumerate(rollouts)}
        try:
            yield sessions
        finally:
            self._end(sessions, list(sessions))

    def _end(self, sessions: dict[int, Session], over: Iterable[int]) -> None:
        ending = [sessions.pop(i) for i in over]
        if self.toolbox is not None and ending:
            self._loop.run(every([self.toolbox.end(session) for session in ending]))

    # ---- the conversation ------------------------------------------------------------------------

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self.vlm.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def _opening(self, question: Question) -> list[dict[str, Any]]:
        content = [{"type": "image"} for _ in question.images]
        content.append({"type": "text", "text": self._escaped(question.text)})
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": content},
        ]

    def _begin(self, question: Question, seed: int) -> Rollout:
        rollout = self._opened(question, seed)
        if self._room(rollout) <= 0:
            raise TrainingError(
                f"question {question.id} takes {len(rollout.ids)} tokens with its images, and a "
                f"trajectory may have {self.limits.max_tokens}: raise rollout.max_tokens, or leave "
                "it out"
            )
        return rollout

    def _opened(self, question: Question, seed: int) -> Rollout:
        """A rollout of which only the prompt is there, however long."""
        ids = self.vlm.encode(self._render(self._opening(question)), question.images)
        given = [False] * len(ids)
        return Rollout(
            question, seed, ids, given, [0.0] * len(ids), list(question.images), len(ids)
        )

    def _room(self, rollout: Rollout) -> int:
        """Tokens that a trajectory may still have."""
        return self.limits.max_tokens - len(rollout.ids)

    def _escaped(self, value: Any) -> Any:
        """A JSON value from outside, of whose strings none holds a special token."""
        if isinstance(value, str):
            return self._special.escape(value)
        if isinstance(value, dict):
            return {self._escaped(key): self._escaped(item) for key, item in value.items()}
        return [self._escaped(item) for item in value] if isinstance(value, list) else value

    def _suffix(self, question: Question, observation: Observation) -> str:
        """What the template puts between the policy's turn and its next one."""
        said = self._escaped(observation.text)
        content = [{"type": "text", "text": said}] if said else []
        content += [{"type": "image"} for _ in observation.images]
        opening = self._opening(question)
        text = self._render(
            [
                *opening,
                {"role": "assistant", "content": _SENTINEL},
                {"role": "user", "content": content},
            ]
        )
        before = self._render(opening) + _SENTINEL
        if not text.startswith(before):
            raise TemplateError(
                "the chat template changes earlier messages when later ones are added; tokens "
                "cannot be kept as sampled. Use a template that only appends."
            )
        return text[len(before) :]

    @staticmethod
    def _append(
        rollout: Rollout, ids: Sequence[int], policy: Sequence[bool], logprob: Sequence[float]
    ) -> None:
        rollout.ids.extend(ids)
        rollout.policy.extend(policy)
        rollout.logprob.extend(logprob)
        assert len(rollout.ids) == len(rollout.policy) == len(rollout.logprob)

    def _take(self, rollout: Rollout, sampled: Sampled, *, last: bool) -> bool:
        """Appends a sampled turn, as far as there is room; true where a call is to be executed."""
        room = self._room(rollout)
        if len(sampled.ids) > room:
            sampled = Sampled(
                sampled.ids[:room], sampled.logprob[:room], "length", sampled.forced[:room]
            )
        if sampled.forced:
            rollout.forced = sum(sampled.logprob[n] for n in sampled.forced)
        self._append(rollout, sampled.ids, [True] * len(sampled.ids), sampled.logprob)
        ids = sampled.ids[:-1] if sampled.stop == "end" else sampled.ids
        text = self.vlm.tokenizer.decode(ids)
        rollout.turns.append(Turn(text))
        is_call = sampled.stop == "call"
        if self.toolbox is not None and sampled.stop != "length":
            # Also a call that is not closed, whatever ended the turn: errors are not free.
            is_call = is_call or attempts_call(text)
        rollout.calls += is_call
        cannot = last or self.toolbox is None or rollout.mode == "forbidden"
        if sampled.stop == "length" or (is_call and cannot):
            rollout.status = "truncated"
            return False
        return is_call

    def _execute(
        self, calls: Sequence[int], rollouts: Sequence[Rollout], sessions: dict[int, Session]
    ) -> list[int]:
        """Runs the last turn's call of these rollouts at once, and ends the sessions of all that
        are over. Returns which rollouts go on."""
        texts = [rollouts[i].turns[-1].text for i in calls]
        executing = [
            self._timed(rollouts[i], self.toolbox.execute_turn(text, sessions[i]))
            for i, text in zip(calls, texts, strict=True)
        ]
        answers = self._loop.run(every(executing)) if calls else []
        active = [
            i
            for i, answer in zip(calls, answers, strict=True)
            if self._observe(rollouts[i], sessions[i], *answer)
        ]
        self._end(sessions, set(sessions) - set(active))
        return active

    @staticmethod
    async def _timed(rollout: Rollout, execution: Coroutine[Any, Any, Any]) -> Any:
        start = time.perf_counter()
        try:
            return await execution
        finally:
            rollout.tool_seconds += time.perf_counter() - start

    def _observe(self, rollout: Rollout, session: Session, call, observation: Observation) -> bool:
        rollout.turns[-1] = Turn(rollout.turns[-1].text, call, observation)
        rollout.calls = session.calls
        if observation.status == "infra_error":
            rollout.status = "tool_infra"
            return False
        return self._tell(rollout, observation)

    def _tell(self, rollout: Rollout, observation: Observation) -> bool:
        """Appends an observation, whose images the rollout has, and the start of the next turn;
        False where there is no room for it."""
        suffix = self.vlm.encode(self._suffix(rollout.question, observation), observation.images)
        if len(rollout.ids) + len(suffix) >= self.limits.max_tokens:
            del rollout.images[len(rollout.images) - len(observation.images) :]
            rollout.status = "truncated"
            return False
        self._append(rollout, suffix, [False] * len(suffix), [0.0] * len(suffix))
        return True


def _joined(cut: Sampled, ending: Sampled, room: int) -> Sampled:
    """A turn from its beginning and what followed it, of which there is room for so many ids."""
    start = len(cut.ids)
    ids, logprob, stop = ending.ids[:room], ending.logprob[:room], ending.stop
    forced = range(start, start + len(ending.forced[:room]))
    if len(ids) < len(ending.ids):
        stop = "length"
    return Sampled(cut.ids + ids, cut.logprob + logprob, stop, forced)


def _share_time(rollouts: Sequence[Rollout], turns: Sequence[Sampled], seconds: float) -> None:
    tokens = max(sum(len(sampled.ids) for sampled in turns), 1)  # none: nobody wrote anything
    for rollout, sampled in zip(rollouts, turns, strict=True):
        rollout.model_seconds += seconds * len(sampled.ids) / tokens
