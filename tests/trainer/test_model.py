"""What a model is loaded with: a frozen tower, checkpointed layers, adapters; and its reference."""

from __future__ import annotations

import copy
import socket
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import metis_kernels as mk
import trainer.model
from trainer.config import LoraConfig, OptimizerConfig
from trainer.engines.hf import HFEngine
from trainer.model import (
    IMAGE_TOKEN,
    Reference,
    VisionLanguageModel,
    freeze_tower,
    hidden_states,
)
from trainer.optimizer import make_optimizer, optimizer_step, states_on_host
from trainer.tasks import load_task

MODES = ("none", "layers", "offload")


def loaded(**settings) -> VisionLanguageModel:
    torch.manual_seed(1)
    settings = {"dtype": torch.float32} | settings
    return VisionLanguageModel.load(load_task("glyphs").base, **settings)


def sequences(vlm: VisionLanguageModel, rows: int):
    """Texts with an image each, of unlike lengths."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    text = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>system\nuser\n"
    lengths = (64 + 3 * row for row in range(rows))
    return [(vlm.encode(text + "12 + 7 b3" * 64, [image])[:n], [image]) for n in lengths]


def backward(vlm: VisionLanguageModel, inputs) -> torch.Tensor:
    """Gradients of a loss on every token -> the loss."""
    hidden = hidden_states(vlm.model, inputs).flatten(0, 1)
    label = inputs["input_ids"].flatten().roll(-1)
    loss = mk.linear_cross_entropy(hidden, vlm.head, label)
    loss.backward()
    return loss.detach()


def gradients(vlm: VisionLanguageModel) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in vlm.model.named_parameters() if p.grad is not None}


def perturb(vlm: VisionLanguageModel) -> None:
    """Moves whatever is trained: adapters begin as nothing; afterwards these are something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


# ---- the vision tower ----------------------------------------------------------------------------


@pytest.mark.parametrize(("freeze", "frozen"), [(None, False), (False, False), (True, True)])
def test_the_demos_tower_learns_unless_it_is_frozen(freeze, frozen):
    vlm = loaded(freeze_vision=freeze)
    tower = [p.requires_grad for p in vlm.model.model.visual.parameters()]
    rest = [p.requires_grad for p in vlm.model.model.language_model.parameters()]
    assert set(tower) == {not frozen} and set(rest) == {True}
    backward(vlm, vlm.collate(sequences(vlm, 1)))
    assert any("visual" in name for name in gradients(vlm)) is not frozen


