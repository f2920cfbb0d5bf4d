"""The python tool's sessions: what lives from call to call, what is lost, and who is told."""

import asyncio
import json
import os
import re
import signal
import time

import pytest
from PIL import Image, ImageChops
from test_tools_python import SETTINGS, forked, zygotes

from trainer.tools import PythonTool, Toolbox, ToolInfraError
from trainer.tools.protocol import spec_of
from trainer.types import Observation, Session

LOST = "[variables and files of earlier calls are lost: {}]\n"
ENDED = LOST.format("the last call ended the process")


@pytest.fixture(scope="module")
def python():
    with PythonTool(timeout=1, workers=2, **SETTINGS) as tool:
        yield tool


@pytest.fixture
def picture():
    return Image.radial_gradient("L").resize((128, 96)).convert("RGB")


def talk(tool, codes, session=None, end=True):
    """The texts of a session's calls."""

    async def main():
        talking = session or Session([])
        texts = [(await tool.call(talking, code)).text for code in codes]
        if end:
            await tool.end(talking)
        return texts

    return asyncio.run(main())


def test_variables_imports_and_files_live(python):
    assert talk(
        python,
        [
            "import json as j\nx = [1]\ndef f(): return len(x)\nopen('a', 'w').write('text')",
            "x.append(2)\nf(), j.dumps(x), open('a').read()",
            "class A: pass\na = A()",
            "type(a).__name__, __name__",
        ],
    ) == ["4", "(2, '[1, 2]', 'text')", "(no output)", "('A', '__main__')"]


def test_an_error_does_not_end_a_session(python):
    codes = ["x = 5\n1 / 0", "x", "import sys\nsys.exit(1)", "x", "bytearray(1 << 30)", "x"]
    texts = talk(python, codes)
    assert texts[1::2] == ["5", "5", "5"]
    assert texts[0] == "ZeroDivisionError: division by zero (line 2)"
    assert texts[4].startswith("MemoryError")


def test_sessions_do_not_see_one_another(python):
    async def main():
        one, two = Session([]), Session([])
        await python.call(one, "x = 1\nopen('file', 'w').write('one')\nnp.mark = 1\nimport os")
        code = "import os\nprint(os.listdir('.'), hasattr(np, 'mark'))\nx"
        text = (await python.call(two, code)).text
        again = (await python.call(one, "x, np.mark, os.listdir('.')")).text
        await asyncio.gather(python.end(one), python.end(two))
        return text, again

    assert asyncio.run(main()) == (
        "[] False\nNameError: name 'x' is not defined (line 3)",
        "(1, 1, ['file'])",
    )


def test_images_are_anew_each_call_and_new_ones_join(python, picture):
    async def main():
        session = Session([picture])
        show = await python.call(session, "show(image_1.crop((0, 0, 9, 9)))")
        await python.call(
            session, "image_1.paste(0, (0, 0, 128, 96))\nimage_2.paste(0, (0, 0, 9, 9))"
        )
        session.images.append(Image.new("RGB", (3, 3), (1, 2, 3)))  # another tool's
        back = await python.call(session, "image_3.getpixel((0, 0)), show(image_1, image_2)")
        gone = await python.call(session, "image_3.size\nimage_9")
        await python.end(session)
        return session, show, back, gone

    session, show, back, gone = asyncio.run(main())
    assert back.text.startswith("((1, 2, 3)")
    for image, original in zip(back.images, (picture, show.images[0]), strict=True):
        assert ImageChops.difference(image, original).getbbox() is None
    assert gone.text.startswith("NameError")
    assert len(session.images) == 5


PAINT = {
    "paste": "image_1.paste(0, (0, 0, 128, 96))",
    "putpixel": "[image_1.putpixel((x, 5), (0, 0, 0)) for x in range(128)]; None",
    "draw": "from PIL import ImageDraw\nImageDraw.Draw(image_1).rectangle((0, 0, 99, 99), fill=7)",
    "pixel access": "p = image_1.load()\nfor x in range(128): p[x, 5] = (0, 0, 0)",
    "thumbnail": "image_1.thumbnail((9, 9))",
    "putdata": "image_1.putdata([(1, 2, 3)] * (128 * 96))",
    "through another name": "other = globals()['image_' + '1']; other.paste(0, (0, 0, 128, 96))",
}


@pytest.mark.parametrize("name", PAINT)
def test_what_paints_over_an_image_is_gone_at_the_next_call(python, picture, name):
    async def main():
        session = Session([picture])
        painted = await python.call(session, f"{PAINT[name]}\nshow(image_1)")
        after = await python.call(session, "show(image_1)")
        await python.end(session)
        return painted, after

    painted, after = asyncio.run(main())
    assert painted.images[0].tobytes() != picture.tobytes()
    assert after.images[0].tobytes() == picture.tobytes()


def test_files_that_are_deleted_count_no_more():
    with PythonTool(workers=1, timeout=20, **{**SETTINGS, "disk": 4 << 20}) as tool:
        write = "import os\nfor n in range(3): open(str(n), 'wb').write(bytes(1 << 20))"
        clear = "for n in range(3): os.unlink(str(n))"
        assert talk(tool, [write, clear] * 3) == ["(no output)"] * 6


