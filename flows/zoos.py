"""Flows around zoos: share the harvests of an experiment, and train a generator on adapters made elsewhere."""

from __future__ import annotations

from pathlib import Path

import torch
from prefect import flow

from cpdiff_core.artifacts import check_out, read_json, read_tensors
from cpdiff_core.cards import BaseReference, GeneratorCard, TaskCard
from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.domains.base_models import FAMILIES, BaseModelConfig, resolve_base_model
from cpdiff_core.domains.glue.stacks import build_stack
from cpdiff_core.experiments import ExperimentConfig, resolve
from cpdiff_core.export import write_zoo_card
from cpdiff_core.lora.vectors import evenly_spaced
from cpdiff_core.lora.zoo import TaskHarvests, Zoo, load_checkpoints
from cpdiff_core.zoo_folder import ZooGeneratorConfig, base_name_of, find_zoo, shared_shape, write_zoo_task
from flows.steps import fit_heads, harvest, runs_of
from tasks import bundle_stages, stages
from tasks.stage import folder


@flow(name="import-zoo", persist_result=False)
def import_zoo(
    folders: list[str], descriptions: dict[str, str], base: str | None = None,
    config: ZooGeneratorConfig = ZooGeneratorConfig(), runtime: RuntimeConfig = RuntimeConfig(),
    num_references: int = 4,
) -> str:  # fmt: skip
    """Train a generator on PEFT folders made elsewhere and return the folder of the bundled generator.

    Args:
        folders: A folder per task with its adapters below it, or a folder of such.
        descriptions: What each task is, in words; without one the task's task.json must have it.
        base: The base model's name, folder or hub id, if the adapters do not say.
        config: How the generator is trained.
        runtime: Where and how fast. Nothing here changes the result.
        num_references: Training adapters per task that travel with the generator, to measure novelty against.
    """
    tasks = find_zoo([Path(folder) for folder in folders], descriptions)
    if config.condition.kind == "task_info" and (nameless := [t.card.name for t in tasks if not t.card.description]):
        raise UserError(
            f"task {nameless[0]!r}: has no description to condition on; give --describe {nameless[0]}='...', or write "
            "one into its task.json, or choose the condition one_hot in --settings"
        )
    model = resolve_base_model(BaseModelConfig(name=base or base_name_of(tasks)))
    lora, target_modules, layout = shared_shape(tasks, model)
    harvests = [bundle_stages.import_harvest(task, layout) for task in tasks]
    zoo = Zoo(
        tasks=tuple(TaskHarvests(task=t.card.name, runs=(run,)) for t, run in zip(tasks, harvests, strict=True)),
        num_checkpoints=min(len(task.adapters) for task in tasks),
    )
    names = tuple(task.card.name for task in tasks)
    conditions = bundle_stages.encode_descriptions(
        config.condition, names, tuple(task.card.description for task in tasks), runtime=runtime
    )
    normalizer = stages.fit_normalization(config.normalization, zoo)
    autoencoder = stages.fit_autoencoder(config.autoencoder, zoo, normalizer, config.seed, runtime=runtime)
    diffusion = stages.fit_diffusion(
        config.diffusion, config.condition, zoo, normalizer, autoencoder, conditions, config.seed, runtime=runtime
    )
    generator = stages.Generator(
        normalizer=normalizer, autoencoder=autoencoder, conditions=conditions, diffusion=diffusion
    )
    prompts = read_json(folder(conditions), "prompts.json")["generation"] or [None] * len(tasks)
    cards = tuple(
        task.card.model_copy(update={"prompt": prompt, "num_checkpoints": zoo.num_checkpoints})
        for task, prompt in zip(tasks, prompts, strict=True)
    )
    card = GeneratorCard(
        name=config.name, description="Trained on adapters made elsewhere; nothing was scored.", lora=lora,
        base=BaseReference.of(model), layout=layout, target_modules=target_modules, condition=config.condition,
        sampling=config.sampling, seed=config.seed, max_length=config.max_length, precision="fp32", tasks=cards,
        head="that of the last adapter of the task",
        settings=config.model_dump(mode="json", include={"normalization"}),
    )  # fmt: skip
    heads = tuple(
        bundle_stages.TaskHead(task=name, head=run if read_tensors(folder(run), stages.HEAD_FILE) else None)
        for name, run in zip(names, harvests, strict=True)
    )
    return str(folder(bundle_stages.bundle_generator(card, generator, heads, zoo, num_references)))


@flow(name="export-zoo", flow_run_name="zoo of {experiment.name}", persist_result=False)
def export_zoo(
    experiment: ExperimentConfig, out: str, num: int | None = None, runtime: RuntimeConfig = RuntimeConfig()
) -> str:
    """Write the harvested checkpoints of an experiment as PEFT folders with a data card, and return the folder.

    Args:
        experiment: Whose harvests; of several seeds the first.
        out: Folder to write to; must be empty.
        num: Checkpoints per run, evenly spaced over the last N; all N if none is given.
        runtime: Where and how fast.
    """
    target = Path(out)
    check_out(target)
    config = experiment.for_seed(0)
    resolved = resolve(config, Path(runtime.data_dir) if runtime.data_dir else None)
    (heads,) = fit_heads((resolved,), runtime)
    runs = runs_of(resolved)
    stages.harvest_together(runs, [heads[run.task.name] for run in runs], runtime)
    zoo = harvest(resolved, heads, runtime)
    layout = build_stack(resolved.base, config.lora, 2, config.fine_tune.precision, runtime).layout
    base = BaseReference.of(resolved.base, config.base_model.revision)
    cards = []
    for task, entry in zip(resolved.tasks, zoo.tasks, strict=True):
        rows = evenly_spaced(config.num_checkpoints, num or config.num_checkpoints)
        w_NK = torch.cat([load_checkpoints(folder(run), config.num_checkpoints)[list(rows)] for run in entry.runs])
        cards.append(TaskCard.of(task.task, num_checkpoints=len(w_NK)))
        write_zoo_task(
            target / task.name, cards[-1], w_NK, layout, config.lora, FAMILIES[resolved.base.family].target_modules,
            base=base.hub_id or base.name, revision=base.revision,
            head=read_tensors(folder(heads[task.name]), stages.HEAD_FILE),
        )  # fmt: skip
    write_zoo_card(target, config.name, base, config.lora, cards, config.model_dump(mode="json", include={"fine_tune"}))
    return out
