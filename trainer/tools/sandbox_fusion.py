"""The python tool on other machines: SandboxFusion's HTTP API (github.com/bytedance/SandboxFusion).

The same name, the same schema and the same observations as `PythonTool(persistent=False)`: what
runs over there is our own `_python_child`, which leaves its result as a frame in a file. How well
the code is locked in is that service's business: run it with its isolation "lite", or inside gVisor
or a virtual machine (SECURITY.md).

The service needs numpy and Pillow in its Python; it keeps no state between calls.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import logging
import math
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from trainer.tools import _python_child
from trainer.tools._python_pool import PREFIX, Request, read_result
from trainer.tools.protocol import ToolInfraError, spec_from_signature
from trainer.tools.python import observe, one_call
from trainer.tools.toolbox import ImageLimits
from trainer.types import Observation, Session

log = logging.getLogger(__name__)

MODULE, REQUEST, RESULT = "python_child.py", "request.bin", "result.bin"

_PROGRAM = """
import os, sys
sys.path.insert(0, os.getcwd())
import {module} as child
child.from_file({limits!r}, {request!r}, {result!r})
"""

RETRY_SECONDS = 0.5


class SandboxFusionTool:
    """Runs Python code, each call in a fresh process, on a SandboxFusion server.

    A call's own failures (an exception, too long, killed) are tool errors. What is the service's
    (unreachable, HTTP errors, "SandboxError", a Python without numpy) is ToolInfraError, after one
    more try: calls have no state, so trying again is safe.
    """

    name = "python"

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 10.0,
        memory: int = 1 << 30,
        max_text: int = 8_192,
        images: ImageLimits | None = None,
        concurrency: int = 32,
        headers: dict[str, str] | None = None,
    ):
        """url: of the server, such as "http://sandbox:8080". timeout: seconds a call may run.
        memory: bytes, for it and for the service's own limit. concurrency: calls at a time.
        headers: sent along, such as an authorization. Raises ValueError for what cannot be."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"url must be http://host[:port] or https://..., got {url!r}")
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout must be positive and finite, got {timeout}")
        if memory < 1 or max_text < 1 or concurrency < 1:
            raise ValueError("memory, max_text and concurrency must be positive")
        self.url = url.rstrip("/") + "/run_code"
        self.timeout = timeout
        self.images = images or ImageLimits()
        self.spec = spec_from_signature(one_call, self.name)
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._limits = {
            "seconds": timeout,
            "memory": memory,
            "text": max_text,
            "images": self.images.count,
            "pixels": self.images.pixels,
            "header": 12 * (max_text + 1100) + 64 * self.images.count + 1024,
            "body": 3 * self.images.pixels * self.images.count,
        }
        self._source = Path(_python_child.__file__).read_bytes()
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="sandbox-fusion")

    async def call(self, session: Session, code: str) -> Observation:
        request = Request(code, session.images, session.seed + session.calls)
        loop = asyncio.get_running_loop()
        observation = await loop.run_in_executor(self._threads, self._answer, request)
        session.images.extend(observation.images)
        return observation

    def run(self, code: str, images: Sequence[Image.Image] = (), seed: int = 0) -> Observation:
        """The same without a session, blocking."""
        return self._threads.submit(self._answer, Request(code, images, seed)).result()

    def close(self) -> None:
        """Waits for calls that are running. Calls after it raise."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> SandboxFusionTool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, request: Request) -> Observation:
        body = self._body(request)
        try:
            return self._observation(self._post(body))
        except ToolInfraError as error:
            log.warning("%s; trying again", error)
            time.sleep(RETRY_SECONDS)
            return self._observation(self._post(body))

    def _body(self, request: Request) -> bytes:
        buffers, _ = request.encode({})
        files = {MODULE: self._source, REQUEST: b"".join(buffers)}
        program = _PROGRAM.format(
            module=MODULE.removesuffix(".py"), limits=self._limits, request=REQUEST, result=RESULT
        )
        content: dict[str, Any] = {
            "language": "python",
            "code": program,
            "run_timeout": self.timeout,
            "memory_limit_MB": max(1, self._limits["memory"] >> 20) + 256,
            "files": {name: base64.b64encode(data).decode() for name, data in files.items()},
            "fetch_files": [RESULT],
        }
        return json.dumps(content).encode()

    def _post(self, body: bytes) -> dict[str, Any]:
        """The service's answer. Raises ToolInfraError where there is none, or none of its form."""
        limit = 2 * (self._limits["header"] + self._limits["body"]) + (16 << 20)
        request = urllib.request.Request(self.url, data=body, headers=self._headers, method="POST")
        try:
            # Past the code's own limit: to queue, to start, and to send pictures back.
            with urllib.request.urlopen(request, timeout=self.timeout + 30) as response:
                data = response.read(limit + 1)
        except urllib.error.HTTPError as error:
            error.close()
            raise ToolInfraError(f"SandboxFusion answered HTTP {error.code}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ToolInfraError(f"SandboxFusion cannot be reached: {error}") from error
        if len(data) > limit:
            raise ToolInfraError(f"SandboxFusion answered more than {limit:,} bytes")
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ToolInfraError("SandboxFusion answered what is not JSON") from error
        if not isinstance(answer, dict):
            raise ToolInfraError("SandboxFusion answered what is not an object")
        return answer

    def _observation(self, answer: dict[str, Any]) -> Observation:
        """What the policy sees of an answer. Nothing in it is taken on trust: the code that the
        policy wrote had the files, and the service's streams, in its hands."""
        status, run = answer.get("status"), answer.get("run_result")
        if status not in ("Success", "Failed") or not isinstance(run, dict):
            raise ToolInfraError(f"SandboxFusion: {status} {str(answer.get('message'))[-500:]}")
        if run.get("status") == "TimeLimitExceeded":
            return _error(f"Error: timed out after {self.timeout:g} s")
        if run.get("status") != "Finished":
            raise ToolInfraError(f"SandboxFusion: the run ended as {str(run.get('status'))[:50]}")
        files = answer.get("files")
        encoded = files.get(RESULT) if isinstance(files, dict) else None
        if not encoded:
            said = str(run.get("stderr"))[-1000:]
            if "ModuleNotFoundError" in said and f'{MODULE}", line' in said:
                raise ToolInfraError(f"SandboxFusion's Python lacks a package: {said[-200:]}")
            return _error("Error: the process ended without a result")
        try:
            frame = bytearray(base64.b64decode(encoded, validate=True))
            head, tail = PREFIX.unpack_from(frame)
            if head > self._limits["header"] or len(frame) != PREFIX.size + head + tail:
                raise ValueError("another length")
            text, error, images = read_result(frame, self._limits)
        except (ValueError, TypeError, RecursionError, struct.error):
            return _error("Error: the process wrote a malformed result")
        return observe(text, error, images)


def _error(text: str) -> Observation:
    return Observation(text, status="tool_error")
