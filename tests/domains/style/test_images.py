"""Every kind of image that a user may have becomes the right RGB square, or one line that names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from style_pictures import encoded, picture

from cpdiff_core.config import UserError
from cpdiff_core.domains.style.images import jpeg_bytes, read_image


def solid(colour: tuple[int, ...], mode: str) -> Image.Image:
    return Image.new(mode, (8, 8), colour)


@pytest.mark.parametrize(
    ("image", "form", "expected"),
    [
        (solid((10, 200, 30), "RGB"), "PNG", (10, 200, 30)),
        (Image.new("L", (8, 8), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (8, 8), 1), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 25700, np.uint16)), "PNG", (100, 100, 100)),
        (solid((0, 0, 0, 0), "RGBA"), "PNG", (255, 255, 255)),
        (solid((255, 0, 0, 128), "RGBA"), "PNG", (255, 127, 127)),
        (Image.new("LA", (8, 8), (0, 0)), "PNG", (255, 255, 255)),
        (solid((0, 255, 255, 0), "CMYK"), "TIFF", (255, 0, 0)),
        (solid((200, 10, 10), "RGB").quantize(2), "GIF", (200, 10, 10)),
    ],
)  # fmt: skip
def test_colour_modes_become_rgb(image: Image.Image, form: str, expected: tuple[int, ...]) -> None:
    pixels = read_image(encoded(image, form), 4)
    assert pixels.shape == (3, 4, 4)
    assert torch.equal(pixels, torch.tensor(expected, dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4))


def test_animation_gives_its_first_frame() -> None:
    frames = [solid((250, 0, 0), "RGB"), solid((0, 0, 250), "RGB")]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert read_image(data, 4)[:, 0, 0].tolist() == [250, 0, 0]


def test_palette_transparency_is_laid_over_white() -> None:
    image = solid((0, 0, 0), "RGB").quantize(2)
    assert read_image(encoded(image, "PNG", transparency=image.getpixel((0, 0))), 4).min() == 255


def test_camera_rotation_is_applied() -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste((255, 255, 255), (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the upper half is then on the right
    pixels = read_image(encoded(image, "PNG", exif=exif), 8).float().mean(0)
    assert pixels[:, 6:].min() > 250
    assert pixels[:, :2].max() < 5


def test_centre_of_a_wide_image_is_taken() -> None:
    image = Image.new("RGB", (30, 10), "black")
    image.paste((255, 255, 255), (10, 0, 20, 10))
    assert read_image(encoded(image, "PNG"), 10).min() == 255


@pytest.mark.parametrize("kept", [0, 3, 60, 200])
def test_truncated_image_is_named(kept: int) -> None:
    data = encoded(picture(0), "JPEG")[:kept]
    with pytest.raises(UserError, match=r"image 'cat.jpg': .*(truncated|no image)"):
        read_image(data, 8, "cat.jpg")


def test_huge_image_is_refused_before_it_is_decoded() -> None:
    data = encoded(Image.new("1", (11_000, 11_000)), "PNG")
    with pytest.raises(UserError, match="more than 100 million pixels"):
        read_image(data, 8, "huge.png")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png"):
        read_image(tmp_path / "gone.png", 8)


def test_jpeg_round_trip_stays_close() -> None:
    pixels = read_image(encoded(picture(1), "PNG"), 24)
    again = read_image(jpeg_bytes(pixels), 24)
    assert (pixels.float() - again.float()).abs().mean() < 3
