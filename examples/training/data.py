"""Images: scikit-learn's digits or folders of files, augmented, in an order that each process can take up anywhere."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from training.randomness import seed_of, seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels; the published checkpoints expect images normalised by these."""

STOPPING = (signal.SIGTERM, signal.SIGINT)
"""Signals after which a training saves and ends."""

PART = 16
"""Images that a worker reads at a time."""

PADDING = -1
"""The label of an image that fills up a batch of the evaluation and counts for nothing."""


class Unreadable:
    """Stands for a sample, then for its batch, where an image could not be read, or not be handed on.

    It travels as a value because a worker's exception arrives as the text of its traceback.
    """

    def __init__(self, message: str) -> None:
        self.message = message


class Digits:
    """The 1797 handwritten digits of 8x8 pixels that scikit-learn brings; every fifth is for validation."""

    classes = tuple("0123456789")

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits  # only these images need it

        digits = load_digits()
        chosen = [index for index in range(len(digits.images)) if (index % 5 > 0) == train]
        self.images = (digits.images[chosen] * (255 / 16)).astype("uint8")
        self.targets = digits.target[chosen].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), self.targets[index]


def open_data(name: str) -> tuple[Any, Any]:
    """The images for training and for validation.

    Args:
        name: "digits", or a folder with `train/CLASS/IMAGE` and `val/CLASS/IMAGE`.

    Raises:
        OSError: a folder is missing, or a class is empty; the message names it.
        ValueError: the two have not the same classes, or only one.
    """
    if name == "digits":
        return Digits(train=True), Digits(train=False)
    train, validation = (ImageFolder(str(Path(name, part))) for part in ("train", "val"))
    if differing := set(train.classes) ^ set(validation.classes):
        raise ValueError(f"--data: train and val of {name} have not the same classes: {', '.join(sorted(differing))}")
    if len(train.classes) == 1:
        raise ValueError(f"--data: got one class, {train.classes[0]}, in {name}; accepted: two or more")
    return train, validation


@dataclass(frozen=True)
class Augmentation:
    """What is done to an image in training, from the crop on; 0 turns a step off.

    As in timm, with which the papers train, RandAugment's magnitude is of 10, its two operations are each left out half
    the time, and erased pixels become noise.
    """

    crop_scale: tuple[float, float]
    flip: float
    rand_augment: int
    erasing: float

    def transform(self, resolution: int) -> Callable[[Image.Image], Tensor]:
        bicubic = InterpolationMode.BICUBIC
        steps = [v2.RandomResizedCrop(resolution, self.crop_scale, interpolation=bicubic)]
        steps += [v2.RandomHorizontalFlip(self.flip)] if self.flip else []
        if self.rand_augment:
            grey = [round(255 * mean) for mean in MEAN]
            one = v2.RandAugment(1, self.rand_augment, num_magnitude_bins=11, interpolation=bicubic, fill=grey)
            steps += 2 * [v2.RandomApply([one], 0.5)]
        steps += TO_TENSOR
        steps += [v2.RandomErasing(self.erasing, value="random")] if self.erasing else []
        return v2.Compose(steps)


TO_TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def central(resolution: int, part: float) -> Callable[[Image.Image], Tensor]:
    """The square in the middle that holds this part of the shorter side; 1: the whole image made square, as the papers
    evaluate at 384 pixels."""
    size = (resolution, resolution) if part == 1 else round(resolution / part)
    resize = v2.Resize(size, interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(resolution), *TO_TENSOR])


def read(images: Any, index: int) -> tuple[Image.Image, int] | Unreadable:
    try:
        return images[index]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's decoders raise
        path = images.samples[index][0] if isinstance(images, ImageFolder) else index
        return Unreadable(f"image {path} cannot be read: {error}")


class TrainingImages(Dataset):
    """Augmented images by (epoch, index): the same key gives the same pixels in every process of every run."""

    def __init__(self, images: Any, augmentation: Augmentation, resolutions: Sequence[int], seed: int) -> None:
        self.images, self.seed, self.resolutions = images, seed, resolutions
        self.transforms = {resolution: augmentation.transform(resolution) for resolution in set(resolutions)}

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | Unreadable:
        epoch, index = key
        sample = read(self.images, index)
        if isinstance(sample, Unreadable):
            return sample
        with seeded(self.seed, epoch, index):
            return self.transforms[self.resolutions[epoch]](sample[0]), sample[1]


