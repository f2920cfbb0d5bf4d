"""The engine against full forwards without a cache, one sequence at a time."""

import gc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from metis_kernels.adapters import hf
from trainer.engines import generation as generation_module
from trainer.engines import kv
from trainer.engines.hf import HFEngine, Sampled
from trainer.engines.sampling import Protocol
from trainer.model import VisionLanguageModel

TOKENS = 12
"""Of a turn in these tests, at most."""


def image(seed: int, size: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt(vlm, text: str, *images) -> tuple[list[int], list[Image.Image]]:
    shown = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
    text = f"<|im_start|>user\n{shown}{text}<|im_end|>\n<|im_start|>assistant\n"
    return vlm.encode(text, images), list(images)


def prompts(vlm) -> list[tuple[list[int], list[Image.Image]]]:
    """Five rollouts of three prompts, of different lengths and numbers of images."""
    first = prompt(vlm, "Which digit is in square b3?", image(0))
    second = prompt(vlm, "What is 12 * 7? Think well.", image(1, 64), image(2, 16))
    third = prompt(vlm, "Hello")
    return [(list(ids), list(images)) for ids, images in (first, second, first, third, second)]


def observation(vlm, number: int, turn: int) -> tuple[list[int], list[Image.Image]]:
    """What the template puts after a turn; every second trajectory is shown an image."""
    if (number + turn) % 2:
        return vlm.encode(f"<|im_end|>\n<|im_start|>user\n{turn * 'no '}<|im_end|>\n"), []
    shown = [image(10 * number + turn, (16, 32, 48)[turn % 3])]
    text = (
        "<|im_end|>\n<|im_start|>user\nsee<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
    )
    return vlm.encode(text, shown), shown


def converse(vlm, engine, turns: int = 3, keys=range(5)):
    """Plays turns -> the sequences, and per trajectory the (start, Sampled) of its turns."""
    sequences = [prompts(vlm)[key] for key in keys]
    said: list[list[tuple[int, Sampled]]] = [[] for _ in keys]
    with engine.open() as generation:
        for turn in range(turns):
            seeds = [(key, turn) for key in keys]
            sampled = generation.turn(list(keys), sequences, seeds, TOKENS)
            for n, (key, one) in enumerate(zip(keys, sampled, strict=True)):
                ids, images = sequences[n]
                said[n].append((len(ids), one))
                more, shown = observation(vlm, key, turn)
                sequences[n] = (ids + one.ids + more, images + shown)
    return sequences, said


@torch.no_grad()
def full_logits(vlm, ids, images) -> torch.Tensor:
    """[T, V] of one forward over a whole sequence, padded by nothing and cached nowhere."""
    model = vlm.model.eval()
    return model(**vlm.collate([(ids, images)]), use_cache=False).logits[0].float()


def plain_turn(vlm, protocol, ids, images, seed, temperature) -> Sampled:
    """One turn by full forwards: a token is the first at which the CDF passes the number."""
    uniform = np.random.default_rng(list(seed)).random(TOKENS)
    new: list[int] = []
    logprob: list[float] = []
    for point in uniform:
        logits = full_logits(vlm, ids + new, images)[-1]
        logits[protocol.forbidden] = -torch.inf
        logp = torch.log_softmax(logits / (temperature or 1.0), -1)
        cdf = logp.double().exp().cumsum(0)
        passed = cdf > point * cdf[-1]
        token = int(passed.nonzero()[0]) if temperature else int(logp.argmax())
        new.append(token)
        logprob.append(logp[token].item())
        text = vlm.tokenizer.decode(new)
        if token == vlm.tokenizer.eos_token_id:
            return Sampled(new, logprob, "end")
        if text.endswith("</tool_call>"):
            return Sampled(new, logprob, "call")
        if text.endswith("</answer>"):
            return Sampled(new, logprob, "answer")
    return Sampled(new, logprob, "length")


def assert_is_plain(vlm, said, sequences, keys=range(5), temperature=1.0, tolerance=1e-4):
    protocol = Protocol(vlm.tokenizer, vlm.head.shape[0])
    for key, turns, (ids, images) in zip(keys, said, sequences, strict=True):
        for turn, (start, one) in enumerate(turns):
            shown = ids[:start].count(vlm.image_token_id)
            count = 0
            while shown > 0:
                shown -= vlm.image_tokens(images[count])
                count += 1
            plain = plain_turn(vlm, protocol, ids[:start], images[:count], (key, turn), temperature)
            assert (one.ids, one.stop) == (plain.ids, plain.stop), (key, turn)
            assert one.logprob == pytest.approx(plain.logprob, abs=tolerance)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.5])
