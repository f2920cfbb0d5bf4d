"""What `metis plan` says against what is counted and measured here."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import metis_kernels as mk
from metis_kernels import _rows, _sweep
from metis_kernels.adapters import hf
from tests import models
from trainer import plan
from trainer.config import ConfigError
from trainer.plans import memory
from trainer.plans.memory import GIB, Settings
from trainer.plans.sizes import load_config, sizes

SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 1024}
LARGE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "vocab_size": 2048}
PLAIN = {
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "llama": ("Llama", {}),
    "gemma": ("Gemma", {"head_dim": 16}),
}


def make(family: str, size: dict, dtype=torch.float32) -> torch.nn.Module:
    """A tiny model with the attention of packed batches."""
    import transformers

    if family == "qwen3_vl":
        model = models.qwen3_vl(**size)
    else:
        name, more = PLAIN[family]
        config = getattr(transformers, f"{name}Config")(**(models.SIZES | more | size))
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in getattr(model.model, "visual", torch.nn.Module()).parameters():
        parameter.requires_grad_(False)
    return hf.prepare(model.to(dtype).train())


def packed(group: int, prompt: int, response: int, tool_share: float = 0.0) -> mk.PackedBatch:
    """One group in one micro-batch; the end of a response is a tool's but for its last token."""
    prefix = torch.randint(10, 128, (prompt,))
    written = torch.zeros(prompt + response, dtype=torch.bool)
    written[prompt : prompt + round(response * (1 - tool_share)) - 1] = True
    written[-1] = True
    rollouts = []
    for number in range(group):
        tail = torch.randint(10, 128, (response,))
        tail[0] = 10 + number  # no more is shared than the prompt
        rollouts.append(
            mk.Trajectory(
                torch.cat([prefix, tail]), written, 1.0 - 2 * (number % 2), 0.5,
                old_logprob=torch.full((prompt + response,), -5.0),
            )
        )  # fmt: skip
    (batch,) = mk.pack([rollouts], group * (prompt + response))
    return batch


def micro_batch(model, batch) -> None:
    hidden = hf.hidden_states(model, batch)
    loss, _ = mk.linear_hdpo_loss(
        hidden, hf.head(model).weight, batch.targets(batch.S, batch.S), mk.HDPOConfig()
    )
    loss.backward()


def step(model, optimizer, batch) -> None:
    for _ in range(2):
        micro_batch(model, batch)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def peak_bytes(run) -> int:
    """Bytes that run adds at its peak, by the allocator's own account: temporaries inside of
    operators are in it, and no two runs differ."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def state_bytes(optimizer) -> int:
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )


def saved_bytes(model, run) -> int:
    """Of all that autograd keeps of run, storages counted once and parameters not."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    assert out.requires_grad
    return total


def on_cpu(dtype=torch.float32, **values) -> Settings:
    name = str(dtype).removeprefix("torch.")
    return Settings(**{"dtype": name, "device": "cpu", "reserve": 0.0, "active": 1.0} | values)


# ---- counted -------------------------------------------------------------------------------------

