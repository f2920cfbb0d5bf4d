"""Whether an answer is right, by rules alone: r_ans where no judge is needed.

A rule that decides is final: no judge changes it. What no rule decides is "undecided", and a judge
may be asked. Rules see nothing but the answer, the truth and the question's options, so no text in
an answer talks them into anything.
"""

from __future__ import annotations

import logging
import re
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.math_answers import math_equal
from trainer.quantities import Outcome, compare, parse_quantity

log = logging.getLogger(__name__)

MAX_ANSWER = 1_000
"""Characters; a longer answer is no answer (1,000 guesses in one are a longer one)."""
MAX_TRUTHS = 64
MATH_SECONDS = 2.0

MASTER_KEYS = (
    "thought process",
    "let's solve this problem step by step",
    "let's think step by step",
    "solution",
    "answer",
    "the answer is",
    "final answer",
    "reasoning",
    "explanation",
    "respuesta",
    "\u89e3",
    "\u89e3\u7b54",
    "\u7b54\u6848",
    "\u304b\u3044\u305b\u3064",
)
"""Answers without content that judges let pass. Source: arXiv 2507.08794, and their kin."""


@dataclass(frozen=True)
class RuleVerdict:
    outcome: Outcome
    rule: str
    """Which rule spoke: "exact", "number", "option", "yes_no", "math", ... Stable: it is logged."""

    @property
    def decided(self) -> bool:
        return self.outcome != "undecided"


def verify(
    answer: str | None,
    truth: Any,
    *,
    question: str = "",
    options: Mapping[str, str] | Sequence[str] | None = None,
    rtol: float | None = None,
    decimals: int | None = None,
    max_answer: int = MAX_ANSWER,
    math_seconds: float = MATH_SECONDS,
) -> RuleVerdict:
    """The verdict of the rules. Never raises: an answer that breaks a rule is "undecided".

    truth: a text or number, or several of which any will do. question: its words may stand behind
    a number ("7 cats"), and its options ("A. cat") are read where none are given. options: {"A":
    text}, or texts that become A, B, ... rtol: relative tolerance of numbers (charts: 0.05).
    decimals: to how many the truth is rounded; what rounds to it is right, and it alone. Without
    either see `quantities.compare`. math_seconds: limit for comparing expressions, which happens in
    a process of its own; 0: they are not compared.

    Bounded: an answer past max_answer characters is "incorrect" unread, every pattern is linear or
    bounded, and nothing but that process evaluates anything.
    """
    try:
        truths = truth_texts(truth)
        if not truths:
            return RuleVerdict("undecided", "no_truth")
        text = "" if answer is None else str(answer)
        if len(text) > max(max_answer, 2 * max(map(len, truths))):
            return RuleVerdict("incorrect", "too_long")
        return _verify(text, truths, question, options, rtol, decimals, math_seconds)
    except Exception as error:  # a verdict must never cost a run
        log.warning("a rule failed on an answer: %s", ascii(error)[:200])
        return RuleVerdict("undecided", f"error.{type(error).__name__}")


def truth_texts(truth: Any) -> list[str]:
    """As texts; 0 is a truth, None and "" are none."""
    several = isinstance(truth, Iterable) and not isinstance(truth, (str, bytes, Mapping))
    given = list(truth) if several else [truth]
    texts = [str(one) for one in given if one is not None]
    return [text for text in texts if text.strip()][:MAX_TRUTHS]


def _verify(
    text: str,
    truths: Sequence[str],
    question: str,
    options: Mapping[str, str] | Sequence[str] | None,
    rtol: float | None,
    decimals: int | None,
    math_seconds: float,
) -> RuleVerdict:
    if text.strip() and any(text.strip() == truth.strip() for truth in truths):
        return RuleVerdict("correct", "exact")  # whatever it is: "~", ":"
    if not _has_content(text):
        return RuleVerdict("incorrect", "empty")
    cleaned = clean(text)
    choices = _choices(options, question)
    asked = question[:20_000]
    words = frozenset(re.findall(r"[^\W\d_][\w'-]{1,30}", f"{asked} {asked.casefold()}"))
    verdicts = []
    for truth in truths:
        verdict = _one(cleaned, clean(truth), choices, words, rtol, decimals)
        if verdict.outcome == "correct":
            return verdict
        verdicts.append(verdict)
    if not cleaned or normalise(text) in _MASTER_KEYS:
        return RuleVerdict("incorrect", "master_key")
    end = time.monotonic() + math_seconds
    for index, truth in enumerate(truths):  # last, because it is slow
        left = end - time.monotonic()
        if left > 0 and verdicts[index].rule in ("none", "option", "yes_no"):
            outcome, rule = math_equal(cleaned, clean(truth), left)
            if outcome == "correct":
                return RuleVerdict(outcome, rule)
            if rule:
                verdicts[index] = RuleVerdict(outcome, rule)
    return next((v for v in verdicts if not v.decided), verdicts[0])