def test_turns_are_those_of_full_forwards(vlm, temperature):
    """Three turns, with images in what is appended: tokens, logprobs and stops."""
    engine = HFEngine(vlm, temperature=temperature)
    sequences, said = converse(vlm, engine)
    assert_is_plain(vlm, said, sequences, temperature=temperature)
    assert len({len(ids) for ids, _ in sequences}) > 2


def test_logits_are_those_of_one_forward_over_the_whole_trajectory(vlm, monkeypatch):
    """All of them, not only those of the sampled tokens; and the logprobs to 1e-4."""
    seen = []
    sample = generation_module.sample

    def spy(logits, *rest):
        seen.append(logits.clone())
        return sample(logits, *rest)

    monkeypatch.setattr(generation_module, "sample", spy)
    monkeypatch.setattr(generation_module, "KEPT", 0.0)  # rows stay in their order
    engine = HFEngine(vlm, temperature=2.0)
    sequences, said = converse(vlm, engine)
    compared = 0
    for n, (ids, images) in enumerate(sequences):
        full = full_logits(vlm, ids, images)
        scaled = full.index_fill(1, engine.forbidden_ids, -torch.inf) / 2.0
        logp = torch.log_softmax(scaled, -1)
        first = 0
        for turn, (start, one) in enumerate(said[n]):
            for t, token in enumerate(one.ids):
                logits = seen[first + t][n].float()
                torch.testing.assert_close(logits, full[start + t - 1], atol=1e-4, rtol=1e-4)
                assert one.logprob[t] == pytest.approx(logp[start + t - 1, token].item(), abs=1e-4)
                compared += 1
            first += max(len(some[turn][1].ids) for some in said)
    assert first == len(seen) and compared > 60


@pytest.mark.parametrize(
    "setting",
    [
        {"KEPT": 0.0},
        {"KEPT": 0.99},
        {"ROOM": 1},
        {"ROOM": 1, "KEPT": 0.99},
        {"PREFILL_TOKENS": 1},
        {"FORWARD": -1},
        {"FORWARD": 10**6},
    ],
    ids=str,
)
def test_how_rows_are_batched_and_stored_changes_nothing(vlm, monkeypatch, setting):
    expected, said = converse(vlm, HFEngine(vlm, temperature=1.7))
    for name, value in setting.items():
        monkeypatch.setattr(generation_module, name, value)
    sequences, again = converse(vlm, HFEngine(vlm, temperature=1.7))
    assert [ids for ids, _ in sequences] == [ids for ids, _ in expected]
    for one, other in zip(sum(said, []), sum(again, []), strict=True):
        assert one[1].stop == other[1].stop
        assert one[1].logprob == pytest.approx(other[1].logprob, abs=1e-4)


def test_a_trajectory_does_not_depend_on_the_others(vlm):
    engine = HFEngine(vlm, temperature=1.7)
    together, _ = converse(vlm, engine)
    for key in range(5):
        alone, _ = converse(vlm, engine, keys=[key])
        assert alone[0][0] == together[key][0]