PUBLISHED = {
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen3-8b": 8_190_735_360,
    "llama-3.1-8b": 8_030_261_248,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
}
"""Parameters that the checkpoints on the hub have."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_names_have_the_parameters_of_the_published_checkpoints(name):
    assert sizes(load_config(name), name).parameters() == PUBLISHED[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("family", ["qwen3_vl", *PLAIN])
def test_saved_bytes_are_those_that_autograd_saves(family, size, dtype):
    model, batch = make(family, size, dtype), packed(4, 60, 45)
    counted = saved_bytes(model, lambda: hf.hidden_states(model, batch))
    s, p = sizes(model.config), on_cpu(dtype, prompt=60, response=45, group_size=4)
    last = batch.T * size["hidden_size"] * dtype.itemsize  # kept by the caller
    assert memory.stored(s, p, batch.T) - last == pytest.approx(counted, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
def test_saved_bytes_under_adapters(family, dtype):
    peft = pytest.importorskip("peft")
    counted = []
    batch, rank = packed(4, 60, 45), 4
    for layers in (2, 3):  # the first layer has no gradient of its input
        model = make(family, LARGE | {"num_hidden_layers": layers}, dtype)
        config = peft.LoraConfig(
            r=rank, target_modules=r".*layers.*(q|k|v|o|gate|up|down)_proj", lora_dropout=0.0
        )
        model = peft.get_peft_model(model, config)
        counted.append(saved_bytes(model, lambda m=model: hf.hidden_states(m, batch)))
    base = model.get_base_model()
    s, p = sizes(make(family, LARGE).config), on_cpu(dtype, lora=rank)
    assert memory.layer_saved(s, p) * batch.T == pytest.approx(counted[1] - counted[0], rel=1e-2)
    numbers = sum(q.numel() for n, q in base.named_parameters() if "lora_" in n)
    assert memory.adapters(s, p) * 3 == numbers * s.layers


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes_of_a_trained_vision_tower(family, dtype):
    model = models.FAMILIES[family]().to(dtype).train()
    grid = torch.tensor([[1, 16, 12]])
    pixels = torch.randn(16 * 12, 3 * models.PATCH**2, dtype=dtype)
    tower = model.model.visual
    counted = saved_bytes(tower, lambda: tower(pixels, grid_thw=grid).pooler_output)
    s, p = sizes(model.config), on_cpu(dtype, train_vision=True)
    assert memory.vision_saved(s.vision, p) * 16 * 12 / 4 == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("vocab, hidden", [(1000, 64), (151_936, 4096), (128_256, 2048)])
@pytest.mark.parametrize("rows", [1, 17, 700, 4096, 60_000])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("lora", [0, 8])
def test_chunks_are_those_of_the_fused_loss(vocab, hidden, rows, device, lora):
    weight = SimpleNamespace(shape=(vocab, hidden), dtype=torch.bfloat16, is_cuda=device == "cuda")
    expected = _sweep.chunk_rows(rows, _rows.Head(weight), None, copies=0, learns=not lora)
    s, p = SimpleNamespace(vocab=vocab, hidden=hidden), Settings(device=device, lora=lora)
    assert memory.chunk_rows(rows, s, p) == expected


def test_states_of_the_8_bit_optimizer():
    optim = pytest.importorskip("torchao.optim")
    model = make("llama", LARGE, torch.bfloat16)
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-4)
    expected = 0
    for parameter in model.parameters():
        buffer = optimizer._new_buffer(parameter, True)
        inner = [getattr(buffer, n) for n in ("codes", "scale") if hasattr(buffer, n)] or [buffer]
        expected += 2 * sum(t.nbytes for t in inner)
    s, p = sizes(model.config), on_cpu(torch.bfloat16, optimizer="adamw8bit")
    assert memory.optimizer_bytes(s, p) == expected


def test_the_cache_of_rollouts():
    model = make("qwen3_vl", LARGE, torch.bfloat16)
    ids = torch.randint(10, 128, (3, 20))
    out = model.generate(
        input_ids=ids, max_new_tokens=11, min_new_tokens=11, return_dict_in_generate=True
    )
    cached = sum(l.keys.nbytes + l.values.nbytes for l in out.past_key_values.layers)  # noqa: E741
    p = on_cpu(torch.bfloat16, prompt=20, response=10, rollout_batch=3)
    moments = memory.budget(sizes(model.config), p, 30)
    assert moments["rollout"]["KV cache"] == cached  # the last token is never fed


def test_operations_of_the_layers_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model, batch = make("llama", LARGE), packed(4, 60, 45)
    with FlopCounterMode(display=False) as counter:
        hf.hidden_states(model, batch).sum().backward()
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    counted = plan.group_flops(sizes(model.config), on_cpu(), batch.T, 0, 0, 0)
    assert counted == pytest.approx(products, rel=0.02)


# ---- measured ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """torch's CPU kernels take a buffer for each thread: in a tiny model a tenth of everything."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def updates():
    """Settings of test_the_peak_of_an_update. A CPU that multiplies no bf16 is slow with it: of the
    large model one each."""
    for values in itertools.product(
        ("qwen3_vl", "llama"), ("small", "large"), (torch.float32, torch.bfloat16),
        ("none", "layers"), (1, 8),
    ):  # fmt: skip
        if values[1:3] != ("large", torch.bfloat16) or values[3:] == ("layers", 8):
            yield pytest.param(*values, id="-".join(map(str, values)))


