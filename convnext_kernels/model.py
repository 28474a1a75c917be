"""ConvNeXt V1, V2 and isotropic on the package's operators, and the published variants by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from convnext_kernels import functional
from convnext_kernels.block import ConvNeXtBlock
from convnext_kernels.checkpoints import load_checkpoint
from convnext_kernels.ops.common.checks import check_input
from convnext_kernels.reference import ReferenceConvNeXt
from convnext_kernels.variants import VARIANTS, network_options


class _LayerNorm2d(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.weight, self.bias, eps=self.eps)


class _PatchConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return functional.patch_linear(input, self.weight, self.bias)


class ConvNeXt(ReferenceConvNeXt):
    """ConvNeXt V1, V2 or isotropic: the published network with its blocks, layer norms and strided convolutions run by
    the package's operators. Module tree, initialisation and names are those of `ReferenceConvNeXt`, that is of the
    official checkpoints.

    Args:
        depths: blocks per stage.
        dims: channels per stage.
        in_chans: channels of the input.
        num_classes: size of the classifier; 0: features in place of logits.
        drop_path_rate: stochastic depth of the last block, in [0, 1); it rises linearly from 0 at the first.
        layer_scale_init_value: the first value of the layer scale; None or 0: the blocks have none.
        use_grn: global response normalisation in the blocks (V2).
        eps: epsilon of the layer norms.
        isotropic: one stage behind a 16x16 stem in place of stages at strides 4, 8, 16, 32.
        out_indices: stages whose normalised maps are returned, increasing, for detection and segmentation; there is
            then no classifier, and one norm `norm{i}` for each of these stages.
        recompute_hidden, float32_residual: of the blocks; see `ConvNeXtBlock`.

    Shapes: [N, in_chans, H, W] to logits [N, num_classes]; with num_classes=0 to features [N, dims[-1]]; with
    out_indices to a list of [N, dims[i], H_i, W_i], channels-last. H and W need not be divisible by 32: each
    downsampling rounds down. They are at least the last stage's stride.

    Dtypes: float16, bfloat16, float32 or float64 (reference backend only) throughout; autocast is obeyed. `use_backend`
    chooses the backend of every operator inside.

    Raises:
        ValueError, TypeError: an argument or the input does not fit; the message names it, what was got and what is
            accepted.

    Source: arXiv 2201.03545 (V1, isotropic), arXiv 2301.00808 (V2).
    """

    block_type = ConvNeXtBlock
    norm_type = _LayerNorm2d
    patch_type = _PatchConv2d

    def __init__(
        self, *args: Any, recompute_hidden: bool | None = None, float32_residual: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, ConvNeXtBlock):
                module.recompute_hidden = recompute_hidden
                module.float32_residual = float32_residual

    def forward_features(self, input: Tensor) -> Tensor | list[Tensor]:
        """The network without its classifier: features [N, dims[-1]]; with `out_indices` a list of normalised maps."""
        check_input(input, (4,))
        last = len(self.dims) - 1 if self.out_indices is None else self.out_indices[-1]
        stride = 16 if self.isotropic else 4 * 2**last
        if input.shape[1] != self.in_chans:
            raise ValueError(f"input: got {input.shape[1]} channels; accepted: in_chans = {self.in_chans}")
        if min(input.shape[2:]) < stride:
            raise ValueError(f"input: got shape {list(input.shape)}; accepted: H and W of at least {stride}")
        return super().forward_features(input)


def list_models() -> list[str]:
    """The names that `create_model` takes, V1 before V2 before isotropic, small to large."""
    return list(VARIANTS)


def create_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    out_indices: Sequence[int] | None = None,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    ignore_head: bool = False,
    **overrides: Any,
) -> ConvNeXt:
    """Builds a published variant, randomly initialised or from a checkpoint.

    Args:
        name: one of `list_models()`, such as "convnext_tiny" or "convnextv2_nano".
        num_classes, in_chans, drop_path_rate, out_indices: see `ConvNeXt`.
        checkpoint: path or dictionary of weights; see `load_checkpoint`, which also tells what was loaded.
        ignore_head: leave the checkpoint's classifier out, for fine-tuning with another number of classes.
        overrides: other arguments of `ConvNeXt`, in place of the variant's (such as depths, layer_scale_init_value).

    Raises:
        ValueError: there is no such variant (the message names the closest); an argument or the checkpoint does not
            fit.

    Warns:
        UserWarning: the checkpoint lacks the norms of `out_indices`, which stay as initialised.
    """
    model = ConvNeXt(
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=drop_path_rate,
        out_indices=out_indices,
        **network_options(name, overrides),
    )
    if checkpoint is not None:
        report = load_checkpoint(model, checkpoint, ignore_head=ignore_head)
        if any(not key.startswith("head.") for key in report.missing):
            warnings.warn(f"create_model({name!r}): {report}", stacklevel=2)
    return model