def test_prompts_are_encoded_once_and_history_never_again(vlm):
    patches = []
    visual = vlm.model.model.visual
    hook = visual.register_forward_pre_hook(
        lambda module, args, kwargs: patches.append(int(kwargs["grid_thw"].prod(1).sum())),
        with_kwargs=True,
    )
    engine = HFEngine(vlm)
    sequences = prompts(vlm)
    lengths = [len(ids) for ids, _ in sequences]
    try:
        with engine.open() as generation:
            first = generation.turn(range(5), sequences, [(n, 0) for n in range(5)], TOKENS)
            shown = sum(patches)
            patches.clear()
            counts = engine.stats()
            more = [observation(vlm, n, 0) for n in range(5)]
            sequences = [
                (ids + one.ids + new, images + some)
                for (ids, images), one, (new, some) in zip(sequences, first, more, strict=True)
            ]
            generation.turn(range(5), sequences, [(n, 1) for n in range(5)], TOKENS)
    finally:
        hook.remove()
    merge = vlm.image_processor.merge_size**2
    tokens = [sum(map(vlm.image_tokens, images)) for _, images in prompts(vlm)]
    assert shown == merge * (tokens[0] + tokens[1] + tokens[3])
    assert sum(patches) == merge * sum(vlm.image_tokens(i) for _, some in more for i in some)
    assert counts["prefill_tokens"] == lengths[0] + lengths[1] + lengths[3]
    assert counts["shared_tokens"] == lengths[2] + lengths[4]
    assert counts["kept_tokens"] == 0 and counts["seconds"] > 0
    assert counts["sampled_tokens"] == sum(len(one.ids) for one in first)
    again = engine.stats()
    # The last token of a turn is the one that has not been run.
    assert again["prefill_tokens"] == sum(1 + len(new) for new, _ in more)
    assert again["kept_tokens"] == sum(
        n + len(s.ids) - 1 for n, s in zip(lengths, first, strict=True)
    )
    assert again["sampled_per_second"] == again["sampled_tokens"] / again["seconds"]
    assert set(engine.stats().values()) == {0}


def test_the_same_text_over_another_image_is_another_prompt(vlm):
    engine = HFEngine(vlm)
    questions = [prompt(vlm, "Which digit is in square b3?", image(n)) for n in range(6)]
    assert len({tuple(ids) for ids, _ in questions}) == 1
    together = engine.generate(questions, [(0,)] * 6, 1)
    for one, (ids, images) in zip(together, questions, strict=True):
        (alone,) = engine.generate([(ids, images)], [(0,)], 1)
        assert one.ids == alone.ids
        assert one.logprob == pytest.approx(alone.logprob, abs=1e-4)
    assert max(one.logprob[0] for one in together) > min(one.logprob[0] for one in together) + 1e-3


def test_rows_move_between_caches(vlm):
    """Into two new caches from two old ones, which are left empty; a free slot is finite."""

    def filled(rows: int, capacity: int, value: float) -> kv.RowCache:
        cache = kv.RowCache(2, rows, capacity)
        everything = torch.arange(rows), torch.arange(capacity).expand(rows, -1)
        for layer in range(2):
            keys = torch.arange(rows * capacity, dtype=torch.float32) + value + 1000 * layer
            keys = keys.view(rows, 1, capacity, 1).expand(-1, 3, -1, 4)
            cache.put(kv.Place(*everything, 0)).update(keys, -keys, layer)
        return cache

    one, two = filled(3, 5, 100.0), filled(2, 4, 500.0)
    old = [[layer.keys.clone() for layer in cache.layers] for cache in (one, two)]
    long, short = kv.regroup([([(two, 1), None, (one, 2)], 7), ([(one, 0)], 2)], 2)
    for index in range(2):
        keys, values = long.layers[index].keys, long.layers[index].values
        assert keys.shape == (3, 3, 7, 4) and torch.equal(keys, -values)
        assert torch.equal(keys[0, :, :4], old[1][index][1])
        assert torch.equal(keys[2, :, :5], old[0][index][2])
        assert keys.sum() == keys[0, :, :4].sum() + keys[2, :, :5].sum()
        assert torch.equal(short.layers[index].keys[0], old[0][index][0][:, :2])
    assert one.nbytes == two.nbytes == 0
    assert long.nbytes == 2 * 2 * 3 * 3 * 7 * 4 * 4


