"""Reward functions of a user, as TRL or verl call them.

    def reward(prompts, completions, **columns) -> list[float]                            # TRL
    def compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float  # verl

TRL's is called once for many rows, may be async, and may return None for "does not apply"; verl's
is called once a row and may return a dict with a "score". Signatures: TRL's GRPO trainer and
verl's reward managers. Whatever a function does, a row has a number or is unscored.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import logging
import math
import numbers
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.types import Rollout, TrainingError

log = logging.getLogger(__name__)

Style = Literal["trl", "verl"]

_ROUNDING = 1e-6
"""By which a number that was computed in float32 may be past a bound."""

MAX_UNSCORED, WINDOW, MINIMUM = 0.9, 100, 20
"""Share of the last WINDOW rows that may be unscored once there are MINIMUM: past it a run learns
nothing."""
MAX_ABANDONED = 4
"""Calls of one function that may hang in threads of their own: these cannot be ended."""


@dataclass(frozen=True)
class RewardRow:
    """One rollout as reward functions see it."""

    prompt: Any
    """A text, or a list of messages."""
    completion: str
    """What the policy wrote, and nothing that a tool printed."""
    ground_truth: Any = None
    data_source: str = ""
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the dataset; TRL's functions get each as a list."""


@dataclass(frozen=True)
class UserReward:
    value: float | None
    """None: unscored."""
    reason: str = ""
    """Why it is."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The other numbers of a verl dict."""

    @property
    def cause(self) -> str:
        """The kind of its reason, to be counted by: "raised ValueError", of which there are few."""
        return self.reason.partition(":")[0]


def row_of(rollout: Rollout) -> RewardRow:
    """The row of a rollout: of its turns only what the policy wrote (the reference hands over what
    tools printed as well, which a policy can use). The ground truth is a list where there are
    several; further columns are the data's own, and `answer` and `solution` besides."""
    question = rollout.question
    truth = [question.answer, *question.also] if question.also else question.answer
    info = question.extra.get("extra_info") or {}
    about = {"id": question.id, "calls": rollout.calls, "status": rollout.status}
    return RewardRow(
        question.text,
        "\n".join(turn.text for turn in rollout.turns),
        truth,
        question.extra.get("data_source") or question.kind,
        {**info, **about},
        {
            **question.extra,
            "ground_truth": truth,
            "answer": truth,
            "solution": truth,
            "kind": question.kind,
            "options": dict(question.options),
            **about,
        },
    )


