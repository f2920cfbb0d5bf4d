"""What every test gets: a seed, memory that bites, and the devices of this machine."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anybody imports a kernel: without a GPU they run in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from metis_kernels import _impl, _triton  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _poisoned(make):
    def empty(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return empty


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Uninitialised memory is NaN, whoever asks for it in Python."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


_DEVICES = {
    "cpu": ("cpu", ("cpp", "torch")),
    "cpu-torch": ("cpu", ("torch",)),
    "interpreter": ("cpu", ("triton", "torch")),
    "cuda": ("cuda", ("triton", "cpp", "torch")),
    "cuda-torch": ("cuda", ("torch",)),
}
"""What is under test -> where its tensors are, and what impl="auto" prefers there."""


@pytest.fixture(
    params=[pytest.param(n, marks=[pytest.mark.gpu] * n.startswith("cuda")) for n in _DEVICES]
)
def device(request, monkeypatch):
    """Every path of this machine in turn, by way of impl="auto"; -> the device of its tensors.

    "interpreter" runs the Triton kernels on CPU tensors. The GPU's tests carry the marker `gpu`
    and are skipped without one.
    """
    device, preferred = _DEVICES[request.param]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "interpreter":
        reason = _triton.unavailable(torch.device("cpu"))
        if reason is not None:
            pytest.skip(reason)
    constant = "CPU_IMPLEMENTATIONS" if device == "cpu" else "IMPLEMENTATIONS"
    monkeypatch.setattr(_impl, constant, preferred)
    return device
