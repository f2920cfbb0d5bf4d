"""`metis eval` and `metis compare`: one model or several on the same questions, and what they did.

    metis eval --arbitrate model.path=runs/demo/final
    metis eval --model before=runs/demo/sft --model after=runs/demo/final
    metis eval --arbitrate agent.base_url=http://localhost:8000/v1 agent.model=Qwen/Qwen3-VL-8B
    metis compare runs/monday runs/tuesday --out compared.html

Files of a run: answers.jsonl, one line a question, mode and sample, as they are played; eval.json,
all that is computed of them; pareto.svg. Everything can be computed again from answers.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.log import RunError, RunLog
from trainer.setup import (
    check_model,
    load_model,
    make_client,
    make_engine,
    make_grader,
    make_limits,
    make_remote_agent,
    make_task,
    make_toolbox,
    model_path,
    start,
)
from trainer.types import ConfigError, Mode, Question, Rollout

if TYPE_CHECKING:
    from trainer.agents import Agent
    from trainer.answers import Answer
    from trainer.config import Config
    from trainer.parallel import World

ARBITRATED: tuple[Mode, ...] = ("allowed", "forbidden", "forced")
WARM_UP = 16
"""Questions, of a kind each, that are played before seconds are compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `metis eval`, besides those of every run."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--no-tools", action="store_true", help="ask for direct answers")
    which.add_argument(
        "--arbitrate",
        action="store_true",
        help="play every question with tools allowed, forbidden and forced: did calling help?",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="in place of model.path; repeated: side by side, differences to the first",
    )


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of `metis eval`")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a page (.html), the picture alone (.svg), or .json",
    )


def check(config: Config, args: argparse.Namespace) -> None:
    """Raises ConfigError for what cannot be evaluated, and FileNotFoundError for a model that is
    not there, before any work is done."""
    one = config.evaluate
    if one.samples > 1 and one.temperature == 0:
        raise ConfigError(
            f"evaluate.samples is {one.samples} but evaluate.temperature is 0, where all samples "
            "are the same: set evaluate.temperature=1, or evaluate.samples=1"
        )
    if config.agent is not None:
        if args.model:
            raise ConfigError(
                "--model names models of this process, and agent.base_url a server: give one of "
                "them; `metis compare` puts their runs side by side"
            )
        make_client(config.agent, "agent")
        return
    if not args.model:
        check_model(config)
        return
    from trainer.config import check_path

    for path in named_models(args.model).values():
        check_path(path)


def named_models(words: Sequence[str]) -> dict[str, str]:
    """NAME=PATH, ... -> path by name. Raises ConfigError."""
    models: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"expected --model NAME=PATH, got {word!r}")
        if name in models:
            raise ConfigError(f"--model {name} is given twice: names must differ")
        models[name] = path
    return models


