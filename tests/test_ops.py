"""_ops.py: the operators inside torch.compile, and over a head that is cut over the vocabulary."""

from __future__ import annotations

import pytest
import torch
from tolerance import CONFIGS, assert_close, hdpo_problem, make_targets
from torch._dynamo.testing import CompileCounterWithBackend

from metis_kernels import (
    HDPOConfig,
    linear_cross_entropy,
    linear_hdpo_loss,
    linear_logprobs,
    logprobs,
)


def linear_hdpo(h, w, b, targets, config, **options):
    loss, stats = linear_hdpo_loss(h, w, targets, config, bias=b, **options)
    return loss, stats.logprob, stats.entropy, stats.clip_fraction_acc


def fused_logprobs(h, w, b, targets, config, **options):
    options |= dict(temperature=config.temperature, softcap=config.softcap)
    logprob, entropy = linear_logprobs(h, w, targets.label, targets.row, bias=b, **options)
    return (logprob.cos() + entropy.sin()).sum(), logprob, entropy


def cross_entropy(h, w, b, targets, config, **options):
    label = torch.where(targets.acc_advantage == 0, -100, targets.label)
    options |= dict(temperature=config.temperature, softcap=config.softcap)
    return (linear_cross_entropy(h, w, label, targets.row, bias=b, **options),)


def dense_logprobs(h, w, b, targets, config):
    logprob, entropy = logprobs((h @ w.t() + b)[targets.row], targets.label)
    return (logprob.cos() + entropy.sin()).sum(), logprob


OPERATORS = {f.__name__: f for f in (linear_hdpo, fused_logprobs, cross_entropy)}


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [linear_hdpo, dense_logprobs])
def test_compiles_whole_with_every_implementation(operator, device):
    compiles_whole_and_once(operator, "everything", device)


@pytest.mark.parametrize(
    ("operator", "config"),
    [(linear_hdpo, "sequence"), (fused_logprobs, "default"), (cross_entropy, "default")],
)
def test_compiles_whole(operator, config):
    compiles_whole_and_once(operator, config, "cpu")


def compiles_whole_and_once(operator, config, device):
    """In one graph, and once for every number of tokens."""
    torch._dynamo.reset()
    config = CONFIGS[config]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operator, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for count in (9, 13, 21):
        h, w, b, targets = hdpo_problem(7, count=count, bias=True, config=config, device=device)
        got, want = (f(h, w, b, targets, config) for f in (compiled, operator))
        first = first or counter.frame_count
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))
        pairs = (torch.autograd.grad(x[0], (h, w, b)) for x in (got, want))
        assert all(torch.equal(x, y) for x, y in zip(*pairs, strict=True))
    assert counter.frame_count == first, "compiled again for another number of tokens"


def test_the_operators_agree_with_their_fakes():
    # No token is left out: the NaN of such a token equals no other.
    h, w, b, t = hdpo_problem(bias=True, acc_advantage=torch.linspace(1, 2, 41))
    counts = (torch.tensor(9.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64))
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.metis_kernels.hdpo_sweep.default,
            (h, w, b, t.row, t.label, None, t.old_logprob, t.acc_advantage, t.tool_advantage, None,
             t.is_weight, *counts, 1.0, 0.15, 0.2, 0.2, 3.0, 0.0, 0.0, 1.0, None, None,
             [True, True, False], "torch", None, None, 1e-3, True),
        )  # fmt: skip
        torch.library.opcheck(
            torch.ops.metis_kernels.row_sweep.default,
            (h, w, None, t.row, t.label, t.acc_advantage, None, -100, 1.0, None, torch.float32,
             [True, False, False], "linear_logprobs", "torch", None, None, None, False),
        )  # fmt: skip
        logits = (h @ w.t())[t.row]
        sums = torch.ops.metis_kernels.logprobs(logits, t.label, 1.0, "torch")
        torch.library.opcheck(
            torch.ops.metis_kernels.logprobs.default, (logits, t.label, 1.0, "torch")
        )
        torch.library.opcheck(
            torch.ops.metis_kernels.logprobs_backward.default,
            (logits, t.label, *sums[1:], t.acc_advantage, None, 1.0, "torch"),
        )


# ---- a head that is cut over the vocabulary ------------------------------------------------------

RANKS, VOCAB = 2, 126


def inputs(config: HDPOConfig, silent: bool):
    h, w, b, targets = hdpo_problem(vocab=VOCAB, bias=True, config=config)
    if silent:
        zero = torch.zeros(41)
        targets = make_targets(41, 23, VOCAB, acc_advantage=zero, tool_advantage=zero)
    return h, w, b, targets


def whole(operator, config: HDPOConfig, silent: bool):
    h, w, b, targets = inputs(config, silent)
    values = operator(h, w, b, targets, config)
    return [x.detach() for x in values], torch.autograd.grad(values[0], (h, w, b))


HALVED = [
    ("linear_hdpo", "everything", False, "torch"),
    ("linear_hdpo", "default", False, "triton"),
    ("linear_hdpo", "default", True, "torch"),
    ("linear_hdpo", "sequence", False, "torch"),
    ("fused_logprobs", "everything", False, "triton"),
    ("cross_entropy", "softcap", False, "torch"),
]


def rank_of_two(rank: int, folder: str) -> None:
    """One of two processes, each with half of the head; leaves its results in files."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    for number, (operator, name, silent, impl) in enumerate(HALVED):
        config = CONFIGS[name]
        h, w, b, targets = inputs(config, silent)
        part = slice(rank * VOCAB // RANKS, (rank + 1) * VOCAB // RANKS)
        w, b = (x.detach()[part].requires_grad_() for x in (w, b))
        options = dict(impl=impl, process_group=torch.distributed.group.WORLD, chunk_bytes=15_000)
        options |= dict(grad_filter=0.0)
        values = OPERATORS[operator](h, w, b, targets, config, **options)
        grads = torch.autograd.grad(values[0], (h, w, b))
        torch.save(([x.detach() for x in values], grads), f"{folder}/{number}.{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    torch.multiprocessing.spawn(rank_of_two, (str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("number", range(len(HALVED)), ids=lambda n: "-".join(map(str, HALVED[n])))
def test_two_halves_of_a_head_are_one_head(number, halves):
    operator, config, silent, _ = HALVED[number]
    parts = [torch.load(halves / f"{number}.{rank}.pt") for rank in range(RANKS)]
    values, (d_hidden, d_weight, d_bias) = whole(OPERATORS[operator], CONFIGS[config], silent)
    for got, _ in parts:
        for x, y in zip(got, values, strict=True):
            assert torch.equal(x.isnan(), y.isnan())
            assert_close(x.nan_to_num(0), y.nan_to_num(0), 128)
    assert_close(parts[0][1][0], d_hidden, 128)
    for i, grad in ((1, d_weight), (2, d_bias)):
        assert_close(torch.cat([part[1][i] for part in parts]), grad, 128)
    for x, y in zip(parts[0][0], parts[1][0], strict=True):
        assert torch.equal(x.nan_to_num(0), y.nan_to_num(0)), "the ranks must not drift apart"
    assert torch.equal(parts[0][1][0], parts[1][1][0])
