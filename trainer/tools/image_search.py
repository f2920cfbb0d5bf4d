"""The image_search tool: which known images look like the question's? By perceptual hash."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import imagehash
import numpy as np
from PIL.Image import Image

from trainer.tools.protocol import ToolError
from trainer.tools.text_search import numbered
from trainer.types import Observation, Session

HASH_BITS = 64


class ImageSearch:
    """Finds the known images nearest to image_1, and answers with their texts.

    Near means few differing bits of the 64-bit perceptual hash, which survives scaling, mild noise
    and recompression, and neither cropping nor rotation. Unrelated pictures differ in about 32.
    """

    name = "image_search"

    def __init__(
        self,
        entries: Sequence[tuple[Image, str]],
        *,
        max_distance: int = 8,
        top_k: int = 3,
        per_trajectory: int | None = None,
    ):
        """entries: images with the text to return for each. max_distance: bits, 0 to 64.
        per_trajectory: how many calls of one session are answered; None: all of them.
        Raises ValueError for one out of range or an image without pixels."""
        if not 0 <= max_distance <= HASH_BITS:
            raise ValueError(f"max_distance must be 0 to {HASH_BITS}, got {max_distance}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if per_trajectory is not None and per_trajectory < 1:
            raise ValueError(f"per_trajectory must be at least 1 or None, got {per_trajectory}")
        self.texts = [text for _, text in entries]
        self.max_distance = max_distance
        self.top_k = top_k
        self.per_trajectory = per_trajectory
        hashes = [_hash(image) for image, _ in entries]
        self._hashes = np.array(hashes, dtype=bool).reshape(len(hashes), HASH_BITS)
        # By identity, since a session is mutable and so has no hash; gone with its session.
        self._calls: dict[int, int] = {}

    def search(self, image: Image) -> list[str]:
        """The texts of at most top_k images near enough, the nearest first, ties in order."""
        distances = (self._hashes != _hash(image)).sum(axis=1)
        order = np.argsort(distances, kind="stable")[: self.top_k]
        return [self.texts[i] for i in order if distances[i] <= self.max_distance]

    async def call(self, session: Session) -> Observation:
        """Search for images that look like image_1 and return what is known of them."""
        if not session.images or 0 in session.images[0].size:
            raise ToolError("there is no image to search for")
        if self.per_trajectory is not None:
            if id(session) not in self._calls:
                weakref.finalize(session, self._calls.pop, id(session), None)
            calls = self._calls[id(session)] = self._calls.get(id(session), 0) + 1
            if calls > self.per_trajectory:
                return Observation("image_search was called before: its result stands above.")
        return Observation(numbered(self.search(session.images[0])))


def _hash(image: Image) -> np.ndarray:
    """[64] bool"""
    if 0 in image.size:
        raise ValueError(f"the image is empty: {image.width}x{image.height} pixels")
    return imagehash.phash(image.convert("RGB")).hash.ravel()
