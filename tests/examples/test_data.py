"""The images of examples/train.py: their order, their augmentation, and what cannot be read."""

from itertools import product
from shutil import rmtree

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from training import data
from training.randomness import seed_of, seeded

CPU = torch.device("cpu")

AUGMENTATION = data.Augmentation(crop_scale=(0.1, 1.0), flip=0.5, rand_augment=9, erasing=0.5)


@pytest.fixture
def folder(tmp_path):
    """Two classes, with three images of 12x12 for training and two for validation each."""
    for part, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                image = torch.randint(0, 256, (12, 12, 3), dtype=torch.uint8).numpy()
                Image.fromarray(image).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize(("images", "batch", "size"), [(10, 4, 1), (10, 4, 2), (11, 4, 2), (9, 4, 2), (8, 4, 4)])
def test_an_epoch_deals_out_each_image_once_and_as_many_to_each_process(images, batch, size):
    orders = [data.TrainingOrder(images, batch, 0, rank, size) for rank in range(size)]
    steps = orders[0].steps_per_epoch
    dealt = [list(order.steps(0, 2 * steps)) for order in orders]
    for step in range(2 * steps):
        parts = [of_process[step] for of_process in dealt]
        assert len({len(part) for part in parts}) == 1
        assert {epoch for part in parts for epoch, _ in part} == {step // steps}
    first = [key for of_process in dealt for step in of_process[:steps] for key in step]
    assert len(set(first)) == len(first) == images - images % batch % size
    assert [key[1] for key in first] != [key[1] for of_process in dealt for step in of_process[steps:] for key in step]


def test_processes_share_the_batches_of_one():
    alone = list(data.TrainingOrder(12, 4, 3).steps(0, 6))
    shared = [list(data.TrainingOrder(12, 4, 3, rank, 2).steps(0, 6)) for rank in (0, 1)]
    assert [sorted(batch) for batch in alone] == [sorted([*a, *b]) for a, b in zip(*shared, strict=True)]


def test_the_order_goes_on_from_any_step():
    order = data.TrainingOrder(11, 4, 7)
    assert list(order.steps(0, 9))[5:] == list(order.steps(5, 9))


def test_a_key_gives_the_same_pixels_whatever_was_drawn_before():
    images = data.TrainingImages(data.Digits(train=True), AUGMENTATION, [16, 16], seed=1)
    first, label = images[0, 5]
    torch.rand(3)
    before = torch.get_rng_state()
    again, _ = images[0, 5]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and label == 7
    assert not torch.equal(first, images[1, 5][0])
    assert not torch.equal(first, data.TrainingImages(data.Digits(train=True), AUGMENTATION, [16], seed=2)[0, 5][0])


def test_a_quarter_of_the_images_is_spared_by_rand_augment():
    """Two operations, each with probability 1/2; now and then one that was drawn changes nothing."""
    image = data.Digits(train=True)[5][0]
    plain, augmented = (data.Augmentation((0.5, 1.0), 0.0, magnitude, 0.0).transform(16) for magnitude in (0, 9))
    spared = 0
    for index in range(300):
        with seeded(index):
            expected = plain(image)
        with seeded(index):
            spared += torch.equal(augmented(image), expected)
    assert 0.25 <= spared / 300 < 0.45


def test_erased_pixels_are_noise():
    erased = data.Augmentation((1.0, 1.0), 0.0, 0, 1.0).transform(64)(Image.new("RGB", (64, 64)))
    assert erased.amax() > 0 and len(erased.unique()) > 100


def test_the_resolution_changes_with_the_epoch():
    images = data.TrainingImages(data.Digits(train=True), AUGMENTATION, [16, 24], seed=1)
    assert [images[epoch, 0][0].shape for epoch in (0, 1)] == [(3, 16, 16), (3, 24, 24)]


def test_seeds_of_places_differ_and_last():
    keys = [key for length in (1, 2, 3) for key in product(range(3), repeat=length)]
    assert len({seed_of(*key) for key in keys}) == len(keys) == 39
    assert seed_of(0, 1, 2) == 4256299752
    with seeded(0, 1, 2):
        inside = torch.rand(2)
    torch.manual_seed(seed_of(0, 1, 2))
    assert torch.equal(inside, torch.rand(2))


def test_digits_are_split_without_overlap():
    train, validation = data.Digits(train=True), data.Digits(train=False)
    assert (len(train), len(validation)) == (1437, 360)
    image, label = train[0]
    assert image.size == (8, 8) and image.mode == "RGB" and image.getextrema()[0][1] > 230 and label == 1


@pytest.mark.parametrize("size", [1, 3, 7])
def test_validation_counts_each_image_once(folder, size):
    _, validation = data.open_data(str(folder))
    parts = [data.ValidationImages(validation, data.central(8, 1.0), rank, size) for rank in range(size)]
    assert len({len(part) for part in parts}) == 1
    labels = [part[position][1] for part in parts for position in range(len(part))]
    assert sorted(label for label in labels if label != data.PADDING) == [0, 0, 1, 1]


def test_the_centre_is_cut_from_a_longer_side():
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (12, 2, 28, 18))
    centre = data.central(16, 0.8)(image)
    assert centre.shape == (3, 16, 16) and centre.amin() > 2


