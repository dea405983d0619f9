"""Styles made from photographs: palettes, prints, drawings, filters and their combinations (ours).

A generator that is to draw a style it has never seen must have seen many. Each of these is a chain of effects and a
seed; every parameter of an effect (colours, angle, size of a dot) is a function of (effect, seed, place in the chain),
and what varies from image to image (grain) of the image's number too, so a style is the same in every process. Lengths
are in units of 1/32 of the image's side, so that a style looks alike at 32 and at 64 px.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

EffectName = Literal[
    "palette", "halftone", "engrave", "hatch", "dither", "posterise", "edges", "glow", "blur", "motion", "oil", "hue",
    "grain", "mosaic", "emboss", "solarise", "negative", "vintage",
]  # fmt: skip
Random = np.random.Generator
_SHARP = 4
"""Prints are drawn so many times larger and then reduced, so that their edges are smooth."""


def stylise(images_NCHW: torch.Tensor, effects: Sequence[EffectName], seed: int, first: int = 0) -> torch.Tensor:
    """uint8 images under a chain of effects, the same shape. first: number of the first image, which seeds its grain."""
    out = []
    for number, image_CHW in enumerate(images_NCHW, start=first):
        image = Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())
        for place, effect in enumerate(effects):
            key = [zlib.crc32(effect.encode()), seed, place]
            own = np.random.default_rng([*key, number])
            image = _EFFECTS[effect](image, np.random.default_rng(key), own).convert("RGB")
        out.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(out)


def _unit(image: Image.Image) -> float:
    return image.width / 32


def _grey(image: Image.Image) -> Image.Image:
    return ImageOps.autocontrast(image.convert("L"), cutoff=1)


def _colour(style: Random, value: tuple[float, float], saturation: tuple[float, float] = (0.3, 0.9)) -> tuple[int, ...]:
    """A random hue of a brightness and a saturation in these ranges."""
    rgb = colorsys.hsv_to_rgb(style.uniform(), style.uniform(*saturation), style.uniform(*value))
    return tuple(round(255 * part) for part in rgb)


def _ink_and_paper(style: Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dark on light, or now and then light on dark."""
    pair = (_colour(style, (0.05, 0.45)), _colour(style, (0.85, 1.0), (0.0, 0.35)))
    return pair[::-1] if style.uniform() < 0.25 else pair


