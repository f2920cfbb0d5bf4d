"""`metis tools serve|try|list`."""

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from trainer import tools_cli as cli
from trainer.tools import TextIndex
from trainer.tools.client import httpx
from trainer.tools.service import ServerLimits
from trainer.tools.wire import TOKEN_VARIABLE

HERE = Path(__file__).parent
MINE = ["--tools", "tools_of_mine:box"]
SERVER = f"{sys.executable} {HERE / 'mcp_server.py'}"
PROGRAM = """
import argparse, sys
from trainer import tools_cli as cli
from trainer.tools import TextIndex
parser = argparse.ArgumentParser()
cli.add_arguments(parser)
sys.exit(cli.run(parser.parse_args()))
"""


@pytest.fixture
def tools(capsys):
    """Runs `metis tools ...` here -> exit code, stdout, stderr."""

    def run(*arguments):
        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        code = cli.run(parser.parse_args([str(one) for one in arguments]))
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def server():
    """`metis tools serve` as a process, with a token."""
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}
    environment["METIS_TOOLS_TOKEN"] = "a-token-of-some-length"
    command = [sys.executable, "-c", PROGRAM, "serve", *MINE, "--port", "0", "--stop-seconds", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    line = process.stdout.readline()
    assert line.startswith("serving half, fail, make at http://127.0.0.1:"), line
    yield line.split()[-1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0
    process.stdout.close()


@pytest.fixture
def image(tmp_path):
    Image.new("L", (20, 10), 7).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_call(tools, image):
    code, out, _ = tools("try", "half", '{"image": 2}', *MINE, "--image", image, "--image", image)
    shown = json.loads(out)
    assert code == 0 and shown.pop("ms") >= 0
    assert shown == {
        "tool": "half",
        "status": "ok",
        "text": "seed 0",
        "images": [{"width": 10, "height": 5}],
    }
    assert json.loads(tools("try", "half", "{}", *MINE, "--image", image, "--seed", 4)[1])[
        "text"
    ] == ("seed 4")


def test_the_tasks_own_tools(tools):
    code, out, _ = tools("try", "text_search", '{"query": "beacon"}', "--seed", 1)
    assert code == 0 and json.loads(out)["text"]


@pytest.mark.parametrize(
    ("infra", "status", "text"),
    [
        ("false", "tool_error", "Error: wrong < answer>"),
        ("true", "infra_error", "Error: the tool is unavailable"),
    ],
)
def test_a_call_that_fails(tools, infra, status, text):
    code, out, _ = tools("try", "fail", f'{{"infra": {infra}}}', *MINE)
    assert code == 1 and (json.loads(out)["status"], json.loads(out)["text"]) == (status, text)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("halve", "{}", "no tool 'halve' (did you mean 'half'?); the tools are: half, fail"),
        ("half", "{", "the arguments are no JSON"),
        ("half", "[" * 5000, "the arguments are no JSON"),
        ("half", '{"image": "1"}', "'image'"),
        ("half", '{"imag": 1}', "unknown argument 'imag'"),
        ("half", '{"image": 1, "image": 2}', "duplicate key 'image'"),
        ("half", '{"image": NaN}', "NaN is not JSON"),
        ("half", "[]", "must be an object, got an array"),
        ("fail", "{}", "missing argument 'infra'; fail takes infra; the tools are: half, fail"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_call(tools, name, arguments, says):
    code, out, err = tools("try", name, arguments, *MINE)
    assert (code, out) == (2, "") and says in err and err.startswith("metis tools try: ")


def test_what_else_is_wrong(tools, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for arguments, says in [
        (("--image", tmp_path / "text.png"), "not an image"),
        (("--image", tmp_path / "none.png"), "No such file"),
        (("--task", "nothing"), "there is no task 'nothing'"),
        (("--tools", "tools_of_mine"), "expected MODULE:NAME"),
        (("--tools", "no_such_module:box"), "No module named"),
        (("--tools", "tools_of_mine:none"), "no attribute 'none'"),
        (("--tools", "tools_of_mine:number"), "is a int; expected a Toolbox or a list"),
        (("--url", "tools:80"), "a tool server's URL is"),
    ]:
        code, out, err = tools("try", "half", "{}", *arguments)
        assert (code, out) == (2, "") and says in err, err


def test_the_list(tools):
    code, out, _ = tools("list", "--tools", "tools_of_mine:some")
    assert code == 0
    assert [schema["function"]["name"] for schema in json.loads(out)] == ["half", "fail", "make"]
    names = [schema["function"]["name"] for schema in json.loads(tools("list")[1])]
    assert names == ["python", "text_search", "image_search"]


def test_tools_of_an_mcp_server(tools):
    code, out, _ = tools("try", "add", '{"a": 2}', "--mcp", SERVER)
    assert code == 0 and json.loads(out)["text"] == "3"
    out = tools("list", "--tools", "tools_of_mine:only", "--mcp", SERVER)[1]
    assert [s["function"]["name"] for s in json.loads(out)][:3] == ["half", "add", "choose"]
    code, _, err = tools("list", *MINE, "--mcp", SERVER)
    assert code == 2 and "distinct names" in err  # both have one that is called fail
    code, _, err = tools("list", "--mcp", "/nowhere/server")
    assert code == 1 and "MCP server /nowhere/server" in err


def test_a_server_and_its_clients(tools, server, image, monkeypatch):
    code, _, err = tools("list", "--url", server)
    assert code == 1 and "401" in err
    monkeypatch.setenv("METIS_TOOLS_TOKEN", "a-token-of-some-length")
    names = [s["function"]["name"] for s in json.loads(tools("list", "--url", server)[1])]
    assert names == ["half", "fail", "make"]
    code, out, _ = tools("try", "half", "{}", "--url", server, "--image", image)
    assert code == 0 and json.loads(out)["images"] == [{"width": 10, "height": 5}]
    code, _, err = tools("try", "halve", "{}", "--url", server)
    assert code == 2 and "the tools are: half, fail, make" in err
    assert httpx.get(f"{server}/health", trust_env=False).json() == {"status": "ok", "sessions": 0}


def test_every_limit_has_an_option():
    assert set(cli.LIMITS) == {field.name for field in fields(ServerLimits)}
    for field in fields(ServerLimits):
        kind, text = cli.LIMITS[field.name]
        assert kind is type(field.default) and f"({int(field.default)})" in text
    assert cli.TOKEN_VARIABLE == TOKEN_VARIABLE


def test_the_parser_loads_no_tools():
    code = "import sys, trainer.tools_cli; print('trainer.tools' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_what_is_not_served(tools, tmp_path, monkeypatch):
    monkeypatch.delenv("METIS_TOOLS_TOKEN", raising=False)
    (tmp_path / "token").write_text("short\n")
    for arguments, says in [
        (("--host", "0.0.0.0"), "set a token"),
        (("--token-file", tmp_path / "token"), "at least 16"),
        (("--token-file", tmp_path / "none"), "No such file"),
        (("--queue", "-1"), "queue must be positive"),
        (("--idle-seconds", "inf"), "idle_seconds must be positive and finite"),
    ]:
        code, _, err = tools("serve", *MINE, "--port", "0", *arguments)
        assert code == 2 and says in err, err


def test_a_port_that_is_taken(tools, server):
    code, _, err = tools("serve", *MINE, "--port", server.rpartition(":")[2])
    assert code == 2 and "in use" in err


def test_an_index_is_built_and_searched(tools, tmp_path):
    source = tmp_path / "corpus.jsonl"
    source.write_text('{"text": "the lighthouse burns red"}\n{"text": "the harbour is closed"}\n')
    code, out, _ = tools("index", source, tmp_path / "index")
    assert code == 0 and json.loads(out)
    assert TextIndex(tmp_path / "index").search("lighthouse") == ["the lighthouse burns red"]
    code, _, err = tools("index", tmp_path / "nothing.jsonl", tmp_path / "other")
    assert code == 2 and "nothing.jsonl" in err
