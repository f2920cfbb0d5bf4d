"""Packed and shared against one rollout at a time, in every family of models."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import metis_kernels as mk
from metis_kernels.adapters import hf
from tests import models

CONFIG = mk.HDPOConfig(w_tool=0.3)
ROUNDING = (1e-7, 1e-6)
"""Relative, of loss and gradients in float64: the models' norms and rotations compute in fp32."""


class World:
    """Groups of rollouts with images in the prompt and, for some, in a tool's answer."""

    def __init__(
        self, family: str, dtype=torch.float64, *, groups=((3, 2), (1,), (2, 4, 3)), seed=1
    ):
        self.model = models.make(family, dtype)
        self.sees = family in models.VISION_FAMILIES
        self.rng = torch.Generator().manual_seed(1)
        self.dtype = dtype
        self.pictures: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.groups, self.shown = [], []
        for number, lengths in enumerate(groups):
            prompt, spans, shown = self._text(6 + number), [], []
            if self.sees:
                prompt, spans, shown = self._look(prompt, spans, shown, (2 + number, 2))
            prompt = prompt + self._text(3)
            group, pictures = [], []
            for turn in lengths:
                group.append(self._rollout(prompt, spans, shown, turn, pictures))
            self.groups.append(group)
            self.shown.append(pictures)

    def _text(self, n: int) -> list[int]:
        return torch.randint(10, models.VOCABULARY, (n,), generator=self.rng).tolist()

    def _look(self, ids, spans, shown, size):
        h, w = size
        patches = torch.randn(
            h * w * models.MERGE**2, 3 * models.PATCH**2, generator=self.rng, dtype=self.dtype
        )
        grid = torch.tensor([1, h * models.MERGE, w * models.MERGE])
        key = len(self.pictures)
        self.pictures.append((patches, grid))
        ids = [*ids, models.VISION_START]
        span = mk.ImageSpan(len(ids), len(ids) + h * w, key)
        ids += [models.IMAGE] * (h * w) + [models.VISION_END]
        return ids, [*spans, span], [*shown, key]

    def _rollout(self, prompt, spans, shown, turn, pictures):
        ids, policy = list(prompt), [False] * len(prompt)
        for _ in range(2):
            ids = ids + self._text(turn)
            policy += [True] * (len(ids) - len(policy))
            if self.sees and turn % 2:  # a tool shows a picture
                ids, spans, shown = self._look(ids + self._text(1), spans, shown, (1, 2))
            ids = ids + self._text(2)
            policy += [False] * (len(ids) - len(policy))
        ids = ids + self._text(turn)
        policy += [True] * (len(ids) - len(policy))
        pictures.append(shown)
        grids = torch.stack([self.pictures[k][1] for k in shown]) if shown else None
        return mk.Trajectory(
            torch.tensor(ids),
            torch.tensor(policy),
            acc_advantage=float(torch.randn((), generator=self.rng)),
            tool_advantage=float(torch.randn((), generator=self.rng)),
            images=tuple(spans),
            positions=hf.positions(self.model, torch.tensor(ids), grids),
            old_logprob=-3 + torch.randn(len(ids), generator=self.rng),
        )

    def pixels(self, keys) -> dict[str, torch.Tensor]:
        if not keys:
            return {}
        return {
            "pixel_values": torch.cat([self.pictures[k][0] for k in keys]),
            "image_grid_thw": torch.stack([self.pictures[k][1] for k in keys]),
        }

    @property
    def n_acc(self):
        return sum(t.policy.sum() for group in self.groups for t in group)

    def packed_loss(self, model, max_tokens=10_000, **options):
        loss = 0
        for batch in mk.pack(self.groups, max_tokens, **options):
            keys = [self.shown[i.group][i.rollout][i.index] for i in batch.images]
            hidden = hf.hidden_states(model, batch, **self.pixels(keys))
            weights = hf.head(model)
            config = replace(CONFIG, softcap=weights.softcap)
            part, _ = mk.linear_hdpo_loss(
                hidden,
                weights.weight,
                batch.to(hidden.device).targets(self.n_acc, self.n_acc),
                config,
                bias=weights.bias,
            )
            part.backward()
            loss = loss + part.detach()
        return loss

    def plain_loss(self, model):
        """One rollout at a time through the model's own forward, logits and all."""
        loss = 0
        for group, pictures in zip(self.groups, self.shown, strict=True):
            for one, keys in zip(group, pictures, strict=True):
                is_image = (one.ids == models.IMAGE).long()[None]
                extra = self.pixels(keys) | {"mm_token_type_ids": is_image} if keys else {}
                extra = {name: value.to(model.device) for name, value in extra.items()}
                ids = one.ids[None].to(model.device)
                logits = model(input_ids=ids, use_cache=False, **extra).logits[0].cpu()
                where = one.policy.nonzero()[:, 0]
                logprob = logits.log_softmax(-1)[where - 1, one.ids[where]]
                targets = mk.HDPOTargets(
                    row=where - 1,
                    label=one.ids[where],
                    old_logprob=one.old_logprob[where],
                    acc_advantage=torch.full((len(where),), one.acc_advantage),
                    tool_advantage=torch.full((len(where),), one.tool_advantage),
                    n_acc=self.n_acc,
                    n_tool=self.n_acc,
                )
                part, _ = mk.hdpo_loss(logprob, targets, CONFIG)
                part.backward()
                loss = loss + part.detach()
        return loss


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(world, packed, plain, loss, expected, tolerance):
    assert abs(loss - expected) <= tolerance[0] * abs(expected)
    mine, theirs = gradients(packed), gradients(plain)
    assert set(mine) == set(theirs) and len(mine) > 10
    largest = max(g.abs().max() for g in theirs.values())
    for name, gradient in theirs.items():
        # A gradient that is zero but for rounding (a key's bias) has nothing to be relative to.
        floor = 1e-6 * largest
        error = (mine[name] - gradient).abs().max() / gradient.abs().max().clamp_min(floor)
        assert error < tolerance[1], (name, float(error))


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("max_tokens", [10_000, 60])
def test_packed_is_one_by_one_in_float64(family, max_tokens):
    world = World(family)
    plain = copy.deepcopy(world.model)
    expected = world.plain_loss(plain)
    loss = world.packed_loss(hf.prepare(world.model), max_tokens)
    assert_same(world, world.model, plain, loss, expected, ROUNDING)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_packed_is_one_by_one_in_float32(family):
    world = World(family, torch.float32)
    plain = copy.deepcopy(world.model)
    expected = world.plain_loss(plain)
    loss = world.packed_loss(hf.prepare(world.model))
    assert_same(world, world.model, plain, loss, expected, (1e-6, 1e-4))


