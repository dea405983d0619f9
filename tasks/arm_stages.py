"""The cached stages of the arms beyond the paper's, of the memorisation audit and of the figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from cpdiff_core.artifacts import Artifact, ResumeState, read_json, read_tensors, write_json, write_tensors
from cpdiff_core.config import Config, RuntimeConfig
from cpdiff_core.domains.base_models import BaseModel
from cpdiff_core.domains.blocks import BlockConfig, adapter_layout, block_columns, fill_columns
from cpdiff_core.domains.glue.continuation import continue_from
from cpdiff_core.domains.glue.data import ResolvedTask, SplitConfig
from cpdiff_core.domains.glue.fine_tuning import HarvestConfig
from cpdiff_core.domains.glue.full_tuning import FullTuningConfig, full_logits, tune_fully
from cpdiff_core.domains.glue.stacks import device_of
from cpdiff_core.evaluation.audit import diversity, iou_summary, novelty, resembles, wrong_predictions
from cpdiff_core.evaluation.geometry import embed, geometry
from cpdiff_core.evaluation.scores import ReportArtifact, load_predictions, write_scores
from cpdiff_core.evaluation.trivial import TRIVIAL_FAMILIES, MatchedDistance, match_distance
from cpdiff_core.experiment_config import ExperimentConfig
from cpdiff_core.generator.diffusion import SamplingConfig
from cpdiff_core.generator.probing import CHANGES, change_condition, trajectory
from cpdiff_core.lora.layout import LoraSpec
from cpdiff_core.lora.vectors import min_l2_product
from cpdiff_core.lora.zoo import CANDIDATE_FILE, HARVEST_FILE, VectorSet, Zoo, load_checkpoints
from cpdiff_core.reports.comparison import comparison_frame, comparison_table, read_row, shared_notes
from tasks.stage import GIVEN, folder, root, stage
from tasks.stages import HEAD_FILE, Generator, generator_parts

AUDIT_FILE = "audit.json"
MATCHED_FILE = "matched.json"
FULL_FILE = "model.safetensors"


class Training(Config):
    """The training vectors of one task: the last N checkpoints of its runs, and what they are attached to."""

    base: BaseModel
    lora: LoraSpec
    task: ResolvedTask
    runs: tuple[Artifact, ...]
    num_checkpoints: int = Field(ge=1)

    def load(self) -> torch.Tensor:
        """w_NK, float32 on the CPU."""
        return torch.cat([load_checkpoints(folder(run), self.num_checkpoints) for run in self.runs])


@stage("continue_training", version=2, label=lambda config: f"{config[0].fine_tune.num_steps} steps of {len(config)} vectors")
def continue_training(
    out: Path, config: tuple[HarvestConfig, ...], starts: tuple[VectorSet, ...], heads: tuple[Artifact, ...], *,
    runtime: RuntimeConfig, resume: ResumeState = GIVEN,
) -> None:  # fmt: skip
    """w_MK: vector i, trained on as config[i] says from the one vector of starts[i]. All share one stacked pass."""
    w_SK = torch.cat([start.load(root(), 0) for start in starts])
    states = [read_tensors(folder(head), HEAD_FILE) for head in heads]
    settings = "soup_tuning" if starts[0].kind == "soup" else "annealing"
    write_tensors(out / CANDIDATE_FILE, {"w_MK": continue_from(config, w_SK, states, runtime, resume, settings)})


@stage("select_blocks", label=lambda blocks: f"{blocks.first}-{blocks.last}")
def select_blocks(out: Path, base: BaseModel, lora: LoraSpec, blocks: BlockConfig, harvest: Artifact) -> None:
    """A harvest cut to the columns of some blocks (Tab. 4c)."""
    mask_K = block_columns(adapter_layout(base, lora), blocks)
    tensors = read_tensors(folder(harvest), HARVEST_FILE)
    write_tensors(out / HARVEST_FILE, tensors | {"w_NK": tensors["w_NK"][:, mask_K]})


@stage("fill_blocks", label=lambda training: training.task.name)
def fill_blocks(out: Path, training: Training, blocks: BlockConfig, candidates: Artifact) -> None:
    """Candidates of some blocks made whole (Tab. 4c)."""
    mask_K = block_columns(adapter_layout(training.base, training.lora), blocks)
    part_MK = read_tensors(folder(candidates), CANDIDATE_FILE)["w_MK"]
    w_MK = fill_columns(part_MK, mask_K, training.load(), blocks.fill)
    write_tensors(out / CANDIDATE_FILE, {"w_MK": w_MK})


@stage("trivial_vectors", label=lambda training: training.task.name)
def trivial_vectors(
    out: Path, training: Training, candidates: VectorSet, num: int, seed: int, *, runtime: RuntimeConfig
) -> None:
    """`num` vectors of every trivial family, family by family, as far from the training vectors as the candidates."""
    device = device_of(runtime)
    layout = adapter_layout(training.base, training.lora)
    w_NK = training.load().to(device)
    w_MK = candidates.load(root(), layout.num_parameters).to(device)

    def distance(w_VK: torch.Tensor) -> torch.Tensor:
        return min_l2_product(w_VK, w_NK, layout.factors, training.lora.scaling)

    target = float(distance(w_MK).median())
    matched = [match_distance(family, w_NK, target, distance, num=num, seed=seed) for family in TRIVIAL_FAMILIES.values()]
    vectors = [
        TRIVIAL_FAMILIES[match.family].generate(w_NK, num, seed, match.scale).cpu() for match in matched
    ]
    write_tensors(out / CANDIDATE_FILE, {"w_MK": torch.cat(vectors)})
    write_json(out / MATCHED_FILE, [match.model_dump() for match in matched])


def load_matched(artifact: Artifact) -> list[MatchedDistance]:
    return [MatchedDistance.model_validate(value) for value in read_json(folder(artifact), MATCHED_FILE)]


@stage("generate_changed", label=lambda task: task)
def generate_changed(
    out: Path, config: SamplingConfig, generator: Generator, task: str, seed: int, *, runtime: RuntimeConfig
) -> None:
    """Candidates of every changed condition, change by change, from the noises of `generate_candidates`."""
    names = read_json(folder(generator.conditions), "prompts.json")["tasks"]
    y_QE = read_tensors(folder(generator.conditions), "conditions.safetensors")["y_QE"]
    q = names.index(task)
    diffusion, autoencoder, normalizer = generator_parts(generator, runtime)
    empty_E = diffusion.projection.center_E.cpu()
    y_CE = torch.stack([change_condition(y_QE, q, change, empty_E, seed) for change in CHANGES])
    z_CMCL = diffusion.sample(y_CE, config.num_candidates, seed, config)
    parts = []
    for change, z_MCL in zip(CHANGES, z_CMCL, strict=True):
        statistics = names[(q + 1) % len(names)] if change == "another task's statistics" else task
        parts.append(normalizer.invert(statistics, autoencoder.decode(z_MCL).cpu()))
    write_tensors(out / CANDIDATE_FILE, {"w_MK": torch.cat(parts)})


@stage("audit", label=lambda training: training.task.name)
def audit(
    out: Path, training: Training, candidates: VectorSet, candidate_scores: ReportArtifact,
    checkpoint_scores: ReportArtifact, trivial: Artifact, *, runtime: RuntimeConfig,
) -> None:  # fmt: skip
    """Novelty, shared mistakes, diversity and likeness to trivial families of one task's candidates."""
    device, task = device_of(runtime), training.task.task
    layout = adapter_layout(training.base, training.lora)
    w_NK = training.load().to(device)
    w_MK = candidates.load(root(), layout.num_parameters).to(device)
    predicted_Mn, labels = load_predictions(folder(candidate_scores), task)
    trained_Nn, _ = load_predictions(folder(checkpoint_scores), task)
    regression = task.labels is None
    iou = iou_summary(
        wrong_predictions(predicted_Mn, labels, regression), wrong_predictions(trained_Nn, labels, regression)
    )
    found = novelty(w_MK, w_NK, layout.factors, training.lora.scaling)
    write_json(
        out / AUDIT_FILE,
        {
            "task": task.name,
            "regression": regression,
            "iou": iou.model_dump(),
            "novelty": found.model_dump(),
            "diversity": diversity(predicted_Mn, regression).model_dump(),
            "resembles": list(resembles(w_MK, w_NK, load_matched(trivial))),
        },
    )