def _one(
    answer: str,
    truth: str,
    choices: Mapping[str, str],
    words: frozenset[str],
    rtol: float | None,
    decimals: int | None,
) -> RuleVerdict:
    """Against one truth, but for mathematics."""
    by_option = _option(answer, truth, choices)
    if by_option is not None and by_option.decided:
        return by_option
    left, right = parse_quantity(answer), parse_quantity(truth)
    if left and right:
        outcome, rule = compare(left, right, rtol=rtol, decimals=decimals, words=words)
        if outcome != "undecided" or answer != truth:  # case counts: "10 M" is not "10 m"
            return RuleVerdict(outcome, rule)
    if (key := normalise(answer)) and key == normalise(truth):
        return RuleVerdict("correct", "exact")
    return by_option or _yes_no(answer, truth) or RuleVerdict("undecided", "none")


# --- Text -----------------------------------------------------------------------------------------

_RAISED = {"\u00b2": "2", "\u00b3": "3", "\u00b9": "1", "\u2070": "0", "\u207b": "-", "\u207a": "+"}
_RAISED |= {chr(0x2070 + n): str(n) for n in range(4, 10)}
_RAISED_RUN = re.compile("[" + "".join(_RAISED) + "]+")
_VULGAR = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e])")
_SAME = str.maketrans(
    {character: "-" for character in "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"}
    | {character: "'" for character in "\u2018\u2019\u201a\u201b\u2032\u02bc`\u00b4"}
    | {character: '"' for character in "\u201c\u201d\u201e\u2033\u00ab\u00bb"}
    | {"\u00d7": "x", "\u00b5": "\u03bc", "\u2126": "\u03a9", "\u2044": "/", "\u2236": ":"}
)
_LATEX = (
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\s?\{([^{}]{0,200})\}"), r" \1"),
    (re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\[,;:! ]|~"), " "),
    (re.compile(r"\^\s?\{?\s?\\circ\s?\}?"), "\u00b0"),
    (re.compile(r"\\times(?![a-z])"), "x"),
    (re.compile(r"\\([%$#&_])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
)
_WRAPPED = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\*\*(.+)\*\*", r"\*([^*]+)\*", r"__(.+)__", r'"([^"]+)"', r"'([^']+)'",
        r"\$\$([^$]+)\$\$", r"\$([^$]+)\$", r"\\\((.+)\\\)", r"\\\[(.+)\\\]",
        r"\\boxed\s?\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", r"\{([^{}]*)\}",
    )
)  # fmt: skip
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?"
    r"(?:(?:the |my )?(?:final |correct )?"
    r"(?:answer|result|option|choice)(?: is| =|:|(?= \(?[A-Z]\b))"
    r"|it is|it's|this is|there are|there is):? ",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """The same answer, written plainly: one spelling of every dash, quote and raised digit, no
    invisible characters, no markup around the whole ($, \\boxed, **, quotes), no "the answer is"
    before it and no full stop behind it. Case and wording stay."""
    text = _RAISED_RUN.sub(lambda run: "^" + "".join(_RAISED[c] for c in run[0]), text)
    text = _VULGAR.sub(
        lambda m: f"{m[1]}{' ' if m[1] else ''}{unicodedata.normalize('NFKC', m[2])}", text
    )
    text = unicodedata.normalize("NFKC", text).translate(_SAME)
    text = "".join(
        " " if character.isspace() else character
        for character in text
        if character.isspace() or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co")
    )
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split())
    for _ in range(6):
        before = text
        if lead := _LEAD.match(text):
            text = text[lead.end() :]
        for pattern in _WRAPPED:
            if found := pattern.fullmatch(text):
                text = found[1].strip()
        text = re.sub(r"(?<=[A-Za-z]{2})!+$", "", text)  # "5!" is a factorial
        text = text if text.endswith("..") else text.rstrip(".;, ").lstrip(":,; ")
        if text == before:
            break
    return text


def normalise(text: str) -> str:
    """The key under which two texts are the same words: case, the, a leading article, punctuation
    beside words and hyphens between them do not count. Signs and points beside digits do."""
    text = clean(text).casefold()
    text = re.sub(r"(?<=[^\W\d_])[-_/](?=[^\W\d_])", " ", text)
    text = re.sub(r"^(?:an?|the) (?=\w\w)", "", text)  # not of "A, B", nor of "a b"
    text = re.sub(r"(?<!\d)[,;:.?\"']+|[,;:.?\"']+(?!\d)", " ", text.replace("'s", "s"))
    words = text.split()
    return " ".join([word for word in words if word != "the"] or words)


_MASTER_KEYS = frozenset(map(normalise, MASTER_KEYS))


def _has_content(text: str) -> bool:
    """Whether there is a letter, a digit or a symbol: anything but punctuation and space."""
    return any(unicodedata.category(character)[0] in "LNS" for character in text)


# --- Multiple choice ------------------------------------------------------------------------------

_LETTER = re.compile(r"\(?\[?([A-Za-z])\]?\)?[.:)]?")
_LETTER_AND_TEXT = re.compile(r"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])[.:)]) ?(.+)")
_LETTERS = re.compile(
    r"\(?[A-Za-z]\)?(?:(?:,? ?(?:and|or|&|/) ?|, ?|/| )\(?[A-Za-z]\)?)+", re.IGNORECASE
)
_LISTED = re.compile(r"(?:^|\n|\s)\(?([A-Z])[.:)]\s?(?=\S)")


def _choices(options: Mapping[str, str] | Sequence[str] | None, question: str) -> dict[str, str]:
    """Letter -> text, normalised; of the question where it lists A, B, ... in order."""
    if isinstance(options, Mapping):
        return {str(k).strip("(). ").upper(): normalise(str(v)) for k, v in options.items()}
    if options is not None:
        texts = [str(option) for option in options][:26]
        if all(_LETTER_AND_TEXT.fullmatch(clean(t)) for t in texts):  # "A. cat" says its letter
            pairs = [_letter_and_text(clean(text)) for text in texts]
            return {letter: normalise(rest) for letter, rest in pairs}
        return {chr(65 + n): normalise(text) for n, text in enumerate(texts)}
    question = question[-4_000:]
    starts: list[re.Match[str]] = []
    for found in _LISTED.finditer(question):
        if found[1] == chr(65 + len(starts)):
            starts.append(found)
    if len(starts) < 2:
        return {}
    ends = [*(found.start() for found in starts[1:]), len(question)]
    return {
        found[1]: normalise(question[found.end() : end].split("\n")[0])
        for found, end in zip(starts, ends, strict=True)
    }


def _letter_and_text(text: str) -> tuple[str, str]:
    """ "B" -> ("B", ""); "(B) cat" -> ("B", "cat"); "cat" -> ("", "cat")."""
    if found := _LETTER.fullmatch(text):
        return found[1].upper(), ""
    if found := _LETTER_AND_TEXT.fullmatch(text):
        return (found[1] or found[2] or found[3]).upper(), found[4].strip()
    return "", text


def _by_text(text: str, choices: Mapping[str, str]) -> str:
    """The letter of an option's text where exactly one option has it."""
    key = normalise(text)
    letters = [letter for letter, option in choices.items() if option == key]
    return letters[0] if key and len(letters) == 1 else ""


def _option(answer: str, truth: str, choices: Mapping[str, str]) -> RuleVerdict | None:
    """None where this is no multiple choice."""
    letter, text = _letter_and_text(truth)
    if choices and letter not in choices:
        if letter and text:
            return None
        letter, text = _by_text(truth, choices), truth
    if not letter:
        return None
    if not choices and (not (truth[0].isupper() or truth[0] == "(") or (text and letter > "H")):
        return None  # "x" may be a variable, "J. Smith" is a name
    text = choices.get(letter) or normalise(text)
    given, rest = _letter_and_text(answer)
    if choices and given not in choices:
        given, rest = _by_text(answer, choices), ""
    if given:
        said = normalise(rest)
        other = _by_text(rest, choices) if said else ""
        if other and other != given:
            return RuleVerdict("incorrect", "option.contradiction")
        if said and text and given == letter and said != text:
            return RuleVerdict("undecided", "option.other_text")
        return RuleVerdict("correct" if given == letter else "incorrect", "option")
    if _LETTERS.fullmatch(answer) and len(set(re.findall(r"\b[A-Z]\b", answer.upper()))) > 1:
        return RuleVerdict("incorrect", "option.several")
    if text and normalise(answer) == text:
        return RuleVerdict("correct", "option.text")
    return RuleVerdict("undecided", "option")


# --- Yes or no ------------------------------------------------------------------------------------

_POLARITY = {"yes": True, "true": True, "y": True, "no": False, "false": False, "n": False}
_HEDGES = frozenset("yes no not but however or maybe unless except never false true both".split())


def _yes_no(answer: str, truth: str) -> RuleVerdict | None:
    """None where the truth is neither. "No, it is red" decides; "yes and no" does not."""
    expected = _POLARITY.get(truth.casefold())
    if expected is None or len(truth) == 1:
        return None
    words = re.findall(r"[a-z']+", answer.casefold())
    said = _POLARITY.get(words[0]) if words else None
    plain = not any(word in _HEDGES or word.endswith("n't") for word in words[1:])
    alone = len(words) == 1 or bool(re.match(r"[a-z]+ ?[,.;:-]", answer.casefold()))
    if said is None or not plain or not alone or (len(words) > 1 and len(words[0]) == 1):
        return RuleVerdict("undecided", "yes_no")
    return RuleVerdict("correct" if said == expected else "incorrect", "yes_no")