def _printed(image: Image.Image, screen: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
             style: Random) -> Image.Image:  # fmt: skip
    """Ink where the photograph is darker than a screen of thresholds in [0, 1] over (x, y) in units."""
    size = image.width * _SHARP
    grey = np.asarray(_grey(image).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    y, x = np.mgrid[0:size, 0:size] * (32.0 / size)
    mask = Image.fromarray((255 * (grey > screen(x, y))).astype(np.uint8)).resize(image.size, Image.Resampling.BOX)
    return ImageOps.colorize(mask, *_ink_and_paper(style))  # type: ignore[arg-type]


def _palette(image: Image.Image, style: Random, own: Random) -> Image.Image:
    """Brightness mapped onto a ramp of two to four colours."""
    num = int(style.integers(2, 5))
    ramp = [_colour(style, ((i + 0.1) / num, (i + 0.9) / num), (0.4, 1.0)) for i in range(num)]
    table = np.stack([np.interp(np.linspace(0, num - 1, 256), range(num), channel) for channel in zip(*ramp, strict=True)])
    return Image.fromarray(table.T[np.asarray(_grey(image))].round().astype(np.uint8))


def _halftone(image: Image.Image, style: Random, own: Random) -> Image.Image:
    cell, angle = style.uniform(2.0, 3.5), style.uniform(0, np.pi / 2)

    def screen(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        dots: NDArray[np.float64] = 0.5 + (np.cos(2 * np.pi * u / cell) + np.cos(2 * np.pi * v / cell)) / 4
        return dots

    return _printed(image, screen, style)


def _engrave(image: Image.Image, style: Random, own: Random) -> Image.Image:
    """Lines that swell where it is dark."""
    period, angle, bend = style.uniform(1.6, 2.6), style.uniform(0, np.pi), style.uniform(0, 0.8)

    def screen(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        across = x * np.cos(angle) + y * np.sin(angle) + bend * np.sin(x / 3)
        lines: NDArray[np.float64] = 0.5 + 0.5 * np.cos(2 * np.pi * across / period)
        return lines

    return _printed(image, screen, style)


def _hatch(image: Image.Image, style: Random, own: Random) -> Image.Image:
    """Strokes in one direction in half-tones, in a second one where it is dark."""
    period, angle = style.uniform(1.6, 2.6), style.uniform(0, np.pi)

    def screen(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        first = np.cos(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period) > 0.3
        second = np.cos(2 * np.pi * (y * np.cos(angle) - x * np.sin(angle)) / period) > 0.3
        strokes: NDArray[np.float64] = np.maximum(0.6 * first, 0.3 * second)
        return strokes

    return _printed(image, screen, style)


def _dither(image: Image.Image, style: Random, own: Random) -> Image.Image:
    """Two colours by Floyd and Steinberg's error diffusion, on coarse pixels."""
    size = max(8, round(image.width / max(1.0, _unit(image) * style.uniform(0.6, 1.2))))
    small = _grey(image).resize((size, size), Image.Resampling.BOX).convert("1").convert("L")
    coloured = ImageOps.colorize(small, *_ink_and_paper(style))  # type: ignore[arg-type]
    return coloured.resize(image.size, Image.Resampling.NEAREST)


def _posterise(image: Image.Image, style: Random, own: Random) -> Image.Image:
    """Few flat colours, those of the picture itself."""
    num = int(style.integers(3, 7))
    flat = image.quantize(num, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    return ImageEnhance.Color(flat).enhance(style.uniform(1.2, 2.4))


def _outline(image: Image.Image, style: Random) -> Image.Image:
    """How much brightness changes around each pixel, 0 to 255."""
    soft = _grey(image).filter(ImageFilter.GaussianBlur(0.35 * _unit(image)))
    size = 2 * round(0.5 * _unit(image)) + 1 if _unit(image) > 1.5 else 3
    change = ImageChops.difference(soft.filter(ImageFilter.MaxFilter(size)), soft.filter(ImageFilter.MinFilter(size)))
    return ImageEnhance.Contrast(ImageOps.autocontrast(change, cutoff=2)).enhance(style.uniform(1.0, 2.2))


def _edges(image: Image.Image, style: Random, own: Random) -> Image.Image:
    """Outlines in ink on paper."""
    ink, paper = _colour(style, (0.0, 0.4)), _colour(style, (0.85, 1.0), (0.0, 0.3))
    return ImageOps.colorize(ImageOps.invert(_outline(image, style)), ink, paper)  # type: ignore[arg-type]


def _glow(image: Image.Image, style: Random, own: Random) -> Image.Image:
    """The picture's own colours along its outlines, dark elsewhere."""
    vivid = ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(1.5)).enhance(style.uniform(1.5, 3.0))
    dark = Image.new("RGB", image.size, _colour(style, (0.0, 0.2)))  # type: ignore[arg-type]
    return Image.composite(vivid, dark, _outline(image, style))


def _blur(image: Image.Image, style: Random, own: Random) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(style.uniform(0.7, 1.5) * _unit(image)))


def _motion(image: Image.Image, style: Random, own: Random) -> Image.Image:
    """Smeared along one direction."""
    angle, length = style.uniform(0, np.pi), style.uniform(2.5, 5.0) * _unit(image)
    steps = np.linspace(-0.5, 0.5, 9) * length
    moved = [
        np.asarray(
            image.transform(
                image.size, Image.Transform.AFFINE, (1, 0, s * np.cos(angle), 0, 1, s * np.sin(angle)),
                Image.Resampling.BILINEAR,
            ), dtype=np.float64,
        ) for s in steps
    ]  # fmt: skip
    inside = np.asarray(image, dtype=np.float64)
    filled = [np.where(part.sum(2, keepdims=True) == 0, inside, part) for part in moved]  # beyond the border is black
    return Image.fromarray(np.mean(filled, axis=0).round().astype(np.uint8))


def _oil(image: Image.Image, style: Random, own: Random) -> Image.Image:
    """Patches of the most frequent colour."""
    size = 2 * round(style.uniform(0.9, 1.6) * _unit(image)) + 1
    patches = image.filter(ImageFilter.MedianFilter(3)).filter(ImageFilter.ModeFilter(size))
    return ImageEnhance.Color(patches).enhance(style.uniform(1.2, 1.9))


def _hue(image: Image.Image, style: Random, own: Random) -> Image.Image:
    from torchvision.transforms.functional import adjust_hue

    turned: Image.Image = adjust_hue(image, style.uniform(0.15, 0.5) * (1 if style.uniform() < 0.5 else -1))
    return ImageEnhance.Color(turned).enhance(style.uniform(1.3, 2.5))


def _grain(image: Image.Image, style: Random, own: Random) -> Image.Image:
    """Noise of a film, grey or coloured, fine or coarse."""
    std, channels = style.uniform(25, 50), 1 if style.uniform() < 0.5 else 3
    size = round(image.width / max(1.0, _unit(image) * style.uniform(0.5, 1.0)))
    noise = torch.from_numpy(own.normal(0, std, (1, channels, size, size)))
    noise = torch.nn.functional.interpolate(noise, image.size[::-1], mode="nearest").expand(1, 3, -1, -1)
    noisy = np.asarray(image, dtype=np.float64) + noise[0].permute(1, 2, 0).numpy()
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


def _mosaic(image: Image.Image, style: Random, own: Random) -> Image.Image:
    size = max(4, round(32 / style.uniform(1.8, 3.2)))
    return image.resize((size, size), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def _emboss(image: Image.Image, style: Random, own: Random) -> Image.Image:
    """A relief in one material."""
    relief = ImageEnhance.Contrast(image.convert("L").filter(ImageFilter.EMBOSS)).enhance(style.uniform(1.0, 2.0))
    middle = _colour(style, (0.45, 0.7), (0.1, 0.7))
    return ImageOps.colorize(relief, "black", "white", mid=middle)  # type: ignore[arg-type]


def _solarise(image: Image.Image, style: Random, own: Random) -> Image.Image:
    """Bright parts inverted, channels exchanged."""
    bands = ImageOps.solarize(image, int(style.integers(80, 150))).split()
    return ImageOps.autocontrast(Image.merge("RGB", [bands[i] for i in style.permutation(3)]))


def _negative(image: Image.Image, style: Random, own: Random) -> Image.Image:
    tint = Image.new("RGB", image.size, _colour(style, (0.7, 1.0), (0.2, 0.7)))  # type: ignore[arg-type]
    return ImageChops.multiply(ImageOps.invert(image), tint)


def _vintage(image: Image.Image, style: Random, own: Random) -> Image.Image:
    """Faded to one tone, dark towards the corners."""
    toned = ImageOps.colorize(image.convert("L"), _colour(style, (0.1, 0.3)), _colour(style, (0.8, 1.0), (0.2, 0.5)))  # type: ignore[arg-type]
    y, x = np.mgrid[-1 : 1 : image.width * 1j, -1 : 1 : image.width * 1j]
    shade = (1 - style.uniform(0.25, 0.5) * (x**2 + y**2))[..., None].clip(0, 1)
    blended = np.asarray(Image.blend(image, toned, style.uniform(0.65, 0.95)), dtype=np.float64)
    return Image.fromarray((blended * shade).round().astype(np.uint8))


_EFFECTS: dict[EffectName, Callable[[Image.Image, Random, Random], Image.Image]] = {
    "palette": _palette, "halftone": _halftone, "engrave": _engrave, "hatch": _hatch, "dither": _dither,
    "posterise": _posterise, "edges": _edges, "glow": _glow, "blur": _blur, "motion": _motion, "oil": _oil, "hue": _hue,
    "grain": _grain, "mosaic": _mosaic, "emboss": _emboss, "solarise": _solarise, "negative": _negative,
    "vintage": _vintage,
}  # fmt: skip

VARIANTS: dict[EffectName, int] = {
    "palette": 4, "halftone": 3, "engrave": 2, "hatch": 2, "dither": 2, "posterise": 1, "edges": 2, "glow": 1, "blur": 1,
    "motion": 2, "oil": 1, "hue": 2, "grain": 1, "mosaic": 1, "emboss": 2, "solarise": 2, "negative": 2, "vintage": 2,
}  # fmt: skip
"""How often each effect is a style of its own: as often as its seeds look different (judged by eye)."""
PAIRS: tuple[tuple[EffectName, EffectName], ...] = (
    ("palette", "grain"), ("halftone", "palette"), ("palette", "blur"), ("palette", "mosaic"), ("palette", "oil"),
    ("posterise", "hue"), ("posterise", "grain"), ("posterise", "negative"), ("posterise", "blur"),
    ("halftone", "blur"), ("hue", "blur"), ("hue", "oil"), ("hue", "mosaic"), ("hue", "grain"),
    ("edges", "blur"), ("edges", "grain"), ("edges", "negative"), ("glow", "hue"), ("glow", "blur"), ("glow", "mosaic"),
    ("oil", "vintage"), ("oil", "grain"), ("oil", "solarise"), ("blur", "grain"), ("blur", "vintage"),
    ("motion", "hue"), ("motion", "palette"), ("motion", "grain"), ("mosaic", "negative"), ("emboss", "hue"),
    ("emboss", "palette"), ("solarise", "blur"), ("solarise", "motion"), ("vintage", "grain"), ("vintage", "engrave"),
    ("negative", "palette"),
)  # fmt: skip
