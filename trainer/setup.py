"""From settings to what a run is made of: its task, its grader, the folder of its model.

What is wrong with the settings is said before any work is done.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.log import RunLog
from trainer.types import ConfigError

if TYPE_CHECKING:  # they take seconds to import, and a wrong flag is to be answered at once
    from trainer.config import AgentConfig, Config, JudgeConfig
    from trainer.engines.hf import HFEngine
    from trainer.engines.remote import RemoteAgent
    from trainer.grade import Grader
    from trainer.model import VisionLanguageModel
    from trainer.openai_client import OpenAIClient
    from trainer.rollout import Limits
    from trainer.tasks import Task
    from trainer.tools import Toolbox


def start(config: Config) -> None:
    """Before anything is loaded."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(config.seed)


def check_sizes(config: Config) -> None:
    """The longest trajectory must fit into one micro-batch: better said now than after rollouts."""
    longest = config.rollout.max_tokens
    for name, section in (("sft", config.sft), ("rl", config.rl)):
        if section.max_batch_tokens < longest:
            raise ConfigError(
                f"rollout.max_tokens is {longest} but {name}.max_batch_tokens is "
                f"{section.max_batch_tokens}: a trajectory would not fit into one micro-batch; "
                f"raise {name}.max_batch_tokens or lower rollout.max_tokens"
            )


def model_path(config: Config) -> str | Path:
    if config.model.path != "glyphs":
        return config.model.path
    if config.task != "glyphs":
        raise ConfigError(
            f"task {config.task} brings no model: set model.path to a folder or a hub name"
        )
    from trainer.tasks import load_task

    return load_task("glyphs").base


def load_model(
    config: Config, path: str | Path, log: RunLog, **training: Any
) -> VisionLanguageModel:
    """The model of a folder or hub name, on the device of the settings. training: see
    VisionLanguageModel.load."""
    import torch

    from metis_kernels.adapters.hf import apply_liger
    from trainer.model import VisionLanguageModel

    device = config.model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    vlm = VisionLanguageModel.load(path, config.model.dtype, device, **training)
    try:
        apply_liger(vlm.model)
    except ImportError:
        log.say("liger-kernel is not installed (pip install '.[gpu]'): transformers' own layers")
    return vlm


def make_engine(config: Config, vlm: VisionLanguageModel, temperature: float) -> HFEngine:
    from trainer.engines.hf import HFEngine

    one = config.rollout
    return HFEngine(
        vlm,
        temperature=temperature,
        max_batch=one.max_batch,
        max_cache_bytes=one.max_cache_bytes,
        cuda_graphs=one.cuda_graphs,
    )


def make_limits(config: Config) -> Limits:
    from trainer.rollout import Limits

    one = config.rollout
    return Limits(one.max_turns, one.max_new_tokens, one.max_tokens)


def make_task(config: Config, log: RunLog) -> Task:
    from trainer.tasks import load_task

    if config.task != "file":
        return load_task(config.task)
    from trainer.data import Checks

    given = config.data.model_dump()
    checks = Checks(
        max_bad=given.pop("max_bad"), pixels=given.pop("check_pixels"), ids=given.pop("ids")
    )
    try:
        task = load_task("file", checks=checks, observations=config.sft.observations, **given)
    except ValueError as error:  # of the files: DataError
        raise ConfigError(str(error)) from None
    log.say(task.summary())
    return task


def make_toolbox(config: Config, task: Task) -> Toolbox:
    """The task's tools, here or on a server. Raises ConfigError for a URL that is none, and where
    this machine has no sandbox for Python."""
    from trainer.tools.sandbox import SandboxError

    try:
        if config.tools.url is None:
            return task.toolbox()
        from trainer.tools.client import RemoteToolbox

        return RemoteToolbox(config.tools.url)
    except (ValueError, SandboxError) as error:
        raise ConfigError(str(error)) from None


def make_grader(config: Config, folder: Path) -> Grader | None:
    """What grades answers: for the demo its own rule alone."""
    if config.task == "glyphs" and config.judge is None and config.reward is None:
        return None
    from trainer.grade import Grader

    if config.reward is not None:
        from trainer.reward_functions import RewardFunction

        own = config.reward
        try:
            function = RewardFunction(
                own.function, style=own.style, timeout=own.timeout, bounds=(0.0, 1.0)
            )
        except ValueError as error:
            raise ConfigError(f"reward.function: {error}") from None
        return Grader(function=function, correct_at=own.correct_at, seed=config.seed)
    if config.judge is None:
        return Grader(seed=config.seed)
    from trainer.json_cache import JsonCache
    from trainer.judge import Judge

    one = config.judge
    judge = Judge(
        make_client(one, "judge"),
        cache=JsonCache(one.cache),
        images=one.images,
        window=one.window,
        minimum=one.minimum,
        max_unscored=one.max_unscored,
    )
    return Grader(judge, audit=one.audit, journal=folder / "judge.jsonl", seed=config.seed)


def make_client(section: JudgeConfig | AgentConfig, name: str) -> OpenAIClient:
    """The client of a server; name: of its section of the settings."""
    from trainer.openai_client import Budget, OpenAIClient

    variable = section.key_variable
    key = None if variable is None else os.environ.get(variable)
    if variable is not None and not key:
        raise ConfigError(f"{name}.key_variable is {variable}, which is not set")
    try:
        return OpenAIClient(
            section.base_url,
            section.model,
            api_key=key,
            concurrency=section.concurrency,
            timeout=section.timeout,
            budget=Budget(max_calls=section.max_calls, max_tokens=section.max_tokens),
        )
    except ValueError as error:
        raise ConfigError(f"{name}.{error}") from None


def make_remote_agent(
    config: Config, toolbox: Toolbox | None, grader: Grader | None, temperature: float
) -> RemoteAgent:
    """The agent of the section `agent`; it owns the toolbox. It has not been asked anything yet:
    see RemoteAgent.check."""
    if config.agent is None:
        raise ConfigError("no agent is set: give agent.base_url and agent.model")
    from trainer.engines.remote import RemoteAgent

    one = config.agent
    try:
        return RemoteAgent(
            make_client(one, "agent"),
            toolbox,
            make_limits(config),
            grader,
            forcing=one.forcing,
            temperature=temperature,
            extra=one.extra,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_model(config: Config) -> None:
    from trainer.config import check_path

    check_path(model_path(config))
