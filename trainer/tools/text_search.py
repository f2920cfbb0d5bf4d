"""The text_search tool: BM25 over passages in memory. No network, and the same answer each time."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN

from trainer.tools.protocol import ToolError
from trainer.types import Observation, Session

MAX_QUERY = 1_000
"""Characters of a query, as in the reference."""

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
        if len(query) > MAX_QUERY:
            raise ToolError(
                f"the query has {len(query):,} characters, at most {MAX_QUERY:,} are allowed"
            )
        return Observation(numbered(self.search(query)))


def numbered(results: Sequence[str]) -> str:
    """Results as numbered JSON strings, one a line: a passage cannot pass for the list itself."""
    if not results:
        return "No result."
    lines = (json.dumps(result, ensure_ascii=False) for result in results)
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
