"""The console command `metis`, and the only place that puts the stages together.

Exit codes: 0 done, 1 the run failed, 2 something that was asked for is wrong (no work was done),
75 the judge is down (saved; run again later), 130 interrupted (what was finished is kept).

Under torchrun every process runs this program; the first one alone writes and speaks.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import curate_cli, demo, eval_cli, tools_cli
from trainer import plan as planning
from trainer.interrupt import stop_requests
from trainer.log import Muted, RunError, RunLog, open_run
from trainer.setup import (
    check_model,
    check_sizes,
    load_model,
    make_engine,
    make_grader,
    make_limits,
    make_task,
    make_toolbox,
    model_path,
    start,
)
from trainer.types import ConfigError, TrainingError

if TYPE_CHECKING:  # they import torch, and a wrong flag is to be answered at once
    from trainer.config import Config
    from trainer.parallel import World

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse takes settings in one place only; a person writes them between options as well.
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown or (rest and "settings" not in args):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    # No hub is ever asked behind the user's back; a hub name as model.path is the user's wish.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers imports torchao, which complains of libraries for GPUs that are not here.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if rest:
        args.settings += rest
    try:
        return args.run(args)
    except (ConfigError, RunError, FileNotFoundError) as error:
        return _failed(args, error, WRONG)
    except TrainingError as error:
        return _failed(args, error, getattr(error, "exit_code", FAILED))


def _failed(args: argparse.Namespace, error: Exception, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # what one process cannot do, none can
        print(f"metis {args.command}: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="metis",
        description="Teach a vision-language agent when to call a tool.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str, *, trains: bool = True):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        if trains:
            sub.add_argument("--config", metavar="FILE", help="YAML settings, or a recipe's name")
            sub.add_argument("--seed", type=int, help="shorthand for seed=N")
            sub.add_argument("--runs", default="runs", metavar="FOLDER", help="default: runs")
            sub.add_argument("--name", default=name, help=f"run folder (default: {name})")
            sub.add_argument(
                "--overwrite", action="store_true", help="replace the run of that name"
            )
            sub.add_argument(
                "--unsafe-no-sandbox",
                action="store_true",
                help="run the policy's Python with this program's own rights",
            )
            sub.add_argument(
                "settings", nargs="*", metavar="section.key=value", help="e.g. rl.lr=5e-5"
            )
        return sub

    demo_command = command("demo", _demo, "SFT cold start, HDPO and evaluation of the tiny agent")
    demo_command.add_argument(
        "--compare",
        action="store_true",
        help="also GRPO and the coupled reward at two strengths, three seeds each (half an hour)",
    )
    demo_command.add_argument(
        "--curate",
        action="store_true",
        help="the cold start from raw trajectories, as they are and curated, side by side",
    )
    command("sft", _sft, "SFT cold start alone; the model is left in RUN/sft")
    command("rl", _rl, "HDPO alone, from model.path; the model is left in RUN/final")
    text = "evaluate models, or the agent behind a server, on held-out questions"
    eval_cli.add_arguments(command("eval", _evaluate, text))
    text = "finished evaluations side by side: accuracy against tool rate"
    eval_cli.add_compare_arguments(command("compare", eval_cli.compare, text, trains=False))
    report = command("report", _report, "write RUN/report.html again", trains=False)
    report.add_argument("folder", type=Path, metavar="RUN")
    planning.add_arguments(
        command("plan", planning.run, "the memory of an update, before it is run", trains=False)
    )
    curate_cli.add_arguments(
        command("curate", curate_cli.run, "choose the data that is worth training on", trains=False)
    )
    tools_cli.add_arguments(
        command("tools", tools_cli.run, "serve, try or list tools, index a corpus", trains=False)
    )
    command("status", _status, "which implementations of the operators run here", trains=False)
    return parser


# ---- what every run needs ------------------------------------------------------------------------


class Program:
    """A run folder, its log, the task, the model and the player of trajectories."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        log: RunLog,
        stopping: Callable[[], bool],
        world: World,
    ):
        # Imported here, so that a wrong flag is answered at once and not after torch has loaded.
        from trainer.rollout import Player

        start(config)
        self.config, self.folder, self.log, self.stopping = config, folder, log, stopping
        self.world = world
        self.task = make_task(config, log)
        grader = make_grader(config, folder)
        model = config.model
        self.vlm = load_model(
            config,
            model_path(config),
            log,
            freeze_vision=model.freeze_vision,
            checkpointing=model.checkpointing,
            lora=model.lora,
        )
        # What plays, is evaluated and saved: the model itself, or the plain copy of a sharded one.
        self.played = replace(self.vlm, model=world.replica(self.vlm.model))
        world.shard(self.vlm.model)
        limits = make_limits(config)
        self.player = Player(self.played, make_toolbox(config, self.task), limits, grader)
        self.direct_player = Player(self.played, None, limits, grader)
        self.engine, self.greedy = (
            make_engine(config, self.played, temperature)
            for temperature in (config.rollout.temperature, config.evaluate.temperature)
        )

    def close(self) -> None:
        self.player.close()
        self.direct_player.close()

    def _save(self, name: str) -> None:
        if self.world.main:
            self.played.save(self.folder / name)

    def sft(self, source: Any = None, log: RunLog | None = None) -> None:
        """source: whose demonstrations are learned from; None: the task's."""
        from trainer.sft import demonstrate, sft

        source, log = source or self.task, log or self.log
        config, seed, world = self.config.sft, self.config.seed, self.world
        rollouts = demonstrate(source, self.player, config, seed, log, self.stopping, world)
        sft(
            self.vlm,
            rollouts,
            config,
            seed,
            log,
            self.stopping,
            optimizer_config=self.config.optimizer,
            world=world,
        )
        world.refresh(self.played.model, self.vlm.model)
        if log is self.log:
            self._save("sft")

    def rl(self, config: Config | None = None, log: RunLog | None = None) -> None:
        from trainer.records import records
        from trainer.rl import rl

        config, log = config or self.config, log or self.log

        def record(stage: str, step: int, rollouts, advantages) -> None:
            log.rollouts(records(self.vlm, stage, step, rollouts, advantages))

        try:
            rl(
                self.vlm,
                self.task,
                self.player,
                self.engine,
                config.rl,
                config.seed,
                log,
                self.stopping,
                record,
                optimizer_config=config.optimizer,
                world=self.world,
            )
        finally:
            if log is self.log:  # interrupted or not, what was learned is kept
                self._save("final")

    def evaluate(self, stage: str, *, tools: bool = True, log: RunLog | None = None):
        """Measures on the held-out questions; a few rollouts of each kind go to rollouts.jsonl with
        their images."""
        from trainer.agents import LocalAgent
        from trainer.answers import measure
        from trainer.evaluate import evaluate
        from trainer.records import records

        log = log or self.log
        questions = self.task.heldout(self.config.evaluate.questions)
        agent = LocalAgent(stage, self.greedy, self.player, self.direct_player)
        mode = "allowed" if tools else "direct"
        answers, shown = evaluate(
            agent, questions, log, stage, self.stopping, self.world, mode=mode
        )
        log.rollouts(records(self.vlm, stage, 0, shown, images=True))
        return measure(answers)


