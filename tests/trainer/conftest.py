import asyncio

import pytest


@pytest.fixture(scope="session")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def run(loop):
    """Runs a coroutine to its end, on one loop for the whole session: pools live on a loop."""
    return loop.run_until_complete
