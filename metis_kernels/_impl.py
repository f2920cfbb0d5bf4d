"""Which implementation of an operator runs here, and why another does not.

An operator's file registers what it has; nothing is probed, and no CUDA is touched, before somebody
asks. A leaf: it imports torch and nothing of this package.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

IMPLEMENTATIONS = ("triton", "cpp", "torch")
"""In the order in which "auto" prefers them, of an operator that declares no others."""
CPU_IMPLEMENTATIONS = ("cpp", "torch")
"""The same on a CPU, where Triton is its interpreter: for tests, and only when it is named."""

_log = logging.getLogger("metis_kernels")
_registry: dict[str, dict[str, _Entry]] = {}
_names: dict[str, tuple[str, ...]] = {}
"""Of the operators that declare their own."""
_announced: set[tuple[str, str, str]] = set()


@dataclass(frozen=True)
class _Entry:
    function: Callable[..., Any]
    unavailable: Callable[..., str | None]


@dataclass(frozen=True)
class StatusRow:
    """One operator and implementation on one device."""

    operator: str
    implementation: str
    available: bool
    reason: str
    """Why it is not available; empty where it is."""


@dataclass(frozen=True)
class Status:
    """What runs on a device. Its str() is a table."""

    device: str
    rows: tuple[StatusRow, ...]

    def __str__(self) -> str:
        cells = [("operator", "impl", "available", "reason")]
        for r in self.rows:
            cells.append((r.operator, r.implementation, "yes" if r.available else "no", r.reason))
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in cells
        ]
        return "\n".join([f"on {self.device}:", *lines])


def declare(operator: str, names: tuple[str, ...]) -> None:
    """Gives an operator implementation names of its own, in the order in which "auto" prefers them
    on every device. Ahead of the first `register`."""
    _names[operator] = names


def names(operator: str) -> tuple[str, ...]:
    """What impl may be, without "auto"."""
    return _names.get(operator, IMPLEMENTATIONS)


def register(
    operator: str,
    implementation: str,
    function: Callable[..., Any],
    unavailable: Callable[..., str | None] = lambda *_, **__: None,
) -> None:
    """Adds (or replaces) an implementation. unavailable(device, dtype, **arguments) gives the
    reason, or None; a dtype of None asks about the device alone. Which arguments there are, all of
    them optional, is the operator's own affair: it passes them to `resolve`."""
    if implementation not in names(operator):
        raise ValueError(f"implementation must be one of {names(operator)}, got {implementation!r}")
    _registry.setdefault(operator, {})[implementation] = _Entry(function, unavailable)


def unavailable_reason(
    operator: str,
    implementation: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **arguments: Any,
) -> str | None:
    """Why an implementation cannot run on device (default: the one that this machine would use),
    dtype and the operator's arguments, or None where it can. Raises ValueError for names that do
    not exist."""
    if operator not in _registry:
        raise ValueError(f"operator must be one of {tuple(_registry)}, got {operator!r}")
    if implementation not in names(operator):
        raise ValueError(f"impl must be one of {names(operator)}, got {implementation!r}")
    entry = _registry[operator].get(implementation)
    if entry is None:
        return "not built: this version has no such implementation of the operator"
    return entry.unavailable(_device(device), dtype, **arguments)


def resolve(
    operator: str,
    impl: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **arguments: Any,
) -> str:
    """The name of the implementation to run.

    "auto" takes the first available of the operator's `names` (where it declares none, on a CPU of
    CPU_IMPLEMENTATIONS) and logs its choice once per process, operator and kind of device. A named
    one is returned, or RuntimeError says why it cannot run.
    """
    where = _device(device)
    if impl != "auto":
        reason = unavailable_reason(operator, impl, where, dtype, **arguments)
        if reason is not None:
            raise RuntimeError(f'{operator}: impl="{impl}" cannot run on {where}: {reason}')
        return impl
    preferred = names(operator)
    if where.type == "cpu" and operator not in _names:
        preferred = CPU_IMPLEMENTATIONS
    reasons = {
        name: unavailable_reason(operator, name, where, dtype, **arguments) for name in preferred
    }
    for name, reason in reasons.items():
        if reason is None:
            key = (operator, name, where.type)
            if key not in _announced:
                _announced.add(key)
                _log.info("%s on %s: impl=auto chose %s", operator, key[2], name)
            return name
    raise RuntimeError(f"{operator} has no implementation for {where}: {reasons}")


def implementation(
    operator: str,
    impl: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **arguments: Any,
) -> Callable[..., Any]:
    """The function that `resolve` names."""
    return _registry[operator][resolve(operator, impl, device, dtype, **arguments)].function


def status(device: torch.device | str | None = None) -> Status:
    """Every operator and implementation, with the reason where one cannot run on device."""
    rows = []
    for operator in _registry:
        for name in names(operator):
            reason = unavailable_reason(operator, name, device)
            rows.append(StatusRow(operator, name, reason is None, reason or ""))
    return Status(str(_device(device)), tuple(rows))


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