def test_sharing_changes_nothing_and_saves_rows():
    world = World("qwen3_vl")
    hf.prepare(world.model)
    alone = copy.deepcopy(world.model)
    shared = world.packed_loss(world.model)
    unshared = world.packed_loss(alone, share=False)
    assert_same(world, world.model, alone, shared, unshared, ROUNDING)
    rows = [sum(b.T for b in mk.pack(world.groups, 10_000, share=s)) for s in (True, False)]
    assert rows[0] < 0.8 * rows[1]


def test_a_picture_of_the_prompt_is_looked_at_once_a_group(monkeypatch):
    world = World("qwen3_vl")
    seen = []
    tower = hf.prepare(world.model).model.visual
    forward = tower.forward

    def look(patches, grid_thw, **options):
        seen.append(len(grid_thw))
        return forward(patches, grid_thw=grid_thw, **options)

    monkeypatch.setattr(tower, "forward", look)
    world.packed_loss(world.model)
    pictures = {(g, k) for g, shown in enumerate(world.shown) for keys in shown for k in keys}
    assert sum(seen) == len(pictures) < sum(len(k) for shown in world.shown for k in shown)


@pytest.mark.parametrize("family", ["qwen3_vl", "llama", "gemma3"])
def test_activation_checkpointing_changes_no_bit(family):
    world = World(family, torch.float32)
    hf.prepare(world.model)
    saved = copy.deepcopy(world.model)
    saved.gradient_checkpointing_enable({"use_reentrant": False})
    loss, again = world.packed_loss(world.model), world.packed_loss(saved)
    assert torch.equal(loss, again)
    for (name, a), b in zip(gradients(world.model).items(), gradients(saved).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma2", "llama"])
def test_a_prepared_model_is_the_same_where_nothing_is_packed(family):
    model = models.make(family, torch.float32).eval()
    ids = torch.randint(10, models.VOCABULARY, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    before = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    hf.prepare(hf.prepare(model))
    assert torch.equal(model(**inputs).logits, before)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)


def test_a_saved_model_forgets_that_it_was_prepared(tmp_path):
    model = hf.prepare(models.make("qwen3_vl", torch.float32))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.model.language_model.config._attn_implementation == "sdpa"


def test_an_empty_batch_runs_and_has_a_gradient_of_zero():
    world = World("qwen3_vl")
    hf.prepare(world.model)
    silent = [[replace(t, acc_advantage=0.0, tool_advantage=0.0) for t in world.groups[0]]]
    (batch,) = [b for b in mk.pack(silent, 1000, ranks=2)][:1]
    hidden = hf.hidden_states(world.model, batch)
    assert hidden.shape == (0, 64)
    loss, _ = mk.linear_hdpo_loss(
        hidden, hf.head(world.model).weight, batch.targets(world.n_acc, world.n_acc), CONFIG
    )
    loss.backward()
    assert loss == 0
    assert all((g == 0).all() for g in gradients(world.model).values())


class TestHead:
    def folded(self, **options):
        from peft import LoraConfig, get_peft_model

        world = World("qwen3_vl untied")
        targets = ["q_proj", "down_proj", *options.pop("head", ["lm_head"])]
        model = get_peft_model(world.model, LoraConfig(r=4, target_modules=targets, **options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return world, model.to(torch.float64)

    def test_adapters_of_the_head_are_folded(self):
        world, model = self.folded()
        plain = copy.deepcopy(model)
        expected = world.plain_loss(plain)
        loss = world.packed_loss(hf.prepare(model))
        assert_same(world, model, plain, loss, expected, ROUNDING)
        assert any("lm_head.lora_A" in name for name in gradients(model))

    def test_adapters_that_are_switched_off_are_left_out(self):
        world, model = self.folded()
        with model.disable_adapter():
            weight = hf.head(model).weight
        assert torch.equal(weight, model.get_base_model().lm_head.base_layer.weight)

    def test_a_head_trained_in_full(self):
        world, model = self.folded(head=[], modules_to_save=["lm_head"])
        plain = copy.deepcopy(model)
        expected = world.plain_loss(plain)
        loss = world.packed_loss(hf.prepare(model))
        assert_same(world, model, plain, loss, expected, ROUNDING)

    @pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}])
    def test_adapters_that_cannot_be_folded(self, options):
        _, model = self.folded(**options)
        with pytest.raises(ValueError, match="cannot be folded.*leave lm_head out"):
            hf.head(model)

    def test_a_head_that_scales_its_logits(self):
        model = models.make("llama")
        model.config.logit_scale = 0.5
        with pytest.raises(ValueError, match="logit_scale = 0.5"):
            hf.head(model)


