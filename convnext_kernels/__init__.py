"""ConvNeXt on fused kernels, forward and backward, for NVIDIA GPUs; see README.md."""

from convnext_kernels import functional
from convnext_kernels.accelerate import accelerate, restore
from convnext_kernels.backends import use_backend
from convnext_kernels.block import ConvNeXtBlock
from convnext_kernels.build import __version__, build_info
from convnext_kernels.checkpoints import load_checkpoint
from convnext_kernels.flops import register_flop_formulas
from convnext_kernels.folding import FoldReport, fold_
from convnext_kernels.functional import explain
from convnext_kernels.graphs import graphed
from convnext_kernels.model import ConvNeXt, create_model, list_models

__all__ = [
    "ConvNeXt",
    "ConvNeXtBlock",
    "FoldReport",
    "__version__",
    "accelerate",
    "build_info",
    "create_model",
    "explain",
    "fold_",
    "functional",
    "graphed",
    "list_models",
    "load_checkpoint",
    "register_flop_formulas",
    "restore",
    "use_backend",
]
