"""Tiny models of every family that the adapters know, from configurations: no hub, no weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

VOCABULARY = 131
IMAGE, VIDEO, VISION_START, VISION_END = 5, 6, 3, 4
PATCH, MERGE = 4, 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 1,
    "out_hidden_size": 64,
}
_IMAGES = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def qwen3_vl(tied: bool = True, **sizes):
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
    text = SIZES | {"head_dim": 16, "rope_parameters": rope | {"mrope_interleaved": True}} | sizes
    vision = _VISION | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    vision["out_hidden_size"] = text["hidden_size"]
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text | {"tie_word_embeddings": tied},
            vision_config=vision,
            tie_word_embeddings=tied,
            **_IMAGES,
        )
    )


def qwen2_5_vl():
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
    vision = _VISION | {"fullatt_block_indexes": [1], "window_size": 16, "in_channels": 3}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=SIZES | {"rope_parameters": rope}, vision_config=vision, **_IMAGES
        )
    )


FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "qwen3_vl": qwen3_vl,
    "qwen3_vl untied": lambda: qwen3_vl(tied=False),
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=16, sliding_window=7, attn_implementation="eager")
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=7, sliding_window_pattern=2)
    ),
}
"""Gemma 2 and 3 have layers with a sliding window that is shorter than the tests' sequences."""
VISION_FAMILIES = ("qwen3_vl", "qwen3_vl untied", "qwen2_5_vl")


def make(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.nn.Module:
    """A model in which attention and residual stream matter: transformers' initial weights are so
    small that a wrong mask would hide in rounding."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model
