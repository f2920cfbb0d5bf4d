"""The image_search tool: what is known of images that look like the question's?

ImageSearch         known images in memory, by perceptual hash
ImageIndex          a folder that `build_image_index` made, mapped; by hash or by embeddings
CachedImageSearch   results of an earlier search, looked up: the reference's JSON, or a plainer one

`trainer.tools.web.WebImageSearch` asks a service. To the policy all four are the same tool.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from PIL.Image import Image

from trainer.images import ImageLimits, open_image
from trainer.tools import _stored
from trainer.tools._stored import Lines, LinesWriter
from trainer.tools.protocol import ToolError, ToolInfraError
from trainer.tools.text_search import bounded, numbered
from trainer.types import Observation, Question, Session

log = logging.getLogger(__name__)

HASH_BITS = 64
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_VERSION = 1
_BATCH = 256

Embed = Callable[[Sequence[Image]], np.ndarray]
"""[n] RGB images -> [n, D] numbers."""


class ImageSearchTool:
    """What every image_search shares: it searches for image_1, so often a trajectory."""

    name = "image_search"

    def __init__(self, per_trajectory: int | None):
        if per_trajectory is not None and per_trajectory < 1:
            raise ValueError(f"per_trajectory must be at least 1 or None, got {per_trajectory}")
        self.per_trajectory = per_trajectory
        # By identity, since a session is mutable and so has no hash; gone with its session.
        self._calls: dict[int, int] = {}

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
        try:
            # Here and not in a thread: rollouts of one question share the object, and PIL's lazy
            # loading is not safe in two threads at once.
            session.images[0].load()
        except Exception as error:
            raise ToolInfraError(f"image_1 cannot be decoded: {type(error).__name__}") from None
        return await self.answer(session)

    async def end(self, session: Session) -> None:
        """The trajectory is over: its count is not kept."""
        self._calls.pop(id(session), None)

    async def answer(self, session: Session) -> Observation:
        raise NotImplementedError


class ImageSearch(ImageSearchTool):
    """Finds the known images nearest to image_1, and answers with their texts.

    Near means few differing bits of the 64-bit perceptual hash, which survives scaling, mild noise
    and recompression, and neither cropping nor rotation. Unrelated pictures differ in about 32.
    """

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
        _check_range(max_distance, top_k)
        super().__init__(per_trajectory)
        self.texts = [text for _, text in entries]
        self.max_distance = max_distance
        self.top_k = top_k
        hashes = [_hash(image) for image, _ in entries]
        self._hashes = np.array(hashes, dtype=bool).reshape(len(hashes), HASH_BITS)

    def search(self, image: Image) -> list[str]:
        """The texts of at most top_k images near enough, the nearest first, ties in order."""
        distances = (self._hashes != _hash(image)).sum(axis=1)
        order = np.argsort(distances, kind="stable")[: self.top_k]
        return [self.texts[i] for i in order if distances[i] <= self.max_distance]

    async def answer(self, session: Session) -> Observation:
        return Observation(numbered(self.search(session.images[0])))


def _check_range(max_distance: int, top_k: int) -> None:
    if not 0 <= max_distance <= HASH_BITS:
        raise ValueError(f"max_distance must be 0 to {HASH_BITS}, got {max_distance}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")


def _hash(image: Image) -> np.ndarray:
    """[64] bool"""
    if 0 in image.size:
        raise ValueError(f"the image is empty: {image.width}x{image.height} pixels")
    return imagehash.phash(image.convert("RGB")).hash.ravel()


def _packed(image: Image) -> int:
    """The 64 bits of `_hash` as one number."""
    return int.from_bytes(np.packbits(_hash(image)).tobytes(), "big")


# --- An index on disk -----------------------------------------------------------------------------


class ImageIndex(ImageSearchTool):
    """image_search over a folder that `build_image_index` made. Everything is mapped.

    By perceptual hash: one xor and a count of bits for every image. With `embed`, by the cosine
    between its embedding of image_1 and those of the index.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_distance: int = 8,
        top_k: int = 3,
        per_trajectory: int | None = 1,
        embed: Embed | None = None,
        min_similarity: float = 0.5,
        source: str | Path | None = None,
    ):
        """embed: as in the building; needs an index with embeddings. min_similarity: the least
        cosine of a result. source: what the index was built from, to be compared with it.
        Raises ValueError for one out of range, and for a folder that is damaged, stale or lacks
        the embeddings; FileNotFoundError where there is none."""
        _check_range(max_distance, top_k)
        if not -1 <= min_similarity <= 1:
            raise ValueError(f"min_similarity must be -1 to 1, got {min_similarity}")
        super().__init__(per_trajectory)
        self.folder = Path(folder)
        self.max_distance = max_distance
        self.top_k = top_k
        self.embed = embed
        self.min_similarity = min_similarity
        self.manifest = _stored.read_manifest(self.folder, "image", _VERSION)
        if source is not None:
            suffixes = _suffixes(source)
            _stored.check_source(self.manifest, source, lambda: _digest(source), suffixes)
        self.texts = Lines(self.folder / "texts.jsonl")
        self._hashes = np.load(self.folder / "hashes.npy", mmap_mode="r")
        self._embeddings = None
        if embed is not None:
            if not self.manifest["embedded"]:
                raise ValueError(f"{folder} has no embeddings: build it again, with some")
            self._embeddings = np.load(self.folder / "embeddings.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._hashes)

    def search(self, image: Image) -> list[str]:
        """The texts of at most top_k images near enough, the nearest first, ties in order."""
        if self.embed is None:
            far = np.bitwise_count(self._hashes ^ np.uint64(_packed(image)))
            limit: float = self.max_distance
        else:
            wanted = _normalised(self.embed([image.convert("RGB")]))[0]
            if len(wanted) != self._embeddings.shape[1]:
                raise ValueError(
                    f"embed gives {len(wanted)} numbers, the index has {self._embeddings.shape[1]}"
                )
            far = -(self._embeddings @ wanted)
            limit = -self.min_similarity
        near = np.flatnonzero(far <= limit)
        order = near[np.argsort(far[near], kind="stable")][: self.top_k]
        return [self.texts[int(i)] for i in order]

    async def answer(self, session: Session) -> Observation:
        return Observation(bounded(await asyncio.to_thread(self.search, session.images[0])))


def build_image_index(
    source: str | Path,
    folder: str | Path,
    *,
    embed: Embed | None = None,
    embeddings: str | Path | np.ndarray | None = None,
    threads: int = 4,
) -> dict[str, Any]:
    """Index images with their texts for `ImageIndex`. Returns the manifest.

    source: a file of JSON lines {"image": path beside it, "text": what to answer}; or a folder of
    images, whose texts are the .txt files of the same names, else the names without their ending.
    Images are opened by `open_image`; what it refuses is logged, skipped and counted.

    embeddings: [N, D] numbers or a .npy of them, one row for each image of the source, in order;
    or embed: makes them. The folder appears at once and whole, in the place of an index that was
    there. Raises ValueError where no image can be opened, rows and images do not match, or a line
    is wrong (with its number).
    """
    if embed is not None and embeddings is not None:
        raise ValueError("give embed or embeddings, not both")
    if isinstance(embeddings, (str, Path)):
        embeddings = np.load(embeddings, mmap_mode="r", allow_pickle=False)
    digest = hashlib.sha256()
    files = _stored.fingerprint(_stored.files_of(source, _suffixes(source)))
    hashes: list[int] = []
    rows: list[np.ndarray] = []
    seen = 0
    with _stored.new_folder(Path(folder)) as place, ThreadPoolExecutor(threads) as pool:
        with LinesWriter(place / "texts.jsonl") as texts:
            entries = enumerate(_entries(source, digest))
            while batch := list(itertools.islice(entries, _BATCH)):
                seen += len(batch)
                opened = pool.map(lambda entry: _open(*entry[1][:2], embed is not None), batch)
                kept = [(entry, *one) for entry, one in zip(batch, opened, strict=True) if one]
                for (_, (_, _, text)), packed, _ in kept:
                    texts.write(text)
                    hashes.append(packed)
                if embed is not None and kept:
                    rows.append(_normalised(embed([image for *_, image in kept])))
                elif embeddings is not None and kept:
                    wanted = [n for (n, _), *_ in kept]
                    if wanted[-1] < len(embeddings):
                        rows.append(_normalised(embeddings[wanted]))
        if not hashes:
            raise ValueError(f"no image of {source} can be opened")
        if embeddings is not None and len(embeddings) != seen:
            raise ValueError(f"{len(embeddings)} embeddings for {seen} images of {source}")
        np.save(place / "hashes.npy", np.array(hashes, dtype=np.uint64))
        if rows:
            np.save(place / "embeddings.npy", np.concatenate(rows))
        return _stored.write_manifest(
            place,
            kind="image",
            version=_VERSION,
            images=len(hashes),
            skipped=seen - len(hashes),
            embedded=bool(rows),
            source={"sha256": digest.hexdigest(), "files": files},
        )


def _suffixes(source: str | Path) -> tuple[str, ...]:
    return (*SUFFIXES, ".txt") if Path(source).is_dir() else (".jsonl", ".jsonl.gz")


def _entries(source: str | Path, digest: Any) -> Iterator[tuple[Path, bytes | None, str]]:
    """Path, content if it was read, and text of every image. The content of a folder goes into
    the digest; of a file of lines the lines do, not the images that they name."""
    source = Path(source)
    if not source.is_dir():
        for path, number, line in _stored.read_lines(source, digest):
            try:
                record = json.loads(line)
                image, text = record["image"], record["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                image = text = None
            if not (isinstance(image, str) and isinstance(text, str)):
                raise ValueError(f'{path}, line {number} is not {{"image": path, "text": text}}')
            yield path.parent / image, None, text
        return
    for path in _stored.files_of(source, SUFFIXES):
        content = _bytes(path)
        about = path.with_suffix(".txt")
        text = about.read_text("utf-8", "replace").strip() if about.is_file() else path.stem
        for part in (path.name.encode(), content, text.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
        yield path, content, text


def _bytes(path: Path) -> bytes:
    """A file's content, as far as telling that it is too long takes: it may be a device."""
    with open(path, "rb") as file:
        return file.read(ImageLimits.file_bytes + 1)


def _digest(source: str | Path) -> str:
    digest = hashlib.sha256()
    for _ in _entries(source, digest):
        pass
    return digest.hexdigest()


def _open(path: Path, content: bytes | None, keep: bool) -> tuple[int, Image | None] | None:
    """Hash and, if it is to be kept, the image; None, logged, for what is no image."""
    try:
        image = open_image(_bytes(path) if content is None else content)
    except (ValueError, OSError) as error:
        log.warning("left out of the index: %s: %s", path, error)
        return None
    return _packed(image), image if keep else None


def _normalised(rows: np.ndarray) -> np.ndarray:
    """[n, D] float32 of length 1. Raises ValueError for what is not finite or not 2-D."""
    rows = np.asarray(rows, dtype=np.float32)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(f"embeddings must be finite and [n, D], got shape {list(rows.shape)}")
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


# --- Cached results -------------------------------------------------------------------------------


def image_key(image: Image) -> str:
    """ "sha256:" and the hash of the image's size and RGB pixels: equal for the same picture in
    another file, or in another format without loss."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    size = f"{rgb.width}x{rgb.height}:".encode()
    return f"sha256:{hashlib.sha256(size + rgb.tobytes()).hexdigest()}"


class CachedImageSearch(ImageSearchTool):
    """image_search that looks results up which were fetched before; no network, no chance.

    A file is a JSON object, key -> results, in one of two forms, which may be mixed:

        {"<key>": {"tool_returned_web_title": ["title", ...], "cached_images_path": ["a.png", ...]}}
        {"<key>": [{"title": "...", "url": "...", "snippet": "...", "image": "a.png"}, ...]}

    The first is the reference's (its key is the row's `extra_info.index`); in the second all four
    are optional, and "link" is another name of "url". Images are paths below `root`; they become
    images of the session, in the order of the results.

    A session is looked up by `key(session)`, else by `image_key` of its image_1, else by the
    question of `questions` whose first image that is: its id, or what follows a slash in it
    ("metis/17" finds "17", which is what the reference writes).
    """

    def __init__(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        root: str | Path | None = None,
        key: Callable[[Session], str | None] | None = None,
        questions: Iterable[Question] = (),
        top_k: int = 10,
        per_trajectory: int | None = 1,
        limits: ImageLimits | None = None,
    ):
        """root: the folder of the images; None: none are shown. limits: the toolbox's.
        Raises ValueError for a file that is not of such a form, naming file and key, and where two
        questions with unlike images have one key."""
        _check_range(0, top_k)
        super().__init__(per_trajectory)
        self.root = None if root is None else Path(root).resolve()
        self.key = key
        self.top_k = top_k
        self.limits = limits or ImageLimits()
        self._results: dict[str, list[dict[str, str]]] = {}
        for path in [paths] if isinstance(paths, (str, Path)) else paths:
            self._results |= _read_cache(Path(path))
        self._names = self._named(questions)

    def _named(self, questions: Iterable[Question]) -> dict[str, str]:
        """image_key of a question's image_1 -> its key in the cache."""
        names: dict[str, str] = {}
        owners: dict[str, tuple[str, str]] = {}
        for question in questions:
            parts = question.id.split("/")
            ids = ("/".join(parts[n:]) for n in range(len(parts)))
            name = next((one for one in ids if one in self._results), None)
            if name is None or not question.images:
                continue
            pixels = image_key(question.images[0])
            owner, whose = owners.setdefault(name, (pixels, question.id))
            if owner != pixels:
                raise ValueError(
                    f"key {name!r} fits two questions, {whose} and {question.id}, whose images "
                    "differ: pass key= in place of questions="
                )
            names.setdefault(pixels, name)
        return names

    def __len__(self) -> int:
        return len(self._results)

    def find(self, session: Session) -> list[dict[str, str]]:
        """At most top_k results for the session's image_1; none where the cache lacks it."""
        key = self.key(session) if self.key is not None else None
        if key is None or key not in self._results:
            key = image_key(session.images[0])
            key = key if key in self._results else self._names.get(key, "")
        return self._results.get(key, [])[: self.top_k]

    async def answer(self, session: Session) -> Observation:
        return await asyncio.to_thread(self._answer, session)

    def _answer(self, session: Session) -> Observation:
        results = self.find(session)
        images: list[Image] = []
        notes = []
        for result in results:
            image = self._image(result["image"]) if len(images) < self.limits.count else None
            if image is not None:
                images.append(image)
            notes.append(f" (image_{len(session.images) + len(images)})" if image else "")
        text = bounded([result_text(result) for result in results])
        lines = text.split("\n")
        if len(lines) == len(notes):  # not where there is none
            text = "\n".join(line + note for line, note in zip(lines, notes, strict=True))
        session.images.extend(images)
        return Observation(text, tuple(images))

    def _image(self, name: str) -> Image | None:
        """The image, if it is one that a toolbox shows; the cache may name what it likes."""
        if self.root is None or not name:
            return None
        try:
            path = (self.root / name).resolve()
            if not path.is_relative_to(self.root):
                raise ValueError(f"it lies outside of {self.root}")
            image = open_image(_bytes(path), self.limits)
        except (ValueError, OSError) as error:
            log.warning("image %r of an image search is left out: %s", name, error)
            return None
        return image


def result_text(result: dict[str, str]) -> str:
    """Title, address and text of a result, a line each, without those that it lacks."""
    return "\n".join(result[name] for name in ("title", "url", "snippet") if result[name])


def _read_cache(path: Path) -> dict[str, list[dict[str, str]]]:
    try:
        cache = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(cache, dict):
        raise ValueError(f"{path} must be an object, key -> results")
    results = {}
    for key, entry in cache.items():
        try:
            results[key] = _read_results(entry)
        except ValueError as error:
            raise ValueError(f"{path}, key {key[:80]!r}: {error}") from None
    return results


def _read_results(entry: Any) -> list[dict[str, str]]:
    if isinstance(entry, dict):
        titles = entry.get("tool_returned_web_title", [])
        images = entry.get("cached_images_path", [])
        if not (isinstance(titles, list) and isinstance(images, list)):
            raise ValueError("tool_returned_web_title and cached_images_path must be arrays")
        pairs = zip(titles, images, strict=False)  # as the reference does
        entry = [{"title": title, "image": image} for title, image in pairs]
    if not isinstance(entry, list) or not all(isinstance(one, dict) for one in entry):
        raise ValueError("the results must be an array of objects")
    results = []
    for one in entry:
        result = {name: one.get(name) or "" for name in ("title", "url", "snippet", "image")}
        result["url"] = result["url"] or one.get("link") or ""
        for name, value in result.items():
            if not isinstance(value, str):
                raise ValueError(f"{name} must be a string, got {type(value).__name__}")
        results.append(result)
    return results
