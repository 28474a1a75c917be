"""The authors' repositories (facebookresearch/ConvNeXt, ConvNeXt-V2: classification, isotropic, detection,
segmentation), DINOv3's (facebookresearch/dinov3) and SAM 2's memory fuser (facebookresearch/sam2)."""

from convnext_kernels.accelerate.adapters.adapter import BlockAdapter

ADAPTER = BlockAdapter(
    library="official",
    conv="dwconv",
    norm="norm",
    linear1="pwconv1",
    activation="act",
    linear2="pwconv2",
    grn="grn",
    grn_parameters=("gamma", "beta"),
)
