"""transformers: ConvNeXT and ConvNeXTV2, DINOv3's ConvNeXt, and the memory fusers of SAM 2, SAM 3 and EdgeTAM."""

from convnext_kernels.accelerate.adapters.adapter import BlockAdapter

CONVNEXT = BlockAdapter(
    library="transformers",
    conv="dwconv",
    norm="layernorm",
    linear1="pwconv1",
    activation="act",
    linear2="pwconv2",
    grn="grn",
    layer_scale="layer_scale_parameter",
)

DINOV3 = BlockAdapter(
    library="transformers",
    conv="depthwise_conv",
    norm="layer_norm",
    linear1="pointwise_conv1",
    activation="activation_fn",
    linear2="pointwise_conv2",
)

MEMORY_FUSER = BlockAdapter(
    library="transformers",
    conv="depthwise_conv",
    norm="layer_norm",
    linear1="pointwise_conv1",
    activation="activation",
    linear2="pointwise_conv2",
    drop_path=None,
    layer_scale="scale",
)
