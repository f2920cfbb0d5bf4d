"""The tool server stops, dies, comes back, is none at all: what its client makes of it."""

import asyncio
import copy
import time

import pytest
from local_server import Handler, LocalServer
from tool_server import UNAVAILABLE, Process, call, picture

from bench import bench_tool_server
from trainer.rollout import Player
from trainer.tasks import load_task
from trainer.tools import ToolInfraError
from trainer.tools.client import RemoteToolbox
from trainer.tools.server import ToolServer
from trainer.tools.service import ServerLimits
from trainer.types import Observation, Session


@pytest.fixture(scope="module")
def server():
    with Process() as process:
        yield process


# --- Stopping and dying ---------------------------------------------------------------------------


def test_sigterm_finishes_what_runs(tmp_path):
    ended = tmp_path / "ended"
    limits = {"concurrency": 1, "stop_seconds": 5}
    with Process(limits=limits, ended=str(ended)) as server:

        async def main():
            async with RemoteToolbox(server.url, retries=0) as box:
                running, queued, idle = Session([]), Session([]), Session([])
                await box.execute("{}", idle)
                first = asyncio.create_task(box.execute(call("wait", seconds=1.0), running))
                await asyncio.sleep(0.3)
                second = asyncio.create_task(box.execute(call("wait", seconds=1.0), queued))
                await asyncio.sleep(0.2)
                server.process.terminate()
                assert (await first)[1] == Observation("waited 1")
                assert (await second)[1] == UNAVAILABLE
                code = await asyncio.to_thread(server.process.wait, 10)
                assert code == 0
                assert set(ended.read_text().split()) == {running.id, queued.id, idle.id}
                assert (await box.execute("{}", Session([])))[1] == UNAVAILABLE

        asyncio.run(main())


def test_sigterm_gives_up_on_what_hangs():
    with Process(limits={"stop_seconds": 0.5}) as server:

        async def main():
            async with RemoteToolbox(server.url, retries=0) as box:
                tasks = [
                    asyncio.create_task(box.execute(text, Session([])))
                    for text in (call("hang"), call("wait", seconds=60))
                ]
                await asyncio.sleep(0.5)
                start = time.monotonic()
                server.process.terminate()
                assert [o for _, o in await asyncio.gather(*tasks)] == [UNAVAILABLE] * 2
                assert await asyncio.to_thread(server.process.wait, 10) == 0
                assert time.monotonic() - start < 8

        asyncio.run(main())


def test_a_server_that_is_killed_and_comes_back():
    first = Process()

    async def main():
        async with RemoteToolbox(first.url, retries=1) as box:
            called, opened_only = Session([picture()]), Session([picture()])
            assert (await box.execute(call("count"), called))[1].status == "ok"
            await box._open(opened_only, None, time.monotonic() + 5)
            running = asyncio.create_task(box.execute(call("wait", seconds=30), Session([])))
            await asyncio.sleep(0.3)
            first.kill()
            assert await running == (None, UNAVAILABLE)
            assert (await box.execute(call("count"), Session([])))[1] == UNAVAILABLE
            assert called.calls == 1
            with Process(port=first.port):
                # What its tools held is lost: the rollout is not scored.
                assert (await box.execute(call("count"), called))[1] == UNAVAILABLE
                # One that had nothing there goes on, images and all; so do new ones.
                assert (await box.execute(call("flip", image=1), opened_only))[1].status == "ok"
                assert (await box.execute(call("count"), Session([])))[1].text == "1 of 1"
                await box.end(called)

    with first:
        asyncio.run(main())


def test_a_lost_answer_is_asked_for_again_and_not_run_again(server):
    """A proxy that hangs up as soon as the server answers to a call, the first three times."""
    cut = []

    async def relay(reader, writer):
        upstream, to_upstream = await asyncio.open_connection("127.0.0.1", server.port)
        asked = bytearray()

        async def there():
            while data := await reader.read(65536):
                asked.extend(data)
                to_upstream.write(data)

        async def back():
            while data := await upstream.read(65536):
                if b"/calls" in asked.partition(b"\r\n")[0] and len(cut) < 3:
                    cut.append(data)
                    break
                asked.clear()
                writer.write(data)
            writer.transport.abort()
            to_upstream.transport.abort()

        await asyncio.gather(there(), back(), return_exceptions=True)

    async def main():
        proxy = await asyncio.start_server(relay, "127.0.0.1", 0)
        port = proxy.sockets[0].getsockname()[1]
        async with proxy, RemoteToolbox(f"http://127.0.0.1:{port}", timeout=10) as box:
            session = Session([])
            texts = [(await box.execute(call("count"), session))[1].text for _ in range(2)]
            assert [text.split()[0] for text in texts] == ["1", "2"]
        assert len(cut) == 3

    asyncio.run(main())


class Odd(Handler):
    """Answers as no tool server does."""

    answer: tuple[int, bytes] = (200, b"")

    def reply(self):
        self.body()
        self.send(*self.answer)

    do_GET = do_POST = do_PUT = do_DELETE = reply


@pytest.mark.parametrize(
    "answer",
    [(200, b"<html>"), (200, b"[]"), (200, b'{"tools": 1}'), (500, b"{}"), (302, b""), (418, b"x")],
)
def test_a_server_that_is_none(answer):
    with LocalServer(type("Handler", (Odd,), {"answer": answer})) as odd:
        box = RemoteToolbox(odd.url, retries=1)
        with pytest.raises(ToolInfraError):
            box.schemas()
        session = Session([])
        assert asyncio.run(box.execute(call("count"), session)) == (None, UNAVAILABLE)


def test_nobody_answers():
    box = RemoteToolbox("http://127.0.0.1:9", retries=1)
    with pytest.raises(ToolInfraError, match="no answer from the tool server at"):
        box.schemas()
    assert asyncio.run(box.execute(call("count"), Session([])))[1] == UNAVAILABLE
    asyncio.run(box.close())


# --- Many at once, and a player -------------------------------------------------------------------


def test_nothing_is_lost_under_load():
    """A short form of bench_tool_server.py: hostile calls, workers of python killed, 429s."""
    limits = ServerLimits(concurrency=16, queue=16)  # half of the sessions, so that some must wait
    tally, counted = bench_tool_server.run(64, 8.0, 0.05, True, limits)
    assert bench_tool_server.faults(tally, counted, True) == []
    assert tally.calls > 100 and counted["workers_killed"] >= 1
    assert counted.get("metis_tools_refused_total", 0) > 0
    # Whoever was on a worker that was killed, and nobody else.
    assert tally.count("infra_error") < 0.3 * tally.calls


def test_a_player_plays_with_it_as_with_a_local_one(vlm):
    task = load_task("glyphs")
    questions, scripts = task.demonstrations(3, 12, 0.2)

    def play(box):
        with Player(vlm, box) as player:
            rollouts = player.demonstrate(questions, copy.deepcopy(scripts))
        return [(r.ids, r.policy, r.status, r.calls, r.answer) for r in rollouts], [
            image.tobytes() for r in rollouts for image in r.images
        ]

    local = play(task.toolbox())
    with ToolServer(task.toolbox(), port=0) as server:
        assert play(RemoteToolbox(server.url)) == local
    assert sum(calls for *_, calls, _ in local[0]) > 5
