"""What the formulas of memory.py take of a model, counted without its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.types import ConfigError

MODELS = Path(__file__).parent / "models.json"
"""Published sizes of the models that have a name; what is not in it is transformers' default."""


@dataclass(frozen=True)
class Vision:
    depth: int
    width: int
    mlp: int
    heads: int
    patches: int
    """Of an image token."""
    pixels: int
    """Numbers in a patch."""
    mergers: int
    gated: bool
    """RMSNorm and SwiGLU (Qwen2.5-VL) instead of LayerNorm and GELU (Qwen3-VL)."""


@dataclass(frozen=True)
class Sizes:
    """What the formulas take of a model."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norms: int
    """RMSNorms of hidden width in a layer: two before a branch, and in Gemma 2 two behind."""
    qk_norm: bool
    gemma: bool
    tied: bool
    tensors: tuple[tuple[str, int], ...]
    """(vision | layers | embeddings | head, numbers) of every parameter; tied weights are of the
    head."""
    linear: int
    """Numbers in the matrices of the layers, and ..."""
    ends: int
    """... the sum of their widths, in and out: rank times that is what adapters have."""
    vision: Vision | None

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def k(self) -> int:
        return self.kv_heads * self.head_dim

    def parameters(self, *groups: str) -> int:
        """Numbers in the groups; in all of them where none is named."""
        return sum(n for group, n in self.tensors if not groups or group in groups)


def load_config(name: str) -> Any:
    """A transformers configuration: a name of plans/models.json, a folder, or a config.json.

    Raises ConfigError where there is neither; no hub is asked.
    """
    from transformers import AutoConfig

    known = json.loads(MODELS.read_text())
    if name in known:
        return AutoConfig.for_model(**known[name])
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"no model {name!r}: expected a folder with a config.json, such a file, or one of "
            f"{', '.join(known)}"
        )
    try:
        return AutoConfig.for_model(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no configuration of a known model: {error}") from None


def sizes(config: Any, name: str = "") -> Sizes:
    """Counts a model's parameters where it has no memory: on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    visual = getattr(config, "vision_config", None)
    kind = AutoModelForCausalLM if visual is None else AutoModelForImageTextToText
    with torch.device("meta"):
        model = kind.from_config(config)
    text = config.get_text_config()
    decoder = getattr(model.model, "language_model", model.model)
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    inside = {id(p) for p in decoder.layers.parameters()}

    def group(parameter: torch.Tensor) -> str:
        if parameter is head:
            return "head"
        if parameter is inputs:
            return "embeddings"
        # The final norm is counted with the layers.
        return "layers" if id(parameter) in inside or parameter is decoder.norm.weight else "vision"

    layer = decoder.layers[0]
    norms = [m for m in layer.modules() if type(m).__name__.endswith("RMSNorm")]
    linear = [m for m in decoder.layers.modules() if isinstance(m, torch.nn.Linear)]
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        name or config.model_type,
        text.hidden_size,
        text.intermediate_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        dim,
        head.shape[0],
        norms=sum(m.weight.numel() == text.hidden_size for m in norms if m.weight.numel() != dim),
        qk_norm=hasattr(layer.self_attn, "q_norm"),
        gemma="Gemma" in type(layer).__name__,
        tied=inputs is head,
        tensors=tuple((group(p), p.numel()) for p in model.parameters()),
        linear=sum(m.weight.numel() for m in linear),
        ends=sum(m.in_features + m.out_features for m in linear),
        vision=None if visual is None else _vision(visual),
    )


def _vision(config: Any) -> Vision:
    gated = hasattr(config, "fullatt_block_indexes")
    deep = getattr(config, "deepstack_visual_indexes", ())
    return Vision(
        config.depth,
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.spatial_merge_size**2,
        config.in_channels * config.temporal_patch_size * config.patch_size**2,
        1 + len(deep),
        gated,
    )