@pytest.mark.parametrize(("family", "size", "dtype", "checkpointing", "group"), updates())
def test_the_peak_of_an_update(family, size, dtype, checkpointing, group):
    model = make(family, {"small": SMALL, "large": LARGE}[size], dtype)
    if checkpointing == "layers":
        model.gradient_checkpointing_enable()
    prompt, response = (900, 300) if group == 1 else (400, 100)
    batch = packed(group, prompt, response, tool_share=0.25)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    step(model, optimizer, batch)  # states exist from here on
    static = sum(p.nbytes for p in model.parameters()) + state_bytes(optimizer)
    measured = static + peak_bytes(lambda: step(model, optimizer, batch))
    p = on_cpu(
        dtype, prompt=prompt, response=response, group_size=group, tool_share=0.25,
        checkpointing=checkpointing,
    )  # fmt: skip
    planned = plan.update_bytes(sizes(model.config), p, batch.T)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_peaks_of_few_tokens(dtype):
    """Then gradients and optimizer are nearly all; and the optimizer's step by itself."""
    model, batch = make("llama", LARGE | {"vocab_size": 256}, dtype), packed(2, 8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    step(model, optimizer, batch)
    static = sum(p.nbytes for p in model.parameters()) + state_bytes(optimizer)
    measured = static + peak_bytes(lambda: step(model, optimizer, batch))
    s, p = sizes(model.config), on_cpu(dtype, prompt=8, response=4, group_size=2)
    assert plan.update_bytes(s, p, batch.T) == pytest.approx(measured, rel=0.03)
    micro_batch(model, batch)
    static += sum(p.grad.nbytes for p in model.parameters())
    planned = sum(plan.budget(s, p, batch.T)["step"].values())
    assert planned == pytest.approx(static + peak_bytes(optimizer.step), rel=0.01)


RESIDENT = """
from bench import harness
from tests.trainer import test_plan as here
print(here.resident_and_planned(harness.peak_bytes))
"""


def resident_and_planned(measure) -> str:
    size = {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 4096,
        "num_attention_heads": 16, "num_key_value_heads": 8,
    }  # fmt: skip
    model = make("llama", size)
    batch = packed(8, 600, 200, tool_share=0.25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    step(model, optimizer, packed(2, 20, 10))  # libraries have their buffers from here on
    static = sum(p.nbytes for p in model.parameters()) + state_bytes(optimizer)
    resident = static + measure(lambda: step(model, optimizer, batch))
    p = on_cpu(prompt=600, response=200, group_size=8, tool_share=0.25)
    return f"{resident} {plan.update_bytes(sizes(model.config), p, batch.T)}"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_resident_memory_of_a_process():
    """What the system says, where malloc gives freed blocks back; 8 MB are BLAS's own in fp32. In
    bf16 oneDNN takes 25 to 30 MB, too much beside a model as small as a test's."""
    root = Path(__file__).resolve().parent.parent.parent
    given = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT],
        cwd=root, env=os.environ | given, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    resident, planned = map(float, done.stdout.split()[-2:])
    assert planned == pytest.approx(resident, rel=0.1), planned / resident


def test_the_peak_of_an_update_under_adapters():
    peft = pytest.importorskip("peft")
    model = make("qwen3_vl", LARGE, torch.bfloat16)
    batch = packed(4, 400, 200)
    wide = peft.LoraConfig(r=8, target_modules=r".*layers.*(q|k|v|o|gate|up|down)_proj")
    model = peft.get_peft_model(model, wide)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    step(model, optimizer, batch)
    static = sum(p.nbytes for p in model.parameters()) + state_bytes(optimizer)
    measured = static + peak_bytes(lambda: step(model, optimizer, batch))
    s = sizes(make("qwen3_vl", LARGE).config)
    p = on_cpu(
        torch.bfloat16, prompt=400, response=200, group_size=4, lora=8, checkpointing="layers"
    )
    assert plan.update_bytes(s, p, batch.T) == pytest.approx(measured, rel=0.1)


# ---- solved --------------------------------------------------------------------------------------


def test_sharing_counts_the_tokens_that_packing_packs():
    prompt, response, group = 60, 20, 8
    batch = packed(group, prompt, response)
    s = sizes(load_config("qwen3-0.6b"))
    p = Settings(prompt=prompt, response=response, group_size=group, image_tokens=40)
    whole = plan.sharing(s, p, batch.T + group)
    # The last token of a rollout is a label and no row.
    assert whole.tokens == batch.T + group == prompt + group * response
    assert whole.by_prefix == pytest.approx(1 - (60 + 160) / (8 * 80)) == whole.in_all
    assert whole.vision_passes == 1

    half = plan.sharing(s, Settings(**vars(p) | {"active": 0.5}), 10_000)
    assert half.tokens == 60 + 4 * 20 and half.by_prefix == pytest.approx(1 - 140 / 320)
    assert half.in_all == pytest.approx(1 - 140 / 640)

    cut = plan.sharing(s, p, prompt + 3 * response)  # three responses fit behind a prefix
    assert cut.tokens == 3 * prompt + 8 * response and cut.vision_passes == 3


def test_loss_rows_are_the_policy_tokens_of_the_batch():
    batch = packed(8, 400, 100, tool_share=0.25)
    p = Settings(prompt=400, response=100, group_size=8, tool_share=0.25)
    assert memory.loss_rows(p, batch.T + 8) == batch.S


EIGHT = sizes(load_config("qwen3-vl-8b"), "qwen3-vl-8b")


@pytest.mark.parametrize("values", [{}, {"lora": 16, "nf4": True}, {"gpus": 8}, {"liger": False}])
def test_the_largest_batch_fits_and_one_token_more_does_not(values):
    p = Settings(checkpointing="layers", **values)
    largest = plan.largest_batch(EIGHT, p)
    assert 10_000 < largest
    assert plan.update_bytes(EIGHT, p, largest) <= 80 * GIB
    assert plan.update_bytes(EIGHT, p, largest + 1) > 80 * GIB


def test_what_costs_memory_and_what_saves_it():
    def peak(**values):
        given = {"checkpointing": "layers", "image_tokens": 2000, "prompt": 4096} | values
        return plan.update_bytes(EIGHT, Settings(**given), 16_384)

    assert peak(checkpointing="none") > peak() > peak(checkpointing="offload")
    assert peak(liger=False) > peak() > peak(optimizer="adamw8bit") > peak(lora=16)
    assert peak(lora=16) > peak(lora=16, nf4=True)
    assert peak(train_vision=True) > peak() > peak(gpus=2) > peak(gpus=8)
    assert peak(dtype="float32") > 1.6 * peak()


def test_gibibytes_of_the_8b_model():
    """The static budget that everybody computes: 16.3 GiB of bf16 weights, twice that in AdamW."""
    p = Settings(train_vision=True, checkpointing="layers")
    line = plan.budget(EIGHT, p, 5120)["loss"]
    count = 8_767_123_696
    assert line["weights"] == line["gradients"] == 2 * count
    assert line["optimizer"] == 4 * count
    eight = plan.budget(EIGHT, Settings(optimizer="adamw8bit", train_vision=True), 1)["loss"]
    assert eight["optimizer"] == pytest.approx(2 * count, rel=0.02)


# ---- the command ---------------------------------------------------------------------------------


def call(*options: str) -> int:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return plan.run(parser.parse_args(options))


FITTING = ("--model", "qwen3-vl-8b", "--lora", "16", "--checkpointing", "layers")


def test_a_plan_that_fits(capsys):
    assert call(*FITTING, "--image-tokens", "3000", "--flops", "4e14") == 0
    said = capsys.readouterr().out
    for word in (
        "weights",
        "optimizer",
        "KV cache",
        "left of 80",
        "The largest max_tokens",
        "At 4e",
    ):
        assert word in said
    assert "does not fit" not in said


def test_json_has_every_line(capsys):
    assert call(*FITTING, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["fits"] and made["trajectory_fits"] and made["mends"] == []
    assert set(made["moments"]) == set(memory.MOMENTS)
    assert all(set(lines) == set(memory.LINES) for lines in made["moments"].values())
    assert made["max_tokens"] >= made["planned_tokens"] >= made["trajectory_tokens"]


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "qwen3-vl-8b"),
        ("--model", "qwen3-vl-8b", "--gpu-memory", "24"),
        ("--model", "qwen3-vl-32b", "--prompt", "16000", "--rollout-batch", "64"),
        ("--model", "llama-3.1-8b", "--checkpointing", "layers", "--max-tokens", "200000"),
    ],
)
def test_the_mends_make_it_fit(options, capsys):
    assert call(*options, "--json") == 1
    found = json.loads(capsys.readouterr().out)["mends"]
    assert found[-1]["fits"] and not any(m["fits"] for m in found[:-1])
    last = dict(m["change"].split(" ") if " " in m["change"] else (m["change"], "") for m in found)
    words = [word for pair in last.items() for word in pair if word]
    assert call(*options, *words) == 0
    capsys.readouterr()
    assert call(*options) == 1
    assert "In the order of what it costs" in capsys.readouterr().out