@stage("describe_geometry")
def describe_geometry(out: Path, training: tuple[Training, ...], candidates: tuple[VectorSet, ...], seed: int) -> None:
    """Dispersion and separation of all tasks' vectors, and their t-SNE."""
    w_NK_by_task = {part.task.name: part.load() for part in training}
    width = next(iter(w_NK_by_task.values())).shape[1]
    w_MK_by_task = {
        part.task.name: vectors.load(root(), width) for part, vectors in zip(training, candidates, strict=True)
    }
    write_json(out / "geometry.json", geometry(w_NK_by_task, w_MK_by_task).model_dump())
    plane = embed(w_NK_by_task, w_MK_by_task, seed)
    write_tensors(out / "tsne.safetensors", {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in plane.items()})


@stage("sampling_trajectory")
def sampling_trajectory(
    out: Path, config: SamplingConfig, generator: Generator, zoo: Zoo, num: int, seed: int, *, runtime: RuntimeConfig
) -> None:
    """How far `num` samples of every task are from its training vectors at each reverse step (Sec. 4.4)."""
    y_QE = read_tensors(folder(generator.conditions), "conditions.safetensors")["y_QE"]
    found = trajectory(*generator_parts(generator, runtime), zoo.load(root()), y_QE, config, num, seed)
    write_json(out / "trajectory.json", found.model_dump())


