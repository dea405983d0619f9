"""Experiments as data: the presets, the paper's tables as tuples of experiments, and the set behind docs/RESULTS.md.

An ablation is a row more in a tuple. Rows share every stage whose inputs are equal: Table 3's checkpoints are harvested
once, at the largest N, and every table's default row is Table 1's.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cpdiff_core.config import UserError
from cpdiff_core.domains.base_models import BaseModelConfig
from cpdiff_core.domains.blocks import BlockConfig
from cpdiff_core.domains.glue.data import SplitConfig
from cpdiff_core.domains.glue.fine_tuning import FineTuneConfig
from cpdiff_core.domains.glue.heads import HeadConfig
from cpdiff_core.domains.glue.text_tasks import GLUE_TASKS, excerpt
from cpdiff_core.evaluation.arms import ALL_ARMS, ArmName
from cpdiff_core.experiment_config import AuditConfig, ExperimentConfig, ResolvedExperiment, resolve
from cpdiff_core.generator.autoencoder import ConvAutoencoderConfig, IdentityAutoencoderConfig
from cpdiff_core.generator.conditions import (
    ConditionConfig,
    FewShotCondition,
    LearnedCondition,
    OneHotCondition,
    TaskInfoCondition,
    TaskInfoFewShotCondition,
)
from cpdiff_core.generator.diffusion import DiffusionConfig, SamplingConfig
from cpdiff_core.generator.normalization import NormalizationConfig
from cpdiff_core.generator.training import TrainingConfig
from cpdiff_core.generator.unet1d import UNetConfig
from cpdiff_core.lora.layout import LoraSpec
from cpdiff_core.paper import PaperRow

__all__ = ["EXPERIMENTS", "QUICKSTART", "RESULTS", "TABLES", "ExperimentConfig", "ResolvedExperiment", "experiment", "resolve"]

TableName = Literal["table1", "table3", "table4a", "table4b", "table4c", "extra"]
BaseName = Literal["minilm-l6", "bert-base", "roberta-base", "deberta-base", "gpt2"]
_TUNED = Path(__file__).parent / "tuned"

QUICKSTART = ExperimentConfig(
    name="quickstart",
    description="The whole method on an excerpt of three GLUE tasks with MiniLM-L6; 3 to 4 minutes on 2 idle CPU cores.",
    tasks=(excerpt("sst2"), excerpt("cola"), excerpt("stsb")),
    splits=SplitConfig(max_selection=96, max_report=200),
    head=HeadConfig(max_examples=500),
    fine_tune=FineTuneConfig(num_steps=200, batch_size=16, warmup_steps=20, max_length=64),
    scored_checkpoints=10,
    report_candidates="chosen",
    autoencoder=ConvAutoencoderConfig(training=TrainingConfig(steps=40, batch_size=64, learning_rate=1e-4)),
    diffusion=DiffusionConfig(
        unet=UNetConfig(width=96),
        training=TrainingConfig(steps=600, batch_size=128, learning_rate=2e-3, ema_decay=0.99),
    ),
    sampling=SamplingConfig(num_inference_steps=25),
    economies=(
        "an excerpt of 3 tasks (2,880 training examples each), 200 fine-tuning steps of 16 examples, one run per task, one seed",
        "head fitted on 500 examples; 96 examples to choose on, 200 validation examples to report on",
        "10 evenly spaced checkpoints of 150 stand for 'original'; only the chosen candidate is scored on validation",
    ),
)

GLUE6_CPU = ExperimentConfig(
    name="glue6/minilm-r1-cpu",
    description="All six GLUE tasks on minilm-l6, r=1, shortened for 2 CPU cores; under an hour there.",
    tasks=tuple(GLUE_TASKS.values()),
    splits=SplitConfig(max_selection=200, max_report=500),
    head=HeadConfig(max_examples=2000),
    fine_tune=FineTuneConfig(num_steps=600, batch_size=16, warmup_steps=50),
    scored_checkpoints=10,
    report_candidates="chosen",
    autoencoder=ConvAutoencoderConfig(training=TrainingConfig(steps=80, batch_size=64, learning_rate=1e-4)),
    diffusion=DiffusionConfig(
        unet=UNetConfig(width=96),
        training=TrainingConfig(steps=1200, batch_size=128, learning_rate=2e-3, ema_decay=0.995),
    ),
    sampling=SamplingConfig(num_inference_steps=25),
    economies=(
        "600 fine-tuning steps of 16 examples, one run per task, one seed",
        "heads fitted on 2,000 examples; at most 200 examples to choose on, 500 validation examples to report on",
        "10 evenly spaced checkpoints of 150 stand for 'original'; only the chosen candidate is scored on validation",
    ),
)


@dataclass(frozen=True)
class BaseChoice:
    """What a table needs to know of a base model. block_ranges: Table 4c, inclusive. minutes: of a row of Table 1."""

    paper_name: str | None
    ranks: tuple[int, ...]
    block_ranges: tuple[tuple[int, int], ...]
    minutes: str
    full: bool = False


_TWELVE = ((0, 1), (0, 4), (0, 8), (0, 11))
BASES: dict[BaseName, BaseChoice] = {
    "minilm-l6": BaseChoice(None, (1, 2, 4, 16), ((0, 0), (0, 2), (0, 4), (0, 5)), "about 2 minutes on one H100 or H200"),
    "bert-base": BaseChoice("BERT", (1, 2, 4, 16), _TWELVE, "about 10 minutes on one H100 (estimated)", full=True),
    "roberta-base": BaseChoice("RoBERTa", (1, 2, 4), _TWELVE, "about 10 minutes on one H100 (estimated)", full=True),
    "deberta-base": BaseChoice("DeBERTa", (1, 2, 4), _TWELVE, "about 30 minutes on one H100 (estimated)"),
    "gpt2": BaseChoice(None, (1, 2, 4), _TWELVE, "about 10 minutes on one H100 (estimated)"),
}
ABLATION_ARMS: tuple[ArmName, ...] = (
    "original (oracle)", "original (selected)", "model soup", "generated", "generated (mean)",
)  # fmt: skip


def tuned_fine_tuning(base: BaseName) -> FineTuneConfig:
    """The hyper-parameters that the search of Sec. 4.1 kept for a base (`cpdiff_core/tuned/<base>.json`, with the
    evidence), or the defaults where it has not been run. bf16, the last 500 steps harvested (Table 3's largest N)."""
    path = _TUNED / f"{base}.json"
    values: dict[str, Any] = {"num_steps": 1200}
    if path.is_file():
        values |= json.loads(path.read_text(encoding="utf-8"))["fine_tune"]
    elif base != "minilm-l6":
        values |= {"learning_rate": 3e-4, "num_steps": 4000}
    return FineTuneConfig.model_validate(values | {"precision": "bf16", "num_harvest": 500})


def glue6(base: BaseName, rank: int, **changes: Any) -> ExperimentConfig:
    """All six GLUE tasks: a row of Table 1. lora_alpha is 8 sqrt(r), which meets the released 8 at r=1 and 32 at r=16."""
    choice = BASES[base]
    short = base.split("-")[0]
    minutes = choice.minutes if base != "minilm-l6" or rank == 1 else "minutes on one GPU (estimated)"
    values: dict[str, Any] = {
        "name": f"glue6/{short}-r{rank}",
        "description": f"All six GLUE tasks at full size on {base}, r={rank}: Table 1's row; {minutes}.",
        "base_model": BaseModelConfig(name=base),
        "tasks": tuple(GLUE_TASKS.values()),
        "lora": LoraSpec(rank=rank, lora_alpha=8.0 * rank**0.5),
        "fine_tune": tuned_fine_tuning(base),
        "arms": ALL_ARMS,
    }
    paper_name = choice.paper_name or ("BERT" if base == "minilm-l6" else None)
    if paper_name and rank in BASES[_PAPER_BASE[paper_name]].ranks:
        values["paper"] = PaperRow(table="table1", row=f"{paper_name} r={rank}")
    return ExperimentConfig.model_validate(values | changes)


_PAPER_BASE: dict[str, BaseName] = {"BERT": "bert-base", "RoBERTa": "roberta-base", "DeBERTa": "deberta-base"}


def _row(base: BaseName, table: str, label: str, what: str, paper: PaperRow | None, **changes: Any) -> ExperimentConfig:
    short = base.split("-")[0]
    more = "About a minute on one H200" if base == "minilm-l6" and not table.startswith("extra") else "Minutes on one GPU"
    text = f"{what}; r=1 on {base}. {more} beyond glue6/{short}-r1, whose checkpoints it shares."
    values = {"name": f"{table}/{short}-{label}", "description": text, "arms": ABLATION_ARMS, "paper": paper}
    return glue6(base, 1, **(values | changes))


def table1(base: BaseName) -> tuple[ExperimentConfig, ...]:
    """Ranks, and full fine-tuning where the paper has that row."""
    rows = tuple(glue6(base, rank) for rank in BASES[base].ranks)
    if not (BASES[base].full or base == "minilm-l6"):
        return rows
    short = base.split("-")[0]
    paper_name = BASES[base].paper_name or "BERT"
    full = glue6(
        base, 1, name=f"glue6/{short}-full", arms=("no-LoRA", "original (selected)", "generated", "full"),
        description=f"All six GLUE tasks on {base}: full fine-tuning beside r=1; about an hour on one H100 (estimated).",
        paper=PaperRow(table="table1", row=f"{paper_name} full"),
    )  # fmt: skip
    return (*rows, full)


def table3(base: BaseName) -> tuple[ExperimentConfig, ...]:
    """The number of checkpoints N. The text's default is 150, the table's is 200."""
    return tuple(
        _row(base, "table3", f"n{num}", f"Table 3: N = {num} checkpoints", PaperRow(table="table3", row=str(num)),
             num_checkpoints=num)
        for num in (1, 100, 200, 500)
    )  # fmt: skip


def table4a(base: BaseName) -> tuple[ExperimentConfig, ...]:
    """Normalisation. The released code takes statistics of each coordinate; ours (`task-vector`) of each task alone."""
    rows: tuple[tuple[str, str | None, NormalizationConfig], ...] = (
        ("none", "no norm.", NormalizationConfig(scope="none", axis="coordinate")),
        ("batch", "batch norm.", NormalizationConfig(scope="batch", axis="coordinate")),
        ("task", "task norm.", NormalizationConfig(scope="task", axis="coordinate")),
        ("task-vector", "task norm.", NormalizationConfig(scope="task", axis="vector")),
    )
    return tuple(
        _row(base, "table4a", label, f"Table 4a: normalisation {label}",
             PaperRow(table="table4a", row=paper) if paper else None, normalization=config)
        for label, paper, config in rows
    )  # fmt: skip


def table4b(base: BaseName) -> tuple[ExperimentConfig, ...]:
    """Conditions, and examples alone, which the text names and the table lacks."""
    rows: tuple[tuple[str, str | None, ConditionConfig], ...] = (
        ("one-hot", "one-hot", OneHotCondition()), ("learned", "learnable vector", LearnedCondition()),
        ("task-info", "task info", TaskInfoCondition()), ("few-shot", None, FewShotCondition()),
        ("task-info-few-shot", "task info+few-shot", TaskInfoFewShotCondition()),
    )  # fmt: skip
    return tuple(
        _row(base, "table4b", label, f"Table 4b: condition {label}",
             PaperRow(table="table4b", row=paper) if paper else None, condition=config)
        for label, paper, config in rows
    )  # fmt: skip


def table4c(base: BaseName, fill: Literal["zero", "checkpoint", "soup"] = "checkpoint") -> tuple[ExperimentConfig, ...]:
    """Which blocks are generated; the others keep the last checkpoint, as in the released code."""
    rows = []
    for (first, last), paper in zip(BASES[base].block_ranges, ("0-1", "0-4", "0-8", "0-11"), strict=True):
        whole = (first, last) == BASES[base].block_ranges[-1]
        blocks = None if whole else BlockConfig(first=first, last=last, fill=fill)
        what = f"Table 4c: blocks {first}-{last} generated, {fill} elsewhere"
        rows.append(_row(base, "table4c", f"{first}-{last}", what, PaperRow(table="table4c", row=paper), blocks=blocks))
    return tuple(rows)


def extra(base: BaseName) -> tuple[ExperimentConfig, ...]:
    """Beyond the paper: diffusion on the vectors themselves, other samplers, and a zoo of five runs a task."""
    samplers = (("ddpm", 1000), ("dpmsolver++", 20))
    return (
        _row(base, "extra", "no-autoencoder", "Diffusion without the autoencoder", None,
             autoencoder=IdentityAutoencoderConfig()),
        *(_row(base, "extra", f"{scheduler.rstrip('+')}-{steps}", f"Sampled by {scheduler} in {steps} steps", None,
               sampling=SamplingConfig(scheduler=scheduler, num_inference_steps=steps)) for scheduler, steps in samplers),
        _row(base, "extra", "zoo5", "Five runs a task in place of one trajectory", None, num_runs=5),
    )  # fmt: skip


TABLES: dict[TableName, Callable[[BaseName], tuple[ExperimentConfig, ...]]] = {
    "table1": table1, "table3": table3, "table4a": table4a, "table4b": table4b, "table4c": table4c, "extra": extra,
}  # fmt: skip


def for_results(item: ExperimentConfig, name: str, what: str, num_seeds: int = 3, **changes: Any) -> ExperimentConfig:
    """The same experiment within the budget of docs/RESULTS.md: fewer checkpoints scored, a shorter diffusion."""
    values = {
        "name": name,
        "description": f"{what}, r={item.lora.rank} on minilm-l6; {num_seeds} seeds; minutes of a shared H200, see "
        "docs/RESULTS.md.",
        "scored_checkpoints": 30, "num_seeds": num_seeds,
        "diffusion": DiffusionConfig(
            training=TrainingConfig(steps=2000, batch_size=256, learning_rate=2e-3, ema_decay=0.998)
        ),
        "splits": SplitConfig(max_selection=500, max_report=2000),
        "economies": (
            "30 evenly spaced checkpoints of each task stand for 'original'; at most 500 examples to choose on and "
            "2,000 of validation (QNLI) to report on; 2,000 diffusion steps in place of 4,000",
        ),
    }  # fmt: skip
    # Validated anew: a copy would skip the checks between fields.
    return ExperimentConfig.model_validate({**dict(item), **values, **changes})


def _results() -> tuple[ExperimentConfig, ...]:
    """Table 1's row at r = 1 and 4, single trajectory and five runs, audited; Tables 3, 4a, 4b, 4c and extra at r = 1."""
    audited = []
    for rank in (1, 4):
        single = glue6("minilm-l6", rank)
        if rank > 1:  # Table 3 is at r = 1; 500 checkpoints of more parameters would only fill the disk
            fine_tune = single.fine_tune.model_copy(update={"num_harvest": 150})
            single = single.model_copy(update={"fine_tune": fine_tune})
        audited += [
            for_results(single, f"results/r{rank}-single", "All six GLUE tasks, one run a task", audit=AuditConfig()),
            for_results(single, f"results/r{rank}-zoo5", "All six GLUE tasks, five runs a task", audit=AuditConfig(), num_runs=5),
        ]
    rows = [row for name in ("table3", "table4a", "table4b", "table4c") for row in TABLES[name]("minilm-l6")]  # type: ignore[index]
    rows += extra("minilm-l6")[:-1]  # the zoo of five runs is among the audited
    return (*audited, *(for_results(row, f"results/{row.name}", row.description.partition(";")[0]) for row in rows))


RESULTS: tuple[ExperimentConfig, ...] = _results()
EXPERIMENTS: dict[str, ExperimentConfig] = {item.name: item for item in (QUICKSTART, GLUE6_CPU)}
EXPERIMENTS |= {row.name: row for base in BASES for table in TABLES.values() for row in table(base)}
EXPERIMENTS |= {item.name: item for item in RESULTS}


def experiment(name: str, also: Iterable[str] = ()) -> ExperimentConfig:
    """An experiment by its name. Raises UserError with the nearest names, those of `also` among them, if there is none."""
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    near = difflib.get_close_matches(name, [*EXPERIMENTS, *also], n=3, cutoff=0.3) or list(EXPERIMENTS)[:3]
    raise UserError(f"experiment {name!r}: is no known name and no .json file; nearest: {', '.join(near)} (see `cpdiff list`)")


