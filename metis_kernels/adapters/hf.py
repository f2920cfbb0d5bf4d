"""Models of transformers on packed batches: hidden states without logits, and the head behind them.

    prepare(model)                                   once; attention then understands packed batches
    hidden = hidden_states(model, batch, pixel_values=..., image_grid_thw=...)
    loss, stats = linear_hdpo_loss(hidden, head(model).weight, batch.targets(n_acc, n_tool), config)

No model file is patched: attention is registered with transformers' attention interface and told
where groups lie by a keyword argument that the models hand down (so that activation checkpointing
sees it again). Known to agree with one-by-one forwards: Qwen2.5-VL, Qwen3-VL, Qwen3, Llama, Gemma,
Gemma 2, Gemma 3 (text); with activation checkpointing, under peft, and sharded by FSDP2.
"""

from __future__ import annotations

import contextvars
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from metis_kernels._layout import PrefixLayout
from metis_kernels.packing import PackedBatch
from metis_kernels.prefix_attention import shared_prefix_attention

PREFIX = "metis_"
"""Before the name of the attention that a model had: what it falls back to where rows are not
packed, in generation for example."""
FALLBACKS = ("sdpa", "eager")

_packed: contextvars.ContextVar[bool] = contextvars.ContextVar("packed", default=False)
"""Whether a packed batch is on its way through a model: then no mask is made."""


def prepare(model: nn.Module) -> nn.Module:
    """Makes attention of the language model understand packed batches -> the same model.

    Everything else stays as it was, the vision tower too. Twice is as good as once. Raises
    ValueError where the model's attention is another than sdpa or eager, or none of transformers'.
    """
    for module in decoder(model).modules():
        config = getattr(module, "config", None)
        name = getattr(config, "_attn_implementation", None)
        if name is None or name.startswith(PREFIX):
            continue
        if name not in FALLBACKS:
            raise ValueError(
                f"the model's attention is {name!r}; packed batches work beside {FALLBACKS}. Load "
                "it with attn_implementation='sdpa'"
            )
        config._attn_implementation = PREFIX + name
    return model


def hidden_states(
    model: nn.Module,
    batch: PackedBatch,
    *,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
) -> Tensor:
    """Last hidden states [T, H] of a packed batch; the head is not run.

    model: of transformers, perhaps wrapped by peft or sharded by FSDP2 (`fully_shard` on the whole
    model), and `prepare`d.
    pixel_values [patches, C], image_grid_thw [len(batch.images), 3]: what the image processor makes
    of batch.images, in that order.

    An empty batch still runs one token through the model, so that ranks that have nothing to do
    take part in every collective. Raises ValueError where images are missing or too many, or the
    model was not prepared.
    """
    base = unwrapped(model)
    given = 0 if image_grid_thw is None else len(image_grid_thw)
    if given != len(batch.images):
        raise ValueError(
            f"the batch has {len(batch.images)} images but image_grid_thw has {given} rows; give "
            "one for each of batch.images, in that order"
        )
    if not decoder(model).config._attn_implementation.startswith(PREFIX):
        raise ValueError("the model is not prepared for packed batches; call prepare(model) first")
    device = base.get_input_embeddings().weight.device
    ids, position_ids, layout = batch.ids, batch.positions, batch.layout
    if batch.T == 0:
        ids, layout = ids.new_zeros(1), PrefixLayout((0,), ((1,),))
        position_ids = position_ids.new_zeros(len(position_ids), 1)
    if len(position_ids) > 1:  # M-RoPE's [3, 1, T]; everybody else's are [1, T]
        position_ids = position_ids[:, None]
    inputs: dict[str, Any] = {
        "input_ids": ids.to(device)[None],
        "position_ids": position_ids.to(device),
        "prefix_layout": layout,
        "use_cache": False,
    }
    if given:
        inputs["pixel_values"] = pixel_values.to(device)
        inputs["image_grid_thw"] = image_grid_thw.to(device)
    token = _packed.set(True)
    try:
        hidden = _forward(base)(**inputs)
    finally:
        _packed.reset(token)
    if isinstance(base, FSDPModule) and not given:
        hidden = _touch(hidden, getattr(base.model, "visual", None))
    return hidden[0, : batch.T]


@dataclass(frozen=True)
class HeadWeights:
    """What turns hidden states into logits."""

    weight: Tensor
    """[V, H]; of a head with LoRA the folded weight, through which gradients reach the adapters."""
    bias: Tensor | None = None
    """[V]"""
    softcap: float | None = None
    """Gemma 2's final_logit_softcapping: HDPOConfig.softcap must be the same."""


def head(model: nn.Module) -> HeadWeights:
    """The LM head of a model; under FSDP2 to be asked for after `hidden_states`, which gathers it.

    Raises ValueError for a head that scales its logits, is quantised, is still sharded, or wears
    adapters that cannot be folded.
    """
    base = unwrapped(model)
    config = base.config.get_text_config()
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, 1.0) not in (None, 1.0):
            raise ValueError(
                f"the model multiplies its logits ({name} = {getattr(config, name)}); the fused "
                "loss knows temperature and softcap alone"
            )
    layer = base.get_output_embeddings()
    weight, bias = _weights(layer)
    if isinstance(weight, DTensor):
        raise ValueError(
            "the head is sharded: run hidden_states first, which gathers the root's parameters "
            "(fully_shard(model, reshard_after_forward=False) for the root)"
        )
    if not weight.is_floating_point():
        raise ValueError(f"the head is quantised to {weight.dtype}; leave lm_head out of it")
    return HeadWeights(weight, bias, getattr(config, "final_logit_softcapping", None))


