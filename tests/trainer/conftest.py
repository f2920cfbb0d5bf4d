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


@pytest.fixture(scope="session")
def vlm():
    """The demo's base model. A test that trains must take `fresh_vlm`."""
    return _load()


@pytest.fixture
def fresh_vlm():
    return _load()


def _load():
    import torch

    from trainer.model import VisionLanguageModel
    from trainer.tasks import load_task

    return VisionLanguageModel.load(load_task("glyphs").base, torch.float32)
