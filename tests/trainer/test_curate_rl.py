"""`metis curate rl`: pass rates, duplicates, answers that nobody agrees on, the mix."""

import json
import re
from collections import Counter

import pytest
from agent_server import AgentServer, said
from curate_rows import noise
from data_files import b64, encoded, write_lines
from judge_server import JudgeServer, case_of, verdict

from trainer.chat import turn_text
from trainer.cli import main
from trainer.data import Dataset


def curate(*arguments) -> int:
    return main(["curate", "rl", *map(str, arguments)])


def lines(path):
    return [json.loads(line) for line in path.open()]


def question(number: int, text: str, answer: str, kind: str, picture: int | None = None) -> dict:
    images = [b64(encoded(noise(number if picture is None else picture)))]
    given = {"id": f"q/{number}", "question": text, "answer": answer, "kind": kind}
    return given | {"images": images}


LONG = "rollout.max_tokens=8192"
"""To the server of the tests a character is a token."""


class Policy:
    """Adds; of products it gets every other sample right; knows nothing else."""

    def __init__(self):
        self.asked: Counter[str] = Counter()

    def __call__(self, messages) -> str:
        text = said(messages[-1])
        self.asked[text] += 1
        found = re.search(r"What is (\d+) ([+*]) (\d+)", text)
        if found is None:
            return turn_text("Hm.", answer="nothing")
        a, b = int(found[1]), int(found[3])
        wrong = found[2] == "*" and self.asked[text] % 2
        return turn_text("So.", answer=str(a + b if found[2] == "+" else a * b + wrong))


@pytest.fixture
def questions(tmp_path):
    rows = [question(n, f"What is {n} * {n + 3}?", str(n * (n + 3)), "product") for n in range(8)]
    rows += [question(n, f"What is {n} + 1?", str(n + 1), "sum") for n in range(8, 12)]
    rows += [question(n, f"Whose emblem is number {n}?", "Arden", "emblem") for n in range(12, 15)]
    rows.append(question(15, "What is 3 * 6 ?", "18", "product", picture=3))
    rows.append(question(16, "Tell me of it.", "It is a long story. " * 20, "prose"))
    return write_lines(tmp_path / "questions.jsonl", rows)


def test_questions_without_a_signal_are_dropped_and_the_rest_reads_back(questions, tmp_path):
    out, policy = tmp_path / "out", Policy()
    with AgentServer(policy) as agent:
        settings = [f"agent.base_url={agent.url}", "agent.model=m", "curate.samples=4", LONG]
        assert curate(questions, "--out", out, *settings) == 0
        asked = len(agent.requests)
        assert curate(questions, "--out", out, *settings, "--overwrite") == 0
        assert len(agent.requests) == asked + 1  # whether it lives
    found = lines(out / "curation.jsonl")
    assert [one["reason"] for one in found] == (
        [None] * 8 + ["all_right"] * 4 + ["all_wrong"] * 3 + ["duplicate", "unverifiable"]
    )
    assert found[8]["detail"] == "4 of 4 samples are right"
    again = list(Dataset(out / "dataset.jsonl", layout="metis-rl"))
    assert [one.answer for one in again] == [str(n * (n + 3)) for n in range(8)]
    assert {one.extra["extra_info"]["pass_rate"] for one in again} == {0.5}
    page = (out / "report.html").read_text()
    assert "8 + 9 + 0 = 17" in page and "judge (it needs a judge" in page


def test_an_answer_on_which_judge_and_rule_disagree_is_ambiguous(questions, tmp_path):
    def judge(body) -> str:
        case = case_of(body)
        ruled = case["prediction"] in case["ground_truths"]
        odd = "2 * 5" in case["question"]
        return verdict("CORRECT" if ruled or odd else "INCORRECT")

    out = tmp_path / "out"
    with AgentServer(Policy()) as agent, JudgeServer([judge]) as server:
        settings = [f"agent.base_url={agent.url}", "agent.model=m", "curate.samples=2", LONG]
        settings += [f"judge.base_url={server.url}", "judge.model=j"]
        assert curate(questions, "--out", out, *settings, f"judge.cache={tmp_path / 'c'}") == 0
    found = lines(out / "curation.jsonl")
    assert [one["id"] for one in found if one["reason"] == "ambiguous"] == ["q/2"]
    assert found[2]["detail"] == "'11' is incorrect by rule, correct by the judge"


def test_an_ability_keeps_its_share(tmp_path):
    prose = "It is a long story. " * 20
    rows = [question(n, f"What is {n} * {n}?", str(n * n), "a") for n in range(10)]
    rows += [question(n, f"Tell me of {n}.", prose, "b") for n in range(10, 18)]
    rows += [question(n, f"What is {n} + {n}?", str(2 * n), "b") for n in range(18, 20)]
    path = write_lines(tmp_path / "questions.jsonl", rows)
    for most, kept in ((1, {"a": 2, "b": 2}), (1.5, {"a": 6, "b": 2}), ("null", {"a": 10, "b": 2})):
        out = tmp_path / f"out-{most}"
        asked = ["curate.stages=[rules,balance]", f"curate.balance={most}"]
        assert curate(path, "--out", out, *asked) == 0
        found = Counter(one.kind for one in Dataset(out / "dataset.jsonl", layout="metis-rl"))
        assert found == kept
        dropped = Counter(one["reason"] for one in lines(out / "curation.jsonl"))
        assert dropped["unverifiable"] == 8 and dropped["balance"] == 10 - kept["a"]


def test_trajectories_are_for_the_other_command_and_the_judge_needs_samples(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", [question(1, "What?", "7", "a")])
    stages = "curate.stages=[judge]"
    judge = ["judge.base_url=http://127.0.0.1:9/v1", "judge.model=j"]
    assert curate(path, "--out", tmp_path / "out", stages, *judge) == 2
    assert "judge needs the answers of pass_rate" in capsys.readouterr().err
    assert curate(path, "--out", tmp_path / "out", "curate.stages=[pass_rate]") == 2
    assert "pass_rate needs a model" in capsys.readouterr().err
