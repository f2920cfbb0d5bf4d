"""The rule by which a result counts as correct, and the inputs that it is judged on.

Three values of one quantity: `truth` (float64, dense), `plain` (plain torch in the dtype under
test), `got` (the operator in that dtype). The operator may be at most `factor` times as far from
the truth as plain torch is, and must point the same way. Never loosened for a device or a CI.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from metis_kernels import HDPOConfig, HDPOTargets
from metis_kernels.linear_hdpo import linear_hdpo_ref

FORWARD, GRADIENT = 2.0, 3.0
_ULPS = {torch.float64: 256}
"""Where plain torch happens to hit the truth exactly, this many ulps of the largest value stay: 4,
or more in float64, where plain torch is the truth itself and as rounded as the operator: a sum over
a vocabulary of 50,257 in another order differs by about the root of that, 224 ulps."""


def error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinity where one is NaN and the other is not."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    assert value.shape == truth.shape, f"{list(value.shape)} against {list(truth.shape)}"
    if value.numel() == 0:
        return 0.0
    gap = (value - truth).abs()
    return float(torch.where(value == truth, 0, gap).nan_to_num(nan=float("inf")).max())


def assert_as_good_as_torch(
    got: Tensor,
    plain: Tensor,
    truth: Tensor,
    factor: float,
    what: str = "",
    elsewhere: float = 0.0,
) -> None:
    """The three-way rule; see the module. elsewhere: plain torch's largest error on more values of
    the same kind, for where there are few: the error of one is luck."""
    ours, theirs = error(got, truth), max(error(plain, truth), elsewhere)
    exact = truth.detach().double().cpu()
    size = float(exact.abs().max()) if exact.numel() else 0.0
    slack = _ULPS.get(got.dtype, 4) * torch.finfo(got.dtype).eps * size
    assert ours <= factor * theirs + slack, (
        f"{what}: error {ours:.3e} against {theirs:.3e} of plain torch (x{factor} allowed), "
        f"largest value {size:.3e}"
    )
    flat = got.detach().double().cpu().flatten()
    if flat.numel() > 1 and size > 0:
        cosine = torch.nn.functional.cosine_similarity(flat, exact.flatten(), dim=0)
        assert cosine > 0.999, f"{what}: cosine {float(cosine):.6f} with the truth"


def assert_close(got: Tensor, truth: Tensor, ulps: float = 64, what: str = "") -> None:
    """got within so many ulps (of its dtype) of the largest value of truth."""
    exact = truth.detach().double()
    size = float(exact.abs().max()) if exact.numel() else 0.0
    bound = ulps * torch.finfo(got.dtype).eps * max(size, 1e-30)
    assert error(got, truth) <= bound, f"{what}: error {error(got, truth):.3e} > {bound:.3e}"


def make_head(
    tokens: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    peak: float = 12.0,
    bias: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias) whose logits are as peaked as a trained model's.

    Noise of about 1, and in each row one entry that stands out by `peak`: in turn the last entry
    (the last tile of a kernel), the first, and others. Requires-grad leaves.
    """
    gen = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=gen)
    states = torch.randn(tokens, hidden, generator=gen) / hidden**0.5
    chosen = torch.arange(tokens) * 7919 % vocab
    chosen[::3] = vocab - 1
    direction = weight[chosen]
    states = states + peak * direction / direction.square().sum(1, keepdim=True)
    offset = torch.randn(vocab, generator=gen) if bias else None
    leaves = [states, weight, offset]
    return tuple(None if x is None else x.to(device, dtype).requires_grad_() for x in leaves)


def make_targets(
    count: int, tokens: int, vocab: int, device: str = "cpu", seed: int = 0, **over
) -> HDPOTargets:
    """Targets that repeat rows, oppose the two advantages' signs, and hold zeros of both.

    old_logprob is far below, near or above what a policy may say, so every clip is met.
    """
    gen = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(count, generator=gen)

    acc, tool = normal(), normal()
    acc[::5] = 0
    tool[::3] = 0
    label = torch.randint(0, vocab, (count,), generator=gen)
    label[::2] = vocab - 1
    fields = {
        "row": torch.randint(0, max(tokens, 1), (count,), generator=gen),
        "label": label,
        "old_logprob": -3 * torch.rand(count, generator=gen),
        "acc_advantage": acc,
        "tool_advantage": tool,
        "n_acc": 2 * count,
        "n_tool": count,
        "ref_logprob": -3 * torch.rand(count, generator=gen),
        "is_weight": torch.rand(count, generator=gen) + 0.5,
        "sequence": torch.arange(count) // 4,
    } | over
    return HDPOTargets(
        **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in fields.items()}
    )


def near_old(targets: HDPOTargets, logprob: Tensor) -> HDPOTargets:
    """The same targets with old and ref logprobs such that ratios fall on both sides of each clip.

    Far from its edges, though: there, rounding alone decides whether a token has a gradient at all,
    in plain torch as much as in the operator. Four tokens in a row (one response of `make_targets`)
    share a ratio, so the mean over a response is as far from the edges.
    """
    steps = torch.tensor([0.05, -0.5, 0.7, -0.05, 1.7, -0.9])
    of_token = steps[torch.arange(logprob.numel()) // 4 % len(steps)].to(logprob)
    wide = torch.promote_types(logprob.dtype, torch.float32)
    old, ref = ((logprob.detach() - x).to(wide) for x in (of_token, of_token.flip(0)))
    return replace(targets, old_logprob=old, ref_logprob=ref)


CONFIGS = {
    "default": HDPOConfig(),
    "no dual clip": HDPOConfig(dual_clip=None),
    "temperature": HDPOConfig(temperature=0.7),
    "softcap": HDPOConfig(softcap=5.0),
    "kl": HDPOConfig(kl_coef=0.3),
    "entropy": HDPOConfig(entropy_coef=0.3),
    "everything": HDPOConfig(
        w_tool=0.8, dual_clip=1.5, kl_coef=0.2, entropy_coef=0.2, temperature=1.4, softcap=8.0
    ),
    "sequence": HDPOConfig(ratio="sequence", kl_coef=0.2, entropy_coef=0.2, temperature=0.7),
}


def hdpo_problem(
    tokens=23, hidden=32, vocab=127, count=41, dtype=torch.float32, device="cpu", **options
):
    """(hidden, weight, bias, targets) with ratios on both sides of every clip."""
    config = options.pop("config", HDPOConfig())
    h, w, b = make_head(tokens, hidden, vocab, dtype, device, bias=options.pop("bias", False))
    targets = make_targets(count, tokens, vocab, device, **options)
    with torch.no_grad():
        every = replace(config, kl_coef=1.0, ratio="token")
        _, stats = linear_hdpo_ref(h, w, targets, every, bias=b)
    return h, w, b, near_old(targets, stats.logprob)


def grads(loss, *inputs, upstream=-1.3):
    inputs = [x for x in inputs if x is not None]
    up = torch.tensor(upstream, dtype=loss.dtype, device=loss.device)
    return torch.autograd.grad(loss, inputs, up)
