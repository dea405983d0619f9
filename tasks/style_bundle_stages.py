"""The cached stage that makes a style generator portable."""

from __future__ import annotations

from pathlib import Path

from cpdiff_core.artifacts import Artifact, read_json, read_tensors
from cpdiff_core.domains.style.base import Captions, StyleBase
from cpdiff_core.domains.style.denoising import ENCODED_FILE
from cpdiff_core.domains.style.encoding import CLASS_FILE
from cpdiff_core.generator.autoencoder import ParameterAutoencoder
from cpdiff_core.generator.diffusion import LatentDiffusion
from cpdiff_core.lora.vectors import evenly_spaced
from cpdiff_core.lora.zoo import Zoo
from cpdiff_core.reports.inputs import Generator
from cpdiff_core.style_bundle import StyleGenerator
from cpdiff_core.style_cards import StyleGeneratorCard
from cpdiff_core.style_export import write_style_generator_card
from tasks.stage import folder, root, stage
from tasks.stages import load_normalizer


@stage("bundle_style_generator", label=lambda card: card.name)
def bundle_style_generator(
    out: Path, card: StyleGeneratorCard, generator: Generator, base: StyleBase, photos: Artifact, zoo: Zoo, num_references: int
) -> None:
    """A folder that `style_bundle.StyleGenerator.load` reads. photos: encoded photographs, for the captions."""
    tensors = read_tensors(folder(generator.conditions), "conditions.safetensors")
    encoded = read_tensors(folder(photos), ENCODED_FILE)
    if tuple(read_json(folder(photos), CLASS_FILE)["classes"]) != card.classes:
        raise ValueError("the classes of the card must be those of the photographs")
    captions = Captions(encoded["states_PTE"], encoded["mask_PT"])
    references = {
        style: w_NK[list(evenly_spaced(len(w_NK), min(num_references, len(w_NK))))]
        for style, w_NK in zoo.load(root()).items()
    }
    made = StyleGenerator(
        card, load_normalizer(generator.normalizer), ParameterAutoencoder.load(folder(generator.autoencoder)),
        LatentDiffusion.load(folder(generator.diffusion)),
        {"y_QE": tensors["y_QE"], "y_mean_QE": tensors["y_QPE"].mean(1)}, captions, references, base.path(root()),
    )  # fmt: skip
    made.save(out)
    write_style_generator_card(out, card)
