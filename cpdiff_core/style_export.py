"""Generated style adapters as PEFT folders with model cards, merged transformers, and the card of a style generator."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from cpdiff_core.artifacts import give_usual_rights, write_json
from cpdiff_core.config import Config
from cpdiff_core.domains.style.base import StyleBase, load_transformer
from cpdiff_core.export import CARD, FACTS, NearestAdapter, metadata, nearest_of, render
from cpdiff_core.lora.layout import LoraSpec, ParameterLayout
from cpdiff_core.lora.peft_folder import write_adapter
from cpdiff_core.style_bundle import StyleGenerator
from cpdiff_core.style_cards import StyleBaseReference, StyleGeneratorCard, StyleScore

PIXART_LICENCE = "CreativeML Open RAIL++-M, as its own card says"
TINY_LICENCE = "trained from scratch by cpdiff on photographs, under the terms of those"
_TRANSFORMER = "transformer"


class StyleAdapterFacts(Config):
    """What is known of one generated style adapter; written beside it as JSON and told in its card."""

    generator: str
    objective: str
    base: StyleBaseReference
    lora: LoraSpec
    target_modules: tuple[str, ...]
    style: str | None = Field(description="The training style it is for; None: a style never seen, from an image.")
    image: str | None = Field(description="Name of the style image's file.")
    image_sha256: str | None
    nearest_style: str
    similarity: float = Field(description="Cosine of the condition's features to that style's, both centred.")
    statistics: str
    index: int
    num: int
    seed: int
    chosen_by: str | None = None
    scores: tuple[StyleScore, ...] = Field((), description="What was measured for this request.")
    run_scores: tuple[StyleScore, ...] = Field((), description="Of the training style's arms, in the generator's run.")
    nearest: NearestAdapter | None = None
    data_terms: str


def nearest_style_adapters(generator: StyleGenerator, w_MK: torch.Tensor) -> list[NearestAdapter]:
    """For every row of w_MK the nearest training adapter that the generator carries, by distance on dW."""
    return nearest_of(w_MK, generator.references, generator.card.layout, generator.card.lora.scaling)


def write_style_adapter(folder: Path, w_K: torch.Tensor, layout: ParameterLayout, facts: StyleAdapterFacts) -> None:
    """Write one adapter: PEFT's two files, the facts as JSON, the card."""
    write_adapter(
        folder, w_K, layout, facts.lora, facts.target_modules, base=facts.base.name, revision=facts.base.revision
    )
    write_json(folder / FACTS, facts.model_dump(mode="json"))
    title = f"{facts.generator} {facts.style or facts.image} {facts.index}"
    text = render(
        "style_adapter.md.j2", facts=facts, title=title, licence=_licence(facts.base), tiny=facts.base.kind == "tiny",
        metadata=metadata(facts.base.name, "peft", tags=("style-transfer", "pixart"), pipeline_tag="text-to-image"),
    )  # fmt: skip
    (folder / CARD).write_text(text, encoding="utf-8")


def write_plain_base(out: Path, base: StyleBase, root: Path) -> None:
    """A tiny base as diffusers keeps models, so that its adapters can be used without cpdiff."""
    load_transformer(base, root).save_pretrained(str(out))  # type: ignore[operator]
    give_usual_rights(out)


def write_merged_transformer(out: Path, adapter: Path, base: StyleBase, root: Path) -> None:
    """Write the transformer with the adapter of a PEFT folder merged in, as diffusers keeps it below `transformer`."""
    import copy

    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = PeftModel.from_pretrained(copy.deepcopy(load_transformer(base, root)), str(adapter))  # type: ignore[arg-type]
    merged: Any = adapted.merge_and_unload()
    merged.save_pretrained(str(out / _TRANSFORMER))
    give_usual_rights(out / _TRANSFORMER)
    (out / CARD).write_text((adapter / CARD).read_text(encoding="utf-8"), encoding="utf-8")


def write_style_generator_card(folder: Path, card: StyleGeneratorCard) -> None:
    """README.md of a style generator's folder."""
    text = render(
        "style_generator.md.j2", card=card, licence=_licence(card.base),
        metadata=metadata(card.base.name, "cpdiff", tags=("style-transfer", "pixart")),
    )  # fmt: skip
    (folder / CARD).write_text(text, encoding="utf-8")


def _licence(base: StyleBaseReference) -> str:
    return TINY_LICENCE if base.kind == "tiny" else PIXART_LICENCE
