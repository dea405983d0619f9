"""Generated adapters as PEFT folders with model cards, merged models, and the card of a generator.

A card says how the adapter was made, what it scored and on what, how far it lies from the nearest training adapter,
and whose licences count. Uploading is left to the reader: the card ends with the command, nothing here runs it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import Field

from cpdiff_core.artifacts import give_usual_rights, write_json
from cpdiff_core.bundle import Generator
from cpdiff_core.cards import ArmScore, BaseReference, GeneratorCard, TaskCard
from cpdiff_core.config import Config
from cpdiff_core.domains.base_models import TOKENIZER_FILES, BaseModel, build_classifier
from cpdiff_core.lora.layout import LoraSpec, ParameterLayout
from cpdiff_core.lora.peft_folder import write_adapter
from cpdiff_core.lora.vectors import min_l2, min_l2_product

CARD = "README.md"
FACTS = "cpdiff.json"

BASE_LICENCES = {
    "sentence-transformers/all-MiniLM-L6-v2": "apache-2.0", "google-bert/bert-base-uncased": "apache-2.0",
    "FacebookAI/roberta-base": "mit", "microsoft/deberta-base": "mit", "openai-community/gpt2": "mit",
}  # fmt: skip
GLUE_TERMS = {
    "sst2": "SST-2 (Socher et al. 2013; text from film reviews): no licence stated by GLUE, research use",
    "rte": "RTE (PASCAL challenges 1, 2, 3, 5): no licence stated by GLUE, research use",
    "mrpc": "MRPC (Dolan & Brockett 2005): Microsoft Research's own download terms",
    "cola": "CoLA (Warstadt et al. 2019; sentences quoted from linguistics literature): research use",
    "qnli": "QNLI (built by GLUE from SQuAD 1.1, which is CC BY-SA 4.0)",
    "stsb": "STS-B (Cer et al. 2017; mixed terms of its sources): research use",
}
"""As the notes beside the data have them, from general knowledge, not re-checked with the rights holders."""


class NearestAdapter(Config):
    """The nearest of the training adapters that the generator carries; there may be nearer ones that it does not."""

    task: str
    distance_product: float = Field(description="Frobenius distance on dW = scaling * BA.")
    distance_factors: float = Field(description="Distance of the raw vectors.")
    norm_product: float = Field(description="Norm of the adapter's own dW, to read the distances by.")
    compared_with: int


class AdapterFacts(Config):
    """What is known of one generated adapter; written beside it as JSON and told in its card."""

    generator: str
    base: BaseReference
    lora: LoraSpec
    target_modules: tuple[str, ...]
    task: str
    description: str | None
    labels: tuple[str, ...] | None
    text_columns: tuple[str, ...]
    max_length: int
    unseen_condition: bool
    prompt: str | None = Field(description="The condition text; None where the condition is no text.")
    statistics: str = Field(description="Whose normalisation statistics it carries.")
    head: str
    index: int
    num: int
    seed: int
    chosen_by: str | None = Field(None, description="How this candidate was chosen among `num`; None: it was not.")
    scores: tuple[ArmScore, ...] = Field((), description="What was measured, each with the data named in `arm`.")
    verdict: str | None = None
    nearest: NearestAdapter | None = None
    data_terms: str = "unknown"
    precision: str
    rounded: bool = Field(False, description="Scores are of the run's own adapter, this one of its generator in half precision.")


def nearest_adapter(generator: Generator, w_MK: torch.Tensor) -> list[NearestAdapter]:
    """For every row of w_MK the nearest training adapter that the generator carries, by distance on dW."""
    return nearest_of(w_MK, generator.references, generator.card.layout, generator.card.lora.scaling)


def nearest_of(
    w_MK: torch.Tensor, references: Mapping[str, torch.Tensor], layout: ParameterLayout, scaling: float
) -> list[NearestAdapter]:
    """For every row of w_MK the nearest of some adapters, task -> w_RK, by distance on dW."""
    tasks = list(references)
    product_QM = torch.stack([min_l2_product(w_MK, references[task], layout.factors, scaling) for task in tasks])
    raw_QM = torch.stack([min_l2(w_MK, references[task]) for task in tasks])
    norm_M = min_l2_product(w_MK, torch.zeros_like(w_MK[:1]), layout.factors, scaling)
    total = sum(len(w_RK) for w_RK in references.values())
    return [
        NearestAdapter(
            task=tasks[q], distance_product=float(product_QM[q, m]), distance_factors=float(raw_QM[q, m]),
            norm_product=float(norm_M[m]), compared_with=total,
        )
        for m, q in enumerate(product_QM.argmin(0).tolist())
    ]  # fmt: skip


def write_peft_folder(
    folder: Path, w_K: torch.Tensor, layout: ParameterLayout, facts: AdapterFacts,
    head: Mapping[str, torch.Tensor] | None,
) -> None:  # fmt: skip
    """Write one adapter: PEFT's two files, the facts as JSON, the card."""
    write_adapter(
        folder, w_K, layout, facts.lora, facts.target_modules, head=head,
        base=facts.base.hub_id or facts.base.name, revision=facts.base.revision,
    )  # fmt: skip
    write_json(folder / FACTS, facts.model_dump(mode="json"))
    (folder / CARD).write_text(adapter_card(facts, with_head=head is not None), encoding="utf-8")


