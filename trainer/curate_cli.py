"""`metis curate`: raw trajectories and questions in, those that are worth training on out.

Exit codes: 0 done, 2 what was asked for is wrong or cannot be written, 75 a model, a judge or a
tool said nothing of too many rows, 130 interrupted. After 75, 130 and a kill the same command goes
on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer.interrupt import stop_requests
from trainer.log import RunLog
from trainer.setup import (
    check_model,
    load_model,
    make_engine,
    make_grader,
    make_limits,
    make_remote_agent,
    make_toolbox,
    model_path,
    start,
)
from trainer.types import ConfigError

if TYPE_CHECKING:  # what is wrong with the settings is to be answered at once
    from trainer.agents import Agent
    from trainer.config import Config
    from trainer.curate.pipeline import Curation, Plan
    from trainer.curate.stages import Stage
    from trainer.data import Dataset
    from trainer.judge import Judge
    from trainer.tools import Toolbox

DONE, INTERRUPTED = 0, 130
STAGES = {
    "sft": ("rules", "duplicates", "execute", "answer", "solvable", "judge"),
    "rl": ("rules", "duplicates", "pass_rate", "judge", "balance"),
}
YIELDS = {"sft": "conversations", "rl": "questions"}
SECTIONS = ("task", "seed", "curate", "data", "tools", "model", "agent", "rollout", "judge")
"""Of the settings, that a curation depends on."""
_NEED = {
    "solvable": "a model: set model.path, or agent.base_url and agent.model",
    "pass_rate": "a model: set model.path, or agent.base_url and agent.model",
    "judge": "a judge: set judge.base_url and judge.model",
}
_SETTING = re.compile(r"[a-z_]+(?:\.[a-z0-9_]+)*=")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands below `metis curate`."""
    commands = parser.add_subparsers(dest="curate_command", required=True, metavar="COMMAND")

    def command(name: str, text: str, more: str) -> None:
        sub = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {more} A FOLDER that is not finished is "
            "gone on with.",
            allow_abbrev=False,
        )
        sub.set_defaults(settings=[])
        sub.add_argument(
            "data",
            nargs="+",
            metavar="DATA",
            help="files, folders or patterns of parquet and JSONL; then section.key=value",
        )
        sub.add_argument("--out", type=Path, required=True, metavar="FOLDER")
        sub.add_argument("--config", metavar="FILE", help="YAML settings, or a recipe's name")
        sub.add_argument("--task", choices=("glyphs", "file"), help="whose tools (default: file)")
        sub.add_argument("--seed", type=int, help="shorthand for seed=N")
        sub.add_argument(
            "--overwrite", action="store_true", help="do it anew; what is the same is not redone"
        )
        sub.add_argument(
            "--unsafe-no-sandbox",
            action="store_true",
            help="run recorded code with this program's own rights",
        )

    command(
        "sft",
        "raw trajectories for the cold start",
        "Drops what is cut off or pointless, what cannot be executed again with the same result, "
        "what the model answers without tools, and what a judge finds no strategic use of tools.",
    )
    command(
        "rl",
        "questions with known answers, for RL",
        "Drops near-duplicates, questions whose samples are all right or all wrong, and answers on "
        "which judge and rules disagree; keeps the mix of abilities.",
    )


def run(args: argparse.Namespace) -> int:
    if args.unsafe_no_sandbox:
        from trainer.tools.sandbox import permit_unsafe

        permit_unsafe()
    paths, config = _read_settings(args)
    return curate(args.curate_command, paths, config, args.out, overwrite=args.overwrite)


