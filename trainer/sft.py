"""SFT cold start: the base model learns the protocol from demonstrations that nearly always call.

    metis sft --name cold

Trains on the tokens that the demonstrator wrote (never on prompts or observations), with the mean
over all of them in an optimizer batch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping

import torch

from metis_kernels import linear_cross_entropy
from metis_kernels.adapters import hf
from trainer.batch import pack
from trainer.config import OptimizerConfig, SFTConfig
from trainer.log import RunLog
from trainer.model import VisionLanguageModel
from trainer.optimizer import make_optimizer, optimizer_step
from trainer.parallel import World
from trainer.rollout import Player
from trainer.tasks import Task
from trainer.types import Rollout, TrainingError

_PLAYED_AT_ONCE = 256


def demonstrate(
    task: Task,
    player: Player,
    config: SFTConfig,
    seed: int,
    log: RunLog,
    stopping: Callable[[], bool],
    world: World | None = None,
) -> list[Rollout]:
    """Plays the demonstrations, against the real tools or as they were recorded, each rank its
    share, and gives all to all. Those in which the task finds a fault are dropped, and counted by
    it.

    Raises TrainingError where none is left.
    """
    world = world or World()
    played = task.demonstrations(seed, config.demonstrations, config.direct_share)
    questions, scripts = map(world.share, played)
    rollouts: list[Rollout] = []
    with log.progress("demonstrations", len(questions)) as bar:
        for start in range(0, len(questions), _PLAYED_AT_ONCE):
            if stopping() and world.size == 1:  # with others, at the first step of training
                raise KeyboardInterrupt
            part = slice(start, start + _PLAYED_AT_ONCE)
            rollouts += player.demonstrate(questions[part], scripts[part])
            bar.advance(len(questions[part]))
    rollouts = world.gather(rollouts)
    faults = [task.fault(rollout) for rollout in rollouts]
    kept = [rollout for rollout, fault in zip(rollouts, faults, strict=True) if fault is None]
    called = sum(r.calls > 0 for r in kept) / max(len(kept), 1)
    dropped = Counter(fault for fault in faults if fault is not None)
    log.say(
        f"{len(kept)} demonstrations, {called:.1%} of them with a tool call; "
        f"dropped: {_counted(dropped)}; not playable: {_counted(task.unplayable)}"
    )
    if not kept:
        raise TrainingError(
            f"no demonstration is left to train on; dropped: {_counted(dropped)}, not playable: "
            f"{_counted(task.unplayable)}"
        )
    return kept


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items())) or "none"


def sft(
    vlm: VisionLanguageModel,
    rollouts: list[Rollout],
    config: SFTConfig,
    seed: int,
    log: RunLog,
    stopping: Callable[[], bool],
    *,
    optimizer_config: OptimizerConfig | None = None,
    world: World | None = None,
) -> None:
    """Fine-tunes in place. Order and batches are a function of the seed alone."""
    world = world or World()
    order = random.Random(seed)
    queue: list[Rollout] = []
    optimizer = make_optimizer(
        vlm.model,
        optimizer_config or OptimizerConfig(),
        config.lr,
        config.betas,
        config.weight_decay,
    )
    vlm.model.train()
    with log.progress("sft", config.steps) as bar:
        for step in range(1, config.steps + 1):
            if world.any(stopping()):
                raise KeyboardInterrupt
            while len(queue) < config.batch_size:
                queue += order.sample(rollouts, len(rollouts))
            batch, queue = queue[: config.batch_size], queue[config.batch_size :]
            warm = min(1.0, step / max(config.warmup, 1))
            lr = config.lr * warm * (1 - 0.9 * step / config.steps)
            tokens = sum(sum(rollout.policy) for rollout in batch)
            total = torch.zeros(())
            packed = pack(
                vlm,
                [[one] for one in batch],
                config.max_batch_tokens,
                keep_all=True,
                ranks=world.size,
            )
            for one in packed[world.rank :: world.size]:
                hidden = one.hidden(vlm)
                head = hf.head(vlm.model)
                targets = one.packed.to(hidden.device)
                loss = linear_cross_entropy(
                    hidden,
                    head.weight,
                    targets.label,
                    targets.row,
                    n=tokens,
                    bias=head.bias,
                    softcap=head.softcap,
                )
                (loss * world.scale(vlm.model)).backward()
                total += loss.detach().cpu()
            world.sum_gradients(vlm.model)
            norm = optimizer_step(vlm.model, optimizer, lr, config.max_grad_norm)
            log.metrics("sft", step, loss=world.sum(total), grad_norm=norm, lr=lr, tokens=tokens)
            bar.advance(loss=total)
