"""The row pass in C++: what "auto" takes on a CPU.

csrc/ has the code; this file hands it memory. A row of logits is read from memory once, its second
pass finds it in the cache; rows are shared out among torch's own threads. The matrix products stay
with torch.

Legend: C rows of a chunk, V vocabulary. A leaf: it imports torch, _rows and hdpo's helpers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis_kernels._rows import Given, HDPOCoefficient, Head, RowPass
from metis_kernels.hdpo import inverse_count

try:
    from metis_kernels import _C
except ImportError as error:
    _C = None
    _MISSING = str(error)

DTYPES = (torch.float32, torch.bfloat16)
ISA = ""
"""The instruction set to use; empty: the fastest of `instruction_sets`."""


def unavailable(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why the C++ paths cannot run for tensors of this kind, or None."""
    if _C is None:
        return (
            "the extension is not there (METIS_KERNELS_NO_EXT=1, or not built since): "
            f"{_MISSING}; pip install -e . builds it"
        )
    if device.type != "cpu":
        return f"it computes on the CPU, not on {device.type}"
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(_name(d) for d in DTYPES)
        return f"it computes in fp32, for {names}; got {_name(dtype)}"
    return None


def instruction_sets() -> tuple[str, ...]:
    """Those that this processor runs and that were compiled, the fastest first."""
    return tuple(_C.instruction_sets())


def run(
    logits: Tensor,
    target: Tensor,
    label: Tensor,
    head: Head,
    coefficient: Given | HDPOCoefficient | None,
    mark: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    logprob, entropy = (torch.empty_like(target) for _ in range(2))
    given = hdpo = None
    keep = ()  # what a view points to lives until the call is over
    if isinstance(coefficient, Given):
        keep = (coefficient.logprob_grad.contiguous(), _dense(coefficient.entropy_grad))
        given = _given(*keep)
    elif coefficient is not None:
        hdpo, keep = _hdpo(coefficient, target)
    label = label.contiguous()
    _C.row_pass(
        *_views(logits=logits, target=target, label=label, logprob=logprob, entropy=entropy),
        _head(head), given, hdpo, _live(mark), _runtime(),
    )  # fmt: skip
    del keep
    return logprob, entropy


def statistics(
    logits: Tensor, target: Tensor, label: Tensor, head: Head
) -> tuple[Tensor, Tensor, Tensor]:
    peak, total, moment = (torch.empty_like(target) for _ in range(3))
    label = label.contiguous()
    _C.row_statistics(
        *_views(
            logits=logits, target=target, label=label, peak=peak, total=total, moment=moment
        ),
        _head(head), _runtime(),
    )  # fmt: skip
    return peak, total, moment


def gradient(
    logits: Tensor,
    target: Tensor,
    label: Tensor,
    head: Head,
    peak: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    alive: Tensor,
    g: Tensor,
    h: Tensor | None,
    mark: tuple[Tensor, float] | None = None,
    out: Tensor | None = None,
) -> None:
    """out: where d(logits) go, if not over the logits."""
    out = logits if out is None else out
    label, g, h = label.contiguous(), g.contiguous(), _dense(h)
    _C.row_gradient(
        *_views(
            logits=logits, d_logits=out, target=target, label=label, peak=peak,
            log_total=log_total, entropy=entropy, alive=alive,
        ),
        _given(g, h), _head(head), _live(mark), _runtime(),
    )  # fmt: skip


ROW_PASS = RowPass(run, statistics, gradient, copies=0)


# ---- memory --------------------------------------------------------------------------------------


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _view(name: str, x: Tensor | None):
    """What C++ sees of a tensor, which the caller keeps alive."""
    if x is None:
        return None
    return _C.Tensor(name, x.data_ptr(), _name(x.dtype), x.shape, x.stride())


def _views(**named: Tensor) -> list:
    return [_view(name, x) for name, x in named.items()]


def _head(head: Head):
    return _C.HeadOptions(head.temperature, head.softcap or 0.0)


def _given(g: Tensor, h: Tensor | None):
    return _C.Given(_view("logprob_grad", g), _view("entropy_grad", h))


def _live(mark: tuple[Tensor, float] | None):
    return None if mark is None else _C.Live(_view("live", mark[0]), mark[1])


def _runtime():
    return _C.Runtime(torch.get_num_threads(), ISA)


def _hdpo(coefficient: HDPOCoefficient, like: Tensor) -> tuple:
    """(inputs of the HDPO loss, the tensors that they are views of)."""
    t, c = coefficient.targets, coefficient.config
    ref = t.ref_logprob if c.kl_coef > 0 else None
    named = dict(old_logprob=t.old_logprob, acc_advantage=t.acc_advantage)
    named |= dict(tool_advantage=t.tool_advantage, ref_logprob=ref, is_weight=t.is_weight)
    named = {n: None if x is None else x.to(torch.float32).contiguous() for n, x in named.items()}
    scale_acc, scale_tool = (float(inverse_count(n, like)) for n in (t.n_acc, t.n_tool))
    dual_clip = float("inf") if c.dual_clip is None else c.dual_clip
    options = _C.HDPOOptions(
        c.w_acc * scale_acc, c.w_tool * scale_tool, c.clip_low, c.clip_high, dual_clip,
        c.kl_coef * scale_acc, c.entropy_coef * scale_acc,
    )  # fmt: skip
    return _C.HDPOInputs(*_views(**named), options), tuple(named.values())
