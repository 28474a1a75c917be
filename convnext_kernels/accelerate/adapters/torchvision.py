"""torchvision's CNBlock."""

from convnext_kernels.accelerate.adapters.adapter import BlockAdapter

ADAPTER = BlockAdapter(
    library="torchvision",
    conv="block.0",
    norm="block.2",
    linear1="block.3",
    activation="block.4",
    linear2="block.5",
    drop_path="stochastic_depth",
    layer_scale="layer_scale",
    class_name="CNBlock",
    follows_input=False,
)
