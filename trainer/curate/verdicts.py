"""What becomes of a row, and the names of all reasons."""

from __future__ import annotations

from dataclasses import dataclass

REASONS = {
    "unsupported": "not one question that the policy answers turn by turn",
    "truncated": "cut off: no answer at the end, or tags that are not closed",
    "answer_from_tool": "the answer stands in a tool's text; the policy never wrote one",
    "pointless": "a call that can tell nothing: made before, empty, the same picture, a constant",
    "execution_failure": "a call fails, and no later one mends it",
    "mismatch": "running the call again gives another observation than the recorded one",
    "wrong_answer": "the answer is not the known one",
    "solvable": "the model answers without a tool what the trajectory calls one for",
    "visual_relevance": "the judge: the calls have nothing to do with what is in the picture",
    "reasoning_coherence": "the judge: the reasoning does not follow, or not lead to the answer",
    "tool_use_rationale": "the judge: the calls are not needed, or nothing is done with them",
    "duplicate": "question and pictures are nearly those of an earlier row that is kept",
    "unverifiable": "no rule can tell whether an answer is right",
    "all_right": "every sample is right: no reward differs",
    "all_wrong": "every sample is wrong: no reward differs",
    "pass_rate": "the pass rate is outside of the limits that were set",
    "ambiguous": "judge and rule disagree whether an answer is right",
    "balance": "its ability has more than its share",
    "unscored": "a tool, the model or the judge did not answer: nobody could say",
}
"""In the order in which they are reported."""


@dataclass(frozen=True)
class Drop:
    """Why a row is not kept."""

    reason: str
    """One of REASONS."""
    detail: str = ""

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise ValueError(f"{self.reason!r} is no reason; the reasons are: {', '.join(REASONS)}")

    def to_json(self) -> list[str]:
        return [self.reason, self.detail]


def drop_of(value: list[str] | None) -> Drop | None:
    """Of `Drop.to_json`, as a journal holds it."""
    return None if value is None else Drop(*value)
