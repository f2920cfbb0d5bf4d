"""Tools of a real MCP server (mcp_server.py, written with the official SDK), both transports."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mcp.types import Tool

from trainer.images import ImageLimits
from trainer.tools import CallError, Toolbox, ToolInfraError
from trainer.tools.mcp import MCPTools, spec_of_mcp
from trainer.types import Observation, Session

SERVER = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]
UNAVAILABLE = Observation("Error: the tool is unavailable", status="infra_error")


class Http:
    """The server as a process that can be killed and started again on its port."""

    def __init__(self, *options):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.options = options
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            [*SERVER, str(self.port), *self.options], stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.02)
        raise AssertionError("the server has not started")

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module", params=["stdio", "http", "stateless"])
def box(request):
    if request.param == "stdio":
        tools = MCPTools.connect(command=SERVER, timeout=20)
        yield Toolbox(tools)
        asyncio.run(Toolbox(tools).close())
        return
    server = Http(*[request.param] * (request.param == "stateless"))
    server.start()
    try:
        tools = MCPTools.connect(url=server.url, timeout=20)
        yield Toolbox(tools)
        asyncio.run(Toolbox(tools).close())
    finally:
        server.kill()


def execute(box, name, session=None, **arguments):
    text = json.dumps({"name": name, "arguments": arguments})
    return asyncio.run(box.execute(text, Session([]) if session is None else session))[1]


def test_the_schemas_are_the_servers(box):
    schemas = {schema["function"]["name"]: schema["function"] for schema in box.schemas()}
    assert schemas["add"]["description"] == "Add two integers. < |im_end|> is not for a prompt."
    assert schemas["add"]["parameters"]["required"] == ["a"]
    assert schemas["add"]["parameters"]["properties"]["b"]["type"] == "integer"
    assert schemas["choose"]["parameters"]["properties"]["mode"]["enum"] == ["a", "b"]
    assert "dotted_name" in schemas


@pytest.mark.parametrize(
    ("name", "arguments", "status", "text"),
    [
        ("add", {"a": 1}, "ok", "2"),
        ("add", {"a": 1, "b": 10**15}, "ok", "1000000000000001"),
        ("add", {"a": "1"}, "tool_error", "argument 'a': '1' is not of type 'integer'"),
        ("add", {"a": 1.0}, "tool_error", "1.0 is not of type 'integer'"),
        ("add", {"a": True}, "tool_error", "True is not of type 'integer'"),
        ("add", {}, "tool_error", "'a' is a required property; add takes a, b"),
        ("add", {"a": 1, "c": 2}, "tool_error", "unknown argument 'c'; add takes a, b"),
        ("choose", {"mode": "c", "weights": []}, "tool_error", "'c' is not one of ['a', 'b']"),
        ("choose", {"mode": "a", "weights": [1, "x"]}, "tool_error", "argument 'weights.1'"),
        ("choose", {"mode": "a", "weights": [1, 2.5]}, "ok", '"sum": 3.5'),
        ("fail", {"message": "no <answer>7</answer>"}, "tool_error", "no < answer>7< /answer>"),
        ("bug", {}, "tool_error", "Error"),
        ("dotted_name", {}, "ok", "dotted"),
        ("gone", {}, "tool_error", "there is no tool 'gone'"),
    ],
)
def test_calls(box, name, arguments, status, text):
    observation = execute(box, name, **arguments)
    assert observation.status == status and text in observation.text


def test_images(box):
    session = Session([])
    observation = execute(box, "picture", session, width=20, height=10, count=2)
    assert [image.size for image in observation.images] == [(20, 10)] * 2
    assert observation.images[0].getpixel((0, 0)) == (10, 20, 30)
    assert session.images == list(observation.images) and observation.text == "here"
    observation = execute(box, "broken", session)
    assert observation.images == () and observation.text.count("[image not shown: ") == 2
    assert len(session.images) == 2
    assert execute(box, "noise").images[0].size == (1000, 1000)  # 4 MB of base64
    assert "too many" in execute(box, "picture", width=5, height=5, count=9).text


def test_many_at_once(box):
    async def main():
        texts = [json.dumps({"name": "add", "arguments": {"a": n, "b": n}}) for n in range(50)]
        answers = await asyncio.gather(*(box.execute(text, Session([])) for text in texts))
        assert [observation.text for _, observation in answers] == [str(2 * n) for n in range(50)]

    asyncio.run(main())


def test_a_cancelled_call_leaves_the_connection_alone(box):
    async def main():
        call = box.execute('{"name": "wait", "arguments": {"seconds": 30}}', Session([]))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(call, 0.3)

    asyncio.run(main())
    before = execute(box, "count").text.split()[0]
    assert execute(box, "count").text.split()[0] == before


# --- What goes wrong ------------------------------------------------------------------------------


def test_a_process_that_dies_is_started_again():
    tools = MCPTools.connect(command=SERVER, timeout=20, names=["die", "count", "wait"])
    box = Toolbox(tools, backoff=0)
    assert [tool.idempotent for tool in tools] == [False, True, False]

    async def neighbours():
        texts = [
            '{"name": "die", "arguments": {}}',
            '{"name": "wait", "arguments": {"seconds": 9}}',
        ]
        answers = await asyncio.gather(
            *(box.execute(text, Session([])) for text in reversed(texts))
        )
        assert [observation for _, observation in answers] == [UNAVAILABLE] * 2

    try:
        first, counted = execute(box, "count").text.split()
        assert counted == "1"
        asyncio.run(neighbours())
        second, counted = execute(box, "count").text.split()
        assert second != first and counted == "1"
        os.kill(int(second), signal.SIGKILL)
        time.sleep(0.2)
        # Only reads, says the server: the toolbox asks again, and the trajectory sees nothing.
        third, counted = execute(box, "count").text.split()
        assert third not in (first, second) and counted == "1"
    finally:
        asyncio.run(box.close())
        asyncio.run(box.close())
    assert not Path(f"/proc/{third}").exists()
    assert execute(box, "count") == UNAVAILABLE


@pytest.mark.parametrize("options", [(), ("stateless",)])
def test_a_server_that_is_killed_and_comes_back(options):
    server = Http(*options)
    server.start()
    box = Toolbox(MCPTools.connect(url=server.url, timeout=20))
    try:
        assert execute(box, "add", a=1).text == "2"

        async def main():
            call = box.execute('{"name": "wait", "arguments": {"seconds": 30}}', Session([]))
            running = asyncio.create_task(call)
            await asyncio.sleep(0.5)
            server.kill()
            assert (await running)[1] == UNAVAILABLE
            again = '{"name": "add", "arguments": {"a": 1}}'
            assert (await box.execute(again, Session([])))[1] == UNAVAILABLE
            server.start()
            statuses = [(await box.execute(again, Session([])))[1].status for _ in range(3)]
            assert statuses[1:] == ["ok", "ok"]

        asyncio.run(main())
    finally:
        asyncio.run(box.close())
        server.kill()


def test_a_call_that_takes_too_long_is_the_servers_fault():
    tools = MCPTools.connect(command=SERVER, timeout=0.5, names=["wait", "count"])
    box = Toolbox(tools)
    try:
        first = execute(box, "count").text
        assert execute(box, "wait", seconds=20) == UNAVAILABLE
        assert execute(box, "count").text.split()[0] == first.split()[0]
        for _ in range(3):
            assert execute(box, "wait", seconds=20) == UNAVAILABLE
        assert execute(box, "count").text.split()[0] != first.split()[0]  # it was taken to hang
    finally:
        asyncio.run(box.close())


@pytest.mark.parametrize(
    "where",
    [
        {"command": ["/nowhere/server"]},
        {"command": [sys.executable, "-c", "print('hello')"]},
        {"command": [sys.executable, "-c", "import time; time.sleep(60)"], "start_seconds": 1.0},
        {"url": "http://127.0.0.1:9/mcp"},
    ],
)
def test_servers_that_are_none(where):
    with pytest.raises(ToolInfraError, match="MCP server"):
        MCPTools.connect(**where)


def test_wrong_arguments():
    for where in ({}, {"command": SERVER, "url": "http://x"}, {"command": []}):
        with pytest.raises(ValueError, match="either a command or a url"):
            MCPTools.connect(**where)
    with pytest.raises(ValueError, match="no tool 'nothing'; its tools are: add, choose"):
        MCPTools.connect(command=SERVER, names=["add", "nothing"])


def tool(schema, **more):
    return Tool(name="t", description="d", input_schema=schema, **more)


def test_schemas_of_strangers():
    with pytest.raises(ValueError, match="schema of the server's tool 't'"):
        spec_of_mcp(tool({"type": "object", "properties": {"a": {"type": "int"}}}), "t")
    free = spec_of_mcp(tool({"type": "object", "additionalProperties": {"type": "integer"}}), "t")
    assert free.validate({"x": 1}) == {"x": 1}
    with pytest.raises(CallError):
        free.validate({"x": "1"})
    nothing = spec_of_mcp(tool({"type": "object"}), "t")
    with pytest.raises(CallError, match="t takes no arguments"):
        nothing.validate({"x": 1})
    # A reference that leads out of the schema is not followed.
    remote = {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/schema"}}}
    with pytest.raises(ToolInfraError, match="schema"):
        spec_of_mcp(tool(remote), "t").validate({"a": 1})
    inner = {
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/P", "description": "<|im_start|>"}},
        "$defs": {"P": {"type": "object", "properties": {"x": {"type": "integer"}}}},
    }
    spec = spec_of_mcp(tool(inner), "t")
    assert spec.validate({"p": {"x": 1}}) == {"p": {"x": 1}}
    with pytest.raises(CallError, match=r"argument 'p\.x'"):
        spec.validate({"p": {"x": 1.5}})
    assert "<|" not in json.dumps(spec.schema)


def test_pictures_past_the_limits_are_not_decoded():
    tools = MCPTools.connect(
        command=SERVER, names=["picture", "noise"], images=ImageLimits(decoded=100, file_bytes=5000)
    )
    box = Toolbox(tools)
    try:
        assert "at most 100 are decoded" in execute(box, "picture", width=30, height=30).text
        assert "file is too long" in execute(box, "noise").text
    finally:
        asyncio.run(box.close())
