"""Generator folders of either kind, for texts and for styles: load one, copy one."""

from __future__ import annotations

from pathlib import Path

import torch

from cpdiff_core.artifacts import check_out
from cpdiff_core.bundle import Generator, read_card, seal_generator
from cpdiff_core.export import write_generator_card
from cpdiff_core.style_bundle import StyleGenerator
from cpdiff_core.style_export import write_style_generator_card


def load_generator(folder: str | Path, device: str | torch.device = "cpu") -> Generator | StyleGenerator:
    """Read a generator folder. Raises UserError that names what is missing or unfit."""
    if read_card(folder)[1].get("kind") == "style":
        return StyleGenerator.load(folder, device)
    return Generator.load(folder, device)


def copy_generator(source: Path, target: Path, compact: bool = False) -> None:
    """Write the generator in `source` to `target`, in half precision if `compact`. Raises as `check_out`."""
    check_out(target)
    target.mkdir(parents=True, exist_ok=True)
    generator = load_generator(source)
    changes = {"compact": compact or generator.card.compact}
    if isinstance(generator, StyleGenerator):
        generator.card = generator.card.model_copy(update=changes)
        generator.save(target)
        write_style_generator_card(target, generator.card)
    else:
        generator.card = generator.card.model_copy(update=changes)
        generator.save(target)
        write_generator_card(target, generator.card)
    seal_generator(target)
