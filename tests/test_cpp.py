"""_cpp.py and csrc/: every instruction set against torch in float64, and everything that could make
native code read or write where it must not."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerance import CONFIGS, assert_as_good_as_torch, hdpo_problem

from metis_kernels import _cpp, _impl, _torch, linear_hdpo_loss, status
from metis_kernels._rows import Given, HDPOCoefficient, Head

CPU = torch.device("cpu")
if _cpp.unavailable(CPU) is not None:
    pytest.skip(_cpp.unavailable(CPU), allow_module_level=True)

BITS32, BITS16 = torch.float32, torch.bfloat16
EDGES = (1, 2, 15, 16, 17, 63, 64, 65, 127, 2047, 2048, 2049, 4096, 6149)
"""Vocabularies around the width of a vector, of an unrolled step and of a block."""


@pytest.fixture(params=_cpp.instruction_sets())
def isa(request, monkeypatch):
    monkeypatch.setattr(_cpp, "ISA", request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def chunk(count, vocab, dtype=BITS32, peak=12.0, seed=0):
    """(logits, target, label), the logits in the middle of memory that nobody may touch."""
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocab, generator=gen)
    label = torch.randint(0, vocab, (count,), generator=gen)
    label[::2] = vocab - 1
    logits[torch.arange(count), label] += peak
    target = logits.gather(1, label.unsqueeze(1)).squeeze(1)
    guarded = torch.full((count + 2, vocab), 7.0, dtype=dtype)
    guarded[1:-1] = logits.to(dtype)
    return guarded[1:-1], target, label


def untouched(logits: torch.Tensor) -> bool:
    """Whether the memory before and behind a chunk is as `chunk` left it."""
    count, vocab = logits.shape
    whole = logits.as_strided((count + 2, vocab), (vocab, 1), logits.storage_offset() - vocab)
    return bool((whole[[0, -1]] == 7).all())


def head(vocab, temperature=1.0, softcap=None):
    return Head(torch.empty(vocab, 1), temperature=temperature, softcap=softcap)


def slopes(count, entropy=True):
    gen = torch.Generator().manual_seed(1)
    g, h = (torch.randn(count, generator=gen) for _ in range(2))
    return Given(g, h if entropy else None)


def in_dtype(pass_, logits, target, label, options, coefficient, dtype):
    """(logprob, entropy, d_logits) of a row pass in dtype, on copies."""
    wide = None if coefficient is None else [
        None if x is None else x.to(torch.promote_types(dtype, BITS32))
        for x in (coefficient.logprob_grad, coefficient.entropy_grad)
    ]  # fmt: skip
    logits = logits.clone().to(dtype)
    target = target.to(torch.promote_types(dtype, BITS32))
    outputs = pass_.run(logits, target, label, options, wide and Given(*wide))
    return *outputs, logits


@pytest.mark.parametrize("softcap, temperature", [(None, 1.0), (None, 0.7), (8.0, 1.3)])
@pytest.mark.parametrize("vocab", EDGES)
def test_every_instruction_set_at_every_edge(isa, vocab, softcap, temperature):
    options = head(vocab, temperature, softcap)
    for dtype, entropy in itertools.product((BITS32, BITS16), (False, True)):
        # Of two columns, one that stands out by 12 leaves a gradient below fp32's rounding of g.
        logits, target, label = chunk(40, vocab, dtype, peak=6.0 if vocab == 2 else 12.0)
        given = (logits, target, label, options, slopes(40, entropy))
        exact = in_dtype(_torch.ROW_PASS, *given, torch.float64)
        plain = in_dtype(_torch.ROW_PASS, *given, dtype)
        logprob, entropies = _cpp.run(logits, target, label, options, slopes(40, entropy))
        assert (logprob <= 0).all() and untouched(logits)
        for got, p, t in zip((logprob, entropies, logits), plain, exact, strict=True):
            assert_as_good_as_torch(got, p, t, 2.0, f"{dtype}")


def test_bf16_is_rounded_once_and_to_even(isa):
    logits, target, label = chunk(9, 3001, BITS16)
    wide = logits.float()
    for z in (logits, wide):
        _cpp.run(z, target, label, head(3001), slopes(9))
    assert torch.equal(logits, wide.bfloat16())


def test_the_halves_are_the_whole(isa):
    logits, target, label = chunk(9, 3001)
    options, given = head(3001, 0.9), slopes(9)
    peak, total, moment = _cpp.statistics(logits, target, label, options)
    whole = logits.clone()
    logprob, entropy = _cpp.run(whole, target, label, options, given)
    log_total = total.log()
    torch.testing.assert_close(target / 0.9 - peak - log_total, logprob, atol=2e-6, rtol=0)
    torch.testing.assert_close(log_total - moment / total, entropy, atol=2e-6, rtol=1e-5)
    alive, out = torch.arange(9) != 4, torch.full_like(logits, float("nan"))
    before = logits.clone()
    parts = (target, label, options, peak, log_total, entropy, alive)
    _cpp.gradient(logits, *parts, given.logprob_grad, given.entropy_grad, out=out)
    assert torch.equal(logits, before), "a gradient elsewhere leaves the logits alone"
    assert (out[4] == 0).all() and untouched(logits)
    torch.testing.assert_close(out[alive], whole[alive], atol=1e-6, rtol=1e-5)


def test_labels_of_other_ranks(isa):
    logits, target, label = chunk(4, 100)
    elsewhere = torch.tensor([-1, 100, 1 << 40, -(1 << 40)])
    peak, total, _ = _cpp.statistics(logits, target, elsewhere, head(100))
    exact = logits.double()
    torch.testing.assert_close(peak, exact.amax(1).float())
    torch.testing.assert_close(total.log() + peak, exact.logsumexp(1).float())
    given = slopes(4, entropy=False)
    parts = (target, elsewhere, head(100), peak, total.log(), peak, torch.ones(4).bool())
    _cpp.gradient(logits, *parts, given.logprob_grad, None)
    p = torch.softmax(exact, 1)
    torch.testing.assert_close(logits.double(), -given.logprob_grad[:, None] * p, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [BITS32, BITS16])
def test_threads_change_no_bit(name, dtype, threads):
    config = CONFIGS[name]
    h, w, b, targets = hdpo_problem(40, 32, 501, 64, dtype, bias=True, config=config)
    seen = []
    for count in (1, 2, 5):
        threads(count)
        loss, stats = linear_hdpo_loss(h, w, targets, config, bias=b, impl="cpp")
        seen.append((loss, stats.logprob.nan_to_num(1), stats.entropy.nan_to_num(1)))
    # The products are torch's, and may depend on the number of threads; the row pass does not.
    options = Head(w, temperature=config.temperature, softcap=config.softcap)
    logits, target, label = chunk(64, 501, dtype)
    rows = []
    for count in (1, 2, 5):
        threads(count)
        z = logits.clone()
        coefficient = HDPOCoefficient(targets, config)
        if config.ratio == "token":
            rows.append((*_cpp.run(z, target, label, options, coefficient), z))
    for first, *rest in zip(*rows, strict=True):
        assert all(torch.equal(first, x) for x in rest)
    for first, *rest in zip(*seen, strict=True):
        assert all(torch.allclose(first, x, atol=1e-5) for x in rest)


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("dtype", [BITS32, BITS16])
def test_rows_that_are_not_finite_stay_rows(isa, dtype, softcap):
    inf, nan = float("inf"), float("nan")
    logits, target, label = chunk(8, 2100, dtype)
    label[:] = 5
    logits[0, 2099], logits[1, 0], logits[2] = nan, inf, -inf
    logits[3, :2048] = -inf  # a whole block
    target[:] = 3.0
    target[2], target[4], target[5] = -inf, nan, inf
    clean, t, y = chunk(8, 2100, dtype)
    label[6:], target[6:] = y[6:], t[6:]
    alone = clean[6:].clone()
    same = _cpp.run(alone, t[6:], y[6:], head(2100, softcap=softcap), None)
    logprob, entropy = _cpp.run(logits, target, label, head(2100, softcap=softcap), slopes(8))
    broken = [0, 2, 4, 5] if softcap else [0, 1, 2, 4, 5]
    assert logprob[broken].isnan().all() and (logits[broken] == 0).all()
    whole = [3, 6, 7]
    assert logprob[whole].isfinite().all() and logits[whole].isfinite().all()
    assert (logits[3, :5] == 0).all() and untouched(logits)
    assert torch.equal(logprob[6:], same[0]) and torch.equal(entropy[6:], same[1])


def test_no_gradient_is_subnormal(isa):
    """A matrix product takes many times as long over such numbers, and over those that it makes
    of two that are not far from them."""
    logits = torch.linspace(-110, 0, 4000).repeat(3, 1)
    target, label = torch.zeros(3), torch.full((3,), 3999)
    given = Given(torch.tensor([1e-3, 1.0, -30.0]))
    _cpp.run(logits, target, label, head(4000), given)
    smallest = logits[logits != 0].abs().min()
    assert smallest >= 1e-35 and (logits[:, :100] == 0).all() and (logits[:, -1000:] != 0).all()


def test_nothing_to_do():
    logits, target, label = torch.empty(0, 9), torch.empty(0), torch.empty(0, dtype=torch.int64)
    logprob, entropy = _cpp.run(logits, target, label, head(9), slopes(0))
    assert logprob.shape == entropy.shape == (0,)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [BITS32, BITS16])
def test_live_columns_are_those_of_torch(isa, dtype, entropy):
    logits, target, label = chunk(6, 2500, dtype, peak=9.0)
    options, given, marks = head(2500, 0.8), slopes(6, entropy), []
    for pass_ in (_cpp.ROW_PASS, _torch.ROW_PASS):
        width = torch.int16 if dtype == BITS16 else torch.int32
        live = torch.zeros(2500, dtype=width)
        pass_.run(logits.clone(), target, label, options, given, (live, 1e-3))
        marks.append(live)
    assert 6 <= marks[0].sum() < 2500 and (marks[0] != marks[1]).sum() <= 2  # on the very edge


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(target=torch.zeros(3)), r"expected target float32 \[4\].*got float32 \[3\]"),
        (dict(target=torch.zeros(4).double()), r"expected target float32 \[4\].*got float64 \[4\]"),
        (dict(label=torch.zeros(4).int()), r"expected label int64 \[4\].*got int32"),
        (dict(label=torch.zeros(5).long()), r"expected label int64 \[4\].*got int64 \[5\]"),
        (dict(logits=torch.zeros(4, 9).double()), r"expected logits float32 or bfloat16 \[C, V\]"),
        (dict(logits=torch.zeros(4)), r"expected logits .*got float32 \[4\]"),
        (dict(logits=torch.zeros(9, 4).t()), r"expected logits .*contiguous.*strides \[1, 4\]"),
        (dict(logits=torch.zeros(4, 0)), "V >= 1"),
        (dict(coefficient=Given(torch.zeros(3))), r"expected logprob_grad float32 \[4\]"),
        (dict(mark=(torch.zeros(9).short(), 0.1)), r"expected live int32 \[9\].*got int16"),
        (dict(mark=(torch.zeros(8).int(), 0.1)), r"expected live int32 \[9\].*got int32 \[8\]"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_said(change, message):
    given = dict(logits=torch.zeros(4, 9), target=torch.zeros(4), label=torch.zeros(4).long())
    given |= dict(head=head(9), coefficient=slopes(4), mark=None) | change
    with pytest.raises(ValueError, match=message):
        _cpp.run(**given)


def test_an_instruction_set_that_is_not_here(monkeypatch):
    monkeypatch.setattr(_cpp, "ISA", "avx1024")
    with pytest.raises(ValueError, match='does not run isa "avx1024"'):
        _cpp.run(*chunk(2, 9), head(9), None)


def test_where_it_does_not_run_it_says_why(monkeypatch):
    assert "not on cuda" in _cpp.unavailable(torch.device("cuda"))
    assert "got float64" in _cpp.unavailable(CPU, torch.float64)
    assert _impl.resolve("linear_hdpo_loss", "auto", CPU, BITS16) == "cpp"
    assert _impl.resolve("linear_hdpo_loss", "auto", CPU, torch.float64) == "torch"
    monkeypatch.setattr(_cpp, "_C", None)
    monkeypatch.setattr(_cpp, "_MISSING", "no module", raising=False)
    assert _impl.resolve("linear_hdpo_loss", "auto", CPU, BITS32) == "torch"
    assert "METIS_KERNELS_NO_EXT" in str(status("cpu"))
    with pytest.raises(RuntimeError, match="pip install -e . builds it"):
        _impl.resolve("logprobs", "cpp", CPU)
