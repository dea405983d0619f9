"""The cached stages: one thin function each, from files to files. The science is in `cpdiff_core`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from pathlib import Path
from typing import Any

import torch

from cpdiff_core.artifacts import Artifact, ResumeState, read_json, read_tensors, write_json, write_tensors
from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.domains.base_models import BaseModel
from cpdiff_core.domains.glue.data import ResolvedTask, SplitConfig
from cpdiff_core.domains.glue.fine_tuning import CheckpointHarvest, FineTuning, HarvestConfig, group_key
from cpdiff_core.domains.glue.heads import HeadConfig
from cpdiff_core.domains.glue.heads import fit_head as compute_head
from cpdiff_core.domains.glue.prompts import task_conditions
from cpdiff_core.domains.glue.stacks import all_devices, device_of, forget_stacks
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
from cpdiff_core.progress import stop_all
from cpdiff_core.reports.inputs import Generator, ReportInputs
from cpdiff_core.reports.page import write_report
from tasks.engine import num_workers, run_all
from tasks.locks import hold
from tasks.observe import awaiting_signal, watched
from tasks.provenance import Meter
from tasks.stage import GIVEN, bring, cache_key, folder, is_done, resume_state, root, stage

HEAD_FILE = "head.safetensors"
FINISHED_GROUP = "finished_group"


@stage("fit_head", label=lambda task: task.name)
def fit_head(
    out: Path, config: HeadConfig, base: BaseModel, task: ResolvedTask, splits: SplitConfig, max_length: int, *,
    runtime: RuntimeConfig,
) -> None:  # fmt: skip
    write_tensors(out / HEAD_FILE, compute_head(config, base, task, splits, max_length, runtime=runtime))


@stage("harvest_checkpoints", label=lambda config: config.label)
def harvest_checkpoints(
    out: Path, config: HarvestConfig, head: Artifact, *, runtime: RuntimeConfig, resume: ResumeState = GIVEN,
    account: dict[str, Any] = GIVEN,
) -> None:  # fmt: skip
    """Commit what a group pass has left, with its share of the cost, or else train this run alone."""
    state = resume.load()
    if state is None or not state[1].get("finished"):
        tuning = FineTuning([config], [read_tensors(folder(head), HEAD_FILE)], runtime)
        harvest = tuning.run(runtime, resume)[0]
    else:
        harvest = CheckpointHarvest(**state[0])
        account |= state[1].get("account", {})
    write_tensors(out / HARVEST_FILE, harvest.tensors())


def harvest_together(configs: Sequence[HarvestConfig], heads: Sequence[Artifact], runtime: RuntimeConfig) -> None:
    """Train every missing run that can share a pass, under the locks of all of them.

    Each finished run is left as a resume state that its own stage commits, so grouping and resuming are one
    mechanism. A killed group goes on as the group it was, if the same runs are missing. Where there are several GPUs
    the runs of a group are divided among them, one thread each.
    """
    _hand_out_leftovers(runtime)
    groups: dict[object, list[tuple[HarvestConfig, Artifact]]] = {}
    for config, head in zip(configs, heads, strict=True):
        if not _settled(harvest_checkpoints.artifact(config, head, runtime=runtime), runtime):
            groups.setdefault(group_key(config), []).append((config, head))
    workers = num_workers()
    devices = all_devices(runtime)
    passes: list[list[tuple[HarvestConfig, Artifact]]] = []
    for members in groups.values():
        size = min(runtime.adapters_per_batch or len(members), max(2, -(-len(members) // (workers or len(devices)))))
        passes += [members[first : first + size] for first in range(0, len(members), size)]
    if workers:
        run_all("harvest_group", _harvest_and_commit, [(members, runtime) for members in passes])
        return
    if len(devices) == 1:
        _harvest_passes(passes, runtime)  # in this thread, where signals arrive
        return
    places = [runtime.model_copy(update={"device": device}) for device in devices]
    with ThreadPoolExecutor(len(devices)) as pool:  # each GPU takes every n-th pass
        # Prefect's settings, the root among them, belong to a context, which a new thread does not inherit.
        shares = [
            pool.submit(copy_context().run, _harvest_passes, passes[i :: len(places)], place)
            for i, place in enumerate(places)
        ]
        try:
            for share in shares:
                with awaiting_signal():
                    share.result()
        except BaseException:
            stop_all.set()  # an interrupt reaches this thread alone
            raise
        finally:
            wait(shares)
            stop_all.clear()


def _harvest_passes(passes: Sequence[Sequence[tuple[HarvestConfig, Artifact]]], runtime: RuntimeConfig) -> None:
    for members in passes:
        _harvest_fitting(members, runtime)


def _harvest_and_commit(members: Sequence[tuple[HarvestConfig, Artifact]], runtime: RuntimeConfig) -> None:
    """A pass on a worker elsewhere, which may share nothing with us but the store: it commits its runs itself."""
    for _, head in members:
        bring(head)
    _harvest_fitting(members, runtime)
    for config, head in members:
        harvest_checkpoints(config, head, runtime=runtime)


def _harvest_fitting(members: Sequence[tuple[HarvestConfig, Artifact]], runtime: RuntimeConfig) -> None:
    """One pass; if the GPU's memory does not hold it, two passes of half the size."""
    try:
        _harvest_group(members, runtime)
        return
    except torch.OutOfMemoryError:
        if len(members) == 1:
            raise UserError(
                f"{members[0][0].label}: does not fit the memory of {runtime.device}; lower fine_tune.batch_size or "
                "fine_tune.max_length, or use a smaller base model"
            ) from None
    forget_stacks()
    torch.cuda.empty_cache()
    middle = len(members) // 2
    _harvest_fitting(members[:middle], runtime)
    _harvest_fitting(members[middle:], runtime)


