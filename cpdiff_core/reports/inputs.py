"""What a report is made from: for every seed the zoo, the generator and the scored arms of every task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel as PydanticModel
from pydantic import Field

from cpdiff_core.artifacts import Artifact
from cpdiff_core.config import Config
from cpdiff_core.domains.base_models import BaseModel
from cpdiff_core.evaluation.arms import TaskArms
from cpdiff_core.lora.zoo import Zoo


class Generator(Config):
    """The fitted generator's parts, each an artifact."""

    normalizer: Artifact
    autoencoder: Artifact
    conditions: Artifact
    diffusion: Artifact


class SeedInputs(Config):
    """One seed of an experiment."""

    seed: int
    zoo: Zoo
    generator: Generator
    arms: tuple[TaskArms, ...]
    geometry: Artifact | None = None
    trajectory: Artifact | None = None


class ReportInputs(Config):
    """All seeds of an experiment."""

    base: BaseModel
    seeds: tuple[SeedInputs, ...] = Field(min_length=1)


def artifacts_in(value: Any) -> Iterator[Artifact]:
    """Every artifact that a value holds, at any depth, in order and with repetitions."""
    if isinstance(value, Artifact):
        yield value
    elif isinstance(value, PydanticModel):
        for name in type(value).model_fields:
            yield from artifacts_in(getattr(value, name))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from artifacts_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from artifacts_in(item)
