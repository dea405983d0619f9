"""Which blocks' LoRA is generated, and what fills the others (Tab. 4c).

Block ranges are inclusive, as in the paper. A generator of some blocks is trained on the columns of those blocks
alone; before scoring, the other columns are filled, and by what is part of the experiment's identity: zeros, the
task's last checkpoint (what the released code does), or its soup.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field, model_validator

from cpdiff_core.config import Config, UserError
from cpdiff_core.domains.base_models import FAMILIES, BaseModel, cached_classifier
from cpdiff_core.lora.layout import LoraSpec, ParameterLayout, initial_vector
from cpdiff_core.lora.vectors import soup


class BlockConfig(Config):
    """An inclusive range of transformer blocks."""

    first: int = Field(0, ge=0, description="First block, counted from 0.")
    last: int = Field(ge=0, description="Inclusive: 0-1 are two blocks.")
    fill: Literal["zero", "checkpoint", "soup"] = Field(
        "checkpoint", description="What the other blocks hold: nothing, the last checkpoint (released code), the soup."
    )

    @model_validator(mode="after")
    def _ordered(self) -> BlockConfig:
        if self.last < self.first:
            raise ValueError(f"blocks: last {self.last} is before first {self.first}; exchange them")
        return self


@lru_cache(maxsize=8)
def adapter_layout(base: BaseModel, lora: LoraSpec) -> ParameterLayout:
    """The layout of LoRA vectors for this base model and rank."""
    family = FAMILIES[base.family]
    classifier, _ = cached_classifier(base, 2)
    return initial_vector(classifier, lora, family.target_modules, family.block_pattern, 0)[1]


def block_columns(layout: ParameterLayout, blocks: BlockConfig) -> torch.Tensor:
    """Which of the K columns belong to the range: a boolean mask. Raises UserError if the base has fewer blocks."""
    known = {factor.block for factor in layout.factors if factor.block is not None}
    if blocks.last > max(known):
        raise UserError(f"blocks.last {blocks.last}: the base model's blocks are 0 to {max(known)}; choose one of them")
    mask_K = torch.zeros(layout.num_parameters, dtype=torch.bool)
    for factor in layout.factors:
        if factor.block is not None and blocks.first <= factor.block <= blocks.last:
            mask_K[factor.a_start : factor.a_start + factor.rank * factor.in_features] = True
            mask_K[factor.b_start : factor.b_start + factor.out_features * factor.rank] = True
    return mask_K


def fill_columns(
    part_MK: torch.Tensor, mask_K: torch.Tensor, w_NK: torch.Tensor, fill: Literal["zero", "checkpoint", "soup"]
) -> torch.Tensor:
    """Whole vectors from generated columns `part_MK` and a task's checkpoints w_NK, oldest first."""
    row_1K = {"zero": torch.zeros_like(w_NK[:1]), "checkpoint": w_NK[-1:], "soup": soup(w_NK)}[fill]
    whole_MK = row_1K.repeat(len(part_MK), 1)
    whole_MK[:, mask_K] = part_MK
    return whole_MK
