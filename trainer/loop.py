"""An event loop of one's own, for plain code that waits for tools and servers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

CANCEL_SECONDS = 5.0
"""For what runs in the loop to give way to an interrupt."""
POLL_SECONDS = 0.1
"""How often `stopping` is looked at."""


class Loop:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs it to its end. What is interrupted is cancelled, and not resumed by a later run."""
        task = self._loop.create_task(coroutine)
        try:
            return self._loop.run_until_complete(task)
        except BaseException:
            task.cancel()
            for _ in range(3):  # a second KeyboardInterrupt may break off the loop again
                with contextlib.suppress(BaseException):
                    self._loop.run_until_complete(asyncio.wait({task}, timeout=CANCEL_SECONDS))
            raise

    def running(self) -> set[asyncio.Task[Any]]:
        """What has not come to its end: calls that would not be cancelled."""
        return asyncio.all_tasks(self._loop)

    def close(self) -> None:
        for task in self.running():
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


async def every(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All of them at once; where one raises, or this is cancelled, none of them goes on."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def all_done(
    coroutines: Iterable[Coroutine[Any, Any, None]], stopping: Callable[[], bool]
) -> bool:
    """All of them at once, and whether they came to their end before `stopping` was true. Where
    one raises, or this is cancelled or stopped, none of them goes on."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    pending = set(tasks)
    try:
        while pending:
            if stopping():
                return False
            done, pending = await asyncio.wait(
                pending, timeout=POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                task.result()
        return True
    finally:
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending, timeout=CANCEL_SECONDS)
        for task in tasks:  # the first error is raised; asyncio is not to complain of others
            if task.done() and not task.cancelled():
                task.exception()
