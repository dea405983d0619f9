"""One value composes every choice of the pipeline. Presets and the paper's tables are in `experiments.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cpdiff_core.config import Config, UserError
from cpdiff_core.domains.base_models import BaseModel, BaseModelConfig, resolve_base_model
from cpdiff_core.domains.blocks import BlockConfig
from cpdiff_core.domains.glue.continuation import ContinueConfig
from cpdiff_core.domains.glue.data import ResolvedTask, SplitConfig, resolve_task
from cpdiff_core.domains.glue.fine_tuning import FineTuneConfig
from cpdiff_core.domains.glue.full_tuning import FullTuningConfig
from cpdiff_core.domains.glue.heads import HeadConfig
from cpdiff_core.domains.glue.text_tasks import TextTask
from cpdiff_core.evaluation.arms import AVERAGE, NEEDS_ALL_CANDIDATES, PAPER_ARMS, ArmName
from cpdiff_core.generator.autoencoder import AutoencoderConfig, ConvAutoencoderConfig
from cpdiff_core.generator.conditions import ConditionConfig, TaskInfoFewShotCondition
from cpdiff_core.generator.diffusion import DiffusionConfig, SamplingConfig, check_sampling
from cpdiff_core.generator.normalization import NormalizationConfig
from cpdiff_core.lora.layout import LoraSpec
from cpdiff_core.paper import PaperRow


class AuditConfig(Config):
    """Is it generation or memorisation: what is computed besides the arms."""

    num_trivial: int = Field(20, ge=2, description="Vectors of each trivial family, as many as candidates.")
    num_changed: int = Field(8, ge=2, description="Candidates of each changed condition (ours).")
    num_trajectories: int = Field(5, ge=1, description="Samples followed through the reverse process (paper: five noises).")
    seed: int = Field(7, ge=0, description="Of the trivial vectors.")


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
    autoencoder: AutoencoderConfig = Field(ConvAutoencoderConfig(), description="From weights to latents and back (Eq. 6-7).")
    condition: ConditionConfig = Field(TaskInfoFewShotCondition(), description="What the generator is told of a task (Tab. 4b).")
    diffusion: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    report_candidates: Literal["all", "chosen"] = Field(
        "all", description="Candidates scored on validation: all M, or only the one chosen on the selection split."
    )
    arms: tuple[ArmName, ...] = Field(PAPER_ARMS, min_length=1, description="Columns of the table: what is computed.")
    blocks: BlockConfig | None = Field(None, description="Generate these blocks alone (Tab. 4c); all if None.")
    annealing: ContinueConfig = Field(ContinueConfig(), description="Of the arm `annealed`.")
    soup_tuning: ContinueConfig = Field(
        ContinueConfig(num_steps=80, batch_size=128, learning_rate=5e-4),
        description="Of the arm `soup fine-tuned`. Measured on MiniLM: +1.9 over the soup.",
    )
    full: FullTuningConfig = Field(FullTuningConfig(), description="Of the arm `full`.")
    audit: AuditConfig | None = Field(None, description="The memorisation audit and its figures; none if None.")
    num_seeds: int = Field(1, ge=1, description="The whole experiment, runs and generator, with so many seeds, pooled.")
    seed: int = Field(42, ge=0, description="Of autoencoder, diffusion, prompts and sampling.")
    paper: PaperRow | None = Field(None, description="The paper's row to print beside; it does not change a result.")
    economies: tuple[str, ...] = Field((), description="What a small preset saves; printed under its table.")

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: the name {twice[0]!r} occurs twice; names must differ")
        if AVERAGE in names:
            raise ValueError(f"tasks: the name {AVERAGE!r} is that of the tables' last row; choose another")
        if self.num_checkpoints > self.fine_tune.num_harvest:
            raise ValueError(
                f"num_checkpoints {self.num_checkpoints} is more than fine_tune.num_harvest {self.fine_tune.num_harvest}; "
                "harvest more or use fewer"
            )
        check_sampling(self.diffusion, self.sampling)
        if self.condition.kind == "style_image":
            raise ValueError("condition.kind 'style_image': is for styles; text tasks take task_info, few_shot or one_hot")
        wanting = NEEDS_ALL_CANDIDATES & set(self.arms)
        if self.report_candidates == "chosen" and (wanting or self.audit):
            what = f"the arm {min(wanting)!r}" if wanting else "the audit"
            raise ValueError(f"report_candidates 'chosen': {what} needs all candidates scored; use 'all'")
        if len(set(self.arms)) != len(self.arms):
            raise ValueError(f"arms: {max(self.arms, key=self.arms.count)!r} occurs twice; name each once")
        if self.audit is not None and not {"generated (mean)", "original (selected)"} <= set(self.arms):
            raise ValueError("audit: needs the arms 'generated (mean)' and 'original (selected)'; add them to arms")
        if self.audit is not None and self.blocks is not None:
            raise ValueError("audit: is of whole vectors and blocks generates a part; leave one of them out")
        return self

    def for_seed(self, number: int) -> ExperimentConfig:
        """The experiment of one seed: runs and generator are drawn anew, splits and heads stay."""
        fine_tune = self.fine_tune.model_copy(update={"seed": self.fine_tune.seed + number})
        return self.model_copy(update={"fine_tune": fine_tune, "seed": self.seed + number, "num_seeds": 1})


class ResolvedExperiment(Config):
    """An experiment whose base model and data have been found and digested."""

    config: ExperimentConfig
    base: BaseModel
    tasks: tuple[ResolvedTask, ...]


def check_base(config: ExperimentConfig, base: BaseModel) -> None:
    """Raises UserError for more blocks than the base has, and for longer texts than it takes."""
    if config.blocks is not None and base.num_blocks is not None and config.blocks.last >= base.num_blocks:
        last = base.num_blocks - 1
        raise UserError(f"blocks.last {config.blocks.last}: the base model's blocks are 0 to {last}; choose one of them")
    lengths = {"fine_tune": config.fine_tune.max_length} | ({"full": config.full.max_length} if "full" in config.arms else {})
    for name, length in lengths.items():
        if base.num_tokens is not None and length > base.num_tokens:
            raise UserError(f"{name}.max_length {length}: the base model takes {base.num_tokens} tokens; use at most as many")


def resolve(config: ExperimentConfig, data_dir: Path | None) -> ResolvedExperiment:
    """Find the base model and all data. Raises UserError for the first that is not there, and for what the base has not."""
    base = resolve_base_model(config.base_model)
    check_base(config, base)
    return ResolvedExperiment(config=config, base=base, tasks=tuple(resolve_task(task, data_dir) for task in config.tasks))