def test_kv_is_freed(vlm, monkeypatch):
    """Of a trajectory that is left out, of all at the end, and without the garbage collector."""
    engine = HFEngine(vlm)
    caches = []
    made = kv.RowCache.__init__

    def spy(self, *args):
        made(self, *args)
        caches.append(weakref.ref(self))

    monkeypatch.setattr(kv.RowCache, "__init__", spy)
    gc.disable()
    try:
        with engine.open() as generation:
            sequences = prompts(vlm)
            sampled = generation.turn(range(5), sequences, [(n,) for n in range(5)], TOKENS)
            before = generation.nbytes
            ids = [*sequences[3][0], *sampled[3].ids, *observation(vlm, 1, 0)[0]]
            assert not observation(vlm, 1, 0)[1]
            generation.turn([3], [(ids, [])], [(3, 1)], TOKENS)
            text = vlm.model.config.get_text_config()
            row = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
            assert generation.nbytes % row == 0
            assert len(ids) * row < generation.nbytes < before / 2
            assert sum(cache() is not None for cache in caches) == 1
        assert generation.nbytes == 0
        assert all(cache() is None for cache in caches) and len(caches) > 1
    finally:
        gc.enable()


def test_a_trajectory_that_comes_back_is_encoded_anew(vlm):
    engine = HFEngine(vlm, temperature=1.7)
    expected, _ = converse(vlm, engine, turns=2)
    sequences = prompts(vlm)
    with engine.open() as generation:
        sampled = generation.turn(range(5), sequences, [(n, 0) for n in range(5)], TOKENS)
        for n, one in enumerate(sampled):
            ids, images = observation(vlm, n, 0)
            sequences[n] = (sequences[n][0] + one.ids + ids, sequences[n][1] + images)
        generation.turn([0], [sequences[0]], [(0, 1)], TOKENS)
        engine.stats()
        (one,) = generation.turn([1], [sequences[1]], [(1, 1)], TOKENS)
        assert engine.stats()["prefill_tokens"] == len(sequences[1][0])
    assert expected[1][0][len(sequences[1][0]) :][: len(one.ids)] == one.ids


def test_what_was_sampled_cannot_be_rewritten(vlm):
    engine = HFEngine(vlm)
    (ids, images), *_ = prompts(vlm)
    with engine.open() as generation:
        (one,) = generation.turn([7], [(ids, images)], [(0,)], TOKENS)
        with pytest.raises(ValueError, match="trajectory 7 .* only append"):
            generation.turn([7], [([*ids, one.ids[0] + 1, *one.ids[1:]], images)], [(0,)], TOKENS)
        with pytest.raises(ValueError, match="0 images that do not begin"):
            generation.turn([7], [([*ids, *one.ids, 9], [])], [(0,)], TOKENS)


def test_limits_are_named(vlm):
    engine = HFEngine(vlm, max_batch=2)
    sequences = prompts(vlm)
    with engine.open() as generation:
        with pytest.raises(ValueError, match="3 trajectories .* max_batch = 2"):
            generation.turn(range(3), sequences[:3], [(0,)] * 3, TOKENS)
        with pytest.raises(ValueError, match="every trajectory once"):
            generation.turn([1, 1], sequences[:2], [(0,)] * 2, TOKENS)
        with pytest.raises(ValueError, match="a turn of 0 tokens"):
            generation.turn([1], sequences[:1], [(0,)], 0)
        assert generation.turn([], [], [], TOKENS) == []
    with pytest.raises(ValueError, match="max_batch is 0"):
        HFEngine(vlm, max_batch=0)
    with pytest.raises(ValueError, match="temperature is -1"):
        HFEngine(vlm, temperature=-1)


