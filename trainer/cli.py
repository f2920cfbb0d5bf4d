"""The console command `metis`, and the only place that puts the stages together.

Exit codes: 0 done, 1 the run failed, 2 something that was asked for is wrong (no work was done),
75 the judge is down (saved; run again later), 130 interrupted (what was finished is kept).

Under torchrun every process runs this program; the first one alone writes and speaks.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer import plan as planning
from trainer import tools_cli
from trainer.config import Config, ConfigError, load
from trainer.log import Muted, RunError, RunLog, open_run
from trainer.parallel import World, join, leave
from trainer.setup import (
    check_model,
    check_sizes,
    make_grader,
    make_task,
    make_toolbox,
    model_path,
)
from trainer.types import TrainingError

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

    demo = command("demo", _demo, "SFT cold start, HDPO and evaluation of the tiny agent")
    demo.add_argument(
        "--compare",
        action="store_true",
        help="also GRPO and the coupled reward at two strengths, three seeds each (half an hour)",
    )
    command("sft", _sft, "SFT cold start alone; the model is left in RUN/sft")
    command("rl", _rl, "HDPO alone, from model.path; the model is left in RUN/final")
    evaluate = command("eval", _evaluate, "evaluate model.path on held-out questions")
    evaluate.add_argument("--no-tools", action="store_true", help="ask for direct answers")
    report = command("report", _report, "write RUN/report.html again", trains=False)
    report.add_argument("folder", type=Path, metavar="RUN")
    planning.add_arguments(
        command("plan", planning.run, "the memory of an update, before it is run", trains=False)
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
        import torch
        from transformers.utils import logging as transformers_logging

        from metis_kernels.adapters.hf import apply_liger
        from trainer.engines.hf import HFEngine
        from trainer.model import VisionLanguageModel
        from trainer.rollout import Limits, Player

        transformers_logging.disable_progress_bar()
        torch.manual_seed(config.seed)
        self.config, self.folder, self.log, self.stopping = config, folder, log, stopping
        self.world = world
        self.task = make_task(config, log)
        grader = make_grader(config, folder)
        path = model_path(config)
        device = config.model.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = config.model
        self.vlm = VisionLanguageModel.load(
            path,
            model.dtype,
            device,
            freeze_vision=model.freeze_vision,
            checkpointing=model.checkpointing,
            lora=model.lora,
        )
        try:
            apply_liger(self.vlm.model)
        except ImportError:
            log.say(
                "liger-kernel is not installed (pip install '.[gpu]'): transformers' own layers"
            )
        # What plays, is evaluated and saved: the model itself, or the plain copy of a sharded one.
        self.played = replace(self.vlm, model=world.replica(self.vlm.model))
        world.shard(self.vlm.model)
        rollout = config.rollout
        limits = Limits(rollout.max_turns, rollout.max_new_tokens, rollout.max_tokens)
        self.player = Player(self.played, make_toolbox(config, self.task), limits, grader)
        self.direct_player = Player(self.played, None, limits, grader)
        self.engine, self.greedy = (
            HFEngine(
                self.played,
                temperature=temperature,
                max_batch=rollout.max_batch,
                max_cache_bytes=rollout.max_cache_bytes,
                cuda_graphs=rollout.cuda_graphs,
            )
            for temperature in (rollout.temperature, config.evaluate.temperature)
        )

    def close(self) -> None:
        self.player.close()
        self.direct_player.close()

    def _save(self, name: str) -> None:
        if self.world.main:
            self.played.save(self.folder / name)

    def sft(self) -> None:
        from trainer.sft import demonstrate, sft

        config, log = self.config.sft, self.log
        seed, world = self.config.seed, self.world
        rollouts = demonstrate(self.task, self.player, config, seed, log, self.stopping, world)
        optimizer = self.config.optimizer
        sft(
            self.vlm,
            rollouts,
            config,
            seed,
            log,
            self.stopping,
            optimizer_config=optimizer,
            world=world,
        )
        world.refresh(self.played.model, self.vlm.model)
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
        from trainer.evaluate import evaluate
        from trainer.records import records

        log = log or self.log
        questions = self.task.heldout(self.config.evaluate.questions)
        player = self.player if tools else self.direct_player
        measures, rollouts = evaluate(
            player, self.greedy, questions, log, stage, self.stopping, self.world
        )
        shown: dict[str, list] = {}
        for rollout in rollouts:
            shown.setdefault(rollout.question.kind, []).append(rollout)
        samples = [rollout for some in shown.values() for rollout in some[:3]]
        log.rollouts(records(self.vlm, stage, 0, samples, images=True))
        return measures


@contextmanager
def _program(args: argparse.Namespace) -> Iterator[tuple[Program, dict[str, Any]]]:
    """Opens the run before any work; on the way out, whatever happened, the summary says how it
    ended and the report is written."""
    settings = list(args.settings)
    if args.seed is not None:
        settings.append(f"seed={args.seed}")
    config = load(args.config, settings)
    check_sizes(config)
    check_model(config)
    if args.unsafe_no_sandbox:
        from trainer.tools.sandbox import permit_unsafe

        permit_unsafe()
    world = join()
    folder = _open(args, world)
    with RunLog(folder) if world.main else Muted(folder) as log, _stopping(log) as stopping:
        log.config(config.to_dict())
        summary: dict[str, Any] = {"status": "failed", "seed": config.seed, "stages": {}}
        program = None
        try:
            program = Program(config, folder, log, stopping, world)
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


@contextmanager
def _stopping(log: RunLog) -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM once: the run ends within a step. Twice: at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        log.say("stopping after this step; once more stops at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _timed(summary: dict[str, Any], log: RunLog, name: str) -> Iterator[None]:
    start = log.seconds
    try:
        yield
    finally:
        spent = summary["stages"].get(name, 0.0) + log.seconds - start
        summary["stages"][name] = round(spent, 1)


def _write_report(folder: Path, log: RunLog) -> None:
    from trainer.report import write_report

    log.say(f"report: {write_report(folder)}")


def _ended(summary: dict[str, Any]) -> int:
    return DONE if summary["status"] == "complete" else INTERRUPTED


# ---- the commands --------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    with _program(args) as (program, summary):
        log = program.log
        if args.compare and (program.config.model.lora is not None or program.world.size > 1):
            raise ConfigError("--compare resets all weights: it takes one process, no model.lora")
        with _timed(summary, log, "evaluate_seconds"):
            summary["base"] = program.evaluate("base_eval", tools=False)
        with _timed(summary, log, "sft_seconds"):
            program.sft()
        with _timed(summary, log, "evaluate_seconds"):
            summary["sft"] = program.evaluate("sft_eval")
        summary["needed_rate"] = summary["sft"]["needed_rate"]
        log.summary(summary)
        with _timed(summary, log, "rl_seconds"):
            program.rl()
        with _timed(summary, log, "evaluate_seconds"):
            summary["final"] = program.evaluate("final_eval")
        log.table("held-out questions", summary["sft"], summary["final"], base=summary["base"])
        if args.compare:
            log.summary(summary | {"status": "complete"})
            _compare(program, summary["sft"])
    return _ended(summary)


ARMS: dict[str, dict[str, Any]] = {
    "HDPO w_tool=0.15": {},
    "GRPO w_tool=0": {"loss": {"w_tool": 0.0}},
    "coupled alpha=0.1": {"reward": "coupled", "coupled_alpha": 0.1},
    "coupled alpha=1": {"reward": "coupled", "coupled_alpha": 1.0},
}
COMPARED_SEEDS = (0, 1, 2)


def _compare(program: Program, before: dict[str, Any]) -> None:
    """Every arm and seed from the one SFT checkpoint -> compare.json and its picture."""
    from trainer.log import write_whole
    from trainer.model import VisionLanguageModel
    from trainer.pictures import write_comparison

    start = VisionLanguageModel.load(program.folder / "sft", program.config.model.dtype)
    weights = start.model.state_dict()
    results: list[dict[str, Any]] = []
    for name, changes in ARMS.items():
        for seed in COMPARED_SEEDS:
            tree = program.config.to_dict() | {"seed": seed}
            tree["rl"] = tree["rl"] | changes
            tree["rl"]["loss"] = program.config.to_dict()["rl"]["loss"] | changes.get("loss", {})
            config = Config.model_validate(tree)
            folder = program.folder / "compare" / f"{name.replace(' ', '-')}-seed{seed}"
            folder.mkdir(parents=True)
            program.vlm.model.load_state_dict(weights)
            program.log.say(f"{name}, seed {seed}")
            with RunLog(folder, console=program.log.console) as log:
                log.config(config.to_dict())
                program.rl(config, log)
                final = program.evaluate("final_eval", log=log)
                log.summary({"seed": seed, "sft": before, "final": final, "status": "complete"})
            results.append({"name": name, "seed": seed, "sft": before, "final": final})
            table = {"seeds": list(COMPARED_SEEDS), "arms": results}
            write_whole(program.folder / "compare.json", json.dumps(table))
    write_comparison(program.folder)


def _sft(args: argparse.Namespace) -> int:
    with _program(args) as (program, summary):
        with _timed(summary, program.log, "sft_seconds"):
            program.sft()
        summary["sft"] = program.evaluate("sft_eval")
        program.log.table("held-out questions", summary["sft"])
    return _ended(summary)


def _rl(args: argparse.Namespace) -> int:
    with _program(args) as (program, summary):
        summary["sft"] = program.evaluate("sft_eval")
        summary["needed_rate"] = summary["sft"]["needed_rate"]
        with _timed(summary, program.log, "rl_seconds"):
            program.rl()
        summary["final"] = program.evaluate("final_eval")
        program.log.table("held-out questions", summary["sft"], summary["final"])
    return _ended(summary)


def _evaluate(args: argparse.Namespace) -> int:
    with _program(args) as (program, summary):
        summary["final"] = program.evaluate("final_eval", tools=not args.no_tools)
        program.log.table("held-out questions", summary["final"])
    return _ended(summary)


def _report(args: argparse.Namespace) -> int:
    from trainer.pictures import write_comparison, write_picture
    from trainer.report import write_report

    if not args.folder.is_dir():
        raise FileNotFoundError(f"no run folder at {args.folder}")
    if (args.folder / "compare.json").exists():
        print(write_comparison(args.folder))
    print(write_picture(args.folder))
    print(write_report(args.folder))
    return DONE


def _status(args: argparse.Namespace) -> int:
    import metis_kernels

    print(metis_kernels.status())
    return DONE
