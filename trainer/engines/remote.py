"""A model behind an OpenAI-compatible server plays questions: the protocol as text.

The same turns, tools, limits and scores as in process; only tokens and their logprobs are not
known here. What the server cannot give leaves a rollout *unscored*, with the reason counted: never
wrong, never 0.

What the server must not be told to do: parse tool calls or reasoning by itself (vLLM's
--tool-call-parser works on requests with `tools`, which these have not; its --reasoning-parser
would take text away).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from PIL.Image import Image

from trainer.chat import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    CALL_CLOSE,
    CALL_OPEN,
    attempts_call,
    first_action,
    system_prompt,
)
from trainer.config import ConfigError
from trainer.grade import Grader
from trainer.images import png_uri
from trainer.interrupt import never
from trainer.loop import Loop, all_done
from trainer.openai_client import Completion, EndpointError, OpenAIClient, RequestRejected
from trainer.reward import grade, score
from trainer.rollout import Limits
from trainer.tools import Toolbox, neutralise
from trainer.types import Mode, Observation, Question, Rollout, Session, TrainingError, Turn

log = logging.getLogger(__name__)

Forcing = Literal["prefill", "prompt"]

STOPS = {CALL_CLOSE: "call", ANSWER_CLOSE: "answer"}
"""What ends a turn, as in process -> how it ended."""
WANTED = {"forbidden": "answer", "forced": "call"}
OPENINGS = {"answer": ANSWER_OPEN, "call": CALL_OPEN}
ASKED = {
    "forbidden": "Answer without calling a tool.",
    "forced": "Call a tool before you answer.",
}
"""What stands behind the question where `forcing` is "prompt"."""
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
"""Fields with which vLLM and SGLang go on with an assistant's message."""
MARKERS = ("<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<bos>", "<eos>",
           "<start_of_turn>", "<end_of_turn>")  # fmt: skip
"""Markup of chat templates that is broken in text from outside, besides <|...|> and the protocol's
own tags. In process the tokenizer says what is special; here it is not known."""


class AgentDown(TrainingError):
    """The server left too many trajectories in a row unscored."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: try again later."""