def test_generate_takes_more_than_a_batch(vlm):
    sequences, seeds = prompts(vlm), [(n, 0) for n in range(5)]
    few = HFEngine(vlm, temperature=1.7, max_batch=2).generate(sequences, seeds, TOKENS)
    all_at_once = HFEngine(vlm, temperature=1.7).generate(sequences, seeds, TOKENS)
    assert [one.ids for one in few] == [one.ids for one in all_at_once]
    assert HFEngine(vlm).generate([], [], TOKENS) == []


def test_a_batch_fits_into_the_bytes_that_are_given(vlm):
    row = 2 * 3 * 2 * 32 * 4  # keys and values, layers, heads, their size, fp32
    assert HFEngine(vlm, max_cache_bytes=10 * row * 100).batch_size(100) == 10
    assert HFEngine(vlm, max_cache_bytes=1).batch_size(100) == 1
    assert HFEngine(vlm, max_cache_bytes=10**12, max_batch=7).batch_size(100) == 7
    assert HFEngine(vlm).batch_size(100) == 256


# ---- models as training leaves them --------------------------------------------------------------


def test_training_goes_on_as_it_was(fresh_vlm):
    """Checkpointing would switch the cache off in training mode; a frozen part keeps its mode."""
    engine = HFEngine(fresh_vlm, temperature=1.7)
    expected, _ = converse(fresh_vlm, engine)
    model = fresh_vlm.model
    model.gradient_checkpointing_enable()
    model.train()
    model.model.visual.eval()
    modes = [module.training for module in model.modules()]
    sequences, _ = converse(fresh_vlm, engine)
    assert [ids for ids, _ in sequences] == [ids for ids, _ in expected]
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    loss = model(**fresh_vlm.collate(prompts(fresh_vlm)[:1])).logits.square().mean()
    loss.backward()
    with pytest.raises(RuntimeError, match="no way"), engine.inference():
        raise RuntimeError("no way")
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_other_attention_is_given_the_same_masks(fresh_vlm, name, prepared):
    """Prepared: as training leaves it, with attention over packed batches put before it."""
    engine = HFEngine(fresh_vlm, temperature=1.7)
    expected, _ = converse(fresh_vlm, engine)
    fresh_vlm.model.set_attn_implementation({"text_config": name})
    if prepared:
        hf.prepare(fresh_vlm.model)
    used = fresh_vlm.model.model.language_model.config._attn_implementation
    assert used.endswith(name) and (used != name) == prepared
    sequences, _ = converse(fresh_vlm, engine)
    assert [ids for ids, _ in sequences] == [ids for ids, _ in expected]


def test_attention_that_transformers_does_not_know_is_given_the_same_masks(fresh_vlm):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    engine = HFEngine(fresh_vlm, temperature=1.7)
    expected, _ = converse(fresh_vlm, engine)
    AttentionInterface.register("sdpa_by_another_name", sdpa_attention_forward)
    fresh_vlm.model.set_attn_implementation({"text_config": "sdpa_by_another_name"})
    used = fresh_vlm.model.model.language_model.config._attn_implementation
    assert used == "sdpa_by_another_name"
    sequences, _ = converse(fresh_vlm, engine)
    assert [ids for ids, _ in sequences] == [ids for ids, _ in expected]


def test_a_model_that_it_cannot_keep_is_refused(fresh_vlm):
    text = fresh_vlm.model.model.language_model.config
    text._attn_implementation_internal, before = "flash_attention_2", text._attn_implementation
    with pytest.raises(ValueError, match="'flash_attention_2'.*attn_implementation='sdpa'"):
        HFEngine(fresh_vlm).generate(prompts(fresh_vlm), [(n,) for n in range(5)], TOKENS)
    text._attn_implementation_internal = before
    text.layer_types = ["full_attention", "linear_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="linear_attention', 'sliding_attention"):
        HFEngine(fresh_vlm)
    fresh_vlm.model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="Linear has no get_rope_index"):
        engine = HFEngine.__new__(HFEngine)
        engine.vlm = fresh_vlm
        engine.inference().__enter__()


