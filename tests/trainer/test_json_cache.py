"""The cache on disk: torn lines, several processes, kill -9."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from trainer.json_cache import JsonCache, content_key


def test_a_cache_survives_torn_and_foreign_lines(tmp_path):
    good = JsonCache(tmp_path)
    good.put("a", 1)
    good.close()
    lines = (
        '{"key": "b", "value": 2}',
        "nonsense",
        '{"key": "c", "val',
        "",
        '{"key": "d", "value": 4}',
    )
    torn = "\n".join([*lines, '{"key": "e"'])
    (tmp_path / "torn.jsonl").write_text(torn)
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)) + b"\n")
    (tmp_path / "long.jsonl").write_bytes(b"x" * (3 << 20) + b'\n{"key": "f", "value": 6}\n')
    cache = JsonCache(tmp_path)
    assert [cache.get(key) for key in "abcdef"] == [1, 2, None, 4, None, 6]
    with (tmp_path / "torn.jsonl").open("a") as file:  # its writer goes on
        file.write(', "value": 5}\n')
    assert len(cache) == 5 and cache.get("e") == 5


def test_a_folder_that_cannot_be_used_leaves_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = JsonCache(tmp_path / "file" / "folder")
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1 and cache.get("c") is None
    assert caplog.text.count("in memory alone") == 1


def test_after_a_fork_each_writes_its_own_file(tmp_path):
    cache = JsonCache(tmp_path)
    cache.put("parent", 1)
    pid = os.fork()
    if pid == 0:
        cache.put("child", 2)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert JsonCache(tmp_path).get("child") == 2


WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from trainer.json_cache import JsonCache, content_key
cache = JsonCache(sys.argv[1])
for n in range(100_000):
    cache.put(content_key([sys.argv[2], n]), [sys.argv[2], n, "x" * (n % 3000)])
    print(n, flush=True)
"""


def test_several_processes_that_are_killed_lose_nothing_that_was_put(tmp_path):
    root = str(Path(__file__).parents[2])
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name, root],
            stdout=subprocess.PIPE, text=True,
        )
        for name in "abc"
    ]  # fmt: skip
    reader = JsonCache(tmp_path)
    done = {}
    for writer, name in zip(writers, "abc", strict=True):
        for line in writer.stdout:
            if int(line) == 200 + random.Random(name).randrange(100):
                break
        writer.send_signal(signal.SIGKILL)
        rest = writer.communicate()[0].split()
        done[name] = int(rest[-1]) if rest else int(line)
    assert len(reader) >= sum(done.values())
    for name, last in done.items():
        for n in range(last + 1):
            assert reader.get(content_key([name, n])) == [name, n, "x" * (n % 3000)]
    assert reader.damaged == 0
