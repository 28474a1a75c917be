"""Stand-ins for hosts that are no installable packages: the attributes, parameters and mathematics of their blocks."""

from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convnext_kernels.reference import GlobalResponseNorm, ReferenceConvNeXt


class OfficialLayerNorm(nn.Module):
    """Layer norm over the channels of images [N, C, H, W], written out, so that it keeps their layout."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        centred = input - input.mean(1, keepdim=True)
        normalised = centred * (centred.square().mean(1, keepdim=True) + self.eps).rsqrt()
        return self.weight[:, None, None] * normalised + self.bias[:, None, None]


class Block(nn.Module):
    """What the blocks have under the same names."""

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale_init_value: float | None = 1e-6) -> None:
        super().__init__()
        self.act = nn.GELU()
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if layer_scale_init_value else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()


class OfficialBlock(Block):
    """The authors' block; `images_norm`: it normalises before the permutation, as SAM 2's."""

    def __init__(
        self, dim: int, use_grn: bool = False, eps: float = 1e-6, images_norm: bool = False, **options: Any
    ) -> None:
        super().__init__(dim, **options)
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = OfficialLayerNorm(dim, eps) if images_norm else nn.LayerNorm(dim, eps)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        if use_grn:
            self.grn = GlobalResponseNorm(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.images_norm = images_norm

    def forward(self, input: Tensor) -> Tensor:
        x = self.dwconv(input)
        x = self.norm(x).permute(0, 2, 3, 1) if self.images_norm else self.norm(x.permute(0, 2, 3, 1))
        x = self.act(self.pwconv1(x))
        if hasattr(self, "grn"):
            x = self.grn(x)
        x = self.pwconv2(x)
        if self.gamma is not None:
            x = self.gamma * x
        return input + self.drop_path(x.permute(0, 3, 1, 2))


class OfficialNetwork(ReferenceConvNeXt):
    """V1, V2 and isotropic; with `out_indices` the backbone of detection and segmentation, and DINOv3's."""

    block_type: Any = OfficialBlock
    norm_type: Any = OfficialLayerNorm


class MMLayerNorm(nn.LayerNorm):
    """Layer norm that is told where the channels lie; images come out contiguous."""

    def forward(self, input: Tensor, data_format: str = "channel_first") -> Tensor:
        if data_format == "channel_last":
            return super().forward(input)
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class MMResponseNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, input: Tensor, data_format: str = "channel_first") -> Tensor:
        spatial, channels, shape = ((1, 2), -1, -1) if data_format == "channel_last" else ((2, 3), 1, (1, -1, 1, 1))
        response = torch.linalg.vector_norm(input, dim=spatial, keepdim=True)
        relative = response / (response.mean(channels, keepdim=True) + self.eps)
        return self.gamma.view(shape) * (input * relative) + self.beta.view(shape) + input


class MMBlock(Block):
    """mmpretrain's block: linear layers or 1x1 convolutions; `with_cp` computes it again in backward."""

    def __init__(
        self,
        dim: int,
        use_grn: bool = False,
        eps: float = 1e-6,
        linear_pw_conv: bool = True,
        with_cp: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, **options)
        pointwise: Any = nn.Linear if linear_pw_conv else partial(nn.Conv2d, kernel_size=1)
        self.with_cp, self.linear_pw_conv = with_cp, linear_pw_conv
        self.depthwise_conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = MMLayerNorm(dim, eps)
        self.pointwise_conv1 = pointwise(dim, 4 * dim)
        self.pointwise_conv2 = pointwise(4 * dim, dim)
        self.grn = MMResponseNorm(4 * dim) if use_grn else None

    def forward(self, input: Tensor) -> Tensor:
        if self.with_cp and input.requires_grad:
            return checkpoint(self._run, input, use_reentrant=False)
        return self._run(input)

    def _run(self, input: Tensor) -> Tensor:
        x, data_format = self.depthwise_conv(input), "channel_first"
        if self.linear_pw_conv:
            x, data_format = x.permute(0, 2, 3, 1), "channel_last"
        x = self.act(self.pointwise_conv1(self.norm(x, data_format=data_format)))
        if self.grn is not None:
            x = self.grn(x, data_format=data_format)
        x = self.pointwise_conv2(x)
        if self.linear_pw_conv:
            x = x.permute(0, 3, 1, 2)
        if self.gamma is not None:
            x = x * self.gamma.view(-1, 1, 1)
        return input + self.drop_path(x)


class MMNetwork(ReferenceConvNeXt):
    block_type: Any = MMBlock
    norm_type: Any = MMLayerNorm


class MMConvNetwork(MMNetwork):
    block_type = partial(MMBlock, linear_pw_conv=False)


class MMCheckpointedNetwork(MMNetwork):
    block_type = partial(MMBlock, with_cp=True)
