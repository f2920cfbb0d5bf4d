import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_files import (
    ANY,
    coldstart_row,
    encoded,
    png,
    question_row,
    reasons,
    rl_row,
    write_coldstart,
    write_lines,
    write_rl,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.data import (
    DataError,
    Dataset,
    RowSet,
    find_files,
    permute,
)
from trainer.data.sources import Cache, open_source


def test_files_folders_and_globs(tmp_path):
    for name in ("b/1.jsonl", "a/2.jsonl", "a/x/1.parquet", "a/.hidden.jsonl", "a/readme.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def names(*paths):
        return [str(path.relative_to(tmp_path)) for path in find_files(paths)]

    assert names(tmp_path) == ["a/2.jsonl", "a/x/1.parquet", "b/1.jsonl"]
    assert names(tmp_path / "b", tmp_path / "a" / "2.jsonl") == ["b/1.jsonl", "a/2.jsonl"]
    assert names(f"{tmp_path}/*/*.jsonl", tmp_path / "b" / "1.jsonl") == [
        "a/2.jsonl",
        "b/1.jsonl",
    ]
    with pytest.raises(DataError, match="nothing.*no such file"):
        find_files(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"end in .parquet, .jsonl, .tsv, not '.md'"):
        find_files(tmp_path / "a" / "readme.md")


def test_several_files_are_one_dataset(tmp_path):
    write_rl(tmp_path / "a.parquet", [rl_row(n) for n in range(3)])
    write_lines(tmp_path / "b.jsonl", [question_row(0), "{", question_row(1)])
    data = Dataset(tmp_path, checks=ANY)
    assert [example.id for example in data][2:] == ["vthinker-sft/source_index_2", "q/0", "q/1"]
    assert reasons(data) == [(4, "not_json")] and data.where(4) == "b.jsonl row 1"
    assert data[5].id == "q/1"
    write_coldstart(tmp_path / "c.parquet", [coldstart_row(0)])
    with pytest.raises(DataError, match="c.parquet holds conversations.*read them apart"):
        Dataset(tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.999])
def test_a_parquet_file_that_was_cut_short(tmp_path, kept):
    path = write_rl(tmp_path / "a.parquet", [rl_row(n) for n in range(20)])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(DataError, match=r"a\.parquet \([\d,]+ bytes\) is no parquet file"):
        Dataset(path)


def test_a_damaged_row_group_is_named(tmp_path):
    path = write_rl(tmp_path / "a.parquet", [rl_row(n) for n in range(30)], row_group_size=10)
    start = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: row group 1 \(rows 10 to 19\)"):
        Dataset(path)


def test_a_file_of_lines_that_was_cut_short(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [question_row(n) for n in range(4)])
    path.write_bytes(path.read_bytes()[:-20])
    data = Dataset(path, checks=ANY)
    [one] = data.rejections
    assert (one.row, one.reason) == (3, "not_json")
    assert "without an end of line" in one.detail and "byte" in one.detail


def test_a_file_without_rows(tmp_path):
    with pytest.raises(DataError, match="no row"):
        Dataset(write_rl(tmp_path / "a.parquet", []))
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="columns are not those"):
        Dataset(tmp_path / "b.jsonl")


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.sources.MAX_LINE", 1000)
    path = write_lines(tmp_path / "a.jsonl", ['{"a": 1}', "x" * 2000])
    with pytest.raises(DataError, match="more than 1,000 bytes"):
        Dataset(path)


