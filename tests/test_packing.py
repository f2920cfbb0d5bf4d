"""packing.py, _trajectories.py and csrc/packing.cpp: what a batch holds, rebuilt token by
token from the trajectories in plain Python, and both implementations against one another."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metis_kernels import HDPOConfig, HDPOTargets, _cpp, hdpo_loss
from metis_kernels._layout import PrefixLayout
from metis_kernels.packing import (
    ImageRef,
    ImageSpan,
    PackedBatch,
    Trajectory,
    pack,
    unpack,
    unpack_targets,
)

NATIVE = _cpp.unavailable(torch.device("cpu")) is None
IMPLS = ("cpp", "torch") if NATIVE else ("torch",)
FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def rollout(ids, policy, acc=1.0, tool=0.5, **more) -> Trajectory:
    """policy: the indices that it wrote."""
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[list(policy)] = True
    return Trajectory(torch.tensor(ids, dtype=torch.int64), mask, acc, tool, **more)


def plain(prompt: int, answer: int, first: int = 0, **more) -> Trajectory:
    """prompt tokens 0, 1, ... and as many of the policy's as answer says, from `first` on."""
    ids = [*range(prompt), *(1000 + first + i for i in range(answer))]
    return rollout(ids, range(prompt, prompt + answer), **more)


def same(a: PackedBatch, b: PackedBatch) -> None:
    for name, x in vars(a).items():
        y = getattr(b, name)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and torch.equal(x, y), name
        else:
            assert x == y, name


# ---- the reference -------------------------------------------------------------------------------


def positions_of(t: Trajectory) -> list[list[int]]:
    return [list(range(len(t.ids)))] if t.positions is None else t.positions.tolist()


def last_policy(t: Trajectory) -> int:
    return max(i for i, p in enumerate(t.policy.tolist()) if p)


def longest_prefix(group: list[Trajectory]) -> int:
    """By trying: the most tokens that are alike in all and split no image."""
    if len(group) < 2:
        return 0
    tokens = [list(zip(t.ids.tolist(), *positions_of(t), strict=True)) for t in group]
    alike = 0
    while alike < min(map(last_policy, group)) and len({x[alike] for x in tokens}) == 1:
        alike += 1
    for p in range(alike, 0, -1):
        images = [{(s.start, s.stop, s.key) for s in t.images if s.start < p} for t in group]
        if all(x == images[0] for x in images) and all(stop <= p for _, stop, _ in images[0]):
            return p
    return 0


def check(groups, batches, max_tokens, ranks=1, share=True, keep_all=False) -> None:
    """That the batches hold what they should, without the code under test."""
    wanted = {
        (g, r): t
        for g, group in enumerate(groups)
        for r, t in enumerate(group)
        if t.policy.any() and (keep_all or t.acc_advantage != 0 or t.tool_advantage != 0)
    }
    assert len(batches) % ranks == 0 and (len(batches) >= ranks if ranks > 1 else True)
    members = [m for b in batches for m in b.members]
    assert sorted(members) == sorted(wanted), "each kept rollout is in exactly one batch"
    assert sum(b.S for b in batches) == sum(int(t.policy.sum()) for t in wanted.values())
    prefixes = {}
    for g in {g for g, _ in wanted}:
        prefixes[g] = longest_prefix([t for (h, _), t in wanted.items() if h == g]) * share
    for b in batches:
        check_batch(groups, b, prefixes)
        assert b.T <= max_tokens
        assert ranks > 1 or b.T > 0


