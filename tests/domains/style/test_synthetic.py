"""Styles made from photographs: the same in every process, one row of the table each, split as their photographs are."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cpdiff_core.config import fingerprint
from cpdiff_core.domains.style.styles import (
    ExcerptImages,
    FolderImages,
    StyleSplits,
    excerpt,
    load_images,
    resolve_style,
    split_images,
    split_rows,
    synthetic_styles,
)
from cpdiff_core.domains.style.synthetic import VARIANTS, stylise

SIZE = 16
_ELSEWHERE = """
import hashlib, torch
from cpdiff_core.domains.style.styles import *
for style in synthetic_styles(ExcerptImages(name="photo"), max_images=8)[::6]:
    images = split_images(resolve_style(style, None), StyleSplits(), "train", 16).images_NCHW
    print(style.name, hashlib.sha256(images.numpy().tobytes()).hexdigest())
"""


def pictures(num: int = 4, size: int = SIZE) -> torch.Tensor:
    """Photographs of the excerpt."""
    photos = load_images(resolve_style(excerpt("photo"), None), size).images_NCHW
    return photos[torch.linspace(0, len(photos) - 1, num).long()]


@pytest.mark.parametrize("effect", VARIANTS)
def test_effect_changes_the_picture_keeps_its_shape_and_looks_the_same_at_twice_the_size(effect) -> None:
    images = pictures()
    changed = stylise(images, (effect,), 1)
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    assert (changed.float() - images.float()).abs().mean() > 2
    # Colours and brightness belong to the style, not to the number of pixels.
    large = stylise(pictures(size=4 * SIZE), (effect,), 1)
    means = [part.float().mean((0, 2, 3)) for part in (changed, large)]
    assert (means[0] - means[1]).abs().max() < 40


def test_at_least_sixty_styles_no_two_alike() -> None:
    styles = synthetic_styles(ExcerptImages(name="photo"))
    assert len(styles) >= 60
    assert len({style.name for style in styles}) == len(styles)
    images = pictures(3, 32)
    flat = torch.stack([stylise(images, s.source.effects, s.source.seed).float().flatten() for s in styles])
    apart = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    assert apart.fill_diagonal_(torch.inf).min() > 4  # root mean square of 255


def test_another_process_makes_the_same_bytes() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", _ELSEWHERE], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0].split()[1::2])) == len(runs[0].splitlines()) > 5


def test_grain_differs_from_image_to_image_and_not_from_run_to_run() -> None:
    same = pictures(1).repeat(2, 1, 1, 1)
    first = stylise(same, ("grain",), 3)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(stylise(same[1:], ("grain",), 3, first=1)[0], first[1])


def test_split_is_that_of_the_photographs(make_style, tmp_path) -> None:
    photos, splits = make_style("photo", 40), StyleSplits()
    style = synthetic_styles(FolderImages(path="photo"))[0]
    resolved = resolve_style(style, tmp_path)
    for split in ("train", "selection", "report"):
        own = split_rows(load_images(photos, SIZE), splits, "photo", split)
        chosen = load_images(photos, SIZE).images_NCHW[torch.from_numpy(own)]
        expected = stylise(chosen, style.source.effects, style.source.seed)
        found = split_images(resolved, splits, split, SIZE)
        assert torch.equal(found.images_NCHW, expected)
        assert len(found.classes) == len(found.groups) == len(own)
    few = synthetic_styles(FolderImages(path="photo"), max_images=8)[0]
    assert len(split_images(resolve_style(few, tmp_path), splits, "train", SIZE)) == 8


def test_identity_is_effects_seed_and_photographs_never_the_path(make_style, tmp_path) -> None:
    make_style("photo", 10)
    (tmp_path / "moved").mkdir()
    (tmp_path / "photo").rename(tmp_path / "moved" / "photo")

    def key(path: str, index: int) -> str:
        style = synthetic_styles(FolderImages(path=path))[index]
        renamed = style.model_copy(update={"name": "same"})
        return fingerprint("test", 1, {"style": resolve_style(renamed, tmp_path)})

    here = key("moved/photo", 0)
    (tmp_path / "moved" / "photo").rename(tmp_path / "again")
    assert key("again", 0) == here
    assert key("again", 1) != here


def test_synthetic_style_of_the_excerpt_needs_no_data() -> None:
    style = synthetic_styles(ExcerptImages(name="photo"), max_images=9)[3]
    resolved = resolve_style(style, None)
    assert resolved.files == resolve_style(excerpt("photo"), None).files
    images = split_images(resolved, StyleSplits(), "report", 32)
    assert len(images) == 9
    assert len(set(images.classes)) > 2  # spread over the classes, not the first of a sorted table
