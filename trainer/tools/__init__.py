"""The tools that the policy may call, and the box they come in.

protocol      what a tool is; typed functions as tools; text made harmless
toolbox       strict parsing, running, limits
python        code in a process of its own
text_search   BM25 over local passages
image_search  perceptual hash over local images
"""

from trainer.tools.image_search import ImageSearch
from trainer.tools.protocol import (
    CallError,
    FunctionTool,
    Tool,
    ToolError,
    ToolInfraError,
    ToolSpec,
    neutralise,
)
from trainer.tools.python import PythonTool
from trainer.tools.text_search import TextSearch
from trainer.tools.toolbox import ImageLimits, Toolbox

__all__ = [
    "CallError",
    "FunctionTool",
    "ImageLimits",
    "ImageSearch",
    "PythonTool",
    "TextSearch",
    "Tool",
    "ToolError",
    "ToolInfraError",
    "ToolSpec",
    "Toolbox",
    "neutralise",
]
