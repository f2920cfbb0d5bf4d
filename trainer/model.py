"""A vision-language model with its tokenizer and image processor, and how sequences become tensors.

Qwen3-VL-8B and the demo's tiny model are loaded by the same lines. The image processor is
transformers' PIL one and the expansion of image placeholders is done here, so that torchvision
is not needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from metis_kernels.adapters import hf
from trainer.config import ConfigError, LoraConfig, check_path

IMAGE_TOKEN = "<|image_pad|>"
_MAX_ENCODED = 4096
"""Texts whose ids are remembered."""
_TINY_TOWER = 10_000_000
"""Parameters of a vision tower that is small enough to learn with the rest."""
_OFFLOADED = 1 << 20
"""Bytes from which on a layer's input is worth the way to host memory."""


@dataclass
class VisionLanguageModel:
    model: torch.nn.Module
    """A transformers model for image-text-to-text with the Qwen-VL input names. Adapters are put
    into its layers, never around it: `model.model` and `model.generate` are always its own."""
    tokenizer: object
    image_processor: object
    lora: LoraConfig | None = None
    """What the adapters in the model are, where it has any."""
    _encoded: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        hf.prepare(self.model)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: torch.dtype | str = "auto",
        device: str = "cpu",
        *,
        freeze_vision: bool | None = None,
        checkpointing: Literal["none", "layers", "offload"] = "none",
        lora: LoraConfig | None = None,
    ) -> VisionLanguageModel:
        """Loads a local folder, or a hub name where there is a network. The settings are those of
        `trainer.config.ModelConfig`.

        With checkpointing the model is in training mode, without which it would have no effect.

        Raises FileNotFoundError where a path is given that does not exist, and ConfigError for what
        cannot be had: adapters where there is no such layer, 4 bits without bitsandbytes.
        """
        from transformers import AutoModelForImageTextToText, AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        check_path(path)
        if lora is not None and lora.quantize == "nf4":
            options = _nf4(dtype, device)
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **options)
        else:
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device)
        if lora is None:
            freeze_tower(model, freeze_vision)
        else:
            add_adapters(model, lora)
        if checkpointing != "none":
            checkpoint_layers(model, offload=checkpointing == "offload")
        return cls(
            model,
            AutoTokenizer.from_pretrained(path),
            Qwen2VLImageProcessorPil.from_pretrained(path),
            lora,
        )

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes model, tokenizer and image processor; `dtype` is that of the stored weights.

        Adapters are merged into what is written (the model in memory keeps them), 4-bit weights
        are widened first: the folder is an ordinary model.
        """
        model = self.model
        state = model.state_dict() if self.lora is None else merged_state(model)
        if dtype is not None:
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
        if self.lora is not None:
            model = _skeleton(model, next(iter(state.values())).dtype)
        model.save_pretrained(path, state_dict=state)
        self.tokenizer.save_pretrained(path)
        self.image_processor.save_pretrained(path)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def head(self) -> Tensor:
        """The weight of the LM head [V, H]."""
        return self.model.get_output_embeddings().weight

    def grid(self, image: Image) -> tuple[int, int, int]:
        """(1, h, w): how many patches the image processor would cut an image into, before the model
        merges them."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        processor = self.image_processor
        width, height = image.size
        high, wide = smart_resize(
            height,
            width,
            processor.patch_size * processor.merge_size,
            min_pixels=processor.size["shortest_edge"],
            max_pixels=processor.size["longest_edge"],
        )
        return 1, high // processor.patch_size, wide // processor.patch_size

    def image_tokens(self, image: Image) -> int:
        """How many placeholders an image takes."""
        width, height = image.size
        patches = self.image_processor.get_number_of_image_patches(height, width, {})
        return patches // self.image_processor.merge_size**2

    def encode(self, text: str, images: Sequence[Image] = ()) -> list[int]:
        """Token ids of a text in which every image has one placeholder; placeholders are expanded.

        Raises ValueError where text and images disagree: an image is never silently lost.
        """
        parts = text.split(IMAGE_TOKEN)
        if len(parts) - 1 != len(images):
            raise ValueError(
                f"the text has {len(parts) - 1} image placeholders but {len(images)} images came"
            )
        expanded = parts[0]
        for image, part in zip(images, parts[1:], strict=True):
            expanded += IMAGE_TOKEN * self.image_tokens(image) + part
        # G rollouts of a question begin alike, and templates repeat themselves.
        if expanded not in self._encoded:
            if len(self._encoded) >= _MAX_ENCODED:
                self._encoded.clear()
            ids = self.tokenizer(expanded, add_special_tokens=False)["input_ids"]
            self._encoded[expanded] = tuple(ids)
        return list(self._encoded[expanded])

    def collate(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[Image]]],
        *,
        left: bool = False,
    ) -> dict[str, Tensor]:
        """Pads (ids, images) to one batch of model inputs; left=True for generation.

        Asserts that every sequence has as many placeholders as its images need.
        """
        length = max(len(ids) for ids, _ in sequences)
        pad = self.tokenizer.pad_token_id
        input_ids = torch.full((len(sequences), length), pad)
        attention_mask = torch.zeros_like(input_ids)
        for row, (ids, _) in enumerate(sequences):
            span = slice(length - len(ids), length) if left else slice(0, len(ids))
            input_ids[row, span] = torch.tensor(ids)
            attention_mask[row, span] = 1
        is_image = (input_ids == self.image_token_id).long() * attention_mask
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": is_image,
        }
        images = [image for _, some in sequences for image in some]
        if images:
            inputs.update(self.pixels(images))
            placeholders = int(is_image.sum())
            expected = int(inputs["image_grid_thw"].prod(1).sum())
            expected //= self.image_processor.merge_size**2
            assert placeholders == expected, (placeholders, expected)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def pixels(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """Pixel values and grids; an image object that comes up again is processed once."""
        order = {id(image): image for image in images}
        processed = self.image_processor(images=list(order.values()), return_tensors="pt")
        grid = processed["image_grid_thw"]
        pieces = processed["pixel_values"].split(grid.prod(1).tolist())
        where = {key: n for n, key in enumerate(order)}
        index = [where[id(image)] for image in images]
        return {
            "pixel_values": torch.cat([pieces[n] for n in index]),
            "image_grid_thw": grid[index],
        }


def hidden_states(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states [B, T, H]; the LM head is not run."""
    return model.model(**inputs, use_cache=False).last_hidden_state


def freeze_tower(model: torch.nn.Module, freeze: bool | None) -> None:
    """Takes the vision tower, its merger included, out of training; None: unless it is tiny.

    Raises ConfigError where the model has no vision tower to be found.
    """
    tower = _tower(model)
    if freeze is None:
        freeze = sum(p.numel() for p in tower.parameters()) >= _TINY_TOWER
    if freeze:
        tower.requires_grad_(False)


def _tower(model: torch.nn.Module) -> torch.nn.Module:
    tower = model.get_encoder("image")
    if tower is model or tower is model.get_decoder():
        raise ConfigError(f"{type(model).__name__} has no vision tower that transformers knows of")
    return tower


# ---- adapters ------------------------------------------------------------------------------------


def add_adapters(model: torch.nn.Module, lora: LoraConfig) -> None:
    """Puts float32 adapters into linear layers of the language model and freezes all else. They
    begin as nothing: the outputs stay what they are.

    Raises ConfigError for a target that is no linear layer of the language model, the LM head
    above all: the fused loss multiplies with its weight and would not see an adapter.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    inside = set(model.get_decoder().modules())
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module in inside
    ]
    targets = linear
    if lora.targets is not None:
        targets = []
        for target in lora.targets:
            found = [name for name in linear if name == target or name.endswith(f".{target}")]
            if not found:
                leaves = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
                raise ConfigError(
                    f"model.lora.targets has {target!r}, which is no linear layer of the language "
                    f"model (the LM head and the vision tower take no adapter); there are: {leaves}"
                )
            targets += found
    config = PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets
    )
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft made them in the dtype of the weights
            parameter.data = parameter.data.float()


