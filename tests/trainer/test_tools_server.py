"""The tool server as a process, and its client, which is a toolbox whatever goes wrong."""

import asyncio
import io
import json
import threading
import time

import pytest
from PIL import Image
from tool_server import (
    UNAVAILABLE,
    Process,
    call,
    client,
    metric,
    opened,
    picture,
    toolbox,
    wait_for_calls,
)

from trainer.tools import ToolInfraError
from trainer.tools.client import RemoteToolbox, httpx
from trainer.tools.server import is_loopback, serve
from trainer.types import Session


@pytest.fixture(scope="module")
def server():
    with Process() as process:
        yield process


@pytest.fixture
def http(server):
    with client(server) as http:
        yield http


# --- The same as a local toolbox ------------------------------------------------------------------

CALLS = [
    call("shout", text="a<answer>7</answer>é\u2028", times=3),
    call("flip", image=1),
    call("flip", image=3),
    call("flip", image=9),
    call("shout", text="x" * 5000),
    call("broken", kind="policy"),
    call("broken", kind="infra"),
    call("broken", kind="bug"),
    call("shout", text=3),
    call("rm", text=""),
    '{"name": "shout", "arguments": {"text": "\\ud800"}}',
    '{"name": "shout", "arguments": {"text": "\ud800"}}',
    '{"name": "shout", "name": "shout", "arguments": {}}',
    "[" * 5000,
    "",
    "x" * 40_000,
    "é" * 32_768,
    call("shout", text="last"),
]
TURNS = [
    f"<reason>r</reason><tool_call>{call('shout', text='a')}</tool_call>",
    f"<tool_call>{call('flip', image=1)}</tool_call><tool_call>{call('hang')}</tool_call>",
    "<tool_call>{",
]


def transcript(make, images):
    async def play():
        async with make() as box:
            session, seen = Session(images, seed=5), []
            for text in CALLS:
                seen.append((*await box.execute(text, session), session.calls))
            for turn in TURNS:
                seen.append((*await box.execute_turn(turn, session), session.calls))
            await box.end(session)
            pixels = [(i.mode, i.size, i.tobytes()) for i in session.images]
            return box.schemas(), [(c, o.text, o.status, n) for c, o, n in seen], pixels

    return asyncio.run(play())


def test_it_is_a_toolbox(server):
    images = [picture().resize((9, 7)), Image.radial_gradient("L").resize((5, 5))]
    local = transcript(toolbox, list(images))
    assert transcript(lambda: RemoteToolbox(server.url), list(images)) == local
    assert len(local[2]) == 4 and {status for _, _, status, _ in local[1]} == {
        "ok",
        "tool_error",
        "infra_error",
    }


def test_an_image_crosses_once_and_equal_ones_are_held_once(server, http):
    shared = picture(size=(40, 30))
    modes = [shared, picture(mode="P"), picture(mode="RGBA"), picture(mode="1")]

    async def main():
        async with RemoteToolbox(server.url) as box:
            sessions = [Session(list(modes), seed=seed) for seed in range(3)]
            before = metric(http, "metis_tools_image_uploads_total")
            for session in sessions:
                await box.execute(call("flip", image=1), session)
                await box.execute(call("flip", image=5), session)
            assert metric(http, "metis_tools_image_uploads_total") - before == 3 * 4
            texts = [(await box.execute(call("describe"), s))[1].text for s in sessions]
            uploaded = {text.split(" ")[0] for text in texts}
            assert len(uploaded) == 1 and "(40, 30)" in texts[0]
            assert [i.tobytes() for i in sessions[0].images[5:]] == [shared.tobytes()]
            # What the trajectory takes back, the server forgets.
            del sessions[0].images[1:]
            sessions[0].images.append(picture((9, 9, 9)))
            text = (await box.execute(call("describe"), sessions[0]))[1].text
            assert [one.partition("@")[0] for one in text.split(" RGB")][1] == "(8, 6)(9, 9, 9)"
            for session in sessions:
                await box.end(session)
                await box.end(session)
        assert metric(http, "metis_tools_image_bytes") >= 0

    asyncio.run(main())


def test_one_client_on_several_loops(server):
    box = RemoteToolbox(server.url)
    for _ in range(3):
        assert asyncio.run(box.execute(call("wait", seconds=0), Session([])))[1].status == "ok"
    asyncio.run(box.close())


# --- HTTP -----------------------------------------------------------------------------------------