def test_the_cheapest_mend_comes_first(capsys):
    call("--model", "qwen3-vl-8b", "--gpu-memory", "40", "--max-tokens", "30000", "--json")
    changes = [m["change"] for m in json.loads(capsys.readouterr().out)["mends"]]
    assert changes[:3] == [
        "--checkpointing layers", "--optimizer adamw8bit", "--checkpointing offload"
    ]  # fmt: skip
    names = [change.split()[0] for change in changes[3:]]
    order = ["--max-tokens", "--lora", "--gpus", "--optimizer-offload", "--rollout-batch"]
    assert names == sorted(names, key=order.index) and len(names) >= 2


def test_a_model_from_a_folder(tmp_path, capsys):
    config = load_config("qwen3-0.6b")
    config.save_pretrained(tmp_path)
    assert call("--model", str(tmp_path)) == 0
    assert call("--model", str(tmp_path / "config.json")) == 0
    assert "0.596 billion" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, said",
    [
        (("--model", "no-such-model"), "qwen3-vl-8b"),
        (("--model", "qwen3-8b", "--nf4"), "--lora"),
        (("--model", "qwen3-8b", "--lora", "8", "--train-vision"), "--train-vision"),
        (("--model", "qwen3-8b", "--image-tokens", "9000"), "9000"),
        (("--model", "qwen3-8b", "--active", "0"), "active"),
        (("--model", "qwen3-8b", "--gpus", "0"), "gpus must be >= 1"),
        (("--model", "qwen3-8b", "--max-tokens", "100"), "trajectory of 5120 tokens, got 100"),
    ],
)
def test_wrong_settings_are_named(options, said):
    with pytest.raises(ConfigError, match=said):
        call(*options)


def test_a_file_that_is_no_configuration(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-kind"}')
    with pytest.raises(ConfigError, match="no configuration of a known model"):
        call("--model", str(tmp_path))
