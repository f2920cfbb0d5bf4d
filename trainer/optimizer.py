"""AdamW in little memory: which one a run takes, its step, and its states in host memory.

    optimizer = make_optimizer(vlm.model, config.optimizer, lr, betas, weight_decay)
    with states_on_host(optimizer):
        ...  # rollouts
    norm = optimizer_step(vlm.model, optimizer, lr, max_grad_norm)

A step of 1e-6 is far less than the spacing of bfloat16 numbers at the size of a weight, so rounding
to the nearest undoes it, every time. Stochastic rounding keeps it in expectation (torchao's
AdamW8bit); float32 weights keep it exactly (torch's AdamW). Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trainer.config import ConfigError, OptimizerConfig


def make_optimizer(
    model: torch.nn.Module,
    config: OptimizerConfig,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer of the parameters that require a gradient.

    adamw: torch's fused AdamW, states in the dtype of the weights. adamw8bit: torchao's, two states
    of a byte a weight (float32 where a tensor has fewer than 4,096 weights), bfloat16 weights
    rounded stochastically by the global random generator. Its first step compiles one kernel for
    every shape and dtype of parameter.

    Raises ConfigError (a ValueError) where no parameter requires a gradient, and for weights whose
    updates this optimizer would round away.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ConfigError(
            "no parameter of the model requires a gradient: there is nothing to train"
        )
    allowed = {torch.float32, torch.float64}
    if config.kind == "adamw8bit":
        allowed = {torch.float32, torch.bfloat16}
    refused = sorted(
        {str(p.dtype).removeprefix("torch.") for p in params if p.dtype not in allowed}
    )
    if refused:
        raise ConfigError(
            f"optimizer.kind={config.kind} would lose updates of {', '.join(refused)} weights to "
            "rounding: they are less than the spacing of such numbers; use "
            "optimizer.kind=adamw8bit with model.dtype=bfloat16 (stochastic rounding), or "
            "model.dtype=float32"
        )
    if config.kind == "adamw":
        return torch.optim.AdamW(params, lr, betas=betas, weight_decay=weight_decay, fused=True)
    return _adamw8bit()(
        params, lr, betas=betas, weight_decay=weight_decay, bf16_stochastic_round=True
    )


@lru_cache(maxsize=1)
def _adamw8bit() -> type[torch.optim.Optimizer]:
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ConfigError(
            f"optimizer.kind=adamw8bit needs torchao ({error}); pip install torchao, or use "
            "optimizer.kind=adamw with model.dtype=float32"
        ) from None

    class FloatStates(AdamW8bit):
        """torchao keeps the states that it does not quantise in the dtype of the weights. With
        beta2 = 0.999 a second moment in bfloat16 stops at a quarter of its value, since what each
        step adds is rounded away, and the steps become twice too long. Here they are float32;
        they are small.

        A quantised state poses as float32 too: posing as bfloat16 it loses that dtype in the view
        that a DTensor makes of it, and the compiled step of a sharded weight fails."""

        @staticmethod
        def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
            return OptimState8bit.zeros(p.shape, signed, block_size, p.device)

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            state = super()._new_buffer(p, signed)
            inner = state.to_local() if isinstance(state, DTensor) else state
            return state if is_traceable_wrapper_subclass(inner) else state.float()

    return FloatStates


def optimizer_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float
) -> Tensor:
    """Clips, steps and clears the gradients -> their norm before clipping, 0-d, over all ranks.

    A norm that is not finite changes nothing: weights and optimizer state stay as they were
    (clipping cannot rescue a NaN). The caller sees it in what is returned.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if torch.isfinite(norm):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's compiled step reads it from a tensor
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()


@contextmanager
def states_on_host(optimizer: torch.optim.Optimizer, enabled: bool = True) -> Iterator[None]:
    """Inside, the states of the optimizer lie in host memory (pinned where they come from a GPU)
    and their own memory is free; on the way out, whatever happened, they are back, bit for bit.

    Storages are emptied and filled again, so the tensors stay the same objects: sharded and
    quantised states (DTensor, tensor subclasses) need no case of their own. On a CPU this only
    moves them within host memory. Inside, a step or the state dict raises RuntimeError.
    """
    if not enabled:
        yield
        return
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in _plain(value):
                storage = tensor.untyped_storage()
                storages[storage._cdata] = (storage, tensor.device)

    def refuse(*_) -> None:
        raise RuntimeError("the states of the optimizer are in host memory; leave states_on_host")

    hooks = [
        optimizer.register_step_pre_hook(refuse),
        optimizer.register_state_dict_pre_hook(refuse),
    ]
    kept: list[tuple[torch.UntypedStorage, torch.device, Tensor]] = []
    try:
        for storage, device in storages.values():
            host = torch.empty(
                storage.nbytes(), dtype=torch.uint8, pin_memory=device.type == "cuda"
            )
            host.copy_(_bytes(storage, device), non_blocking=True)
            kept.append((storage, device, host))
        _wait(kept)
        for storage, _, _ in kept:
            storage.resize_(0)
        yield
    finally:
        for storage, device, host in kept:
            if storage.nbytes() == 0 and len(host):
                storage.resize_(len(host))
                _bytes(storage, device).copy_(host, non_blocking=True)
        _wait(kept)
        for hook in hooks:
            hook.remove()


def _plain(value: object) -> Iterator[Tensor]:
    """The tensors with memory of their own that a state is made of."""
    if isinstance(value, DTensor):
        yield from _plain(value.to_local())
    elif isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _wait(kept: list[tuple[torch.UntypedStorage, torch.device, Tensor]]) -> None:
    """Until the copies are done: memory must not be given away while it is being read."""
    for device in {device for _, device, _ in kept if device.type == "cuda"}:
        torch.cuda.synchronize(device)
