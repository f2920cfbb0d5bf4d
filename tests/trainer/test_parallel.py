"""Two and four processes against one: the same rollouts, losses and weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_worker import KINDS, STEPS, learn

from trainer.parallel import World

ROOT = Path(__file__).resolve().parent.parent.parent


def torchrun(processes: int, *arguments: str, timeout: int = 240) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={processes}", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """(processes, kind) -> what each of them learned; one start of the processes does all kinds."""
    folder, results = tmp_path_factory.mktemp("learned"), {}
    for processes, kinds in ((2, ("full", "lora")), (4, ("full", "few"))):
        outs = {kind: folder / f"{kind}-{processes}" for kind in kinds}
        words = [f"{kind}={out}" for kind, out in outs.items()]
        done = torchrun(processes, "-m", "tests.trainer.parallel_worker", *words)
        assert done.returncode == 0, done.stderr[-3000:]
        for kind, out in outs.items():
            results[processes, kind] = [torch.load(f"{out}.{rank}") for rank in range(processes)]
    return results


@pytest.fixture(scope="module")
def alone():
    """Kind -> what one process learns."""
    return {kind: learn(World(), settings, kind == "lora") for kind, settings in KINDS.items()}


def distance(one: dict, other: dict, start: dict) -> float:
    """How far the weights are apart, relative to how far they moved."""
    moved = sum((one[n] - start[n]).square().sum() for n in one) ** 0.5
    apart = sum((one[n] - other[n]).square().sum() for n in one) ** 0.5
    assert moved > 1e-4
    return float(apart / moved)


@pytest.fixture(scope="module")
def start(vlm):
    return {n: p.detach().clone() for n, p in vlm.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_learn_what_one_does(processes, learned, alone, start):
    alone = alone["full"]
    for rank, result in enumerate(learned[processes, "full"]):
        assert result["tokens"] == alone["tokens"], rank
        for mine, theirs in zip(result["losses"], alone["losses"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-7)
        assert distance(result["weights"], alone["weights"], start) < 1e-4
    assert len(alone["losses"]) == STEPS and alone["losses"][0]["active_tokens"] > 50


@pytest.mark.slow
def test_a_rank_without_rows_still_steps(learned, alone, start):
    results = learned[4, "few"]
    assert all(result["parts"] == 1 for result in results)
    for result in results:
        assert distance(result["weights"], alone["few"]["weights"], start) < 1e-4


@pytest.mark.slow
def test_adapters_are_summed_over_ranks(learned, alone):
    weights = alone["lora"]["weights"]
    before = {n: torch.zeros_like(w) for n, w in weights.items() if "lora_B" in n}
    mine = {n: weights[n] for n in before}
    for result in learned[2, "lora"]:
        assert distance(mine, {n: result["weights"][n] for n in before}, before) < 1e-4


@pytest.mark.slow
def test_the_program_under_torchrun(tmp_path):
    """Trains, evaluates and saves once; a second run of that name is refused in one sentence."""
    run = [
        "-m", "trainer", "rl", f"--runs={tmp_path}", "--name=two", "rl.steps=1", "rl.prompts=2",
        "rl.group_size=2", "evaluate.questions=8",
    ]  # fmt: skip
    done = torchrun(2, *run)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["status"] == "complete" and summary["final"]["n"] >= 8
    assert (tmp_path / "two" / "final" / "config.json").exists()
    assert done.stdout.count("complete after") == 1
    again = torchrun(2, *run)
    assert again.returncode != 0
    assert again.stderr.count("exists already") == 1


def test_a_world_of_one_is_the_identity():
    world = World()
    assert world.main and list(world.share([1, 2, 3])) == [1, 2, 3]
    assert world.gather([1]) == [1] and world.any(True) and not world.any(False)
    value = torch.tensor(3.0)
    assert world.sum(value) is value and world.broadcast("x") == "x"
    model = torch.nn.Linear(1, 1)
    assert world.scale(model) == 1.0


def test_shares_are_contiguous_and_whole():
    items = list(range(11))
    shares = [list(World(rank, 4).share(items)) for rank in range(4)]
    assert sum(shares, []) == items
    assert {len(share) for share in shares} == {2, 3}