class Evaluation:
    """What `metis eval` does in an open run folder."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: Config,
        folder: Path,
        log: RunLog,
        stopping: Callable[[], bool],
        world: World,
    ):
        start(config)
        self.config, self.folder, self.log = config, folder, log
        self.stopping, self.world = stopping, world
        self.modes: tuple[Mode, ...] = ("direct",) if args.no_tools else ("allowed",)
        if args.arbitrate:
            self.modes = ARBITRATED
        self.task = make_task(config, log)
        self.grader = make_grader(config, folder)
        self.questions: list[Question] = self.task.heldout(config.evaluate.questions)
        self.models: Mapping[str, Any] = named_models(args.model)
        if config.agent is not None:
            self.models = {config.agent.model: None}
        elif not self.models:
            self.models = {config.model.path: model_path(config)}
        self.played: dict[str, list[Answer]] = {name: [] for name in self.models}
        self._status = "running"

    def close(self) -> None:
        """Says in eval.json how it ended, unless it is complete."""
        if self._status == "complete":
            return
        self._status = "interrupted" if self.stopping() else "failed"
        self._incomplete()
        if count := sum(map(len, self.played.values())):
            self.log.say(
                f"answers.jsonl is incomplete: {count:,} of {self._total():,} answers; nothing was "
                "computed of them"
            )

    def run(self) -> dict[str, Any]:
        """Plays everything -> what eval.json holds."""
        from trainer.comparison import evaluation
        from trainer.eval_tables import say

        self._incomplete()
        for name, path in self.models.items():
            with self._agent(name, path) as (agent, vlm):
                for mode in self.modes:
                    self._play(agent, vlm, name, mode)
        result = {
            "status": "complete",
            "samples": self.config.evaluate.samples,
            "temperature": self.config.evaluate.temperature,
            "forcing": None if self.config.agent is None else self.config.agent.forcing,
            **evaluation(self.played),
        }
        self.log.evaluation(result)
        self._status = "complete"
        say(self.log.console, result)
        return result

    def _play(self, agent: Agent, vlm: Any, name: str, mode: Mode) -> None:
        from trainer.evaluate import evaluate
        from trainer.records import records

        def record(answers: Sequence[Answer]) -> None:
            self.played[name] += answers
            self.log.answers(answer.record() for answer in answers)

        what = mode if len(self.models) == 1 else f"{name}, {mode}"
        _, shown = evaluate(
            agent,
            self.questions,
            self.log,
            what,
            self.stopping,
            self.world,
            mode=mode,
            samples=self.config.evaluate.samples,
            record=record,
        )
        if name == next(iter(self.models)) and mode == self.modes[0]:
            self.log.rollouts(records(vlm, "final_eval", 0, _without_repeats(shown), images=True))

    @contextmanager
    def _agent(self, name: str, path: Any) -> Iterator[tuple[Agent, Any]]:
        """The agent of that name, and its model where it is in this process."""
        if self.config.agent is None:
            with self._local(name, path) as agent:
                yield agent, agent.engine.vlm
            return
        temperature = self.config.evaluate.temperature
        toolbox = make_toolbox(self.config, self.task)
        agent = make_remote_agent(self.config, toolbox, self.grader, temperature)
        try:
            for mode in self.modes:
                agent.check(mode)
            yield agent, None
        finally:
            agent.close()
            lost = {k: n for k, n in sorted(agent.counts.items()) if k.startswith("unscored ")}
            if lost:
                self.log.say("; ".join(f"{k}: {n:,}" for k, n in lost.items()))

    @contextmanager
    def _local(self, name: str, path: Any) -> Iterator[Any]:
        from trainer.agents import LocalAgent
        from trainer.rollout import Player

        vlm = load_model(self.config, path, self.log)
        engine = make_engine(self.config, vlm, self.config.evaluate.temperature)
        limits = make_limits(self.config)
        toolbox = make_toolbox(self.config, self.task)
        with (
            Player(vlm, toolbox, limits, self.grader) as player,
            Player(vlm, None, limits, self.grader) as direct,
        ):
            agent = LocalAgent(name, engine, player, direct)
            if len(self.modes) > 1:
                # What starts with the first call (a sandbox, an index) is in no mode's seconds.
                first = list({one.kind: one for one in self.questions}.values())[:WARM_UP]
                agent.play(first, range(len(first)), mode="forced", stopping=self.stopping)
            yield agent

    def _total(self) -> int:
        one = len(self.questions) * self.config.evaluate.samples
        return one * len(self.modes) * len(self.models)

    def _incomplete(self) -> None:
        played = {name: len(answers) for name, answers in self.played.items()}
        self.log.evaluation({"status": self._status, "answers": played, "of": self._total()})


def _without_repeats(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """One rollout a question, where several samples of it were played."""
    return list({rollout.question.id: rollout for rollout in reversed(rollouts)}.values())[::-1]


def compare(args: argparse.Namespace) -> int:
    from rich.console import Console

    from trainer.comparison import evaluation, read_runs
    from trainer.eval_report import write_comparison
    from trainer.eval_tables import say

    if args.out is not None and args.out.suffix not in (".html", ".svg", ".json"):
        raise RunError(f"--out is {args.out}; it must end with .html, .svg or .json")
    result = {"status": "complete", **evaluation(read_runs(args.runs))}
    say(Console(), result)
    if args.out is not None:
        print(write_comparison(args.out, result))
    return 0
