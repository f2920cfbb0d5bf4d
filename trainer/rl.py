"""HDPO: rollouts with tools, two advantages, one update.

    metis rl model.path=runs/demo/sft

A step: play `prompts` questions `group_size` times each, score, normalise both channels within the
groups, count the normalisers over the whole optimizer batch, and take the gradient of DESIGN's loss
over micro-batches in which a group's prompt and pictures are computed once. Rollouts that carry no
gradient are never run through the model again. Under torchrun each rank plays a share of the
questions and computes a share of the micro-batches.

Where this departs from the reference: groups of equal rewards have advantages of exactly 0; the
normalisers do not depend on how the batch is cut; what could not be scored leaves both channels and
every count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import metis_kernels as mk
from metis_kernels.adapters import hf
from trainer.batch import Batch, pack
from trainer.collect import Collector
from trainer.config import OptimizerConfig, RLConfig
from trainer.engines.hf import HFEngine
from trainer.log import RunLog
from trainer.model import Reference, VisionLanguageModel
from trainer.optimizer import make_optimizer, optimizer_step, states_on_host
from trainer.parallel import World
from trainer.rollout import Player
from trainer.selection import (
    arbitration,
    channel_shares,
    group_advantages,
    group_records,
    has_signal,
    pass_rates,
)
from trainer.tasks import Task
from trainer.types import Rollout, TrainingError

MAX_NONFINITE = 3
"""Updates in a row with a gradient that is not finite before the run gives up."""


def rl(
    vlm: VisionLanguageModel,
    task: Task,
    player: Player,
    engine: HFEngine,
    config: RLConfig,
    seed: int,
    log: RunLog,
    stopping: Callable[[], bool],
    record: Callable[[str, int, Sequence[Rollout], mk.Advantages], None],
    *,
    optimizer_config: OptimizerConfig | None = None,
    world: World | None = None,
) -> None:
    """Trains in place. `record` is handed the rollouts of every step. engine and player may play on
    a replica of the weights; it is kept up with them."""
    world = world or World()
    optimizer_config = optimizer_config or OptimizerConfig()
    loss_config = config.loss.hdpo(engine.temperature)
    if config.reward == "coupled":
        loss_config = replace(loss_config, w_tool=0.0)
    optimizer = make_optimizer(
        vlm.model, optimizer_config, config.lr, config.betas, config.weight_decay
    )
    reference = Reference(vlm) if config.loss.kl_coef else None
    collector = Collector(task, player, engine, config, seed, stopping, world)
    nonfinite = 0
    position = 0  # in the task's stream of questions
    with log.progress("rl", config.steps) as bar:
        for step in range(1, config.steps + 1):
            start = time.perf_counter()
            engine.stats()  # counts from here on
            with states_on_host(optimizer, optimizer_config.offload_during_rollouts):
                collected = collector.collect(step, position)
            position += len(collected.played) // config.group_size
            rollouts = collected.rollouts
            played = time.perf_counter()
            judged = {} if player.grader is None else dict(player.grader.counts)
            generation = {f"generation/{name}": n for name, n in engine.stats().items()}
            advantages = group_advantages(rollouts, config)
            updates = []
            lr = config.lr * schedule(step, config)
            batches = optimizer_batches(vlm, rollouts, advantages, config, loss_config, world)
            if len(batches) > 1:  # the first step moves the policy under the others
                for batch in batches:
                    batch.score_old(vlm, loss_config)
            for batch in batches:
                measures = batch.backward(vlm, loss_config, reference, world)
                norm = optimizer_step(vlm.model, optimizer, lr, config.max_grad_norm)
                updates.append(measures | {"grad_norm": norm})
                nonfinite = 0 if torch.isfinite(norm) else nonfinite + 1
                if nonfinite >= MAX_NONFINITE:
                    raise TrainingError(
                        f"the gradient was not finite {nonfinite} times in a row at step {step}; "
                        "the weights are those before; lower rl.lr or look at metrics.jsonl"
                    )
            world.refresh(engine.vlm.model, vlm.model)
            record("rl", step, rollouts, advantages)
            log.groups(group_records(step, collected.played, config, collected.dropped))
            seconds = time.perf_counter() - start
            values = _measures(collected.played, config, updates) | {
                **channel_shares(rollouts, advantages, config),
                "resampled": len(collected.played) // config.group_size - config.prompts,
                "lr": lr,
                "tokens_per_second": sum(len(r.ids) for r in collected.played) / seconds,
                "rollout_seconds": played - start,
                "update_seconds": seconds - (played - start),
                **generation,
                **{f"graded/{name}": count for name, count in judged.items()},
            }
            log.metrics("rl", step, **values)
            shown = ("reward", "accuracy", "tool_rate", "tokens_per_second")
            bar.advance(**{name: values[name] for name in shown})


def schedule(step: int, config: RLConfig) -> float:
    """Share of the learning rate at step 1, 2, ...: linear warm-up, constant, and over the last
    `decay` of the steps linearly down to a tenth."""
    warm = min(1.0, step / max(config.warmup, 1))
    left = (config.steps - step) / max(config.decay * config.steps, 1)
    return warm * max(0.1, min(1.0, left))


_SUMMED = ("loss", "loss_acc", "loss_tool", "nonfinite_tokens", "active_tokens")
_AVERAGED = ("clip_fraction_acc", "clip_fraction_tool", "approx_kl", "entropy")
"""What an optimizer step is measured by, summed and averaged over its tokens that carry loss; all
of it is 0 for a step in which no rollout carries any."""


@dataclass
class OptimizerBatch:
    """What one optimizer step is made of: this rank's micro-batches of the rollouts that carry
    gradient, and global counts."""

    batches: list[Batch]
    n_acc: Tensor
    n_tool: Tensor
    old_logprob: list[Tensor] | None = None
    """[S] of every micro-batch; None where the policy has not moved since it sampled."""

    def score_old(self, vlm: VisionLanguageModel, config: mk.HDPOConfig) -> None:
        """Notes the logprobs under the policy as it is now, over the same micro-batches that the
        loss will see: while it has not moved, the ratio is exactly 1."""
        self.old_logprob = [_score(vlm, batch, config) for batch in self.batches]

    def backward(
        self,
        vlm: VisionLanguageModel,
        config: mk.HDPOConfig,
        reference: Reference | None = None,
        world: World | None = None,
    ) -> dict[str, Tensor]:
        """Accumulates the gradient of the whole batch -> its measures: sums of the losses, means
        over its tokens of the rest."""
        world = world or World()
        totals = dict.fromkeys(_SUMMED + _AVERAGED, torch.zeros(()))
        for number, batch in enumerate(self.batches):
            ref_logprob = None
            if reference is not None:
                with reference():
                    ref_logprob = _score(vlm, batch, config)
            hidden = batch.hidden(vlm)
            head = hf.head(vlm.model)
            targets = batch.packed.to(hidden.device).targets(
                self.n_acc,
                self.n_tool,
                old_logprob=None if self.old_logprob is None else self.old_logprob[number],
                ref_logprob=ref_logprob,
            )
            loss, stats = mk.linear_hdpo_loss(hidden, head.weight, targets, config, bias=head.bias)
            (loss * world.scale(vlm.model)).backward()
            active = stats.n_active
            sums = {
                "loss": loss.detach(),
                "loss_acc": stats.loss_acc,
                "loss_tool": stats.loss_tool,
                "nonfinite_tokens": stats.n_nonfinite,
                "active_tokens": active,
                "clip_fraction_acc": stats.clip_fraction_acc * active,
                "clip_fraction_tool": stats.clip_fraction_tool * active,
                "approx_kl": stats.approx_kl * active,
                "entropy": stats.entropy.nansum(),
            }
            totals = {name: totals[name] + sums[name].cpu().float() for name in totals}
        world.sum_gradients(vlm.model)
        totals = dict(zip(totals, world.sum(torch.stack(list(totals.values()))), strict=True))
        for name in _AVERAGED:
            totals[name] = totals[name] / totals["active_tokens"].clamp_min(1)
        totals["effective_tool_weight"] = config.w_tool * self.n_acc / self.n_tool.clamp_min(1)
        return totals


def optimizer_batches(
    vlm: VisionLanguageModel,
    rollouts: Sequence[Rollout],
    advantages: mk.Advantages,
    config: RLConfig,
    loss_config: mk.HDPOConfig,
    world: World | None = None,
) -> list[OptimizerBatch]:
    """Cuts the groups of a step into `updates` optimizer batches (fewer where there are fewer
    groups), and each into micro-batches, of which this rank gets its share.

    A rollout without advantage in either channel is left out where neither KL nor entropy gives it
    a gradient; its tokens still count. Every rank has every rollout, so each counts alike.
    """
    world = world or World()
    size = config.group_size
    groups = -(-len(rollouts) // size)
    updates = min(config.updates, groups)
    everything = bool(loss_config.kl_coef or loss_config.entropy_coef)
    result = []
    for update in range(updates):
        first, last = (groups * u // updates * size for u in (update, update + 1))
        mine = rollouts[first:last]
        part = mk.Advantages(
            *(getattr(advantages, field.name)[first:last] for field in fields(advantages))
        )
        scored = torch.tensor([r.scored for r in mine])
        tokens = torch.tensor([sum(r.policy) for r in mine])
        n_acc, n_tool = _normalizers(part, tokens, scored, loss_config, world)
        tool = part.tool if loss_config.w_tool else torch.zeros_like(part.tool)
        carries = (scored & (everything | (part.acc != 0) | (tool != 0))).tolist()
        kept = [
            [i for i in range(start, min(start + size, len(mine))) if carries[i]]
            for start in range(0, len(mine), size)
        ]
        batches = pack(
            vlm,
            [[mine[i] for i in group] for group in kept],
            config.max_batch_tokens,
            [part.acc[group].tolist() for group in kept],
            [tool[group].tolist() for group in kept],
            keep_all=everything,
            ranks=world.size,
        )
        result.append(OptimizerBatch(batches[world.rank :: world.size], n_acc, n_tool))
    return result


def _normalizers(
    part: mk.Advantages, tokens: Tensor, scored: Tensor, config: mk.HDPOConfig, world: World
) -> Tensor:
    """n_acc and n_tool of the optimizer batch: each rank counts its share, one sum makes them
    everybody's."""
    mine = world.share(range(len(tokens)))
    share = slice(mine.start, mine.stop)
    counted = mk.Advantages(*(getattr(part, field.name)[share] for field in fields(part)))
    counts = mk.hdpo_normalizers(counted, tokens[share], scored[share], config.tool_norm)
    return world.sum(torch.stack(counts))


