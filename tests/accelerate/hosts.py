"""Every ConvNeXt that other libraries build, small, and what `accelerate` should make of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import doubles
import timm
import torch
import torchvision
import transformers
from support import randomise
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.models.edgetam_video.modeling_edgetam_video import EdgeTamVideoMemoryFuser
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoMemoryFuser
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import Sam3TrackerVideoMemoryFuser

DEPTHS, DIMS, CLASSES = (1, 2, 1, 1), (16, 24, 32, 40), 7
SIZES = {"depths": DEPTHS, "dims": DIMS, "num_classes": CLASSES}
DROP_PATH = 0.5
V2 = {"use_grn": True, "layer_scale_init_value": None}
MAPS = {"out_indices": (0, 1, 2, 3)}
IMAGES = (6, 3, 64, 64)


@dataclass(frozen=True)
class Host:
    """A model of another library.

    Attributes:
        build: makes it.
        converted: of each library and class that should be accelerated, how many.
        skipped: of each reason for which a block should be left alone, how many.
        run: calls the model on images; returns all that it can return.
        shape: of the images.
        drops: it has stochastic depth.
        follows: its norms leave contiguous images contiguous; ours make them channels-last.
    """

    build: Callable[[], nn.Module]
    converted: Mapping[str, int]
    skipped: Mapping[str, int] = field(default_factory=dict)
    run: Callable[[nn.Module, Tensor], Any] = nn.Module.__call__
    shape: tuple[int, ...] = IMAGES
    drops: bool = True
    follows: bool = False

    def make(self) -> nn.Module:
        """The model in training mode, its parameters drawn, layer scale near 1."""
        model = self.build().train()
        randomise(model)
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):  # torchvision's has three dimensions
                parameter.data.normal_(1, 0.2)
        return model

    def images(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(3))

    def outputs(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """All tensors that the model returns."""
        outputs = [output for output in tree_leaves(self.run(model, images)) if isinstance(output, Tensor)]
        return {f"output {index}": output for index, output in enumerate(outputs)}


def timm_maps(model: Any, images: Tensor) -> Any:
    features, maps = model.forward_intermediates(images)
    return model.forward_head(features), maps


def timm_host(
    name: str, blocks: int = 5, norms: int = 4, skipped: Mapping[str, int] | None = None, **options: Any
) -> Host:
    def build() -> nn.Module:
        if name == "ConvNeXt":  # create_model passes over options that are None
            return timm.models.ConvNeXt(drop_path_rate=DROP_PATH, **SIZES | options)
        return timm.create_model(name, drop_path_rate=DROP_PATH, **SIZES | options)

    kind = "ConvBlock" if name.startswith("edgenext") else "ConvNeXtBlock"
    converted = {f"timm {kind}": blocks, "LayerNorm2d": norms} if blocks else {}
    return Host(build, converted, skipped or {}, timm_maps)


def timm_maxxvit() -> nn.Module:
    maxxvit = timm.models.maxxvit
    conv = maxxvit.MaxxVitConvCfg(block_type="convnext")
    sizes = {"embed_dim": (16, 32), "depths": (2, 2), "block_type": ("C", "C"), "stem_width": (8, 16)}
    return maxxvit.MaxxVit(maxxvit.MaxxVitCfg(conv_cfg=conv, **sizes), num_classes=CLASSES, drop_path_rate=DROP_PATH)


def timm_csatv2() -> nn.Module:
    return timm.create_model("csatv2", dims=DIMS, depths=(1, 1, 1, 1), transformer_depths=(0, 0, 0, 0))


def timm_swiftformer() -> nn.Module:
    return timm.create_model("swiftformer_xs", layers=(1, 2), embed_dims=(16, 24), downsamples=(False, True))


def torchvision_model() -> nn.Module:
    convnext = torchvision.models.convnext
    settings = [convnext.CNBlockConfig(*sizes) for sizes in zip(DIMS, [*DIMS[1:], None], DEPTHS, strict=True)]
    return convnext.ConvNeXt(settings, stochastic_depth_prob=DROP_PATH, num_classes=CLASSES)


def torchvision_maps(model: Any, images: Tensor) -> Any:
    maps = [images]
    for layer in model.features:
        maps.append(layer(maps[-1]))
    return maps[1:], model.classifier(model.avgpool(maps[-1]))


def transformers_host(
    family: str, kind: str, block: str, skipped: Mapping[str, int] | None = None, **options: Any
) -> Host:
    sizes = {"depths": list(DEPTHS), "hidden_sizes": list(DIMS), "num_labels": CLASSES, "drop_path_rate": DROP_PATH}
    if kind == "Backbone":
        sizes["out_features"] = ["stage1", "stage2", "stage3", "stage4"]

    def build() -> nn.Module:
        config = getattr(transformers, f"{family}Config")(**sizes | options)
        return getattr(transformers, family + kind)(config)

    def run(model: nn.Module, images: Tensor) -> Any:
        return model(images, output_hidden_states=True).to_tuple()

    converted = {} if skipped else {f"transformers {block}": 5, f"{family}LayerNorm": 4}
    return Host(build, converted, skipped or {}, run)


def fuser_host(kind: type[nn.Module], config: str, block: str) -> Host:
    sizes = {"memory_fuser_embed_dim": 16, "memory_fuser_intermediate_dim": 48, "memory_fuser_num_layers": 2}

    def build() -> nn.Module:
        return kind(getattr(transformers, config)(**sizes))

    return Host(build, {f"transformers {block}": 2}, shape=(2, 16, 9, 7), drops=False)


def official_host(kind: Any = doubles.OfficialNetwork, norms: int = 4, **options: Any) -> Host:
    def build() -> nn.Module:
        return kind(**SIZES | options, drop_path_rate=DROP_PATH)

    depths = options.get("depths", DEPTHS)
    mm = issubclass(kind, doubles.MMNetwork)
    block, norm = ("mmpretrain MMBlock", "MMLayerNorm") if mm else ("official OfficialBlock", "OfficialLayerNorm")
    return Host(build, {block: sum(depths)} | ({norm: norms} if norms else {}), follows=True)


def audio_block() -> nn.Module:
    """Vocos' and its like are ConvNeXt's in one dimension."""
    block = doubles.OfficialBlock(16)
    block.dwconv = nn.Conv1d(16, 16, 7, padding=3, groups=16)
    return nn.Sequential(block)


def sam2_fuser() -> nn.Module:
    return nn.Sequential(*(doubles.OfficialBlock(16, images_norm=True) for _ in range(2)))


SIMPLE_NORM = "its `norm` is a SimpleNorm2d; accepted: a layer norm"
RMS_NORM = "its `norm` is a RmsNorm{}; accepted: a layer norm"
RELU = "its `act` is a ReLU; accepted: GELU, exact or by tanh"
SILU = "its `mlp.act` is a SiLU; accepted: GELU, exact or by tanh"
EXTRA = "it has `{}`, a {}, which ConvNeXt's block has not"
WIDENS = "its `conv_dw` is not depthwise: {} to {} channels in {} groups"

HOSTS = {
    "timm atto": timm_host("convnext_atto"),
    "timm atto_ols": timm_host("convnext_atto_ols"),
    "timm atto, linear layers": timm_host("convnext_atto", conv_mlp=False),
    "timm nano_ols": timm_host("convnext_nano_ols"),
    "timm tiny": timm_host("convnext_tiny"),
    "timm tiny_hnf": timm_host("convnext_tiny_hnf"),
    "timm large_mlp": timm_host("convnext_large_mlp"),
    "timm xxlarge": timm_host("convnext_xxlarge"),
    "timm V2 atto": timm_host("convnextv2_atto"),
    "timm V2, 1x1 convolutions": timm_host("convnextv2_atto", conv_mlp=True),
    "timm V2 with gamma": timm_host("convnextv2_tiny", ls_init_value=1.0),
    "timm test_convnext": timm_host("test_convnext"),
    "timm test_convnext2": timm_host("test_convnext2"),
    "timm without gamma": timm_host("ConvNeXt", ls_init_value=None),
    "timm without biases": timm_host("convnext_tiny", conv_bias=False),
    "timm stride 16": timm_host("convnext_atto", output_stride=16),
    "timm stride 8": timm_host("convnext_tiny", output_stride=8),
    "timm 7x7, 5x5, 3x3": timm_host("convnext_tiny", kernel_sizes=(7, 5, 5, 3)),
    "timm epsilon": timm_host("convnext_tiny", norm_eps=1e-3),
    "timm EdgeNeXt": timm_host("edgenext_xx_small", depths=(2, 2, 2, 2)),
    "timm EdgeNeXt rw": timm_host(
        "edgenext_small_rw",
        blocks=2,
        norms=1,
        depths=(2, 2, 2, 2),
        dims=(8, 16, 32, 64),
        skipped={WIDENS.format(dim, 2 * dim, dim): 1 for dim in (8, 16, 32)},
    ),
    "torchvision": Host(torchvision_model, {"torchvision CNBlock": 5, "LayerNorm2d": 4}, run=torchvision_maps),
    "transformers": transformers_host(
        "ConvNext", "ForImageClassification", "ConvNextLayer", layer_scale_init_value=1.0
    ),
    "transformers without gamma": transformers_host("ConvNext", "Model", "ConvNextLayer", layer_scale_init_value=0.0),
    "transformers gelu_new": transformers_host("ConvNext", "Model", "ConvNextLayer", hidden_act="gelu_new"),
    "transformers backbone": transformers_host("ConvNext", "Backbone", "ConvNextLayer"),
    "transformers V2": transformers_host("ConvNextV2", "ForImageClassification", "ConvNextV2Layer"),
    "transformers V2 backbone": transformers_host("ConvNextV2", "Backbone", "ConvNextV2Layer"),
    "transformers DINOv3": transformers_host("DINOv3ConvNext", "Model", "DINOv3ConvNextLayer"),
    "transformers DINOv3 backbone": transformers_host("DINOv3ConvNext", "Backbone", "DINOv3ConvNextLayer"),
    "transformers SAM 2 fuser": fuser_host(Sam2VideoMemoryFuser, "Sam2VideoConfig", "Sam2VideoMemoryFuserCXBlock"),
    "transformers SAM 3 fuser": fuser_host(
        Sam3TrackerVideoMemoryFuser, "Sam3TrackerVideoConfig", "Sam3TrackerVideoMemoryFuserCXBlock"
    ),
    "transformers EdgeTAM fuser": fuser_host(
        EdgeTamVideoMemoryFuser, "EdgeTamVideoConfig", "EdgeTamVideoMemoryFuserCXBlock"
    ),
    "official": official_host(),
    "official V2": official_host(**V2),
    "official isotropic": official_host(depths=(2,), dims=(24,), isotropic=True, layer_scale_init_value=None, norms=0),
    "official detection": official_host(**MAPS),
    "SAM 2 fuser": Host(sam2_fuser, {"official OfficialBlock": 2}, shape=(2, 16, 9, 7), drops=False),
    "mmpretrain": official_host(doubles.MMNetwork, **MAPS),
    "mmpretrain V2": official_host(doubles.MMNetwork, **V2),
    "mmpretrain, 1x1 convolutions": official_host(doubles.MMConvNetwork, use_grn=True),
    "mmpretrain, checkpointed": official_host(doubles.MMCheckpointedNetwork, **MAPS),
}
"""Those of which blocks are converted."""

OTHERS = {
    "timm zepto_rms": timm_host("convnext_zepto_rms", blocks=0, skipped={SIMPLE_NORM: 5}),
    "timm zepto_rms_ols": timm_host("convnext_zepto_rms_ols", blocks=0, skipped={SIMPLE_NORM: 5}),
    "timm atto_rms": timm_host("convnext_atto_rms", blocks=0, skipped={RMS_NORM.format("2d"): 5}),
    "timm RMS norm": timm_host("convnext_tiny", norm_layer="rmsnorm", blocks=0, skipped={RMS_NORM.format(""): 5}),
    "timm test_convnext3": timm_host("test_convnext3", blocks=0, skipped={SILU: 5}),
    "timm CoAtNeXt": Host(
        timm_maxxvit,
        {},
        {
            "its `conv_dw` has stride (2, 2); accepted: 1": 1,
            WIDENS.format(16, 32, 16): 1,
            EXTRA.format("ls", "LayerScale2d"): 2,
        },
    ),
    "timm CSATv2": Host(timm_csatv2, {}, {EXTRA.format("attn", "SpatialAttention"): 4}),
    "timm SwiftFormer": Host(timm_swiftformer, {}, {EXTRA.format("layer_scale", "LayerScale2d"): 3}),
    "transformers ReLU": transformers_host("ConvNext", "Model", "ConvNextLayer", hidden_act="relu", skipped={RELU: 5}),
    "audio": Host(audio_block, {}, {"its `dwconv` is a Conv1d; accepted: Conv2d": 1}),
}
"""Those that keep all of their blocks, and why."""