def test_a_tower_of_the_usual_size_is_frozen():
    """That of Qwen3-VL, without memory for its weights."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig())
    freeze_tower(model, None)
    assert not any(p.requires_grad for p in model.model.visual.parameters())
    assert all(p.requires_grad for p in model.model.language_model.parameters())
    other = copy.deepcopy(model).requires_grad_(True)
    freeze_tower(other, False)
    assert all(p.requires_grad for p in other.parameters())


def test_a_model_without_a_tower_is_refused():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=1))
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no vision tower"):
        freeze_tower(model, None)


# ---- activation checkpointing --------------------------------------------------------------------


@contextmanager
def saved_bytes():
    """A list of one number: bytes that autograd keeps for the backward, weights left out."""
    total, seen = [0], set()

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter) and tensor.untyped_storage()._cdata not in seen:
            seen.add(tensor.untyped_storage()._cdata)
            total[0] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


@pytest.mark.parametrize(
    ("lora", "freeze"), [(None, False), (None, True), (LoraConfig(rank=4), None)]
)
def test_checkpointing_changes_no_bit_of_loss_or_gradient(lora, freeze, monkeypatch):
    monkeypatch.setattr(trainer.model, "_OFFLOADED", 0)
    results = {}
    for mode in MODES:
        vlm = loaded(checkpointing=mode, freeze_vision=freeze, lora=lora)
        perturb(vlm)
        results[mode] = backward(vlm, vlm.collate(sequences(vlm, 3))), gradients(vlm)
    loss, expected = results.pop("none")
    for other, grads in results.values():
        assert torch.equal(loss, other) and grads.keys() == expected.keys()
        assert all(torch.equal(grads[name], expected[name]) for name in expected)


def test_checkpointing_leaves_less_on_the_device(monkeypatch):
    kept, moved = {}, {}
    for mode in MODES:
        count = [0]

        def to_host(tensor, count=count, original=trainer.model._to_host):
            result = original(tensor)
            count[0] += not isinstance(result, torch.Tensor)
            return result

        monkeypatch.setattr(trainer.model, "_to_host", to_host)
        vlm = loaded(checkpointing=mode, freeze_vision=True)
        inputs = vlm.collate(sequences(vlm, 32))
        with saved_bytes() as total:
            hidden_states(vlm.model, inputs)
        monkeypatch.undo()
        kept[mode], moved[mode] = total[0], count[0]
        one = inputs["input_ids"].numel() * 128 * 4
    layers = vlm.model.config.text_config.num_hidden_layers
    assert kept["layers"] < 0.25 * kept["none"]
    assert moved == {"none": 0, "layers": 0, "offload": layers}
    # Each layer's input is gone, and nothing else: no tensor of another kind went to the host.
    assert kept["layers"] - kept["offload"] == layers * one


def test_small_inputs_stay_where_they_are():
    small = torch.zeros(100)
    assert trainer.model._to_host(small) is small
    large = torch.randn(1 << 18)
    kept = trainer.model._to_host(large)
    assert kept.tensor.data_ptr() != large.data_ptr()
    assert torch.equal(trainer.model._to_device(kept), large)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_generation_is_the_same_with_checkpointing(lora):
    turns = []
    for mode in MODES:
        vlm = loaded(checkpointing=mode, lora=lora)
        if lora is not None:
            perturb(vlm)
        some = sequences(vlm, 3)
        turns.append(HFEngine(vlm).generate(some, [[1], [2], [3]], 8))
        # And afterwards it trains again, with checkpoints.
        assert vlm.model.training is (mode != "none")
        inputs = vlm.collate(some, left=True)
        vlm.model.eval()
        output = vlm.model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=True)
        assert output.shape[1] > inputs["input_ids"].shape[1]
    assert turns[0] == turns[1] == turns[2]


# ---- adapters ------------------------------------------------------------------------------------


def test_adapters_begin_as_nothing_and_alone_are_trained():
    plain, vlm = loaded(), loaded(lora=LoraConfig(rank=4))
    inputs = plain.collate(sequences(plain, 2))
    with torch.no_grad():
        expected, actual = hidden_states(plain.model, inputs), hidden_states(vlm.model, inputs)
    assert torch.equal(expected, actual)
    trained = [name for name, p in vlm.model.named_parameters() if p.requires_grad]
    # q, k, v, o and gate, up, down of every layer, two factors each.
    assert len(trained) == 7 * 2 * vlm.model.config.text_config.num_hidden_layers
    assert all("language_model" in name and ".lora_" in name for name in trained)
    assert torch.equal(vlm.head, plain.head) and not vlm.head.requires_grad
    backward(vlm, inputs)
    assert set(gradients(vlm)) == set(trained)


def test_targets_narrow_the_adapters():
    vlm = loaded(lora=LoraConfig(rank=4, targets=("q_proj", "layers.1.mlp.down_proj")))
    trained = {n.split(".lora_")[0] for n, p in vlm.model.named_parameters() if p.requires_grad}
    layer = "model.language_model.layers.{}.{}"
    assert trained == {layer.format(n, "self_attn.q_proj") for n in range(3)} | {
        layer.format(1, "mlp.down_proj")
    }


@pytest.mark.parametrize("target", ["lm_head", "visual.blocks.0.attn.qkv", "embed_tokens", "proj"])
def test_a_target_that_is_no_layer_of_the_language_model_is_refused(target):
    with pytest.raises(ValueError, match=f"'{target}', which is no linear layer.*LM head.*q_proj"):
        loaded(lora=LoraConfig(targets=("q_proj", target)))


def test_adapters_of_bfloat16_weights_are_float32():
    vlm = loaded(dtype=torch.bfloat16, lora=LoraConfig(rank=4))
    for parameter in vlm.model.parameters():
        wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == wanted
    loss = backward(vlm, vlm.collate(sequences(vlm, 2)))
    assert torch.isfinite(loss) and all(g.dtype == torch.float32 for g in gradients(vlm).values())


def test_four_bits_without_bitsandbytes_say_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(ValueError, match="nf4 needs bitsandbytes .*pip install.*quantize=none"):
        loaded(lora=LoraConfig(quantize="nf4"))


def test_four_bits_train_and_are_saved_as_an_ordinary_model(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    lora = LoraConfig(rank=4, quantize="nf4")
    vlm = loaded(dtype=torch.bfloat16, lora=lora, checkpointing="offload")
    packed = [n for n, m in vlm.model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    layers = vlm.model.config.text_config.num_hidden_layers
    assert len({n.removesuffix(".base_layer") for n in packed}) == 7 * layers
    assert all("language_model" in name for name in packed)
    assert vlm.head.dtype == torch.bfloat16
    perturb(vlm)
    inputs = vlm.collate(sequences(vlm, 2))
    backward(vlm, inputs)
    assert len(gradients(vlm)) == 2 * 7 * layers
    assert all(torch.isfinite(g).all() for g in gradients(vlm).values())
    vlm.save(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    again = VisionLanguageModel.load(tmp_path)
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        expected, actual = hidden_states(vlm.model, inputs), hidden_states(again.model, inputs)
    assert (actual - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_merged_into_what_is_saved(tmp_path, dtype):
    vlm = loaded(dtype=dtype, lora=LoraConfig(rank=4))
    perturb(vlm)
    before = {n: p.clone() for n, p in vlm.model.named_parameters()}
    vlm.save(tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in vlm.model.named_parameters())
    again = VisionLanguageModel.load(tmp_path)
    plain = loaded(dtype=dtype)
    names = [name for name, _ in plain.model.named_parameters()]
    assert [name for name, _ in again.model.named_parameters()] == names
    weights, base = dict(again.model.named_parameters()), dict(plain.model.named_parameters())
    assert {w.dtype for w in weights.values()} == {dtype}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in before:
            a, b = (before[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
            expected = base[name].double() + 64 / 4 * b @ a  # alpha / rank
            tolerance = 1e-6 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(weight.double(), expected, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(weight, base[name])
    if dtype == torch.float32:
        inputs = vlm.collate(sequences(vlm, 2))
        with torch.no_grad():
            expected, actual = hidden_states(vlm.model, inputs), hidden_states(again.model, inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ---- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_the_reference_is_the_policy_as_it_was(lora):
    vlm = loaded(lora=lora, freeze_vision=True)
    perturb(vlm)  # a policy that has learned already, and is not what was loaded
    inputs = vlm.collate(sequences(vlm, 2))
    with torch.no_grad():
        expected = hidden_states(vlm.model, inputs)
    reference = Reference(vlm)
    perturb(vlm)
    with torch.no_grad():
        present = hidden_states(vlm.model, inputs)
    assert not torch.equal(present, expected)
    for _ in range(2):
        with reference() as model:
            actual = hidden_states(model, inputs)
        assert not actual.requires_grad and torch.equal(actual, expected)
    with pytest.raises(KeyboardInterrupt), reference():
        raise KeyboardInterrupt
    with torch.no_grad():
        assert torch.equal(hidden_states(vlm.model, inputs), present)
    trained = sum(p.numel() for p in vlm.model.parameters() if p.requires_grad)
    assert sum(kept.numel() for _, kept in reference._kept) == trained
    backward(vlm, inputs)  # and the policy still learns
    assert gradients(vlm)


@pytest.fixture
def mesh():
    """A process group of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_model_learns_and_remembers_the_same(mesh):
    """FSDP2, which gathers parameters anew and keeps the root's: all of it bitwise."""
    from torch.distributed.fsdp import fully_shard

    def run(sharded: bool) -> list[torch.Tensor]:
        vlm = loaded(checkpointing="offload", freeze_vision=True)
        inputs = vlm.collate(sequences(vlm, 2))
        if sharded:
            for layer in vlm.model.model.language_model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(vlm.model, mesh=mesh)
        reference, results = Reference(vlm), []
        optimizer = make_optimizer(vlm.model, OptimizerConfig(), 1e-3, (0.9, 0.95), 0.0)
        for _ in range(3):
            with reference() as model:
                results.append(model(**inputs, use_cache=False).logits)
            loss = vlm.model(**inputs, use_cache=False).logits.square().mean()
            loss.backward()
            with states_on_host(optimizer):
                pass
            results += [loss.detach(), optimizer_step(vlm.model, optimizer, 1e-3, 1.0)]
        assert torch.equal(results[0], results[3]) and torch.equal(results[0], results[6])
        assert results[7] < results[4] < results[1]
        return results

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))
