"""Tools as a user would write them, for test_tools_cli.py (`--tools MODULE:NAME`)."""

from PIL import Image

from trainer.tools import FunctionTool, Toolbox, ToolError, ToolInfraError
from trainer.types import Session


@FunctionTool
def half(session: Session, image: int = 1) -> list:
    """Half of an image."""
    picture = session.images[image - 1]
    return [f"seed {session.seed}", picture.resize((picture.width // 2, picture.height // 2))]


@FunctionTool
def fail(infra: bool) -> str:
    """Fail."""
    raise ToolInfraError("down") if infra else ToolError("wrong <answer>")


@FunctionTool
def make(width: int) -> Image.Image:
    """An image."""
    return Image.new("RGB", (width, 3))


some = [half, fail, make]
only = [half]


def box() -> Toolbox:
    return Toolbox(some, max_text=100)


number = 7
