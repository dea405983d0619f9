"""Cached stages around portable generators: bundling a fitted one, and taking in adapters made elsewhere."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from cpdiff_core import bundle
from cpdiff_core.artifacts import Artifact, provenance_of, read_tensors, write_json, write_tensors
from cpdiff_core.cards import GeneratorCard
from cpdiff_core.config import Config, RuntimeConfig
from cpdiff_core.domains.glue.stacks import device_of
from cpdiff_core.export import write_generator_card
from cpdiff_core.generator.autoencoder import ParameterAutoencoder
from cpdiff_core.generator.conditions import (
    LearnedCondition,
    OneHotCondition,
    TaskInfoCondition,
    build_prompt,
    encode_texts,
    one_hot_conditions,
)
from cpdiff_core.generator.diffusion import LatentDiffusion
from cpdiff_core.lora.layout import ParameterLayout
from cpdiff_core.lora.vectors import evenly_spaced
from cpdiff_core.lora.zoo import HARVEST_FILE, Zoo
from cpdiff_core.zoo_folder import ZooTask, load_zoo_task
from tasks.stage import folder, root, stage
from tasks.stages import HEAD_FILE, Generator, load_normalizer


class TaskHead(Config):
    """The head of one task; None where adapters came without."""

    task: str
    head: Artifact | None = Field(description="Artifact of the stage that made it.")


@stage("bundle_generator", 2, label=lambda card: card.name)
def bundle_generator(
    out: Path, card: GeneratorCard, generator: Generator, heads: tuple[TaskHead, ...], zoo: Zoo, num_references: int
) -> None:
    """A folder that `bundle.Generator.load` reads, with `num_references` training adapters per task to compare with."""
    references = {
        task: w_NK[list(evenly_spaced(len(w_NK), min(num_references, len(w_NK))))]
        for task, w_NK in zoo.load(root()).items()
    }
    fitted_heads = {
        entry.task: read_tensors(folder(entry.head), HEAD_FILE) for entry in heads if entry.head is not None
    }
    made = provenance_of([generator.diffusion], root()).get(generator.diffusion, {})
    card = card.model_copy(
        update={"made": {key: str(made[key]) for key in ("device", "commit", "finished") if made.get(key)}}
    )
    fitted = bundle.Generator(
        card, load_normalizer(generator.normalizer), ParameterAutoencoder.load(folder(generator.autoencoder)),
        LatentDiffusion.load(folder(generator.diffusion)),
        read_tensors(folder(generator.conditions), "conditions.safetensors")["y_QE"],
        fitted_heads, references,
    )  # fmt: skip
    fitted.save(out)
    write_generator_card(out, card)


@stage("import_harvest", label=lambda task: task.card.name)
def import_harvest(out: Path, task: ZooTask, layout: ParameterLayout) -> None:
    """Adapters made elsewhere as a harvest, and the head that came with the last of them."""
    w_NK, head = load_zoo_task(task, layout)
    write_tensors(out / HARVEST_FILE, {"w_NK": w_NK})
    write_tensors(out / HEAD_FILE, head)


@stage("encode_descriptions")
def encode_descriptions(
    out: Path, condition: TaskInfoCondition | OneHotCondition | LearnedCondition, tasks: tuple[str, ...],
    descriptions: tuple[str, ...], *, runtime: RuntimeConfig,
) -> None:  # fmt: skip
    """The conditions of tasks that have a description and no data; files as `encode_conditions` writes them."""
    prompts: list[str] = []
    y_QPE = one_hot_conditions(len(tasks))
    if isinstance(condition, TaskInfoCondition):
        prompts = [build_prompt(condition.encoder, text, ()) for text in descriptions]
        y_QPE = encode_texts(condition.encoder, prompts, device_of(runtime))[:, None]
    write_tensors(out / "conditions.safetensors", {"y_QPE": y_QPE, "y_QE": y_QPE[:, 0]})
    write_json(
        out / "prompts.json", {"tasks": list(tasks), "training": [[text] for text in prompts], "generation": prompts}
    )