def curate(
    command: str, paths: Sequence[str], config: Config, out: Path, *, overwrite: bool = False
) -> int:
    """`metis curate COMMAND PATHS --out OUT` under these settings -> the exit code."""
    stages, skipped = chosen_stages(command, config)

    from trainer.curate.journal import Journal
    from trainer.curate.outputs import JOURNAL, asked_for, check_folder, open_folder
    from trainer.curate.pipeline import Curation
    from trainer.curate.stages import Stopped

    check_folder(out, overwrite=overwrite)
    with RunLog(out) as log, stop_requests() as stopping, ExitStack() as closing:
        try:
            data, files = _open(paths, command, config, stopping)
            settings = {name: config.to_dict()[name] for name in SECTIONS}
            asked = asked_for(command, settings, files)
            resumed = open_folder(out, asked, overwrite=overwrite)
            journal = Journal(out / JOURNAL)
            closing.callback(journal.close)
            if resumed:
                log.say(f"goes on in {out}: {len(journal):,} verdicts are known")
            plan, used = _plan(command, config, stages, skipped, log, closing)
            curation = Curation(data, plan, journal, log, stopping)
            try:
                curation.run()
            finally:
                curation.close(*used)
            _write(curation, command, out, asked["settings"], log)
        except (Stopped, KeyboardInterrupt):
            log.say(f"interrupted; the same command goes on in {out}")
            return INTERRUPTED
    return DONE


def _write(
    curation: Curation, command: str, folder: Path, settings: dict[str, Any], log: RunLog
) -> None:
    """The outputs; the summary, which says that all is done, comes last."""
    from trainer.curate.outputs import curation_lines, kept_lines, write_lines
    from trainer.curate.report import write_report

    kept = write_lines(folder / "dataset.jsonl", kept_lines(curation))
    rows = write_lines(folder / "curation.jsonl", curation_lines(curation))
    shown = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_report(curation, folder, f"{command}: {folder.name}", shown)
    summary = _summary(curation)
    counted = summary["kept"] + summary["dropped"] + summary["bad"]
    assert rows == counted == curation.data.rows and kept == summary["kept"]
    log.summary({"status": "complete", "seconds": round(log.seconds, 1), **summary})
    _say(summary, folder, log)


def _summary(curation: Curation) -> dict[str, Any]:
    verdicts = Counter(fate.verdict for fate in curation.fates)
    dropped = [fate for fate in curation.fates if fate.verdict == "dropped"]
    return {
        "rows": len(curation.fates),
        **{name: verdicts[name] for name in ("kept", "dropped", "bad")},
        "stages": dict(Counter(fate.stage for fate in dropped)),
        "reasons": dict(Counter(fate.reason for fate in dropped)),
        "not_run": dict(curation.plan.skipped),
        "tokens": sum(curation.tokens()),
    }


def _say(summary: dict[str, Any], folder: Path, log: RunLog) -> None:
    kept, dropped, bad = summary["kept"], summary["dropped"], summary["bad"]
    log.say(f"{summary['rows']:,} rows: {kept:,} kept + {dropped:,} dropped + {bad:,} bad")
    for reason, count in sorted(summary["reasons"].items(), key=lambda pair: -pair[1]):
        log.say(f"  {reason}: {count:,}")
    for stage, why in summary["not_run"].items():
        log.say(f"  {stage} did not run: {why}")
    log.say(f"{folder / 'dataset.jsonl'}, {folder / 'curation.jsonl'}, {folder / 'report.html'}")


# ---- settings ------------------------------------------------------------------------------------


def _read_settings(args: argparse.Namespace) -> tuple[list[str], Config]:
    """(paths of data, settings). section.key=value is a setting, unless there is such a file."""
    from trainer.config import load

    words = [*args.data, *args.settings]
    settings = [word for word in words if _SETTING.match(word) and not Path(word).exists()]
    paths = [word for word in words if word not in settings]
    if not paths:
        raise ConfigError("no data is named: give files, folders or patterns of .parquet, .jsonl")
    if args.seed is not None:
        settings.append(f"seed={args.seed}")
    given = [*settings, f"data.paths={json.dumps(paths)}"]
    if args.task is not None:
        given.append(f"task={args.task}")
    config = load(args.config, given)
    if "task" not in config.model_fields_set:
        config = load(args.config, [*given, "task=file"])
    return paths, config


