"""The published ConvNeXt in plain torch.nn, without kernels: the baseline of every benchmark and parity test.

The mathematics and the names of parameters are those of the official repositories (arXiv 2201.03545 and 2301.00808).
Where these and the libraries that people run differ in speed alone, the faster form is taken: layer norms of images
call `torch.nn.functional.layer_norm` on a permuted view.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnext_kernels.variants import network_options

GELU_APPROXIMATIONS = {"gelu": "none", "gelu_tanh": "tanh"}


def drop_path_factor(input: Tensor, rate: float) -> Tensor:
    """Stochastic depth's factor [N] for the branch of each sample: 0 with probability `rate`, else 1 / (1 - rate).

    Drawn in float32 (float64 for float64 inputs), so that a seed gives the same factors in every 16-bit type.
    """
    keep = 1.0 - rate
    dtype = torch.promote_types(input.dtype, torch.float32)
    return torch.empty(input.shape[0], dtype=dtype, device=input.device).bernoulli_(keep).div_(keep)


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of images [N, C, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """V2's norm of images [N, H, W, C]: gamma (x Nx) + beta + x

    with Gx = |x|_2 over H and W, and Nx = Gx / (mean_C Gx + eps).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        response = torch.linalg.vector_norm(input, dim=(1, 2), keepdim=True)
        relative = response / (response.mean(dim=-1, keepdim=True) + self.eps)
        return self.gamma * (input * relative) + self.beta + input


class ReferenceBlock(nn.Module):
    """The published block, V1 and V2: input + drop_path(gamma * pwconv2(grn(gelu(pwconv1(norm(dwconv(input)))))))

    Takes and returns [N, C, H, W]. See `ConvNeXtBlock` for the arguments.
    """

    gamma: nn.Parameter | None
    grn: GlobalResponseNorm | None

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 7,
        dilation: int = 1,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        use_grn: bool = False,
        eps: float = 1e-6,
        activation: str = "gelu",
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        _require(dim >= 1, "dim", dim, "at least 1")
        _require(kernel_size >= 1 and kernel_size % 2 == 1, "kernel_size", kernel_size, "an odd number of at least 1")
        _require(dilation >= 1, "dilation", dilation, "at least 1")
        _require(mlp_ratio * dim >= 1, "mlp_ratio", mlp_ratio, f"at least 1 / dim = {1 / dim:g}")
        _require(0 <= drop_path < 1, "drop_path", drop_path, "at least 0 and below 1")
        _require(eps > 0, "eps", eps, "greater than 0")
        _require(
            activation in GELU_APPROXIMATIONS, "activation", activation, " or ".join(map(repr, GELU_APPROXIMATIONS))
        )
        hidden = int(mlp_ratio * dim)
        padding = dilation * (kernel_size // 2)
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim, bias=conv_bias)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.grn = GlobalResponseNorm(hidden) if use_grn else None
        self.pwconv2 = nn.Linear(hidden, dim)
        scale = layer_scale_init_value or 0.0
        self.gamma = nn.Parameter(torch.full((dim,), float(scale))) if scale > 0 else None
        self.drop_path = float(drop_path)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        x = self.dwconv(input).permute(0, 2, 3, 1)
        x = self.pwconv1(self.norm(x))
        x = F.gelu(x, approximate=GELU_APPROXIMATIONS[self.activation])
        if self.grn is not None:
            x = self.grn(x)
        x = self.pwconv2(x)
        if self.gamma is not None:
            x = self.gamma * x
        x = x.permute(0, 3, 1, 2)
        if self.training and self.drop_path > 0:
            x = x * drop_path_factor(input, self.drop_path).to(x.dtype).view(-1, 1, 1, 1)
        return input + x

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, drop_path={self.drop_path:g}"


