"""`metis demo`: the tiny agent from its base model to one that knows when to call.

    metis demo               SFT cold start, HDPO, evaluation
    metis demo --curate      the cold start from raw trajectories, as they are and curated
    metis demo --compare     HDPO beside GRPO and a coupled reward, three seeds each

Every stage is the one that its own command runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import curate_cli
from trainer.log import RunLog
from trainer.types import ConfigError

if TYPE_CHECKING:
    from trainer.cli import Program
    from trainer.config import Config


def run(program: Program, summary: dict[str, Any], *, compare: bool, curate: bool) -> None:
    """Fills the summary as it goes. Raises ConfigError for settings that resetting weights rules
    out."""
    log, config = program.log, program.config
    if (compare or curate) and (config.model.lora is not None or program.world.size > 1):
        option = "--compare" if compare else "--curate"
        raise ConfigError(f"{option} resets all weights: it takes one process, no model.lora")
    if curate and config.task != "glyphs":
        raise ConfigError("--curate makes raw trajectories of the glyphs: leave task as it is")
    with log.timed(summary, "evaluate_seconds"):
        summary["base"] = program.evaluate("base_eval", tools=False)
    if curate:
        _curated(program, summary)
    else:
        with log.timed(summary, "sft_seconds"):
            program.sft()
        with log.timed(summary, "evaluate_seconds"):
            summary["sft"] = program.evaluate("sft_eval")
    summary["needed_rate"] = summary["sft"]["needed_rate"]
    log.summary(summary)
    with log.timed(summary, "rl_seconds"):
        program.rl()
    with log.timed(summary, "evaluate_seconds"):
        summary["final"] = program.evaluate("final_eval")
    log.table("held-out questions", summary["sft"], summary["final"], base=summary["base"])
    if compare:
        log.summary(summary | {"status": "complete"})
        _compare(program, summary["sft"])


# ---- raw trajectories, curated -------------------------------------------------------------------


def _curated(program: Program, summary: dict[str, Any]) -> None:
    """RUN/raw, from it RUN/curated; a cold start from each, that from the curated ones last."""
    from trainer.tasks.file import Demonstrations
    from trainer.tasks.glyphs.raw import write_raw

    log, config = program.log, program.config
    before = {name: weight.clone() for name, weight in program.vlm.model.state_dict().items()}
    with log.timed(summary, "raw_seconds"):
        log.say(f"{config.sft.demonstrations:,} raw trajectories, half of them flawed")
        raw = write_raw(program.folder / "raw", config.seed, config.sft.demonstrations)
    with log.timed(summary, "curate_seconds"):
        curated = _curate(raw, program.folder / "curated", config)
        summary["curation"] = json.loads((curated.parent / "summary.json").read_text())
    (program.folder / "uncurated").mkdir()
    with RunLog(program.folder / "uncurated", console=log.console) as other:
        other.config(config.to_dict())
        log.say("cold start from the raw trajectories, as they were recorded")
        with log.timed(summary, "sft_seconds"):
            program.sft(Demonstrations(raw, observations="recorded"), other)
        with log.timed(summary, "evaluate_seconds"):
            summary["uncurated"] = program.evaluate("sft_eval", log=other)
        other.summary({"seed": config.seed, "sft": summary["uncurated"], "status": "complete"})
    program.vlm.model.load_state_dict(before)
    program.world.refresh(program.played.model, program.vlm.model)
    log.say("cold start from the curated trajectories")
    with log.timed(summary, "sft_seconds"):
        program.sft(Demonstrations(curated, observations="recorded"))
    with log.timed(summary, "evaluate_seconds"):
        summary["sft"] = program.evaluate("sft_eval")
    log.table("cold start, raw and curated", summary["uncurated"], summary["sft"])


def _curate(raw: Path, folder: Path, config: Config) -> Path:
    """`metis curate sft --task glyphs` on the raw trajectories -> the dataset that it leaves."""
    tree = config.to_dict()
    tree["data"]["paths"] = [str(raw)]
    config = type(config).model_validate(tree)
    done = curate_cli.curate("sft", [str(raw)], config, folder)
    if done != curate_cli.DONE:
        raise KeyboardInterrupt
    return folder / "dataset.jsonl"


# ---- HDPO beside others --------------------------------------------------------------------------

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
            config = type(program.config).model_validate(tree)
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
