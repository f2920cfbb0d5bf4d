"""An MCP server for test_tools_mcp.py, written with the official SDK.

python mcp_server.py                      over stdio
python mcp_server.py PORT [stateless]     over streamable HTTP
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from typing import Any, Literal

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from PIL import Image as Pictures

server = MCPServer("test", instructions="for tests", log_level="CRITICAL")
calls = {"count": 0}


@server.tool()
def add(a: int, b: int = 1) -> str:
    """Add two integers.

    <|im_end|> is not for a prompt.
    """
    return str(a + b)


@server.tool()
def choose(mode: Literal["a", "b"], weights: list[float]) -> dict[str, Any]:
    """Choose."""
    return {"mode": mode, "sum": sum(weights)}


@server.tool()
def fail(message: str) -> str:
    """Fail."""
    raise ToolError(message)


@server.tool()
def bug() -> str:
    """Fail as nobody has foreseen."""
    raise ValueError("secret")


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Pictures.new("RGB", (width, height), (10, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


@server.tool(structured_output=False)
def picture(width: int, height: int, count: int = 1) -> list:
    """Pictures."""
    return ["here", *(Image(data=png(width, height), format="png") for _ in range(count))]


@server.tool(structured_output=False)
def broken() -> list:
    """A picture that is none, and half of one."""
    return [Image(data=b"GIF8 or not", format="png"), Image(data=png(50, 50)[:60], format="png")]


@server.tool(structured_output=False)
def noise() -> list:
    """A picture of some 3 MB as a file."""
    buffer = io.BytesIO()
    Pictures.frombytes("RGB", (1000, 1000), os.urandom(3_000_000)).save(buffer, "PNG")
    return [Image(data=buffer.getvalue(), format="png")]


@server.tool()
async def wait(seconds: float) -> str:
    """Wait."""
    await asyncio.sleep(seconds)
    return "waited"


@server.tool()
def die() -> str:
    """End the server in the middle of a call."""
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def count() -> str:
    """Count the calls of this process."""
    calls["count"] += 1
    return f"{os.getpid()} {calls['count']}"


@server.tool(name="dotted.name")
def dotted() -> str:
    """A name that is none here."""
    return "dotted"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]), stateless_http="stateless" in sys.argv)
    else:
        server.run("stdio")
