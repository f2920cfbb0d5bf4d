"""The text_search tool: BM25 over passages in memory, or in an index on disk that was built once.

No network, and the same answer each time. `TextSearch` holds its passages; `TextIndex` maps the
folder that `build_index` made: millions of passages, and hardly any memory of its own.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import json
import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN

from trainer.tools import _stored
from trainer.tools._stored import Lines, LinesWriter, Source
from trainer.tools.protocol import ToolError
from trainer.types import Observation, Session

MAX_QUERY = 1_000
"""Characters of a query, as in the reference."""
MAX_RESULT = 20_000
"""Characters of one result, as in the reference."""
MAX_RESULTS = 9_000
"""Characters of all results together: less than what a toolbox lets through by default, which
otherwise cuts the list open in the middle of a quoted string."""
MAX_TERMS = 64
"""Words of a query that an index looks up: the rarest. A common word costs a pass over its list."""

_STOPWORDS = frozenset(STOPWORDS_EN)
# Numbers are often what is asked for: 3.14 stays whole, and 1,024 is 1024.
_TOKEN = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?\b|\d+\.\d+\b|\w+")


def tokenise(text: str) -> list[str]:
    """Lower-case words and numbers, stop words left out. One-character tokens stay."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    tokens = (token.replace(",", "") for token in _TOKEN.findall(folded))
    return [token for token in tokens if token not in _STOPWORDS]


class TextSearch:
    """Finds the passages that share the query's rarest words (BM25, Lucene's variant).

    A passage without any word of the query is no result. Ties go to the earlier passage.
    """

    name = "text_search"

    def __init__(self, passages: Sequence[str], top_k: int = 3):
        """Raises ValueError for top_k below 1. No passages at all is allowed: nothing is found."""
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.passages = list(passages)
        self.top_k = top_k
        tokens = [tokenise(passage) for passage in self.passages]
        self._index = None
        if any(tokens):  # the library cannot index nothing
            self._index = bm25s.BM25(method="lucene", backend="numpy")
            self._index.index(tokens, show_progress=False)

    def search(self, query: str, k: int | None = None) -> list[str]:
        """At most k passages (None: top_k), the best first. Any length of query."""
        if self._index is None:
            return []
        known = self._index.get_tokens_ids(tokenise(query))
        if not known:
            return []
        scores = self._index.get_scores_from_ids(known)
        hits = np.flatnonzero(scores > 0)
        best = hits[np.argsort(-scores[hits], kind="stable")]
        return [self.passages[i] for i in best[: self.top_k if k is None else k]]

    async def call(self, session: Session, query: str) -> Observation:
        """Search a collection of texts.

        Args:
            query: a few words to look for
        """
        check_length(query)
        return Observation(numbered(self.search(query)))


def check_length(query: str) -> None:
    """Raises ToolError for a query past MAX_QUERY."""
    if len(query) > MAX_QUERY:
        raise ToolError(
            f"the query has {len(query):,} characters, at most {MAX_QUERY:,} are allowed"
        )


def numbered(results: Sequence[str]) -> str:
    """Results as numbered JSON strings, one a line: a passage cannot pass for the list itself."""
    if not results:
        return "No result."
    lines = (json.dumps(result, ensure_ascii=False) for result in results)
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


def bounded(results: Sequence[str], per_result: int = MAX_RESULT, total: int = MAX_RESULTS) -> str:
    """`numbered`, with at most about `total` characters: the longest results are cut first, each
    inside its quotes, so that a cut opens no string."""
    quoted = [_quote(result, per_result) for result in results]
    room = max(len(quoted), total - 8 * len(quoted))
    left = len(quoted)
    for n in sorted(range(len(quoted)), key=lambda n: len(quoted[n])):
        # Each gets an equal share of what the shorter ones before it have left.
        share = room // left
        if len(quoted[n]) > share:
            quoted[n] = _quote(results[n], share)
        room -= len(quoted[n])
        left -= 1
    return "\n".join(f"{n}. {line}" for n, line in enumerate(quoted, 1)) or numbered([])


def _quote(text: str, limit: int) -> str:
    """The text as a JSON string of at most `limit` characters, cut at its end where it must be."""
    line = json.dumps(text[: limit + 1], ensure_ascii=False)
    kept = min(len(text), limit)
    while len(line) > limit and kept:
        kept = max(0, min(kept - 1, int(kept * limit / len(line)) - 3))
        line = json.dumps(text[:kept] + "...", ensure_ascii=False)
    return line


