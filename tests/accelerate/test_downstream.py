"""Detection, segmentation and CLIP models around an accelerated ConvNeXt, at the sizes of images they train on."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from support import randomise
from torch import Tensor, nn
from torchvision.models.detection import faster_rcnn, mask_rcnn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

from convnext_kernels import accelerate
from convnext_kernels.parity import errors

DEPTHS, DIMS = (1, 1, 2, 1), (40, 80, 160, 320)
TOLERANCE = 1e-5
KINKED = 1e-2
"""For gradients behind many ReLUs: where rounding moves a value across the kink, its gradient comes or goes."""


def accelerated(model: nn.Module, blocks: int = sum(DEPTHS), norms: int = len(DIMS)) -> nn.Module:
    ours = copy.deepcopy(model)
    assert len(accelerate(ours).converted) == blocks + norms
    return ours


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert ours.keys() == theirs.keys() and theirs
    differences = {name: errors(ours[name], value.double())[0] for name, value in theirs.items()}
    assert max(differences.values()) < tolerance, {n: d for n, d in differences.items() if not d < tolerance}


def training_step(model: nn.Module, losses_of: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Losses and the gradient of every parameter."""
    torch.manual_seed(0)
    losses = losses_of(model)
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()} | gradients


def detector() -> nn.Module:
    convnext = torchvision.models.convnext
    settings = [convnext.CNBlockConfig(*sizes) for sizes in zip(DIMS, [*DIMS[1:], None], DEPTHS, strict=True)]
    features = convnext.ConvNeXt(settings, stochastic_depth_prob=0.4, layer_scale=1.0).features
    stages = {str(2 * index + 1): str(index) for index in range(len(DIMS))}
    few = {f"rpn_{when}_nms_top_n_{mode}": 50 for when in ("pre", "post") for mode in ("train", "test")}
    model = mask_rcnn.MaskRCNN(
        BackboneWithFPN(features, stages, list(DIMS), out_channels=16),
        box_head=faster_rcnn.TwoMLPHead(16 * 7 * 7, 32),
        box_predictor=faster_rcnn.FastRCNNPredictor(32, 4),
        mask_head=mask_rcnn.MaskRCNNHeads(16, (16, 16), dilation=1),
        mask_predictor=mask_rcnn.MaskRCNNPredictor(16, 16, 4),
        box_score_thresh=0.0,
        box_detections_per_img=10,
        **few,  # of thousands one might change places with another
    )
    randomise(model)
    return model


def boxes_and_masks() -> list[dict[str, Tensor]]:
    masks = torch.zeros(2, 800, 1333, dtype=torch.uint8)
    masks[0, 100:500, 200:700] = 1
    masks[1, 300:780, 600:1300] = 1
    boxes = torch.tensor([[200.0, 100, 700, 500], [600, 300, 1300, 780]])
    return [{"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}]


def test_mask_rcnn():
    """800x1333: maps of 200x333, 100x166, 50x83 and 25x41."""
    theirs = detector()
    ours = accelerated(theirs)
    images = [torch.rand(3, 800, 1333, generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        (got,), (expected,) = ours.eval()(images), theirs.eval()(images)
    assert len(expected["boxes"]) and expected["masks"].shape[-2:] == (800, 1333)
    assert got["labels"].equal(expected["labels"])
    assert_same(got, expected, 1e-4)

    def losses_of(model: nn.Module) -> dict[str, Tensor]:
        return model(images, boxes_and_masks())

    expected_step = training_step(theirs.train(), losses_of)
    assert {"loss_mask", "loss_rpn_box_reg", "backbone.body.0.0.weight"} <= expected_step.keys()
    assert_same(training_step(ours.train(), losses_of), expected_step, KINKED)


def upernet() -> nn.Module:
    backbone = ConvNextConfig(
        depths=list(DEPTHS),
        hidden_sizes=list(DIMS),
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_channels=16, auxiliary_in_channels=DIMS[2], num_labels=5
    )
    model = UperNetForSemanticSegmentation(config)
    randomise(model)
    return model


@pytest.mark.parametrize("width", [512, 2048])
def test_upernet(width):
    theirs = upernet().eval()
    ours = accelerated(theirs)
    images = torch.randn(1, 3, 512, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, expected = ours(images).logits, theirs(images).logits
    assert expected.shape == (1, 5, 512, width)
    assert_same({"logits": got}, {"logits": expected})


def test_gradients_of_upernet():
    """Its batch norms use their statistics, as those of a pooled map of 1x1 have nothing to take any from."""
    theirs = upernet().eval()
    images = torch.randn(1, 3, 512, 512, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(5, (1, 512, 512), generator=torch.Generator().manual_seed(2))

    def losses_of(model: Any) -> dict[str, Tensor]:
        return {"loss": model(images, labels=labels).loss}

    ours = accelerated(theirs)
    assert_same(training_step(ours, losses_of), training_step(theirs, losses_of), KINKED)


def clip() -> nn.Module:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    vision = {
        "timm_model_name": "convnext_atto",
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_drop_path": 0.1,
        "image_size": 224,
    }
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, output_dict=True)
    randomise(model.visual)
    return model


def test_clip():
    theirs = clip().train()
    ours = accelerated(theirs, blocks=12)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(2))

    def losses_of(model: Any) -> dict[str, Tensor]:
        output = model(images, tokens)
        logits = 10 * output["image_features"] @ output["text_features"].T
        return {"loss": torch.nn.functional.cross_entropy(logits, torch.arange(2))}

    assert_same(training_step(ours, losses_of), training_step(theirs, losses_of))