class RemoteAgent:
    """An Agent (see trainer.agents) that asks a server.

    `rollout.ids`, `policy` and `logprob` stay empty, and `forced` None: a server is not asked for
    logprobs. `sampled_tokens` and `prompt_tokens` are from
    the server's `usage`: what the last turn's prompt held besides what the model wrote before is
    the prompt, so that every token counts once, although each turn sends the earlier ones again;
    both are 0 where a server does not count. `model_seconds` is the requests' latency, their
    retries included. Where an action is forced by prefill, the action that was cut away is in no
    count.

    `counts`: trajectories by status, and "unscored <kind of EndpointError>" by reason.
    """

    def __init__(
        self,
        client: OpenAIClient,
        toolbox: Toolbox | None,
        limits: Limits | None = None,
        grader: Grader | None = None,
        *,
        name: str | None = None,
        forcing: Forcing = "prefill",
        temperature: float = 0.0,
        extra: Mapping[str, Any] | None = None,
    ):
        """toolbox: belongs to the agent from now on, which closes it; None: no tools at all.
        grader: None is the task's own rule (`reward.matches`). name: None is the client's model.
        forcing: see AgentConfig. extra: further fields of every request.

        Raises ValueError for a field in extra that the agent fills by itself."""
        taken = sorted({"model", "messages", "max_tokens", "stop", *CONTINUE} & set(extra or {}))
        if taken:
            raise ValueError(f"agent.extra may not hold {', '.join(taken)}: the agent says that")
        self.client, self.toolbox, self.grader = client, toolbox, grader
        self.limits = limits or Limits()
        self.name = name or client.model
        self.batch = client.concurrency
        self.forcing = forcing
        self.temperature = temperature
        self.extra = dict(extra or {})
        self.counts: Counter[str] = Counter()
        schemas = _harmless(toolbox.schemas()) if toolbox is not None else ()
        self._system = {True: system_prompt(schemas), False: system_prompt(())}
        self._loop = Loop()
        self._continues = False
        self._lost = 0
        self._most_lost = max(8, 2 * client.concurrency)
        self._why = ""

    # ---- what an Agent does ----------------------------------------------------------------------

    def play(
        self,
        questions: Sequence[Question],
        seeds: Sequence[int],
        *,
        mode: Mode = "allowed",
        stopping: Callable[[], bool] = never,
    ) -> list[Rollout]:
        """One graded rollout a question. Once `stopping` is true, KeyboardInterrupt is raised.

        Raises ConfigError for a server that refuses what is asked of it (a key, a model, the
        continuation of a message), AgentDown where 2 * concurrency trajectories in a row, and 8 at
        least, came to nothing because of the server, and JudgeDown as the grader does.
        """
        if self.toolbox is None and mode in WANTED:
            raise ValueError(f"an agent without tools cannot play the mode {mode!r}")
        if mode in WANTED and self.forcing == "prefill":
            self.check(mode)
        rollouts = [
            Rollout(question, seed, [], [], [], list(question.images), 0, mode=mode)
            for question, seed in zip(questions, seeds, strict=True)
        ]
        slots = asyncio.Semaphore(self.batch)
        playing = [self._trajectory(rollout, slots) for rollout in rollouts]
        if not self._loop.run(all_done(playing, stopping)):
            raise KeyboardInterrupt
        for rollout in rollouts:
            score(rollout)
        try:
            if self.grader is not None:
                self._loop.run(grade(rollouts, self.grader))
        finally:
            self.counts.update(rollout.status for rollout in rollouts)
        if self._lost >= self._most_lost:
            raise AgentDown(
                f"the server at {self.client.base_url} ({self.client.model}) gave nothing of use "
                f"to {self._lost} trajectories in a row; the last reason: {self._why}. Nothing was "
                "counted as wrong. Start the server, or give it more time or budget"
            )
        return rollouts

    def check(self, mode: Mode = "allowed") -> None:
        """Asks the server for one token; and, for a mode that forces by prefill, whether it goes on
        with an assistant's message. Raises ConfigError, which names the mend."""
        if mode in WANTED and self.forcing == "prefill":
            if not self._continues:
                self._loop.run(self._check_continues())
                self._continues = True
            return
        try:
            self._loop.run(self.client.chat([{"role": "user", "content": "1"}], max_tokens=1))
        except EndpointError as error:
            raise ConfigError(
                f"the agent at {self.client.base_url} ({self.client.model}) does not answer: "
                f"{error}; start it, or mend agent.base_url, agent.model and agent.key_variable"
            ) from None

    def close(self) -> None:
        try:
            self._loop.run(self.client.close())
            if self.toolbox is not None:
                self._loop.run(self.toolbox.close())
        finally:
            self._loop.close()

    def __enter__(self) -> RemoteAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- trajectories ----------------------------------------------------------------------------

    async def _trajectory(self, rollout: Rollout, slots: asyncio.Semaphore) -> None:
        async with slots:
            if self._lost >= self._most_lost:  # nothing is sent any more; `play` says so
                rollout.status = "unscored"
                return
            # One list of images for both: what a tool shows is what the model sees.
            session = Session(rollout.images, seed=rollout.seed)
            try:
                await self._converse(rollout, session)
                if self._lost < self._most_lost:  # else it is down: one that was under way ends
                    self._lost = 0
            except RequestRejected as error:
                if error.status in (401, 403, 404):  # the same for every question
                    raise ConfigError(f"agent: {error}") from None
                self._unscored(rollout, error)
            except EndpointError as error:
                self._unscored(rollout, error)
            finally:
                if self.toolbox is not None:
                    await self.toolbox.end(session)

    def _unscored(self, rollout: Rollout, error: EndpointError) -> None:
        rollout.status = "unscored"
        self.counts[f"unscored {error.kind}"] += 1
        self._lost += 1
        self._why = str(error)[:300]
        if self.counts[f"unscored {error.kind}"] == 1:
            log.warning("question %s is unscored: %s", rollout.question.id, self._why)

    async def _converse(self, rollout: Rollout, session: Session) -> None:
        """Turn by turn to the trajectory's end; as Player plays it."""
        messages = self._opening(rollout.question, rollout.mode)
        knows = self.toolbox is not None and rollout.mode != "direct"
        tools = self.toolbox if knows and rollout.mode != "forbidden" else None
        for number in range(self.limits.max_turns):
            text, stop = await self._turn(rollout, messages, number)
            rollout.turns.append(Turn(text))
            is_call = stop == "call"
            if knows and stop != "length":
                # Also a call that is not closed, whatever ended the turn: errors are not free.
                is_call = is_call or attempts_call(text)
            rollout.calls += is_call
            last = number == self.limits.max_turns - 1
            if stop == "length" or (is_call and (last or tools is None)):
                rollout.status = "truncated"
            if not is_call or rollout.status != "ok":
                return
            start = time.perf_counter()
            call, observation = await tools.execute_turn(text, session)
            rollout.tool_seconds += time.perf_counter() - start
            rollout.turns[-1] = Turn(text, call, observation)
            rollout.calls = session.calls
            if observation.status == "infra_error":
                rollout.status = "tool_infra"
                return
            messages += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": _observed(observation)},
            ]

    async def _turn(
        self, rollout: Rollout, messages: list[dict[str, Any]], number: int
    ) -> tuple[str, str]:
        """The next turn, with the action that the mode wants -> (text, how it ended)."""
        completion = await self._ask(rollout, messages, number, self.limits.max_new_tokens)
        text, stop = _ended(completion)
        wanted = WANTED.get(rollout.mode) if self.forcing == "prefill" and number == 0 else None
        done = wanted and first_action(text)
        if not done or done[0] == wanted:
            self._account(rollout, completion)
            return text, self._within(rollout, stop)
        before = text[: done[1]] + OPENINGS[wanted]
        kept = done[1] / max(len(completion.text), done[1])
        self._account(rollout, completion, kept)
        left = self.limits.max_new_tokens - round(kept * completion.completion_tokens)
        prefix = {"role": "assistant", "content": before}
        completion = await self._ask(rollout, [*messages, prefix], number, max(1, left), **CONTINUE)
        text, stop = _ended(completion, before)
        self._account(rollout, completion)
        return text, self._within(rollout, stop)

    async def _ask(
        self,
        rollout: Rollout,
        messages: list[dict[str, Any]],
        number: int,
        max_tokens: int,
        **fields: Any,
    ) -> Completion:
        """number: of the turn. Raises TrainingError for a question that no trajectory can hold."""
        if self.temperature > 0:
            fields["seed"] = (rollout.seed * self.limits.max_turns + number) % 2**31
        room = self.limits.max_tokens - rollout.prompt_tokens - rollout.sampled_tokens
        completion = await self.client.chat(
            messages,
            max_tokens=max(1, min(max_tokens, room)),
            **{"temperature": self.temperature, "stop": list(STOPS), **fields, **self.extra},
        )
        if (
            number == 0
            and completion.counted
            and completion.prompt_tokens >= self.limits.max_tokens
        ):
            raise TrainingError(
                f"question {rollout.question.id} takes {completion.prompt_tokens} tokens with its "
                f"images, and a trajectory may have {self.limits.max_tokens}: raise "
                "rollout.max_tokens, or leave it out"
            )
        return completion

    @staticmethod
    def _account(rollout: Rollout, completion: Completion, kept: float = 1.0) -> None:
        """kept: the share of the completion that the trajectory goes on with."""
        rollout.model_seconds += kept * completion.seconds
        if completion.counted:
            rollout.prompt_tokens = max(completion.prompt_tokens - rollout.sampled_tokens, 0)
            rollout.sampled_tokens += round(kept * completion.completion_tokens)

    def _within(self, rollout: Rollout, stop: str) -> str:
        """How the turn ended, or "length" where the trajectory has become too long."""
        total = rollout.prompt_tokens + rollout.sampled_tokens
        return "length" if total > self.limits.max_tokens else stop

    # ---- what is sent ----------------------------------------------------------------------------

    def _opening(self, question: Question, mode: Mode) -> list[dict[str, Any]]:
        """System and user message. Text from outside can hold no markup of a chat template that is
        known to us (`neutralise`); the tokenizer, which could say more, is the server's."""
        text = _harmless(question.text)
        if mode in ASKED and self.forcing == "prompt":
            text = f"{text}\n\n{ASKED[mode]}"
        content = [_picture(image) for image in question.images]
        content.append({"type": "text", "text": text})
        return [
            {"role": "system", "content": self._system[mode != "direct"]},
            {"role": "user", "content": content},
        ]

    async def _check_continues(self) -> None:
        """Whether the server goes on with an assistant's message: asked to, its prompt is shorter
        than otherwise, by the end of that message and the start of the next."""
        messages = [
            {"role": "user", "content": "Which number comes after 1?"},
            {"role": "assistant", "content": f"2.\n{ANSWER_OPEN}"},
        ]
        where = f"the agent at {self.client.base_url} ({self.client.model})"
        mend = "set agent.forcing=prompt, or serve the model with vLLM or SGLang"
        try:
            plain = await self.client.chat(messages, max_tokens=1, **self.extra)
            going_on = await self.client.chat(messages, max_tokens=1, **(self.extra | CONTINUE))
        except EndpointError as error:
            raise ConfigError(
                f"{where} does not take continue_final_message, with which tools are forbidden and "
                f"forced: {error}; {mend}"
            ) from None
        if not (plain.counted and going_on.counted):
            raise ConfigError(
                f"{where} does not count tokens, so it cannot be known whether it heeds "
                f"continue_final_message; {mend}"
            )
        if going_on.prompt_tokens >= plain.prompt_tokens:
            raise ConfigError(f"{where} does not heed continue_final_message; {mend}")


