"""One process or many: who plays and computes what, and how weights are kept together.

    torchrun --nproc-per-node 8 -m trainer rl --name big ...

Each rank plays a share of the questions. Then every rank knows every rollout, packs them all in the
same way and computes every size-th micro-batch, so that ranks have like work. The weights are
sharded by FSDP2; rollouts are played on a plain copy of them, because sharded weights would make
ranks wait for one another at every token. With LoRA the base is whole on every rank and the
adapters' gradients are summed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

T = TypeVar("T")


class World:
    """The processes of a run. Of a single one every method is the identity."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    # ---- values -------------------------------------------------------------------------------

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's contiguous part of what every rank has; parts differ by at most one."""
        start, stop = (len(items) * r // self.size for r in (self.rank, self.rank + 1))
        return items[start:stop]

    def gather(self, part: Sequence[T]) -> list[T]:
        """Everybody's parts, one behind the other: what `share` took apart. The values travel
        pickled, so each rank has objects of its own."""
        if self.size == 1:
            return list(part)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(part))
        return [item for one in parts for item in one]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks of a tensor, in its own dtype."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def any(self, value: bool) -> bool:
        """Whether it holds on some rank."""
        return bool(self.sum(torch.tensor(int(value), device=_device())))

    def broadcast(self, value: T) -> T:
        """The main process's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=_device())
        return box[0]

    # ---- weights ------------------------------------------------------------------------------

    def shard(self, model: nn.Module) -> nn.Module:
        """Shards a model in place over the ranks, layer by layer; the rest, head and vision tower
        among it, is one unit that stays gathered from forward to backward.

        A model with adapters stays whole: its base is frozen and its adapters are small.
        """
        if self.size == 1 or _adapted(model):
            return model
        from metis_kernels.adapters.hf import decoder  # transformers takes seconds to import

        mesh = init_device_mesh(_device().type, (self.size,))
        for layer in decoder(model).layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh, reshard_after_forward=False)

    def replica(self, model: nn.Module) -> nn.Module:
        """A plain copy of a model that is about to be sharded, to play rollouts on; of a model that
        stays whole, itself."""
        if self.size == 1 or _adapted(model):
            return model
        return copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def refresh(self, replica: nn.Module, model: nn.Module) -> None:
        """Copies the weights of a sharded model into its replica, one after the other."""
        if replica is model:
            return
        targets = dict(replica.named_parameters())
        for name, parameter in model.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            targets[name].copy_(whole)

    def scale(self, model: nn.Module) -> float:
        """What a loss is multiplied by before backward: FSDP2 takes the mean over ranks, and the
        gradient of a batch is the sum."""
        return float(self.size) if isinstance(model, FSDPModule) else 1.0

    def sum_gradients(self, model: nn.Module) -> None:
        """Sums the gradients of a model that is whole on every rank, in one message; FSDP2 has done
        so already for a sharded one."""
        if self.size == 1 or isinstance(model, FSDPModule):
            return
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:  # a rank that computed nothing adds nothing
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten().float() for p in trained])
        dist.all_reduce(flat)
        pieces = flat.split([p.numel() for p in trained])
        for parameter, piece in zip(trained, pieces, strict=True):
            parameter.grad.copy_(piece.view_as(parameter))


def join() -> World:
    """The world that torchrun started this process in, or a world of one.

    Raises RuntimeError where torchrun's variables are there but the group cannot be formed.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # gloo beside nccl: objects and counts on the CPU need no GPU to meet.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return World(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _adapted(model: nn.Module) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


def _device() -> torch.device:
    """Where a rank's tensors are."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
