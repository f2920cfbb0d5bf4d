"""`metis plan`: the memory of an update and of its rollouts, before either is run.

The formulas are in plans/memory.py; here they are solved for the largest micro-batch, and said.
Exit codes: 0 it fits, 1 it does not (and what would make it fit), 2 a setting is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from trainer.plans.memory import (
    CHECKPOINTING,
    GIB,
    LINES,
    MOMENTS,
    Settings,
    budget,
    loss_rows,
    offloaded,
)
from trainer.plans.sizes import MODELS, Sizes, load_config, sizes
from trainer.table import duration

FITS, TOO_BIG = 0, 1
UPDATE = MOMENTS[:-1]
_MOST_TOKENS = 1 << 26
LORA_RANK = 16
"""That is proposed where full training does not fit."""


def update_bytes(s: Sizes, p: Settings, tokens: int) -> float:
    """The peak of an update with micro-batches of so many tokens."""
    moments = budget(s, p, tokens)
    return max(sum(moments[m].values()) for m in UPDATE)


def rollout_bytes(s: Sizes, p: Settings) -> float:
    return sum(budget(s, p, p.prompt + p.response)["rollout"].values())


def largest_batch(s: Sizes, p: Settings) -> int:
    """The largest max_tokens whose update fits the GPU; 0 where not even one token does."""
    fits, most = 0, _MOST_TOKENS
    while fits < most:
        middle = (fits + most + 1) // 2
        if update_bytes(s, p, middle) <= p.gpu_memory * GIB:
            fits = middle
        else:
            most = middle - 1
    return fits


def needed(p: Settings) -> int:
    """The micro-batch that must fit: the one asked for, or one trajectory."""
    return p.max_tokens or p.prompt + p.response


def update_fits(s: Sizes, p: Settings) -> bool:
    return largest_batch(s, p) >= needed(p)


def rollout_fits(s: Sizes, p: Settings) -> bool:
    return rollout_bytes(s, p) <= p.gpu_memory * GIB


# ---- what sharing saves --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharing:
    """A group of G rollouts, of which those with a gradient are packed, against G (P + R) tokens:
    what sharing saves."""

    tokens: float
    """Packed, of a group, in micro-batches of max_tokens."""
    plain_tokens: float
    by_prefix: float
    """Share of the tokens of the active rollouts that sharing saves: (P + a R) to a (P + R)."""
    in_all: float
    """Share of G (P + R) that sharing and leaving out inactive rollouts save."""
    vision_passes: float
    """Of the images of the prompt through the vision tower, instead of G."""
    flops: float
    """Of an update of a group, forward and backward."""
    plain_flops: float


def sharing(s: Sizes, p: Settings, tokens: int) -> Sharing:
    active, together = p.rollouts, p.shared_by(tokens)
    parts = math.ceil(active / together)
    packed = parts * p.prompt + active * p.response
    plain = p.group_size * (p.prompt + p.response)
    alone = active * (p.prompt + p.response)
    causal = p.response * (p.response + 1) / 2 + p.response * p.prompt
    prefix = p.prompt * (p.prompt + 1) / 2
    policy = p.response * (1 - p.tool_share)
    return Sharing(
        packed,
        plain,
        1 - packed / alone,
        1 - packed / plain,
        parts,
        group_flops(s, p, packed, parts * prefix + active * causal, active * policy, parts),
        group_flops(
            s, p, plain, p.group_size * (prefix + causal), p.group_size * policy, p.group_size
        ),
    )


def group_flops(
    s: Sizes, p: Settings, tokens: float, pairs: float, rows: float, images: float
) -> float:
    """Operations of forward and backward: 2 a weight and token, and as much for each gradient; 4 Q
    a query-key pair and layer, and 2.5 times that backward (flash); the head as in
    `linear_hdpo_loss`."""
    again = p.checkpointing != "none"
    total = 2 * s.parameters("layers") * tokens * (2 + (not p.lora) + again)
    total += 4 * s.q * s.layers * pairs * (3.5 + again)
    total += 2 * rows * s.vocab * s.hidden * (2 + (not p.lora))
    if s.vision:
        patches = images * p.image_tokens * s.vision.patches
        total += 2 * s.parameters("vision") * patches * (3 + again if p.train_vision else 1)
    return total


# ---- what would make it fit ----------------------------------------------------------------------


@dataclass(frozen=True)
class Mend:
    change: str
    """As options of `metis plan`."""
    largest: int
    """max_tokens that fits with this and the mends before it."""
    fits: bool


def mends(s: Sizes, p: Settings) -> list[Mend]:
    """Changes in the order of what they cost, one on top of the other, until all fits."""
    found = []
    for change, tried in _changes(s, p):
        fits = update_fits(s, tried) and rollout_fits(s, tried)
        found.append(Mend(change, largest_batch(s, tried), fits))
        if fits:
            break
    return found


def _changes(s: Sizes, p: Settings) -> Iterator[tuple[str, Settings]]:
    """For the update as long as that does not fit, then for the rollouts."""
    for change, values in (
        ("--checkpointing layers", {"checkpointing": "layers"}),
        ("--optimizer adamw8bit", {"optimizer": "adamw8bit"}),
        ("--checkpointing offload", {"checkpointing": "offload"}),
    ):
        if update_fits(s, p):
            break
        name, value = next(iter(values.items()))
        order = CHECKPOINTING if name == "checkpointing" else ("adamw", "adamw8bit")
        if order.index(getattr(p, name)) < order.index(value):
            p = replace(p, **values)
            yield change, p
    if not update_fits(s, p) and p.max_tokens is not None:
        smaller = max(largest_batch(s, p), p.prompt + p.response)
        if smaller < p.max_tokens:
            p = replace(p, max_tokens=smaller)
            yield f"--max-tokens {smaller}", p
    if not update_fits(s, p) and not p.lora:
        p = replace(p, lora=LORA_RANK, train_vision=False)
        yield f"--lora {LORA_RANK}", p
    gpus = p.gpus
    while not update_fits(s, p) and gpus < 64:
        gpus *= 2
        p = replace(p, gpus=gpus)
        yield f"--gpus {gpus}", p
    if not rollout_fits(s, p) and not p.optimizer_offload:
        p = replace(p, optimizer_offload=True)
        yield "--optimizer-offload", p
    rows = p.rollout_batch
    while not rollout_fits(s, p) and rows > 1:
        rows //= 2
        p = replace(p, rollout_batch=rows)
        if rollout_fits(s, p) or rows == 1:
            yield f"--rollout-batch {rows}", p


# ---- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `metis plan`; their defaults are those of `Settings`."""
    d = Settings()
    names = ", ".join(json.loads(MODELS.read_text()))
    add = parser.add_argument
    add("--model", required=True, help=f"a folder, its config.json, or one of {names}")
    add("--gpu-memory", type=float, default=d.gpu_memory, metavar="GIB", help="of one GPU")
    add("--group-size", type=int, default=d.group_size, metavar="G", help="rollouts of a prompt")
    add("--prompt", type=int, default=d.prompt, metavar="P", help="tokens, images included")
    add(
        "--image-tokens",
        "--images-tokens",
        type=int,
        default=d.image_tokens,
        metavar="N",
        help="of the prompt",
    )
    add("--response", type=int, default=d.response, metavar="R", help="tokens, tools' included")
    add("--tool-share", type=float, default=d.tool_share, help="of a response, written by tools")
    add("--active", type=float, default=d.active, help="share of rollouts with a gradient")
    add("--dtype", choices=("bfloat16", "float32"), default=d.dtype)
    add("--optimizer", choices=("adamw", "adamw8bit"), default=d.optimizer)
    add("--lora", type=int, default=0, metavar="RANK", help="adapters on the layers' matrices")
    add("--nf4", action="store_true", help="4-bit weights under the adapters")
    add("--checkpointing", choices=CHECKPOINTING, default=d.checkpointing)
    vision = parser.add_mutually_exclusive_group()
    vision.add_argument("--train-vision", action="store_true", default=None)
    vision.add_argument("--freeze-vision", dest="train_vision", action="store_false")
    add("--gpus", type=int, default=1, metavar="N", help="that share weights and optimizer (FSDP2)")
    add(
        "--rollout-batch", type=int, default=d.rollout_batch, metavar="ROWS", help="decoded at once"
    )
    add("--optimizer-offload", action="store_true", help="optimizer on the host during rollouts")
    add("--max-tokens", type=int, metavar="T", help="of a micro-batch (default: what fits)")
    add("--prompts", type=int, default=d.prompts, metavar="N", help="groups of an update")
    add("--flops", type=float, metavar="F", help="operations a second of a GPU, for a rough time")
    add("--device", choices=("cuda", "cpu"), default=d.device)
    add("--no-liger", dest="liger", action="store_false", help="transformers' own norms and MLP")
    add("--reserve", type=float, metavar="GIB", help="CUDA's own and fragments (1.5; on a CPU 0)")
    add("--json", action="store_true", help="the plan as JSON")