def _settled(artifact: Artifact, runtime: RuntimeConfig) -> bool:
    """Whether a run is committed, or finished and waiting for its stage to commit it."""
    if is_done(artifact) or bring(artifact):
        return True
    state = resume_state(artifact, runtime).load()
    return state is not None and bool(state[1].get("finished"))


def _harvest_group(members: Sequence[tuple[HarvestConfig, Artifact]], runtime: RuntimeConfig) -> None:
    artifacts = [harvest_checkpoints.artifact(config, head, runtime=runtime) for config, head in members]
    with hold([cache_key(artifact) for artifact in artifacts]):
        missing = [i for i, artifact in enumerate(artifacts) if not _settled(artifact, runtime)]
        if len(missing) < 2:  # another process has trained the rest, or a single run: its own stage does that
            return
        configs = [members[i][0] for i in missing]
        meter = Meter(runtime.device)
        tuning = FineTuning(configs, [read_tensors(folder(members[i][1]), HEAD_FILE) for i in missing], runtime)
        name = "-".join(sorted(artifacts[i].fingerprint for i in missing))
        together = Artifact(stage="harvest_group", fingerprint=_short(name))
        group = resume_state(together, runtime)
        with watched(together):
            harvests = tuning.run(runtime, group)
        account = group_share(meter.provenance(), len(missing))
        # All at once, before any member has its own: a member that is left alone would train alone, and differ by rounding.
        named = {artifacts[i].fingerprint: harvest.tensors() for i, harvest in zip(missing, harvests, strict=True)}
        finished = resume_state(Artifact(stage=FINISHED_GROUP, fingerprint=together.fingerprint), runtime)
        finished.save(
            {f"{member}.{name}": tensor for member, tensors in named.items() for name, tensor in tensors.items()},
            {"members": list(named), "account": account},
        )
        group.discard()
        _hand_out(finished, runtime)


def _hand_out(finished: ResumeState, runtime: RuntimeConfig) -> None:
    """Leave each member of a finished group the state that its own stage commits. Needs the locks of all members."""
    if (state := finished.load()) is not None:
        tensors, numbers = state
        for member in numbers["members"]:
            artifact = Artifact(stage="harvest_checkpoints", fingerprint=member)
            own = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{member}.")}
            if not is_done(artifact):
                resume_state(artifact, runtime).save(own, {"finished": True, "account": numbers["account"]})
    finished.discard()