class ReferenceConvNeXt(nn.Module):
    """The published network, V1, V2 and isotropic. See `ConvNeXt` for arguments, inputs and results."""

    block_type: type[ReferenceBlock] = ReferenceBlock
    norm_type: type[nn.LayerNorm] = ChannelLayerNorm
    patch_type: type[nn.Conv2d] = nn.Conv2d

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        use_grn: bool = False,
        eps: float = 1e-6,
        isotropic: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        _check_network(depths, dims, in_chans, num_classes, drop_path_rate, isotropic)
        self.depths, self.dims = tuple(depths), tuple(dims)
        self.in_chans, self.num_classes, self.isotropic = in_chans, num_classes, isotropic
        self.out_indices = None if out_indices is None else _checked_indices(out_indices, len(self.dims))

        last = max(sum(self.depths) - 1, 1)
        drop_paths = iter([drop_path_rate * index / last for index in range(sum(self.depths))])
        options: dict[str, Any] = {"layer_scale_init_value": layer_scale_init_value, "use_grn": use_grn, "eps": eps}
        stages = [
            nn.Sequential(*(self.block_type(dim, drop_path=next(drop_paths), **options) for _ in range(depth)))
            for depth, dim in zip(self.depths, self.dims, strict=True)
        ]
        if isotropic:
            self.stem = self.patch_type(in_chans, self.dims[0], 16, stride=16)
            self.blocks = stages[0]
        else:
            self.downsample_layers = nn.ModuleList(self._downsampling(eps))
            self.stages = nn.ModuleList(stages)
        if self.out_indices is None:
            self.norm = nn.LayerNorm(self.dims[-1], eps=eps)
            self.head = nn.Linear(self.dims[-1], num_classes) if num_classes else nn.Identity()
        else:
            for index in self.out_indices:
                self.add_module(f"norm{index}", self.norm_type(self.dims[index], eps=eps))
        self.apply(_initialise)

    def _downsampling(self, eps: float) -> Iterator[nn.Sequential]:
        """The layer in front of each stage: the stem, then layer norm and 2x2 convolution of stride 2."""
        yield nn.Sequential(
            self.patch_type(self.in_chans, self.dims[0], 4, stride=4), self.norm_type(self.dims[0], eps=eps)
        )
        for dim, next_dim in pairwise(self.dims):
            yield nn.Sequential(self.norm_type(dim, eps=eps), self.patch_type(dim, next_dim, 2, stride=2))

    def _layers(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each stage with the downsampling in front of it."""
        if self.isotropic:
            return [(self.stem, self.blocks)]
        return list(zip(self.downsample_layers, self.stages, strict=True))

    def forward_features(self, input: Tensor) -> Tensor | list[Tensor]:
        """[N, C, H, W] to pooled, normalised features [N, dims[-1]]; with `out_indices` a list of normalised maps."""
        if self.out_indices is None:
            for downsample, stage in self._layers():
                input = stage(downsample(input))
            return self.norm(input.mean((-2, -1)))
        maps = []
        for index, (downsample, stage) in enumerate(self._layers()[: self.out_indices[-1] + 1]):
            input = stage(downsample(input))
            if index in self.out_indices:
                maps.append(getattr(self, f"norm{index}")(input))
        return maps

    def forward(self, input: Tensor) -> Tensor | list[Tensor]:
        """[N, C, H, W] to logits [N, num_classes]; without classes or with `out_indices` as `forward_features`."""
        features = self.forward_features(input)
        return self.head(features) if self.out_indices is None else features


def _check_network(
    depths: Sequence[int],
    dims: Sequence[int],
    in_chans: int,
    num_classes: int,
    drop_path_rate: float,
    isotropic: bool,
) -> None:
    stages = "one number" if isotropic else "one number or more"
    right = len(depths) == 1 if isotropic else len(depths) >= 1
    _require(right and min(depths) >= 1, "depths", tuple(depths), f"{stages} of at least 1")
    _require(len(dims) == len(depths), "dims", tuple(dims), f"one number for each of depths {tuple(depths)}")
    _require(in_chans >= 1, "in_chans", in_chans, "at least 1")
    _require(num_classes >= 0, "num_classes", num_classes, "at least 0 (0: features in place of logits)")
    _require(0 <= drop_path_rate < 1, "drop_path_rate", drop_path_rate, "at least 0 and below 1")


def _checked_indices(out_indices: Sequence[int], stages: int) -> tuple[int, ...]:
    listed = list(out_indices) if isinstance(out_indices, Sequence) else []
    right = listed and listed == sorted(set(listed) & set(range(stages)))
    _require(bool(right), "out_indices", out_indices, f"increasing stages out of 0 to {stages - 1}, at least one")
    return tuple(listed)


def _require(right: bool, name: str, got: object, accepted: str) -> None:
    if not right:
        raise ValueError(f"{name}: got {got!r}; accepted: {accepted}")


def _initialise(module: nn.Module) -> None:
    """The official initialisation: normal weights of deviation 0.02 cut off at +-2, biases zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def create_reference_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    out_indices: Sequence[int] | None = None,
    **overrides: Any,
) -> ReferenceConvNeXt:
    """The published network of that name in channels-last memory; arguments as in `create_model`."""
    model = ReferenceConvNeXt(
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=drop_path_rate,
        out_indices=out_indices,
        **network_options(name, overrides),
    )
    return model.to(memory_format=torch.channels_last)
