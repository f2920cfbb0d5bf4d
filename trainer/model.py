"""A vision-language model with its tokenizer and image processor, and how sequences become tensors.

Qwen3-VL-8B and the demo's tiny model are loaded by the same lines. The image processor is
transformers' PIL one and the expansion of image placeholders is done here, so that torchvision
is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

IMAGE_TOKEN = "<|image_pad|>"
_MAX_ENCODED = 4096
"""Texts whose ids are remembered."""


@dataclass
class VisionLanguageModel:
    model: torch.nn.Module
    """A transformers model for image-text-to-text with the Qwen-VL input names."""
    tokenizer: object
    image_processor: object
    _encoded: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu"):
        """Loads a local folder, or a hub name where there is a network.

        Raises FileNotFoundError where a path is given that does not exist.
        """
        from transformers import AutoModelForImageTextToText, AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        check_path(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device)
        return cls(
            model,
            AutoTokenizer.from_pretrained(path),
            Qwen2VLImageProcessorPil.from_pretrained(path),
        )

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes model, tokenizer and image processor; `dtype` is that of the stored weights."""
        state = self.model.state_dict()
        if dtype is not None:
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
        self.model.save_pretrained(path, state_dict=state)
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
            inputs.update(self._pixels(images))
            placeholders = int(is_image.sum())
            expected = int(inputs["image_grid_thw"].prod(1).sum())
            expected //= self.image_processor.merge_size**2
            assert placeholders == expected, (placeholders, expected)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _pixels(self, images: Sequence[Image]) -> dict[str, Tensor]:
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


def check_path(path: str | Path) -> None:
    """Raises FileNotFoundError for a path (rather than a hub name) where there is no model."""
    local = isinstance(path, Path) or str(path).startswith((".", "/", "~")) or os.sep in str(path)
    folder = Path(path).expanduser()
    hub_name = str(path).count("/") == 1 and not folder.parent.exists()
    if local and not hub_name and not (folder / "config.json").exists():
        raise FileNotFoundError(f"no model at {path}: there is no config.json in such a folder")


def hidden_states(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states [B, T, H]; the LM head is not run."""
    return model.model(**inputs, use_cache=False).last_hidden_state


def optimizer_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float
) -> Tensor:
    """Clips, steps and clears the gradients -> their norm before clipping, 0-d.

    A norm that is not finite changes nothing: weights and optimizer state stay as they were
    (clipping cannot rescue a NaN). The caller sees it in what is returned.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if torch.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()