class ValidationImages(Dataset):
    """Every `size`-th image from the `rank`-th on, as many in each process: what is missing is padding."""

    def __init__(self, images: Any, transform: Callable[[Image.Image], Tensor], rank: int, size: int) -> None:
        self.images, self.transform, self.rank, self.size = images, transform, rank, size

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __getitem__(self, position: int) -> tuple[Tensor, int] | Unreadable:
        index = position * self.size + self.rank
        is_padding = index >= len(self.images)
        sample = read(self.images, 0 if is_padding else index)
        if isinstance(sample, Unreadable):
            return sample
        return self.transform(sample[0]), PADDING if is_padding else sample[1]


class TrainingOrder:
    """The batches of one process, of all epochs, from any step on.

    Each epoch's images are shuffled and cut into batches; a batch is dealt out to the processes. The last batch of an
    epoch is smaller, and cut so that every process gets as many images.

    Args:
        images: how many there are.
        batch: images per step, of all processes together.
        seed: of the order.
        rank, size: this process and how many there are.
    """

    def __init__(self, images: int, batch: int, seed: int, rank: int = 0, size: int = 1) -> None:
        if batch > images:
            raise ValueError(f"--batch-size: got {batch}; accepted: at most {images}, the images for training")
        if batch % size:
            raise ValueError(f"--batch-size: got {batch}; accepted: a multiple of {size}, the number of processes")
        self.images, self.batch, self.seed, self.rank, self.size = images, batch, seed, rank, size
        self.steps_per_epoch = images // batch + (images % batch >= size)

    def steps(self, first: int, last: int) -> Iterator[list[tuple[int, int]]]:
        """The keys (epoch, index) of each step of `range(first, last)`."""
        order: list[int] = []
        for step in range(first, last):
            epoch, position = divmod(step, self.steps_per_epoch)
            if position == 0 or step == first:
                generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
                order = torch.randperm(self.images, generator=generator).tolist()
            batch = order[position * self.batch : (position + 1) * self.batch]
            whole = len(batch) // self.size * self.size
            yield [(epoch, index) for index in batch[self.rank : whole : self.size]]


def collate(samples: list[Any]) -> list[Tensor] | Unreadable:
    broken = next((sample for sample in samples if isinstance(sample, Unreadable)), None)
    try:
        return broken or default_collate(samples)
    except RuntimeError as error:  # a worker's images go straight into shared memory
        return Unreadable(f"--workers: got no memory for an image; accepted: fewer, 0, or a larger /dev/shm: {error}")


def leave_signals_to_the_trainer(worker: int) -> None:
    """A signal to the whole process group must not kill the workers before the trainer has saved."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class Batches:
    """Images [N, 3, H, W], channels last, and labels [N], on a device, for each list of keys; or what was unreadable.

    Workers read a batch in parts, and the device puts it together: in shared memory two parts wait for each worker,
    however large the batch is, beside as many of an evaluation.
    """

    images: Dataset
    keys: Iterable[list[Any]]
    workers: int
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | Unreadable]:
        ahead, keys = tee(self.keys)
        parts = iter(
            DataLoader(
                self.images,
                batch_sampler=chain.from_iterable(map(cut, ahead)),
                num_workers=self.workers,
                collate_fn=collate,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=leave_signals_to_the_trainer,
            )
        )
        for batch in keys:
            yield self._together(islice(parts, len(cut(batch))))

    def _together(self, parts: Iterable[list[Tensor] | Unreadable]) -> tuple[Tensor, Tensor] | Unreadable:
        broken, on_device = None, []
        for part in parts:  # to the end: what follows is the next batch's
            if isinstance(part, Unreadable):
                broken = broken or part
                continue
            images, labels = (tensor.to(self.device, non_blocking=True) for tensor in part)
            # On a CPU too this is a copy: no more than a part stays in shared memory.
            on_device.append((images.contiguous(memory_format=torch.channels_last), labels))
        if broken:
            return broken
        images, labels = map(torch.cat, zip(*on_device, strict=True))
        return images, labels


def cut(keys: list[Any]) -> list[list[Any]]:
    """The parts of a batch: small ones cost no more time, measured down to 8 images."""
    return [keys[first : first + PART] for first in range(0, len(keys), PART)]


@dataclass(frozen=True)
class Mixing:
    """MixUp or CutMix, one at random where both are on; 0 turns one off.

    Takes images [N, 3, H, W] and labels [N]; gives mixed images and probabilities [N, classes], or both as they were.
    """

    mixup: float
    cutmix: float
    classes: int

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        kinds = ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix))
        on = [kind(alpha=alpha, num_classes=self.classes) for kind, alpha in kinds if alpha]
        return v2.RandomChoice(on)(images, labels) if on else (images, labels)
