"""The names and signatures that DESIGN promises."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import metis_kernels as mk

SIGNATURES = {
    "hdpo_advantages": "acc_reward tool_reward correct group * scored truncated eps scale impl",
    "hdpo_loss": "logprob targets config entropy * mask",
    "hdpo_normalizers": "advantages tokens scored tool_norm",
    "linear_cross_entropy": "hidden weight label row * n bias temperature softcap logits_dtype "
    "impl chunk_bytes process_group grad_filter",
    "linear_hdpo_loss": "hidden weight targets config * bias impl chunk_bytes process_group "
    "grad_filter",
    "linear_logprobs": "hidden weight label row * bias temperature softcap logits_dtype impl "
    "chunk_bytes process_group grad_filter",
    "logprobs": "logits label * temperature impl",
    "pack": "groups max_tokens * ranks share keep_all attention_cost impl",
    "shared_prefix_attention": "q k v layout * scale window softcap impl",
    "status": "device",
    "tool_reward": "tool_calls correct",
    "unpack": "batch values",
    "unpack_targets": "batch values",
}
FIELDS = {
    "Advantages": "acc tool qualifies acc_signal tool_signal",
    "HDPOConfig": "w_acc w_tool clip_low clip_high dual_clip tool_norm ratio kl_coef entropy_coef "
    "temperature softcap logits_dtype",
    "HDPOStats": "logprob entropy loss_acc loss_tool clip_fraction_acc clip_fraction_tool "
    "approx_kl ratio_max n_active n_nonfinite",
    "HDPOTargets": "row label old_logprob acc_advantage tool_advantage n_acc n_tool ref_logprob "
    "is_weight sequence",
    "ImageRef": "group rollout index",
    "ImageSpan": "start stop key",
    "PackedBatch": "ids positions layout images row label acc_advantage tool_advantage "
    "old_logprob ref_logprob is_weight sequence members attention_cost",
    "PrefixLayout": "prefixes responses",
    "Trajectory": "ids policy acc_advantage tool_advantage images positions old_logprob "
    "ref_logprob is_weight name",
}
DEFAULTS = {
    "w_acc": 1.0, "w_tool": 0.15, "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0,
    "tool_norm": "signal", "ratio": "token", "kl_coef": 0.0, "entropy_coef": 0.0,
    "temperature": 1.0, "softcap": None, "logits_dtype": None,
}  # fmt: skip


def test_all_names_exist():
    assert len(set(mk.__all__)) == len(mk.__all__)
    assert set(mk.__all__) >= set(SIGNATURES) | set(FIELDS)
    for name in mk.__all__:
        assert getattr(mk, name).__doc__, f"{name} has no docstring"
    assert mk.__version__


def test_signatures():
    for name, wanted in SIGNATURES.items():
        got, keyword_only = [], False
        for p in inspect.signature(getattr(mk, name)).parameters.values():
            if p.kind is p.KEYWORD_ONLY and not keyword_only:
                got.append("*")
                keyword_only = True
            got.append(p.name)
        assert " ".join(got) == wanted, name


def test_dataclasses():
    for name, wanted in FIELDS.items():
        cls = getattr(mk, name)
        assert cls.__dataclass_params__.frozen, name
        fields = [f.name for f in dataclasses.fields(cls) if f.init]
        assert " ".join(fields) == wanted, name
    assert dataclasses.asdict(mk.HDPOConfig()) == DEFAULTS


def test_defaults_of_the_functions():
    p = inspect.signature(mk.hdpo_advantages).parameters
    assert (p["eps"].default, p["scale"].default, p["scored"].default) == (1e-6, "std", None)
    assert inspect.signature(mk.linear_hdpo_loss).parameters["impl"].default == "auto"


def test_importing_it_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import metis_kernels\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "new -= {m for m in new if m.startswith('_sysconfigdata')}  # of the standard library too\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'metis_kernels', 'torch', 'triton'}))\n"
        "assert not torch.cuda.is_initialized()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
