"""The cached stages: one thin function each, from files to files. The science is in `cpdiff_core`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cpdiff_core.artifacts import Artifact, ResumeState, read_json, read_tensors, write_json, write_tensors
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.base_models import BaseModel
from cpdiff_core.domains.glue.data import ResolvedTask, SplitConfig
from cpdiff_core.domains.glue.fine_tuning import FineTuning, HarvestConfig, group_key
from cpdiff_core.domains.glue.heads import HeadConfig
from cpdiff_core.domains.glue.heads import fit_head as compute_head
from cpdiff_core.domains.glue.prompts import task_conditions
from cpdiff_core.domains.glue.stacks import device_of
from cpdiff_core.evaluation.scores import ReportArtifact, ScoringConfig, SelectionArtifact, score_vectors
from cpdiff_core.experiment_config import ExperimentConfig
from cpdiff_core.generator.autoencoder import (
    AutoencoderConfig,
    ParameterAutoencoder,
    pca_within_task_variance_explained,
    within_task_variance_explained,
)
from cpdiff_core.generator.autoencoder import fit_autoencoder as compute_autoencoder
from cpdiff_core.generator.conditions import ConditionConfig
from cpdiff_core.generator.diffusion import DiffusionConfig, LatentDiffusion, SamplingConfig
from cpdiff_core.generator.diffusion import fit_diffusion as compute_diffusion
from cpdiff_core.generator.normalization import NormalizationConfig, Normalizer
from cpdiff_core.lora.zoo import CANDIDATE_FILE, HARVEST_FILE, VectorSet, Zoo
from cpdiff_core.reports.inputs import Generator, ReportInputs
from cpdiff_core.reports.page import write_report
from tasks.groups import GroupedStage, Member, finished_tensors, train_together
from tasks.stage import GIVEN, folder, root, stage

HEAD_FILE = "head.safetensors"


@stage("fit_head", version=2, label=lambda task: task.name)
def fit_head(
    out: Path, config: HeadConfig, base: BaseModel, task: ResolvedTask, splits: SplitConfig, max_length: int, *,
    runtime: RuntimeConfig,
) -> None:  # fmt: skip
    write_tensors(out / HEAD_FILE, compute_head(config, base, task, splits, max_length, runtime=runtime))


@stage("harvest_checkpoints", version=2, label=lambda config: config.label)
def harvest_checkpoints(
    out: Path, config: HarvestConfig, head: Artifact, *, runtime: RuntimeConfig, resume: ResumeState = GIVEN,
    account: dict[str, Any] = GIVEN,
) -> None:  # fmt: skip
    """Commit what a group pass has left, with its share of the cost, or else train this run alone."""
    tensors = finished_tensors(resume, account) or _train([(config, head)], runtime, resume)[0]
    write_tensors(out / HARVEST_FILE, tensors)


def harvest_together(configs: Sequence[HarvestConfig], heads: Sequence[Artifact], runtime: RuntimeConfig) -> None:
    """Train every missing run once, in as few passes as possible; each is committed by its own stage."""
    works = {harvest_checkpoints.artifact(*work, runtime=runtime): work for work in zip(configs, heads, strict=True)}
    members = [Member(artifact, work[0].label, work, group_key(work[0])) for artifact, work in works.items()]
    train_together(GroupedStage(_train, _commit, ("transformers", "peft")), members, runtime)


def _train(
    works: Sequence[tuple[HarvestConfig, Artifact]], runtime: RuntimeConfig, resume: ResumeState
) -> list[dict[str, torch.Tensor]]:
    tuning = FineTuning([config for config, _ in works], [read_tensors(folder(head), HEAD_FILE) for _, head in works], runtime)
    return [harvest.tensors() for harvest in tuning.run(runtime, resume)]


def _commit(work: tuple[HarvestConfig, Artifact], runtime: RuntimeConfig) -> object:
    return harvest_checkpoints(*work, runtime=runtime)


def _vectors(zoo: Zoo, normalizer: Artifact) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised w_VK of all tasks, task index of each)."""
    fitted = load_normalizer(normalizer)
    harvests = zoo.load(root())
    w_VK = torch.cat([fitted.normalize(task, w_NK) for task, w_NK in harvests.items()])
    task_V = torch.cat([torch.full((len(w_NK),), q) for q, w_NK in enumerate(harvests.values())])
    return w_VK, task_V


def load_normalizer(artifact: Artifact) -> Normalizer:
    value = read_json(folder(artifact), "normalizer.json")
    config = NormalizationConfig.model_validate(value["config"])
    return Normalizer.from_tensors(config, value["tasks"], read_tensors(folder(artifact), "normalizer.safetensors"))


def generator_parts(
    generator: Generator, runtime: RuntimeConfig
) -> tuple[LatentDiffusion, ParameterAutoencoder, Normalizer]:
    """The fitted parts of a generator, the networks on the device."""
    device = device_of(runtime)
    return (
        LatentDiffusion.load(folder(generator.diffusion), device),
        ParameterAutoencoder.load(folder(generator.autoencoder), device), load_normalizer(generator.normalizer),
    )  # fmt: skip


