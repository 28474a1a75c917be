"""The hosts whose blocks can be swapped, one file for each library."""

from convnext_kernels.accelerate.adapters import mmpretrain, official, timm, torchvision, transformers
from convnext_kernels.accelerate.adapters.adapter import BlockAdapter

ADAPTERS = (
    official.ADAPTER,
    timm.ADAPTER,
    torchvision.ADAPTER,
    transformers.CONVNEXT,
    transformers.DINOV3,
    transformers.MEMORY_FUSER,
    mmpretrain.ADAPTER,
)

OUTSIDE = {
    "MedNeXtBlock": "MedNeXt's block is three-dimensional or has a norm for each channel, and no layer norm",
}
"""Classes named after ConvNeXt that are another block, and why; those of an adapter's form speak for themselves."""

__all__ = ["ADAPTERS", "OUTSIDE", "BlockAdapter"]