def check_batch(groups, b: PackedBatch, prefixes: dict[int, int]) -> None:
    assert b.T == len(b.ids) == b.positions.shape[1] and b.S == len(b.label)
    ids, axes = b.ids.tolist(), b.positions.tolist()
    row, label, images = b.row.tolist(), b.label.tolist(), list(b.images)
    start = target = 0
    members = iter(enumerate(b.members))
    for prefix, lengths in zip(b.layout.prefixes, b.layout.responses, strict=True):
        prefix_rows = list(range(start, start + prefix))
        start += prefix
        for nth, length in enumerate(lengths):
            number, (g, r) = next(members)
            t = groups[g][r]
            assert prefix == prefixes[g]
            rows = prefix_rows + list(range(start, start + length))
            start += length
            last = last_policy(t)
            assert [ids[i] for i in rows] == t.ids[:last].tolist()
            assert [[a[i] for i in rows] for a in axes] == [a[:last] for a in positions_of(t)]
            for index, span in enumerate(t.images):
                own = span.start >= prefix
                if span.stop <= last and (own or nth == 0):
                    assert images.pop(0) == ImageRef(g, r, index)
            written = [i for i, p in enumerate(t.policy.tolist()) if p]
            part = slice(target, target + len(written))
            target += len(written)
            assert row[part] == [rows[i - 1] for i in written]
            assert label[part] == t.ids[written].tolist()
            assert (b.sequence[part] == number).all()
            assert (b.acc_advantage[part] == torch.tensor(t.acc_advantage)).all()
            assert (b.tool_advantage[part] == torch.tensor(t.tool_advantage)).all()
            for name in ("old_logprob", "ref_logprob", "is_weight"):
                mine, own = getattr(b, name), getattr(t, name)
                assert (mine is None) == (own is None)
                assert own is None or torch.equal(mine[part], own[written])
    assert start == b.T and target == b.S and not images


# ---- fuzzing -------------------------------------------------------------------------------------


def random_group(rng: random.Random, axes: int, logprobs: bool) -> list[Trajectory]:
    """Rollouts that begin alike, more or less, with images here and there."""

    def tokens(n: int) -> list[tuple[int, int | None]]:
        """(id, key of its image) of n tokens or a few more."""
        made: list[tuple[int, int | None]] = []
        while len(made) < n:
            if rng.random() < 0.2:
                made += [(9, rng.randrange(2))] * rng.randint(1, 4) + [(8, None)]
            else:
                made.append((rng.randrange(2), None))
        return made

    stem, group = tokens(rng.choice([0, 1, 8, 30])), []
    for _ in range(rng.randint(0, 5)):
        mine = [(7, None), *stem] + tokens(rng.choice([0, 1, 5]))
        if rng.random() < 0.3:
            i = rng.randrange(len(mine))
            mine[i] = (mine[i][0], 1 - mine[i][1]) if mine[i][1] is not None else (3, None)
        images, start = [], 0
        for key, run in itertools.groupby(mine, lambda x: x[1]):
            stop = start + len(list(run))
            if key is not None:
                images.append(ImageSpan(start, stop, key))
            start = stop
        share = rng.choice([0.0, 0.2, 0.9])
        policy = [i for i in range(1, start) if mine[i][1] is None and rng.random() < share]
        positions = None
        if axes > 1 or rng.random() < 0.5:
            positions = torch.arange(start).repeat(axes, 1) // torch.arange(1, axes + 1)[:, None]
            if rng.random() < 0.2:
                positions[rng.randrange(axes), rng.randrange(start)] += 1
            if rng.random() < 0.3:
                positions = positions.t().contiguous().t()
        numbers = {}
        if logprobs:
            numbers = {"old_logprob": -torch.rand(start), "is_weight": torch.rand(2 * start)[::2]}
        group.append(
            rollout(
                [i for i, _ in mine], policy, rng.choice([0.0, 0.3, -0.7]), rng.choice([0.0, 0.5]),
                images=tuple(images), positions=positions, **numbers,
            )
        )  # fmt: skip
    return group


