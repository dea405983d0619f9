"""Read an image, whatever it is, as a square of RGB bytes.

Greyscale, palette, 16-bit and CMYK images are converted, transparency is laid over white, of an animation the first
frame is taken, a rotation noted by the camera is applied. What cannot be used is one line that names the image.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from cpdiff_core.config import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 100_000_000
"""Larger images are refused: decoded, they would take hundreds of megabytes for a picture of a few hundred pixels."""


def read_image(source: bytes | Path, size: int, name: str = "") -> torch.Tensor:
    """The central square of an image at `size` x `size` (Lanczos), uint8 [3, size, size].

    name: what to call it in messages; the path if `source` is one. Raises UserError for what is no image, for one
    that is truncated, and for one of more than `MAX_PIXELS`.
    """
    name = name or (str(source) if isinstance(source, Path) else "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                image.load()
                square = ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.LANCZOS)
    except Image.DecompressionBombError as error:
        fault = f"image {name!r}: has more than {MAX_PIXELS // 10**6} million pixels; make it smaller"
        raise UserError(fault) from error
    except UnidentifiedImageError as error:
        raise UserError(f"image {name!r}: is no image that can be read; use JPEG, PNG or WebP, or remove it") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow raises each of these for damaged files
        raise UserError(f"image {name!r}: is truncated or damaged ({error}); replace or remove it") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def to_rgb(image: Image.Image) -> Image.Image:
    """The (first) frame as upright RGB, transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # 16 bits: Pillow's own conversion would clip them
        values = np.asarray(image, dtype=np.float64)
        scale = 255.0 / 65535.0 if values.max() > 255 else 1.0
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def jpeg_bytes(image_CHW: torch.Tensor, quality: int = 95) -> bytes:
    """A uint8 image as JPEG without chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def contact_sheet(rows_RCHW: Sequence[torch.Tensor], scale: int = 1, gap: int = 2) -> bytes:
    """Rows of uint8 images [n, 3, H, W] as one PNG, each pixel enlarged `scale` times, over white."""
    size = rows_RCHW[0].shape[-1] * scale
    columns = max(map(len, rows_RCHW))
    sheet = Image.new("RGB", (columns * (size + gap) - gap, len(rows_RCHW) * (size + gap) - gap), "white")
    for row, images in enumerate(rows_RCHW):
        for column, image_CHW in enumerate(images):
            image = Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())
            square = image.resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(square, (column * (size + gap), row * (size + gap)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
