"""_sweep.py: how chunks are cut, and how their products are added up."""

from __future__ import annotations

import pytest
import torch
from tolerance import grads, hdpo_problem

from metis_kernels import HDPOConfig, _sweep, linear_hdpo_loss
from metis_kernels._rows import Head
from metis_kernels._sweep import ROW_TILE, chunk_rows


def head(vocab, hidden=8, dtype=torch.float32):
    return Head(torch.empty(vocab, hidden, dtype=dtype, device="meta"))


@pytest.mark.parametrize("count", [1, 16, 17, 1000, 4097])
def test_chunks_are_whole_tiles_of_nearly_one_size(count):
    for chunk_bytes in (1, 64 * 997 * 4, 1 << 30):
        size = chunk_rows(count, head(997), chunk_bytes, copies=0)
        assert size % ROW_TILE == 0 and size >= ROW_TILE
        assert size <= max(chunk_bytes // (997 * 4), ROW_TILE)
        chunks = -(-count // size)
        assert chunks * size - count < chunks * ROW_TILE, "the last one is not a remnant"


def test_what_the_row_pass_copies_and_a_second_buffer_count():
    rows = [
        chunk_rows(10_000, head(1000), 16_000_000, copies, buffers)
        for copies, buffers in ((0, 1), (0, 2), (2, 1))
    ]
    assert rows == [3344, 2000, 1264]
    assert chunk_rows(1000, head(1000), 4_100_000, 0, buffers=2) == 1008, "one chunk, one buffer"


def test_a_head_that_learns_has_larger_chunks_on_the_cpu():
    large = head(151_936, 1024, torch.bfloat16)
    frozen, learning = (chunk_rows(4096, large, None, 0, learns=learns) for learns in (False, True))
    assert frozen * 151_936 * 2 <= 1 << 27 < learning * 151_936 * 2 <= 151_936 * 1024 * 2
    assert chunk_rows(1024, large, None, 0, learns=True) == 1024


def test_a_budget_of_nothing():
    with pytest.raises(ValueError, match="chunk_bytes must be > 0, got 0"):
        chunk_rows(10, head(10), 0, 0)


@pytest.mark.parametrize("chunk_bytes", [None, 127 * 2 * 16])
def test_d_weight_of_bf16_is_summed_in_blocks_in_fp32(chunk_bytes, monkeypatch):
    h, w, b, targets = hdpo_problem(64, 32, 127, 200, torch.bfloat16, bias=True)
    whole = grads(linear_hdpo_loss(h, w, targets, HDPOConfig(), bias=b)[0], h, w, b)
    monkeypatch.setattr(_sweep, "OUTER_ROWS", 50)
    monkeypatch.setattr(_sweep, "WIDENED_ROWS", 7)
    loss, _ = linear_hdpo_loss(h, w, targets, HDPOConfig(), bias=b, chunk_bytes=chunk_bytes)
    for one, other in zip(grads(loss, h, w, b), whole, strict=True):
        gap = (one.double() - other.double()).norm() / other.double().norm()
        assert one.dtype == torch.bfloat16 and gap < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_upstream_of_one_costs_no_copy_and_none_is_shared(dtype):
    h, w, _, targets = hdpo_problem(dtype=dtype)
    loss, _ = linear_hdpo_loss(h, w, targets, HDPOConfig())
    (once,) = torch.autograd.grad(loss, w, retain_graph=True)
    (again,) = torch.autograd.grad(loss, w, retain_graph=True)
    assert once.data_ptr() == again.data_ptr()
    loss.backward(retain_graph=True)
    w.grad.zero_()
    (third,) = torch.autograd.grad(loss, w)
    assert torch.equal(third, again) and third.abs().sum() > 0