@FUZZ
@given(rng=st.randoms(use_true_random=False), ranks=st.integers(1, 5), share=st.booleans())
def test_any_rollouts(rng, ranks, share):
    axes, logprobs = rng.choice([1, 3]), rng.random() < 0.5
    groups = [random_group(rng, axes, logprobs) for _ in range(rng.randint(0, 5))]
    lengths = [last_policy(t) for group in groups for t in group if t.policy.any()]
    max_tokens = max(lengths, default=1) + rng.choice([0, 1, 10, 1000])
    options = dict(ranks=ranks, share=share, keep_all=rng.random() < 0.3)
    options["attention_cost"] = rng.choice([0.0, 4e-5, 1.0])
    found = [pack(groups, max_tokens, impl=impl, **options) for impl in IMPLS]
    options.pop("attention_cost")
    check(groups, found[0], max_tokens, **options)
    for other in found[1:]:
        assert len(other) == len(found[0])
        for a, b in zip(found[0], other, strict=True):
            same(a, b)


@pytest.mark.skipif(not NATIVE, reason="the C++ core is not there")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_native_reads_long_rollouts_as_torch_does(threads):
    """Prefixes beyond the block of a comparison, masks beyond a word, several threads."""
    rng = random.Random(threads)
    groups = []
    for _ in range(6):
        stem = [rng.randrange(100) for _ in range(rng.choice([1023, 1024, 1025, 3001]))]
        group = []
        for _ in range(5):
            ids = [*stem, *(rng.randrange(100) for _ in range(rng.randrange(1, 400)))]
            policy = [i for i in range(1, len(ids)) if (i // rng.choice([1, 7, 64])) % 3 == 0]
            positions = torch.arange(len(ids)).repeat(3, 1)
            if rng.random() < 0.5:
                positions[2, rng.randrange(900, len(ids)) :] += 5
            policy.append(len(ids) - 1)
            group.append(rollout(ids, policy, positions=positions))
        groups.append(group)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [pack(groups, 5000, impl=impl) for impl in ("cpp", "torch")]
    finally:
        torch.set_num_threads(before)
    assert len(found[0]) == len(found[1]) > 1
    for a, b in zip(*found, strict=True):
        same(a, b)
    check(groups, found[0], 5000)


# ---- what is kept --------------------------------------------------------------------------------


def test_the_example_of_the_targets(impl):
    """The one in HDPOTargets: "the cat" -> "sat" and "the cat" -> "ran off"."""
    the, cat, sat, ran, off = range(5)
    a = rollout([the, cat, sat], [2], 0.7)
    b = rollout([the, cat, ran, off], [2, 3], -0.7)
    [batch] = pack([[a, b]], 100, impl=impl)
    # The last token is a label only: "sat" and "off" have no row.
    assert batch.layout == PrefixLayout((2,), ((0, 1),)) and batch.ids.tolist() == [the, cat, ran]
    assert batch.row.tolist() == [1, 1, 2] and batch.label.tolist() == [sat, ran, off]
    assert batch.sequence.tolist() == [0, 1, 1] and batch.members == ((0, 0), (0, 1))
    assert batch.positions.tolist() == [[0, 1, 2]]
    assert torch.equal(batch.acc_advantage, torch.tensor([0.7, -0.7, -0.7]))


def test_what_has_no_gradient_is_left_out(impl):
    silent = rollout([1, 2, 3], [])
    level = plain(4, 2, acc=0.0, tool=0.0)
    tool = plain(4, 2, acc=0.0, tool=-0.1)
    groups = [[silent, level, tool], [silent], []]
    [batch] = pack(groups, 100, impl=impl)
    assert batch.members == ((0, 2),) and batch.layout == PrefixLayout((0,), ((5,),))
    [batch] = pack(groups, 100, keep_all=True, impl=impl)
    assert batch.members == ((0, 1), (0, 2)) and batch.layout == PrefixLayout((5,), ((0, 0),))
    assert pack([[level]], 100, impl=impl) == [] == pack([], 100, impl=impl)


@pytest.mark.parametrize("positions", [None, torch.arange(6).repeat(3, 1)])
def test_batches_of_ranks_without_work_are_empty(impl, positions):
    level = plain(4, 2, acc=0.0, tool=0.0, positions=positions)
    level = replace(level, old_logprob=torch.zeros(6))
    batches = pack([[level]], 100, ranks=3, impl=impl)
    assert len(batches) == 3
    for b in batches:
        assert (b.T, b.S, b.work, b.images, b.members) == (0, 0, 0, (), ())
        assert b.positions.shape == (1 if positions is None else 3, 0)
        assert b.ids.dtype == b.row.dtype == b.sequence.dtype == torch.int64
        assert b.old_logprob.shape == b.acc_advantage.shape == (0,) and b.ref_logprob is None
        assert b.acc_advantage.dtype == torch.float32
        assert unpack(b, torch.zeros(0, 5)) == [] == unpack_targets(b, torch.zeros(0))
        b.targets(3, 0).validate(tokens=0)
    assert len(pack([], 100, ranks=2, impl=impl)) == 2


def test_identical_rollouts_are_all_prefix(impl):
    [batch] = pack([[plain(5, 3)] * 4], 100, impl=impl)
    assert batch.layout == PrefixLayout((7,), ((0,) * 4,)) and batch.S == 12
    assert batch.row.tolist() == [4, 5, 6] * 4
    check([[plain(5, 3)] * 4], [batch], 100)
    [alone] = pack([[plain(5, 3)]], 100, impl=impl)
    assert alone.layout == PrefixLayout((0,), ((7,),))


def test_without_sharing_every_rollout_is_whole(impl):
    groups = [[plain(5, 3), plain(5, 4)], [plain(6, 1)]]
    [batch] = pack(groups, 100, share=False, impl=impl)
    assert set(batch.layout.prefixes) == {0} and batch.T == batch.layout.rollout_tokens == 21
    check(groups, [batch], 100, share=False)


def test_one_memory_for_all_positions(impl):
    positions = torch.arange(9).expand(3, 9)
    group = [plain(5, 4, first=i, positions=positions) for i in (0, 9)]
    [batch] = pack([group], 100, impl=impl)
    assert batch.layout.prefixes == (5,)
    check([group], [batch], 100)


# ---- images --------------------------------------------------------------------------------------

IMAGE = [1, 9, 9, 9, 2, 3, 4, 5]
"""Ids with an image of three placeholders at 1, the policy's from 5 on."""


def pictured(*keys: int, ids=IMAGE, spans=((1, 4),), policy=(5, 6, 7), **more) -> Trajectory:
    images = tuple(ImageSpan(a, b, k) for (a, b), k in zip(spans, keys, strict=True))
    return rollout(ids, policy, images=images, **more)


@pytest.mark.parametrize(
    ("group", "prefix", "images"),
    [
        ([pictured(5), pictured(5)], 7, [(0, 0)]),
        ([pictured(5), pictured(6)], 1, [(0, 0), (1, 0)]),
        ([pictured(5), pictured(5), pictured(6)], 1, [(0, 0), (1, 0), (2, 0)]),
        # One more placeholder: the ids agree inside of the image, then no longer.
        (
            [pictured(5), pictured(5, ids=[1, 9, 9, 9, 9, 3, 4, 5], spans=((1, 5),))],
            1,
            [(0, 0), (1, 0)],
        ),
        # Placeholders that only one takes for an image.
        ([pictured(5), pictured(spans=())], 1, [(0, 0)]),
        # Two images side by side, the second another.
        (
            [pictured(5, k, spans=((1, 2), (2, 4))) for k in (6, 7)],
            2,
            [(0, 0), (0, 1), (1, 1)],
        ),
        # The same image, cut differently into spans.
        ([pictured(5, 5, spans=((1, 2), (2, 4))), pictured(5)], 1, [(0, 0), (0, 1), (1, 0)]),
        # Behind the last policy token: never embedded.
        ([pictured(5, policy=(0 + 1,), spans=((5, 7),)), pictured(5, spans=((5, 7),), policy=(1,))],
         1, []),
    ],
)  # fmt: skip
def test_images_end_a_prefix_and_are_there_once(impl, group, prefix, images):
    [batch] = pack([group], 100, impl=impl)
    assert batch.layout.prefixes == (prefix,)
    assert batch.images == tuple(ImageRef(0, r, i) for r, i in images)
    check([group], [batch], 100)


def test_an_image_that_is_whole_at_the_end_of_the_prefix_is_shared(impl):
    group = [pictured(5, ids=[1, 9, 9, 9, x, 4], policy=(4, 5)) for x in (2, 3)]
    [batch] = pack([group], 100, impl=impl)
    assert batch.layout == PrefixLayout((4,), ((1, 1),)) and len(batch.images) == 1


def test_each_part_of_a_group_brings_the_images_of_its_prefix(impl):
    ids = [[1, 9, 9, 9, 2, x, 9, 9, 9, 3, 4] for x in range(20, 24)]
    group = [
        pictured(5, 50 + i, ids=x, spans=((1, 4), (6, 9)), policy=(5, 9, 10))
        for i, x in enumerate(ids)
    ]
    batches = pack([group], 16, impl=impl)
    assert [b.layout for b in batches] == [PrefixLayout((5,), ((5, 5),))] * 2
    for b in batches:
        (_, a), (_, c) = b.members
        assert b.images == (ImageRef(0, a, 0), ImageRef(0, a, 1), ImageRef(0, c, 1))
    check([group], batches, 16)


def test_positions_end_a_prefix(impl):
    base = torch.arange(8).repeat(3, 1)
    moved = base.clone()
    moved[2, 4] = 0
    group = [plain(5, 3, positions=p) for p in (base, moved)]
    [batch] = pack([group], 100, impl=impl)
    assert batch.layout.prefixes == (4,)
    # On one axis None is 0..n-1.
    group = [plain(5, 3, positions=p) for p in (None, base[:1], moved[2:])]
    [batch] = pack([group], 100, impl=impl)
    assert batch.layout.prefixes == (4,) and batch.positions.shape == (1, 13)
    check([group], [batch], 100)


# ---- batches -------------------------------------------------------------------------------------


def groups_of(sizes: list[tuple[int, ...]], prompt: int = 10) -> list[list[Trajectory]]:
    """One group a tuple, its rollouts with so many rows behind a shared prompt."""
    return [[plain(prompt, n + 1, first=100 * i) for i, n in enumerate(s)] for s in sizes]


def test_a_group_is_cut_between_responses_into_the_fewest_even_parts(impl):
    groups = groups_of([(20,) * 6])
    batches = pack(groups, 75, impl=impl)
    assert [b.layout for b in batches] == [PrefixLayout((10,), ((20,) * 3,))] * 2
    check(groups, batches, 75)
    batches = pack(groups, 30, impl=impl)
    assert [b.layout for b in batches] == [PrefixLayout((10,), ((20,),))] * 6
    [whole] = pack(groups, 130, impl=impl)
    assert whole.T == 130


def test_batches_are_few_and_alike(impl):
    rng = random.Random(3)
    groups = groups_of([tuple(rng.randint(1, 30) for _ in range(4)) for _ in range(64)])
    total = sum(b.T for b in pack(groups, 10_000, impl=impl))
    batches = pack(groups, 512, impl=impl)
    assert len(batches) <= math.ceil(total / 512) + 1
    works = [b.work for b in batches]
    assert works == sorted(works, reverse=True) and max(works) < 1.05 * min(works)
    check(groups, batches, 512)


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_ranks_get_as_many_batches_and_alike_ones(impl, ranks):
    rng = random.Random(ranks)
    groups = groups_of([tuple(rng.randint(1, 30) for _ in range(4)) for _ in range(64)])
    batches = pack(groups, 512, ranks=ranks, impl=impl)
    check(groups, batches, 512, ranks=ranks)
    for start in range(0, len(batches), ranks):
        works = [b.work for b in batches[start : start + ranks]]
        assert max(works) < 1.1 * min(works)
    sums = [sum(b.work for b in batches[r::ranks]) for r in range(ranks)]
    assert max(sums) < 1.05 * min(sums)


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        (2, [(30, 30)]),
        (4, [(30, 30), (30,) * 6]),  # the larger one is cut in three
        (5, [(5,), (5,), (30, 30), (3, 3)]),
    ],
)
def test_too_few_pieces_are_cut_for_ranks(impl, ranks, sizes):
    groups = groups_of(sizes)
    batches = pack(groups, 1000, ranks=ranks, impl=impl)
    assert len(batches) == ranks and all(b.S for b in batches)
    check(groups, batches, 1000, ranks=ranks)


