"""One whole update of a vision-language model: forward, loss, backward, optimizer.

    python -m bench.bench_step                              the demo's model, or an 8B on a GPU
    python -m bench.bench_step --case 8192/4096/2048/0.5    one case: tokens of a prompt, of its
                                                            picture, of a response; active share

The same rollouts three ways:

padded    one rollout a row, padded, attended without sharing, logits of every response token made
          (as TRL's GRPO trainer does by default)
packed    no padding, no sharing; logprobs of every row through a fused head that recomputes logits
          in the backward (as verl does with remove_padding and fused kernels)
ours      packed behind shared prompts, only rows that carry loss, gradient in the forward, rollouts
          without advantage left out

Rollouts are made up: random tokens and pictures; what they cost does not depend on what they say.
Micro-batches hold one group each ("group": the same rollouts whichever way, so the peaks tell what
sharing saves), or at most max-tokens computed tokens ("tokens": like memory, so the times tell).
tokens/s counts prompt and response of every rollout, whichever way they are computed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import metis_kernels as mk
from bench import harness
from metis_kernels.adapters import hf
from trainer.config import OptimizerConfig
from trainer.optimizer import make_optimizer
from trainer.plans.sizes import load_config
from trainer.tasks.glyphs import base

CONFIG = mk.HDPOConfig()
LR = 0.0
"""So that every way, however often, computes on the same weights."""


def build(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """A vision-language model with random weights: the demo's ("tiny"), or one that `metis plan`
    knows, or a folder's."""
    from transformers import AutoModelForImageTextToText

    config = base.config(base.VOCABULARY) if name == "tiny" else load_config(name)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


