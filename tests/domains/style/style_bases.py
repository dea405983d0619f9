"""A tiny base with random weights, in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cpdiff_core.config import LocalFile
from cpdiff_core.domains.style.base import StyleBase, TinyPixArtConfig
from cpdiff_core.domains.style.pretraining import save_base

TINY = TinyPixArtConfig(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8)


def saved_tiny_base(folder: Path, seed: int = 0) -> tuple[StyleBase, Any]:
    """(the base, its model); weights larger than usual, so that an untrained model tells inputs apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TINY.build()
        for parameter in model.parameters():
            parameter.data.mul_(2)
    save_base(model, folder)
    files = tuple(LocalFile.of(path) for path in sorted(folder.iterdir()) if path.is_file())
    return StyleBase(kind="tiny", files=files, folder=str(folder.resolve())), model.eval()
