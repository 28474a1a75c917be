"""The photographs that `bench` runs on."""

import numpy
import pytest
import torch
from PIL import Image
from support import refusal

from convnext_kernels.cli import main
from convnext_kernels.cli.images import Photographs, crop_batch, load_photographs


def photograph(seed, size=(80, 60), mode="RGB"):
    pixels = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_an_unreadable_image_is_named_and_skipped(bench, tmp_path, capsys):
    folder = tmp_path / "photographs"
    folder.mkdir()
    photograph(0).save(folder / "b.jpg")
    photograph(1, mode="L").save(folder / "c.png")
    photograph(2, mode="RGBA").save(folder / "d.webp")
    photograph(3, mode="P").save(folder / "e.bmp")
    whole = (folder / "b.jpg").read_bytes()
    (folder / "a [red].jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "f.png").write_text("no image")
    (folder / "notes.txt").write_text("not an image's name")
    code, content = bench("--images", str(folder), "--batch-size", "8", "--mode", "inference", "--runs", "1")
    assert code == 0
    assert content["images"]["used"] == ["b.jpg", "c.png", "d.webp", "e.bmp"]
    assert list(content["images"]["skipped"]) == ["a [red].jpg", "f.png"]
    shown = capsys.readouterr().err
    assert "skipped a [red].jpg: " in shown and "skipped f.png: " in shown and "notes.txt" not in shown


def test_no_more_photographs_are_read_than_a_batch_needs(tmp_path):
    for index in range(4):
        photograph(index).save(tmp_path / f"{index}.png")
    assert list(load_photographs(tmp_path, 3).images) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("content", [None, "no image"])
def test_a_folder_without_readable_images_is_an_error(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "broken.jpg").write_text(content)
    message = refusal(main, ["bench", "--device", "cpu", "--images", str(tmp_path)], capsys)
    assert "no readable image" in message and (content is None) == ("broken.jpg" not in message)


def test_a_batch_is_filled_with_different_normalised_crops():
    batch = crop_batch(load_photographs(None, 8), 8, 64)
    assert batch.shape == (8, 3, 64, 64) and batch.is_contiguous(memory_format=torch.channels_last)
    assert min((batch[i] - batch[j]).abs().max() for i in range(8) for j in range(i)) > 0.5
    assert batch.mean().abs() < 1 and 0.5 < batch.std() < 1.5
    assert torch.equal(batch, crop_batch(load_photographs(None, 8), 8, 64))


def test_colours_are_normalised_as_for_imagenet():
    """Its means and deviations in red, green and blue, as everybody has them."""
    colour, mean, std = (255, 128, 0), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    batch = crop_batch(Photographs({"plain": Image.new("RGB", (50, 40), colour)}), 1, 32)
    expected = (torch.tensor(colour) / 255 - torch.tensor(mean)) / torch.tensor(std)
    assert torch.allclose(batch, expected.view(1, 3, 1, 1).expand_as(batch), rtol=0, atol=1e-6)


def test_the_first_crop_is_the_central_square():
    pixels = numpy.zeros((40, 80, 3), dtype=numpy.uint8)
    pixels[:, 20:60] = 255
    batch = crop_batch(Photographs({"wide": Image.fromarray(pixels)}), 1, 40)
    assert batch.min() > 1.9


def test_the_camera_s_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(0, size=(80, 60)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_photographs(tmp_path, 1).images["turned.jpg"].size == (60, 80)
