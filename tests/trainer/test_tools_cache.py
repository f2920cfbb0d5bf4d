"""What web providers keep: the cache under many processes, kills and damage; the rate."""

import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from trainer.tools import _cache
from trainer.tools._cache import Cache, RateLimit

FOLDER = os.path.dirname(_cache.__file__)


def test_entries_grow_old(tmp_path):
    cache = Cache(tmp_path / "cache.sqlite", ttl=1.0)
    cache.put("a", b"1")
    assert cache.get("a") == b"1" and cache.get("b") is None
    time.sleep(1.1)
    assert cache.get("a") is None
    cache.put("b", b"2")
    with sqlite3.connect(tmp_path / "cache.sqlite") as db:
        assert db.execute("SELECT key FROM entry").fetchall() == [("b",)]
    cache.close()
    assert cache.get("b") == b"2"


def test_the_oldest_go_where_space_is_short(tmp_path):
    cache = Cache(tmp_path / "cache.sqlite", max_bytes=500_000)
    for n in range(200):
        cache.put(f"k{n}", os.urandom(10_000))
    assert cache.get("k199") is not None and cache.get("k0") is None
    assert cache.get("k180") is not None
    cache.close()
    assert os.path.getsize(tmp_path / "cache.sqlite") < 600_000
    small = Cache(tmp_path / "small.sqlite", max_bytes=1)
    small.put("a", b"x")  # nothing fits; it must end
    assert small.get("a") is None


def test_a_damaged_cache_is_put_aside(tmp_path, caplog):
    path = tmp_path / "cache.sqlite"
    for content in (b"garbage" * 1000, b"SQLite format 3\0" + b"\xff" * 4096):
        path.write_bytes(content)
        cache = Cache(path)
        assert cache.get("a") is None
        cache.put("a", b"1")
        assert cache.get("a") == b"1"
        cache.close()
        assert (tmp_path / "cache.sqlite.damaged").read_bytes() == content
    assert "put aside" in caplog.text


WRITER = """
import sys
sys.path.insert(0, sys.argv[4])  # not by way of the package: that imports for a second
from _cache import Cache
cache = Cache(sys.argv[1])
for n in range(int(sys.argv[3])):
    cache.put(f"{sys.argv[2]}-{n}", (str(n) * 3000).encode())
    print(n, flush=True)
"""


def writer(path, name, count):
    command = [sys.executable, "-c", WRITER, path, name, str(count), FOLDER]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_many_processes_share_a_cache(tmp_path):
    path = tmp_path / "cache.sqlite"
    processes = [writer(path, f"p{n}", 50) for n in range(3)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    cache = Cache(path)
    for n in range(3):
        for i in range(50):
            assert cache.get(f"p{n}-{i}") == (str(i) * 3000).encode()


def test_a_killed_process_loses_no_entry_of_another_or_of_its_past(tmp_path):
    path = tmp_path / "cache.sqlite"
    written = {}
    for kill in range(3):
        process = writer(path, f"k{kill}", 100_000)
        for line in process.stdout:
            written[f"k{kill}-{line.strip()}"] = (line.strip() * 3000).encode()
            if int(line) == 20 + 13 * kill:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    cache = Cache(path)
    assert all(cache.get(key) == value for key, value in written.items()) and len(written) > 90
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_forked_child_opens_the_cache_anew(tmp_path):
    cache = Cache(tmp_path / "cache.sqlite")
    cache.put("a", b"1")
    pid = os.fork()
    if pid == 0:
        ok = cache.get("a") == b"1"
        cache.put("b", b"2")
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert cache.get("b") == b"2"


def test_a_bucket_against_its_definition():
    limit = RateLimit(10.0, burst=5)
    waits = [limit.reserve(10.0) for _ in range(10)]
    assert waits[:5] == [0.0] * 5
    assert all(abs(wait - n / 10) < 0.05 for n, wait in enumerate(waits[5:], 1))
    assert limit.reserve(0.1) is None and limit.reserve(-1.0) is None
    assert limit.reserve(1.0) <= 0.6, "what was refused has taken no turn"
    limit.pause(5.0)
    assert 4.9 < limit.reserve(10.0) < 5.1


def test_bad_settings(tmp_path):
    for options in ({"ttl": 0}, {"ttl": -1.0}, {"max_bytes": 0}):
        with pytest.raises(ValueError, match="positive"):
            Cache(tmp_path / "x", **options)
    for rate in ((0,), (-1,), (float("nan"),), (float("inf"),), (1, 0)):
        with pytest.raises(ValueError, match="per_second"):
            RateLimit(*rate)
