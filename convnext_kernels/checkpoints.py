"""Reading published weights: key maps from the names of timm, torchvision and transformers to ours, the official."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]


@dataclass(frozen=True)
class CheckpointFormat:
    """How a library names the parameters: a key that tells the format, and patterns rewritten one after another."""

    name: str
    signature: str
    rules: Rules


OFFICIAL = CheckpointFormat("official", r"downsample_layers\.0\.0\.weight|stem\.weight", ())

TIMM = CheckpointFormat(
    "timm",
    r"stem\.0\.weight",
    (
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^(stages\.\d+)\.blocks\.", r"\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc([12])\.", r".pwconv\1."),
        (r"\.mlp\.grn\.weight$", ".grn.gamma"),
        (r"\.mlp\.grn\.bias$", ".grn.beta"),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    ),
)

TORCHVISION = CheckpointFormat(
    "torchvision",
    r"features\.0\.0\.weight",
    (
        (r"^features\.([1357])\.(\d+)\.", lambda key: f"stages.{int(key[1]) // 2}.{key[2]}."),
        (r"^features\.([0246])\.", lambda key: f"downsample_layers.{int(key[1]) // 2}."),
        (r"\.layer_scale$", ".gamma"),
        (r"\.block\.0\.", ".dwconv."),
        (r"\.block\.2\.", ".norm."),
        (r"\.block\.3\.", ".pwconv1."),
        (r"\.block\.5\.", ".pwconv2."),
        (r"^classifier\.0\.", "norm."),
        (r"^classifier\.2\.", "head."),
    ),
)

TRANSFORMERS = CheckpointFormat(
    "transformers",
    r"(convnext\.|convnextv2\.)?embeddings\.patch_embeddings\.weight",
    (
        (r"^(convnext|convnextv2)\.", ""),
        (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
        (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
        (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"downsample_layers.\1."),
        (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1."),
        (r"\.layer_scale_parameter$", ".gamma"),
        (r"\.layernorm\.", ".norm."),
        (r"\.grn\.weight$", ".grn.gamma"),
        (r"\.grn\.bias$", ".grn.beta"),
        (r"^layernorm\.", "norm."),
        (r"^hidden_states_norms\.stage(\d+)\.", lambda key: f"norm{int(key[1]) - 1}."),
        (r"^classifier\.", "head."),
    ),
)

HEAD_HINT = "; ignore_head=True leaves the model's classifier as it is"

WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema")
"""Where training scripts put the parameters beside other things; averages are taken where there is nothing else."""

FORMATS = (OFFICIAL, TIMM, TORCHVISION, TRANSFORMERS)


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did.

    Attributes:
        format: "official", "timm", "torchvision" or "transformers".
        loaded: how many parameters were loaded.
        ignored: keys of the checkpoint's classifier, or of its final norm, that were not wanted.
        missing: keys of the model that the checkpoint lacks; they keep their values.
        unexpected: keys of the checkpoint that the model lacks (with `strict=False` only).
    """

    format: str
    loaded: int
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.format} checkpoint: {self.loaded} parameters loaded"]
        for word in ("ignored", "missing", "unexpected"):
            if keys := getattr(self, word):
                parts.append(f"{word}: {', '.join(keys)}")
        return "; ".join(parts)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a `.safetensors` file, or any other as `torch.save` wrote it, on the CPU, without running code from it.

    Raises:
        OSError: there is no such file, or it may not be read.
        TypeError: it is no path.
        ValueError: the file is truncated, corrupt or no checkpoint; the message names it.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"checkpoint: got {type(path).__name__}; accepted: a path or a dictionary of tensors")
    path = Path(path)
    try:
        checkpoint = load_file(path) if path.suffix == ".safetensors" else _load_torch(path)
    except OSError:
        raise
    except Exception as error:  # what a decoder makes of broken bytes has no common type
        raise ValueError(f"checkpoint: {path} is truncated, corrupt or holds more than tensors: {error}") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"checkpoint: {path} holds {type(checkpoint).__name__}; accepted: a dictionary of tensors")
    return dict(checkpoint)