def test_what_cannot_be_cut_leaves_ranks_idle(impl):
    batches = pack(groups_of([(5, 6), (7,)]), 1000, ranks=5, impl=impl)
    assert [b.S for b in batches] == [8, 7, 6, 0, 0]


def test_cut_or_not_ranks_or_not_the_loss_is_the_same(impl):
    groups = groups_of([(20,) * 6, (3, 4, 5), (8,)])
    config, losses = HDPOConfig(), []
    for options in (dict(max_tokens=1000), dict(max_tokens=40), dict(max_tokens=90, ranks=3)):
        total = torch.zeros((), dtype=torch.float64)
        for b in pack(groups, **options, impl=impl):
            logprob = -(b.label % 17).double() / 17
            total += hdpo_loss(logprob, b.targets(50, 60), config)[0]
        losses.append(total)
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-12, atol=0)


def test_it_is_the_same_every_time(impl):
    rng = random.Random(1)
    groups = [random_group(rng, 3, True) for _ in range(20)]
    first, second = (pack(groups, 120, ranks=2, impl=impl) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        same(a, b)


def test_defaults_of_torch_change_nothing(impl):
    group = [plain(4, 3), plain(4, 4, first=50, positions=torch.arange(8)[None])]
    [before], empty = pack([group], 100, impl=impl), pack([], 100, ranks=2, impl=impl)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            [after], nothing = pack([group], 100, impl=impl), pack([], 100, ranks=2, impl=impl)
    finally:
        torch.set_default_dtype(torch.float32)
    same(before, after)
    same(empty[0], nothing[0])


# ---- unpacking, moving ---------------------------------------------------------------------------


def test_unpack_gives_views(impl):
    groups = groups_of([(3, 0, 2), (4,)])
    [batch] = pack(groups, 1000, impl=impl)
    values = torch.arange(batch.T * 2.0).view(batch.T, 2)
    parts = unpack(batch, values)
    targets = unpack_targets(batch, batch.label)
    assert len(parts) == len(targets) == len(batch.members) == 4
    for (g, r), (prefix, response), label in zip(batch.members, parts, targets, strict=True):
        t = groups[g][r]
        rows = torch.cat([prefix, response])[:, 0].long() // 2
        assert batch.ids[rows].tolist() == t.ids[: last_policy(t)].tolist()
        assert label.tolist() == t.ids[t.policy].tolist()
        for view, base in ((prefix, values), (response, values), (label, batch.label)):
            assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match=rf"values \[T, ...\], T = {batch.T}, got \[1\]"):
        unpack(batch, torch.zeros(1))
    with pytest.raises(ValueError, match=rf"values \[S, ...\], S = {batch.S}, got \[\]"):
        unpack_targets(batch, torch.zeros(()))


