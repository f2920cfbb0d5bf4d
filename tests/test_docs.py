"""Every path of the repository that a document, docstring or comment names exists."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / n for n in ("README.md", "AGENTS.md", "LOG.md") if (ROOT / n).exists()]
FOLDERS = ("metis_kernels", "trainer", "tests", "bench", "csrc")
SOURCES = sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".sh"))
PATH = re.compile(r"(?<![\w/.<-])((?:" + "|".join(FOLDERS) + r")/[\w./-]*\w)(?![\w<*{]|/[<*{$])")


def cited(text: str) -> set[str]:
    """Paths in text that begin with one of our folders. Patterns (*, <gpu>) are not paths."""
    return {m for m in PATH.findall(text) if "*" not in m}


def prose(path: Path) -> str:
    """Strings and comments of a source file."""
    if path.suffix != ".py":
        return path.read_text()
    kinds = {tokenize.STRING, tokenize.COMMENT}
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return "\n".join(t.string for t in tokens if t.type in kinds)


def test_the_pattern_finds_paths():
    text = "see `trainer/rl.py`, bench/results/<gpu>.json and tests/trainer/; not a/tests/x.py"
    assert cited(text) == {"trainer/rl.py", "tests/trainer"}


@pytest.mark.parametrize("path", DOCUMENTS + SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_cited_paths_exist(path):
    if path.name == "test_docs.py":
        return
    text = path.read_text() if path in DOCUMENTS else prose(path)
    missing = sorted(p for p in cited(text) if not (ROOT / p).exists())
    assert not missing, f"{path.relative_to(ROOT)} names {missing}"