@pytest.mark.parametrize("cache_bytes", [1, 40_000, 10**8])
@pytest.mark.parametrize("group", [1, 7, 1000])
def test_random_access_is_the_stream(tmp_path, cache_bytes, group):
    rows = [rl_row(n, images=[{"bytes": png(n, (40 + n, 30))}]) for n in range(60)]
    path = write_rl(tmp_path / "a.parquet", rows, row_group_size=group)
    data = Dataset(path, cache_bytes=cache_bytes, folder=tmp_path)
    streamed = list(data)
    for n in range(60):
        row = permute(n, 60, seed=1)
        assert data[row] == streamed[row]
        largest = max(size for _, size in data.cache._groups.values()) if data.cache.bytes else 0
        assert data.cache.bytes <= max(cache_bytes, largest)
    if cache_bytes == 10**8:
        assert data.cache.misses == -(-60 // group)  # each group once
    assert sorted(tmp_path.iterdir()) == [path]  # what was unpacked has no name


def test_what_was_not_used_for_longest_leaves_the_cache(tmp_path):
    path = write_rl(tmp_path / "a.parquet", [rl_row(n) for n in range(30)], row_group_size=10)
    source = open_source(path, Cache())
    source.read(0, ["images"])
    source = open_source(path, Cache(source._cache.bytes * 5 // 2))  # two of three groups
    source._bytes = lambda group, columns: 1  # never unpacked
    misses = []
    for row in (0, 10, 1, 20, 2, 11):
        source.read(row, ["images"])
        misses.append(source._cache.misses)
    assert misses == [1, 2, 2, 3, 3, 4]


def test_a_group_that_cannot_be_unpacked(tmp_path, monkeypatch):
    path = write_rl(tmp_path / "a.parquet", [rl_row(n) for n in range(30)])
    data = Dataset(path, cache_bytes=1, folder=tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(DataError, match="must be unpacked.* has 100 bytes free"):
        data[3]


def test_several_groups_are_unpacked_into_one_file(tmp_path):
    rows = [rl_row(n) for n in range(40)]
    a = write_rl(tmp_path / "a.parquet", rows[:25], row_group_size=10)
    b = write_rl(tmp_path / "b.parquet", rows[25:], row_group_size=10)
    data = Dataset([a, b], cache_bytes=1, folder=tmp_path)
    for row in (0, 39, 12, 24, 25, 3, 38):
        assert data[row].id == f"vthinker-sft/source_index_{row}"
    assert data.cache.misses == 5 and data.cache.bytes == 0


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_file_that_changes_is_not_read_on(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"

    def write(count):
        if suffix == "parquet":
            return write_rl(path, [rl_row(n) for n in range(count)])
        return write_lines(path, [question_row(n) for n in range(count)])

    data = Dataset(write(20))
    assert data[1] == list(data)[1]
    write(19)
    for use in (lambda: list(data), lambda: data[1]):
        data.cache._groups.clear()
        with pytest.raises(DataError, match="has changed since it was opened"):
            use()


def test_lines_are_found_by_sparse_offsets(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.sources._STRIDE", 1000)
    rows: list = [{"question": "?" * (n * 37 % 900), "answer": n} for n in range(300)]
    path = write_lines(tmp_path / "a.jsonl", [x for row in rows for x in (row, "")])
    source = open_source(path, Cache())
    assert len(source) == 300 and 50 < len(source._offsets) < 200
    for n in range(300):
        assert source.read(n, ["answer", "question"]) == rows[n]
        assert next(source.stream(["answer"], n)) == {"answer": n}
    assert list(source.stream(["answer"], 300)) == []
    assert [row["answer"] for row in source.stream(["answer"], 297)] == [297, 298, 299]


def test_streams_begin_anywhere(tmp_path):
    path = write_rl(tmp_path / "a.parquet", [rl_row(n) for n in range(50)], row_group_size=8)
    source = open_source(path, Cache())
    whole = list(source.stream(["extra_info"]))
    for start in (0, 1, 7, 8, 9, 31, 49, 50):
        assert list(source.stream(["extra_info"], start)) == whole[start:]


def test_memory_does_not_grow_with_the_file(tmp_path):
    """In one row group, with pages of a few rows: scan, stream and random access take as much of
    Arrow's memory for 64 MB as for 32 MB, and less than either."""
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "BMP")
    code = """
import sys
import pyarrow as pa
from trainer.data import Dataset
data = Dataset(sys.argv[1], cache_bytes=2**22, folder=sys.argv[2])
assert sum(1 for _ in data) == int(sys.argv[3])
assert data[400].id == "vthinker-sft/source_index_400" and data.cache.bytes == 0
print(pa.default_memory_pool().max_memory())
"""
    peaks = []
    for count in (480, 960):
        rows = [rl_row(n, images=[{"bytes": data}]) for n in range(count)]
        path = write_rl(
            tmp_path / f"{count}.parquet", rows, write_batch_size=16, use_dictionary=False
        )
        assert path.stat().st_size > count * 65_000
        command = [sys.executable, "-c", code, path, tmp_path, str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 40 * 2**20


@pytest.mark.parametrize("n", [*range(1, 40), 255, 256, 257, 1000])
def test_an_order_is_a_permutation(n):
    for seed, epoch in [(0, 0), (0, 1), (7, 0)]:
        assert sorted(permute(i, n, seed, epoch) for i in range(n)) == list(range(n))


def test_an_order_is_a_function_of_seed_epoch_and_index_alone():
    # Written down: another version or machine must resume in the same order.
    assert [permute(i, 1000, 3, 1) for i in range(5)] == [450, 954, 493, 215, 384]
    far = [permute(i, 10**12, 0) for i in (0, 1, 10**12 - 1)]
    assert len(set(far)) == 3 and all(0 <= place < 10**12 for place in far)
    orders = {
        tuple(permute(i, 50, seed, epoch, attempt) for i in range(50))
        for seed in range(3)
        for epoch in range(3)
        for attempt in range(2)
    }
    assert len(orders) == 18
    for index in (-1, 10):
        with pytest.raises(ValueError, match=r"\[0, 10\)"):
            permute(index, 10, 0)


@pytest.mark.parametrize("n", [3, 6, 10])
def test_every_place_is_equally_likely(n):
    seeds = 3000
    counts = np.zeros((n, n))
    for seed in range(seeds):
        for index in range(n):
            counts[index, permute(index, n, seed)] += 1
    expected = seeds / n
    chi2 = ((counts - expected) ** 2 / expected).sum(axis=1)
    assert chi2.max() < 40  # 9 degrees of freedom: p = 1e-5 at 38


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5000), st.integers(0, 2**32), st.sampled_from([0.0, 0.01, 0.5, 1.0]))
def test_a_row_set_is_its_rows(n, seed, share):
    member = np.random.default_rng(seed).random(n) < share
    rows = RowSet(member)
    assert len(rows) == member.sum()
    assert [rows[k] for k in range(len(rows))] == np.flatnonzero(member).tolist()
    assert [row in rows for row in range(n)] == member.tolist()
    assert np.array_equal(rows.members(), member)
    for k in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[k]