def write_merged(out: Path, adapter: Path, base: BaseModel, labels: tuple[str, ...] | None) -> None:
    """Write the base with the adapter of a PEFT folder merged in: a plain transformers classifier, with tokenizer."""
    from peft import PeftModel  # seconds, which cached runs are spared
    from transformers.utils import logging

    model, _ = build_classifier(base, 1 if labels is None else len(labels))
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own, about names that we do not use
        merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # type: ignore[arg-type]
        merged.config.problem_type = "regression" if labels is None else "single_label_classification"
        if labels is not None:
            merged.config.id2label = dict(enumerate(labels))
            merged.config.label2id = {label: number for number, label in enumerate(labels)}
        merged.save_pretrained(str(out))
    give_usual_rights(out)
    logging.enable_progress_bar()
    for pattern in TOKENIZER_FILES:
        for path in base.folder.glob(pattern):
            shutil.copy(path, out / path.name)
    facts = AdapterFacts.model_validate_json((adapter / FACTS).read_bytes())
    (out / CARD).write_text(adapter_card(facts, with_head=True, merged=True), encoding="utf-8")


def adapter_card(facts: AdapterFacts, with_head: bool, merged: bool = False) -> str:
    """README.md in the hub's form, metadata in YAML, then prose: of the adapter, or of its base with it merged in."""
    base = facts.base.hub_id or facts.base.name
    results = [
        EvalResult(
            task_type="text-classification", dataset_type=facts.task, dataset_name=facts.task, metric_type=score.metric,
            metric_value=round(score.estimate, 2), metric_name=score.arm,
        )
        for score in facts.scores[:1]  # the others are what it is compared with
    ]  # fmt: skip
    name = f"{facts.generator} {facts.task} {facts.index}"
    more: dict[str, Any] = {"model_name": name, "eval_results": results} if results else {}
    head = metadata(base, "transformers" if merged else "peft", pipeline_tag="text-classification", **more)
    return render(
        "adapter.md.j2", facts=facts, with_head=with_head, base=base, metadata=head, merged=merged,
        arguments=", ".join(f"\"{column} ...\"" for column in facts.text_columns or ("text",)),
        prompt=json.dumps(facts.prompt, ensure_ascii=False), licence=BASE_LICENCES.get(base, "see its own card"),
        num_labels=len(facts.labels or ("regression",)),
        revision=f', revision="{facts.base.revision}"' if facts.base.revision else "",
    )  # fmt: skip


def write_generator_card(folder: Path, card: GeneratorCard) -> None:
    """README.md of a generator folder."""
    base = card.base.hub_id or card.base.name
    text = render(
        "generator.md.j2", card=card, base=base, metadata=metadata(base, "cpdiff"),
        licence=BASE_LICENCES.get(base, "see its own card"), terms={task.name: data_terms(task) for task in card.tasks},
    )  # fmt: skip
    (folder / CARD).write_text(text, encoding="utf-8")


def write_zoo_card(
    folder: Path, name: str, base: BaseReference, lora: LoraSpec, tasks: Sequence[TaskCard], settings: Mapping[str, Any]
) -> None:
    """README.md of a zoo: a data card."""
    text = render(
        "zoo.md.j2", name=name, base=base.hub_id or base.name, lora=lora, tasks=tasks, settings=settings,
        licence=BASE_LICENCES.get(base.hub_id or base.name, "see its own card"),
        terms={task.name: data_terms(task) for task in tasks},
    )  # fmt: skip
    (folder / CARD).write_text(text, encoding="utf-8")


def write_composed_card(
    folder: Path, how: str, base: str, lora: LoraSpec, parents: Sequence[tuple[str, float, str]], with_head: bool,
    same_heads: bool, pipeline_tag: str = "text-classification",
) -> None:  # fmt: skip
    """README.md of an adapter composed of others. parents: (name, weight, sha256) of each."""
    text = render(
        "composed.md.j2", how=how, base=base, lora=lora, parents=parents, with_head=with_head, same_heads=same_heads,
        metadata=metadata(base, "peft", pipeline_tag=pipeline_tag),
    )  # fmt: skip
    (folder / CARD).write_text(text, encoding="utf-8")


def data_terms(task: TaskCard) -> str:
    """The terms of a task's training data, as far as they are known."""
    words = task.data.split()
    known = [name for name in words[1:2] if name in GLUE_TERMS and words[0] in ("GLUE", "nyu-mll/glue")]
    return GLUE_TERMS[known[0]] if known else f"{task.data}, under its own terms"


def metadata(base: str, library: str, tags: Sequence[str] = (), **more: Any) -> str:
    """The hub's metadata of a card, YAML."""
    card = ModelCardData(
        base_model=base, library_name=library, license="other", license_name="see-card",
        tags=["lora", "peft", "parameter-generation", "cpdiff", *tags], **more,
    )  # fmt: skip
    return card.to_yaml().rstrip()


def render(template: str, **values: Any) -> str:
    """A card from its template."""
    environment = Environment(
        loader=PackageLoader("cpdiff_core", "card_templates"), undefined=StrictUndefined, trim_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip  # Markdown, read as text: no page is made of it here
    return environment.get_template(template).render(**values)
