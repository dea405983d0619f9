"""Cached stages around portable generators: bundling a fitted one, and taking in adapters made elsewhere."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from cpdiff_core import bundle
from cpdiff_core.artifacts import Artifact, read_tensors
from cpdiff_core.cards import GeneratorCard
from cpdiff_core.config import Config
from cpdiff_core.export import write_generator_card
from cpdiff_core.generator.autoencoder import ParameterAutoencoder
from cpdiff_core.generator.diffusion import LatentDiffusion
from cpdiff_core.lora.vectors import evenly_spaced
from cpdiff_core.lora.zoo import Zoo
from tasks.stage import folder, root, stage
from tasks.stages import HEAD_FILE, Generator, load_normalizer


class TaskHead(Config):
    """The head of one task; None where adapters came without."""

    task: str
    head: Artifact | None = Field(description="Artifact of the stage that made it.")


@stage("bundle_generator", label=lambda card: card.name)
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
    fitted = bundle.Generator(
        card, load_normalizer(generator.normalizer), ParameterAutoencoder.load(folder(generator.autoencoder)),
        LatentDiffusion.load(folder(generator.diffusion)),
        read_tensors(folder(generator.conditions), "conditions.safetensors")["y_QE"],
        fitted_heads, references,
    )  # fmt: skip
    fitted.save(out)
    write_generator_card(out, card)
