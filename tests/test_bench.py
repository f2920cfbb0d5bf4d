"""What the README quotes comes from bench/results, and is up to date."""

import json

import pytest
import torch

from bench import (
    bench_advantages,
    bench_demo,
    bench_linear_hdpo,
    bench_logprobs,
    bench_lost_calls,
    bench_packing,
    bench_prefix_attention,
    bench_step,
    harness,
    providers,
    render,
    shapes,
)
from bench.shapes import Case


@pytest.mark.parametrize("name", ["demo", "curated"])
def test_the_recorded_runs_of_the_demo_meet_every_bar(name):
    record = json.loads((render.RESULTS / f"{name}.json").read_text())
    assert len(record["runs"]) >= 3
    for summary in record["runs"]:
        assert bench_demo.missed_bars(summary) == []


def test_a_bar_can_be_missed():
    record = json.loads((render.RESULTS / "demo.json").read_text())
    summary = record["runs"][0]
    worse = summary | {"final": summary["final"] | {"redundant_rate": 0.2, "missed_rate": 0.3}}
    assert bench_demo.missed_bars(worse) == ["redundant calls <= 0.05", "missed calls <= 0.10"]


def test_forced_openings_brought_lost_calls_back_on_every_recorded_seed():
    record = json.loads((render.RESULTS / "lost_calls.json").read_text())
    runs = record["runs"]
    seeds = {run["seed"] for run in runs}
    assert len(seeds) >= 3 and record["lost"]["missed_rate"] > 0.3
    assert all(bench_lost_calls.helps(runs, seed) for seed in seeds)
    alone, *_, most = bench_lost_calls.ARMS
    swapped = {alone: most, most: alone}
    others = [run | {"arm": swapped.get(run["arm"], run["arm"])} for run in runs]
    assert not any(bench_lost_calls.helps(others, seed) for seed in seeds)


# ---- the measuring itself ------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """One case that takes no time, and no memory probe in a process of its own."""
    monkeypatch.setitem(shapes.HEADS, "tiny", (16, 97))
    monkeypatch.setattr(bench_linear_hdpo, "peak", lambda *_: 0)
    return Case("tiny", 64, dtype="float32", providers=("ours", "ours torch", "torch eager"))


def test_providers_are_held_against_float64_and_timed(tiny):
    records = bench_linear_hdpo.run_case(tiny, rounds=2)
    assert [r["provider"] for r in records] == ["products", *tiny.providers]
    for record in records:
        assert record["median_ms"] > 0 and record["of_floor"] > 0 and record["tflops"] > 0
    assert all(record["gradient_error"] < 1e-5 for record in records[1:])


def test_what_is_wrong_is_not_timed_and_what_is_absent_has_a_reason(tiny, monkeypatch):
    def wrong():
        return lambda p: 1.01 * providers.dense(p)

    def absent():
        import no_such_library  # noqa: F401

    monkeypatch.setitem(providers._BUILDERS, "wrong", ("hdpo", wrong))
    monkeypatch.setitem(providers._BUILDERS, "absent", ("ce", absent))
    case = Case("tiny", 64, dtype="float32", providers=("wrong", "absent", "ours"))
    _, first, second, mine = bench_linear_hdpo.run_case(case, rounds=2)
    assert "median_ms" not in first and "1.0e-02 off float64's" in first["skipped"]
    assert "median_ms" not in second and "no_such_library" in second["skipped"]
    assert "median_ms" in mine


def test_the_tokens_that_carry_loss_are_what_the_floor_counts(tiny):
    given = providers.Problem.make(64, 16, 97, torch.float32, "cpu", active=0.25, length=8)
    assert given.active.sum() == 16 and (given.ignoring_label != providers.IGNORED).sum() == 16
    assert given.head(8).label.shape == (8,)


@pytest.mark.parametrize("peak", [12.0, -200.0])
def test_a_peer_that_gives_logprobs_has_the_gradient_of_grpo(peak):
    """At -200 exp(logprob) is 0 in fp32."""
    given = providers.Problem.make(64, 16, 97, torch.float32, "cpu", 0.5, 8, peak=peak)
    rows = given.active
    logprob = (given.hidden[rows] @ given.weight.t()).log_softmax(1)
    loss = providers.on_policy(given, logprob.gather(1, given.label[rows, None])[:, 0], rows)
    mine = torch.autograd.grad(loss, given.leaves)
    exact = torch.autograd.grad(providers.reference(given, "grpo"), given.leaves)
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "flags", "key", "count"),
    [
        (bench_logprobs, ["--tokens", "32", "--vocab", "97"], "logprobs", 3),
        (bench_advantages, ["--rollouts", "32"], "advantages", 1),
        (
            bench_prefix_attention,
            ["--prompt", "32", "--response", "8", "--group-size", "2"],
            "prefix_attention",
            8,
        ),
        (
            bench_packing,
            ["--rollouts", "8", "--group-size", "4", "--tokens", "50", "--prefix", "30"],
            "packing",
            1,
        ),
    ],
)
def test_the_other_benchmarks_run_here(module, flags, key, count, tmp_path, monkeypatch):
    out = tmp_path / "here.json"
    monkeypatch.setattr("sys.argv", ["bench", *flags, "--rounds", "2", "--out", str(out)])
    module.main()
    entry = json.loads(out.read_text())[key]
    assert len(entry["records"]) >= count and all(r["median_ms"] > 0 for r in entry["records"])
    assert entry["stamp"]["torch"] == torch.__version__


def test_an_update_three_ways_has_one_gradient_and_three_times(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "peak_in_subprocess", lambda *_: 1 << 20)
    out = tmp_path / "here.json"
    flags = ["--groups=2", "--group-size=4", "--case=40/16/12/0.5", "--rounds=2"]
    monkeypatch.setattr("sys.argv", ["bench", *flags, f"--out={out}"])
    bench_step.main()
    records = json.loads(out.read_text())["step"]["records"]
    assert [r["way"] for r in records] == ["padded", "packed", "ours"]
    assert all(r["tokens_per_second"] > 0 for r in records)


def test_ways_that_disagree_are_not_timed(monkeypatch):
    monkeypatch.setitem(bench_step.WAYS, "packed", lambda work: 1.1 * work.packed())
    flags = ["--groups=1", "--group-size=2", "--case=40/16/12/1", "--rounds=2"]
    monkeypatch.setattr("sys.argv", ["bench", *flags])
    with pytest.raises(SystemExit, match="norms differ"):
        bench_step.main()


def test_results_of_other_benchmarks_stay(tmp_path):
    path = tmp_path / "here.json"
    harness.write(path, "one", [{"x": 1}])
    harness.write(path, "two", [{"x": 2}])
    harness.write(path, "one", [{"x": 3}])
    assert {k: v["records"] for k, v in json.loads(path.read_text()).items()} == {
        "one": [{"x": 3}],
        "two": [{"x": 2}],
    }
