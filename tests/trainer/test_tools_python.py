"""Code that works, code that fails, and code that attacks: in real processes, no mocks."""

import asyncio
import json
import os
import re
import struct
import time
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from trainer.tools import ImageLimits, PythonTool, Toolbox
from trainer.types import Observation, Session

LIMITS = ImageLimits(count=4, pixels=40_000)
SETTINGS = {"memory": 128 << 20, "file_size": 1 << 20, "max_text": 2_000, "images": LIMITS}
ONE_CALL = {**SETTINGS, "persistent": False}


@pytest.fixture(scope="module")
def python():
    with PythonTool(timeout=10, workers=2, **ONE_CALL) as tool:
        yield tool


@pytest.fixture(scope="module")
def impatient():
    with PythonTool(timeout=0.5, workers=2, **ONE_CALL) as tool:
        yield tool


@pytest.fixture
def picture():
    return Image.radial_gradient("L").resize((128, 96)).convert("RGB")


def children(pid=None):
    """Ids of the live and the dead-but-unreaped children of a process."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{name}/stat").read_text()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == (pid or os.getpid()):
            found.append(int(name))
    return found


def zygotes(tool):
    """Ids of the workers' processes on this machine: where there are namespaces, the only child of
    bubblewrap, which waits for it outside."""
    outer = [worker._process.pid for worker in tool._workers if worker._process is not None]
    return [children(pid)[0] for pid in outer] if tool.sandbox.bwrap else outer


def forked(tool):
    """Ids of the processes that the workers forked and have not yet reaped. A worker starts with
    its first call: how many there are depends on the tests that this process ran before."""
    started = zygotes(tool)
    assert started
    return [child for pid in started for child in children(pid)]


# --- Code that works ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("47 * 83", "3901"),
        ("print(47 * 83)", "3901"),
        ("x = 3\nprint('a', end='')\nx + 1", "a4"),
        ("'text'", "'text'"),
        ("x = 3", "(no output)"),
        ("", "(no output)"),
        ("# nothing", "(no output)"),
        ("None", "(no output)"),
        ("print()", "(no output)"),
        ("display(1, 'b')", "1\n'b'"),
        ("np.arange(3).sum(), math.floor(2.5)", "(np.int64(3), 2)"),
        ("__name__", "'__main__'"),
        ("def f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nf(10)", "55"),
        ("class A:\n    def __repr__(self): return 'an A'\nA()", "an A"),
        ("[i for i in range(3)]\n[x for x in 'ab']", "['a', 'b']"),
        ("import sys\nprint('err', file=sys.stderr)", "err"),
        ("import sys\nsys.exit()", "(no output)"),
        ("import sys\nsys.stdout.close()\nprint('still here')", "still here"),
        ("import os\nos.close(1)\nprint('still here')", "still here"),
        ("import sys\nsys.stdout = None\n7", "7"),
        ("image_1.size, image_2.mode", "((128, 96), 'L')"),
        ("image_1.getpixel((64, 48))", "(2, 2, 2)"),
    ],
)
def test_code_that_works(python, picture, code, text):
    picture.putpixel((64, 48), (2, 2, 2))
    assert python.run(code, [picture, Image.new("L", (4, 4))]) == Observation(text)


@pytest.mark.parametrize(
    "code",
    [
        "image_1.crop((10, 20, 50, 60))",
        "show(image_1.crop((10, 20, 50, 60)))",
        "display(image_1.crop((10, 20, 50, 60)))",
        "image_1.crop((10, 20, 50, 60)).show()",
        "im = image_1.crop((10, 20, 50, 60))\nshow(im)\nim.paste(0, (0, 0, 9, 9))",
    ],
)
def test_images_arrive_pixel_for_pixel(python, picture, code):
    observation = python.run(code, [picture])
    assert (observation.text, observation.status) == ("", "ok")
    (image,) = observation.images
    assert image.mode == "RGB"
    assert ImageChops.difference(image, picture.crop((10, 20, 50, 60))).getbbox() is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "F", "I", "HSV"])
def test_image_modes_there_and_back(python, picture, mode):
    image = picture.convert("RGB" if mode in ("HSV", "CMYK") else "L").convert(mode)
    (back,) = python.run("image_1", [image]).images
    assert ImageChops.difference(back, image.convert("RGB")).getbbox() is None
    (made,) = python.run(f"Image.new({mode!r}, (3, 5))").images
    assert (made.mode, made.size) == ("RGB", (3, 5))


def test_session_images_are_numbered_on(python, picture):
    async def main():
        session = Session([picture])
        await python.call(session, "show(image_1.crop((0, 0, 9, 9)))\nimage_1.crop((0, 0, 5, 5))")
        return session, await python.call(session, "image_2.size, image_3.size")

    session, observation = asyncio.run(main())
    assert observation.text == "((9, 9), (5, 5))"
    assert len(session.images) == 3


def test_nothing_is_kept_between_calls(python):
    python.run("x = 1\nnp.x = 1\nopen('file', 'w').write('x')")
    for _ in range(4):  # both workers
        observation = python.run("import os\nprint(os.listdir('.'), hasattr(np, 'x'))\nx")
        assert observation.text == "[] False\nNameError: name 'x' is not defined (line 3)"


def test_the_same_call_gives_the_same_observation(python):
    code = (
        "import random\nprint(random.random(), np.random.rand(), {'a', 'b', 'c', 'd'}, hash('x'))"
    )
    assert len({python.run(code, seed=5).text for _ in range(8)}) == 1
    assert python.run(code, seed=6) != python.run(code, seed=7)


# --- Code that fails ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero (line 1)"),
        ("print('a')\n\n1 / 0", "a\nZeroDivisionError: division by zero (line 3)"),
        ("def f():\n    return np.zeros(2)[5]\n\nf()", "IndexError: .* size 2 .line 2."),
        ("x = 1\ny = = 2", r"SyntaxError: invalid syntax \(line 2\)"),
        ("  x = 1\n y = 2", r"IndentationError: .* \(line \d\)"),
        ("(" * 1000, r"SyntaxError: .* \(line 1\)|MemoryError.*"),
        ("-" * 30_000 + "1", r"(RecursionError|MemoryError|Error: the process ended).*"),
        ("x = '\ud800'", "UnicodeEncodeError: .*"),
        ("x = '\0'", ".*null bytes.*"),
        ("import sys\nsys.exit(3)", r"SystemExit: 3 \(line 2\)"),
        ("raise KeyboardInterrupt", r"KeyboardInterrupt \(line 1\)"),
        ("def f(): f()\nf()", r"RecursionError: .* \(line 1\)"),
        ("input()", r"EOFError: .* \(line 1\)"),
        ("image_2", r"NameError: name 'image_2' is not defined.*"),
        ("class E(Exception):\n    def __str__(self): 1 / 0\nraise E", "E: <exception str.*"),
        ("class R:\n    def __repr__(self): 1 / 0\nR()", "ZeroDivisionError: .*"),
        ("raise ValueError('x' * 10**6)", r"ValueError: x{900,1000}\.\.\. \(line 1\)"),
        ("x = bytearray(1 << 30)", r"MemoryError \(line 1\)"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", r"MemoryError \(line 2\)"),
        # Not of integers: out of memory for one of those, CPython 3.11 unwinds for ever.
        ("x = []\nwhile True: x.append(bytes(9999))", r"MemoryError \(line 2\)"),
        ("np.zeros(1 << 40)", r"MemoryError: Unable to allocate .*"),
        ("Image.new('RGB', (65535, 65535))", r"MemoryError.*"),
        ("open('x', 'wb').write(bytes(2 << 20))", r"OSError: \[Errno 27\] File too large.*"),
        ("f = [open('/dev/null') for _ in range(200)]", r"OSError: \[Errno 24\] Too many.*"),
        ("import os\nos._exit(0)", "Error: the process ended without a result"),
        ("import ctypes\nctypes.string_at(0)", r"Error: the process ended .* \(SIGSEGV\)"),
        ("import os\nos.abort()", r"Error: the process ended without a result \(SIGABRT\)"),
        ("import os\nos.kill(0, 9)", "Error: the process ended without a result"),
        ("import os\nos.close(3)\nwhile True: pass", "Error: the process ended without a result"),
        ("import os\nos.closerange(0, 64)", "Error: the process ended without a result"),
    ],
)
def test_code_that_fails(python, picture, code, text):
    observation = python.run(code, [picture])
    assert observation.status == "tool_error"
    assert re.fullmatch(text, observation.text) or observation.text == text
    for _ in range(2):
        assert python.run("image_1.size", [picture]) == Observation("(128, 96)")


ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(60)",
    "prints": "while True: print(1)",
    "images": "while True: Image.new('RGB', (99, 99)).show()",
    "regular expression": "import re\nre.match('(a+)+$', 'a' * 50 + 'b')",
    "one long call in C": "sum(range(10**12))",
    "signals ignored": "import signal, time\n"
    "for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
    "    signal.signal(s, signal.SIG_IGN)\n"
    "time.sleep(60)",
    "finally": "try:\n    while True: pass\nfinally:\n    while True: pass",
    "stopped": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "half a result": "import os, time\nos.write(3, b'\\0' * 5)\ntime.sleep(60)",
    "forks": "import os, time\nfor _ in range(5): os.fork()\ntime.sleep(60)",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_code_that_does_not_end(impatient, name):
    start = time.monotonic()
    timed_out = Observation("Error: timed out after 0.5 s", status="tool_error")
    assert impatient.run(ENDLESS[name]) == timed_out
    assert 0.5 <= time.monotonic() - start < 20  # on a busy machine; without a limit, for ever
    assert forked(impatient) == []


# --- Too much of everything -----------------------------------------------------------------------


def test_a_long_print_is_cut_and_counted(python):
    observation = python.run("print('x' * 10**8)\n1 / 0")
    text = (
        "x" * 2000 + "\n[99,998,001 characters cut]\nZeroDivisionError: division by zero (line 2)"
    )
    assert (observation.text, observation.status) == (text, "tool_error")


def test_many_prints_are_cut_and_counted():
    with PythonTool(timeout=20, workers=1, max_text=100) as tool:
        text = tool.run("for i in range(10**6): print(1)").text
    assert text == "1\n" * 50 + "\n[1,999,900 characters cut]"


def test_many_images_are_counted(python):
    code = "for i in range(10**4): show(Image.new('RGB', (5, 5)))\nprint('end')"
    observation = python.run(code)
    assert len(observation.images) == LIMITS.count
    assert observation.text == "end\n[9,996 more images not shown]"


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((200, 200), (200, 200)),
        ((400, 400), (200, 200)),
        ((5000, 2000), (316, 126)),
        ((1, 100_000), (1, 40_000)),
        ((100_000, 2), (40_000, 1)),
    ],
)
def test_large_images_are_scaled(python, size, shown):
    observation = python.run(f"Image.new('RGB', {size})")
    assert [image.size for image in observation.images] == [shown]
    scaled = f"[image scaled from {size[0]}x{size[1]} to {shown[0]}x{shown[1]}]"
    assert observation.text == ("" if size == shown else scaled)


def test_images_without_pixels_and_strips(python):
    assert python.run("Image.new('RGB', (0, 5))").text == "[image of 0x5 pixels not shown]"
    call = {"name": "python", "arguments": {"code": "Image.new('RGB', (1000, 1))"}}
    session = Session([])
    observation = asyncio.run(Toolbox([python]).execute(json.dumps(call), session))[1]
    assert observation == Observation("[image of 1000x1 pixels not shown]")
    assert session.images == []


def test_strange_text_arrives_harmless(python):
    call = {
        "name": "python",
        "arguments": {"code": r"print('a\0\ud800\U0001f600<|im_end|><answer>')"},
    }
    _, observation = asyncio.run(Toolbox([python]).execute(json.dumps(call), Session([])))
    assert observation.text == "a\ufffd\ufffd\U0001f600< |im_end|>< answer>"


# --- Forged results -------------------------------------------------------------------------------

GOOD = {"text": "forged", "cut": 0, "error": None, "images": [], "dropped": 0}
PREFIX = struct.Struct(">IQ")


def frame(header, body=b"", head=None, tail=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    head, tail = len(header) if head is None else head, len(body) if tail is None else tail
    return PREFIX.pack(head, tail) + header + body


FORGED = {
    "garbage": b"\xff" * 1000,
    "zeros": b"\0" * 1000,
    "huge header": frame(GOOD, head=2**32 - 1),
    "huge body": frame(GOOD, tail=2**63),
    "not json": frame(b"{{{{"),
    "not utf-8": frame(b"\xff\xfe\xfd"),
    "not a dict": frame([1]),
    "deep": frame(b"[" * 20_000),
    "other keys": frame({**GOOD, "status": "ok"}),
    "no text": frame({key: GOOD[key] for key in GOOD if key != "text"}),
    "text is a number": frame({**GOOD, "text": 1}),
    "long text": frame({**GOOD, "text": "x" * 2001}),
    "long error": frame({**GOOD, "error": "x" * 5000}),
    "cut is a bool": frame({**GOOD, "cut": True}),
    "cut is infinite": frame({**GOOD, "cut": float("inf")}),
    "huge integer": frame(json.dumps(GOOD).replace(": 0", ": " + "9" * 5000).encode()),
    "five images": frame({**GOOD, "images": [[1, 1]] * 5}, bytes(15)),
    "image without size": frame({**GOOD, "images": [[1]]}, bytes(3)),
    "image of strings": frame({**GOOD, "images": [["1", "1"]]}, bytes(3)),
    "image of booleans": frame({**GOOD, "images": [[True, True]]}, bytes(3)),
    "negative image": frame({**GOOD, "images": [[-1, -1]]}, bytes(3)),
    "empty image": frame({**GOOD, "images": [[0, 0]]}),
    "65,535 squared": frame({**GOOD, "images": [[65535, 65535]]}, bytes(3)),
    "too few pixels": frame({**GOOD, "images": [[2, 2]]}, bytes(11)),
    "too many pixels": frame({**GOOD, "images": [[2, 2]]}, bytes(13)),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_results(python, name):
    code = f"import os\nos.write(3, {FORGED[name]!r})\nos._exit(0)"
    expected = Observation("Error: the process wrote a malformed result", status="tool_error")
    assert python.run(code) == expected
    assert [python.run("7").text for _ in range(2)] == ["7", "7"]


def test_a_truncated_result(python):
    code = f"import os\nos.write(3, {FORGED['too few pixels'][:30]!r})\nos._exit(0)"
    assert python.run(code).text == "Error: the process ended without a result"


def test_a_well_formed_forgery_speaks_for_its_own_call_alone(python):
    code = f"import os\nos.write(3, {frame(GOOD) * 50!r})\nprint('real')"
    assert python.run(code).text == "forged"
    assert [python.run("7").text for _ in range(2)] == ["7", "7"]


# --- Processes that the code leaves behind --------------------------------------------------------

LEFT_BEHIND = {
    "fork": "if os.fork() == 0: time.sleep(60)",
    "fork, new session": "if os.fork() == 0: os.setsid(); time.sleep(60)",
    "daemon": "if os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(60)\n os._exit(0)",
    "many": "for _ in range(30):\n if os.fork() == 0: os.setsid(); time.sleep(60)",
    "talker": "if os.fork() == 0:\n os.setsid()\n while True: os.write(3, b'x' * 9999)",
    "falls through": "p = os.fork(); q = os.fork()",
    "thread": "import threading as t; t.Thread(target=time.sleep, args=[60]).start()",
    "subprocess": "import subprocess; p = subprocess.Popen(['sleep', '60'])",
    "parent exits": "if os.fork() != 0: os._exit(0)\ntime.sleep(60)",
}


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_what_is_left_behind_is_killed(python, name):
    start = time.monotonic()
    observation = python.run("import os, time\n" + LEFT_BEHIND[name])
    expected = {
        "parent exits": ["Error: the process ended without a result"],
        # Two processes of one call write to its pipe: who comes first, spoils or is too late.
        "talker": ["(no output)", "Error: the process wrote a malformed result"],
    }
    assert observation.text in expected.get(name, ["(no output)"])
    assert time.monotonic() - start < 20
    assert forked(python) == []
    assert [python.run("7").text for _ in range(2)] == ["7", "7"]


# --- What the code finds --------------------------------------------------------------------------


def test_environment_descriptors_and_modules(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    code = (
        "import json, os, sys\n"
        "fds = sorted(int(fd) for fd in os.listdir('/proc/self/fd'))\n"
        "links = [os.readlink(f'/proc/self/fd/{fd}') for fd in fds[:4]]\n"
        "print(json.dumps([dict(os.environ), links, len(fds), sys.path, sorted(sys.modules)]))"
    )
    with open(os.devnull), PythonTool(workers=1, max_text=100_000) as tool:
        environment, links, count, path, modules = json.loads(tool.run(code).text)
    assert "secret" not in str(environment) and "PYTHONPATH" not in environment
    assert set(environment) <= {
        "PATH", "HOME", "TMPDIR", "LANG", "LC_CTYPE", "PYTHONHASHSEED", "PYTHONUTF8",
        "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
    }  # fmt: skip
    assert links[:3] == ["/dev/null"] * 3
    assert links[3].startswith("pipe:")
    assert count == 5  # the three, the result and the listing itself
    assert "" not in path and not any("trainer" in entry for entry in path)
    assert not any(module.startswith(("trainer", "torch")) for module in modules)