def test_a_call_by_hand(http):
    assert http.get("/health").json()["status"] == "ok"
    assert [tool["function"]["name"] for tool in http.get("/tools").json()["tools"]][0] == "shout"
    name = opened(http, seed=3)
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    png = {"Content-Type": "image/png"}
    made = http.put(f"/sessions/{name}/images/1", content=buffer.getvalue(), headers=png)
    assert made.json() == {"number": 1, "width": 8, "height": 6}
    answer = http.post(
        f"/sessions/{name}/calls", json={"name": "flip", "arguments": {"image": 1}}
    ).json()
    assert answer["call"] == {"name": "flip", "arguments": {"image": 1}}
    images = [{"number": 2, "width": 8, "height": 6}]
    assert answer["observation"] == {"text": "flipped", "status": "ok", "images": images}
    shown = http.get(f"/sessions/{name}/images/2", params={"format": "png"})
    assert Image.open(io.BytesIO(shown.content)).tobytes() == picture().tobytes()
    assert http.get(f"/sessions/{name}/images/2").content == picture().tobytes()
    assert http.delete(f"/sessions/{name}").status_code == 204
    assert http.delete(f"/sessions/{name}").status_code == 204
    assert http.get(f"/sessions/{name}/images/2").status_code == 404
    text = http.get("/metrics").text
    assert 'metis_tools_calls_total{status="ok",tool="flip"}' in text
    assert 'metis_tools_call_seconds_bucket{le="0.01",tool="flip"}' in text


def test_a_session_is_opened_once(http):
    assert [http.post("/sessions", json={"id": "a-b", "seed": 1}).status_code for _ in "ab"] == [
        201,
        200,
    ]
    assert http.post("/sessions", json={"id": "a-b", "seed": 2}).status_code == 409
    http.delete("/sessions/a-b")