def test_targets_are_the_loss_operators(impl):
    numbers = {n: torch.rand(14) for n in ("old_logprob", "ref_logprob", "is_weight")}
    [batch] = pack([[plain(10, 4, **numbers)]], 100, impl=impl)
    own = batch.targets(4, 2.0)
    assert isinstance(own, HDPOTargets) and own.n_acc == 4 and own.n_tool == 2.0
    own.validate(tokens=batch.T, vocab=2000)
    for name in ("row", "label", "sequence", "acc_advantage", "tool_advantage", *numbers):
        assert getattr(own, name) is getattr(batch, name) is not None
    old, ref = torch.zeros(4), torch.ones(4)
    given = batch.targets(4, 2.0, old_logprob=old, ref_logprob=ref)
    assert given.old_logprob is old and given.ref_logprob is ref
    assert given.is_weight is batch.is_weight


def test_logprobs_bring_no_graph(impl):
    old = torch.zeros(14, requires_grad=True)
    [batch] = pack([[plain(10, 4, old_logprob=old)]], 100, impl=impl)
    assert not batch.old_logprob.requires_grad


def test_moving_takes_every_tensor():
    [batch] = pack(groups_of([(3, 2)]), 1000)
    there = batch.to("meta")
    assert there.ids.is_meta and there.positions.is_meta and there.sequence.is_meta
    assert there.layout is batch.layout and there.old_logprob is None
    assert [len(x) for x in unpack_targets(there, torch.zeros(7, device="meta"))] == [4, 3]
    assert there.work == batch.work == batch.T + 4e-5 * batch.layout.pairs