def settings_of(args: argparse.Namespace) -> Settings:
    given = {f.name: getattr(args, f.name) for f in fields(Settings)}
    if given["train_vision"] is None:  # frozen unless asked for
        given["train_vision"] = False
    if given["reserve"] is None:
        given["reserve"] = Settings.reserve if args.device == "cuda" else 0.0
    return Settings(**given)


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Raises ConfigError for a model or setting that is none."""
    p = settings_of(args)
    s = sizes(load_config(args.model), args.model)
    plan = make_plan(s, p)
    if args.json:
        print(json.dumps(plan, indent=1))
    else:
        show(s, p, plan, Console(soft_wrap=True))
    return FITS if plan["fits"] else TOO_BIG


def make_plan(s: Sizes, p: Settings) -> dict[str, Any]:
    """Everything that is printed, in bytes and tokens."""
    largest = largest_batch(s, p)
    fits = largest >= needed(p) and rollout_fits(s, p)
    whole = math.ceil(p.prompts * (p.prompt + p.rollouts * p.response))
    tokens = p.max_tokens or max(min(largest, whole), p.prompt + p.response)
    shared = sharing(s, p, tokens)
    groups = ("vision", "layers", "embeddings", "head")
    seconds = p.prompts * shared.flops / (p.flops * p.gpus) if p.flops else None
    return {
        "model": s.name,
        "parameters": {g: s.parameters(g) for g in groups} | {"all": s.parameters()},
        "settings": asdict(p),
        "max_tokens": largest,
        "trajectory_tokens": p.prompt + p.response,
        "trajectory_fits": largest >= p.prompt + p.response,
        "planned_tokens": tokens,
        "loss_rows": loss_rows(p, tokens),
        "moments": budget(s, p, tokens),
        "host": offloaded(s, p, tokens),
        "sharing": asdict(shared),
        "update_flops": p.prompts * shared.flops,
        "update_seconds": seconds,
        "fits": fits,
        "mends": [] if fits else [asdict(m) for m in mends(s, p)],
    }


def show(s: Sizes, p: Settings, plan: dict[str, Any], console: Console) -> None:
    """The plan as a table and a few sentences."""
    parameters = ", ".join(
        f"{name} {n / 1e9:.3f}" for name, n in plan["parameters"].items() if n and name != "all"
    )
    console.print(
        f"{s.name}: {s.parameters() / 1e9:.3f} billion parameters ({parameters}"
        f"{', tied' if s.tied else ''})",
        highlight=False,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="dim", collapse_padding=True)
    table.add_column("GiB", no_wrap=True)
    for name in MOMENTS:
        table.add_column(name, justify="right", no_wrap=True)
    moments = plan["moments"]
    for line in LINES:
        values = [moments[m][line] for m in MOMENTS]
        if any(values):
            table.add_row(line, *(f"{v / GIB:.2f}" if v else "–" for v in values))
    totals = [sum(moments[m].values()) / GIB for m in MOMENTS]
    table.add_section()
    table.add_row("total", *(f"{t:.2f}" for t in totals), style="bold")
    table.add_row(f"left of {p.gpu_memory:g}", *(f"{p.gpu_memory - t:.2f}" for t in totals))
    console.print(table)
    for sentence in sentences(p, plan):
        console.print(sentence, highlight=False, markup=False)


def sentences(p: Settings, plan: dict[str, Any]) -> Iterator[str]:
    shared, largest = plan["sharing"], plan["max_tokens"]
    yield (
        f"Update: micro-batches of {plan['planned_tokens']:,} tokens, {plan['loss_rows']:,} of "
        f"them with loss. The largest max_tokens that fits: {largest:,}."
    )
    one = plan["trajectory_tokens"]
    yield f"A trajectory of {one:,} tokens {'fits' if plan['trajectory_fits'] else 'does not fit'}."
    yield (
        f"Prefix sharing saves {100 * shared['by_prefix']:.1f} % of the tokens of the "
        f"{p.rollouts:g} rollouts with a gradient; against all {p.group_size}, "
        f"{100 * shared['in_all']:.1f} % ({shared['plain_tokens']:,.0f} to "
        f"{shared['tokens']:,.0f} a group)."
    )
    if p.image_tokens:
        yield (
            f"Passes of a prompt's images through the vision tower: {shared['vision_passes']:.0f} "
            f"instead of {p.group_size}."
        )
    yield (
        f"An update of {p.prompts} groups is {plan['update_flops']:.3g} operations, "
        f"{shared['plain_flops'] / shared['flops']:.2f} times fewer than unshared."
    )
    if plan["update_seconds"] is not None:
        yield f"At {p.flops:.3g} operations a second: {duration(plan['update_seconds'])}."
    for name, size in plan["host"].items():
        if size:
            yield f"On the host: {size / GIB:.2f} GiB of {name}."
    if plan["fits"]:
        return
    yield "It does not fit. In the order of what it costs, one on top of the other:"
    for mend in plan["mends"]:
        yield (
            f"  {mend['change']:<26} max_tokens {mend['largest']:>12,}"
            f"{'   fits' if mend['fits'] else ''}"
        )
    if not plan["mends"] or not plan["mends"][-1]["fits"]:
        yield "  Nothing of that is enough: shorter prompts or responses, or a larger GPU."
