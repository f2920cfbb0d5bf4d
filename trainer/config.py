"""The settings of a run: pydantic models, one YAML file, `section.key=value` on the command line.

Unknown keys are errors that name the nearest valid one; the resolved settings are written to the
run folder.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from metis_kernels import HDPOConfig
from trainer.types import ConfigError

RECIPES = Path(__file__).parent / "recipes"
"""Settings for common machines; `--config NAME` takes a file of this folder without its suffix."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


CurateStage = Literal[
    "rules", "duplicates", "execute", "answer", "solvable", "pass_rate", "judge", "balance"
]
Beta = Annotated[float, Field(ge=0, lt=1)]


class LoraConfig(Section):
    """Adapters of low rank, in float32, on linear layers of the language model; all else is frozen.
    Models are saved with the adapters merged, so whatever loads them needs to know nothing."""

    rank: int = Field(32, ge=1)
    alpha: float = Field(64.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """For SFT alone: with dropout the logprobs of RL are noise, and the first ratio is not 1."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of layers, or their last parts ("q_proj"). null: every linear layer of the language
    model. The LM head is never one."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: the frozen linear layers of the language model in 4 bits (QLoRA), by bitsandbytes, which
    is made for CUDA; on a CPU it works, slowly."""


class ModelConfig(Section):
    path: str = "glyphs"
    """A local folder, a hub name, or "glyphs": the base model of the demo's task."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    device: str = "auto"
    """"auto": cuda where there is a GPU, else cpu."""
    freeze_vision: bool | None = None
    """Whether the vision tower and its merger stay as they are. null: yes, but for towers of less
    than 10 million parameters (the demo's, and what was trained from it), which learn with the
    rest."""
    checkpointing: Literal["none", "layers", "offload"] = "none"
    """What a layer leaves for its backward. none: all activations. layers: its input alone; the
    rest is computed again. offload: and that input lies in host memory."""
    lora: LoraConfig | None = None
    """null: all weights that are not frozen are trained."""

    @model_validator(mode="after")
    def _check(self):
        if self.lora is not None and self.freeze_vision is False:
            raise ValueError(
                "freeze_vision is false, but lora trains adapters of the language model alone; "
                "leave freeze_vision out, or lora"
            )
        return self


class OptimizerConfig(Section):
    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw: torch's, with states in float32, for float32 weights. adamw8bit: torchao's, a byte
    for each state, with stochastic rounding of bfloat16 weights."""
    offload_during_rollouts: bool = False
    """Whether the states lie in host memory while the policy plays."""


class DataConfig(Section):
    """Where `task: file` has its questions from; layouts are found out from the columns."""

    paths: tuple[str, ...] = ()
    """Files, folders or patterns of questions: parquet, JSONL or TSV."""
    heldout: tuple[str, ...] | None = None
    """Questions for evaluation; null: those of `paths` whose id's hash is in the lowest
    heldout_share, which are then not trained on."""
    heldout_share: float = Field(0.05, ge=0, lt=1)
    demonstrations: tuple[str, ...] | None = None
    """Recorded trajectories for the cold start; see sft.observations."""
    layout: str | None = None
    """null: from the columns."""
    max_bad: float = Field(0.05, ge=0, le=1)
    """Share of rows that may be unusable."""
    check_pixels: bool = False
    """Whether opening decodes every picture."""
    ids: Literal["stated", "content"] = "stated"
    """content: hashes, for files whose ids are not unique."""
    cache_bytes: int = Field(256 << 20, ge=1)


class ToolsConfig(Section):
    url: str | None = None
    """A tool server (`metis tools serve`) that plays the tools; null: they run here. Its token is
    read from METIS_TOOLS_TOKEN."""


class JudgeConfig(Section):
    """An OpenAI-compatible server that is asked where no rule decides whether an answer is right.
    What it cannot say is unscored, in no channel and in no count, and never 0."""

    base_url: str
    model: str
    key_variable: str | None = None
    """Environment variable that holds the key."""
    concurrency: int = Field(16, ge=1)
    timeout: float = Field(60.0, gt=0)
    images: bool = False
    max_calls: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_unscored: float = Field(0.1, ge=0, lt=1)
    """Share of the last `window` answers; past it the run saves and ends with exit code 75."""
    window: int = Field(100, ge=1)
    minimum: int = Field(20, ge=1)
    """Answers before that share is looked at."""
    audit: float = Field(0.0, ge=0, le=1)
    """Share of rule-decided answers that the judge is asked about as well, for judge.jsonl; it
    changes no grade."""
    cache: str = "runs/judge-cache"


class RewardConfig(Section):
    """A reward function of one's own in the place of rules and judge. Its number is r_ans, and must
    be in [0, 1]. A rollout for which it raises, takes too long or gives none (None, NaN, 1.5) is
    unscored, in no channel and in no count, and never 0."""

    function: str
    """"path/to/file.py:name" or "package.module:name"."""
    style: Literal["trl", "verl"] | None = None
    """trl: name(prompts, completions, **columns) -> a list. verl: name(data_source, solution_str,
    ground_truth, extra_info) -> a number, or a dict with a "score". null: by its parameters."""
    correct_at: float = Field(1.0, gt=0, le=1)
    """From which number on an answer counts as right: for accuracy, and for the tool channel, in
    which the right answers of a group compete."""
    timeout: float = Field(60.0, gt=0)
    """Seconds of one call."""


class AgentConfig(Section):
    """An OpenAI-compatible server whose model plays the questions in place of model.path."""

    base_url: str
    """Up to and including the version: http://localhost:8000/v1."""
    model: str
    key_variable: str | None = None
    """Environment variable that holds the key."""
    concurrency: int = Field(16, ge=1)
    """Trajectories at a time."""
    timeout: float = Field(120.0, gt=0)
    """Seconds of one request."""
    max_calls: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    """Of prompts and completions together."""
    forcing: Literal["prefill", "prompt"] = "prefill"
    """How a question is played with tools forbidden or forced. prefill: the wanted action is begun
    in the model's place, and it goes on from there (vLLM and SGLang can). prompt: a sentence behind
    the question asks for it."""
    extra: dict[str, Any] = {}
    """Further fields of every request, e.g. {top_p: 0.9}."""


class RolloutConfig(Section):
    max_turns: int = Field(4, ge=1)
    """Turns of the policy in a trajectory; one that needs more is truncated."""
    max_new_tokens: int = Field(32, ge=1)
    """Tokens of one turn."""
    max_tokens: int = Field(1024, ge=16)
    """Tokens of a trajectory, prompt and observations included."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling in training. The loss divides the logits by the same."""
    max_batch: int = Field(256, ge=1)
    """Sequences generated at once."""
    max_cache_bytes: int | None = Field(None, ge=1)
    """Of keys and values kept at once: so few trajectories are played at a time that they fit.
    null: max_batch alone decides."""
    cuda_graphs: bool = False
    """Whether the decoding step is captured once and replayed; for CUDA alone."""


class SFTConfig(Section):
    demonstrations: int = Field(2000, ge=1)
    """Trajectories of the cold start, played once."""
    observations: Literal["executed", "recorded"] = "executed"
    """executed: every call of a demonstration is made, with the real tools. recorded, for task
    file: what data.demonstrations say came back is shown and nothing runs; trajectories that are
    cut off or break the format are learnt from as far as they go."""
    direct_share: float = Field(0.06, ge=0, le=1)
    """Share of demonstrations, of the kinds that can be answered without a tool, that do so. With
    none at all there is nothing for RL to discover."""
    steps: int = Field(200, ge=0)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup: int = Field(10, ge=0)
    """Steps of linear warm-up; the rate then falls linearly to a tenth."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """Decay of the optimizer's two moments."""
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_batch_tokens: int = Field(16_384, ge=1)
    """Packed tokens of a micro-batch. The gradient does not depend on it."""


class _Loss(Section):
    logits_dtype: Literal["float32", "bfloat16"] | None = None

    def hdpo(self, temperature: float) -> HDPOConfig:
        """As the library wants it; the loss is at the temperature of sampling."""
        given = self.model_dump()
        dtype = given.pop("logits_dtype")
        dtype = None if dtype is None else getattr(torch, dtype)
        return HDPOConfig(**given, temperature=temperature, logits_dtype=dtype)

    @model_validator(mode="after")
    def _check(self):
        self.hdpo(1.0)
        return self


# Field by field what HDPOConfig is, so that names and defaults have one home. The temperature is
# rollout.temperature, a dtype is spelled as a word, and tool_norm has a default of its own: here,
# and not in RLConfig, so that a file that sets another field of the loss keeps it.
LossConfig = create_model(
    "LossConfig",
    __base__=_Loss,
    **{
        field.name: (
            get_type_hints(HDPOConfig)[field.name],
            "qualifying" if field.name == "tool_norm" else field.default,
        )
        for field in fields(HDPOConfig)
        if field.name not in ("temperature", "logits_dtype")
    },
)


class RLConfig(Section):
    steps: int = Field(100, ge=0)
    prompts: int = Field(8, ge=1)
    """Questions of a step."""
    group_size: int = Field(16, ge=1)
    """G: rollouts of a question."""
    resample: int = Field(0, ge=0)
    """Dynamic sampling: how many times in a step other questions are drawn in the place of groups
    that carry no signal (all right or all wrong with as many calls). 0: groups are taken as they
    come."""
    forced_calls: int = Field(0, ge=0)
    """Counterfactual rollouts: of a group, those whose first action is made a call. They bring back
    calls that were unlearned where they are needed."""
    forced_answers: int = Field(0, ge=0)
    """And those whose first action is made an answer. See trainer/selection.py."""
    updates: int = Field(1, ge=1)
    """Optimizer steps on the rollouts of a step; past the first the policy is off-policy and the
    clips are at work. Each takes its own share of the groups."""
    lr: float = Field(1e-4, gt=0)
    warmup: int = Field(3, ge=0)
    decay: float = Field(0.3, ge=0, le=1)
    """Share of the steps, at the end, over which the rate falls to a tenth."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the optimizer's two moments."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_batch_tokens: int = Field(16_384, ge=1)
    """Packed tokens of a micro-batch. The gradient does not depend on it."""
    reward: Literal["decoupled", "coupled"] = "decoupled"
    """decoupled: HDPO's two channels. coupled: one channel, r_acc + coupled_alpha / (T + 1)."""
    coupled_alpha: float = Field(0.5, ge=0)
    loss: LossConfig = LossConfig()
    """The loss of metis_kernels; w_tool = 0 is plain GRPO. tool_norm is not the reference's
    "signal": there the effective weight of the tool channel grows as fewer groups differ in their
    calls (0.3 to 0.7 in this task instead of 0.15), until guessing pays (LOG.md)."""

    @model_validator(mode="after")
    def _check(self):
        forced = self.forced_calls + self.forced_answers
        if forced and forced > self.group_size - 2:
            raise ValueError(
                f"{forced} forced rollouts leave {self.group_size - forced} of group_size "
                f"{self.group_size} to the policy; at least 2 must be its own"
            )
        return self


class EvaluateConfig(Section):
    questions: int = Field(600, ge=1)
    """Held-out questions, in the proportions of the task's mix."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    samples: int = Field(1, ge=1)
    """Trajectories of a question, of each way of playing it, in `metis eval`; more than one want a
    temperature."""


class CurateConfig(Section):
    """What `metis curate` does with raw data. A row is charged to the first stage that drops it."""

    stages: tuple[CurateStage, ...] | None = None
    """Which stages are asked for. sft: rules, duplicates, execute, answer, solvable, judge. rl:
    rules, duplicates, pass_rate, judge, balance. null: those that need no model; solvable and
    pass_rate where model.path or agent is set, and judge where judge is."""
    k: int = Field(8, ge=1)
    """Samples without tools of a question whose trajectory calls one, at rollout.temperature."""
    solvable_at: float = Field(1.0, gt=0, le=1)
    """Share of them that must be right for the question to need no tool: at 1 the model answers it
    safely (pass@k = 1, read as a rate), at 1 / k once in k is enough."""
    samples: int = Field(8, ge=2)
    """Samples with tools of a question for RL, which estimate its pass rate."""
    min_pass_rate: float = Field(0.0, ge=0, le=1)
    """A pass rate below is dropped, and one of 0 always: such a group has no advantage."""
    max_pass_rate: float = Field(1.0, ge=0, le=1)
    """And one above, and one of 1 always."""
    number_tolerance: float = Field(1e-4, ge=0)
    """Relative: by how much a number with a point in an executed observation may differ from the
    recorded one. White space and the reference's heads ("stdout:") do not count; all else does."""
    picture_bits: int = Field(8, ge=0, le=64)
    """Bits of the 64-bit perceptual hash in which an executed picture may differ, and ..."""
    picture_grey: float = Field(6.0, ge=0)
    """... grey levels of 255, as the root of the mean square at 16 x 16 pixels. Both must hold."""
    recovered: bool = True
    """Whether a call that fails as it failed when it was recorded may be mended by a later one."""
    trusted: tuple[str, ...] = ()
    """Tools whose recorded observations are taken as they are: of a search engine, for example."""
    duplicate_bits: int = Field(6, ge=0, le=64)
    """Two rows are duplicates where every picture differs by at most so many bits, and ..."""
    duplicate_grey: float = Field(2.5, ge=0)
    """... so many grey levels, ..."""
    duplicate_text: float = Field(0.9, gt=0, le=1)
    """... all numbers in the questions are the same, and their shingles of five characters have
    this Jaccard index or a higher one."""
    max_answer: int = Field(200, ge=1)
    """Characters of a known answer for RL; a longer one no rule can tell from a wrong one."""
    audited: int = Field(3, ge=1)
    """Different answers of a question for RL that the judge is asked about as well."""
    balance: float | None = Field(2.0, ge=1)
    """How many times its share among all rows an ability may have among those kept for RL; null: as
    many as it has."""
    max_unscored: float = Field(0.1, ge=0, lt=1)
    """Share of a stage's rows about which nobody could say; past it the run ends with exit code 75,
    to be run again."""
    sessions: int = Field(16, ge=1)
    """Trajectories that are executed at a time."""

    @model_validator(mode="after")
    def _check(self):
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate is {self.min_pass_rate} and max_pass_rate {self.max_pass_rate}: no "
                "row would be kept"
            )
        return self


class Config(Section):
    task: Literal["glyphs", "file"] = "glyphs"
    """glyphs: the demo's world. file: questions from `data`, answers graded by rules and `judge`,
    and the python tool."""
    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()
    judge: JudgeConfig | None = None
    reward: RewardConfig | None = None
    """null: answers are graded by rules, and by `judge`."""
    agent: AgentConfig | None = None
    tools: ToolsConfig = ToolsConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    rollout: RolloutConfig = RolloutConfig()
    sft: SFTConfig = SFTConfig()
    rl: RLConfig = RLConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    curate: CurateConfig = CurateConfig()

    @model_validator(mode="after")
    def _check(self):
        if self.task == "file" and not self.data.paths:
            raise ValueError("task is file, but data.paths names no file")
        if self.reward is not None and self.judge is not None:
            raise ValueError(
                "reward.function decides alone, so the judge would never be asked; leave out "
                "judge, or reward"
            )
        if self.task != "file" and self.sft.observations == "recorded":
            raise ValueError(
                f"sft.observations is recorded, but the task {self.task} has no recordings; set "
                "task=file and data.demonstrations"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Settings from a YAML file (None: the defaults) and `section.key=value` overrides. A path may
    be the bare name of a recipe: "tiny_cpu".

    Raises ConfigError for a file that is missing or no YAML mapping, an unknown key, or a value
    outside its type or limits.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        names = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        file = RECIPES / f"{path}.yaml" if str(path) in names else Path(path)
        try:
            tree = yaml.safe_load(file.read_text()) or {}
        except FileNotFoundError:
            raise ConfigError(
                f"no configuration file at {path}; the recipes are: {', '.join(names)}"
            ) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} must hold a mapping of settings, got {type(tree).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"expected section.key=value, got {override!r}")
        _put(tree, key.split("."), yaml.safe_load(value))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def check_path(path: str | Path) -> None:
    """Raises FileNotFoundError for a path (rather than a hub name) where there is no model."""
    local = isinstance(path, Path) or str(path).startswith((".", "/", "~")) or os.sep in str(path)
    folder = Path(path).expanduser()
    hub_name = str(path).count("/") == 1 and not folder.parent.exists()
    if local and not hub_name and not (folder / "config.json").exists():
        raise FileNotFoundError(f"no model at {path}: there is no config.json in such a folder")


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for depth, part in enumerate(path[:-1]):
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{'.'.join(path[: depth + 1])} is a value, not a section")
        tree = below
    tree[path[-1]] = value


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every valid dotted key."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or one or None
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += _keys(kind, f"{prefix}{name}.")
    return keys


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            valid = _keys(Config)
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
            same_leaf = [k for k in valid if k.rpartition(".")[2] == key.rpartition(".")[2]]
            lines.append(f"unknown setting {key!r}; did you mean {(same_leaf or near)[0]!r}?")
        else:
            lines.append(f"{key}: {problem['msg']}, got {problem['input']!r}")
    return "\n".join(lines)
