"""metis-kernels: fused operators for HDPO, reinforcement learning of agents that use tools.

Importing it imports torch (and triton where there is one), and touches no device.
"""

from importlib import metadata

from metis_kernels._impl import status
from metis_kernels._layout import PrefixLayout
from metis_kernels.advantages import (
    Advantages,
    hdpo_advantages,
    hdpo_normalizers,
    tool_reward,
)
from metis_kernels.hdpo import HDPOConfig, HDPOStats, HDPOTargets, hdpo_loss
from metis_kernels.linear_hdpo import linear_hdpo_loss
from metis_kernels.linear_logprobs import linear_cross_entropy, linear_logprobs
from metis_kernels.logprobs import logprobs
from metis_kernels.packing import (
    ImageRef,
    ImageSpan,
    PackedBatch,
    Trajectory,
    pack,
    unpack,
    unpack_targets,
)
from metis_kernels.prefix_attention import shared_prefix_attention

__all__ = [
    "Advantages",
    "HDPOConfig",
    "HDPOStats",
    "HDPOTargets",
    "ImageRef",
    "ImageSpan",
    "PackedBatch",
    "PrefixLayout",
    "Trajectory",
    "hdpo_advantages",
    "hdpo_loss",
    "hdpo_normalizers",
    "linear_cross_entropy",
    "linear_hdpo_loss",
    "linear_logprobs",
    "logprobs",
    "pack",
    "shared_prefix_attention",
    "status",
    "tool_reward",
    "unpack",
    "unpack_targets",
]

try:
    __version__ = metadata.version("metis-kernels")
except metadata.PackageNotFoundError:
    # A checkout that was never installed; pyproject.toml is the one place that names the version.
    __version__ = "0+unknown"
