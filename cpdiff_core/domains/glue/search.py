"""The hyper-parameter search of Sec. 4.1: rank and alpha fixed, the set with the best average over tasks kept.

Steps stand for the paper's epochs, since the tasks' sizes differ by a factor of forty. At a constant learning rate a
short run is the beginning of a long one, so every length of the grid is a snapshot of one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from pydantic import Field, model_validator

from cpdiff_core.config import Config, UserError
from cpdiff_core.domains.base_models import BaseModelConfig
from cpdiff_core.domains.glue.data import SplitConfig
from cpdiff_core.domains.glue.fine_tuning import FineTuneConfig
from cpdiff_core.domains.glue.heads import HeadConfig
from cpdiff_core.domains.glue.stacks import Precision
from cpdiff_core.domains.glue.text_tasks import GLUE_TASKS, TextTask
from cpdiff_core.lora.layout import LoraSpec


class SearchConfig(Config):
    """The grid. Its values are ours: the paper names the axes and not the values."""

    base_model: BaseModelConfig = BaseModelConfig()
    tasks: tuple[TextTask, ...] = Field(tuple(GLUE_TASKS.values()), min_length=1)
    splits: SplitConfig = Field(SplitConfig(), description="Scored on the held-out part of train, never on validation.")
    head: HeadConfig = HeadConfig()
    lora: LoraSpec = LoraSpec()
    learning_rates: tuple[float, ...] = Field((3e-4, 1e-3, 2e-3), min_length=1)
    weight_decays: tuple[float, ...] = Field((0.0, 0.1), min_length=1)
    warmup_steps: tuple[int, ...] = Field((100, 300), min_length=1)
    num_steps: int = Field(2400, ge=1, description="The longest run.")
    num_lengths: int = Field(4, ge=1, description="Lengths that are tried: so many equal parts of num_steps.")
    batch_size: int = Field(32, ge=1)
    max_length: int = Field(128, ge=4, le=512)
    precision: Precision = "bf16"
    seed: int = Field(42, ge=0)

    @model_validator(mode="after")
    def _held_out(self) -> SearchConfig:
        if self.splits.selection_split != "held_out":
            raise ValueError("splits.selection_split: a search on the training examples rewards memorising; use held_out")
        if self.num_steps % self.num_lengths:
            raise ValueError(f"num_steps {self.num_steps}: must be a multiple of num_lengths {self.num_lengths}")
        return self

    def grid(self) -> tuple[FineTuneConfig, ...]:
        """One run configuration per learning rate, decay and warm-up; its snapshots are the lengths."""
        return tuple(
            FineTuneConfig(
                learning_rate=rate, weight_decay=decay, warmup_steps=warmup, num_steps=self.num_steps,
                num_harvest=self.num_lengths, harvest_every=self.num_steps // self.num_lengths, batch_size=self.batch_size,
                max_length=self.max_length, precision=self.precision, seed=self.seed,
            )
            for rate, decay, warmup in product(self.learning_rates, self.weight_decays, self.warmup_steps)
        )  # fmt: skip


class Setting(Config):
    """One point of the grid with its held-out scores, in points. None: the run diverged."""

    learning_rate: float
    weight_decay: float
    warmup_steps: int
    num_steps: int
    scores: dict[str, float | None]

    @property
    def average(self) -> float | None:
        values = list(self.scores.values())
        return None if None in values else float(np.mean([value for value in values if value is not None]))


def settings(config: SearchConfig, scores: Sequence[Mapping[str, Sequence[float | None]]]) -> tuple[Setting, ...]:
    """The evidence. scores: for each configuration of `grid`, task -> the held-out score of every snapshot."""
    every = config.num_steps // config.num_lengths
    return tuple(
        Setting(
            learning_rate=run.learning_rate, weight_decay=run.weight_decay, warmup_steps=run.warmup_steps,
            num_steps=(length + 1) * every, scores={task: values[length] for task, values in by_task.items()},
        )
        for run, by_task in zip(config.grid(), scores, strict=True)
        for length in range(config.num_lengths)
    )  # fmt: skip


def best_setting(found: Sequence[Setting]) -> Setting:
    """The best average over tasks; of equals the shortest run. Raises UserError if every run diverged."""
    usable = [(setting.average, -setting.num_steps, -i) for i, setting in enumerate(found) if setting.average is not None]
    if not usable:
        raise UserError("search: no setting has a finite score on every task; lower learning_rates")
    return found[-max(usable)[2]]
