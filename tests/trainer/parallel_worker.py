"""What one process of test_parallel.py does: `torchrun ... parallel_worker.py KIND=OUT ...`.

Plays, packs and learns for two steps from rewards that are made up (the base model is wrong too
often to have any), and leaves losses and whole weights in OUT. KIND: see KINDS; several are learned
one after another, each from the start.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from trainer import parallel
from trainer.collect import Collector
from trainer.config import load
from trainer.engines.hf import HFEngine
from trainer.interrupt import never
from trainer.model import VisionLanguageModel
from trainer.rl import optimizer_batches
from trainer.rollout import Limits, Player
from trainer.selection import group_advantages
from trainer.tasks import load_task

STEPS = 2
KINDS = {
    "full": [],
    "few": ["rl.prompts=1", "rl.group_size=2", "rl.max_batch_tokens=4000"],
    "lora": [],
}
"""Settings. few: all fits into one micro-batch of one group that cannot be split."""


def learn(world: parallel.World, settings: list[str], lora: bool = False) -> dict:
    torch.manual_seed(0)
    task = load_task("glyphs")
    config = load(None, ["rl.prompts=3", "rl.group_size=4", "rl.max_batch_tokens=300", *settings])
    vlm = VisionLanguageModel.load(task.base, torch.float32)
    if lora:
        from peft import LoraConfig, get_peft_model

        vlm = replace(vlm, model=get_peft_model(vlm.model, LoraConfig(target_modules=["q_proj"])))
    vlm.model.train()
    played = replace(vlm, model=world.replica(vlm.model))
    model = world.shard(vlm.model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine, losses, tokens = HFEngine(played, temperature=2.0), [], []
    loss_config = config.rl.loss.hdpo(2.0)
    with Player(played, task.toolbox(), Limits()) as player:
        collector = Collector(task, player, engine, config.rl, 0, never, world)
        for step in range(1, STEPS + 1):
            position = (step - 1) * config.rl.prompts
            rollouts = collector.collect(step, position).rollouts
            for i, rollout in enumerate(rollouts):
                rollout.correct, rollout.calls = i % 3 != 0, i % 2
            tokens.append([rollout.ids for rollout in rollouts])
            advantages = group_advantages(rollouts, config.rl)
            (batch,) = optimizer_batches(vlm, rollouts, advantages, config.rl, loss_config, world)
            measures = batch.backward(vlm, loss_config, None, world)
            losses.append({name: float(value) for name, value in measures.items()})
            optimizer.step()
            optimizer.zero_grad()
            world.refresh(played.model, model)
    weights = {n: p.detach().clone() for n, p in played.model.named_parameters()}
    return {"losses": losses, "tokens": tokens, "weights": weights, "parts": len(batch.batches)}


if __name__ == "__main__":
    world = parallel.join()
    for kind, out in (word.split("=", 1) for word in sys.argv[1:]):
        torch.save(learn(world, KINDS[kind], lora=kind == "lora"), f"{out}.{world.rank}")
    parallel.leave()
