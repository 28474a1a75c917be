"""ConvNeXt on fused kernels, forward and backward, for NVIDIA GPUs; see README.md."""

from convnext_kernels import functional
from convnext_kernels.backends import use_backend
from convnext_kernels.build import __version__, build_info
from convnext_kernels.functional import explain

__all__ = ["__version__", "build_info", "explain", "functional", "use_backend"]
