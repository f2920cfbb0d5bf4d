"""The command line as a person meets it: each command is a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import metis

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "sft.demonstrations=48",
    "sft.steps=2",
    "sft.batch_size=8",
    "rl.steps=2",
    "rl.prompts=2",
    "rl.group_size=4",
    "evaluate.questions=24",
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--sede", "1"], "unrecognized arguments: --sede"),
        (["train"], "invalid choice: 'train'"),
        (["demo", "rl.lrr=1"], "unknown setting 'rl.lrr'; did you mean 'rl.lr'?"),
        (["demo", "--config", "nowhere.yaml"], "no configuration file at nowhere.yaml"),
        (["demo", "--name", "a/b"], "not a plain folder name"),
        (["demo", "--runs", "file"], "is a file"),
        (["demo", "--name", "old"], "exists already"),
        (["rl", "model.path=./missing"], "no model at ./missing"),
        (["report", "nowhere"], "no run folder at nowhere"),
        (["report", "old", "rl.lr=1"], "unrecognized arguments: rl.lr=1"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(tmp_path, arguments, message):
    (tmp_path / "file").touch()
    (tmp_path / "runs" / "old").mkdir(parents=True)
    done = metis(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_flag_is_answered_before_torch_is_there():
    program = "import sys, trainer.cli; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.strip() == "set()", done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "trainer", "demo", SMALL[0], "--seed", "3", *SMALL[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "demo", done


def test_the_demo_leaves_everything_that_it_promises(finished):
    run, done = finished
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "rollouts.jsonl",
        "summary.json",
        "report.html",
        "sft",
        "final",
    }
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "complete" and summary["seed"] == 3 and summary["steps"] == 2
    assert {"seconds", "needed_rate", "torch", "metis_kernels"} <= set(summary)
    for stage in ("base", "sft", "final"):
        measures = {"accuracy", "tool_rate", "redundant_rate", "missed_rate", "by_kind"}
        assert measures <= set(summary[stage])
    assert "rl 2/2" in done.stdout and str(Path("runs") / "demo") in done.stdout


def test_every_rollout_is_kept_and_its_mask_with_it(finished):
    run, _ = finished
    records = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["stage"] == "rl"]
    assert len(trained) == 2 * 2 * 4
    for record in trained:
        assert record["acc_advantage"] is not None
        flags = [policy for _, _, policy, _ in record["tokens"]]
        assert any(flags) and not flags[0]
    shown = [record for record in records if record["stage"] == "final_eval"]
    assert shown and all(record["images"] for record in shown)


def test_a_trajectory_that_no_micro_batch_could_hold_is_refused_before_any_work(tmp_path):
    done = metis("rl", "rl.max_batch_tokens=500", cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert "rollout.max_tokens is 1024 but rl.max_batch_tokens is 500" in done.stderr


def test_the_plan_fits_or_says_what_would(tmp_path):
    fits = ("plan", "--model", "qwen3-0.6b", "--gpu-memory", 80)
    assert metis(*fits, cwd=tmp_path).returncode == 0
    done = metis("plan", "--model", "qwen3-vl-8b", "--gpu-memory", 24, cwd=tmp_path)
    assert done.returncode == 1 and "It does not fit." in done.stdout
    done = metis("plan", "--model", "no-such-model", cwd=tmp_path)
    assert done.returncode == 2 and "qwen3-vl-8b" in done.stderr


def test_a_run_is_a_function_of_its_seed(finished, tmp_path):
    run, _ = finished
    assert metis("demo", "--seed", 3, *SMALL, cwd=tmp_path).returncode == 0
    again = tmp_path / "runs" / "demo"

    def numbers(folder):
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in row.items() if "second" not in k} for row in rows]

    assert numbers(run) == numbers(again)
    same = [(folder / "final" / "model.safetensors").read_bytes() for folder in (run, again)]
    assert same[0] == same[1]


def test_the_models_that_a_run_leaves_can_be_used(finished, tmp_path):
    run, _ = finished
    done = metis("eval", f"model.path={run / 'final'}", "evaluate.questions=16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "glyph_small" in done.stdout


def test_the_report_can_be_written_again(finished):
    run, _ = finished
    (run / "report.html").unlink()
    done = metis("report", run, cwd=run)
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").exists() and (run / "demo.svg").exists()


def test_ctrl_c_ends_within_a_step_and_says_where_the_results_are(tmp_path):
    command = [sys.executable, "-m", "trainer", "demo", *SMALL, "rl.steps=10000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "runs" / "demo" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and '"rl"' in metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    summary = json.loads((metrics.parent / "summary.json").read_text())
    assert summary["status"] == "interrupted" and "final" not in summary
    assert (metrics.parent / "report.html").exists()
    assert "interrupted after" in out and str(Path("runs") / "demo") in out


def test_the_demo_from_raw_trajectories(tmp_path):
    """Raw, curated, a cold start from each, and the curated one is what RL goes on with."""
    done = metis("demo", "--curate", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "demo"
    summary = json.loads((folder / "summary.json").read_text())
    curation = summary["curation"]
    assert curation["rows"] == 48 == curation["kept"] + curation["dropped"] + curation["bad"]
    lines = [json.loads(line) for line in (folder / "curated" / "curation.jsonl").open()]
    kept = [line["id"] for line in lines if line["verdict"] == "kept"]
    labels = [json.loads(line) for line in (folder / "raw" / "labels.jsonl").open()]
    flawed = {label["id"] for label in labels if label["flaw"] not in (None, "solvable")}
    assert len(lines) == 48 and len(kept) == curation["kept"] > 10 and flawed.isdisjoint(kept)
    raw = json.loads((folder / "uncurated" / "summary.json").read_text())
    assert raw["sft"] == summary["uncurated"] and summary["sft"]["n"] == summary["final"]["n"]
    assert "48 demonstrations" in done.stdout and f"{len(kept)} demonstrations" in done.stdout
    assert "The same cold start from the raw ones" in (folder / "report.html").read_text()
