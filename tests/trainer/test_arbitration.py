"""Arbitration, counted by hand."""

from __future__ import annotations

import pytest

from trainer.answers import Answer, measure
from trainer.arbitration import MODES, arbitrate, ways


def answer(id, mode, correct, calls, sample=0, *, status="ok", kind="k", needs=None, **fields):
    given = {
        "model": "m", "seed": 0, "answer": None, "formatted": True, "prompt_tokens": 10,
        "sampled_tokens": 5, "model_seconds": 1.0, "tool_seconds": 0.0, "forced": None,
    } | fields  # fmt: skip
    return Answer(
        id=id, kind=kind, needs_tool=needs, mode=mode, sample=sample, calls=calls,
        correct=correct, status=status, **given,
    )  # fmt: skip


def played(id, allowed, forbidden, forced, **fields):
    """allowed: (right, calls); the others: right. One sample of each."""
    return [
        answer(id, "allowed", *allowed, **fields),
        answer(id, "forbidden", forbidden, 0, **fields),
        answer(id, "forced", forced, 2, prompt_tokens=40, **fields),
    ]


ANSWERS = [
    *played("needed and called", (True, 1), False, True, needs=True),
    *played("needed, not called", (False, 0), False, True, needs=True, kind="other"),
    *played("spare and called", (True, 1), True, True, needs=False),
    *played("spare, not called", (True, 0), True, True, needs=False),
    *played("spare, not called 2", (True, 0), True, True, needs=True),
    *played("harmful and called", (False, 1), True, False, needs=False),
    *played("neither, called", (False, 3), False, False, needs=True),
    *played("neither, not called", (False, 0), False, False),
]


def test_every_question_is_in_one_cell():
    found = arbitrate(ANSWERS)
    assert found["questions"] == 8 and found["samples"] == 1 and found["unscored"] == 0
    cells = {name: (row["called"], row["not_called"]) for name, row in found["table"].items()}
    assert cells == {"needed": (1, 1), "spare": (1, 2), "harmful": (1, 0), "neither": (1, 1)}
    rates = {name: one["value"] for name, one in found["rates"].items()}
    assert rates["needed_rate"] == 2 / 8 and rates["neither_rate"] == 2 / 8
    assert rates["redundant_rate"] == 2 / 4  # of spare and harmful
    assert rates["missed_rate"] == 1 / 2
    assert rates["tool_rate"] == 4 / 8
    assert rates["accuracy_allowed"] == 4 / 8
    assert rates["accuracy_forbidden"] == 4 / 8 and rates["accuracy_forced"] == 5 / 8
    assert rates["accuracy_best"] == 6 / 8
    assert rates["regret"] == 2 / 8  # one missed, one harmed
    for one in found["rates"].values():
        assert one["value"] is None or one["low"] <= one["value"] <= one["high"]


def test_the_tasks_own_labels_stand_beside_what_was_measured():
    table = arbitrate(ANSWERS)["table"]
    assert (table["needed"]["labelled_needed"], table["needed"]["labelled_idle"]) == (2, 0)
    assert (table["spare"]["labelled_needed"], table["spare"]["labelled_idle"]) == (1, 2)
    assert table["neither"]["labelled_needed"] == 1 and table["neither"]["unlabelled"] == 1


def test_what_was_saved_against_always_calling():
    found = arbitrate(ANSWERS)
    assert found["cost"]["allowed"] == {"tokens": 15.0, "seconds": 1.0, "calls": 6 / 8}
    assert found["cost"]["forced"]["tokens"] == 45.0 and found["cost"]["forbidden"]["calls"] == 0
    saved = {name: found["rates"][f"{name}_saved"]["value"] for name in ("tokens", "calls")}
    assert saved == {"tokens": pytest.approx(30 / 45), "calls": pytest.approx(10 / 16)}
    uncounted = [
        answer(a.id, a.mode, a.correct, a.calls, prompt_tokens=0, sampled_tokens=0) for a in ANSWERS
    ]
    found = arbitrate(uncounted)
    assert found["cost"]["allowed"]["tokens"] is None
    assert found["rates"]["tokens_saved"]["value"] is None
    assert found["rates"]["calls_saved"]["value"] == pytest.approx(10 / 16)


def test_every_kind_by_itself():
    found = arbitrate(ANSWERS)["by_kind"]
    assert {kind: one["questions"] for kind, one in found.items()} == {"k": 7, "other": 1}
    assert found["other"]["rates"]["missed_rate"]["value"] == 1.0
    assert found["other"]["rates"]["redundant_rate"]["value"] is None
    assert found["k"]["rates"]["missed_rate"]["value"] == 0.0


@pytest.mark.parametrize("status", ["unscored", "tool_infra"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_unscored_in_one_mode_leaves_all_counts(mode, status):
    lost = [
        answer(
            "lost", m, m != "forbidden", int(m == "forced"), status=status if m == mode else "ok"
        )
        for m in MODES
    ]
    with_it, without = arbitrate(ANSWERS + lost), arbitrate(ANSWERS)
    assert with_it["unscored"] == 1
    assert {**with_it, "unscored": 0} == without


def test_what_is_truncated_is_wrong():
    cut = played("cut", (False, 0), False, True)
    cut[0] = answer("cut", "allowed", False, 0, status="truncated")
    assert arbitrate(cut)["rates"]["missed_rate"]["value"] == 1.0


def test_with_several_samples_rates_decide():
    several = []
    for sample in range(4):
        several += [
            answer("q", "allowed", sample > 0, int(sample < 3), sample),
            answer("q", "forbidden", sample < 1, 0, sample),
            answer(
                "q", "forced", sample < 3, 1, sample, status="unscored" if sample == 3 else "ok"
            ),
        ]
    found = arbitrate(several)
    assert found["samples"] == 4 and found["questions"] == 1 and found["unscored"] == 0
    assert found["table"]["needed"]["called"] == 0.75  # forced 3/3 of the scored, forbidden 1/4
    assert found["rates"]["missed_rate"]["value"] == 0.25
    assert found["rates"]["regret"]["value"] == 0.25


def test_who_did_not_do_as_told_is_counted():
    disobedient = played("a", (True, 0), True, True) + [
        answer("b", "allowed", True, 0),
        answer("b", "forbidden", False, 1, status="truncated"),
        answer("b", "forced", True, 0),
    ]
    assert arbitrate(disobedient)["obeyed"] == {"forced": 0.5, "forbidden": 0.5}


def test_a_question_that_was_not_played_in_every_way_is_refused():
    with pytest.raises(ValueError, match="question q was not played with tools forced"):
        ways([answer("q", "allowed", True, 0), answer("q", "forbidden", True, 0)])


def test_measures_of_several_samples_count_questions_once_in_their_intervals():
    """Sixty samples of two questions are no sixty questions."""
    many = [answer(f"q{n}", "allowed", n == 0, 0, sample) for n in range(2) for sample in range(30)]
    found = measure(many)
    assert found["accuracy"] == 0.5 and found["n"] == 60
    assert found["intervals"]["accuracy"] == [0.0, 1.0]
    assert found["by_kind"]["k"]["intervals"]["tool_rate"] == [0.0, 0.0]
    assert measure([])["accuracy"] is None
