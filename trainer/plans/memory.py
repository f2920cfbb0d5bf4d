"""What an update and its rollouts take on a GPU, as formulas.

An update is one packed micro-batch of T tokens: hidden states of a transformers model with
shared-prefix attention, `linear_hdpo_loss` on the rows that carry loss, and backward into gradients
that exist already (the second and later micro-batches are the peak); then the optimizer.

Bytes, with e those of the model's dtype and w = 4 those of fp32; what ends in / N is shared by the
N GPUs of FSDP2:

    weights       every parameter, tied ones once       e / N    (NF4: 0.516 in layers' matrices)
    gradients     of what is trained                    e / N    (adapters: 4)
    optimizer     AdamW                                 2e / N   (8 bits: 2 (1 + 4 / 256), torchao)
    gathered      N > 1: embeddings, head, two layers, and gradients of the ends and one layer

A layer saves, per token (H hidden; Q, K widths of queries and keys; F of the MLP; Hq, Hkv heads):

    RMSNorm       fp32 copy of x, x / rms, product with the weight    (w + 2e) H + 4     twice
                  Gemma's multiplies in fp32: x / rms has w bytes; Liger's saves x instead of both
    q and k norm  as RMSNorm, but the product goes to RoPE, which saves none of what it turns
    RoPE          cos and sin, once for all layers
    attention     q, k, v, out and the log-sum-exp                    e (2Q + 2K) + 4 Hq
    SwiGLU        gate, its activation, up, their product             4eF   (Liger: 3eF)
    residuals     nothing; the sums are inputs of a norm

Frozen weights (LoRA) save neither x / rms nor what goes into a matrix; an adapter saves its own
input, in fp32 (peft makes adapters so), and what it has of rank r.
With checkpointing each layer saves its input, eH (offload: on the host, but for two of them), and
one layer at a time is computed again.

The peak of an update is the largest of three moments:

    loss      all that is saved + d_hidden wHT + d_weight wVH (a trained head) + the larger of a
              chunk of logits and both gradients rounded to e
    backward  all that is saved + one layer, recomputed + the gradients inside of it
    step      nothing saved; on a CPU, two copies of the largest parameter

and the rollouts take weights, KV cache (2eK a layer and token) and the prefill's widest layer.
A frozen vision tower saves nothing, and is done before the layers begin.

These are bytes of tensors, as torch's allocator counts them. On a CPU they agree with its measured
peaks within 10 % (tests/trainer/test_plan.py). The resident memory of a process is more: by 8 to 30
MB of BLAS's and oneDNN's own, and with glibc's default malloc, which keeps freed blocks, 1.2 to 2.5
times as much was measured. Nothing was measured on a GPU: `reserve`, for CUDA's context, its
libraries and a fragmented allocator, is an assumption, and offload, NF4, FSDP2 and Liger are read
from sources, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.plans.sizes import Sizes, Vision
from trainer.types import ConfigError

GIB = 1 << 30
MOMENTS = ("loss", "backward", "step", "rollout")
LINES = (
    "weights", "gradients", "optimizer", "gathered", "activations", "head and chunks", "work space",
    "KV cache", "reserve",
)  # fmt: skip
CHECKPOINTING = ("none", "layers", "offload")
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: 4 bits, and of 64 weights a scale that is itself quantised, of 256 scales one."""