# ---- what is refused -----------------------------------------------------------------------------

GOOD = plain(4, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ids=GOOD.ids.int()), r"expected ids \[n\] int64 on the CPU, got \[6\] int32 on cpu"),
        (dict(ids=GOOD.ids[None]), r"expected ids \[n\] int64, got \[1, 6\] int64"),
        (dict(ids=[1, 2]), r"expected ids \[n\] int64, got 'list'"),
        (dict(ids=GOOD.ids.to("meta")), "on the CPU, got .* on meta"),
        (dict(policy=GOOD.policy[1:]), r"expected policy \[6\] bool .*, got \[5\] bool"),
        (dict(policy=GOOD.policy.long()), r"expected policy \[6\] bool .*, got \[6\] int64"),
        (dict(positions=torch.arange(6)), r"positions \[A, 6\] int64 .*, got \[6\] int64"),
        (dict(positions=torch.zeros(3, 5).long()), r"positions \[A, 6\].*, got \[3, 5\]"),
        (dict(positions=torch.zeros(3, 6)), r"positions \[A, 6\] int64.*got \[3, 6\] float32"),
        (dict(positions=torch.zeros(0, 6).long()), r"A >= 1, got \[0, 6\]"),
        (dict(positions=torch.zeros(3, 6).long()), r"have 3 axes .*rollout 0 have 1; give all"),
        (dict(old_logprob=torch.zeros(5)), r"expected old_logprob \[6\] float32 .* \[5\] float32"),
        (dict(is_weight=torch.zeros(6).double()), r"expected is_weight .* got \[6\] float64"),
        (dict(ref_logprob=torch.zeros(6)), "no ref_logprob but 1 of 2 trajectories have"),
        (dict(acc_advantage=float("nan")), "finite advantages, got acc_advantage=nan"),
        (dict(tool_advantage=float("inf")), "finite advantages, got .*tool_advantage=inf"),
        (dict(images=(ImageSpan(3, 3, 0),)), r"image 0 takes tokens \[3, 3\), but images must"),
        (dict(images=(ImageSpan(-1, 3, 0),)), r"image 0 takes tokens \[-1, 3\)"),
        (dict(images=(ImageSpan(5, 7, 0),)), r"image 0 takes .* inside \[0, 6\)"),
        (dict(images=(ImageSpan(0, 2, 0), ImageSpan(1, 3, 0))), r"image 1 .* inside \[2, 6\)"),
        (dict(images=(ImageSpan(2, 6, 0),)), "token 5 in it is marked as written by the policy"),
        (dict(policy=torch.ones(6).bool()), "token 0 is marked .* put the prompt"),
    ],
)
def test_what_is_wrong_is_said(impl, change, message):
    bad = replace(GOOD, name="weather-17", **change)
    with pytest.raises(ValueError, match=message) as caught:
        pack([[GOOD], [bad]], 100, impl=impl)
    if "ref_logprob" not in change:
        assert "trajectory 'weather-17' (group 1, rollout 0)" in str(caught.value)