def chosen_stages(command: str, config: Config) -> tuple[list[str], dict[str, str]]:
    """(the stages that run, why the others do not). Raises ConfigError for one that is asked for
    and cannot run."""
    there, asked = STAGES[command], config.curate.stages
    lacking = {}
    played = config.agent is not None or "path" in config.model.model_fields_set
    if not played and (asked is None or config.task != "glyphs"):
        lacking = {name: _NEED[name] for name in ("solvable", "pass_rate") if name in there}
    if config.judge is None:
        lacking["judge"] = _NEED["judge"]
    if asked is None:
        stages = [name for name in there if name not in lacking]
        skipped = {name: f"it needs {why}" for name, why in lacking.items()}
        if command == "rl" and "pass_rate" in lacking and "judge" in stages:
            stages.remove("judge")
            skipped["judge"] = "it needs the answers of pass_rate"
        return stages, skipped
    for name in asked:
        if name not in there:
            raise ConfigError(
                f"curate.stages: {name} is no stage of {command}; there are: {', '.join(there)}"
            )
        if name in lacking:
            raise ConfigError(f"curate.stages: {name} needs {lacking[name]}")
    if command == "rl" and "judge" in asked and "pass_rate" not in asked:
        raise ConfigError("curate.stages: judge needs the answers of pass_rate; ask for both")
    skipped = {name: "not asked for" for name in there if name not in asked}
    return [name for name in there if name in asked], skipped


def _open(
    paths: Sequence[str], command: str, config: Config, stopping: Callable[[], bool]
) -> tuple[Dataset, list[Path]]:
    """The rows, every bad one accounted for, and their files."""
    from trainer.curate.stages import Stopped
    from trainer.data import Checks, DataError, Dataset, find_files

    def progress(done: int, total: int) -> None:
        if stopping():
            raise Stopped

    one = config.data
    checks = Checks(max_bad=1.0, pixels=one.check_pixels, ids=one.ids)
    try:
        files = find_files(paths)
        data = Dataset(
            files,
            layout=one.layout,
            checks=checks,
            cache_bytes=one.cache_bytes,
            progress=progress,
        )
    except DataError as error:
        raise ConfigError(str(error)) from None
    if data.yields != YIELDS[command]:
        other = "rl" if command == "sft" else "sft"
        raise ConfigError(
            f"{files[0]} holds {data.yields} ({data.layouts[0].name}); metis curate {command} "
            f"takes {YIELDS[command]}, metis curate {other} the others"
        )
    return data, files


# ---- what the stages are made of -----------------------------------------------------------------


def _plan(
    command: str,
    config: Config,
    names: Sequence[str],
    skipped: dict[str, str],
    log: RunLog,
    closing: ExitStack,
) -> tuple[Plan, list[Any]]:
    """The plan, and what it uses that the curation's loop closes."""
    from trainer.curate.duplicates import Kept
    from trainer.curate.pipeline import Plan
    from trainer.curate.stages import Reading
    from trainer.tools import ToolInfraError

    one = config.curate
    bits, grey = one.duplicate_bits, one.duplicate_grey
    used: list[Any] = []
    make = _sft_stages if command == "sft" else _rl_stages
    try:
        later = make(config, names, log, closing, used)
    except ToolInfraError as error:  # of a tool server that is asked for its tools
        raise ConfigError(str(error)) from None
    kept = partial(Kept, jaccard=one.duplicate_text, bits=bits, grey=grey)
    plan = Plan(
        Reading(bits=bits, grey=grey, max_answer=one.max_answer),
        later,
        rules="rules" in names,
        duplicates=kept if "duplicates" in names else None,
        balance=one.balance if "balance" in names else None,
        max_unscored=one.max_unscored,
        skipped=skipped,
    )
    return plan, used


