"""A batch of trajectories whose KV is kept between their turns.

What a turn costs: of every distinct new prompt one forward over it, images included, whose KV is
then copied to the rollouts that share it; of every trajectory that goes on one forward over what
was appended to it; and one forward a token over the rows that still write. Rows that have ended
leave the batch once they are a quarter of it.

Positions are M-RoPE's and are carried along: what is appended begins one behind the largest
position so far, and within it they are what the model's own `get_rope_index` says of it alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from PIL.Image import Image
from torch import Tensor

from trainer.engines.kv import Place, RowCache, regroup
from trainer.engines.sampling import TAIL, Sampled, Stop, sample, uniforms

if TYPE_CHECKING:
    from trainer.engines.hf import HFEngine

PREFILL_TOKENS = 16_384
"""Tokens, padding included, of one forward over prompts or observations (of one row at least)."""
FORWARD = 256
"""What one forward more costs, in tokens of a larger one."""
ROOM = 64
"""Free slots, or a quarter of those in use where that is more, that a cache is made with."""
KEPT = 0.75
"""Share of rows that still run at which those that have ended leave the batch."""

Sequences = Sequence[tuple[Sequence[int], Sequence[Image]]]


@dataclass
class _Trajectory:
    ids: list[int]
    images: int
    """How many it has."""
    new_images: list[Image]
    """Those that came since its last turn."""
    cached: int = 0
    """Tokens whose KV is there: all but the last sampled one."""
    position: int = 0
    """Of the next token."""
    cache: RowCache | None = None
    row: int = 0


@dataclass
class _Piece:
    """What is prefilled of one trajectory, or of several that are the same so far."""

    ids: list[int]
    images: list[Image]
    rows: list[int] = field(default_factory=list)


class Generation:
    """Made by `HFEngine.open`; a context manager that frees the memory at its end."""

    def __init__(self, engine: HFEngine):
        self.engine = engine
        self.device = engine.vlm.device
        self._known: dict[int, _Trajectory] = {}

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the KV of every trajectory."""
        self._known.clear()

    @property
    def nbytes(self) -> int:
        """Of all KV that is held."""
        caches = {id(t.cache): t.cache for t in self._known.values() if t.cache is not None}
        return sum(cache.nbytes for cache in caches.values())

    def turn(
        self,
        keys: Sequence[int],
        sequences: Sequences,
        seeds: Sequence[Sequence[int]],
        max_new_tokens: int,
        openings: Sequence[Sequence[int]] | None = None,
    ) -> list[Sampled]:
        """The next turn of the trajectories `keys`, in their order.

        sequences: of each its whole (ids, images) so far, which must begin with those of its turn
        before and what it sampled in it. seeds[i] is what numpy seeds its stream with. A trajectory
        that is left out has ended: its KV is freed. One that is not known joins, all of it encoded.
        openings: of each the ids that its turn begins with, whatever the policy would say. Raises
        ValueError where a sequence does not go on from its last turn, or there are more than
        max_batch.
        """
        engine = self.engine
        if len(keys) > engine.max_batch:
            raise ValueError(
                f"{len(keys)} trajectories in one turn are more than max_batch = "
                f"{engine.max_batch}; play them one part after the other"
            )
        if max_new_tokens < 1 or len(set(keys)) != len(keys):
            raise ValueError(
                f"a turn of {max_new_tokens} tokens of the trajectories {list(keys)}; expected at "
                "least one token, and every trajectory once"
            )
        if not keys:
            self.close()
            return []
        start = time.perf_counter()
        with engine.inference():
            turn = _Turn(self, keys, sequences, seeds, max_new_tokens, openings)
            logits = turn.prefill()
            sampled = turn.decode(logits)
        stats = engine.counts
        stats.sampled_tokens += sum(len(one.ids) for one in sampled)
        stats.seconds += time.perf_counter() - start
        return sampled


