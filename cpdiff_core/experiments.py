"""Experiments as data: one value composes every choice of the pipeline; the paper's tables are tuples of such values."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cpdiff_core.config import Config, UserError
from cpdiff_core.domains.base_models import BaseModel, BaseModelConfig, resolve_base_model
from cpdiff_core.domains.glue.data import ResolvedTask, SplitConfig, resolve_task
from cpdiff_core.domains.glue.fine_tuning import FineTuneConfig
from cpdiff_core.domains.glue.heads import HeadConfig
from cpdiff_core.domains.glue.text_tasks import GLUE_TASKS, TextTask, excerpt
from cpdiff_core.generator.autoencoder import AutoencoderConfig, ConvAutoencoderConfig
from cpdiff_core.generator.conditions import ConditionConfig, TaskInfoFewShotCondition
from cpdiff_core.generator.diffusion import DiffusionConfig, SamplingConfig
from cpdiff_core.generator.normalization import NormalizationConfig
from cpdiff_core.generator.training import TrainingConfig
from cpdiff_core.lora.layout import LoraSpec


class ExperimentConfig(Config):
    """Everything that decides the result of one experiment. Defaults are the paper's where it states them."""

    name: str = Field("my-experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]{0,79}$", description="What to call it.")
    description: str = Field("", description="What it is for, with its expected cost.")
    base_model: BaseModelConfig = BaseModelConfig()
    tasks: tuple[TextTask, ...] = Field(min_length=1, description="Q tasks the generator is trained on.")
    splits: SplitConfig = SplitConfig()
    head: HeadConfig = HeadConfig()
    lora: LoraSpec = LoraSpec()
    fine_tune: FineTuneConfig = FineTuneConfig()
    num_runs: int = Field(1, ge=1, description="Runs per task; the paper harvests a single trajectory.")
    num_checkpoints: int = Field(150, ge=1, description="N: how many of the harvested checkpoints are used (the last ones).")
    scored_checkpoints: int | None = Field(
        None, ge=1, description="Evenly spaced checkpoints scored for *original*; all N if None."
    )
    normalization: NormalizationConfig = NormalizationConfig()
    autoencoder: AutoencoderConfig = ConvAutoencoderConfig()
    condition: ConditionConfig = TaskInfoFewShotCondition()
    diffusion: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    report_candidates: Literal["all", "chosen"] = Field(
        "all", description="Candidates scored on validation: all M, or only the one chosen on the selection split."
    )
    seed: int = Field(42, ge=0, description="Of autoencoder, diffusion, prompts and sampling.")
    economies: tuple[str, ...] = Field((), description="What a small preset saves; printed under its table.")

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: the name {twice[0]!r} occurs twice; names must differ")
        if self.num_checkpoints > self.fine_tune.num_harvest:
            raise ValueError(
                f"num_checkpoints {self.num_checkpoints} is more than fine_tune.num_harvest {self.fine_tune.num_harvest}; "
                "harvest more or use fewer"
            )
        return self


class ResolvedExperiment(Config):
    """An experiment whose base model and data have been found and digested."""

    config: ExperimentConfig
    base: BaseModel
    tasks: tuple[ResolvedTask, ...]


def resolve(config: ExperimentConfig, data_dir: Path | None) -> ResolvedExperiment:
    """Find the base model and all data. Raises UserError for the first that is not there."""
    base = resolve_base_model(config.base_model)
    return ResolvedExperiment(config=config, base=base, tasks=tuple(resolve_task(task, data_dir) for task in config.tasks))


QUICKSTART = ExperimentConfig(
    name="quickstart",
    description="The whole method on an excerpt of three GLUE tasks with MiniLM-L6; about 5 minutes on 2 CPU cores.",
    tasks=(excerpt("sst2"), excerpt("cola"), excerpt("stsb")),
    splits=SplitConfig(max_selection=96, max_report=200),
    head=HeadConfig(max_examples=500),
    fine_tune=FineTuneConfig(num_steps=200, batch_size=16, warmup_steps=20, max_length=64),
    scored_checkpoints=10,
    report_candidates="chosen",
    autoencoder=ConvAutoencoderConfig(training=TrainingConfig(steps=60, batch_size=32, learning_rate=3e-4)),
    diffusion=DiffusionConfig(training=TrainingConfig(steps=300, batch_size=32, learning_rate=1e-3, ema_decay=0.99)),
    sampling=SamplingConfig(num_inference_steps=25),
    economies=(
        "an excerpt of 3 tasks (2,880 training examples each), 200 fine-tuning steps of 16 examples, one run per task, one seed",
        "head fitted on 500 examples; 96 examples to choose on, 200 validation examples to report on",
        "10 evenly spaced checkpoints of 150 stand for 'original'; only the chosen candidate is scored on validation",
    ),
)

GLUE6_MINILM_R1 = ExperimentConfig(
    name="glue6/minilm-r1",
    description="All six GLUE tasks at full size on MiniLM-L6, r=1: Table 1's row on the embedded base. Minutes on a GPU.",
    tasks=tuple(GLUE_TASKS.values()),
    fine_tune=FineTuneConfig(precision="bf16"),
)

EXPERIMENTS: dict[str, ExperimentConfig] = {item.name: item for item in (QUICKSTART, GLUE6_MINILM_R1)}


def experiment(name: str) -> ExperimentConfig:
    """An experiment by its name. Raises UserError with the nearest names if there is none."""
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    near = difflib.get_close_matches(name, EXPERIMENTS, n=3, cutoff=0.3) or list(EXPERIMENTS)[:3]
    raise UserError(f"experiment {name!r}: is no known name and no .json file; nearest: {', '.join(near)} (see `cpdiff list`)")


