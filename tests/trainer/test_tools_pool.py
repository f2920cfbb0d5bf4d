"""The pool behind the python tool: concurrency, workers that die, and what is left at the end."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from test_tools_python import ONE_CALL, children, forked, zygotes

from trainer.tools import PythonTool, ToolInfraError
from trainer.types import Session


@pytest.fixture(scope="module")
def python():
    with PythonTool(timeout=1, workers=2, **ONE_CALL) as tool:
        yield tool


@pytest.fixture
def picture():
    return Image.radial_gradient("L").resize((128, 96)).convert("RGB")


def descendants(pid):
    found = [pid]
    for member in found:
        found += children(member)
    return found[1:]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def eventually(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_images_are_sent_once_and_forgotten_in_time(monkeypatch):
    monkeypatch.setattr("trainer.tools._python_pool.HELD_BYTES", 4 * 100 * 3)
    images = [Image.new("RGB", (10, 10), (i, 0, 0)) for i in range(8)]
    code = "[v.getpixel((0, 0))[0] for k, v in sorted(globals().items()) if k.startswith('image_')]"
    with PythonTool(workers=1) as tool:
        for shown in (
            [0, 1],
            [0, 0, 2],
            [3],
            [1, 3],
            [0, 1, 2, 3, 4],
            [4, 3, 2, 1, 0],
            [7],
            [],
            [0],
        ):
            assert tool.run(code, [images[i] for i in shown]).text == str(shown)
            assert len(tool._workers[0]._held) <= max(3, len(shown))
            tool.run("image_1.paste(99, (0, 0, 9, 9))", [images[0]])  # in the child alone
        os.kill(zygotes(tool)[0], signal.SIGKILL)
        assert tool.run(code, images).text == str(list(range(8)))
    passing = PythonTool(workers=1)
    for i in range(50):  # ids of images that are gone come again
        assert passing.run(code, [Image.new("RGB", (10, 10), (i, 0, 0))]).text == f"[{i}]"
    passing.close()


def test_neighbours_are_unharmed(python, picture):
    attacks = [
        "while True: pass",
        "import os; os._exit(1)",
        "import ctypes; ctypes.string_at(0)",
        "x = [bytearray(1 << 20) for _ in range(10**6)]",
        "import os; os.write(3, b'x' * 10**6)",
        "print('x' * 10**7)",
    ]

    async def main():
        codes = [code for i in range(30) for code in (f"image_1.crop((0, 0, {i + 1}, 9))", None)]
        codes = [code or attacks[i % len(attacks)] for i, code in enumerate(codes[:36])]
        calls = [python.call(Session([picture]), code) for code in codes]
        return codes, await asyncio.gather(*calls)

    codes, observations = asyncio.run(main())
    for i, (code, observation) in enumerate(zip(codes, observations, strict=True)):
        if code.startswith("image_1"):
            assert [image.size for image in observation.images] == [(i // 2 + 1, 9)]
        elif "print" not in code:
            assert observation.status == "tool_error"


def test_workers_run_at_the_same_time():
    async def main():
        with PythonTool(workers=2) as tool:
            warm = [tool.call(Session([]), "import time; time.sleep(0.3)") for _ in range(2)]
            await asyncio.gather(*warm)
            start = time.monotonic()
            calls = [tool.call(Session([]), "import time; time.sleep(0.5)") for _ in range(2)]
            await asyncio.gather(*calls)
            return time.monotonic() - start

    assert asyncio.run(main()) < 0.9


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hung_worker_is_replaced(number, monkeypatch):
    monkeypatch.setattr("trainer.tools.python.GRACE_SECONDS", 0.2)
    with PythonTool(workers=1, timeout=1) as tool:
        assert tool.run("7").text == "7"
        (before,) = zygotes(tool)
        os.kill(before, number)
        assert tool.run("7").text == "7"
        assert zygotes(tool) != [before]
        assert gone(before)


def test_a_worker_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr("trainer.tools._python_pool.BOOT", "import no_such_module")
    with PythonTool(workers=1) as tool:
        with pytest.raises(ToolInfraError, match="No module named 'no_such_module'"):
            tool.run("7")


def test_cancelled_calls_leave_the_pool_whole(python):
    async def main():
        slow = [python.call(Session([]), "import time; time.sleep(0.5); 'old'") for _ in range(6)]
        tasks = [asyncio.create_task(call) for call in slow]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*(python.call(Session([]), str(i)) for i in range(10)))
        return [result.text for result in results]

    assert asyncio.run(main()) == [str(i) for i in range(10)]


def test_a_thousand_calls_leave_nothing(python, picture):
    def state():
        return len(os.listdir("/proc/self/fd")), sorted(children())

    async def calls(count):
        codes = ("image_1.crop((0, 0, 64, 64))", "1 / 0", "import os; os._exit(1)", "print(1)")
        sessions = [Session([picture]) for _ in range(count)]
        await asyncio.gather(*(python.call(s, codes[i % 4]) for i, s in enumerate(sessions)))

    async def main():
        await calls(10)
        before = state()
        descriptors = [len(os.listdir(f"/proc/{pid}/fd")) for pid in zygotes(python)]
        await calls(1000)
        # Fewer: what an earlier test has left to the garbage collector.
        open_files, processes = state()
        assert open_files <= before[0] and processes == before[1]
        after = [len(os.listdir(f"/proc/{pid}/fd")) for pid in zygotes(python)]
        # On a loaded machine one may still have been busy with its start when first looked at.
        assert len(after) == len(descriptors) and max(after) <= max(descriptors)
        assert forked(python) == []

    asyncio.run(main())


def test_close_ends_processes_and_closes_descriptors():
    descriptors, others = len(os.listdir("/proc/self/fd")), set(children())
    tool = PythonTool(workers=2)
    for _ in range(8):
        tool.run("open('file', 'w').write('x')")
    tool.close()
    tool.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors and set(children()) <= others
    with pytest.raises(RuntimeError):
        tool.run("7")


def test_deep_trees_and_links_are_removed_and_only_they(tmp_path):
    (tmp_path / "kept").write_text("x")
    code = (
        f"import os\nos.symlink({str(tmp_path)!r}, 'link')\nopen('file', 'w')\n"
        "for _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')"
    )
    with PythonTool(workers=1) as tool:
        assert tool.run(code).text == "(no output)"
        assert tool.run("import os\nos.listdir('.')").text == "[]"
    assert (tmp_path / "kept").exists()


TRAINER = """
import threading
from trainer.tools import PythonTool
tool = PythonTool(workers=1, timeout=60)
tool.run("1")
print(tool._workers[0]._process.pid, flush=True)
{then}
"""


def trainer(then):
    """Another process that uses the tool: the process, and its worker's id."""
    command = [sys.executable, "-c", TRAINER.format(then=then)]
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("then", ["threading.Event().wait()", "tool.run('while True: pass')"])
def test_a_killed_trainer_takes_its_workers_along(then):
    process, pid = trainer(then)
    if "tool" in then:
        assert eventually(lambda: len(descendants(pid)) >= 2)
    running = descendants(pid)
    process.kill()
    process.wait()
    process.stdout.close()
    assert eventually(lambda: gone(pid) and all(gone(child) for child in running))