def _hand_out_leftovers(runtime: RuntimeConfig) -> None:
    """Go on with groups that finished and were killed before every member had its own."""
    for path in sorted((root() / ".resume" / FINISHED_GROUP).glob("*")):
        together = Artifact(stage="harvest_group", fingerprint=path.name)
        finished = resume_state(Artifact(stage=FINISHED_GROUP, fingerprint=path.name), runtime)
        members = state[1]["members"] if (state := finished.load()) is not None else []
        with hold([cache_key(Artifact(stage="harvest_checkpoints", fingerprint=member)) for member in members]):
            resume_state(together, runtime).discard()
            _hand_out(finished, runtime)


def group_share(provenance: Mapping[str, Any], num_runs: int) -> dict[str, Any]:
    """What one of `num_runs` runs that trained together cost: an equal share of the pass, since it was last resumed."""
    seconds = provenance["seconds"]
    return {
        "seconds": round(seconds / num_runs, 3), "group_seconds": seconds, "group_runs": num_runs,
        "peak_gpu_bytes": provenance["peak_gpu_bytes"],
    }  # fmt: skip


def _short(text: str) -> str:
    from cpdiff_core.config import fingerprint

    return fingerprint("harvest_group", 1, {"members": text})


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


@stage("fit_normalization")
def fit_normalization(out: Path, config: NormalizationConfig, zoo: Zoo) -> None:
    normalizer = Normalizer.fit(config, zoo.load(root()))
    write_tensors(out / "normalizer.safetensors", normalizer.tensors())
    write_json(out / "normalizer.json", {"config": config.model_dump(mode="json"), "tasks": list(normalizer.tasks)})


@stage("fit_autoencoder")
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


@stage("encode_conditions")
def encode_conditions(
    out: Path, config: ConditionConfig, tasks: tuple[ResolvedTask, ...], splits: SplitConfig, seed: int, *,
    runtime: RuntimeConfig,
) -> None:  # fmt: skip
    y_QPE, y_QE, texts = task_conditions(config, tasks, splits, seed, device_of(runtime))
    write_tensors(out / "conditions.safetensors", {"y_QPE": y_QPE, "y_QE": y_QE})
    write_json(out / "prompts.json", {"tasks": [task.name for task in tasks], **texts.model_dump(mode="json")})


@stage("fit_diffusion")
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
    device = device_of(runtime)
    names = read_json(folder(generator.conditions), "prompts.json")["tasks"]
    y_1E = read_tensors(folder(generator.conditions), "conditions.safetensors")["y_QE"][names.index(task)][None]
    diffusion = LatentDiffusion.load(folder(generator.diffusion), device)
    z_MCL = diffusion.sample(y_1E, config.num_candidates, seed, config)[0]
    normalized_MK = ParameterAutoencoder.load(folder(generator.autoencoder), device).decode(z_MCL).cpu()
    w_MK = load_normalizer(generator.normalizer).invert(task, normalized_MK)
    write_tensors(out / CANDIDATE_FILE, {"w_MK": w_MK, "z_MCL": z_MCL})


@stage("score_selection", returns=SelectionArtifact, label=lambda config, vectors: f"{config.task.name} {vectors.kind}")
def score_selection(
    out: Path, config: ScoringConfig, vectors: VectorSet, head: Artifact, *, runtime: RuntimeConfig
) -> None:
    score_vectors(out, config, vectors, read_tensors(folder(head), HEAD_FILE), "selection", root(), runtime)


@stage("score_report", returns=ReportArtifact, label=lambda config, vectors: f"{config.task.name} {vectors.kind}")
def score_report(out: Path, config: ScoringConfig, vectors: VectorSet, head: Artifact, *, runtime: RuntimeConfig) -> None:
    score_vectors(out, config, vectors, read_tensors(folder(head), HEAD_FILE), "report", root(), runtime)


@stage("report", label=lambda config: config.name)
def report(out: Path, config: ExperimentConfig, inputs: ReportInputs) -> None:
    write_report(out, config, inputs, root())