# --- An index on disk -----------------------------------------------------------------------------

_VERSION = 1
_TOKENISER = hashlib.sha256("\0".join([_TOKEN.pattern, *sorted(_STOPWORDS)]).encode()).hexdigest()
_K1, _B = 1.5, 0.75
_POSTINGS_AT_ONCE = 2 << 20


class TextIndex(TextSearch):
    """text_search over a folder that `build_index` made. Everything is mapped, nothing is read.

    Several processes share the pages. A repeated word of a query counts once, and only its
    MAX_TERMS rarest words count, so that no query is expensive.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        top_k: int = 10,
        source: Source | None = None,
        max_result: int = MAX_RESULT,
        max_results: int = MAX_RESULTS,
    ):
        """source: what the index was built from; given, it is compared with the index.

        Raises ValueError where the folder holds no whole index, one of another version or
        tokeniser, or one of another source; FileNotFoundError where there is no such folder."""
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.folder = Path(folder)
        self.top_k = top_k
        self.max_result = max_result
        self.max_results = max_results
        self.manifest = _stored.read_manifest(self.folder, "text", _VERSION)
        if self.manifest["tokeniser"] != _TOKENISER:
            raise ValueError(f"{folder} was built with another tokeniser: build the index again")
        if source is not None:
            _stored.check_source(self.manifest, source, lambda: _digest(source))
        self.passages = Lines(self.folder / "passages.jsonl")  # type: ignore[assignment]
        self._vocabulary = Lines(self.folder / "vocabulary.txt")
        self._index = bm25s.BM25.load(self.folder, mmap=True, load_vocab=False, show_progress=False)

    def search(self, query: str, k: int | None = None) -> list[str]:
        """At most k passages (None: top_k), the best first, ties in order. Any length of query."""
        terms = self._terms(query)
        if not terms:
            return []
        scores = self._index.get_scores_from_ids(terms)
        return [self.passages[int(i)] for i in best(scores, self.top_k if k is None else k)]

    async def call(self, session: Session, query: str) -> Observation:
        check_length(query)
        found = await asyncio.to_thread(self.search, query)
        return Observation(bounded(found, self.max_result, self.max_results))

    call.__doc__ = TextSearch.call.__doc__  # word for word: the policy knows one text_search

    def _terms(self, query: str) -> list[int]:
        """The ids of the query's known words, the rarest first."""
        vocabulary = self._vocabulary
        known = []
        for token in set(tokenise(query)):
            key = token.encode()
            n = bisect.bisect_left(range(len(vocabulary)), key, key=vocabulary.raw)
            if n < len(vocabulary) and vocabulary.raw(n) == key:
                known.append(n)
        bounds = self._index.scores["indptr"]
        # By id where they are equally rare: the order of additions decides the last bit of a sum.
        return sorted(known, key=lambda n: (int(bounds[n + 1] - bounds[n]), n))[:MAX_TERMS]


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """[<= k] indices of the largest positive scores, largest first, ties in order."""
    hits = np.flatnonzero(scores > 0)
    if len(hits) > k:
        least = np.partition(scores[hits], len(hits) - k)[len(hits) - k]
        hits = hits[scores[hits] >= least]
    return hits[np.argsort(-scores[hits], kind="stable")][:k]


def build_index(source: Source, folder: str | Path) -> dict[str, Any]:
    """Index passages for `TextIndex`. Returns the manifest.

    source: a file of JSON lines (.jsonl, .jsonl.gz), several, or a folder of them, in the order of
    their names. Each line is an object with "text" or "contents" and perhaps "title", which is put
    before the text. Blank lines are skipped.

    The folder appears at once and whole, in the place of an index that was there. The corpus is
    streamed: memory holds the vocabulary, 24 bytes a passage and some 200 MB, never the passages
    nor their tokens. bm25s would hold both, so the scores are computed here, by its formula (its
    "lucene"), and written in its format.

    Raises ValueError, with file and line, for a line that is not such an object, and where no
    passage has a word to search for.
    """
    digest = hashlib.sha256()
    files = _stored.fingerprint(_stored.files_of(source))
    with _stored.new_folder(Path(folder)) as place:
        vocabulary: dict[str, int] = {}
        lengths, distinct = array("i"), array("i")
        with (
            LinesWriter(place / "passages.jsonl") as passages,
            open(place / "tokens.tmp", "wb") as tokens,
            open(place / "counts.tmp", "wb") as counts,
        ):
            for passage in _read_passages(source, digest):
                passages.write(passage)
                words = Counter(tokenise(passage))
                lengths.append(words.total())
                distinct.append(len(words))
                ids = [vocabulary.setdefault(word, len(vocabulary)) for word in words]
                array("i", ids).tofile(tokens)
                array("i", words.values()).tofile(counts)
        if not vocabulary:
            raise ValueError(f"no passage of {source} has a word to search for")
        _write_scores(
            place, vocabulary, np.frombuffer(lengths, "i4"), np.frombuffer(distinct, "i4")
        )
        return _stored.write_manifest(
            place,
            kind="text",
            version=_VERSION,
            tokeniser=_TOKENISER,
            passages=len(passages),
            words=len(vocabulary),
            source={"sha256": digest.hexdigest(), "files": files},
        )


