"""Training on from given LoRA vectors: *annealed* runs and the fine-tuned soup.

It starts from w alone: a soup has no optimiser state, and checkpoints are stored without theirs. AdamW's moments
start at zero after a short warm-up, and the learning rate then decays to 0. The data order is another one than that
of the run, so that the first batches are not seen twice in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field

from cpdiff_core.artifacts import ResumeState
from cpdiff_core.config import Config, RuntimeConfig
from cpdiff_core.domains.glue.fine_tuning import FineTuning, HarvestConfig

_OTHER_ORDER = 10_000


class ContinueConfig(Config):
    """How long and how to train on."""

    num_steps: int = Field(150, ge=1, description="Optimiser steps (ours: as many as the harvest has).")
    learning_rate: float | None = Field(None, gt=0, description="Peak; that of the run if None.")
    batch_size: int | None = Field(None, ge=1, description="Examples per step; that of the run if None.")
    warmup_steps: int = Field(10, ge=0, description="While AdamW's moments fill (ours).")
    lr_scheduler_type: Literal["linear", "cosine"] = Field("linear", description="Decay to 0 (ours).")


def continued(run: HarvestConfig, config: ContinueConfig) -> HarvestConfig:
    """The run that continues `run`: one vector at its end is kept."""
    fine_tune = run.fine_tune
    values = {
        "num_steps": config.num_steps, "num_epochs": None, "num_harvest": 1, "harvest_every": 1, "warmup_ratio": None,
        "warmup_steps": min(config.warmup_steps, config.num_steps - 1),
        "lr_scheduler_type": config.lr_scheduler_type, "seed": fine_tune.seed + _OTHER_ORDER,
        "learning_rate": config.learning_rate or fine_tune.learning_rate,
        "batch_size": config.batch_size or fine_tune.batch_size,
    }  # fmt: skip
    return run.model_copy(update={"fine_tune": fine_tune.model_copy(update=values)})


def continue_from(
    runs: Sequence[HarvestConfig], w_SK: torch.Tensor, heads: Sequence[Mapping[str, torch.Tensor]], runtime: RuntimeConfig,
    resume: ResumeState | None = None, settings: str = "fine_tune",
) -> torch.Tensor:  # fmt: skip
    """Train every row of w_SK on, in one stacked pass. Returns the last vector of each, w_SK, on the CPU.

    settings: of which part of an experiment the runs are, for errors.
    """
    tuning = FineTuning(runs, heads, runtime, settings)
    if w_SK.shape != tuning.w_SK.shape:
        raise ValueError(f"vectors {tuple(w_SK.shape)} for runs of shape {tuple(tuning.w_SK.shape)}: use one layout")
    tuning.w_SK.copy_(w_SK)
    return torch.cat([harvest.w_NK for harvest in tuning.run(runtime, resume)])