@stage("fit_normalization", label=lambda config: f"{config.scope} by {config.axis}")
def fit_normalization(out: Path, config: NormalizationConfig, zoo: Zoo) -> None:
    normalizer = Normalizer.fit(config, zoo.load(root()))
    write_tensors(out / "normalizer.safetensors", normalizer.tensors())
    write_json(out / "normalizer.json", {"config": config.model_dump(mode="json"), "tasks": list(normalizer.tasks)})


@stage("fit_autoencoder", label=lambda config: config.kind)
def fit_autoencoder(
    out: Path, config: AutoencoderConfig, zoo: Zoo, normalizer: Artifact, seed: int, *, runtime: RuntimeConfig,
    resume: ResumeState = GIVEN,
) -> None:  # fmt: skip
    w_VK, task_V = _vectors(zoo, normalizer)
    device = device_of(runtime)
    model, losses = compute_autoencoder(config, w_VK, task_V, seed=seed, device=device, runtime=runtime, resume=resume)
    model.save(out)
    write_tensors(out / "losses.safetensors", {"losses": losses})
    w_VK, task_V = w_VK.to(device), task_V.to(device)
    reconstruction_VK = model.decode(model.encode(w_VK))
    write_json(
        out / "quality.json",
        {
            "within_task_variance_explained": within_task_variance_explained(w_VK, reconstruction_VK, task_V),
            "pca16_within_task_variance_explained": pca_within_task_variance_explained(w_VK, task_V, 16),
            "latent_numbers": model.channels * model.length,
            "vector_numbers": w_VK.shape[1],
        },
    )


@stage("encode_conditions", label=lambda config: config.kind)
def encode_conditions(
    out: Path, config: ConditionConfig, tasks: tuple[ResolvedTask, ...], descriptions: tuple[str | None, ...],
    splits: SplitConfig, seed: int, *, runtime: RuntimeConfig,
) -> None:  # fmt: skip
    y_QPE, y_QE, texts = task_conditions(config, tasks, descriptions, splits, seed, device_of(runtime))
    write_tensors(out / "conditions.safetensors", {"y_QPE": y_QPE, "y_QE": y_QE})
    write_json(out / "prompts.json", {"tasks": [task.name for task in tasks], **texts.model_dump(mode="json")})


@stage("fit_diffusion", label=lambda condition: condition.kind)
def fit_diffusion(
    out: Path, config: DiffusionConfig, condition: ConditionConfig, zoo: Zoo, normalizer: Artifact, autoencoder: Artifact,
    conditions: Artifact, seed: int, *, runtime: RuntimeConfig, resume: ResumeState = GIVEN,
) -> None:  # fmt: skip
    w_VK, task_V = _vectors(zoo, normalizer)
    device = device_of(runtime)
    z_VCL = ParameterAutoencoder.load(folder(autoencoder), device).encode(w_VK.to(device))
    y_QPE = read_tensors(folder(conditions), "conditions.safetensors")["y_QPE"]
    model, losses = compute_diffusion(
        config, condition, z_VCL, task_V, y_QPE, seed=seed, device=device, runtime=runtime, resume=resume
    )
    model.save(out)
    write_tensors(out / "losses.safetensors", {"losses": losses})


@stage("generate_candidates", label=lambda task: task)
def generate_candidates(
    out: Path, config: SamplingConfig, generator: Generator, task: str, seed: int, *, runtime: RuntimeConfig
) -> None:
    """w_MK: M candidates of one task from noise and its held-out condition, decoded and de-normalised."""
    names = read_json(folder(generator.conditions), "prompts.json")["tasks"]
    y_1E = read_tensors(folder(generator.conditions), "conditions.safetensors")["y_QE"][names.index(task)][None]
    diffusion, autoencoder, normalizer = generator_parts(generator, runtime)
    z_MCL = diffusion.sample(y_1E, config.num_candidates, seed, config)[0]
    w_MK = normalizer.invert(task, autoencoder.decode(z_MCL).cpu())
    write_tensors(out / CANDIDATE_FILE, {"w_MK": w_MK, "z_MCL": z_MCL})


@stage(
    "score_selection", version=2, returns=SelectionArtifact, label=lambda config, vectors: f"{config.task.name} {vectors.kind}"
)  # fmt: skip
def score_selection(
    out: Path, config: ScoringConfig, vectors: VectorSet, head: Artifact, *, runtime: RuntimeConfig
) -> None:
    score_vectors(out, config, vectors, read_tensors(folder(head), HEAD_FILE), "selection", root(), runtime)


@stage("score_report", version=2, returns=ReportArtifact, label=lambda config, vectors: f"{config.task.name} {vectors.kind}")
def score_report(out: Path, config: ScoringConfig, vectors: VectorSet, head: Artifact, *, runtime: RuntimeConfig) -> None:
    score_vectors(out, config, vectors, read_tensors(folder(head), HEAD_FILE), "report", root(), runtime)


@stage("report", 4, label=lambda config: config.name)
def report(out: Path, config: ExperimentConfig, inputs: ReportInputs) -> None:
    write_report(out, config, inputs, root())
