"""`metis tools`: serve a toolbox, try one call by hand, list what there is, build an index.

Exit codes: 0 done, 1 the call failed (tool_error or infra_error), 2 what was asked for is wrong.

Not in trainer/tools/: whoever imports that package loads all tools, as would every `metis` command.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.tools import Toolbox

log = logging.getLogger(__name__)

DONE, FAILED, WRONG = 0, 1, 2
TOKEN_VARIABLE = "METIS_TOOLS_TOKEN"

LIMITS: dict[str, tuple[type, str]] = {
    "concurrency": (int, "calls at a time (256)"),
    "queue": (int, "calls that wait; more are refused with 429 (1024)"),
    "sessions": (int, "open at a time (4096)"),
    "idle_seconds": (float, "without a request, that end a session (1800)"),
    "lifetime_seconds": (float, "that end a session in any case (21600)"),
    "stop_seconds": (float, "for running calls, when the server is stopped (30)"),
    "images": (int, "of a session (64)"),
    "image_pixels": (int, "of an uploaded image (67108864)"),
    "image_bytes": (int, "of the pixels of all sessions (8589934592)"),
    "calls": (int, "of a session (1000)"),
}
"""Fields of trainer.tools.service.ServerLimits -> type, what --help says."""


class Wrong(Exception):
    """Something that was asked for is wrong; the message says what there is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands below `metis tools`."""
    commands = parser.add_subparsers(dest="tools_command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run_tools=run)
        which = sub.add_argument_group("which tools")
        which.add_argument("--task", help="the task's tools (glyphs, where nothing else is named)")
        which.add_argument(
            "--tools", metavar="MODULE:NAME", help="your own: a Toolbox, or what returns one"
        )
        which.add_argument(
            "--mcp",
            action="append",
            default=[],
            metavar="URL|COMMAND",
            help="and those of an MCP server; may be repeated",
        )
        which.add_argument(
            "--unsafe-no-sandbox",
            action="store_true",
            help="run code where this machine cannot hold it: see SECURITY.md",
        )
        return sub

    serve = command("serve", _serve, "the tools over HTTP, for trainers on other machines")
    serve.add_argument("--host", default="127.0.0.1", help="others need a token (127.0.0.1)")
    serve.add_argument("--port", type=int, default=8765, help="0 takes a free one (8765)")
    serve.add_argument(
        "--token-file", type=Path, metavar="FILE", help=f"else {TOKEN_VARIABLE}, else none"
    )
    limits = serve.add_argument_group("limits")
    for limit, (kind, text) in LIMITS.items():
        limits.add_argument(f"--{limit.replace('_', '-')}", type=kind, metavar="N", help=text)
    attempt = command("try", _try, "one call by hand; prints the observation as JSON")
    attempt.add_argument("name", metavar="NAME", help="of the tool")
    attempt.add_argument("arguments", metavar="JSON", help='e.g. \'{"code": "print(1)"}\'')
    attempt.add_argument(
        "--image", action="append", default=[], type=Path, metavar="FILE", help="image_1, image_2"
    )
    attempt.add_argument("--seed", type=int, default=0)
    listing = command("list", _list, "the tools' schemas as JSON, as the policy sees them")
    text = "an index for text_search or image_search, built once and mapped when it is used"
    index = commands.add_parser("index", help=text, description=text, allow_abbrev=False)
    index.set_defaults(run_tools=_index, unsafe_no_sandbox=False)
    index.add_argument("source", type=Path, metavar="SOURCE", help="JSON lines, or a folder")
    index.add_argument("folder", type=Path, metavar="FOLDER", help="of the index")
    index.add_argument("--images", action="store_true", help="of pictures with their texts")
    for sub in (attempt, listing):
        sub.add_argument("--url", help=f"of a running tool server; its token is {TOKEN_VARIABLE}")


def run(args: argparse.Namespace) -> int:
    from trainer.tools import ToolInfraError, sandbox

    if args.unsafe_no_sandbox:
        sandbox.permit_unsafe()
    try:
        return args.run_tools(args)
    except Wrong as error:
        print(f"metis tools {args.tools_command}: {error}", file=sys.stderr)
        return WRONG
    except (ToolInfraError, sandbox.SandboxError) as error:
        print(f"metis tools {args.tools_command}: {error}", file=sys.stderr)
        return FAILED


def _index(args: argparse.Namespace) -> int:
    from trainer.tools.image_search import build_image_index
    from trainer.tools.text_search import build_index

    try:
        manifest = (build_image_index if args.images else build_index)(args.source, args.folder)
    except (OSError, ValueError) as error:
        raise Wrong(str(error)) from None
    print(json.dumps(manifest, indent=1))
    return DONE


# ---- which tools ---------------------------------------------------------------------------------


def _toolbox(args: argparse.Namespace) -> Toolbox:
    """Raises Wrong or ToolInfraError."""
    if getattr(args, "url", None):
        from trainer.tools.client import RemoteToolbox

        try:
            return RemoteToolbox(args.url, patience=60.0)
        except ValueError as error:
            raise Wrong(str(error)) from None
    from trainer.tools import Toolbox

    toolbox = Toolbox([])
    if args.tools is not None:
        toolbox = _imported(args.tools)
    elif args.task is not None or not args.mcp:
        from trainer.tasks import load_task

        try:
            toolbox = load_task(args.task or "glyphs").toolbox()
        except ValueError as error:
            raise Wrong(str(error)) from None
    if not args.mcp:
        return toolbox
    from trainer.tools.mcp import MCPTools

    tools = list(toolbox.tools)
    kept = {name: getattr(toolbox, name) for name in ("max_text", "max_call", "images", "markers")}
    try:
        for server in args.mcp:
            where = {"url": server} if "://" in server else {"command": shlex.split(server)}
            tools += MCPTools.connect(**where)
        return Toolbox(tools, **kept)
    except ValueError as error:
        raise Wrong(str(error)) from None


def _imported(name: str) -> Toolbox:
    """What MODULE:NAME is: a toolbox, a list of tools, or a function that returns one of them."""
    from trainer.tools import Toolbox

    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` would find it
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise Wrong(f"--tools {name}: {error}; expected MODULE:NAME") from None
    if callable(found):
        found = found()
    if isinstance(found, Toolbox):
        return found
    if isinstance(found, Sequence):
        try:
            return Toolbox(found)
        except (TypeError, ValueError, AttributeError) as error:
            raise Wrong(f"--tools {name}: {error}") from None
    raise Wrong(
        f"--tools {name} is a {type(found).__name__}; expected a Toolbox or a list of tools"
    )


# ---- the commands --------------------------------------------------------------------------------


def _serve(args: argparse.Namespace) -> int:
    from trainer.tools.server import serve
    from trainer.tools.service import ServerLimits

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("trainer").setLevel(logging.INFO)
    token = os.environ.get(TOKEN_VARIABLE) or None
    if args.token_file is not None:
        try:
            token = args.token_file.read_text().strip()
        except (OSError, ValueError) as error:
            raise Wrong(f"--token-file: {error}") from None
    try:
        given = {name: getattr(args, name) for name in LIMITS}
        limits = ServerLimits(**{name: n for name, n in given.items() if n is not None})
    except ValueError as error:
        raise Wrong(str(error)) from None
    toolbox = _toolbox(args)
    for tool in toolbox.tools:
        walls = getattr(getattr(tool, "tool", tool), "sandbox", None)
        if walls is not None:
            log.info("%s: %s", tool.name, walls.describe())
    names = ", ".join(schema["function"]["name"] for schema in toolbox.schemas())

    def ready(url: str) -> None:
        print(f"serving {names} at {url}", flush=True)

    try:
        serve(toolbox, args.host, args.port, token=token, limits=limits, ready=ready)
    except (ValueError, OSError) as error:
        raise Wrong(str(error)) from None
    stuck = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    if any(thread.name.startswith("tool-server") for thread in stuck):
        # A tool's function that never returns: Python would wait for its thread for ever.
        log.error("a tool still runs; leaving it behind")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(DONE)
    return DONE


def _try(args: argparse.Namespace) -> int:
    from trainer.types import Session

    images = [_image(path) for path in args.image]
    try:
        json.loads(args.arguments)
    except (ValueError, RecursionError) as error:
        raise Wrong(f"the arguments are no JSON: {error}") from None
    toolbox = _toolbox(args)
    # As the policy would write it: the same strict parsing, of duplicate keys and the like.
    text = f'{{"name": {json.dumps(args.name)}, "arguments": {args.arguments}}}'

    async def attempt():
        async with toolbox:
            session = Session(images, seed=args.seed)
            start = time.perf_counter()
            call, observation = await toolbox.execute(text, session)
            spent = time.perf_counter() - start
            await toolbox.end(session)
            return call, observation, spent, [s["function"]["name"] for s in toolbox.schemas()]

    call, observation, seconds, names = asyncio.run(attempt())
    if call is None and observation.status == "tool_error":
        message = observation.text.removeprefix("Error: ")
        known = "" if "the tools are" in message else f"; the tools are: {', '.join(names)}"
        raise Wrong(message + known)
    shown = {
        "tool": args.name,
        "status": observation.status,
        "text": observation.text,
        "images": [{"width": i.width, "height": i.height} for i in observation.images],
        "ms": round(1e3 * seconds, 1),
    }
    print(json.dumps(shown, indent=1, ensure_ascii=False))
    return DONE if observation.status == "ok" else FAILED


def _image(path: Path):
    from trainer.images import ImageError, open_image

    try:
        return open_image(path.read_bytes())
    except (OSError, ImageError) as error:
        raise Wrong(f"--image {path}: {error}") from None


def _list(args: argparse.Namespace) -> int:
    toolbox = _toolbox(args)

    async def listed():
        async with toolbox:
            return toolbox.schemas()

    print(json.dumps(asyncio.run(listed()), indent=1, ensure_ascii=False))
    return DONE