def _nf4(dtype: torch.dtype | str, device: str) -> dict[str, object]:
    """What from_pretrained is given for 4-bit weights. The head stays whole, since the loss
    multiplies with it, and so does the vision tower."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"model.lora.quantize=nf4 needs bitsandbytes ({error}); pip install bitsandbytes, or "
            "use model.lora.quantize=none"
        ) from None
    from transformers import BitsAndBytesConfig

    if isinstance(dtype, str):
        dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "model.visual"],
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def merged_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without adapters that computes what this one does, in host
    memory: W + (alpha / rank) B A, added in float32 and rounded to the dtype of W."""
    from peft.tuners.lora import LoraLayer

    adapted = {
        f"{name}.base_layer.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    state = {}
    tensors = dict(model.state_dict()) | dict(model.named_parameters(remove_duplicate=False))
    packed = tuple(f"{name}." for name, tensor in tensors.items() if _quant_state(tensor))
    for name, tensor in tensors.items():
        # An adapter's own, or the scales that belong to 4-bit weights.
        if ".lora_" in name or name.startswith(packed):
            continue
        tensor = _widened(tensor).detach()
        if name in adapted:
            module = adapted[name]
            for adapter in module.active_adapters:
                delta = module.get_delta_weight(adapter).detach()
                tensor = (tensor.float() + delta).to(tensor.dtype)
        state[name.replace(".base_layer.", ".")] = tensor.cpu()
    return state


def _quant_state(tensor: Tensor) -> object | None:
    """What bitsandbytes needs to widen 4-bit weights; None for any other tensor."""
    return getattr(tensor, "quant_state", None)


def _widened(tensor: Tensor) -> Tensor:
    if _quant_state(tensor) is None:
        return tensor
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(tensor.data, tensor.quant_state)


def _skeleton(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The same model without weights, adapters or quantisation: what knows how to be saved."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton = type(model)(config).to(dtype)
    skeleton.generation_config = model.generation_config
    return skeleton


class Reference:
    """The policy as it was when this was made: what the KL term compares with.

    Only what trains is kept a second time (a LoRA model's adapters, no frozen tower), and takes the
    place of the present weights while

        with reference() as model:
            ...

    lasts; there is no autograd inside, and no backward may be pending. On the way out the present
    weights are back, bit for bit.
    """

    def __init__(self, vlm: VisionLanguageModel):
        self._model = vlm.model
        self._kept = [(p, p.detach().clone()) for p in self._model.parameters() if p.requires_grad]

    @contextmanager
    def __call__(self) -> Iterator[torch.nn.Module]:
        with torch.no_grad():
            self._swap()
            try:
                yield self._model
            finally:
                self._swap()

    def _swap(self) -> None:
        # The contents, one tensor at a time, and not the tensors: FSDP keeps views of its own.
        for present, other in self._kept:
            before = present.clone()
            present.copy_(other)
            other.copy_(before)
        for module in self._model.modules():
            if isinstance(module, FSDPModule):  # what it gathered before is of the other weights
                module.reshard()


# ---- activation checkpointing --------------------------------------------------------------------


def checkpoint_layers(model: torch.nn.Module, offload: bool) -> None:
    """From now on layers keep their inputs alone and compute the rest again in the backward;
    `offload`: inputs of a MiB or more wait in host memory. Sets the model to training mode, the
    only one in which transformers checkpoints; generation, in evaluation mode, is not touched.

    The layers of a frozen vision tower keep nothing anyway and are left out. Raises ConfigError
    where the model has no layers that can be checkpointed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    tower = _tower(model)
    frozen = not any(p.requires_grad for p in tower.parameters())
    left_out = set(tower.modules()) if frozen else set()
    layers = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module not in left_out
    ]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no layers that transformers can checkpoint; use "
            "model.checkpointing=none"
        )
    run = _offloaded_checkpoint if offload else partial(checkpoint, use_reentrant=False)
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = run
    model.train()


def _offloaded_checkpoint(function, *args):
    # These hooks see the inputs alone: within the layer checkpoint's own come first.
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _to_device):
        return checkpoint(function, *args, use_reentrant=False)


class _Host(NamedTuple):
    tensor: Tensor
    device: torch.device
    copied: torch.cuda.Event | None


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _to_host(tensor: Tensor) -> Tensor | _Host:
    if tensor.numel() * tensor.element_size() < _OFFLOADED:
        return tensor
    if tensor.device.type != "cuda":
        return _Host(tensor.to("cpu", copy=True), tensor.device, None)
    # On a stream of its own, so that the layer computes meanwhile.
    if tensor.device not in _streams:
        _streams[tensor.device] = torch.cuda.Stream(tensor.device)
    stream = _streams[tensor.device]
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)
    return _Host(host, tensor.device, stream.record_event())


def _to_device(kept: Tensor | _Host) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if kept.copied is not None:
        torch.cuda.current_stream(kept.device).wait_event(kept.copied)
    return kept.tensor.to(kept.device, non_blocking=True)
