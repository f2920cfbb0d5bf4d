"""Updates of 1e-6 that arrive, states that come back, and the step that refuses a NaN."""

from __future__ import annotations

import socket

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.config import OptimizerConfig
from trainer.optimizer import _plain, make_optimizer, optimizer_step, states_on_host

LR, STEPS = 1e-6, 200
BOTH = ("adamw", "adamw8bit")
DTYPE = {"adamw": torch.float32, "adamw8bit": torch.bfloat16}


class Weights(nn.Module):
    """A matrix, whose states torchao quantises, and a vector, whose states it does not. Sizes are
    those of trained weights, exact in bfloat16."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> nn.Parameter:
            size = 0.01 + 0.04 * torch.rand(shape, generator=generator)
            sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
            return nn.Parameter((size * sign).bfloat16().to(dtype))

        self.matrix = weights(256, 256)
        self.vector = weights(2048)

    def values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.parameters()]

    def pull(self, scale: float = 1.0) -> None:
        """Gradients of a constant sign."""
        for p in self.parameters():
            p.grad = torch.full_like(p, scale)


def made(kind: str, weights: nn.Module, betas=(0.9, 0.999), weight_decay=0.0):
    return make_optimizer(weights, OptimizerConfig(kind=kind), LR, betas, weight_decay)


def displacement(weights: Weights, optimizer: torch.optim.Optimizer) -> list[float]:
    """Mean displacement, in float64, of matrix and vector after STEPS steps."""
    torch.manual_seed(0)
    before = weights.values()
    for step in range(STEPS):
        # Of one sign, but not of one size: the moments have something to forget.
        weights.pull(1e-3 * (1 + step % 3))
        optimizer.step()
    pairs = zip(weights.values(), before, strict=True)
    return [(now.double() - then.double()).mean().item() for now, then in pairs]


def test_weights_in_bfloat16_move_at_1e_6_as_float32_ones_do():
    exact = Weights(torch.float32)
    expected = displacement(exact, made("adamw", exact))
    # The direction of every step is -1 to within how Adam weighs gradients of unlike size.
    assert all(0.8 < moved / (-LR * STEPS) < 1.2 for moved in expected)
    rounded = Weights(torch.bfloat16)
    nearest = torch.optim.AdamW(rounded.parameters(), LR, betas=(0.9, 0.999), weight_decay=0.0)
    assert displacement(rounded, nearest) == [0.0, 0.0]
    weights = Weights(torch.bfloat16)
    actual = displacement(weights, made("adamw8bit", weights))
    # 0.02 of a spacing of 2^-12 a step: the vector's mean is uncertain by 2 %, the matrix's by 0.4.
    for moved, wanted in zip(actual, expected, strict=True):
        assert moved == pytest.approx(wanted, rel=0.1)


def test_a_small_tensor_takes_steps_of_the_right_length():
    """3,000 of them: in bfloat16 the second moment of what is not quantised stops early."""
    from torchao.optim import AdamW8bit

    def moved(make) -> float:
        weights = Weights(torch.bfloat16)
        weights.matrix.requires_grad_(False)
        optimizer, before = make(weights), weights.vector.detach().double()
        torch.manual_seed(0)
        for _ in range(3000):
            weights.vector.grad = torch.full_like(weights.vector, 1e-3)
            optimizer.step()
        return (weights.vector.detach().double() - before).mean().item() / (3000 * -LR)

    assert moved(lambda weights: made("adamw8bit", weights)) == pytest.approx(1, rel=0.02)
    alone = dict(lr=LR, betas=(0.9, 0.999), weight_decay=0.0, bf16_stochastic_round=True)
    assert moved(lambda weights: AdamW8bit([weights.vector], **alone)) > 1.3


def test_a_seed_gives_the_same_weights():
    def run(seed: int) -> list[torch.Tensor]:
        weights = Weights(torch.bfloat16)
        optimizer = made("adamw8bit", weights)
        torch.manual_seed(seed)
        for _ in range(5):
            weights.pull()
            optimizer.step()
        return weights.values()

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("kind", BOTH)
def test_only_what_needs_a_gradient_is_optimized(kind):
    weights = Weights(DTYPE[kind])
    weights.vector.requires_grad_(False)
    groups = made(kind, weights).param_groups
    assert [p is weights.matrix for group in groups for p in group["params"]] == [True]
    weights.matrix.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        made(kind, weights)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("adamw", torch.bfloat16), ("adamw", torch.float16), ("adamw8bit", torch.float16)],
)
def test_weights_whose_updates_would_vanish_are_refused(kind, dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ValueError, match=f"{kind} would lose updates of {name} .*adamw8bit.*float32"
    ):
        made(kind, Weights(dtype))


@pytest.mark.parametrize("kind", BOTH)
def test_states_that_are_not_quantised_are_float32(kind):
    weights = Weights(DTYPE[kind])
    optimizer = made(kind, weights)
    weights.pull()
    optimizer.step()
    assert optimizer.state[weights.vector]["exp_avg_sq"].dtype == torch.float32
    plain = [t for v in optimizer.state[weights.matrix].values() for t in _plain(v)]
    per_weight = sum(t.untyped_storage().nbytes() for t in plain) / weights.matrix.numel()
    assert per_weight < 2.1 if kind == "adamw8bit" else 8 <= per_weight < 8.1


@pytest.mark.parametrize("kind", BOTH)
def test_states_come_back_from_the_host_bit_for_bit(kind):
    weights, straight = Weights(DTYPE[kind]), Weights(DTYPE[kind])
    optimizers = [made(kind, weights), made(kind, straight)]
    for model, optimizer in zip((weights, straight), optimizers, strict=True):
        torch.manual_seed(3)
        for step in range(4):
            model.pull(1.0 + step)
            if model is weights:
                state = [t for s in optimizer.state.values() for v in s.values() for t in _plain(v)]
                before = [t.clone() for t in state]
                with states_on_host(optimizer):
                    assert all(t.untyped_storage().nbytes() == 0 for t in state)
                assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
            optimizer.step()
    # Six tensors a quantised parameter (codes, scale, map of each moment), and the step counts.
    assert len(state) == (6 + 2 + 2 if kind == "adamw8bit" else 4 + 2)
    pairs = zip(weights.values(), straight.values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_states_on_the_host_are_out_of_reach_and_come_back_after_an_error():
    weights = Weights(torch.float32)
    optimizer = made("adamw", weights)
    weights.pull()
    optimizer.step()
    before = optimizer.state[weights.matrix]["exp_avg"].clone()
    with pytest.raises(KeyboardInterrupt), states_on_host(optimizer):
        with pytest.raises(RuntimeError, match="leave states_on_host"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="leave states_on_host"):
            optimizer.state_dict()
        raise KeyboardInterrupt
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before)
    optimizer.step()
    with states_on_host(optimizer, enabled=False):
        optimizer.step()


@pytest.mark.parametrize("kind", BOTH)
def test_a_step_clips_sets_the_rate_and_clears(kind):
    weights = Weights(DTYPE[kind])
    optimizer = made(kind, weights, betas=(0.0, 0.0))
    before = weights.values()
    weights.pull(2.0)
    norm = optimizer_step(weights, optimizer, 1e-2, 1.0)
    count = sum(p.numel() for p in weights.parameters())
    assert norm.item() == pytest.approx(2.0 * count**0.5, rel=1e-2)
    # Without memory Adam's step is the rate, whatever the size of the gradient.
    for now, then in zip(weights.values(), before, strict=True):
        assert (now.double() - then.double()).mean().item() == pytest.approx(-1e-2, rel=1e-2)
    assert all(p.grad is None for p in weights.parameters())
    # What the clip left is in the moments: the gradients had a norm of 1 together.
    squares = [optimizer.state[p]["exp_avg"] for p in weights.parameters()]
    squares = [s.dequantize() if hasattr(s, "dequantize") and s.ndim == 2 and kind == "adamw8bit"
               else s for s in squares]  # fmt: skip
    assert sum(s.double().square().sum() for s in squares).sqrt().item() == pytest.approx(1, 1e-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", BOTH)
def test_a_norm_that_is_not_finite_changes_nothing(kind, bad):
    weights = Weights(DTYPE[kind])
    optimizer = made(kind, weights)
    weights.pull()
    optimizer_step(weights, optimizer, 1e-3, 1.0)
    before = weights.values()
    states = [t.clone() for s in optimizer.state.values() for v in s.values() for t in _plain(v)]
    weights.pull()
    weights.matrix.grad[3, 5] = bad
    norm = optimizer_step(weights, optimizer, 1e-3, 1.0)
    assert not torch.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), before, strict=True))
    after = [t for s in optimizer.state.values() for v in s.values() for t in _plain(v)]
    assert all(torch.equal(a, b) for a, b in zip(after, states, strict=True))
    assert all(p.grad is None for p in weights.parameters())


@pytest.fixture
def mesh():
    """A process group of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", BOTH)
def test_sharded_parameters_take_the_same_steps(kind, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    def run(sharded: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        weights = Weights(DTYPE[kind])
        if sharded:
            for name, p in list(weights.named_parameters()):
                setattr(weights, name, nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)])))
        optimizer = made(kind, weights)
        torch.manual_seed(5)
        for _ in range(3):
            weights.pull()
            with states_on_host(optimizer):
                pass
            norm = optimizer_step(weights, optimizer, 1e-3, 1.0)
        assert not isinstance(norm, DTensor)
        values = weights.values()
        return [v.full_tensor() if isinstance(v, DTensor) else v for v in values], norm

    (plain, norm), (sharded, sharded_norm) = run(False), run(True)
    assert torch.equal(norm, sharded_norm)
    assert all(torch.equal(a, b) for a, b in zip(plain, sharded, strict=True))