def _load_torch(path: Path) -> Any:
    # The official training script stores its command line beside the weights; a Namespace holds plain values only.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def to_official(state_dict: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Renames a checkpoint's keys to ours.

    Args:
        state_dict: parameters by name, or a dictionary that holds them under one of WRAPPERS. What data-parallel
            training, averaging and torch.compile put into names is dropped: "module.", "_orig_mod.", "n_averaged".

    Returns:
        The name of the format found and the parameters under official names, shapes as they were.

    Raises:
        ValueError: no known format; something other than tensors among the values.
    """
    for wrapper in WRAPPERS:
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
            break
    state_dict = {
        re.sub(r"\b(module|_orig_mod)\.", "", str(key)): value
        for key, value in state_dict.items()
        if key != "n_averaged"
    }
    found = next((f for f in FORMATS if any(re.fullmatch(f.signature, key) for key in state_dict)), None)
    if found is None:
        keys = ", ".join(list(state_dict)[:5]) or "no keys"
        names = ", ".join(f.name for f in FORMATS)
        raise ValueError(f"checkpoint: got keys such as {keys}; accepted: those of a ConvNeXt as named by {names}")
    renamed = {}
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"checkpoint: got {type(value).__name__} under {key!r}; accepted: tensors")
        for pattern, replacement in found.rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return found.name, renamed


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    strict: bool = True,
    *,
    ignore_head: bool = False,
) -> LoadReport:
    """Loads published or self-trained weights into a `ConvNeXt` (or `ReferenceConvNeXt`), whichever library named them.

    Shapes may differ by dimensions of size one (1x1 convolutions for linear layers, layer scale [C, 1, 1]). A model
    without a classifier (`num_classes=0`) ignores the checkpoint's; one with `out_indices` also ignores the final norm
    and keeps its own norms where the checkpoint has none. The report says so.

    Args:
        model: the network; unchanged when an error is raised.
        checkpoint: path of a `.safetensors` or `torch.save` file, or a dictionary: parameters by name, or under
            "model", "state_dict", "model_ema" or "state_dict_ema", the first that there is.
        strict: whether missing and unexpected keys are errors. Wrong shapes always are.
        ignore_head: leave the classifier as it is, for fine-tuning with another number of classes.

    Returns:
        The format found, and what was ignored or missing.

    Raises:
        OSError: there is no such file, or it may not be read.
        TypeError: the checkpoint is neither a path nor a dictionary.
        ValueError: the file is truncated or corrupt, the format is unknown, or the parameters do not fit; the message
            names every missing, unexpected and misshapen key.

    transformers computes the final norm with eps 1e-12 where everyone else takes 1e-6: logits differ by that much.
    """
    source = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    format_name, parameters = to_official(source)
    expected = model.state_dict()
    ignored = tuple(key for key in parameters if _is_surplus(key, expected, ignore_head))
    wanted = {key: value for key, value in parameters.items() if key not in ignored}
    missing = tuple(key for key in expected if key not in wanted)
    unexpected = tuple(key for key in wanted if key not in expected)
    matching = {key: value for key, value in wanted.items() if key in expected}
    misshapen = {key: value for key, value in matching.items() if _without_ones(value) != _without_ones(expected[key])}

    problems = {"misshapen": [_describe_shapes(key, value, expected[key]) for key, value in misshapen.items()]}
    if strict:
        problems["missing"] = [key for key in missing if not _may_be_missing(key, ignore_head)]
        problems["unexpected"] = list(unexpected)
    if any(problems.values()):
        listed = "; ".join(f"{problem}: {', '.join(keys)}" for problem, keys in problems.items() if keys)
        hint = HEAD_HINT if any(key.startswith("head.") for key in (*misshapen, *problems.get("missing", ()))) else ""
        raise ValueError(f"checkpoint: its parameters ({format_name} format) do not fit the model; {listed}{hint}")

    model.load_state_dict({key: value.reshape(expected[key].shape) for key, value in matching.items()}, strict=False)
    return LoadReport(format_name, len(matching), ignored, missing, unexpected)


def _is_surplus(key: str, expected: Mapping[str, Tensor], ignore_head: bool) -> bool:
    """Whether a key of the checkpoint is a classifier or a norm of outputs that this model has no use for."""
    if key in ("head.weight", "head.bias"):
        return ignore_head or key not in expected
    return key not in expected and re.fullmatch(r"norm\d*\.(weight|bias)", key) is not None


def _may_be_missing(key: str, ignore_head: bool) -> bool:
    """Whether a checkpoint without this key of the model will do: norms of feature maps, or an ignored classifier."""
    return re.fullmatch(r"norm\d+\.(weight|bias)", key) is not None or (ignore_head and key.startswith("head."))


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def _describe_shapes(key: str, got: Tensor, expected: Tensor) -> str:
    return f"{key} (got {list(got.shape)}, expected {list(expected.shape)})"
