"""Style transfer on one screen: the same method as `pipeline.py`, with images in the place of texts."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from cpdiff_core.artifacts import Artifact, read_tensors
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.style.base import PretrainedBase, StyleBase, spec_of
from cpdiff_core.domains.style.encoding import FEATURE_FILE, SPLITS
from cpdiff_core.domains.style.fine_tuning import StyleHarvestConfig
from cpdiff_core.domains.style.styles import STYLES, ResolvedStyle
from cpdiff_core.domains.style.through_base import Objective, ThroughBaseObjective
from cpdiff_core.evaluation.selection import select
from cpdiff_core.evaluation.style_scores import (
    StyleReportArtifact,
    StyleScoringConfig,
    check_real,
    load_style_selection,
)
from cpdiff_core.lora.vectors import evenly_spaced
from cpdiff_core.lora.zoo import TaskHarvests, VectorSet, Zoo
from cpdiff_core.reports.style_tables import StyleArms, StyleReportInputs
from cpdiff_core.style_experiments import (
    QUICKSTART_STYLE,
    ResolvedStyleExperiment,
    StyleExperimentConfig,
    resolve_styles,
)
from flows.unseen_styles import compare_left_out
from tasks import stages, style_stages, unseen_stages
from tasks.prefect_artifacts import publish
from tasks.stage import folder, root

NUM_TRAJECTORIES = 5
"""Noises whose way to the weights is drawn (paper: five)."""


@flow(name="run-style-experiment", flow_run_name="{experiment.name}", persist_result=False)
def run_style_experiment(experiment: StyleExperimentConfig = QUICKSTART_STYLE, runtime: RuntimeConfig = RuntimeConfig()) -> str:
    """Run one style experiment and return the path of its report.

    Args:
        experiment: What is computed. Every field changes the result and so the cache key.
        runtime: Where and how fast. Nothing here changes the result.
    """
    resolved = resolve_styles(experiment, Path(runtime.data_dir) if runtime.data_dir else None)
    pipeline = StylePipeline(resolved, style_base(resolved, runtime), runtime)
    zoo = pipeline.harvest()
    generator = pipeline.fit_generator(zoo, resolved.styles, experiment.objective)
    arms = tuple(pipeline.score(style, zoo, generator) for style in pipeline.scored)
    report = folder(style_stages.style_report(experiment, pipeline.report_inputs(zoo, generator, arms)))
    publish(experiment.name, report)
    return str(report / "report.html")


def style_base(resolved: ResolvedStyleExperiment, runtime: RuntimeConfig) -> StyleBase:
    """The frozen image model: found, or pretrained on photographs by a stage."""
    config = resolved.config
    if resolved.base is not None:
        return resolved.base
    assert isinstance(config.base, PretrainedBase)
    artifact = style_stages.pretrain_style_base(config.base, resolved.photos, config.splits, config.seed, runtime=runtime)
    return StyleBase(kind="tiny", artifact=artifact)


@flow(name="measure-style-base", persist_result=False)
def measure_style_base(
    config: PretrainedBase, guidance_scales: tuple[float, ...], runtime: RuntimeConfig = RuntimeConfig()
) -> str:
    """Pretrain a base, choose the guidance on photographs kept for choosing, measure it on others; the folder of it."""
    experiment = StyleExperimentConfig(name="style-base", base=config, styles=(STYLES["sketch"],))
    resolved = resolve_styles(experiment, Path(runtime.data_dir) if runtime.data_dir else None)
    resolved = resolved.model_copy(update={"styles": ()})
    pipeline = StylePipeline(resolved, style_base(resolved, runtime), runtime)
    scoring, zeros = pipeline.scoring(resolved.photos), VectorSet(kind="zeros")

    def at(scale: float) -> StyleScoringConfig:
        images = scoring.images.model_copy(update={"guidance_scale": scale, "num_images": 512})
        return scoring.model_copy(update={"images": images})

    def distance(scale: float) -> float:
        scores = style_stages.score_style_selection(at(scale), zeros, runtime=runtime)
        score = load_style_selection(scores, root(), resolved.photos.name, "kid").scores[0]
        return float("inf") if score is None else -score

    chosen = min(guidance_scales, key=distance)
    samples = style_stages.score_style_report(at(chosen), zeros, runtime=runtime)
    quality = style_stages.style_base_quality(
        pipeline.base, resolved.photos, experiment.splits, pipeline.size, pipeline.real[resolved.photos.name], samples,
        chosen,
    )  # fmt: skip
    return str(folder(quality))


class StylePipeline:
    """The stages of one experiment on one base. Encodings and real features are shared by all steps."""

    def __init__(self, resolved: ResolvedStyleExperiment, base: StyleBase, runtime: RuntimeConfig) -> None:
        self.resolved, self.config, self.base, self.runtime = resolved, resolved.config, base, runtime
        self.size = spec_of(base, root()).image_size
        self.scored = tuple(style for style in resolved.styles if style.name in self.config.scored_names)
        every, splits = (*resolved.styles, resolved.photos), self.config.splits
        self.encoded = {s.name: style_stages.encode_style(base, s, splits, runtime=runtime) for s in every}
        measured = {*self.config.scored_names, *self.config.left_out, resolved.photos.name}
        self.real = {
            s.name: style_stages.style_features(self.config.features, s, splits, self.size, runtime=runtime)
            for s in every if s.name in measured
        }  # fmt: skip
        for name, artifact in self.real.items():  # known here, and missed only after everything has been trained
            needed = [split for split in SPLITS if split != "selection" or name in self.config.scored_names]
            check_real(read_tensors(folder(artifact), FEATURE_FILE), needed, name)

    def harvest(self) -> Zoo:  # Sec. 4.2
        """The last checkpoints of every style. Missing runs train together, each is cached alone."""
        config, runtime = self.config, self.runtime
        runs = {
            style.name: [
                StyleHarvestConfig(
                    base=self.base, style=style.name, encoded=self.encoded[style.name], lora=config.lora,
                    fine_tune=config.fine_tune, run=run,
                )
                for run in range(config.num_runs)
            ]
            for style in self.resolved.styles
        }  # fmt: skip
        style_stages.harvest_styles_together([run for each in runs.values() for run in each], runtime)
        done = {name: [style_stages.harvest_style(run, runtime=runtime) for run in each] for name, each in runs.items()}
        tasks = tuple(TaskHarvests(task=name, runs=tuple(artifacts)) for name, artifacts in done.items())
        return Zoo(tasks=tasks, num_checkpoints=config.num_checkpoints)

    def fit_generator(
        self, zoo: Zoo, styles: tuple[ResolvedStyle, ...], objective: Objective
    ) -> stages.Generator:  # Sec. 3.2-3.3, Eq. 6-8
        """The text pipeline's own stages; only the conditions are made from images. styles: those of the zoo."""
        config, runtime = self.config, self.runtime
        normalizer = stages.fit_normalization(config.normalization, zoo)
        autoencoder = stages.fit_autoencoder(config.autoencoder, zoo, normalizer, config.seed, runtime=runtime)
        conditions = style_stages.encode_style_conditions(
            tuple(style.name for style in styles), tuple(self.condition_of(style) for style in styles)
        )
        if isinstance(objective, ThroughBaseObjective):
            images = unseen_stages.TrainingImages(
                base=self.base, lora=config.lora, precision=config.fine_tune.precision,
                styles=tuple(style.name for style in styles), encoded=tuple(self.encoded[style.name] for style in styles),
            )  # fmt: skip
            diffusion = autoencoder = unseen_stages.fit_through_base(
                objective, config.diffusion, config.condition, images, normalizer, autoencoder, conditions, config.seed,
                runtime=runtime,
            )  # fmt: skip
        else:
            diffusion = stages.fit_diffusion(
                config.diffusion, config.condition, zoo, normalizer, autoencoder, conditions, config.seed, runtime=runtime
            )
        return stages.Generator(normalizer=normalizer, autoencoder=autoencoder, conditions=conditions, diffusion=diffusion)

    def condition_of(self, style: ResolvedStyle) -> Artifact:
        """One style's conditions: computed once, whichever styles a generator is trained on."""
        config = self.config
        return style_stages.encode_style_condition(
            config.condition, config.condition_features, style, config.splits, self.size, config.seed, runtime=self.runtime
        )

    def scoring(self, style: ResolvedStyle) -> StyleScoringConfig:
        config = self.config
        return StyleScoringConfig(
            base=self.base, style=style.name, encoded=self.encoded[style.name], real=self.real[style.name],
            lora=config.lora, images=config.images, features=config.features, precision=config.fine_tune.precision,
        )  # fmt: skip

    def score(self, style: ResolvedStyle, zoo: Zoo, generator: stages.Generator) -> StyleArms:
        """Generate from one held-out image, choose on the selection split, score every arm on the report split."""
        config, scoring = self.config, self.scoring(style)
        runs = next(entry.runs for entry in zoo.tasks if entry.task == style.name)
        total = zoo.num_checkpoints * len(runs)
        candidates = stages.generate_candidates(config.sampling, generator, style.name, config.seed, runtime=self.runtime)
        original = VectorSet(
            kind="checkpoints", sources=runs, num_checkpoints=zoo.num_checkpoints,
            rows=evenly_spaced(total, min(total, config.scored_checkpoints or total)),
        )  # fmt: skip
        generated = VectorSet(kind="candidates", sources=(candidates,))
        soup = VectorSet(kind="soup", sources=runs, num_checkpoints=zoo.num_checkpoints)

        chose = tuple(style_stages.score_style_selection(scoring, v, runtime=self.runtime) for v in (original, generated))
        chosen = [select(load_style_selection(scores, root(), style.name, config.select_by)) for scores in chose]

        def report(vectors: VectorSet) -> StyleReportArtifact:
            return style_stages.score_style_report(scoring, vectors, runtime=self.runtime)

        return StyleArms(
            style=style.name, real=self.real[style.name], candidates=candidates, chosen_original=chosen[0],
            chosen_candidate=chosen[1], no_lora=report(VectorSet(kind="zeros")), original=report(original),
            soup=report(soup), generated=report(generated), selection=chose,
        )  # fmt: skip

    def report_inputs(self, zoo: Zoo, generator: stages.Generator, arms: tuple[StyleArms, ...]) -> StyleReportInputs:
        """With the base itself against photographs, and the classifier of styles."""
        photos, config = self.resolved.photos, self.config
        names = tuple(self.real)
        classifier = style_stages.fit_style_classifier(names, tuple(self.real[name] for name in names))
        samples = style_stages.score_style_report(self.scoring(photos), VectorSet(kind="zeros"), runtime=self.runtime)
        pair = [(self.scoring(style), arm.candidates) for style, arm in zip(self.scored, arms, strict=True)]
        interpolation = None
        if len(pair) > 1:  # one style has no other to go to
            (first, one), (second, other) = pair[0], pair[-1]
            interpolation = style_stages.interpolate_styles(
                first, second, (one, other), generator, config.sampling, config.seed, runtime=self.runtime
            )
        trajectories = {
            style.name: style_stages.style_trajectory(
                style.name, zoo, generator, config.sampling, NUM_TRAJECTORIES, config.seed, runtime=self.runtime
            )
            for style in self.scored
        }
        return StyleReportInputs(
            base=self.base, image_size=self.size, photos=photos, styles=self.scored, splits=config.splits,
            photo_real=self.real[photos.name], photo_samples=samples, classifier=classifier, interpolation=interpolation,
            trajectories=trajectories,
            harvests=tuple(run for entry in zoo.tasks for run in entry.runs), autoencoder=generator.autoencoder,
            diffusion=generator.diffusion, arms=arms, unseen=compare_left_out(self, zoo, classifier),
        )  # fmt: skip
