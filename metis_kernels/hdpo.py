"""The HDPO loss on logprobs, in plain torch: the specification that every faster path answers to.

Hierarchical Decoupled Policy Optimization, arXiv 2604.08545, as DESIGN states it:

    rho_t   = exp(logp_t - old_logp_t)                     per token, or one per response (GSPO)
    S(A)_t  = min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)
              and, where A < 0,  max(S, dual_clip A)
    L       = - w_acc / n_acc   sum_t S(A_acc)_t
              - w_tool / n_tool sum_t S(A_tool)_t
              + kl_coef / n_acc sum_t k3(logp_t || ref_t) - entropy_coef / n_acc sum_t H_t

Legend: S tokens that carry loss, T packed rows of hidden states, H hidden, V vocabulary,
N rollouts. A leaf: it imports torch and nothing of this package.

Conventions, where the mathematics leaves a choice:

- The edge of a clip range belongs to the unclipped side: at rho == 1 - clip_low, 1 + clip_high or
  dual_clip exactly, the gradient is whole, never a half.
- Every mean is global. KL and entropy are divided by n_acc, as the accuracy channel is, so that
  they do not depend on how the batch was cut either.
- is_weight multiplies the two surrogates, not the KL term and not the entropy.
- A token whose both advantages are zero carries no loss while kl_coef = entropy_coef = 0. It is in
  no sum, no count and no statistic: it need not be computed.
- A token that carries loss and has a non-finite input (its logprob, say) is left out of the loss,
  of the gradient and of the statistics, and counted in n_nonfinite. The caller decides what a step
  with n_nonfinite > 0 is worth.
- The exponent of a ratio stops at 60 (e^60 = 1e26, still far from fp32's limit): beyond it the
  ratio is constant, so that no infinity meets a zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_EXP_LIMIT = 60.0
_ROWWISE = (
    "row",
    "label",
    "old_logprob",
    "acc_advantage",
    "tool_advantage",
    "ref_logprob",
    "is_weight",
    "sequence",
)


@dataclass(frozen=True)
class HDPOConfig:
    """What the loss is. Raises ValueError for a value outside its limits."""

    w_acc: float = 1.0
    """Weight of the accuracy channel, >= 0."""
    w_tool: float = 0.15
    """Weight of the tool channel, >= 0."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low; 0 <= clip_low <= 1."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high; >= 0."""
    dual_clip: float | None = 3.0
    """Bound of the ratio under a negative advantage, > 1; None switches it off."""
    tool_norm: Literal["signal", "qualifying", "all"] = "signal"
    """Whose tokens n_tool counts: rollouts with a non-zero tool advantage, those in Q, or all."""
    ratio: Literal["token", "sequence"] = "token"
    """One importance ratio per token, or the geometric mean over each response (GSPO)."""
    kl_coef: float = 0.0
    """Weight of the k3 estimate of KL(policy || reference), >= 0."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, >= 0."""
    temperature: float = 1.0
    """Logits are divided by it before the softmax, > 0. `hdpo_loss` never sees logits, so only
    the operators that do apply it."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap) before the temperature, > 0; None: as is."""
    logits_dtype: torch.dtype | None = None
    """dtype that logits are kept in: None (that of hidden) or torch.float32."""

    def __post_init__(self) -> None:
        for name in ("w_acc", "w_tool", "clip_low", "clip_high", "kl_coef", "entropy_coef"):
            _require(self, name, "a finite number >= 0", lambda x: 0 <= x < math.inf)
        _require(self, "clip_low", "at most 1 (the ratio is positive)", lambda x: x <= 1)
        _require(self, "temperature", "a finite number > 0", lambda x: 0 < x < math.inf)
        for name, limit in (("dual_clip", 1), ("softcap", 0)):
            if getattr(self, name) is not None:
                _require(
                    self,
                    name,
                    f"a finite number > {limit}, or None to switch it off",
                    lambda x, limit=limit: limit < x < math.inf,
                )
        for name, choices in (
            ("tool_norm", ("signal", "qualifying", "all")),
            ("ratio", ("token", "sequence")),
            ("logits_dtype", (None, torch.float32)),
        ):
            _require(self, name, f"one of {choices}", lambda x, c=choices: x in c)