def bomb():
    """A PNG of 20,000 x 20,000 pixels in its header."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


RAW = {"Content-Type": "application/octet-stream"}
PNG = {"Content-Type": "image/png"}


@pytest.mark.parametrize(
    ("status", "method", "path", "options"),
    [
        (404, "POST", "/sessions/nobody/calls", {"json": {"text": "{}"}}),
        (404, "PUT", "/sessions/nobody/images/1", {"content": b"x"}),
        (404, "GET", "/sessions/{id}/images/1", {}),
        (415, "POST", "/sessions", {"content": b"{}", "headers": {"Content-Type": "text/plain"}}),
        (422, "POST", "/sessions", {"json": {"id": "a/../b"}}),
        (422, "POST", "/sessions", {"json": {"id": "x" * 65}}),
        (422, "POST", "/sessions", {"json": {"seed": "1"}}),
        (422, "POST", "/sessions", {"json": {"sead": 1}}),
        (422, "POST", "/sessions", {"json": [1]}),
        (413, "POST", "/sessions", {"json": {"id": "x" * 5000}}),
        (422, "POST", "/sessions/{id}/calls", {"json": {"text": 1}}),
        (422, "POST", "/sessions/{id}/calls", {"json": {"text": "", "name": "a"}}),
        (422, "POST", "/sessions/{id}/calls", {"json": {"text": "", "calls": -1}}),
        (422, "POST", "/sessions/{id}/calls", {"json": {"text": "", "images": True}}),
        (422, "POST", "/sessions/{id}/calls", {"json": ["text"]}),
        (409, "POST", "/sessions/{id}/calls", {"json": {"text": "", "images": 1}}),
        (413, "POST", "/sessions/{id}/calls", {"json": {"text": "x" * 500_000}}),
        (422, "PUT", "/sessions/{id}/images/1", {"content": b"no image", "headers": PNG}),
        (422, "PUT", "/sessions/{id}/images/1", {"content": bomb(), "headers": PNG}),
        (422, "PUT", "/sessions/{id}/images/1", {"content": b"xyz", "headers": RAW}),
        (422, "PUT", "/sessions/{id}/images/1?width=1&height=2", {"content": b"1", "headers": RAW}),
        (422, "PUT", "/sessions/{id}/images/1?width=0&height=2", {"content": b"", "headers": RAW}),
        (422, "PUT", "/sessions/{id}/images/1?width=-1&height=-1", {"headers": RAW}),
        (422, "PUT", "/sessions/{id}/images/1?width=1&height=1&mode=F", {"headers": RAW}),
        (409, "PUT", "/sessions/{id}/images/2", {"content": b"x", "headers": PNG}),
        (409, "PUT", "/sessions/{id}/images/0", {"content": b"x", "headers": PNG}),
        (422, "PUT", "/sessions/{id}/images/x", {"content": b"x", "headers": PNG}),
    ],
)  # fmt: skip
def test_what_is_refused(http, status, method, path, options):
    name = opened(http)
    response = http.request(method, path.replace("{id}", name), **options)
    assert response.status_code == status, response.text
    http.delete(f"/sessions/{name}")


def test_bodies_that_lie_about_their_length(http):
    name = opened(http)

    sent = []

    def endless():
        while True:
            sent.append(65536)
            yield b"[" * 65536

    headers = {"Content-Type": "application/json"}
    try:
        response = http.post(f"/sessions/{name}/calls", content=endless(), headers=headers)
        assert response.status_code == 413
    except httpx.HTTPError:
        pass  # the server closed while we were still sending
    assert sum(sent) < 64 << 20
    deep = http.post(f"/sessions/{name}/calls", content=b"[" * 100_000, headers=headers)
    assert deep.status_code == 400
    assert http.get("/health").status_code == 200


def test_a_key_is_run_once(http):
    name = opened(http)

    def post(key, **body):
        return http.post(f"/sessions/{name}/calls", json=body, headers={"Idempotency-Key": key})

    count = {"name": "count", "arguments": {}}
    texts = [post(key, **count).json()["observation"]["text"] for key in ("a", "a", "b", "a")]
    assert [text.split()[0] for text in texts] == ["1", "1", "2", "1"]
    assert post("a", name="count", arguments={"seconds": 1.0}).status_code == 422
    assert post("x" * 129, **count).status_code == 422

    # While the call still runs: the second request waits for the one call.
    running = metric(http, "metis_tools_calls_running")
    slow = {"name": "count", "arguments": {"seconds": 0.6}}
    answers = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: post("slow", **slow).json()}))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_for_calls(http, running + 1)
    assert post("other", **count).status_code == 409
    for thread in threads:
        thread.join()
    assert len(answers) == 3 and len({json.dumps(answer) for answer in answers.values()}) == 1
    assert answers[0]["observation"]["text"].split()[0] == "3"


def test_the_event_loop_goes_on_while_an_image_is_decoded(http):
    buffer = io.BytesIO()
    Image.effect_noise((4500, 4500), 50).save(buffer, "PNG", compress_level=1)
    start = time.perf_counter()
    Image.open(io.BytesIO(buffer.getvalue())).load()
    decoding = time.perf_counter() - start
    name = opened(http)
    path = f"{http.base_url}/sessions/{name}/images/1"
    options = {"headers": PNG, "trust_env": False, "timeout": 60}

    def longest_answer():
        """Of /health, while the image is uploaded."""
        uploaded = []

        def upload():
            uploaded.append(httpx.put(path, content=buffer.getvalue(), **options).status_code)

        thread = threading.Thread(target=upload)
        thread.start()
        longest = 0.0
        while thread.is_alive():
            start = time.perf_counter()
            http.get("/health")
            longest = max(longest, time.perf_counter() - start)
        assert uploaded == [200]
        return longest

    # A loop that waits for the decoding never answers sooner; a machine that is busy may be late.
    assert any(longest_answer() < 0.75 * decoding for _ in range(10))
    http.delete(f"/sessions/{name}")


# --- Who may come in ------------------------------------------------------------------------------


def test_a_token_is_needed_where_others_could_connect():
    with pytest.raises(ValueError, match="set a token"):
        serve(toolbox(), "0.0.0.0", 0)
    with pytest.raises(ValueError, match="at least 16"):
        serve(toolbox(), "0.0.0.0", 0, token="secret")
    assert is_loopback("127.8.9.1") and is_loopback("::1") and not is_loopback("10.0.0.1")


def test_tokens():
    token = "a-token-of-some-length"
    with (
        Process(token=token) as server,
        client(server) as http,
    ):
        assert http.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": token}):
            for path in ("/tools", "/metrics", "/sessions/x/images/1"):
                response = http.get(path, headers=headers)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": f"Bearer {token}"}
        assert http.get("/tools", headers=right).status_code == 200
        with pytest.raises(ToolInfraError, match="token"):
            RemoteToolbox(server.url, token="another-token-of-it").schemas()
        box = RemoteToolbox(server.url, token=token)
        observation = asyncio.run(box.execute(call("wait", seconds=0), Session([])))[1]
        assert observation.status == "ok"


def test_web_pages_stay_out(http, server):
    for headers in (
        {"Origin": "https://example.org"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": f"evil.example:{server.port}"},
    ):
        assert http.post("/sessions", json={}, headers=headers).status_code == 403
    assert http.get("/health", headers={"Host": f"localhost:{server.port}"}).status_code == 200


@pytest.mark.parametrize("url", ["tools:8765", "ftp://tools", "http://", "not a url"])
def test_urls_that_are_none(url):
    with pytest.raises(ValueError):
        RemoteToolbox(url)


# --- Limits ---------------------------------------------------------------------------------------


def test_a_full_server_refuses_and_the_client_waits():
    limits = {"concurrency": 1, "queue": 1, "sessions": 5}
    with Process(limits=limits) as server, client(server) as http:

        async def main():
            async with RemoteToolbox(server.url) as box:
                slow = call("wait", seconds=0.3)
                answers = await asyncio.gather(*(box.execute(slow, Session([])) for _ in range(3)))
                assert [o.text for _, o in answers] == ["waited 0.3"] * 3
                slow = call("wait", seconds=30)
                tasks = [asyncio.create_task(box.execute(slow, Session([]))) for _ in range(2)]
                await asyncio.to_thread(wait_for_calls, http, 1, 1)
                async with RemoteToolbox(server.url, patience=0.5) as impatient:
                    assert (await impatient.execute(slow, Session([])))[1] == UNAVAILABLE
                for task in tasks:
                    task.cancel()
            # Their sessions are ended by now, and with them the calls that nobody waits for.

        asyncio.run(main())
        names = [opened(http) for _ in range(3)]
        threads = [
            threading.Thread(
                target=httpx.post,
                args=(f"{server.url}/sessions/{name}/calls",),
                kwargs={"json": {"text": call("wait", seconds=1.0)}, "trust_env": False},
            )
            for name in names[:2]
        ]
        for thread in threads:
            thread.start()
        wait_for_calls(http, 1, 1)
        refused = http.post(f"/sessions/{names[2]}/calls", json={"text": "{}"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        for thread in threads:
            thread.join()
        # What was refused was not remembered: the same key is run now.
        assert http.post(f"/sessions/{names[2]}/calls", json={"text": "{}"}).status_code == 200
        statuses = [http.post("/sessions", json={}).status_code for _ in range(6)]
        assert statuses[-1] == 429 and 201 in statuses


def test_sessions_end_by_themselves(tmp_path):
    ended = tmp_path / "ended"
    limits = {"idle_seconds": 0.7, "lifetime_seconds": 2.0}
    with Process(limits=limits, ended=str(ended)) as server:
        with client(server) as http:
            idle, busy = opened(http), opened(http)
            wait = {"text": call("wait", seconds=1.0)}
            assert http.post(f"/sessions/{busy}/calls", json=wait).status_code == 200
            assert http.post(f"/sessions/{idle}/calls", json=wait).status_code == 404
            assert ended.read_text().split() == [idle]
            # Old, although it is used all the time; the call that runs is still answered.
            assert http.post(f"/sessions/{busy}/calls", json=wait).status_code == 200
            time.sleep(0.7)
            assert http.post(f"/sessions/{busy}/calls", json=wait).status_code == 404
            assert ended.read_text().split() == [idle, busy]
            assert metric(http, "metis_tools_sessions") == 0


def test_a_session_has_so_many_calls_and_images():
    limits = {"calls": 2, "images": 2, "image_pixels": 100, "image_bytes": 60}
    with Process(limits=limits) as server:
        with client(server) as http:
            name = opened(http)
            path = f"/sessions/{name}"
            statuses = [
                http.post(f"{path}/calls", json={"text": "{}"}).status_code for _ in range(3)
            ]
            assert statuses == [200, 200, 403]

            def put(number, side):
                query = {"width": side, "height": side}
                return http.put(
                    f"{path}/images/{number}", content=bytes(3 * side**2), params=query, headers=RAW
                ).status_code

            assert put(1, 11) == 422
            assert [put(1, 5), put(2, 5)] == [200, 200]
            assert put(3, 1) == 413
            time.sleep(0.6)
            other = opened(http)
            path = f"/sessions/{other}"
            assert put(1, 5) == 429