def positions(model: nn.Module, ids: Tensor, image_grid_thw: Tensor | None = None) -> Tensor | None:
    """Positions [3, n] of one rollout by the model's own get_rope_index; None for a model without
    such (then they are 0 to n - 1).

    ids [n] int64; image_grid_thw [images, 3]. Two images need text between them, or the model takes
    them for one.
    """
    base = unwrapped(model)
    rope = getattr(base.model, "get_rope_index", None)
    if rope is None:
        return None
    if image_grid_thw is None or len(image_grid_thw) == 0:
        return torch.arange(len(ids)).expand(3, -1)
    is_image = (ids == base.config.image_token_id).long()
    return rope(
        input_ids=ids[None], mm_token_type_ids=is_image[None], image_grid_thw=image_grid_thw
    )[0][:, 0]


def attention_cost(model: nn.Module) -> float:
    """One query-key pair as a share of the work of one token outside attention: what `pack` weighs
    micro-batches with.

    Operations of a pair: 4 Hq D a layer. Of a token: 2 for each weight of the layers.
    """
    base = unwrapped(model)
    config = base.config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pair = 4 * config.num_hidden_layers * config.num_attention_heads * dim
    layers = sum(p.numel() for p in decoder(model).layers.parameters())
    return pair / (2 * max(layers, 1))


def apply_liger(model: nn.Module) -> bool:
    """Liger's RMSNorm, RoPE and gated MLP in place of transformers', by Liger's own function; the
    head and the loss stay. -> whether there was anything to apply (it has kernels for GPUs alone).

    Raises ImportError where the model is on a GPU and liger-kernel is not installed.
    """
    base = unwrapped(model)
    if base.get_input_embeddings().weight.device.type != "cuda":
        return False
    from liger_kernel.transformers import LigerSwiGLUMLP
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(base.config.model_type)
    if apply is None:
        return False
    wanted = dict.fromkeys(("rope", "rms_norm", "swiglu", "geglu"), True)
    wanted |= dict.fromkeys(("cross_entropy", "fused_linear_cross_entropy"), False)
    known = inspect.signature(apply).parameters
    apply(**{name: value for name, value in wanted.items() if name in known}, model=base)
    if base.config.model_type == "qwen3_vl":  # it takes swiglu=True there, and does nothing
        for layer in decoder(model).layers:
            layer.mlp.forward = MethodType(LigerSwiGLUMLP.forward, layer.mlp)
    return True


# ---- inside a model ------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """The model with a head, without what peft wraps around it (its layers stay inside)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: nn.Module) -> nn.Module:
    """The language model's stack of layers, without vision tower and head."""
    inner = unwrapped(model).model
    return getattr(inner, "language_model", inner)


def _hidden(self: nn.Module, **inputs: Any) -> Tensor:
    return self.model(**inputs).last_hidden_state


def _forward(base: nn.Module):
    """What runs everything but the head. Of a sharded model it counts as the root's forward, so
    that the root's parameters, the head's among them, are gathered."""
    if not isinstance(base, FSDPModule):
        return partial(_hidden, base)
    if "metis_hidden" not in vars(base):
        base.metis_hidden = MethodType(_hidden, base)
        register_fsdp_forward_method(base, "metis_hidden")
    return base.metis_hidden


def _touch(hidden: Tensor, tower: nn.Module | None) -> Tensor:
    """Zeros as the gradient of a vision tower that saw no image: where another rank's did, both
    must reduce the same parameters."""
    trained = [p for p in tower.parameters() if p.requires_grad] if tower is not None else []
    for parameter in trained:
        hidden = hidden + 0 * parameter.flatten()[0].to(hidden.dtype)
    return hidden


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a head, adapters folded in."""
    saved = getattr(layer, "modules_to_save", None)
    if saved:  # peft's copy that is trained in full
        active: Sequence[str] = layer.active_adapters
        return _weights(saved[active[0]])
    if not hasattr(layer, "lora_A"):
        return layer.weight, layer.bias
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    inner = layer.get_base_layer()
    if layer.disable_adapters or layer.merged or not active:
        return inner.weight, inner.bias
    kept = isinstance(layer.lora_dropout[active[0]], nn.Identity)
    if len(active) > 1 or layer.use_dora[active[0]] or not kept:
        raise ValueError(
            f"the head wears adapters {active} that cannot be folded into one weight (several, "
            "DoRA or dropout); leave lm_head out of target_modules"
        )
    name = active[0]
    delta = layer.lora_B[name].weight @ layer.lora_A[name].weight
    return inner.weight + (layer.scaling[name] * delta).to(inner.weight.dtype), inner.bias


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    prefix_layout: PrefixLayout | None = None,
    *,
    fallback: str,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attention as transformers calls it: query [1, Hq, T, D], key and value [1, Hkv, T, D]."""
    if prefix_layout is None:
        name = None if fallback == "eager" else fallback
        plain = _eager(module) if name is None else ALL_ATTENTION_FUNCTIONS[name]
        return plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; packed batches know none. Set it to 0")
    out = shared_prefix_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        prefix_layout,
        scale=scaling,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
    )
    return out[None], None


def _eager(module: nn.Module):
    """eager is no entry of the interface but a function of each model's own file."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _mask(*args: Any, fallback: str, **kwargs: Any):
    return None if _packed.get() else ALL_MASK_ATTENTION_FUNCTIONS[fallback](*args, **kwargs)


for _name in FALLBACKS:
    AttentionInterface.register(PREFIX + _name, partial(_attention, fallback=_name))
    AttentionMaskInterface.register(PREFIX + _name, partial(_mask, fallback=_name))
