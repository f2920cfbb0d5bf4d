"""_impl.py: what runs, what does not, and the reason."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from metis_kernels import HDPOConfig, HDPOTargets, _impl, linear_hdpo_loss, linear_logprobs, status


@pytest.fixture
def registry(monkeypatch):
    """A registry of its own, with one operator that has two implementations."""
    monkeypatch.setattr(_impl, "_registry", {})
    monkeypatch.setattr(_impl, "_names", {})
    monkeypatch.setattr(_impl, "_announced", set())
    _impl.register("op", "torch", lambda: "plain")
    _impl.register(
        "op",
        "triton",
        lambda: "fast",
        lambda device, dtype: None if device.type == "cuda" else "needs a GPU",
    )


def test_auto_takes_the_first_that_can_run(registry):
    assert _impl.resolve("op", "auto", "cpu") == "torch"
    assert _impl.resolve("op", "auto", "cuda") == "triton"
    assert _impl.implementation("op", "auto", "cpu")() == "plain"


def test_auto_says_once_what_it_chose(registry, caplog):
    with caplog.at_level(logging.INFO, "metis_kernels"):
        for _ in range(3):
            _impl.resolve("op", "auto", "cpu")
        assert [r.getMessage() for r in caplog.records] == ["op on cpu: impl=auto chose torch"]
        _impl.resolve("op", "auto", "cuda")
        assert len(caplog.records) == 2


def test_a_named_one_runs_or_raises_with_the_reason(registry):
    assert _impl.resolve("op", "torch", "cuda") == "torch"
    with pytest.raises(RuntimeError, match='op: impl="triton" cannot run on cpu: needs a GPU'):
        _impl.resolve("op", "triton", "cpu")
    with pytest.raises(RuntimeError, match="not built"):
        _impl.resolve("op", "cpp", "cpu")


def test_unknown_names(registry):
    for call in (
        lambda: _impl.resolve("op", "cuda", "cpu"),
        lambda: _impl.resolve("nop", "torch", "cpu"),
        lambda: _impl.unavailable_reason("op", "auto"),
        lambda: _impl.register("op", "jax", print),
    ):
        with pytest.raises(ValueError, match="must be one of"):
            call()


def test_an_operator_may_have_names_of_its_own(registry):
    """In its own order, on a CPU too; the others keep theirs."""
    _impl.declare("attend", ("flash", "dense"))
    _impl.register("attend", "dense", lambda: "dense")
    _impl.register(
        "attend",
        "flash",
        lambda: "flash",
        lambda device, dtype, *, softcap=None: None if softcap is None else "no softcap",
    )
    assert _impl.names("attend") == ("flash", "dense") and _impl.names("op") == (
        "triton",
        "cpp",
        "torch",
    )
    assert _impl.resolve("attend", "auto", "cpu") == "flash"
    assert _impl.resolve("attend", "auto", "cpu", softcap=2.0) == "dense"
    assert _impl.implementation("attend", "auto", "cpu", softcap=2.0)() == "dense"
    with pytest.raises(RuntimeError, match='impl="flash" cannot run on cpu: no softcap'):
        _impl.resolve("attend", "flash", "cpu", softcap=2.0)
    with pytest.raises(ValueError, match=r"one of \('flash', 'dense'\), got 'torch'"):
        _impl.resolve("attend", "torch", "cpu")
    with pytest.raises(ValueError, match=r"one of \('flash', 'dense'\), got 'cpp'"):
        _impl.register("attend", "cpp", print)
    with pytest.raises(ValueError, match="got 'flash'"):
        _impl.resolve("op", "flash", "cpu")
    rows = [(r.operator, r.implementation) for r in status("cpu").rows]
    assert rows == [
        *(("op", name) for name in ("triton", "cpp", "torch")),
        ("attend", "flash"),
        ("attend", "dense"),
    ]


def test_nothing_can_run(monkeypatch):
    monkeypatch.setattr(_impl, "_registry", {})
    _impl.register("op", "cpp", print, lambda device, dtype: "no compiler")
    with pytest.raises(RuntimeError, match="no compiler"):
        _impl.resolve("op", "auto", "cpu")


def test_status_is_a_table_with_reasons():
    table = status("cpu")
    names = {r.operator for r in table.rows}
    assert names >= {"linear_hdpo_loss", "linear_logprobs", "linear_cross_entropy", "logprobs"}
    for r in table.rows:
        assert r.available == (not r.reason)
        assert (_impl.unavailable_reason(r.operator, r.implementation, "cpu") or "") == r.reason
    assert all(r.available for r in table.rows if r.implementation == "torch")
    text = str(table)
    assert text.startswith("on cpu:\noperator") and len(text.splitlines()) == len(table.rows) + 2
    assert status().device in ("cpu", "cuda")


def test_the_operators_obey_impl():
    h, w, label = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3).long()
    targets = HDPOTargets(None, label, None, torch.ones(3), torch.ones(3), 3, 3)
    for run in (
        lambda impl: linear_hdpo_loss(h, w, targets, HDPOConfig(), impl=impl),
        lambda impl: linear_logprobs(h, w, label, impl=impl),
    ):
        run("torch")
        if _impl.unavailable_reason("linear_logprobs", "triton", "cpu") is not None:
            with pytest.raises(RuntimeError, match="cannot run on cpu"):
                run("triton")
        with pytest.raises(ValueError, match="impl must be one of"):
            run("fastest")


def test_a_registered_row_pass_is_what_runs(monkeypatch):
    calls = []
    plain = _impl.implementation("linear_hdpo_loss", "torch", "cpu")

    def counting(*args):
        calls.append(args[0].shape)
        return plain.run(*args)

    monkeypatch.setitem(
        _impl._registry["linear_hdpo_loss"],
        "cpp",
        _impl._Entry(replace(plain, run=counting), lambda device, dtype: None),
    )
    targets = HDPOTargets(None, torch.zeros(3).long(), None, torch.ones(3), torch.ones(3), 3, 3)
    linear_hdpo_loss(torch.randn(3, 4), torch.randn(5, 4), targets, HDPOConfig())
    assert calls == [(3, 5)]
