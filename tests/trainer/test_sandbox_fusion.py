"""The client of SandboxFusion, against a server that answers in its documented form.

The server runs what it is sent, as the service does: files written from base64 into an empty
directory, the code as a script in it, files fetched back. What it cannot be made to say by code, it
is told to say.
"""

import asyncio
import base64
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from local_server import Handler, LocalServer
from PIL import Image, ImageChops

from trainer.tools import PythonTool, Toolbox, ToolInfraError
from trainer.tools import sandbox_fusion as module
from trainer.tools.protocol import spec_of
from trainer.tools.sandbox_fusion import SandboxFusionTool
from trainer.types import Observation, Session


def run_code(request):
    """What POST /run_code does (sandbox/server/sandbox_api.py and runners/base.py there)."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in request["files"].items():
            Path(folder, name).write_bytes(base64.b64decode(content))
        Path(folder, "main.py").write_text(request["code"])
        start = time.time()
        result = {"status": "Finished", "return_code": 0, "stdout": "", "stderr": ""}
        try:
            done = subprocess.run(
                [sys.executable, "-s", "main.py"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=request["run_timeout"],
            )
            result |= {"return_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        except subprocess.TimeoutExpired:
            result = {"status": "TimeLimitExceeded", "return_code": None, "stdout": ""}
        files = {}
        for name in request["fetch_files"]:
            path = Path(folder, name)
            if path.is_file():
                files[name] = base64.b64encode(path.read_bytes()).decode()
        return {
            "status": "Success" if result["return_code"] == 0 else "Failed",
            "message": "",
            "compile_result": None,
            "run_result": {**result, "execution_time": time.time() - start},
            "executor_pod_name": None,
            "files": files,
        }


class FusionHandler(Handler):
    def do_POST(self):
        request = json.loads(self.body())
        self.server.requests.append((self.path, dict(self.headers), request))
        said = self.server.script.pop(0) if self.server.script else run_code
        if said is None:  # hang up
            self.connection.close()
            return
        status, content = (200, said(request)) if callable(said) else said
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send(status, data)


class FusionServer(LocalServer):
    """Runs what it is sent, but for what it is told to say instead (None: it hangs up)."""

    def __init__(self):
        super().__init__(FusionHandler)
        self.script, self.requests = [], []


@pytest.fixture
def server():
    with FusionServer() as server:
        yield server


@pytest.fixture
def tool(server, monkeypatch):
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    with SandboxFusionTool(
        f"{server.url}/", timeout=5, memory=256 << 20, headers={"X-Key": "k"}
    ) as tool:
        yield tool


CODES = [
    "print(47 * 83)",
    "x = 3\nprint('a', end='')\nx + 1",
    "# nothing",
    "1 / 0",
    "print('a')\n\nimage_9",
    "x = = 2",
    "print('x' * 10**5)",
    "import sys\nsys.exit()",
    "import random\nrandom.random(), np.random.rand()",
    "import os\nos._exit(0)",
    "x = bytearray(1 << 40)",
    "print('<answer>\\ud800')",
]


@pytest.fixture(scope="module")
def home():
    with PythonTool(workers=1, persistent=False) as home:
        yield home


@pytest.mark.parametrize("code", CODES)
def test_the_same_observations_as_at_home(tool, home, code):
    assert tool.run(code, seed=3) == home.run(code, seed=3)


def test_images_there_and_back(tool, server):
    picture = Image.radial_gradient("L").resize((128, 96)).convert("RGB")

    async def main():
        session = Session([picture, Image.new("L", (4, 4), 7)])
        shown = await tool.call(session, "show(image_1.crop((10, 20, 50, 60)))\nimage_2")
        text = (await tool.call(session, "image_3.size, image_4.getpixel((0, 0))")).text
        return session, shown, text

    session, shown, text = asyncio.run(main())
    assert shown.status == "ok" and len(session.images) == 4
    assert ImageChops.difference(shown.images[0], picture.crop((10, 20, 50, 60))).getbbox() is None
    assert text == "((40, 40), (7, 7, 7))"
    path, headers, request = server.requests[0]
    assert path == "/run_code" and headers["X-Key"] == "k"
    assert request["language"] == "python" and request["run_timeout"] == 5
    assert set(request) <= {
        "code", "language", "run_timeout", "memory_limit_MB", "files", "fetch_files",
    }  # fmt: skip


def test_what_the_policy_reads_is_the_same(tool):
    with PythonTool(persistent=False) as home:
        assert spec_of(tool).schema == spec_of(home).schema


def test_too_long_is_the_policys_fault(server):
    with SandboxFusionTool(server.url, timeout=1) as tool:
        said = Observation("Error: timed out after 1 s", status="tool_error")
        assert tool.run("while True: pass") == said


FINE = {"status": "Finished", "return_code": 0, "stdout": "", "stderr": "", "execution_time": 0.1}
GOOD = {"status": "Success", "message": "", "run_result": FINE, "files": {}}
INFRA = {
    "error on the sandbox's side": (200, {**GOOD, "status": "SandboxError", "message": "no disk"}),
    "a run that is an error": (200, {**GOOD, "run_result": {**FINE, "status": "Error"}}),
    "no run": (200, {**GOOD, "run_result": None}),
    "another status": (200, {**GOOD, "status": "Fine"}),
    "500": (500, b"oops"),
    "429": (429, {"detail": "too many"}),
    "422": (422, {"detail": []}),
    "garbage": (200, b"\xff\xfe"),
    "a list": (200, [1]),
    "deep": (200, b"[" * 10**6),
    "hung up": None,
    "no numpy": (
        200,
        {
            **GOOD,
            "status": "Failed",
            "run_result": {
                **FINE,
                "return_code": 1,
                "stderr": '  File "/tmp/x/python_child.py", line 21, in <module>\n'
                "ModuleNotFoundError: No module named 'numpy'",
            },
        },
    ),
}


@pytest.mark.parametrize("name", INFRA)
def test_the_services_own_failures_are_nobodys_fault(tool, server, name):
    server.script = [INFRA[name]]  # once: the second try works
    assert tool.run("7") == Observation("7")
    assert len(server.requests) == 2
    server.script = [INFRA[name]] * 2
    with pytest.raises(ToolInfraError, match="SandboxFusion"):
        tool.run("7")
    server.script = [INFRA[name]] * 2
    call = json.dumps({"name": "python", "arguments": {"code": "7"}})
    _, observation = asyncio.run(Toolbox([tool]).execute(call, Session([])))
    assert observation.status == "infra_error"


def test_nobody_there():
    with SandboxFusionTool("http://127.0.0.1:9", timeout=1) as tool:
        with pytest.raises(ToolInfraError, match="cannot be reached"):
            tool.run("7")


FORGED = {
    "not base64": "!!!",
    "not a string": 7,
    "empty": base64.b64encode(b"\0" * 3).decode(),
    "huge": base64.b64encode(b"\xff" * 40).decode(),
    "a list": [1],
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_results(tool, server, name):
    server.script = [(200, {**GOOD, "files": {"result.bin": FORGED[name]}})]
    said = Observation("Error: the process wrote a malformed result", status="tool_error")
    assert tool.run("7") == said


@pytest.mark.parametrize("url", ["sandbox:8080", "ftp://host", "http://", "", "/run_code"])
def test_bad_urls(url):
    with pytest.raises(ValueError, match="url must be"):
        SandboxFusionTool(url)


@pytest.mark.parametrize("settings", [{"timeout": 0}, {"memory": 0}, {"concurrency": 0}])
def test_bad_settings(settings):
    with pytest.raises(ValueError):
        SandboxFusionTool("http://host", **settings)
