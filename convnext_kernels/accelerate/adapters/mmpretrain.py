"""mmpretrain (and mmdetection and mmsegmentation, which take their ConvNeXt from it)."""

from convnext_kernels.accelerate.adapters.adapter import BlockAdapter

ADAPTER = BlockAdapter(
    library="mmpretrain",
    conv="depthwise_conv",
    norm="norm",
    linear1="pointwise_conv1",
    activation="act",
    linear2="pointwise_conv2",
    grn="grn",
    grn_parameters=("gamma", "beta"),
    checkpoint="with_cp",
)
