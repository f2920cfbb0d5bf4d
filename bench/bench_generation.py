"""Rollouts of the demo's agent: KV kept between turns against `model.generate` afresh every turn.

    python -m bench.bench_generation                     (about two minutes on two cores)
    python -m bench.bench_generation --model runs/demo/sft

Both play the same questions with the same seeds, tools included, and the share of trajectories
whose ids are the same is printed beside the ratio of the times. Without --model the base model is
taught to call tools first, for a short while.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from bench import harness
from trainer.engines.hf import HFEngine
from trainer.engines.sampling import Sampled, sample, uniforms
from trainer.model import VisionLanguageModel
from trainer.rollout import Player
from trainer.tasks import Task, load_task
from trainer.types import Rollout


class PlainEngine(HFEngine):
    """The baseline: left-padded `model.generate` over every whole trajectory, turn after turn."""

    def open(self):
        return contextlib.nullcontext(self)

    def turn(self, keys, sequences, seeds, max_new_tokens: int) -> list[Sampled]:
        vlm, start = self.vlm, time.perf_counter()
        inputs = vlm.collate(sequences, left=True)
        uniform = uniforms(seeds, max_new_tokens).to(vlm.device)
        sampler = _Sampler(self, uniform)
        stopping = _Stopping(self, len(keys), inputs["input_ids"].shape[1])
        with self.inference():
            output = vlm.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,  # the sampler leaves one finite score a row
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([stopping]),
                pad_token_id=vlm.tokenizer.pad_token_id,
                eos_token_id=[self.protocol.end_id],
                use_cache=True,
            )
        ids = output[:, stopping.prompt :].tolist()
        logprob = torch.stack(sampler.logprob, 1).tolist()
        turns = []
        for row, (stop, length) in enumerate(stopping.ended):
            length = length or len(ids[row])
            turns.append(Sampled(ids[row][:length], logprob[row][:length], stop or "length"))
        self.counts.sampled_tokens += sum(len(one.ids) for one in turns)
        self.counts.seconds += time.perf_counter() - start
        return turns


class _Sampler(LogitsProcessor):
    """Samples by the inverse CDF and leaves the sampled token as the only finite score."""

    def __init__(self, engine: PlainEngine, uniform: torch.Tensor):
        self.engine, self.uniform = engine, uniform
        self.logprob: list[torch.Tensor] = []

    def __call__(self, input_ids, scores):
        engine, number = self.engine, len(self.logprob)
        token, logprob = sample(
            scores, self.uniform[:, number], engine.temperature, engine.forbidden_ids
        )
        self.logprob.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


class _Stopping(StoppingCriteria):
    """Notes what ends each row, and after how many tokens."""

    def __init__(self, engine: PlainEngine, rows: int, prompt: int):
        self.engine, self.prompt = engine, prompt
        self.ended: list[tuple[str | None, int]] = [(None, 0)] * rows

    def __call__(self, input_ids, scores, **kwargs):
        closing = self.engine.closing[input_ids[:, -1]].tolist()
        for row, (stop, _) in enumerate(self.ended):
            if stop is None and closing[row]:
                new = input_ids[row, self.prompt :].tolist()
                self.ended[row] = (self.engine.protocol.stop(new), len(new))
        self.ended = [(stop, length if stop else 0) for stop, length in self.ended]
        return torch.tensor([s is not None for s, _ in self.ended], device=input_ids.device)


def teach(vlm: VisionLanguageModel, task: Task, player: Player, steps: int = 80) -> None:
    """A short cold start, so that there are calls and observations to play."""
    questions, scripts = task.demonstrations(0, 256, 0.06)
    rollouts = [r for r in player.demonstrate(questions, scripts) if r.scored]
    optimizer = torch.optim.AdamW(vlm.model.parameters(), 1e-3)
    vlm.model.train()
    for step in range(steps):
        batch = [rollouts[(32 * step + n) % len(rollouts)] for n in range(32)]
        inputs = vlm.collate([(rollout.ids, rollout.images) for rollout in batch])
        label = torch.full_like(inputs["input_ids"], -100)
        for row, rollout in enumerate(batch):
            policy = torch.tensor(rollout.policy)
            label[row, : len(policy)][policy] = inputs["input_ids"][row, : len(policy)][policy]
        logits = vlm.model(**inputs).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits.float(), label[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def agreement(first: Sequence[Rollout], second: Sequence[Rollout]) -> float:
    """Share of trajectories with the same ids."""
    return sum(a.ids == b.ids for a, b in zip(first, second, strict=True)) / len(first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write the results into")
    args = parser.parse_args()
    torch.manual_seed(0)
    task = load_task("glyphs")
    vlm = VisionLanguageModel.load(args.model or task.base, torch.float32)
    with Player(vlm, task.toolbox()) as player:
        if args.model is None:
            teach(vlm, task, player)
        engines = {"generate every turn": PlainEngine(vlm), "kept": HFEngine(vlm)}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        same, played = [], {name: [] for name in engines}
        for number in range(args.rounds + 1):
            some = task.train(0, number * args.prompts, args.prompts)
            questions = [question for question in some for _ in range(args.group)]
            seeds = [1000 * number + n for n in range(len(questions))]
            for name, engine in list(engines.items())[:: 1 if number % 2 else -1]:
                before, start = engine.counts.seconds, time.perf_counter()
                rollouts = player.play(engine, questions, seeds)
                taken = time.perf_counter() - start
                seconds[name].append((taken, engine.counts.seconds - before))
                played[name] = rollouts
            same.append(agreement(*played.values()))
            if not number:  # it only warms up
                same.clear()
                for name, engine in engines.items():
                    seconds[name].clear()
                    engine.stats()
    last = played["kept"]
    print(
        f"{args.prompts} questions x {args.group}, in the last round "
        f"{sum(r.calls > 0 for r in last)} with a call, "
        f"{sum(len(r.images) > len(r.question.images) for r in last)} with an observed image, "
        f"{sum(len(r.ids) for r in last) / len(last):.0f} tokens each"
    )
    record: dict[str, object] = {"prompts": args.prompts, "group_size": args.group}
    for index, what in enumerate(("rollouts, tools included", "the engine alone")):
        old, new = ([pair[index] for pair in seconds[name]] for name in engines)
        ratio = statistics.median(o / n for o, n in zip(old, new, strict=True))
        record[what] = {
            "plain_s": statistics.median(old), "kept_s": statistics.median(new), "ratio": ratio,
        }  # fmt: skip
        print(
            f"{what}: {statistics.median(old):.2f} s a round -> {statistics.median(new):.2f} s, "
            f"ratio {ratio:.2f}"
        )
    print(f"same trajectories: {statistics.mean(same):.1%}")
    record["same"] = statistics.mean(same)
    for name, engine in engines.items():
        counts = engine.stats()
        print(f"{name}: {', '.join(f'{key} {value:.0f}' for key, value in counts.items())}")
        record[name] = counts
    if args.out:
        harness.write(args.out, "generation", [record])


if __name__ == "__main__":
    main()