def _ended(completion: Completion, before: str = "") -> tuple[str, str]:
    """(the text of a turn, what ended it: "call", "answer", "end" or "length").

    before: what was put in the model's place. A turn ends with the first closing tag, which most
    servers cut off and which is put back; what a server that takes no stop strings wrote behind it
    is left out.
    """
    text = before + completion.text
    ends = [(at, tag) for tag in STOPS if (at := text.find(tag, len(before))) >= 0]
    if ends:
        at, tag = min(ends)
        return text[: at + len(tag)], STOPS[tag]
    if completion.finish_reason == "length":
        return text, "length"
    tag = completion.stopped_by
    if tag is None:  # the server does not say: the tag of what was opened last
        opened = max((text.rfind(opening), name) for name, opening in OPENINGS.items())
        tag = {"call": CALL_CLOSE, "answer": ANSWER_CLOSE}[opened[1]] if opened[0] >= 0 else ""
    return (text + tag, STOPS[tag]) if tag in STOPS else (text, "end")


def _observed(observation: Observation) -> list[dict[str, Any]]:
    said = _harmless(observation.text)
    content = [{"type": "text", "text": said}] if said else []
    return content + [_picture(image) for image in observation.images]


def _harmless(value: Any) -> Any:
    """A JSON value from outside without markup of chat templates in its strings."""
    if isinstance(value, str):
        return neutralise(value, MARKERS)
    if isinstance(value, dict):
        return {_harmless(key): _harmless(item) for key, item in value.items()}
    return [_harmless(item) for item in value] if isinstance(value, list) else value


def _picture(image: Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": png_uri(image)}}
