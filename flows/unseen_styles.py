"""Leave one style out: a generator without it, its image as the condition, and what is compared with the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cpdiff_core.artifacts import Artifact, read_json, read_tensors
from cpdiff_core.domains.style.styles import ResolvedStyle
from cpdiff_core.domains.style.through_base import Objective
from cpdiff_core.evaluation.style_scores import StyleReportArtifact
from cpdiff_core.lora.zoo import VectorSet, Zoo
from cpdiff_core.unseen_styles import CONDITION_FILE, UnseenGenerated, UnseenInputs, UnseenStyle, nearest_style
from tasks import stages, style_stages, unseen_stages
from tasks.stage import folder

if TYPE_CHECKING:
    from flows.style import StylePipeline


def compare_left_out(pipeline: StylePipeline, zoo: Zoo, classifier: Artifact) -> Artifact | None:
    """The comparison on every left-out style; None if there is none."""
    config = pipeline.config
    if not config.left_out:
        return None
    styles = {style.name: style for style in pipeline.resolved.styles}

    def compared(name: str) -> Artifact:
        inputs = UnseenInputs(
            style=leave_out(pipeline, styles[name], zoo), classifier=classifier, splits=config.splits,
            image_size=pipeline.size, distance_name=config.features.distance_name, num_training_styles=len(styles) - 1,
        )  # fmt: skip
        return unseen_stages.compare_unseen_style(inputs)

    return unseen_stages.compare_unseen_styles(tuple(compared(name) for name in config.left_out))


def objective_names(objectives: Sequence[Objective]) -> list[str]:
    """What tables call each; numbered where a kind occurs several times, since arms are told apart by these names."""
    shown = [{"weights": "weights", "through_base": "through the base"}[objective.kind] for objective in objectives]
    return [f"{name} {shown[: i + 1].count(name)}" if shown.count(name) > 1 else name for i, name in enumerate(shown)]


def leave_out(pipeline: StylePipeline, style: ResolvedStyle, zoo: Zoo) -> UnseenStyle:
    """Every arm of one style, whose adapters, images and conditions no stage of its generators is given."""
    config, runtime, scoring = pipeline.config, pipeline.runtime, pipeline.scoring(style)
    kept = tuple(other for other in pipeline.resolved.styles if other.name != style.name)
    runs = {entry.task: entry.runs for entry in zoo.tasks}
    rest = zoo.model_copy(update={"tasks": tuple(entry for entry in zoo.tasks if entry.task != style.name)})
    condition = unseen_stages.encode_style_image(
        config.condition_features, style, config.splits, pipeline.size, config.seed, runtime=runtime
    )

    def report(vectors: VectorSet) -> StyleReportArtifact:
        return style_stages.score_style_report(scoring, vectors, runtime=runtime)

    def last_of(name: str) -> StyleReportArtifact:
        return report(VectorSet(kind="checkpoints", sources=runs[name][:1], num_checkpoints=1))

    def generated(generator: stages.Generator, shuffled: bool) -> StyleReportArtifact:
        candidates = unseen_stages.generate_unseen(
            config.sampling, generator, style.name, condition, shuffled, config.seed, runtime=runtime
        )
        return report(VectorSet(kind="candidates", sources=(candidates,)))

    made = []
    objectives = (config.objective, *config.compared_objectives)
    for objective, shown in zip(objectives, objective_names(objectives), strict=True):
        generator = pipeline.fit_generator(rest, kept, objective)
        made.append(
            UnseenGenerated(
                objective=shown, generated=generated(generator, False), shuffled=generated(generator, True),
            )
        )  # fmt: skip
    names = read_json(folder(generator.conditions), "prompts.json")["tasks"]
    y_QPE = read_tensors(folder(generator.conditions), "conditions.safetensors")["y_QPE"]
    nearest, similarity = nearest_style(read_tensors(folder(condition), CONDITION_FILE)["y_1E"][0], y_QPE)
    return UnseenStyle(
        style=style, real=pipeline.real[style.name], condition=condition, nearest=names[nearest], similarity=similarity,
        no_lora=report(VectorSet(kind="zeros")), nearest_lora=last_of(names[nearest]), fine_tuned=last_of(style.name),
        generators=tuple(made),
    )  # fmt: skip