@torch.no_grad()
def _score(vlm: VisionLanguageModel, batch: Batch, config: mk.HDPOConfig) -> Tensor:
    """Logprobs [S] by the same path as the loss, so that the first ratio is exactly 1."""
    hidden = batch.hidden(vlm)
    head = hf.head(vlm.model)
    packed = batch.packed.to(hidden.device)
    logprob, _ = mk.linear_logprobs(
        hidden,
        head.weight,
        packed.label,
        packed.row,
        bias=head.bias,
        temperature=config.temperature,
        softcap=config.softcap,
    )
    return logprob


def _measures(
    played: Sequence[Rollout], config: RLConfig, updates: Sequence[dict[str, Tensor]]
) -> dict[str, Any]:
    """What a step is reported by: rates over what the policy did by itself, in every group that was
    played."""
    own = [r for r in played if r.mode == "allowed"]
    scored = [r for r in own if r.scored]
    count = max(len(scored), 1)
    values: dict[str, Any] = {
        "reward": sum(r.accuracy_reward for r in scored) / count,
        "accuracy": sum(r.correct for r in scored) / count,
        "tool_rate": sum(r.calls > 0 for r in scored) / count,
        "calls": sum(r.calls for r in scored) / count,
        "formatted": sum(r.formatted for r in scored) / count,
        "no_signal_share": 1 - has_signal(group_advantages(played, config), config).float().mean(),
        "truncated": sum(r.status == "truncated" for r in own),
        "unscored": sum(not r.scored for r in played),
        **pass_rates(played, config),
        **arbitration(played),
    }
    for name in updates[0] if updates else ():
        values[name] = sum(update[name] for update in updates) / len(updates)
    for kind in dict.fromkeys(r.question.kind for r in scored):
        those = [r for r in scored if r.question.kind == kind]
        values[f"tool_rate/{kind}"] = sum(r.calls > 0 for r in those) / len(those)
        values[f"accuracy/{kind}"] = sum(r.correct for r in those) / len(those)
    return values