def _sft_stages(
    config: Config, names: Sequence[str], log: RunLog, closing: ExitStack, used: list[Any]
) -> list[Stage]:
    from trainer.curate.execute import Tolerance
    from trainer.curate.models import Review, Solvable
    from trainer.curate.stages import Answer, Execution

    one, stages = config.curate, []
    if "execute" in names:
        toolbox = _toolbox(config)
        used.append(toolbox)
        tolerance = Tolerance(
            one.number_tolerance, one.picture_bits, one.picture_grey, one.recovered, one.trusted
        )
        known_by = config.tools.url or config.task
        stages.append(Execution(toolbox, tolerance, one.sessions, known_by))
    if "answer" in names:
        stages.append(Answer())
    if "solvable" in names:
        agent = _agent(config, None, log, closing)
        stages.append(Solvable(agent, one.k, one.solvable_at, _asking(config)))
    if "judge" in names:
        judge = _rubric_judge(config, log.folder)
        used.append(judge)
        stages.append(Review(judge))
    return stages


def _rl_stages(
    config: Config, names: Sequence[str], log: RunLog, closing: ExitStack, used: list[Any]
) -> list[Stage]:
    from trainer.curate.models import Ambiguity, PassRate

    one, stages = config.curate, []
    if "pass_rate" in names:
        agent = _agent(config, _toolbox(config), log, closing)
        asking = [_asking(config), config.tools.url or config.task]
        low, high = one.min_pass_rate, one.max_pass_rate
        stages.append(PassRate(agent, one.samples, low, high, asking))
    if "judge" in names:
        judge = _judge(config, log.folder)
        used.append(judge)
        stages.append(Ambiguity(judge, one.audited, stages[0].settings))
    return stages


def _toolbox(config: Config) -> Toolbox:
    from trainer.tools import PythonTool, SandboxError, Toolbox

    if config.task != "file":
        from trainer.tasks import load_task

        return make_toolbox(config, load_task(config.task))
    if config.tools.url is not None:
        return make_toolbox(config, None)
    try:
        return Toolbox([PythonTool()])
    except SandboxError as error:
        raise ConfigError(str(error)) from None


def _judge(config: Config, folder: Path) -> Judge:
    grader = make_grader(config, folder)
    assert grader is not None and grader.judge is not None  # see chosen_stages
    return grader.judge


def _rubric_judge(config: Config, folder: Path) -> Judge:
    from trainer.curate.rubric import RubricJudge

    one, judge = config.judge, _judge(config, folder)
    return RubricJudge(
        judge.client,
        cache=judge.cache,
        images=one.images,
        window=one.window,
        minimum=one.minimum,
        max_unscored=one.max_unscored,
    )


def _asking(config: Config) -> Any:
    """What a model's answers depend on, beside the model: for the keys of the journal."""
    rollout = config.rollout
    judge = config.judge and [config.judge.model, config.judge.images]
    agent = config.agent and [config.agent.forcing, config.agent.extra]
    limits = [rollout.max_turns, rollout.max_new_tokens, rollout.max_tokens, rollout.temperature]
    return [config.task, limits, judge, agent]


def _agent(config: Config, toolbox: Toolbox | None, log: RunLog, closing: ExitStack) -> Agent:
    """The server's model, where one is named, else the one of model.path in this process."""
    grader = make_grader(config, log.folder)
    if config.agent is not None:
        remote = make_remote_agent(config, toolbox, grader, config.rollout.temperature)
        closing.callback(remote.close)
        remote.check()
        return remote

    from trainer.agents import LocalAgent
    from trainer.rollout import Player

    start(config)
    check_model(config)
    vlm = load_model(config, model_path(config), log)
    limits = make_limits(config)
    player, direct = Player(vlm, toolbox, limits, grader), Player(vlm, None, limits, grader)
    closing.callback(player.close)
    closing.callback(direct.close)
    engine = make_engine(config, vlm, config.rollout.temperature)
    return LocalAgent(_model_name(model_path(config)), engine, player, direct)


def _model_name(path: str | Path) -> str:
    """Other weights have another name: of a folder by size and time of its files."""
    folder = Path(path)
    if not folder.is_dir():
        return str(path)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return f"{folder.name}-{hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:12]}"