@stage("fine_tune_full", label=lambda task: task.name)
def fine_tune_full(
    out: Path, config: FullTuningConfig, base: BaseModel, task: ResolvedTask, splits: SplitConfig, *,
    runtime: RuntimeConfig,
) -> None:  # fmt: skip
    """Table 1's *full* row: the checkpoint that is best on the selection split."""
    write_tensors(out / FULL_FILE, tune_fully(config, base, task, splits, runtime))


@stage("score_report_full", returns=ReportArtifact, label=lambda task: task.name)
def score_full(
    out: Path, config: FullTuningConfig, base: BaseModel, task: ResolvedTask, splits: SplitConfig, model: Artifact, *,
    runtime: RuntimeConfig,
) -> None:  # fmt: skip
    state = read_tensors(folder(model), FULL_FILE)
    logits_VBC, labels_B = full_logits(config, base, task, splits, "report", state, runtime)
    write_scores(out, task.task, "report", logits_VBC, labels_B.numpy())


@stage("table", 2, label=lambda name: name)
def table(out: Path, name: str, rows: tuple[ExperimentConfig, ...], reports: tuple[Artifact, ...]) -> None:
    """Reports side by side, with what all of them note: table.md, results.csv and summary.txt."""
    folders = [folder(report) for report in reports]
    read = [read_row(row, path) for row, path in zip(rows, folders, strict=True)]
    arms = list(dict.fromkeys(arm for row in rows for arm in row.arms))
    notes = [f"- {note}" for note in shared_notes(folders)]
    text = "\n\n".join(part for part in (comparison_table(read, arms), "\n".join(notes)) if part)
    (out / "table.md").write_text(f"# {name}\n\n{text}\n", encoding="utf-8")
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    comparison_frame(read, arms).to_csv(out / "results.csv", index=False)
