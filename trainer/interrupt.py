"""Ctrl-C and SIGTERM: once to end in order, twice to end at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def never() -> bool:
    """Where nothing can ask to stop."""
    return False


@contextmanager
def stop_requests(on_first: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Yields what says whether it was asked to stop. on_first: what is done at once, then.

    A second time is a KeyboardInterrupt. Works in the main thread alone.
    """
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        on_first()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