@dataclass(frozen=True)
class Settings:
    gpu_memory: float = 80.0
    """GiB"""
    group_size: int = 8
    prompt: int = 4096
    """Tokens, those of images included."""
    image_tokens: int = 0
    response: int = 1024
    tool_share: float = 0.0
    active: float = 1.0
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    lora: int = 0
    nf4: bool = False
    checkpointing: str = "none"
    train_vision: bool = False
    gpus: int = 1
    rollout_batch: int = 32
    optimizer_offload: bool = False
    max_tokens: int | None = None
    prompts: int = 8
    flops: float | None = None
    device: str = "cuda"
    liger: bool = True
    reserve: float = 1.5
    """GiB"""

    def __post_init__(self):
        for name in ("group_size", "prompt", "response", "gpus", "rollout_batch", "prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.image_tokens <= self.prompt:
            raise ConfigError(
                f"image tokens are part of the prompt: expected 0 to {self.prompt}, got "
                f"{self.image_tokens}"
            )
        if not 0 <= self.tool_share < 1 or not 0 < self.active <= 1:
            raise ConfigError(
                f"expected 0 <= tool share < 1 and 0 < active share <= 1, got {self.tool_share} "
                f"and {self.active}"
            )
        if self.nf4 and not self.lora:
            raise ConfigError("NF4 weights are not trained themselves; give a rank with --lora")
        if self.lora < 0 or (self.lora and self.train_vision):
            raise ConfigError(
                "with --lora (a rank > 0) the adapters of the language model's layers are all that "
                "is trained; leave out --train-vision"
            )
        if self.max_tokens is not None and self.max_tokens < self.prompt + self.response:
            raise ConfigError(
                f"max_tokens must hold a trajectory of {self.prompt + self.response} tokens, got "
                f"{self.max_tokens}"
            )

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def rollouts(self) -> float:
        """Rollouts of a group that have a gradient, at least one."""
        return max(self.active * self.group_size, 1.0)

    def shared_by(self, tokens: float) -> float:
        """Responses behind one prefix in micro-batches of so many tokens."""
        return min(self.rollouts, max((tokens - self.prompt) // self.response, 1))


# ---- what is saved for the backward --------------------------------------------------------------


def attention_saved(s: Sizes, e: int) -> float:
    """Bytes a token that shared-prefix attention saves: q, k, v, out and the log-sum-exp."""
    return e * (2 * s.q + 2 * s.k) + 4 * s.heads


def norm_saved(width: int, heads: int, s: Sizes, p: Settings, *, out: bool = True) -> float:
    """Of an RMSNorm over heads parts of width; out: whether its output is saved by who takes it."""
    e, x = p.itemsize, 4
    if p.liger and p.cuda:
        return width * e + 4 * heads + out * width * e
    normed = 0 if p.lora else x if s.gemma else e
    return width * (x + normed) + 4 * heads + out * width * e


def layer_saved(s: Sizes, p: Settings) -> float:
    """Bytes a token that one layer keeps for its backward."""
    e = p.itemsize
    wide = p.lora and e < 4  # adapters in fp32 take copies of their inputs
    liger = p.liger and p.cuda
    total = 2 * norm_saved(s.hidden, 1, s, p, out=not wide)
    total += (s.norms - 2) * norm_saved(s.hidden, 1, s, p, out=False)
    if s.qk_norm:
        total += norm_saved(s.q, s.heads, s, p, out=False)
        total += norm_saved(s.k, s.kv_heads, s, p, out=False)
    total += attention_saved(s, e)
    total += e * s.mlp * (2 if liger else 3) + (0 if wide else e * s.mlp)
    if wide:
        total += 4 * (5 * s.hidden + s.q + s.mlp)
    if p.lora:
        total += 4 * 7 * p.lora
    return total


def vision_saved(v: Vision, p: Settings) -> float:
    """Bytes an image token that a trained vision tower keeps."""
    e, w = p.itemsize, v.width
    normed = 4 + e if v.gated else 0  # RMSNorm's own; LayerNorm saves its input
    norm = w * (normed + e if v.gated else 2 * e) + 4
    # q, k, v as one matrix, q and k turned, every image's output, all of them, the log-sum-exps.
    attention = 7 * w * e + 4 * v.heads
    mlp = (4 if v.gated else 2) * v.mlp * e
    block = 2 * norm + attention + mlp if p.checkpointing == "none" else w * e
    ends = v.pixels * e + 2 * 4 * w // v.heads  # pixels, and RoPE's cos and sin in fp32
    merger = norm + 2 * w * e
    again = 0 if v.gated else (v.mergers - 1) * w * e  # the next block has saved it
    return v.patches * (v.depth * block + ends + v.mergers * merger - again)


def stored(s: Sizes, p: Settings, tokens: float) -> float:
    """Bytes that wait for the backward when the forward is done."""
    e = p.itemsize
    inputs = {"none": 0, "layers": s.layers, "offload": min(s.layers, 2)}[p.checkpointing]
    layers = s.layers * layer_saved(s, p) if p.checkpointing == "none" else inputs * e * s.hidden
    ends = norm_saved(s.hidden, 1, s, p, out=True) + 2 * s.head_dim * e + 8
    total = tokens * (layers + ends)
    if s.vision and p.train_vision:
        images = p.image_tokens * max(1.0, tokens / (p.prompt + p.shared_by(tokens) * p.response))
        total += images * vision_saved(s.vision, p)
    return total


# ---- the moments ---------------------------------------------------------------------------------


def chunk_rows(rows: int, s: Sizes, p: Settings) -> int:
    """Rows of logits that the fused loss makes at a time: `chunk_rows` of metis_kernels/_sweep.py
    with its defaults, for an implementation without copies (Triton and C++)."""
    item, tile = p.itemsize, 16
    if p.cuda:
        budget = max(GIB, 2048 * s.vocab * item)
    else:
        budget = max(1 << 27, 0 if p.lora else 4 * s.vocab * s.hidden // 2)
    tiles = -(-rows // tile)
    chunks = max(-(-tiles // max(budget // (s.vocab * item) // tile, 1)), 1)
    return -(-tiles // chunks) * tile


def loss_rows(p: Settings, tokens: float) -> int:
    """Rows of a micro-batch that carry loss: tokens of responses that no tool wrote."""
    behind = p.shared_by(tokens) * p.response
    return round(tokens * behind / (p.prompt + behind) * (1 - p.tool_share))


def head_bytes(s: Sizes, p: Settings, tokens: float) -> float:
    """What the fused loss holds at its peak: gradients, and a chunk of logits with its rows."""
    e, w, h = p.itemsize, 4, s.hidden
    rows = loss_rows(p, tokens)
    chunk = chunk_rows(rows, s, p)
    one = chunk >= rows and not p.cuda  # a single chunk's d_weight needs no sum
    weight = 0 if p.lora else s.vocab * h
    # The label's logits are fp32 dot products of gathered rows.
    buffers = chunk * (s.vocab * e + h * (3 * w + (2 * e if e < w else 0)))
    rounds = p.cuda or e < w
    rounded = rounds * e * (h * tokens + (0 if one else weight))
    return w * h * tokens + (e if one else w) * weight + max(buffers, rounded)


def adapters(s: Sizes, p: Settings) -> int:
    return p.lora * s.ends


def backward_work(s: Sizes, p: Settings, tokens: float) -> tuple[float, float]:
    """(inside a layer, at the final norm): bytes of gradients that the backward holds there.

    The MLP is a layer's widest place: gradients of the product and of both factors, while the
    product itself is gone, one gradient of the residual stream and one of a matrix.
    """
    e, liger = p.itemsize, p.liger and p.cuda
    matrix = 0 if p.lora else s.hidden * s.mlp * e
    if p.nf4:
        matrix = s.hidden * s.mlp * e  # dequantised
    inside = e * s.mlp * (0 if liger else 2) + e * s.hidden
    if p.lora and e < 4:  # an adapter's gradient in fp32, once more scaled, in the layer's widest
        inside += 8 * s.mlp
    norm = s.hidden * (2 * e if liger else e + 3 * 4)
    return tokens * inside + matrix, tokens * norm


def trained(s: Sizes, p: Settings) -> list[int]:
    """Numbers in each parameter that the optimizer sees; of adapters all together."""
    if p.lora:
        return [adapters(s, p)]
    return [n for group, n in s.tensors if group != "vision" or p.train_vision]


def optimizer_bytes(s: Sizes, p: Settings) -> float:
    e = 4 if p.lora else p.itemsize
    total = 0.0
    for n in trained(s, p):
        small = p.optimizer == "adamw" or n < 4096 or n % 256  # torchao's rule
        total += 2 * n * e if small else 2 * n * (1 + 4 / 256)
    return total


def budget(s: Sizes, p: Settings, tokens: float) -> dict[str, dict[str, float]]:
    """Bytes on one GPU: moment -> line -> bytes, for micro-batches of so many tokens."""
    e, n = p.itemsize, p.gpus
    weights = s.parameters() * e
    if p.nf4:
        weights += s.linear * (NF4_BYTES - e)
    weights += 4 * adapters(s, p)
    learned = sum(trained(s, p))
    gradients = learned * (4 if p.lora else e)
    layer = s.parameters("layers") / s.layers * e
    root = s.parameters("head", "embeddings") * e
    gathered = 0.0 if n == 1 else root + 2 * layer + (0 if p.lora else root + layer)
    optimizer = optimizer_bytes(s, p) / n
    kept = stored(s, p, tokens)
    again = 0 if p.checkpointing == "none" else tokens * layer_saved(s, p)
    inside, norm = backward_work(s, p, tokens)
    ends = tokens * norm_saved(s.hidden, 1, s, p, out=False)
    static = {
        "weights": weights / n,
        "gradients": gradients / n,
        "optimizer": optimizer,
        "reserve": p.reserve * GIB,
    }
    if again + inside - ends >= norm:
        activations, work = kept - ends + again, inside
    else:
        activations, work = kept, norm
    largest = 0 if p.cuda else 2 * max(trained(s, p)) * (4 if p.lora else e)
    total = p.prompt + p.response
    rows = p.rollout_batch
    wide = rows * p.prompt * e * (3 * s.mlp + 2 * s.hidden)
    moments = {
        "loss": {
            "gathered": gathered,
            "activations": kept,
            "head and chunks": head_bytes(s, p, tokens),
        },
        "backward": {"gathered": gathered, "activations": activations, "work space": work},
        "step": {"work space": largest},
        "rollout": {
            "gradients": 0.0,
            "optimizer": 0.0 if p.optimizer_offload else optimizer,
            "gathered": 0.0 if n == 1 else weights * (1 - 1 / n),
            "work space": wide + 4 * rows * s.vocab,
            "KV cache": 2 * e * s.k * s.layers * rows * total,
        },
    }
    return {m: dict.fromkeys(LINES, 0.0) | static | lines for m, lines in moments.items()}


def offloaded(s: Sizes, p: Settings, tokens: float) -> dict[str, float]:
    """Bytes on the host of one GPU."""
    layers = max(s.layers - 2, 0) if p.checkpointing == "offload" else 0
    return {
        "activations": layers * p.itemsize * s.hidden * tokens,
        "optimizer": optimizer_bytes(s, p) / p.gpus if p.optimizer_offload else 0.0,
    }