class _Turn:
    """One call of `Generation.turn`. Rows are numbered as its trajectories are."""

    def __init__(
        self, generation: Generation, keys, sequences: Sequences, seeds, count: int, openings
    ):
        self.engine = generation.engine
        self.device = generation.device
        self.seeds, self.count = seeds, count
        self.openings = [list(ids) for ids in openings or [()] * len(keys)]
        known = generation._known
        self.trajectories = [
            _go_on(key, known.get(key), ids, images)
            for key, (ids, images) in zip(keys, sequences, strict=True)
        ]
        generation._known = dict(zip(keys, self.trajectories, strict=True))

    # ---- prefill ---------------------------------------------------------------------------------

    def prefill(self) -> Tensor:
        """Runs what is new of every trajectory -> the logits [N, V] of its next token."""
        counts = self.engine.counts
        fresh: dict[tuple, _Piece] = {}
        appended: list[_Piece] = []
        for row, one in enumerate(self.trajectories):
            if one.cached:
                appended.append(_Piece(one.ids[one.cached :], one.new_images, [row]))
                counts.kept_tokens += one.cached
                continue
            key = (tuple(one.ids), tuple(map(id, one.new_images)))
            piece = fresh.setdefault(key, _Piece(one.ids, one.new_images))
            counts.shared_tokens += len(one.ids) if piece.rows else 0
            piece.rows.append(row)
        batches = _batches(list(fresh.values())) + _batches(appended)
        padded = max(
            self.trajectories[piece.rows[0]].cached + max(len(other.ids) for other in batch)
            for batch in batches
            for piece in batch
        )
        longest = max(len(one.ids) for one in self.trajectories)
        capacity = max(padded, self._room(longest, self.count))
        places = [(one.cache, one.row) if one.cached else None for one in self.trajectories]
        (self.cache,) = regroup([(places, capacity)], self.engine.layers)
        for row, one in enumerate(self.trajectories):
            one.cache, one.row = self.cache, row
        logits: Tensor | None = None
        for batch in batches:
            rows = [row for piece in batch for row in piece.rows]
            source = [n for n, piece in enumerate(batch) for _ in piece.rows]
            out = self._run(batch, rows, source)
            if logits is None:
                logits = out.new_empty(len(self.trajectories), out.shape[1])
            logits[self._index(rows)] = out[self._index(source)]
        return logits

    def _run(self, pieces: Sequence[_Piece], rows: list[int], source: list[int]) -> Tensor:
        """One forward over n left-padded pieces -> the logits [n, V] behind each.

        rows: of the cache, that are filled, and `source` which piece each is filled from.
        """
        engine = self.engine
        inputs = engine.vlm.collate([(piece.ids, piece.images) for piece in pieces], left=True)
        heads = [self.trajectories[piece.rows[0]] for piece in pieces]
        position_ids, after = engine.positions(inputs, [one.position for one in heads])
        valid = inputs.pop("attention_mask")
        # Tokens lie in order from the row's next slot on; the padding in free slots behind them.
        width = valid.shape[1]
        padding = width - valid.sum(1, keepdim=True)
        order = (torch.arange(width, device=self.device) - padding) % width
        cached = [one.cached for one in heads]
        slots = self._index(cached)[:, None] + order
        view = max(cached) + width if max(cached) else 0
        mask: Tensor | None = None  # plain causal
        if view:
            mask = torch.arange(view, device=self.device) <= slots[:, :, None]
        elif min(len(piece.ids) for piece in pieces) < width:
            mask = order[:, None, :] <= order[:, :, None]
        if len(rows) > len(pieces):
            index = self._index(source)
            place = Place(self._index(rows), slots[index], view, source=index)
        else:
            every = rows == list(range(self.cache.rows))
            place = Place(self._index(rows), slots, view, every=every)
        logits = engine.forward(self.cache.put(place), position_ids, mask, **inputs)
        for piece, position in zip(pieces, after, strict=True):
            for row in piece.rows:
                self.trajectories[row].cached += len(piece.ids)
                self.trajectories[row].position = position
            engine.counts.prefill_tokens += len(piece.ids)
        return logits

    # ---- decode ----------------------------------------------------------------------------------

    def decode(self, logits: Tensor) -> list[Sampled]:
        """Samples until every row has ended or `count` tokens are there."""
        engine, number = self.engine, len(self.trajectories)
        uniform = uniforms(self.seeds, self.count).to(self.device)
        forced = self._forced()
        ids = torch.zeros(number, self.count, dtype=torch.long, device=self.device)
        logprob = torch.zeros(number, self.count, device=self.device)
        length = [self.count] * number
        stop: list[Stop] = ["length"] * number
        running = set(range(number))
        order = list(range(number))  # which trajectory a row of the cache is of
        index, step = self._index(order), None
        for t in range(self.count):
            token, chosen = sample(
                logits,
                uniform[index, t],
                engine.temperature,
                engine.forbidden_ids,
                forced[index, t] if t < forced.shape[1] else None,
            )
            ids[index, t], logprob[index, t] = token, chosen
            for row in engine.closing[token].nonzero()[:, 0].tolist():
                n = order[row]
                if n in running:
                    tail = ids[n, max(0, t + 1 - TAIL) : t + 1].tolist()
                    ended = engine.protocol.stop(tail)
                    if ended is not None:
                        stop[n], length[n] = ended, t + 1
                        running.discard(n)
            if not running or t == self.count - 1:
                break
            full = max(self.trajectories[n].cached for n in order) + t == self.cache.capacity
            if full or len(running) <= len(order) * KEPT:
                keep = [row for row, n in enumerate(order) if n in running]
                self._regroup(order, keep, t)
                order, token = [order[row] for row in keep], token[self._index(keep)]
                index, step = self._index(order), None
            if step is None:
                step = _Step(self, order, t)
            logits = step(token)
        ids, logprob = ids.tolist(), logprob.tolist()
        sampled = []
        for n, one in enumerate(self.trajectories):
            given = range(min(len(self.openings[n]), length[n]))
            sampled.append(Sampled(ids[n][: length[n]], logprob[n][: length[n]], stop[n], given))
            one.ids = one.ids + sampled[n].ids
            # The last sampled token has not been run.
            one.cached += length[n] - 1
            one.position += length[n] - 1
        return sampled

    def _forced(self) -> Tensor:
        """[N, longest opening] ids; -1 where the policy chooses."""
        longest = max(map(len, self.openings))
        rows = [ids + [-1] * (longest - len(ids)) for ids in self.openings]
        return torch.tensor(rows, dtype=torch.long, device=self.device)

    def _regroup(self, order: list[int], keep: list[int], t: int) -> None:
        """Rows `keep`, whose trajectories go on, move to a cache of their own with room for more;
        the others are put aside, no longer than they are. t tokens of the turn are cached."""
        aside = sorted(set(range(len(order))) - set(keep))
        wanted = []
        for rows in filter(None, (keep, aside)):
            longest = max(self.trajectories[order[row]].cached for row in rows) + t
            capacity = self._room(longest, self.count - t) if rows is keep else longest
            wanted.append(([(self.cache, row) for row in rows], capacity))
        caches = regroup(wanted, self.engine.layers)
        self.cache = caches[0]
        for cache, rows in zip(caches, filter(None, (keep, aside)), strict=True):
            for row, before in enumerate(rows):
                one = self.trajectories[order[before]]
                one.cache, one.row = cache, row

    def _room(self, longest: int, more: int) -> int:
        """Capacity for rows the longest of which has so many tokens and may get `more`."""
        return longest + min(more, max(ROOM, longest // 4))

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.device)


class _Step:
    """One forward over one token of every row of the turn's cache.

    All tensors that it reads stay where they are and only change their values, so that on CUDA it
    can be captured once and replayed (`HFEngine(cuda_graphs=True)`): attention is then given the
    whole capacity, else the slots in use.
    """

    def __init__(self, turn: _Turn, order: Sequence[int], t: int):
        """order: the trajectories of the rows, of whose turn t tokens are cached."""
        self.engine, self.cache = turn.engine, turn.cache
        lengths = [turn.trajectories[n].cached + t for n in order]
        self.longest = max(lengths)
        self.length = turn._index(lengths)[:, None]
        self.position = turn._index([turn.trajectories[n].position + t for n in order])[:, None]
        self.token = torch.zeros_like(self.length)
        self.rows = torch.arange(len(order), device=turn.device)
        self.slots = torch.arange(self.cache.capacity, device=turn.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.engine.cuda_graphs:
            self._capture()

    def __call__(self, token: Tensor) -> Tensor:
        """token [R] -> the logits [R, V] behind it."""
        self.token.copy_(token[:, None])
        if self.graph is None:
            logits = self._forward(self.longest + 1)
        else:
            self.graph.replay()
            logits = self.logits
        self.length += 1
        self.position += 1
        self.longest += 1
        return logits

    def _forward(self, view: int) -> Tensor:
        place = Place(self.rows, self.length, view, every=True)
        mask = self.slots[:view] <= self.length[:, :, None]
        positions = self.position.expand(3, -1, -1)
        return self.engine.forward(self.cache.put(place), positions, mask, input_ids=self.token)

    def _capture(self) -> None:
        # A first run outside, for libraries that allocate on their first call. It writes where the
        # replay will write again.
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self._forward(self.cache.capacity)
        main.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._forward(self.cache.capacity)


def _go_on(
    key: int, before: _Trajectory | None, ids: Sequence[int], images: Sequence[Image]
) -> _Trajectory:
    ids, images = list(ids), list(images)
    if before is None:
        return _Trajectory(ids, len(images), images)
    count = len(before.ids)
    if ids[:count] != before.ids or len(images) < before.images:
        raise ValueError(
            f"trajectory {key} has {len(ids)} tokens and {len(images)} images that do not begin "
            f"with the {count} tokens and {before.images} images after its last turn; only append"
        )
    return _Trajectory(
        ids,
        len(images),
        images[before.images :],
        before.cached,
        before.position,
        before.cache,
        before.row,
    )


def _batches(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Pieces that are run together: in all at most PREFILL_TOKENS with the padding (or one piece).
    A shorter piece begins a new batch where it and those behind it would be padded by more than a
    forward costs."""
    batches: list[list[_Piece]] = []
    by_length = sorted(pieces, key=lambda piece: -len(piece.ids))
    for number, piece in enumerate(by_length):
        longest = len(batches[-1][0].ids) if batches else 0
        waste = (longest - len(piece.ids)) * (len(by_length) - number)
        if not batches or waste > FORWARD or longest * (len(batches[-1]) + 1) > PREFILL_TOKENS:
            batches.append([])
        batches[-1].append(piece)
    return [sorted(batch, key=lambda piece: piece.rows[0]) for batch in batches]
