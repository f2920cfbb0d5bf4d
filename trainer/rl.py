"""HDPO: rollouts with tools, two advantages, one update.

    metis rl model.path=runs/demo/sft

A step: play `prompts` questions `group_size` times each, score, normalise both channels within the
groups, count the normalisers over the whole optimizer batch, and take the gradient of DESIGN's loss
over micro-batches. Rollouts that carry no gradient are never run through the model again.

Where this departs from the reference: groups of equal rewards have advantages of exactly 0; the
normalisers do not depend on how the batch is cut; what could not be scored leaves both channels and
every count.
"""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import metis_kernels as mk
from trainer.batch import Batch, by_length, collate
from trainer.config import RLConfig
from trainer.engines.hf import HFEngine
from trainer.log import RunLog
from trainer.model import VisionLanguageModel, optimizer_step
from trainer.rollout import Player
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
) -> None:
    """Trains in place. `record` is handed the rollouts of every step."""
    loss_config = config.loss.hdpo(engine.temperature)
    if config.reward == "coupled":
        loss_config = replace(loss_config, w_tool=0.0)
    reference = copy.deepcopy(vlm.model).requires_grad_(False) if config.loss.kl_coef else None
    optimizer = torch.optim.AdamW(
        vlm.model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    nonfinite = 0
    with log.progress("rl", config.steps) as bar:
        for step in range(1, config.steps + 1):
            start = time.perf_counter()
            rollouts = _play(task, player, engine, config, seed, step, stopping)
            played = time.perf_counter()
            advantages = group_advantages(rollouts, config)
            updates = []
            lr = config.lr * schedule(step, config)
            batches = optimizer_batches(rollouts, advantages, config, loss_config)
            if len(batches) > 1:  # the first step moves the policy under the others
                for batch in batches:
                    batch.score_old(vlm, loss_config)
            for batch in batches:
                measures = batch.backward(vlm, loss_config, reference)
                norm = optimizer_step(vlm.model, optimizer, lr, config.max_grad_norm)
                updates.append(measures | {"grad_norm": norm})
                nonfinite = 0 if torch.isfinite(norm) else nonfinite + 1
                if nonfinite >= MAX_NONFINITE:
                    raise TrainingError(
                        f"the gradient was not finite {nonfinite} times in a row at step {step}; "
                        "the weights are those before; lower rl.lr or look at metrics.jsonl"
                    )
            record("rl", step, rollouts, advantages)
            seconds = time.perf_counter() - start
            values = _measures(rollouts, advantages, config, updates) | {
                "lr": lr,
                "tokens_per_second": sum(len(r.ids) for r in rollouts) / seconds,
                "rollout_seconds": played - start,
                "update_seconds": seconds - (played - start),
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


def _play(task, player, engine, config: RLConfig, seed: int, step: int, stopping):
    """The rollouts of a step, group after group: a function of (seed, step)."""
    questions = task.train(seed, (step - 1) * config.prompts, config.prompts)
    repeated = [question for question in questions for _ in range(config.group_size)]
    seeds = [zlib.crc32(f"{seed}/{step}/{n}".encode()) for n in range(len(repeated))]
    return player.play(engine, repeated, seeds, stopping=stopping)


def group_advantages(rollouts: Sequence[Rollout], config: RLConfig) -> mk.Advantages:
    """Advantages [N] of rollouts that lie group after group."""
    scored = torch.tensor([rollout.scored for rollout in rollouts])
    calls = torch.tensor([rollout.calls for rollout in rollouts])
    correct = torch.tensor([rollout.correct for rollout in rollouts])
    acc_reward = torch.tensor([rollout.accuracy_reward for rollout in rollouts])
    if config.reward == "coupled":
        acc_reward = acc_reward + config.coupled_alpha / (calls + 1)
    return mk.hdpo_advantages(
        acc_reward,
        mk.tool_reward(calls, correct),
        correct,
        torch.arange(len(rollouts)) // config.group_size,
        scored=scored,
        truncated=torch.tensor([rollout.status == "truncated" for rollout in rollouts]),
    )


_SUMMED = ("loss", "loss_acc", "loss_tool", "nonfinite_tokens", "active_tokens")
_AVERAGED = ("clip_fraction_acc", "clip_fraction_tool", "approx_kl", "entropy")
"""What an optimizer step is measured by, summed and averaged over its tokens that carry loss; all
of it is 0 for a step in which no rollout carries any."""


@dataclass
class OptimizerBatch:
    """What one optimizer step is made of: the rollouts that carry gradient, and global counts."""

    rollouts: list[Rollout]
    acc: Tensor
    """[n] accuracy advantage of each."""
    tool: Tensor
    """[n] tool advantage of each."""
    n_acc: Tensor
    n_tool: Tensor
    parts: list[list[int]]
    """Micro-batches: indices into `rollouts`."""
    old_logprob: list[Tensor] | None = None
    """[S] of every part; None where the policy has not moved since it sampled."""

    def score_old(self, vlm: VisionLanguageModel, config: mk.HDPOConfig) -> None:
        """Notes the logprobs under the policy as it is now, over the same micro-batches that the
        loss will see: while it has not moved, the ratio is exactly 1."""
        batches = (collate(vlm, [self.rollouts[i] for i in part]) for part in self.parts)
        self.old_logprob = [_score(vlm.model, batch, config) for batch in batches]

    def backward(
        self,
        vlm: VisionLanguageModel,
        config: mk.HDPOConfig,
        reference: torch.nn.Module | None = None,
    ) -> dict[str, Tensor]:
        """Accumulates the gradient of the whole batch -> its measures: sums of the losses, means
        over its tokens of the rest."""
        totals = dict.fromkeys(_SUMMED + _AVERAGED, torch.zeros(()))
        for number, part in enumerate(self.parts):
            batch = collate(vlm, [self.rollouts[i] for i in part])
            index = torch.tensor(part)[batch.sequence.cpu()]
            device = batch.row.device
            targets = mk.HDPOTargets(
                row=batch.row,
                label=batch.label,
                old_logprob=None if self.old_logprob is None else self.old_logprob[number],
                acc_advantage=self.acc[index].to(device),
                tool_advantage=self.tool[index].to(device),
                n_acc=self.n_acc,
                n_tool=self.n_tool,
                ref_logprob=None if reference is None else _score(reference, batch, config),
                sequence=batch.sequence,
            )
            loss, stats = mk.linear_hdpo_loss(batch.hidden(vlm.model), vlm.head, targets, config)
            loss.backward()
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
            totals = {name: totals[name] + sums[name].cpu() for name in totals}
        for name in _AVERAGED:
            totals[name] = totals[name] / totals["active_tokens"].clamp_min(1)
        totals["effective_tool_weight"] = config.w_tool * self.n_acc / self.n_tool.clamp_min(1)
        return totals


def optimizer_batches(
    rollouts: Sequence[Rollout],
    advantages: mk.Advantages,
    config: RLConfig,
    loss_config: mk.HDPOConfig,
) -> list[OptimizerBatch]:
    """Cuts the groups of a step into `updates` optimizer batches (fewer where there are fewer
    groups).

    A rollout without advantage in either channel is left out where neither KL nor entropy gives it
    a gradient; its tokens still count.
    """
    groups = -(-len(rollouts) // config.group_size)
    updates = min(config.updates, groups)
    everything = bool(loss_config.kl_coef or loss_config.entropy_coef)
    batches = []
    for update in range(updates):
        first = update * groups // updates * config.group_size
        last = min((update + 1) * groups // updates * config.group_size, len(rollouts))
        part = mk.Advantages(
            *(getattr(advantages, field.name)[first:last] for field in fields(advantages))
        )
        scored = torch.tensor([r.scored for r in rollouts[first:last]])
        tokens = torch.tensor([sum(r.policy) for r in rollouts[first:last]])
        n_acc, n_tool = mk.hdpo_normalizers(part, tokens, scored, loss_config.tool_norm)
        tool = part.tool if loss_config.w_tool else torch.zeros_like(part.tool)
        carries = (part.acc != 0) | (tool != 0) | everything
        kept = (carries & scored).nonzero()[:, 0].tolist()
        mine = [rollouts[first + i] for i in kept]
        parts = by_length(mine, config.max_batch_tokens)
        acc, tool = part.acc[kept].float(), tool[kept].float()
        batches.append(OptimizerBatch(mine, acc, tool, n_acc, n_tool, parts))
    return batches


@torch.no_grad()
def _score(model: torch.nn.Module, batch: Batch, config: mk.HDPOConfig) -> Tensor:
    """Logprobs [S] by the same path as the loss, so that the first ratio is exactly 1."""
    logprob, _ = mk.linear_logprobs(
        batch.hidden(model),
        model.get_output_embeddings().weight,
        batch.label,
        batch.row,
        temperature=config.temperature,
        softcap=config.softcap,
    )
    return logprob


def _measures(
    rollouts: Sequence[Rollout],
    advantages: mk.Advantages,
    config: RLConfig,
    updates: Sequence[dict[str, Tensor]],
) -> dict[str, Any]:
    """What a step is reported by."""
    scored = [r for r in rollouts if r.scored]
    count = max(len(scored), 1)
    groups = torch.arange(len(rollouts)) // config.group_size
    silent = torch.ones(int(groups[-1]) + 1, dtype=torch.bool)
    silent[groups[advantages.acc_signal | advantages.tool_signal]] = False
    values: dict[str, Any] = {
        "reward": sum(r.accuracy_reward for r in scored) / count,
        "accuracy": sum(r.correct for r in scored) / count,
        "tool_rate": sum(r.calls > 0 for r in scored) / count,
        "calls": sum(r.calls for r in scored) / count,
        "formatted": sum(r.formatted for r in scored) / count,
        "no_signal_share": silent.float().mean(),
        "truncated": sum(r.status == "truncated" for r in rollouts),
        "unscored": len(rollouts) - len(scored),
    }
    for name in updates[0] if updates else ():
        values[name] = sum(update[name] for update in updates) / len(updates)
    for kind in dict.fromkeys(r.question.kind for r in scored):
        those = [r for r in scored if r.question.kind == kind]
        values[f"tool_rate/{kind}"] = sum(r.calls > 0 for r in those) / len(those)
        values[f"accuracy/{kind}"] = sum(r.correct for r in those) / len(those)
    return values