class TestErrors:
    def test_images_that_are_missing(self):
        world = World("qwen3_vl")
        (batch,) = mk.pack(world.groups, 10_000)
        with pytest.raises(ValueError, match=f"has {len(batch.images)} images but .* has 0 rows"):
            hf.hidden_states(hf.prepare(world.model), batch)

    def test_a_model_that_was_not_prepared(self):
        world = World("llama")
        (batch,) = mk.pack(world.groups, 10_000)
        with pytest.raises(ValueError, match="call prepare"):
            hf.hidden_states(world.model, batch)

    def test_attention_that_cannot_fall_back(self):
        model = models.make("llama")
        model.model.config._attn_implementation = "flex_attention"
        with pytest.raises(ValueError, match="'flex_attention'.*sdpa"):
            hf.prepare(model)

    def test_attention_dropout(self):
        world = World("llama")
        for layer in world.model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        (batch,) = mk.pack(world.groups, 10_000)
        with pytest.raises(ValueError, match="dropout is 0.1"):
            hf.hidden_states(hf.prepare(world.model), batch)


def test_what_a_pair_costs():
    """Operations counted by torch itself, of attention and of the linear layers."""
    from torch.utils.flop_counter import FlopCounterMode

    model = models.make("llama", torch.float32).eval()
    model.set_attn_implementation("eager")
    flops = []
    for length in (64, 128):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.model(input_ids=torch.randint(10, 100, (1, length)), use_cache=False)
        flops.append(counter.get_total_flops())
    # token n + pair n^2, at two lengths.
    pair = (flops[1] - 2 * flops[0]) / (128**2 - 2 * 64**2)
    token = flops[0] / 64 - 64 * pair
    assert hf.attention_cost(model) == pytest.approx(pair / token, rel=0.02)


def test_liger_is_for_gpus():
    assert hf.apply_liger(models.make("qwen3_vl", torch.float32)) is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3", "llama"])
def test_bf16_on_a_gpu_is_as_close_as_one_by_one(family):
    exact = World(family)
    exact.plain_loss(exact.model)
    truth = gradients(exact.model)
    world = World(family, torch.bfloat16)
    worst = {}
    for name, run in (("plain", world.plain_loss), ("packed", world.packed_loss)):
        model = copy.deepcopy(world.model).cuda()
        run(hf.prepare(model) if name == "packed" else model)
        worst[name] = max(
            float((g.double().cpu() - truth[n]).norm() / truth[n].norm())
            for n, g in gradients(model).items()
            if truth[n].norm() > 1e-3 * max(g.norm() for g in truth.values())
        )
    assert worst["packed"] <= 3 * worst["plain"]
