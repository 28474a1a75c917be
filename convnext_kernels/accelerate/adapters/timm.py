"""timm: ConvNeXt V1 and V2, with linear layers or 1x1 convolutions; EdgeNeXt's convolution blocks are built alike."""

from convnext_kernels.accelerate.adapters.adapter import BlockAdapter

ADAPTER = BlockAdapter(
    library="timm",
    conv="conv_dw",
    norm="norm",
    linear1="mlp.fc1",
    activation="mlp.act",
    linear2="mlp.fc2",
    grn="mlp.grn",
    follows_input=False,
)