def test_images_are_sent_on_however_many(python):
    """More than a pipe holds, to a process that is not reading yet."""

    async def main():
        session = Session([])
        await python.call(session, "1")
        session.images += [Image.new("RGB", (1000, 1000), (i, 0, 0)) for i in range(4)]
        text = (
            await python.call(session, "[i.getpixel((9, 9))[0] for i in (image_1, image_4)]")
        ).text
        await python.end(session)
        return text

    assert asyncio.run(main()) == "[0, 3]"


@pytest.mark.parametrize(
    ("code", "first"),
    [
        ("while True: pass", "Error: timed out after 1 s"),
        ("import os; os._exit(3)", "Error: the process ended without a result"),
        ("import ctypes; ctypes.string_at(0)", r"Error: .* \(SIGSEGV\)"),
        ("import os; os.write(3, b'\\xff' * 99)", "Error: the process wrote a malformed result"),
        ("import os; os.close(3)", "Error: the process ended without a result"),
        ("import os; os.kill(os.getpid(), 19)", "Error: timed out after 1 s"),
    ],
)
def test_a_crash_loses_the_state_and_the_next_call_says_so(python, code, first):
    texts = talk(python, ["x = 1", code, "x = 2\nx", "x"])
    assert re.fullmatch(first, texts[1])
    assert texts[2:] == [f"{ENDED}2", "2"]


def test_the_first_call_may_crash(python):
    assert talk(python, ["import os; os._exit(0)", "7", "7"])[1:] == [f"{ENDED}7", "7"]


def test_a_closed_request_pipe_is_found_at_the_next_call(python):
    texts = talk(python, ["import os; os.close(4)", "7", "7"])
    assert texts[1].endswith(("7", "without a result")) and texts[2].endswith("7")


def test_nothing_of_a_session_runs_between_its_calls(python):
    code = (
        "import threading, time, os\nn = 0\n"
        "def count():\n    global n\n    while True: n += 1; time.sleep(0.001)\n"
        "threading.Thread(target=count, daemon=True).start()\n"
        "import subprocess\np = subprocess.Popen(['sleep', '60'])\nprint(n)"
    )

    async def main():
        session = Session([])
        await python.call(session, code)
        before = int((await python.call(session, "m = n\nn")).text)
        await asyncio.sleep(0.5)
        text = (await python.call(session, "n, p.poll() is not None")).text
        await python.end(session)
        return before, text

    before, text = asyncio.run(main())
    after, ended = re.fullmatch(r"\((\d+), (True|False)\)", text).groups()
    assert int(after) < before + 100 and ended == "True"


def test_end_leaves_no_process_and_no_file(python):
    async def main():
        sessions = [Session([]) for _ in range(6)]
        await asyncio.gather(*(python.call(s, "open('f', 'w')") for s in sessions))
        live = len(forked(python))
        await asyncio.gather(*(python.end(s) for s in sessions))
        await python.end(sessions[0])  # again
        await python.end(Session([]))  # never began
        return live

    assert asyncio.run(main()) == 6
    assert forked(python) == []
    assert python._states == {}


def test_the_one_unused_for_longest_makes_room():
    with PythonTool(workers=1, max_sessions=2, **SETTINGS) as tool:

        async def main():
            a, b, c = (Session([]) for _ in range(3))
            await tool.call(a, "x = 'a'")
            await tool.call(b, "x = 'b'")
            await tool.call(a, "x")
            await tool.call(c, "x = 'c'")
            texts = [(await tool.call(s, "x")).text for s in (a, c, b)]
            return texts, len(forked(tool))

        texts, count = asyncio.run(main())
    idle = LOST.format("the session was idle and others needed its place")
    assert texts == ["'a'", "'c'", f"{idle}NameError: name 'x' is not defined (line 1)"]
    assert count == 2


def test_a_killed_worker_is_an_infra_error_for_whom_it_held(python):
    async def main():
        held, other = Session([]), Session([])
        box = Toolbox([python])

        async def ask(session, code):
            call = json.dumps({"name": "python", "arguments": {"code": code}})
            return (await box.execute(call, session))[1]

        await ask(held, "x = 1")
        await ask(other, "x = 2")
        for pid in zygotes(python):
            os.kill(pid, signal.SIGKILL)
        statuses = [(await ask(held, "x")).status, (await ask(other, "x")).status]
        new = await ask(Session([]), "7")
        after = await ask(held, "x")
        return statuses, new, after.text

    statuses, new, after = asyncio.run(main())
    assert statuses == ["infra_error", "infra_error"]
    assert new == Observation("7")
    assert after == "NameError: name 'x' is not defined (line 1)"


def test_a_worker_killed_during_a_call(python):
    async def main():
        session = Session([])
        await python.call(session, "x = 1")
        call = asyncio.create_task(python.call(session, "import time; time.sleep(0.9)"))
        await asyncio.sleep(0.3)
        for pid in zygotes(python):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(ToolInfraError, match="worker failed"):
            await call
        return (await python.call(session, "7")).text

    assert asyncio.run(main()) == "7"


