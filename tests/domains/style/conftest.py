"""Small styles in files for the tests of the style domain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from style_pictures import picture

from cpdiff_core.domains.style.styles import FolderImages, ResolvedStyle, Style, resolve_style

MakeStyle = Callable[..., ResolvedStyle]


@pytest.fixture
def make_style(tmp_path: Path) -> MakeStyle:
    """`make_style(name, num, shift=)`: a folder of small pictures in two classes, resolved."""

    def make(name: str, num: int = 20, seed: int = 0) -> ResolvedStyle:
        for number in range(num):
            path = tmp_path / name / ("dog", "house")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(1000 * seed + number).save(path)
        return resolve_style(Style(name=name, source=FolderImages(path=name)), tmp_path)

    return make
