"""The flow that bundles the generator of a style experiment: a portable folder with what its adapters score."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from prefect import flow

from cpdiff_core.artifacts import read_json, read_table
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.style.base import TARGET_MODULES, PixArtBase, PretrainedBase
from cpdiff_core.domains.style.encoding import CLASS_FILE
from cpdiff_core.domains.style.sampling import draw_prompts
from cpdiff_core.domains.style.stack import initial_adapter
from cpdiff_core.domains.style.styles import Style, SyntheticImages
from cpdiff_core.style_cards import StyleBaseReference, StyleCard, StyleGeneratorCard, StyleScore
from cpdiff_core.style_experiments import StyleExperimentConfig, resolve_styles
from flows.style import StylePipeline, run_style_experiment, style_base
from tasks.stage import folder, root
from tasks.style_bundle_stages import bundle_style_generator


@flow(name="bundle-style-generator", flow_run_name="generator of {experiment.name}", persist_result=False)
def bundle_style_experiment(
    experiment: StyleExperimentConfig, runtime: RuntimeConfig = RuntimeConfig(), num_references: int = 1
) -> str:
    """Bundle the generator of a style experiment and return its folder. What has been computed is not computed again.

    Args:
        experiment: Whose generator; the one of its objective, trained on all of its styles.
        runtime: Where and how fast. Nothing here changes the result.
        num_references: Training adapters per style that travel with the generator, to measure novelty against.
    """
    report = Path(run_style_experiment(experiment, runtime)).parent
    scores = read_table(report, "results.csv")
    resolved = resolve_styles(experiment, Path(runtime.data_dir) if runtime.data_dir else None)
    pipeline = StylePipeline(resolved, style_base(resolved, runtime), runtime)
    zoo = pipeline.harvest()
    generator = pipeline.fit_generator(zoo, resolved.styles, experiment.objective)
    photos = pipeline.encoded[experiment.photos.name]
    classes = read_json(folder(photos), CLASS_FILE)
    card = StyleGeneratorCard(
        name=experiment.name, description=experiment.description,
        base=StyleBaseReference.of(pipeline.base, root(), _base_name(experiment), _revision(experiment)), lora=experiment.lora,
        layout=initial_adapter(pipeline.base, root(), experiment.lora, 0)[1], target_modules=TARGET_MODULES,
        condition=experiment.condition, condition_features=experiment.condition_features, image_size=pipeline.size,
        objective=experiment.objective.kind, sampling=experiment.sampling, images=experiment.images,
        features=experiment.features, precision=experiment.fine_tune.precision, seed=experiment.seed,
        classes=tuple(classes["classes"]), prompts=tuple(draw_prompts(classes["of_images"], experiment.images.num_images)),
        styles=tuple(_style_card(style, experiment, zoo.num_checkpoints, scores) for style in experiment.styles),
        settings=experiment.model_dump(mode="json", include={"fine_tune", "splits", "num_runs", "normalization", "objective"}),
    )  # fmt: skip
    return str(folder(bundle_style_generator(card, generator, pipeline.base, photos, zoo, num_references)))


def _base_name(experiment: StyleExperimentConfig) -> str:
    if isinstance(experiment.base, PixArtBase):
        return experiment.base.name
    if isinstance(experiment.base, PretrainedBase):
        return f"cpdiff-tiny-pixart-{experiment.base.size.sample_size}px"
    return "cpdiff-tiny-pixart-embedded"


def _revision(experiment: StyleExperimentConfig) -> str | None:
    return experiment.base.revision if isinstance(experiment.base, PixArtBase) else None


def _style_card(
    style: Style, experiment: StyleExperimentConfig, num_checkpoints: int, results: pd.DataFrame
) -> StyleCard:
    scores = [
        StyleScore(
            arm=row["arm"], metric=row["metric"], estimate=row["estimate"], std=row["std"], num_images=row["images"],
            num_real=row["real"],
        )
        for row in results[results["style"] == style.name].to_dict("records")
    ]  # fmt: skip
    return StyleCard(
        name=style.name, data=_origin(style), num_checkpoints=num_checkpoints * experiment.num_runs, scores=tuple(scores)
    )


def _origin(style: Style) -> str:
    """Where a style's images came from, in words and without a path."""
    source = style.source
    if isinstance(source, SyntheticImages):
        return f"{_origin(Style(name=source.split_as, source=source.photos))} (effects: {', '.join(source.effects)})"
    if source.kind == "excerpt":
        return f"the excerpt of {source.name} inside cpdiff"
    where = source.table if source.kind == "metadata" else source.path
    return f"local images ({Path(where).name})"
