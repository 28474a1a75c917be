"""The photographs that a benchmark runs on, cropped and normalised as for ImageNet."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnext_kernels.cli.errors import CommandError, optional

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class Photographs:
    """RGB photographs (PIL images) by name, and the files that could not be read with the reason."""

    images: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def load_photographs(folder: Path | None, limit: int) -> Photographs:
    """Reads up to `limit` photographs of a folder, or the two that scikit-learn ships.

    Raises:
        CommandError: the folder is missing or has no readable image, or a library is not installed.
    """
    return _sample_photographs() if folder is None else _photographs_in(folder, limit)


def _sample_photographs() -> Photographs:
    pil = optional("PIL.Image")
    samples = optional("sklearn.datasets").load_sample_images()
    return Photographs(
        {Path(name).name: pil.fromarray(pixels) for name, pixels in zip(samples.filenames, samples.images, strict=True)}
    )


def _photographs_in(folder: Path, limit: int) -> Photographs:
    pil, operations = optional("PIL.Image"), optional("PIL.ImageOps")
    if not folder.is_dir():
        raise CommandError(f"--images: got {folder}; accepted: an existing folder of images")
    found = Photographs()
    unreadable = (OSError, ValueError, SyntaxError, pil.DecompressionBombError)
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix.lower() not in pil.registered_extensions():
            continue
        try:
            with pil.open(path) as image:
                found.images[path.name] = operations.exif_transpose(image).convert("RGB")
        except unreadable as error:
            found.skipped[path.name] = str(error)
        if len(found.images) == limit:
            break
    if not found.images:
        skipped = f" (cannot read {', '.join(found.skipped)})" if found.skipped else ""
        raise CommandError(f"--images: no readable image in {folder}{skipped}; accepted: jpg, png, webp, bmp, ...")
    return found


def _crop_box(width: int, height: int, is_first: bool, generator: random.Random) -> tuple[float, float, float, float]:
    """The largest central square, and for further crops of the same photograph a random square."""
    side = min(width, height) * (1.0 if is_first else generator.uniform(0.4, 1.0))
    across, down = (0.5, 0.5) if is_first else (generator.random(), generator.random())
    left, top = across * (width - side), down * (height - side)
    return left, top, left + side, top + side


def crop_batch(photographs: Photographs, count: int, resolution: int, seed: int = 0) -> Tensor:
    """Different crops, in turn of each photograph: [count, 3, resolution, resolution] in channels-last float32."""
    pil = optional("PIL.Image")
    generator, images = random.Random(seed), list(photographs.images.values())
    batch = torch.empty(count, resolution, resolution, 3)
    for index in range(count):
        image = images[index % len(images)]
        width, height = image.size
        box = _crop_box(width, height, index < len(images), generator)
        crop = image.resize((resolution, resolution), pil.Resampling.BICUBIC, box=box)
        batch[index] = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(resolution, resolution, 3)
    batch = (batch / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return batch.permute(0, 3, 1, 2)
