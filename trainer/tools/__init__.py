"""The tools that the policy may call, and the box they come in.

protocol      what a tool is; typed functions as tools; text made harmless
toolbox       strict parsing, running, limits
python        code in a sandboxed process of its own      sandbox_fusion  the same on a cluster
image         crop, zoom, rotate
text_search   BM25 over local passages, in memory or in a mapped index
image_search  perceptual hash over local images, likewise; the reference's cached results
web           both over the web, by a provider's key
mcp           the tools of any MCP server
server        a toolbox over HTTP, for trainers elsewhere; client is its other end
"""

from trainer.tools.image import Crop, Rotate, Zoom
from trainer.tools.image_search import CachedImageSearch, ImageIndex, ImageSearch
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
from trainer.tools.sandbox import SandboxError
from trainer.tools.sandbox_fusion import SandboxFusionTool
from trainer.tools.text_search import TextIndex, TextSearch
from trainer.tools.toolbox import ImageLimits, Toolbox

__all__ = [
    "CachedImageSearch",
    "CallError",
    "Crop",
    "FunctionTool",
    "ImageLimits",
    "ImageIndex",
    "ImageSearch",
    "PythonTool",
    "Rotate",
    "SandboxError",
    "SandboxFusionTool",
    "TextIndex",
    "TextSearch",
    "Tool",
    "ToolError",
    "ToolInfraError",
    "ToolSpec",
    "Toolbox",
    "Zoom",
    "neutralise",
]