def load_function(spec: str) -> Callable[..., Any]:
    """The function of "package.module:function" or "path/to/file.py:function".

    ValueError for a spec of another form, a file or module that is not there or fails to import,
    and a name in it that is no function.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise ValueError(f"a reward function is module:function or file.py:function, got {spec!r}")
    try:
        if where.endswith(".py"):
            module = _module_of(Path(where))
        else:
            module = importlib.import_module(where)
    except (Exception, SystemExit) as error:  # the file is the user's: anything may happen in it
        raise ValueError(
            f"{where}, of the reward function {spec!r}, cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        )
        raise ValueError(
            f"{where} has no function {name!r}; its functions are: {', '.join(there) or 'none'}"
        )
    return function


def _module_of(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    name = f"metis_reward_{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"
    if name in sys.modules:  # two functions of a file share what it holds
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class RewardFunction:
    """A user's function as a function of rows.

    spec: see `load_function`, or the function itself. style: "trl" or "verl"; None: by the names of
    its parameters. timeout: seconds of one call (of a batch for TRL's, of a row for verl's); a call
    that takes longer is abandoned and its rows are unscored. Once MAX_ABANDONED calls hang the run
    cannot go on: TrainingError.

    A row is unscored where the function raises, returns None, NaN, a number outside of `bounds` or
    anything else that is no number, or, for TRL's, a list of another length. `counts` says how
    often, by cause. A parameter without a default that no row has is a TrainingError.

    The function runs in this process with the trainer's rights: it is the user's own code. It is no
    place for code that a policy wrote.
    """

    def __init__(
        self,
        spec: str | Callable[..., Any],
        *,
        style: Style | None = None,
        timeout: float = 60.0,
        bounds: tuple[float, float] | None = None,
        name: str | None = None,
    ):
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout must be positive and finite, got {timeout}")
        self.function = load_function(spec) if isinstance(spec, str) else spec
        fallback = spec if isinstance(spec, str) else getattr(spec, "__name__", type(spec).__name__)
        self.name = name or fallback
        self.timeout = timeout
        self.bounds = bounds
        self.counts: Counter[str] = Counter()
        self._parameters, self._required, self._any = _parameters(self.function)
        self.style: Style = style or self._guess()
        required = {"trl": ("completions",), "verl": ("solution_str", "ground_truth")}[self.style]
        if not self._any and not set(required) <= set(self._parameters):
            raise ValueError(
                f"{self.name} has the parameters {', '.join(self._parameters) or 'none'}; a reward "
                f"function in {self.style}'s style takes {', '.join(required)}"
            )
        self._recent: deque[UserReward] = deque(maxlen=WINDOW)
        self._abandoned: list[threading.Thread] = []
        self._told: set[str] = set()

    def __call__(self, rows: Sequence[RewardRow]) -> list[UserReward]:
        """One reward a row, in order."""
        if not rows:
            return []
        if self.style == "trl":
            rewards = self._batch(rows)
        else:
            rewards = [self._row(row) for row in rows]
        for reward in rewards:
            self.counts["scored" if reward.value is not None else "unscored"] += 1
        self._recent += rewards
        return rewards

    def check(self) -> None:
        """Raises TrainingError where hardly a row of the last ones has a reward."""
        missing = Counter(reward.reason for reward in self._recent if reward.value is None)
        if len(self._recent) >= MINIMUM and missing.total() > MAX_UNSCORED * len(self._recent):
            raise TrainingError(
                f"the reward function {self.name} gave no reward for {missing.total()} of the last "
                f"{len(self._recent)} rollouts: it {missing.most_common(1)[0][0]}. Nothing was "
                "counted as wrong. Mend the function and start again"
            )

    def _guess(self) -> Style:
        if "solution_str" in self._parameters:
            return "verl"
        if "completions" in self._parameters:
            return "trl"
        raise ValueError(
            f"{self.name} has neither a parameter completions (TRL) nor solution_str (verl); its "
            f"parameters are {', '.join(self._parameters) or 'none'}. Say style: trl or verl"
        )

    def _batch(self, rows: Sequence[RewardRow]) -> list[UserReward]:
        columns = {key: [row.columns.get(key) for row in rows] for key in _keys(rows)}
        prompts = [row.prompt for row in rows]
        talk = any(isinstance(prompt, list) for prompt in prompts)
        completions = [
            [{"role": "assistant", "content": row.completion}] if talk else row.completion
            for row in rows
        ]
        given = columns | {"prompts": prompts, "completions": completions}
        returned, reason = self._run(given)
        if not reason:
            if hasattr(returned, "tolist"):  # an array or a tensor
                returned = returned.tolist()
            if not isinstance(returned, (list, tuple)):
                reason = f"returned a {type(returned).__name__} instead of a list"
            elif len(returned) != len(rows):
                reason = f"returned too few or too many rewards: {len(returned)} for {len(rows)}"
        if reason:
            self._tell(reason)
            return [UserReward(None, reason)] * len(rows)
        return [self._checked(value) for value in returned]

    def _row(self, row: RewardRow) -> UserReward:
        given = {
            "data_source": row.data_source,
            "solution_str": row.completion,
            "ground_truth": row.ground_truth,
            "extra_info": dict(row.extra_info),
        }
        returned, reason = self._run(given)
        if reason:
            self._tell(reason)
            return UserReward(None, reason)
        if not isinstance(returned, Mapping):
            return self._checked(returned)
        if "score" not in returned:
            return self._checked(None, f"returned a dict without 'score': {sorted(returned)[:8]}")
        metrics = {str(k): _number(v) for k, v in returned.items() if k != "score"}
        kept = {key: value for key, value in metrics.items() if value is not None}
        checked = self._checked(returned["score"])
        return UserReward(checked.value, checked.reason, kept)

    def _checked(self, value: Any, reason: str = "") -> UserReward:
        number = _number(value)
        if number is not None and self.bounds is not None:
            low, high = self.bounds
            if low - _ROUNDING <= number <= high + _ROUNDING:
                number = min(max(number, low), high)
            else:
                reason = f"went out of bounds: {number:g} is not in {low:g} to {high:g}"
                number = None
        if number is None:
            known = value is None or isinstance(value, float)
            reason = reason or f"returned {'' if known else 'no number: '}{ascii(value)[:80]}"
            if value is not None or reason.startswith("returned a dict"):
                self._tell(reason)  # None is a function's good right
            return UserReward(None, reason)
        return UserReward(number)

    def _run(self, given: Mapping[str, Any]) -> tuple[Any, str]:
        """(what it returned, "") or (None, why not)."""
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        if len(self._abandoned) >= MAX_ABANDONED:
            raise TrainingError(
                f"{len(self._abandoned)} calls of the reward function {self.name} hang, each "
                f"past its {self.timeout:g} s. Nothing was counted as wrong. Mend it, or raise its "
                "timeout"
            )
        missing = [name for name in self._required if name not in given]
        if missing:  # no row will ever have them
            raise TrainingError(
                f"the reward function {self.name} needs {', '.join(missing)}; there are "
                f"{', '.join(sorted(given))}. Add the column, or give the parameter a default"
            )
        known = {k: v for k, v in given.items() if self._any or k in self._parameters}
        outcome: list[tuple[Any, str]] = []

        def call() -> None:
            try:
                returned = self.function(**known)
                if inspect.isawaitable(returned):
                    returned = asyncio.run(_awaited(returned))
                outcome.append((returned, ""))
            except BaseException as error:  # SystemExit as well: it is in a thread, and the user's
                text = ascii(str(error))[1:-1][:200]
                outcome.append((None, f"raised {type(error).__name__}: {text}"))

        # A daemon: one that hangs must not keep the program from ending.
        thread = threading.Thread(target=call, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(self.timeout)
        if outcome:
            return outcome[0]
        self._abandoned.append(thread)
        return None, f"took longer than {self.timeout:g} s"

    def _tell(self, reason: str) -> None:
        """In the log, once for each kind of failure; all are counted."""
        kind = UserReward(None, reason).cause
        self.counts[kind] += 1
        if kind not in self._told:
            self._told.add(kind)
            log.warning("the reward function %s %s; these rows are unscored", self.name, reason)


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _keys(rows: Sequence[RewardRow]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.columns))


def _parameters(function: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """(names that may be given by keyword, those of them that must, whether any other may be)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return [], [], True
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [parameter for parameter in parameters if parameter.kind in kinds]
    return (
        [parameter.name for parameter in named],
        [parameter.name for parameter in named if parameter.default is inspect.Parameter.empty],
        any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters),
    )


def _number(value: Any) -> float | None:
    """As a float; None for what is no finite number. True is 1, and a tensor or array of one
    element is that element."""
    if hasattr(value, "item") and not isinstance(value, numbers.Number):
        try:
            value = value.item()
        except (ValueError, RuntimeError):
            return None
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None