def _digest(source: Source) -> str:
    digest = hashlib.sha256()
    for _ in _stored.read_lines(source, digest):
        pass
    return digest.hexdigest()


def _read_passages(source: Source, digest: Any) -> Iterator[str]:
    for path, number, line in _stored.read_lines(source, digest):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        text = record.get("text", record.get("contents")) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'{path}, line {number} has no string "text" or "contents"')
        title = record.get("title") or ""
        if not isinstance(title, str):
            raise ValueError(f'{path}, line {number}: "title" must be a string')
        yield f"{title}\n{text}" if title else text


def _write_scores(
    place: Path, vocabulary: dict[str, int], lengths: np.ndarray, distinct: np.ndarray
) -> None:
    """The inverted lists of bm25s, sorted by word and then by passage, and the sorted words.

    The postings lie in two files in the order of the passages, distinct [N] of each; they are
    moved to their lists some millions at a time."""
    words = sorted(vocabulary, key=str.encode)
    rank = np.empty(len(words), dtype=np.int32)
    with LinesWriter(place / "vocabulary.txt") as writer:
        for n, word in enumerate(words):
            rank[vocabulary[word]] = n
            writer.write_raw(word.encode())
    tokens = np.memmap(place / "tokens.tmp", dtype=np.int32, mode="r")
    counts = np.memmap(place / "counts.tmp", dtype=np.int32, mode="r")
    ends = np.cumsum(distinct, dtype=np.int64)
    # Cut between passages: an inverted list then fills up in their order.
    cuts = np.searchsorted(ends, np.arange(0, len(tokens), _POSTINGS_AT_ONCE)[1:])
    cuts = np.unique([0, *cuts, len(ends)])
    frequency = np.zeros(len(words), dtype=np.int64)
    for start in range(0, len(tokens), _POSTINGS_AT_ONCE):
        part = rank[tokens[start : start + _POSTINGS_AT_ONCE]]
        frequency += np.bincount(part, minlength=len(words))
    bounds = np.concatenate([[0], np.cumsum(frequency)])
    idf = np.log(1 + (len(lengths) - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
    mean = lengths.mean()
    create = np.lib.format.open_memmap
    data = create(place / "data.csc.index.npy", "w+", np.float32, (len(tokens),))
    indices = create(place / "indices.csc.index.npy", "w+", np.int32, (len(tokens),))
    heads = bounds[:-1].copy()
    for low, high in zip(cuts[:-1], cuts[1:], strict=True):
        span = slice(ends[low - 1] if low else 0, ends[high - 1])
        word = rank[tokens[span]]
        passage = np.repeat(np.arange(low, high, dtype=np.int32), distinct[low:high])
        count = counts[span]
        saturation = count / (_K1 * ((1 - _B) + _B * lengths[passage] / mean) + count)
        score = (idf[word] * saturation).astype(np.float32)
        order = np.argsort(word, kind="stable")
        word = word[order]
        present, first, many = np.unique(word, return_index=True, return_counts=True)
        target = heads[word] + np.arange(len(word)) - np.repeat(first, many)
        data[target] = score[order]
        indices[target] = passage[order]
        heads[present] += many
    data.flush()
    indices.flush()
    np.save(place / "indptr.csc.index.npy", bounds)
    parameters = {"k1": _K1, "b": _B, "delta": 0.5, "method": "lucene", "idf_method": "lucene"}
    parameters |= {"dtype": "float32", "int_dtype": "int32", "num_docs": len(lengths)}
    parameters |= {"version": bm25s.__version__, "backend": "numpy"}
    (place / "params.index.json").write_text(json.dumps(parameters))
    del tokens, counts
    os.remove(place / "tokens.tmp")
    os.remove(place / "counts.tmp")