def test_the_same_session_gives_the_same_observations(python):
    code = "import random\nrandom.random(), np.random.rand(), hash('x')"
    runs = {tuple(talk(python, [code, code], Session([], seed=5))) for _ in range(3)}
    assert len(runs) == 1
    first, second = runs.pop()
    assert first != second


def test_many_sessions_at_once(python):
    async def main():
        async def one(i):
            session = Session([])
            await python.call(session, f"x = {i}")
            if i % 7 == 0:
                await python.call(session, "import os; os._exit(1)")
            observation = await python.call(session, "x")
            await python.end(session)
            return observation

        return await asyncio.gather(*(one(i) for i in range(28)))

    for i, observation in enumerate(asyncio.run(main())):
        assert observation.text == (
            f"{ENDED}NameError: name 'x' is not defined (line 1)" if i % 7 == 0 else str(i)
        )


def test_cancelled_calls_leave_no_count(python):
    async def main():
        sessions = [Session([]) for _ in range(4)]
        slow = [
            asyncio.create_task(python.call(s, "import time; time.sleep(0.3)")) for s in sessions
        ]
        await asyncio.sleep(0.1)
        for task in slow:
            task.cancel()
        text = (await python.call(Session([]), "7")).text
        for session in sessions:
            await python.end(session)
        return text

    assert asyncio.run(main()) == "7"
    assert [home.waiting for home in python._homes] == [0, 0]


def test_figures_are_shown_and_closed(python):
    pytest.importorskip("matplotlib")
    code = (
        "import matplotlib.pyplot as plt\nfig = plt.figure(figsize=(2, 1), dpi=50)\n"
        "plt.plot([1, 2])\n{}\nprint(len(plt.get_fignums()))"
    )

    async def main():
        session = Session([])
        shown = await python.call(session, code.format("plt.show()"))
        left = await python.call(session, code.format(""))
        many = await python.call(session, "for _ in range(7): plt.figure(figsize=(1, 1), dpi=9)")
        huge = await python.call(session, "f = plt.figure(figsize=(900, 900))")
        again = await python.call(session, "plt.get_fignums(), image_1.size")
        await python.end(session)
        return shown, left, many, huge, again

    shown, left, many, huge, again = asyncio.run(main())
    assert (shown.text, [i.size for i in shown.images]) == ("0", [(100, 50)])
    assert (left.text, [i.size for i in left.images]) == ("1", [(100, 50)])
    assert shown.images[0].getextrema() != ((255, 255),) * 3
    assert [i.size for i in many.images] == [(9, 9)] * 4
    assert many.text == "[3 more images not shown]"
    assert huge == Observation("[figure of 90000x90000 pixels not shown]")
    assert again.text == "([], (100, 50))"


def test_matplotlib_is_imported_with_the_first_code_that_names_it():
    pytest.importorskip("matplotlib")
    loaded = "import sys\n'matplot' 'lib.pyplot' in sys.modules"
    plots = "import matplotlib.pyplot as plt\nplt.figure(figsize=(2, 1), dpi=50)\nplt.show()\n7"

    async def main(python):
        early, late = Session([]), Session([])
        before = (await python.call(early, loaded)).text
        shown = await python.call(early, plots)  # forked before: it imports it itself
        after = (await python.call(late, loaded)).text
        again = await python.call(late, plots)
        return before, shown, after, again

    with PythonTool(workers=1) as python:
        landlock = python.sandbox.landlock
        before, shown, after, again = asyncio.run(main(python))
    # Without Landlock a session could write where matplotlib looks for its settings.
    assert (before, after) == ("False" if landlock else "True", "True")
    for one in (shown, again):
        assert (one.status, one.text, [i.size for i in one.images]) == ("ok", "7", [(100, 50)])


def test_a_figure_that_cannot_be_drawn(python):
    pytest.importorskip("matplotlib")
    code = "import matplotlib.pyplot as plt\ntitle = plt.title('$\\\\bad$')"
    text = talk(python, [code, "7"])
    assert text[0].startswith("ValueError") and text[1] == "7"


def test_what_the_policy_reads():
    with PythonTool(persistent=False) as once, PythonTool() as kept:
        schemas = [spec_of(tool).schema["function"] for tool in (once, kept)]
    assert schemas[0]["description"].endswith("Variables are not kept between calls.")
    assert schemas[1]["description"].endswith("are kept from call to call.")
    assert schemas[0]["parameters"] == schemas[1]["parameters"]
    assert schemas[0]["name"] == schemas[1]["name"] == "python"


@pytest.mark.parametrize("settings", [{"disk": 0}, {"processes": 0}, {"max_sessions": 0}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="must be positive"):
        PythonTool(**settings)


def test_sessions_are_quick(python, picture):
    async def main():
        session, times = Session([picture]), []
        for _ in range(50):
            start = time.perf_counter()
            await python.call(session, "image_1.crop((0, 0, 64, 64)).size")
            times.append(time.perf_counter() - start)
        await python.end(session)
        return sorted(times)[25]

    assert asyncio.run(main()) < 0.05  # measured: 0.6 ms on an idle machine
