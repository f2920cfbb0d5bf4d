"""_varlen.py: the code around the flash kernels of a GPU, on a peer in plain torch."""

from __future__ import annotations

import pytest
import torch
import varlen_peer
from attention import BITS16, BITS64, LAYOUTS, RAGGED, assert_exact, make, values
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_kernels import _impl, _varlen
from metis_kernels._layout import PrefixLayout
from metis_kernels.prefix_attention import OPERATOR, shared_prefix_attention


@pytest.fixture(params=["aten", "aten, padded LSE", "flash-attn 2.6.3", "flash-attn 2.8.3"])
def peer(request, monkeypatch):
    """-> the name of the implementation that runs on the peer, for float64 CPU tensors."""
    monkeypatch.setattr(_varlen, "_flash_device", lambda device: None)
    monkeypatch.setattr(_varlen, "FLASH_DTYPES", (BITS64,))
    if request.param.startswith("aten"):
        entry = _impl._Entry(lambda device: _varlen.ON_CUDA, lambda *_, **__: None)
        monkeypatch.setitem(_impl._registry[OPERATOR], "torch", entry)
        library = varlen_peer.in_aten(pad=3 if "padded" in request.param else None)
        yield "torch"
        library._destroy()
        return
    monkeypatch.setattr(_varlen, "_flash_attn", _varlen._flash_attn.__wrapped__)
    varlen_peer.as_flash_attn(monkeypatch, request.param.split()[1])
    yield "flash_attn"


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 2, 6, 40])
def test_calls_of_variable_length(name, window, peer):
    layout = LAYOUTS[name]
    assert_exact(layout, *make(layout, BITS64, (4, 2), 8), impl=peer, window=window)
    if peer == "flash_attn":
        made = make(layout, BITS64, (4, 2), 8)
        assert_exact(layout, *made, impl=peer, window=window, softcap=2.0)


def test_calls_of_variable_length_on_strided_inputs(peer, monkeypatch):
    """[1, H, T, D] transposed, as transformers gives it, is read where it lies, the responses of
    one group, too; what flash cannot read is copied."""
    addresses = []
    kernel = varlen_peer.forward

    def spy(q, k, v, *rest):
        addresses.append([x.data_ptr() for x in (q, k, v)])
        return kernel(q, k, v, *rest)

    monkeypatch.setattr(varlen_peer, "forward", spy)
    layout = LAYOUTS["one group"]
    *made, up = make(layout, BITS64, (4, 2), 8)
    held = [x.detach().transpose(0, 1).contiguous()[None] for x in made]
    views = [x.transpose(1, 2)[0] for x in held]
    assert_exact(layout, *(x.requires_grad_() for x in views), up.mT.contiguous().mT, impl=peer)
    prefix = layout.prefixes[0]
    assert addresses[0] == [x.data_ptr() for x in held]
    assert addresses[1] == [views[0][prefix:].data_ptr(), *addresses[0][1:]]
    apart = [x.detach().mT.contiguous().mT.requires_grad_() for x in made]
    assert_exact(layout, *apart, torch.ones(()).expand(up.shape), impl=peer)
    unaligned = [torch.zeros(x.numel() + 1, dtype=BITS64)[1:].view(x.shape) for x in made]
    for x, value in zip(unaligned, made, strict=True):
        x.copy_(value.detach())
    assert_exact(layout, *(x.requires_grad_() for x in unaligned), up, impl=peer)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.lists(st.integers(0, 6), min_size=1, max_size=4)),
        max_size=4,
    ),
    st.one_of(st.none(), st.integers(1, 12)),
)
def test_any_layout_in_calls_of_variable_length(groups, window):
    layout = PrefixLayout(tuple(p for p, _ in groups), tuple(tuple(r) for _, r in groups))
    with pytest.MonkeyPatch.context() as patch:
        entry = _impl._Entry(lambda device: _varlen.ON_CUDA, lambda *_, **__: None)
        patch.setitem(_impl._registry[OPERATOR], "torch", entry)
        library = varlen_peer.in_aten()
        try:
            made = make(layout, BITS64, (2, 1), 8)
            assert_exact(layout, *made, impl="torch", window=window)
        finally:
            library._destroy()


def test_flash_attn_is_deterministic_where_torch_is_to_be(monkeypatch):
    monkeypatch.setattr(_varlen, "_flash_device", lambda device: None)
    monkeypatch.setattr(_varlen, "_flash_attn", _varlen._flash_attn.__wrapped__)
    asked = varlen_peer.as_flash_attn(monkeypatch, "2.8.3")
    made = make(RAGGED, BITS16, head_dim=8)
    values(shared_prefix_attention, *made, RAGGED)  # auto
    torch.use_deterministic_algorithms(True)
    try:
        values(shared_prefix_attention, *made, RAGGED)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, False, True, True]


@pytest.mark.parametrize("version", ["2.5.9", "3.0.0", "4.0.0b1"])
def test_unknown_versions_of_flash_attn_say_so(version, monkeypatch):
    varlen_peer.as_flash_attn(monkeypatch, version)
    assert version in _varlen._flash_attn.__wrapped__()[2]
