"""The heads of real models, and the cases that are measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HEADS = {
    "Qwen3-VL-2B": (2048, 151_936),
    "Qwen3-VL-8B": (4096, 151_936),
    "Qwen3-VL-32B": (5120, 151_936),
    "Llama-3.1-8B": (4096, 128_256),
    "Qwen3-0.6B": (1024, 151_936),
    "small": (256, 32_000),
}
"""model -> (H, V)"""


@dataclass(frozen=True)
class Case:
    """One setting of `bench.bench_linear_hdpo`."""

    head: str = "Qwen3-VL-8B"
    tokens: int = 8192
    active: float = 1.0
    """Share of the tokens that carry loss."""
    frozen: bool = False
    """The head wants no gradient."""
    dtype: str = "bfloat16"
    peak: float = 12.0
    """By how much the likeliest logit stands out of noise of about 1; see `Problem.make`."""
    providers: tuple[str, ...] | None = None
    """None: all there are."""
    samples: Path | None = None
    """A file of `bench.samples`, in place of head and peak; tokens: of those in it, at most."""
    temperature: float = 1.0
    """At which the samples' logits are taken: the lower, the surer the policy."""


TEMPERATURES = (1.0, 0.7, 0.5, 0.35, 0.25)
"""Those at which samples are measured, where no other is asked for."""
FILTERED = ("ours", "ours filtered")
"""Whom they are measured for: what a filter saves and loses depends on the logits."""

_MINE = ("ours",)
GPU = (
    Case(),
    Case(tokens=16_384, providers=_MINE),
    *(Case(active=share, providers=_MINE) for share in (0.5, 0.3, 0.1)),
    Case(frozen=True, providers=_MINE),
    *(Case(peak=peak, providers=FILTERED) for peak in (14.0, 15.0, 16.0, 17.5)),
    *(Case(head=head, providers=_MINE) for head in ("Qwen3-VL-2B", "Qwen3-VL-32B", "Llama-3.1-8B")),
)
_HERE = ("ours", "torch eager", "torch F.linear_cross_entropy")
CPU = (
    Case("small", 512, dtype="float32", providers=_HERE),
    Case("small", 512, active=0.5, dtype="float32", providers=_HERE),
)
CPU_CORE = tuple(
    Case("Qwen3-0.6B", 1024, dtype=dtype, providers=(*_HERE, "ours torch", "Liger fused GRPO"))
    for dtype in ("float32", "bfloat16")
)
"""What `bench.bench_cpu` measures the loss on."""