class Workload:
    """A model and the rollouts of one optimizer step."""

    def __init__(self, case: Case, args: argparse.Namespace):
        self.case, self.args = case, args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.rng = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = build(args.model, getattr(torch, args.dtype), self.device).train()
        self.config = self.model.config
        self.model.model.visual.requires_grad_(False)
        if args.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        hf.prepare(self.model)
        try:
            hf.apply_liger(self.model)
        except ImportError:
            print("liger-kernel is not installed: transformers' own layers", file=sys.stderr)
        kind = OptimizerConfig(kind="adamw" if args.dtype == "float32" else "adamw8bit")
        self.optimizer = make_optimizer(self.model, kind, LR, (0.9, 0.999), 0.0)
        self.attention_cost = hf.attention_cost(self.model)
        self.groups: list[list[mk.Trajectory]] = []
        self.pictures: list[tuple[Tensor, Tensor]] = []
        for _ in range(args.groups):
            self.groups.append(self._group())
        self.n = torch.tensor(sum(int(t.policy.sum()) for g in self.groups for t in g))
        self.tokens = sum(len(t.ids) for g in self.groups for t in g)

    def _group(self) -> list[mk.Trajectory]:
        case, args, vision = self.case, self.args, self.config.vision_config
        side = int(case.image**0.5)
        merge = vision.spatial_merge_size
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        key = len(self.pictures)
        grid = torch.tensor([[1, side * merge, side * merge]])
        self.pictures.append((torch.randn(int(grid.prod()), patch, generator=self.rng), grid))
        start, pad = self.config.vision_start_token_id, self.config.image_token_id
        rest = case.prompt - side * side - 2
        head = [start, *[pad] * side**2, self.config.vision_end_token_id]
        prompt = torch.cat([torch.tensor(head), self._text(rest)])
        lengths = torch.randint(
            case.response // 2, case.response * 3 // 2 + 1, (args.group_size,), generator=self.rng
        )
        active = round(case.active * args.group_size)
        group = []
        for i, length in enumerate(lengths.tolist()):
            ids = torch.cat([prompt, self._text(length)])
            policy = torch.arange(len(ids)) >= len(prompt)
            shown = len(prompt) + length // 3  # a tool's answer in the middle
            policy[shown : shown + int(args.tool_share * length)] = False
            policy[-1] = True
            group.append(
                mk.Trajectory(
                    ids,
                    policy,
                    acc_advantage=(-1.0) ** i * (i < active),
                    tool_advantage=0.5 * (i < active // 2),
                    images=(mk.ImageSpan(1, 1 + side**2, key),),
                    positions=hf.positions(self.model, ids, grid),
                )
            )
        return group

    def _text(self, n: int) -> Tensor:
        vocabulary = self.config.text_config.vocab_size
        special = max(self.config.image_token_id, self.config.vision_end_token_id)
        low = special + 1 if special + 1 < vocabulary // 2 else 0
        high = vocabulary if low else self.config.vision_start_token_id
        return torch.randint(low, high, (n,), generator=self.rng)

    def pixels(self, keys: list[int]) -> dict[str, Tensor]:
        patches, grids = zip(*(self.pictures[key] for key in keys), strict=True)
        dtype = self.model.dtype
        return {
            "pixel_values": torch.cat(patches).to(self.device, dtype),
            "image_grid_thw": torch.cat(grids).to(self.device),
        }

    def step(self) -> float:
        """-> the norm of the gradient before it was clipped."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    # ---- the three ways -----------------------------------------------------------------------

    def padded(self) -> float:
        if self.args.micro == "group":
            for number, group in enumerate(self.groups):
                self._padded([(number, one) for one in group])
            return self.step()
        rollouts = [(number, one) for number, group in enumerate(self.groups) for one in group]
        rollouts.sort(key=lambda rollout: len(rollout[1].ids))
        rows: list[tuple[int, mk.Trajectory]] = []
        for rollout in rollouts:
            if rows and len(rollout[1].ids) * (len(rows) + 1) > self.args.max_tokens:
                self._padded(rows)
                rows = []
            rows.append(rollout)
        self._padded(rows)
        return self.step()

    def _batches(self, **options) -> Iterator[mk.PackedBatch]:
        if self.args.micro == "tokens":
            yield from mk.pack(self.groups, self.args.max_tokens, **options)
            return
        for number in range(len(self.groups)):
            alone = [group if n == number else [] for n, group in enumerate(self.groups)]
            yield from mk.pack(alone, 10**9, **options)

    def _padded(self, rows: list[tuple[int, mk.Trajectory]]) -> None:
        length = max(len(t.ids) for _, t in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        mask, policy = torch.zeros_like(ids), torch.zeros(len(rows), length, dtype=torch.bool)
        for i, (_, one) in enumerate(rows):
            ids[i, : len(one.ids)], mask[i, : len(one.ids)] = one.ids, 1
            policy[i, : len(one.ids)] = one.policy
        ids, mask, policy = (x.to(self.device) for x in (ids, mask, policy))
        start = min(int(t.policy.nonzero()[0]) for _, t in rows)
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == self.config.image_token_id).long() * mask,
            use_cache=False,
            logits_to_keep=length - start + 1,
            **self.pixels([g for g, _ in rows]),
        ).logits[:, :-1]
        logprob, _ = mk.logprobs(logits.flatten(0, 1), ids[:, start:].flatten(), impl="torch")
        kept = policy[:, start:]
        sizes = policy.sum(1).cpu()
        self._backward(logprob.view_as(kept)[kept], [t for _, t in rows], sizes)

    def _backward(self, logprob: Tensor, rollouts: list[mk.Trajectory], sizes: Tensor) -> None:
        acc = torch.tensor([t.acc_advantage for t in rollouts]).repeat_interleave(sizes)
        tool = torch.tensor([t.tool_advantage for t in rollouts]).repeat_interleave(sizes)
        row = torch.arange(len(acc), device=self.device)
        targets = mk.HDPOTargets(
            row=row, label=row, old_logprob=None, n_acc=self.n, n_tool=self.n,
            acc_advantage=acc.to(self.device), tool_advantage=tool.to(self.device),
        )  # fmt: skip
        loss, _ = mk.hdpo_loss(logprob, targets, CONFIG)
        loss.backward()

    def packed(self) -> float:
        for batch in self._batches(share=False, keep_all=True):
            hidden = hf.hidden_states(self.model, batch, **self._pixels(batch))
            on_device = batch.to(self.device)
            label = torch.zeros(batch.T, dtype=torch.int64, device=self.device)
            label[on_device.row] = on_device.label
            every, _ = mk.linear_logprobs(hidden, hf.head(self.model).weight, label)
            members = [self.groups[g][i] for g, i in batch.members]
            sizes = batch.sequence.bincount(minlength=len(members))
            self._backward(every[on_device.row], members, sizes)
        return self.step()

    def ours(self) -> float:
        for batch in self._batches(attention_cost=self.attention_cost):
            hidden = hf.hidden_states(self.model, batch, **self._pixels(batch))
            targets = batch.to(self.device).targets(self.n, self.n)
            loss, _ = mk.linear_hdpo_loss(hidden, hf.head(self.model).weight, targets, CONFIG)
            loss.backward()
        return self.step()

    def _pixels(self, batch: mk.PackedBatch) -> dict[str, Tensor]:
        return self.pixels([image.group for image in batch.images])


WAYS: dict[str, Callable[[Workload], float]] = {
    "padded": Workload.padded,
    "packed": Workload.packed,
    "ours": Workload.ours,
}


@dataclass(frozen=True)
class Case:
    prompt: int
    image: int
    """Of the prompt's tokens those of its picture; a square number."""
    response: int
    """Mean; from half to one and a half of it."""
    active: float
    """Share of the rollouts that have an advantage."""

    @classmethod
    def parse(cls, text: str) -> Case:
        prompt, image, response, active = text.split("/")
        return cls(int(prompt), int(image), int(response), float(active))

    def __str__(self) -> str:
        return f"{self.prompt}/{self.image}/{self.response}/{self.active:g}"


CPU_CASES = (Case(256, 64, 64, 1.0), Case(256, 64, 64, 0.5), Case(1024, 256, 256, 1.0))
GPU_CASES = (
    Case(1024, 256, 512, 0.5),
    Case(8192, 4096, 2048, 1.0),
    Case(8192, 4096, 2048, 0.5),
    Case(24_576, 16_384, 4096, 0.5),
)
"""Half of a group's rollouts without advantage is what GRPO runs report for easy and hard prompts
together; 1.0 shows what sharing saves by itself."""


def run_case(case: Case, args: argparse.Namespace) -> list[dict]:
    """Every way on one case, held against one another before they are timed -> records."""
    work = Workload(case, args)
    norms, peaks, reasons = {}, {}, {}
    for name in args.only:
        try:
            norms[name] = WAYS[name](work)
            if torch.cuda.is_available():
                peaks[name] = harness.peak_bytes(lambda way=WAYS[name]: way(work))
        except torch.OutOfMemoryError as error:
            reasons[name] = f"out of memory: {str(error).partition('.')[0]}"
            work.optimizer.zero_grad(set_to_none=True)
    tolerance = 1e-3 if args.dtype == "float32" else 5e-2
    if norms and not max(norms.values()) - min(norms.values()) <= tolerance * max(norms.values()):
        raise SystemExit(f"the gradients' norms differ: {norms}; nothing was timed")
    times = harness.measure(
        {name: lambda way=WAYS[name]: way(work) for name in norms}, args.rounds, warmup=1
    )
    names = ("model", "dtype", "groups", "group_size", "tool_share", "max_tokens", "micro")
    settings = {name: getattr(args, name) for name in names} | asdict(case)
    words = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    words += [f"--case={case}", *["--checkpointing"] * args.checkpointing]
    records = []
    print(f"{args.model}, {args.groups} x {args.group_size} rollouts, {case}:")
    for name, t in times.items():
        if name not in peaks:
            peaks[name] = harness.peak_in_subprocess("bench.bench_step", name, words)
        peak = peaks[name]
        rate = work.tokens / t["median_ms"] * 1e3
        records.append(
            {"way": name, "tokens_per_second": rate, "peak_bytes": peak, **settings, **t}
        )
        print(
            f"  {name:8} {t['median_ms']:10.1f} ms ({t['p20_ms']:.1f} to {t['p80_ms']:.1f})  "
            f"{rate:10.0f} tokens/s  {peak / 2**20:9.0f} MiB"
        )
    for name, reason in reasons.items():
        records.append({"way": name, "skipped": reason, **settings})
        print(f"  {name:8} {reason}")
    return records


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-vl-8b" if on_gpu else "tiny")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--groups", type=int, default=1 if on_gpu else 4)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument(
        "--case", type=Case.parse, nargs="+", metavar="PROMPT/IMAGE/RESPONSE/ACTIVE"
    )
    parser.add_argument("--tool-share", type=float, default=0.3, help="of a response")
    parser.add_argument("--max-tokens", type=int, default=40_960 if on_gpu else 4096)
    parser.add_argument(
        "--micro", choices=("group", "tokens"), default="tokens" if on_gpu else "group"
    )
    parser.add_argument("--checkpointing", action="store_true", default=on_gpu)
    parser.add_argument("--rounds", type=int, default=3 if on_gpu else 7)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--probe", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file to write the results into")
    args = parser.parse_args()
    cases = args.case or (GPU_CASES if on_gpu else CPU_CASES)
    if args.probe:
        work = Workload(cases[0], args)
        for parameter in work.optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        work.step()  # states of the optimizer are no part of what a way adds
        print(harness.peak_bytes(lambda: WAYS[args.probe](work)))
        return
    records = [record for case in cases for record in run_case(case, args)]
    if args.out:
        harness.write(args.out, "step", records)


if __name__ == "__main__":
    main()