def test_adapters_are_used(fresh_vlm):
    """A model that peft wraps after the engine was made."""
    peft = pytest.importorskip("peft")
    engine = HFEngine(fresh_vlm, temperature=1.7)
    _, without = converse(fresh_vlm, engine, turns=1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    fresh_vlm.model = peft.get_peft_model(fresh_vlm.model, config)
    with torch.no_grad():
        for name, weight in fresh_vlm.model.named_parameters():
            if "lora_B" in name:
                weight.mul_(10)
    sequences, said = converse(fresh_vlm, engine)
    assert_is_plain(fresh_vlm, said, sequences, temperature=1.7)
    assert [turns[0] for turns in said] != [turns[0] for turns in without]


def test_another_family_of_models(vlm):
    """Qwen2.5-VL: other positions, sliding windows that are off, no deepstack."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vlm.head.shape[0],
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            "initializer_range": 0.3,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "temporal_patch_size": 1,
            "fullatt_block_indexes": [1],
            "window_size": 16,
            "initializer_range": 0.3,
        },
        image_token_id=vlm.image_token_id,
        vision_start_token_id=vlm.model.config.vision_start_token_id,
        vision_end_token_id=vlm.model.config.vision_end_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    processor = Qwen2VLImageProcessorPil(**vlm.image_processor.to_dict())
    other = VisionLanguageModel(model, vlm.tokenizer, processor)
    sequences, said = converse(other, HFEngine(other, temperature=1.0))
    assert_is_plain(other, said, sequences)


# ---- one forward over one token, captured --------------------------------------------------------


def test_graphs_need_cuda(vlm):
    if vlm.device.type == "cpu":
        with pytest.raises(ValueError, match="cuda_graphs needs a model on CUDA"):
            HFEngine(vlm, cuda_graphs=True)


def test_a_step_reads_nothing_but_its_own_tensors(vlm, monkeypatch):
    """What a capture relies on, with the replay played by a call that knows only the tensors of the
    step: a fixed view, and a warm-up that writes where the replay writes again."""
    expected, said = converse(vlm, HFEngine(vlm, temperature=1.7))
    monkeypatch.setattr(generation_module, "ROOM", 3)

    class Replay:
        def __init__(self, step):
            self.step = step
            self.given = [step.length, step.position, step.token, step.rows, step.slots]
            self.kept = [layer.keys.data_ptr() for layer in step.cache.layers]

        def replay(self):
            step = self.step
            now = [step.length, step.position, step.token, step.rows, step.slots]
            assert all(one is other for one, other in zip(now, self.given, strict=True))
            assert self.kept == [layer.keys.data_ptr() for layer in step.cache.layers]
            step.logits.copy_(step._forward(step.cache.capacity))

    def capture(step):
        step.logits = step._forward(step.cache.capacity)
        step.graph = Replay(step)

    monkeypatch.setattr(generation_module._Step, "_capture", capture)
    engine = HFEngine(vlm, temperature=1.7)
    engine.cuda_graphs = True
    sequences, again = converse(vlm, engine)
    assert [ids for ids, _ in sequences] == [ids for ids, _ in expected]
    for one, other in zip(sum(said, []), sum(again, []), strict=True):
        assert one[1].logprob == pytest.approx(other[1].logprob, abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_change_nothing(fresh_vlm):
    fresh_vlm.model.to("cuda")
    expected, _ = converse(fresh_vlm, HFEngine(fresh_vlm, temperature=1.7))
    sequences, _ = converse(fresh_vlm, HFEngine(fresh_vlm, temperature=1.7, cuda_graphs=True))
    assert [ids for ids, _ in sequences] == [ids for ids, _ in expected]