def _require(config: HDPOConfig, name: str, limit: str, holds) -> None:
    value = getattr(config, name)
    try:
        fine = holds(value)
    except TypeError:
        fine = False
    if not fine:
        raise ValueError(f"HDPOConfig.{name} must be {limit}, got {value!r}; set {name} so")


@dataclass(frozen=True)
class HDPOTargets:
    """Which tokens carry loss, and what each of them is told.

    Two rollouts of one prompt, "the cat" -> "sat" and "the cat" -> "ran off", packed with their
    prompt stored once (rows 0, 1), the first response (row 2), the second (rows 3, 4):

        row            [1, 1, 3]         the row that predicts the token; the last prefix row twice
        label          [sat, ran, off]
        acc_advantage  [0.7, -0.7, -0.7]
        sequence       [0, 1, 1]

    Every field is [S] unless said otherwise; `hdpo_loss` alone takes [B, T] too. No tensor here
    receives a gradient. Tokens of a rollout that could not be scored do not belong in it.
    """

    row: Tensor | None
    """Integer row of hidden [T, H] that predicts the token. May repeat. None: row s is token s."""
    label: Tensor | None
    """Integer token id in [0, V). `hdpo_loss` does not need it."""
    old_logprob: Tensor | None
    """Logprob under the policy that sampled. None: on-policy, the ratio is exactly 1."""
    acc_advantage: Tensor
    """Accuracy advantage of the token's rollout."""
    tool_advantage: Tensor
    """Tool advantage of the token's rollout."""
    n_acc: Tensor | float
    """Denominator of the accuracy channel, KL and entropy: the policy's tokens in the whole
    optimizer batch (all micro-batches, all ranks). A number or a 0-d tensor; 0 switches off."""
    n_tool: Tensor | float
    """Denominator of the tool channel, likewise (see `hdpo_normalizers`)."""
    ref_logprob: Tensor | None = None
    """Logprob under the reference policy; needed where kl_coef > 0."""
    is_weight: Tensor | None = None
    """Truncated importance weight (trainer against sampler), a constant."""
    sequence: Tensor | None = None
    """Any integer that tells apart which response the token is of; needed by ratio="sequence". In
    [B, T] form the default is the batch row."""
    _live: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def validate(
        self,
        tokens: int | None = None,
        vocab: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Raises ValueError where fields disagree in shape, dtype, device or range.

        Ranges (row < tokens, label < vocab, finite counts) are looked at on the CPU only: on a GPU
        that look would be a synchronisation. There an index out of range meets the bounds assertion
        of torch's own indexing kernels.
        """
        shape = tuple(self.acc_advantage.shape)
        device = self.acc_advantage.device if device is None else device
        for name in _ROWWISE:
            value = getattr(self, name)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"expected {name} {list(shape)} as acc_advantage is, got {list(value.shape)}"
                )
            if value.device != device:
                raise ValueError(f"expected {name} on {device}, got {value.device}")
            integer = not (value.is_floating_point() or value.is_complex())
            integer = integer and value.dtype != torch.bool
            wants_integer = name in ("row", "label", "sequence")
            if integer != wants_integer:
                wanted = "an integer dtype" if wants_integer else "a floating dtype"
                raise ValueError(f"expected {name} in {wanted}, got {value.dtype}")
        check_range("row", self.row, tokens, "rows of hidden")
        check_range("label", self.label, vocab, "entries of the vocabulary")
        for name in ("n_acc", "n_tool"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if value.dim() != 0:
                    raise ValueError(f"expected {name} 0-d, got {list(value.shape)}")
                if value.is_cuda or torch.compiler.is_compiling():
                    continue
            if not 0 <= float(value) < math.inf:
                raise ValueError(f"{name} must be a finite count >= 0, got {float(value)}")

    def take(self, index: Tensor) -> HDPOTargets:
        """The tokens at index [K] (integers), in that order, with the same n_acc and n_tool."""
        picked = {n: getattr(self, n) for n in _ROWWISE if getattr(self, n) is not None}
        return replace(self, **{n: v.index_select(0, index) for n, v in picked.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> HDPOTargets:
        """The same targets on another device.

        Leaving the CPU, it first notes there which tokens carry loss, so that the operators need
        not ask the GPU (a synchronisation) how many they are.
        """
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
            if f.init and isinstance(getattr(self, f.name), Tensor)
        }
        there = replace(self, **moved)
        live = self._live
        if live is None and self.acc_advantage.device.type == "cpu":
            live = _has_signal(self).flatten().nonzero().flatten()
        if live is not None:
            object.__setattr__(there, "_live", live.to(device, non_blocking=non_blocking))
        return there

    def live_mask(self, config: HDPOConfig) -> Tensor:
        """Bool [S]: the tokens whose loss or gradient can differ from zero under config."""
        if config.kl_coef > 0 or config.entropy_coef > 0:
            return torch.ones_like(self.acc_advantage, dtype=torch.bool)
        live = _has_signal(self)
        if config.ratio == "sequence":
            # A token without advantage still takes part in the mean ratio of its response.
            ids = _sequence_ids(self, live.shape)
            hits = index_sum(live.numel(), ids, live.flatten().double())
            live = (hits > 0)[ids].view(live.shape)
        return live

    def live_index(self, config: HDPOConfig) -> Tensor:
        """int64 [K]: where `live_mask` holds. One synchronisation on a GPU, none where the
        targets came there through `to`."""
        known = self.known_live(config)
        return self.live_mask(config).nonzero().flatten() if known is None else known

    def known_live(self, config: HDPOConfig) -> Tensor | None:
        """What `live_index` gives, where `to` has found it out already."""
        simple = config.kl_coef == 0 and config.entropy_coef == 0 and config.ratio == "token"
        return self._live if simple else None


@dataclass(frozen=True)
class HDPOStats:
    """What one call saw. Detached tensors on the device of the loss; none is synchronised.

    "Carries loss" is `HDPOTargets.live_mask`; "counted" is: carries loss and is finite.
    """

    logprob: Tensor
    """[S] logprob of each token. NaN where a fused operator did not compute the token because it
    carries no loss: a zero there would read as certainty."""
    entropy: Tensor | None
    """[S] entropy in nats, NaN as above; None where `hdpo_loss` was given none."""
    loss_acc: Tensor
    """0-d: -1 / n_acc * sum S(A_acc), before w_acc."""
    loss_tool: Tensor
    """0-d: -1 / n_tool * sum S(A_tool), before w_tool."""
    clip_fraction_acc: Tensor
    """0-d: of the counted tokens with A_acc != 0, the share whose S(A_acc) is clipped (by either
    bound or the dual clip) and so has no gradient. 0 where there is no such token."""
    clip_fraction_tool: Tensor
    """0-d: the same for A_tool."""
    approx_kl: Tensor
    """0-d: mean over the counted tokens of rho - 1 - log rho, the k3 estimate of KL(old || new),
    with the ratio that the loss used. 0 where no token counts."""
    ratio_max: Tensor
    """0-d: largest ratio of the counted tokens; 0 where no token counts."""
    n_active: Tensor
    """0-d int64: tokens that carry loss."""
    n_nonfinite: Tensor
    """0-d int64: of those, the ones left out because an input was NaN or infinite."""


class _Clean(NamedTuple):
    """Per-token inputs with zeros where a token does not count (see the module's conventions)."""

    logprob: Tensor
    old: Tensor
    acc: Tensor
    tool: Tensor
    ref: Tensor | None
    is_weight: Tensor | None
    entropy: Tensor | None
    live: Tensor
    counted: Tensor


def hdpo_loss_ref(
    logprob: Tensor,
    targets: HDPOTargets,
    config: HDPOConfig,
    entropy: Tensor | None = None,
) -> Tensor:
    """The equation as it is printed: float64, min and max, a loop over responses. logprob [S].

    Finite inputs only. Differentiable in logprob and entropy.
    """
    logp = logprob.double()
    old = logp.detach() if targets.old_logprob is None else targets.old_logprob.double()
    log_ratio = logp - old
    if config.ratio == "sequence":
        means = {int(i): log_ratio[targets.sequence == i].mean() for i in targets.sequence}
        log_ratio = torch.stack([means[int(i)] for i in targets.sequence] or [logp.sum()])
        log_ratio = log_ratio[: logp.numel()]
    rho = log_ratio.exp()
    clipped = rho.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = logp.new_zeros(())
    for advantage, weight, n in (
        (targets.acc_advantage.double(), config.w_acc, float(targets.n_acc)),
        (targets.tool_advantage.double(), config.w_tool, float(targets.n_tool)),
    ):
        surrogate = torch.minimum(rho * advantage, clipped * advantage)
        if config.dual_clip is not None:
            bound = torch.maximum(surrogate, config.dual_clip * advantage)
            surrogate = torch.where(advantage < 0, bound, surrogate)
        if targets.is_weight is not None:
            surrogate = surrogate * targets.is_weight.double()
        loss = loss - (weight / n * surrogate.sum() if n > 0 else 0 * logp.sum())
    if float(targets.n_acc) > 0:
        if config.kl_coef > 0:
            gap = targets.ref_logprob.double() - logp
            loss = loss + config.kl_coef / float(targets.n_acc) * (gap.exp() - gap - 1).sum()
        if config.entropy_coef > 0:
            loss = loss - config.entropy_coef / float(targets.n_acc) * entropy.double().sum()
    return loss


def hdpo_loss(
    logprob: Tensor,
    targets: HDPOTargets,
    config: HDPOConfig,
    entropy: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> tuple[Tensor, HDPOStats]:
    """The HDPO loss on logprobs, on any device, differentiable in logprob and entropy.

    logprob [S], or [B, T] with mask [B, T] (bool: the tokens that the policy wrote), any floating
    dtype; fp16 and bf16 are computed in fp32. In [B, T] form the fields of targets are [B, T], or
    [B, 1] where one value holds for a response. Returns the loss (0-d) and `HDPOStats`.
    A count n_acc or n_tool of 0 makes its channel exactly 0, loss and gradient.
    Raises ValueError where shapes, dtypes or devices disagree, or a needed input is missing.
    """
    clean = _clean(logprob, targets, config, entropy, mask)
    log_ratio = _log_ratio(clean, targets, config)
    ratio = log_ratio.clamp_max(_EXP_LIMIT).exp()
    scale_acc = inverse_count(targets.n_acc, clean.logprob)
    scale_tool = inverse_count(targets.n_tool, clean.logprob)
    channels = []
    for advantage, scale in ((clean.acc, scale_acc), (clean.tool, scale_tool)):
        surrogate = _bounded(ratio, advantage, config) * advantage
        if clean.is_weight is not None:
            surrogate = surrogate * clean.is_weight
        channels.append(-surrogate.sum() * scale)
    loss = config.w_acc * channels[0] + config.w_tool * channels[1]
    if config.kl_coef > 0:
        gap = (clean.ref - clean.logprob).clamp_max(_EXP_LIMIT)
        loss = loss + config.kl_coef * scale_acc * (gap.exp() - gap - 1).sum()
    if config.entropy_coef > 0:
        loss = loss - config.entropy_coef * scale_acc * clean.entropy.sum()
    with torch.no_grad():
        stats = _statistics(logprob, entropy, clean, log_ratio, ratio, channels, config)
    return loss, stats


@torch.no_grad()
def hdpo_coefficient(
    logprob: Tensor,
    targets: HDPOTargets,
    config: HDPOConfig,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `hdpo_loss` in closed form: dL/dlogprob [S] and, or None, dL/dentropy [S].

    With u = 1 where a surrogate is unclipped,

        dL/dlogp_t = - rho_t is_t (w_acc / n_acc A_acc u_acc + w_tool / n_tool A_tool u_tool)
                     + kl_coef / n_acc (1 - exp(ref_t - logp_t))

    and under ratio="sequence" the first term is averaged over the response, because the mean over a
    response is its own adjoint. This is what lets a fused operator form d(logits) while a row of
    logits is still at hand. Shapes, dtypes and errors as in `hdpo_loss`; 1-D only.
    """
    clean = _clean(logprob, targets, config, entropy, None)
    log_ratio = _log_ratio(clean, targets, config)
    ratio = log_ratio.clamp_max(_EXP_LIMIT).exp()
    scale_acc = inverse_count(targets.n_acc, clean.logprob)
    gradient = torch.zeros_like(clean.logprob)
    for advantage, weight, scale in (
        (clean.acc, config.w_acc, scale_acc),
        (clean.tool, config.w_tool, inverse_count(targets.n_tool, clean.logprob)),
    ):
        pull = advantage * _unclipped(ratio, advantage, config)
        if clean.is_weight is not None:
            pull = pull * clean.is_weight
        gradient -= pull * (weight * scale)
    gradient *= torch.where(log_ratio <= _EXP_LIMIT, ratio, 0)
    if config.ratio == "sequence":
        gradient = _sequence_mean(gradient, clean.counted, targets)
    if config.kl_coef > 0:
        gap = clean.ref - clean.logprob
        slope = torch.where(gap <= _EXP_LIMIT, -torch.expm1(gap.clamp_max(_EXP_LIMIT)), 0)
        gradient += config.kl_coef * scale_acc * slope
    gradient = torch.where(clean.counted, gradient, 0)
    if config.entropy_coef == 0:
        return gradient, None
    per_token = -config.entropy_coef * scale_acc
    return gradient, torch.where(clean.counted, per_token, 0).to(gradient.dtype)


def index_sum(size: int, index: Tensor, values: Tensor) -> Tensor:
    """[size]: the sums of values [K] that share an index [K]; the same bits at every run."""
    zeros = values.new_zeros(size)
    if values.is_cuda:
        # index_add adds with atomics there, in any order; index_put sorts first.
        return zeros.index_put((index,), values, accumulate=True)
    return zeros.index_add(0, index, values)


def check_range(name: str, index: Tensor | None, limit: int | None, of: str) -> None:
    """Raises ValueError where index, on the CPU, leaves [0, limit). Elsewhere, and in a function
    that is being compiled, it says nothing."""
    if index is None or limit is None or torch.compiler.is_compiling():
        return
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = index.aminmax()
    if low < 0 or high >= limit:
        raise ValueError(
            f"expected {name} in [0, {limit}) ({limit} {of}), got {int(low)} to {int(high)}"
        )


def _has_signal(targets: HDPOTargets) -> Tensor:
    # NaN != 0 holds, so a broken advantage is computed, met and reported.
    return (targets.acc_advantage != 0) | (targets.tool_advantage != 0)


def _clean(
    logprob: Tensor,
    targets: HDPOTargets,
    config: HDPOConfig,
    entropy: Tensor | None,
    mask: Tensor | None,
) -> _Clean:
    if not logprob.is_floating_point():
        raise ValueError(f"expected logprob in a floating dtype, got {logprob.dtype}")
    if config.kl_coef > 0 and targets.ref_logprob is None:
        raise ValueError(f"kl_coef is {config.kl_coef}, so targets.ref_logprob is needed, got None")
    if config.entropy_coef > 0 and entropy is None:
        raise ValueError(f"entropy_coef is {config.entropy_coef}, so entropy is needed, got None")
    targets = _shaped_as(targets, logprob)
    targets.validate(device=logprob.device)
    for name, value in (("entropy", entropy), ("mask", mask)):
        if value is not None and value.shape != logprob.shape:
            raise ValueError(
                f"expected {name} {list(logprob.shape)} as logprob is, got {list(value.shape)}"
            )
    live = targets.live_mask(config)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"expected mask in torch.bool, got {mask.dtype}")
        live = live & mask
    work = torch.promote_types(logprob.dtype, torch.float32)
    used = [logprob, targets.old_logprob, targets.acc_advantage, targets.tool_advantage]
    used.append(targets.ref_logprob if config.kl_coef > 0 else None)
    used.append(targets.is_weight)
    used.append(entropy if config.entropy_coef > 0 else None)
    finite = torch.ones_like(live)
    for value in used:
        if value is not None:
            finite = finite & torch.isfinite(value)
    counted = live & finite
    kept = [None if v is None else torch.where(counted, v.to(work), 0) for v in used]
    constant = [None if v is None else v.detach() for v in kept]
    old = kept[0].detach() if kept[1] is None else constant[1]
    return _Clean(kept[0], old, *constant[2:6], kept[6], live, counted)


def _shaped_as(targets: HDPOTargets, logprob: Tensor) -> HDPOTargets:
    """targets with [B, 1] fields widened to a logprob of [B, T]; ValueError where one cannot be."""
    wide = {}
    for name in _ROWWISE:
        value = getattr(targets, name)
        if value is None or value.shape == logprob.shape:
            continue
        per_row = logprob.dim() == 2 and tuple(value.shape) == (logprob.shape[0], 1)
        if not per_row:
            raise ValueError(
                f"expected {name} {list(logprob.shape)} as logprob is, got {list(value.shape)}"
            )
        wide[name] = value.expand(logprob.shape)
    return replace(targets, **wide) if wide else targets


def _sequence_ids(targets: HDPOTargets, shape: torch.Size) -> Tensor:
    """[S]: the response of each token (flattened), numbered from 0 up; fewer than S of them."""
    name = targets.sequence
    if name is None and len(shape) == 2:
        rows = torch.arange(shape[0], device=targets.acc_advantage.device)
        name = rows.unsqueeze(1).expand(shape)
    if name is None:
        raise ValueError('ratio is "sequence", so targets.sequence [S] is needed, got None')
    by_name, order = name.flatten().sort(stable=True)
    number = torch.zeros_like(order)
    number[1:] = (by_name[1:] != by_name[:-1]).cumsum(0)
    return torch.empty_like(order).index_copy(0, order, number)


def _sequence_mean(values: Tensor, counted: Tensor, targets: HDPOTargets) -> Tensor:
    """Each token's value replaced by the mean over the counted tokens of its response."""
    ids = _sequence_ids(targets, values.shape)
    size = values.numel()  # bounds how many responses there are; to ask would synchronise
    total = index_sum(size, ids, torch.where(counted, values, 0).flatten())
    count = index_sum(size, ids, counted.flatten().to(values.dtype))
    mean = (total / count.clamp_min(1))[ids].view(values.shape)
    return torch.where(counted, mean, 0)


def _log_ratio(clean: _Clean, targets: HDPOTargets, config: HDPOConfig) -> Tensor:
    log_ratio = clean.logprob - clean.old
    if config.ratio == "sequence":
        log_ratio = _sequence_mean(log_ratio, clean.counted, targets)
    return log_ratio


def _bounds(config: HDPOConfig) -> tuple[float, float, float]:
    return 1 - config.clip_low, 1 + config.clip_high, config.dual_clip or math.inf


def _bounded(ratio: Tensor, advantage: Tensor, config: HDPOConfig) -> Tensor:
    """The ratio r with S(A) = r A: A > 0 bounds it above; A < 0 below, and above by dual_clip.

    It is the printed min and max with A divided out, and unlike them has no tie to share out.
    """
    low, high, dual = _bounds(config)
    return torch.where(advantage > 0, ratio.clamp_max(high), ratio.clamp(low, dual))


def _unclipped(ratio: Tensor, advantage: Tensor, config: HDPOConfig) -> Tensor:
    low, high, dual = _bounds(config)
    return torch.where(advantage > 0, ratio <= high, (low <= ratio) & (ratio <= dual))


def as_count(count: Tensor | float, device: torch.device) -> Tensor:
    """A count as a 0-d float64 tensor, without waiting for the device."""
    if isinstance(count, Tensor):
        return count.detach().to(device, torch.float64)
    return torch.full((), count, dtype=torch.float64, device=device)


def inverse_count(count: Tensor | float, like: Tensor) -> Tensor:
    """1 / count, and 0 for a count of 0, as a 0-d tensor that no one waits for."""
    if not isinstance(count, Tensor):
        return torch.full((), 1 / count if count else 0.0, dtype=like.dtype, device=like.device)
    count = count.detach().to(device=like.device, dtype=torch.float64)
    return torch.where(count > 0, count, math.inf).reciprocal().to(like.dtype)


def _statistics(
    logprob: Tensor,
    entropy: Tensor | None,
    clean: _Clean,
    log_ratio: Tensor,
    ratio: Tensor,
    channels: list[Tensor],
    config: HDPOConfig,
) -> HDPOStats:
    def share(advantage: Tensor) -> Tensor:
        signal = clean.counted & (advantage != 0)
        clipped = signal & ~_unclipped(ratio, advantage, config)
        return clipped.sum() / signal.sum().clamp_min(1)

    n_active = clean.live.sum()
    n_counted = clean.counted.sum()
    exponent = log_ratio.clamp_max(_EXP_LIMIT)
    gap = torch.where(clean.counted, torch.expm1(exponent) - exponent, 0)
    peak = torch.where(clean.counted, ratio, 0).flatten()
    return HDPOStats(
        logprob=logprob.detach(),
        entropy=None if entropy is None else entropy.detach(),
        loss_acc=channels[0].detach(),
        loss_tool=channels[1].detach(),
        clip_fraction_acc=share(clean.acc),
        clip_fraction_tool=share(clean.tool),
        approx_kl=gap.sum() / n_counted.clamp_min(1),
        ratio_max=torch.cat([peak, peak.new_zeros(1)]).amax(),
        n_active=n_active,
        n_nonfinite=n_active - n_counted,
    )