def _check(config: Config) -> None:
    check_sizes(config)
    check_model(config)


@contextmanager
def _program(
    args: argparse.Namespace,
    make: Callable[..., Any] = Program,
    check: Callable[[Config], None] = _check,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Opens the run before any work, and in it what `make` makes; on the way out, whatever
    happened, the summary says how it ended and the report is written."""
    from trainer.config import load
    from trainer.parallel import join, leave

    settings = list(args.settings)
    if args.seed is not None:
        settings.append(f"seed={args.seed}")
    config = load(args.config, settings)
    check(config)
    if args.unsafe_no_sandbox:
        from trainer.tools.sandbox import permit_unsafe

        permit_unsafe()
    world = join()
    folder = _open(args, world)
    with (
        RunLog(folder) if world.main else Muted(folder) as log,
        stop_requests(
            lambda: log.say("stopping after this step; once more stops at once")
        ) as stopping,
    ):
        log.config(config.to_dict())
        summary: dict[str, Any] = {"status": "failed", "seed": config.seed, "stages": {}}
        program = None
        try:
            program = make(config, folder, log, stopping, world)
            summary |= _versions(config)
            yield program, summary
            summary["status"] = "complete"
        except KeyboardInterrupt:
            summary["status"] = "interrupted"
        finally:
            if program is not None:
                program.close()
            summary["seconds"] = round(log.seconds, 1)
            log.summary(summary)
            if world.main:
                _write_report(folder, log)
            log.say(f"{summary['status']} after {log.seconds:.0f} s: {folder}/")
            leave()


def _open(args: argparse.Namespace, world: World) -> Path:
    """The run folder, made by the first process; where it cannot, every process says so."""
    opened: Path | RunError | None = None
    if world.main:
        try:
            opened = open_run(args.runs, args.name, args.overwrite)
        except RunError as error:
            opened = error
    opened = world.broadcast(opened)
    if isinstance(opened, RunError):
        raise opened
    return opened


def _versions(config: Config) -> dict[str, Any]:
    import torch

    import metis_kernels

    return {
        "steps": config.rl.steps,
        "torch": torch.__version__,
        "metis_kernels": metis_kernels.__version__,
    }


def _write_report(folder: Path, log: RunLog) -> None:
    log.say(f"report: {_report_of(folder)}")


def _report_of(folder: Path) -> Path:
    """Writes the report of a run, or that of an evaluation."""
    from trainer import eval_report, report

    if (folder / "eval.json").exists():
        return eval_report.write_report(folder)
    return report.write_report(folder)


def _ended(summary: dict[str, Any]) -> int:
    return DONE if summary["status"] == "complete" else INTERRUPTED


# ---- the commands --------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    with _program(args) as (program, summary):
        demo.run(program, summary, compare=args.compare, curate=args.curate)
    return _ended(summary)


def _sft(args: argparse.Namespace) -> int:
    with _program(args) as (program, summary):
        with program.log.timed(summary, "sft_seconds"):
            program.sft()
        summary["sft"] = program.evaluate("sft_eval")
        program.log.table("held-out questions", summary["sft"])
    return _ended(summary)


def _rl(args: argparse.Namespace) -> int:
    with _program(args) as (program, summary):
        summary["sft"] = program.evaluate("sft_eval")
        summary["needed_rate"] = summary["sft"]["needed_rate"]
        with program.log.timed(summary, "rl_seconds"):
            program.rl()
        summary["final"] = program.evaluate("final_eval")
        program.log.table("held-out questions", summary["sft"], summary["final"])
    return _ended(summary)


def _evaluate(args: argparse.Namespace) -> int:
    make = partial(eval_cli.Evaluation, args)
    with _program(args, make, lambda config: eval_cli.check(config, args)) as (program, summary):
        result = program.run()
        measures = next(iter(result["models"].values()))["modes"][result["mode"]]
        summary |= {"final": measures, "needed_rate": measures["needed_rate"]}
    return _ended(summary)


def _report(args: argparse.Namespace) -> int:
    from trainer.pictures import write_comparison, write_picture

    if not args.folder.is_dir():
        raise FileNotFoundError(f"no run folder at {args.folder}")
    if (args.folder / "compare.json").exists():
        print(write_comparison(args.folder))
    if not (args.folder / "eval.json").exists():
        print(write_picture(args.folder))
    print(_report_of(args.folder))
    return DONE


def _status(args: argparse.Namespace) -> int:
    import metis_kernels

    print(metis_kernels.status())
    return DONE
