"""Generation with transformers, on the training weights themselves: there is no second copy.

Every trajectory has its own seed. Token t of a turn is the inverse of the policy's distribution at
one uniform number drawn from that seed, so a trajectory does not depend on what else is in its
batch (to the rounding of the model's arithmetic).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from trainer.engines.generation import Generation, Sequences
from trainer.engines.kv import RowCache
from trainer.engines.sampling import Protocol, Sampled
from trainer.model import VisionLanguageModel

__all__ = ["Counts", "HFEngine", "Sampled"]


@dataclass
class Counts:
    """What an engine did; padding is counted nowhere."""

    sampled_tokens: int = 0
    prefill_tokens: int = 0
    """Of prompts and observations (and the last token of each turn before) that were run."""
    shared_tokens: int = 0
    """Of prompts that were not run because another rollout of the batch had the same."""
    kept_tokens: int = 0
    """Of earlier turns that were not run again because their KV was there."""
    seconds: float = 0.0


class HFEngine:
    """Samples turns with the model's forward.

    temperature: 0 is greedy. max_batch: trajectories played at once; their KV is held until they
    end. max_cache_bytes: KV of a batch must fit in so much; see `batch_size`. cuda_graphs: capture
    the forward over one token and replay it, which spares the launch of its kernels; on CUDA
    alone, for models without data-dependent control flow (no mixture of experts). transformers'
    StaticCache is not used for it: that has one next slot for all rows.

    Raises ValueError for a model whose cache is not all keys and values of full attention, or that
    does not say its positions.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        *,
        temperature: float = 1.0,
        max_batch: int = 256,
        max_cache_bytes: int | None = None,
        cuda_graphs: bool = False,
    ):
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or more")
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; expected at least 1")
        if cuda_graphs and vlm.device.type != "cuda":
            raise ValueError(f"cuda_graphs needs a model on CUDA; this one is on {vlm.device}")
        self.vlm = vlm
        self.temperature = temperature
        self.max_batch = max_batch
        self.max_cache_bytes = max_cache_bytes
        self.cuda_graphs = cuda_graphs
        self.counts = Counts()
        self.protocol = Protocol(vlm.tokenizer, vlm.head.shape[0])
        self.forbidden = self.protocol.forbidden
        device = vlm.device
        self.forbidden_ids = torch.tensor(self.forbidden, dtype=torch.long, device=device)
        self.closing = self.protocol.closing.to(device)
        text = _decoder(self.vlm.model).config.get_text_config()
        self.layers = text.num_hidden_layers
        others = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
        if others:
            raise ValueError(
                f"the model has layers of {sorted(others)}; this engine keeps the keys and values "
                "of full attention only"
            )

    # ---- what is asked of it ---------------------------------------------------------------------

    def generate(
        self, sequences: Sequences, seeds: Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[Sampled]:
        """The next turn of every (ids, images); seeds[i] is what numpy seeds its stream with.

        For one turn only: `open` keeps what a further turn needs.
        """
        result: list[Sampled] = []
        longest = max((len(ids) for ids, _ in sequences), default=0)
        size = self.batch_size(longest + max_new_tokens)
        for start in range(0, len(sequences), size):
            part = sequences[start : start + size]
            with self.open() as generation:
                result += generation.turn(
                    range(len(part)), part, seeds[start : start + size], max_new_tokens
                )
        return result

    def open(self) -> Generation:
        """A batch of trajectories whose KV is kept between turns; close it."""
        return Generation(self)

    def batch_size(self, max_tokens: int) -> int:
        """How many trajectories of so many tokens may be played at once: max_batch, or as many as
        have room in max_cache_bytes (one at least)."""
        if self.max_cache_bytes is None:
            return self.max_batch
        text = _decoder(self.vlm.model).config.get_text_config()
        heads = text.num_key_value_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        token_bytes = 2 * self.layers * heads * size * self.vlm.head.element_size()
        fit = self.max_cache_bytes // (token_bytes * max(max_tokens, 1))
        return min(self.max_batch, max(fit, 1))

    def stats(self, *, reset: bool = True) -> dict[str, float]:
        """The counts since they were last reset, and sampled tokens a second (0 where there are
        none)."""
        counts = self.counts
        rate = counts.sampled_tokens / counts.seconds if counts.seconds else 0.0
        if reset:
            self.counts = Counts()
        return asdict(counts) | {"sampled_per_second": rate}

    # ---- what a Generation asks of it ------------------------------------------------------------

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without autograd; afterwards every module is in the mode it was in.

        Looks at the model anew: it may have been wrapped or been given another attention since.
        Raises ValueError where its attention takes no mask.
        """
        self._decoder = _decoder(self.vlm.model)
        # transformers 5.24 gave the argument a new name.
        parameters = inspect.signature(self._decoder.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        name = self._decoder.config.get_text_config()._attn_implementation
        if name.startswith(("flash_attention", "flex_attention", "paged")):
            raise ValueError(
                f"attention is {name!r}, which takes no mask of rows with their own lengths; load "
                "the model with attn_implementation='sdpa'"
            )
        # Also where metis_kernels.adapters.hf has put its attention before it.
        self._mask_is_added = name.endswith("eager")
        training = [module for module in self.vlm.model.modules() if module.training]
        self.vlm.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for module in training:
                module.training = True

    def positions(
        self, inputs: dict[str, Tensor], first: Sequence[int]
    ) -> tuple[Tensor, list[int]]:
        """(M-RoPE positions [3, n, q] of collated pieces that begin at position first[i], the
        position behind each). Padding has position first[i]."""
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        # On the CPU: the model's method asks for every image's size as a number.
        known = {name: inputs[name].cpu() for name in names if name in inputs}
        start = torch.tensor(first)
        position, _ = self._decoder.get_rope_index(**known)
        valid = known["attention_mask"].bool()
        last = position.masked_fill(~valid, -1).amax((0, 2))
        position = position.masked_fill(~valid, 0) + start[:, None]
        del inputs["mm_token_type_ids"]  # only of use to a model that is given no positions
        return position.to(self.vlm.device), (last + 1 + start).tolist()

    def forward(
        self, cache: RowCache, position_ids: Tensor, mask: Tensor | None, **inputs: Tensor
    ) -> Tensor:
        """Logits [n, V] at the last of q tokens; mask [n, q, slots] bool says what each may see.

        A mask of four dimensions is the one kind that every attention implementation is handed as
        it is: a name that transformers does not know would be handed none at all.
        """
        if mask is not None:
            mask = mask[:, None]
            if self._mask_is_added:
                dtype = self.vlm.head.dtype
                zero = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                mask = zero.masked_fill(~mask, torch.finfo(dtype).min)
        output = self.vlm.model(
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: cache},
            **inputs,
        )
        return output.logits[:, -1]


def _decoder(model: torch.nn.Module) -> torch.nn.Module:
    """The module that knows the positions, inside whatever wraps it."""
    for module in model.modules():
        if hasattr(type(module), "get_rope_index"):
            return module
    raise ValueError(
        f"{type(model).__name__} has no get_rope_index: the engine knows models of the Qwen-VL "
        "family"
    )