def test_a_whole_image_is_made_square():
    """As the official evaluation does from 384 pixels on."""
    image = Image.fromarray(torch.randint(0, 256, (20, 40, 3), dtype=torch.uint8).numpy())
    whole = v2.Normalize(data.MEAN, data.STD)(v2.functional.to_image(image.resize((16, 16), Image.BICUBIC)) / 255)
    torch.testing.assert_close(data.central(16, 1.0)(image), whole.as_subclass(torch.Tensor))


def test_an_empty_class_is_refused(folder):
    (folder / "train" / "bird").mkdir()
    with pytest.raises(FileNotFoundError, match="no valid file for the classes bird"):
        data.open_data(str(folder))


def test_other_classes_for_validation_are_refused(folder):
    (folder / "val" / "dog").rename(folder / "val" / "bird")
    with pytest.raises(ValueError, match="not the same classes: bird, dog"):
        data.open_data(str(folder))


def test_one_class_is_refused(folder):
    for part in ("train", "val"):
        rmtree(folder / part / "dog")
    with pytest.raises(ValueError, match="--data: got one class, cat, in"):
        data.open_data(str(folder))


@pytest.mark.parametrize("content", [b"", b"no image", "truncated"], ids=["empty", "no image", "truncated"])
def test_an_unreadable_image_is_named(folder, content, monkeypatch):
    path = folder / "train" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:150] if content == "truncated" else content)
    images = data.TrainingImages(data.open_data(str(folder))[0], AUGMENTATION, [8], seed=0)
    monkeypatch.setattr(data, "PART", 1)
    broken, whole = data.Batches(images, [[(0, 1), (0, 0)], [(0, 2), (0, 3)]], 0, CPU)
    assert isinstance(broken, data.Unreadable)
    assert str(path) in broken.message and "cannot be read" in broken.message
    assert torch.equal(whole[0], torch.stack([images[key][0] for key in ((0, 2), (0, 3))]))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_put_together_of_what_workers_read(workers):
    images = torch.randn(100, 3, 4, 4)
    steps = [torch.randperm(100)[:size].tolist() for size in (5, 3 * data.PART + 1, data.PART)]
    batches = data.Batches([(image, label) for label, image in enumerate(images)], iter(steps), workers, CPU)
    for (got, labels), step in zip(batches, steps, strict=True):
        assert torch.equal(got, images[step]) and labels.tolist() == step
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_large_batch_is_read_in_small_parts(monkeypatch):
    """Else a step of 4096 images would wait in shared memory, twice for each worker."""
    sizes, collate = [], data.collate
    monkeypatch.setattr(data, "collate", lambda samples: sizes.append(len(samples)) or collate(samples))
    ((images, _),) = data.Batches(100 * [(torch.zeros(3, 1, 1), 0)], [list(range(100))], 0, CPU)
    assert len(images) == sum(sizes) == 100 and max(sizes) == data.PART


def test_mixing_draws_either_kind():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    torch.manual_seed(0)
    mixed = [data.Mixing(0.8, 1.0, 10)(images, labels) for _ in range(8)]
    pixels_kept = {bool((got == images).any()) for got, _ in mixed}
    assert pixels_kept == {True, False}
    for _, targets in mixed:
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert data.Mixing(0.0, 0.0, 10)(images, labels)[1] is labels