def test_a_trainer_that_forgets_to_close_cleans_up():
    process, pid = trainer("")
    assert process.wait(10) == 0
    process.stdout.close()
    assert eventually(lambda: gone(pid))


def test_ctrl_c_is_not_for_the_workers(python):
    python.run("1")
    for pid in zygotes(python):
        assert os.getsid(pid) != os.getsid(0)


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"memory": 0},
        {"workers": 0},
        {"max_text": 0},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError):
        PythonTool(**settings)


def test_a_call_is_quick(python, picture):
    times = []
    for _ in range(100):
        start = time.perf_counter()
        python.run("image_1.crop((0, 0, 64, 64))", [picture])
        times.append(time.perf_counter() - start)
    assert sorted(times)[50] < 0.05  # measured: 5 ms on an idle machine; a tenth of the bound


def test_a_fork_of_the_trainer_does_not_keep_its_workers():
    """A data loader's process, say, that outlives the trainer."""
    code = (
        "import os, time\nif os.fork() == 0:\n    os.close(1)\n    time.sleep(20)\n    os._exit(0)"
    )
    process, pid = trainer(f"{code}\nthreading.Event().wait()")
    assert eventually(lambda: len(children(process.pid)) == 2)
    running, forks = descendants(pid), [c for c in children(process.pid) if c != pid]
    assert running and len(forks) == 1
    process.kill()
    process.wait()
    process.stdout.close()
    assert eventually(lambda: gone(pid) and all(gone(child) for child in running))
    assert not gone(forks[0])
    os.kill(forks[0], signal.SIGKILL)