def test_a_rollout_that_is_too_long_is_named(impl):
    with pytest.raises(
        ValueError,
        match=r"trajectory of group 0, rollout 1 has 12 tokens .* max_tokens=11; raise max_tokens",
    ):
        pack([[plain(10, 1), plain(10, 3)]], 11, impl=impl)
    assert [b.T for b in pack([[plain(10, 1), plain(10, 3)]], 12, impl=impl)] == [12]
    # One that is not packed may be of any length.
    assert len(pack([[plain(10, 1), plain(10, 3, acc=0.0, tool=0.0)]], 11, impl=impl)) == 1


def test_options_out_of_range():
    for options, message in (
        (dict(max_tokens=0), "max_tokens must be an integer >= 1, got 0"),
        (dict(max_tokens=1.5), "max_tokens must be an integer >= 1, got 1.5"),
        (dict(max_tokens=9, ranks=0), "ranks must be an integer >= 1, got 0"),
        (dict(max_tokens=9, attention_cost=-1.0), "attention_cost must be .* got -1.0"),
        (dict(max_tokens=9, attention_cost=float("nan")), "attention_cost must be .* got nan"),
        (dict(max_tokens=9, impl="fast"), "impl must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            pack([], **options)


@pytest.mark.skipif(not NATIVE, reason="the C++ core is not there")
def test_native_trusts_no_plan():
    """What would make C++ write elsewhere is an error, whoever calls."""
    group = [plain(4, 3), plain(4, 4, first=50)]
    ids, policy = [t.ids for t in group], [t.policy for t in group]
    core = _cpp._C.Rollouts(
        [7, 8], [x.data_ptr() for x in ids], [x.data_ptr() for x in policy], [], [], 1,
        [1.0, 1.0], [0.0, 0.0], [[], [], []], 1,
    )  # fmt: skip
    assert [tuple(x) for x in core.policy_tokens()] == [(4, 6, 3), (4, 7, 4)]
    assert core.common_prefixes([[0, 1]]) == [4]

    def assemble(prefixes=(4,), sizes=(2,), members=(0, 1), rows=9, targets=7, old=None):
        integers = [torch.empty(n, dtype=torch.int64) for n in (rows, targets, targets, targets)]
        positions = torch.empty(1, rows, dtype=torch.int64)
        views = [_cpp._view(n, x) for n, x in zip(("ids", "row", "label", "seq"), integers)]  # noqa: B905
        views.insert(1, _cpp._view("positions", positions))
        numbers = [torch.empty(targets), torch.empty(targets), old]
        views += [_cpp._view(n, x) for n, x in zip(("acc", "tool", "old_logprob"), numbers)]  # noqa: B905
        batch = _cpp._C.PackingBatch(prefixes, sizes, members, *views, None, None)
        core.assemble([batch])
        return integers[0].tolist()

    assert assemble() == [0, 1, 2, 3, 1000, 1001, 1050, 1051, 1052]
    for change, message in (
        (dict(rows=8), r"expected ids int64 \[9\]"),
        (dict(targets=6), r"expected row int64 \[7\]"),
        (dict(members=(0, 2)), "there is no rollout 2"),
        (dict(members=(0, -1)), "there is no rollout -1"),
        (dict(prefixes=(7,)), "a prefix is longer than a rollout"),
        (dict(prefixes=(-1,)), "a negative prefix"),
        (dict(sizes=(1,)), "disagree"),
        (dict(sizes=(2, 0), prefixes=(4, 0)), "a group has no member"),
        (dict(old=torch.zeros(7)), "the rollouts have no old_logprob"),
    ):
        with pytest.raises(ValueError, match=message):
            assemble(**change)
    for groups in ([[]], [[0, 5]]):
        with pytest.raises(ValueError, match="a group is empty|no rollout 5"):
            core.common_prefixes(groups)
    with pytest.raises(ValueError, match="the columns differ in length"):
        _cpp._C.Rollouts([7], [], [], [], [], 1, [], [], [[], [], []], 1)
