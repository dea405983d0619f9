"""What an experiment cost, against simply fine-tuning: time and energy of every stage behind it, from their provenance.

An artifact's own `config.json` names what it was made from, so what a result cost is the sum over everything behind it,
each artifact once, where and when it was computed. Nothing is estimated: a figure that one stage in the sum lacks is
None for the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from cpdiff_core.artifacts import Artifact, provenance_of, read_json
from cpdiff_core.config import Config

CONFIG_FILE = "config.json"


class Cost(Config):
    """Of some stages together."""

    num: int
    seconds: float
    gpu_seconds: float = Field(description="Wall-clock seconds of the stages that had a GPU.")
    processor_seconds: float | None = Field(description="None: not recorded for some.")
    joules: float | None = Field(description="Of the GPU boards. None: some stage had no counter, or none had a GPU.")
    idle_joules: float | None = Field(description="What the boards would have taken idle; None: not known for some.")

    @property
    def working_joules(self) -> float | None:
        """Above the power of the idle boards."""
        return self.joules - self.idle_joules if self.joules is not None and self.idle_joules is not None else None


class Spending(Config):
    """One line of the cost table: what was made, and what that took from nothing. times: over simply fine-tuning."""

    what: str
    cost: Cost
    times: float | None


class CostReport(Config):
    """The costs of one experiment. missing: stages behind it whose provenance is not on this machine."""

    lines: tuple[Spending, ...]
    stages: tuple[dict[str, Any], ...]
    missing: tuple[str, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(sorted({str(one["device"]) for one in self.stages if one.get("device")}))

    @property
    def commits(self) -> tuple[str, ...]:
        """As git abbreviates them."""
        found = {str(one["commit"]).partition("-") for one in self.stages if one.get("commit")}
        return tuple(sorted(f"{digits[:10]}{dash}{word}" for digits, dash, word in found))


def named_in(value: Any) -> Iterator[Artifact]:
    """Every artifact that plain JSON data names."""
    if isinstance(value, dict):
        if value.keys() == {"stage", "fingerprint"}:
            yield Artifact(**value)
        for item in value.values():
            yield from named_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from named_in(item)


def behind(artifacts: Iterable[Artifact], root: Path) -> list[Artifact]:
    """The artifacts and everything they were made from, each once. What is not on this machine ends its branch."""
    waiting, found = [_plain(artifact) for artifact in artifacts], dict[Artifact, None]()
    while waiting:
        artifact = waiting.pop()
        if artifact not in found:
            found[artifact] = None
            if (artifact.under(root) / CONFIG_FILE).is_file():
                waiting += named_in(read_json(artifact.under(root), CONFIG_FILE)["inputs"])
    return sorted(found, key=lambda artifact: (artifact.stage, artifact.fingerprint))


def _plain(artifact: Artifact) -> Artifact:
    """Without its subclass: equal artifacts are one."""
    return Artifact(stage=artifact.stage, fingerprint=artifact.fingerprint)


def total(made: Iterable[Mapping[str, Any]]) -> Cost:
    """The sum over the provenance of some stages."""
    every = list(made)
    on_gpu = [one for one in every if gpu_seconds(one) > 0]
    joules = _sum([one.get("gpu_joules") for one in on_gpu]) if on_gpu else None
    idle = [one.get("gpu_idle_watts") and one["gpu_idle_watts"] * gpu_seconds(one) for one in on_gpu]
    return Cost(
        num=len(every), seconds=sum(one["seconds"] for one in every), gpu_seconds=sum(map(gpu_seconds, every)),
        processor_seconds=_sum([one.get("processor_seconds") for one in every]), joules=joules,
        idle_joules=_sum(idle) if on_gpu else None,
    )  # fmt: skip


def gpu_seconds(made: Mapping[str, Any]) -> float:
    """Of one stage. Older records lack the figure, and have a peak of GPU memory where there was a GPU."""
    return float(made.get("gpu_seconds", made["seconds"] if made.get("peak_gpu_bytes") is not None else 0.0))


def _sum(values: list[float | None]) -> float | None:
    return None if None in values else float(sum(value for value in values if value is not None))


def cost_report(
    everything: Iterable[Artifact], fine_tuned: Iterable[Artifact], generated: Iterable[Artifact], labels: tuple[str, str],
    root: Path,
) -> CostReport:  # fmt: skip
    """everything: what the report is made from. fine_tuned: one adapter for every task. generated: the candidates and
    the scores that chose among them. labels: what to call the last two."""
    whole = behind(everything, root)
    made = provenance_of(whole, root)

    def cost(artifacts: Iterable[Artifact]) -> Cost:
        return total(made[artifact] for artifact in behind(artifacts, root) if artifact in made)

    simple = cost(fine_tuned)
    named = (
        (labels[0], simple), (labels[1], cost(generated)),
        ("the whole experiment, all comparisons included", total(made.values())),
    )  # fmt: skip
    stages = [{"stage": artifact.stage, "fingerprint": artifact.fingerprint} | one for artifact, one in made.items()]
    return CostReport(
        lines=tuple(
            Spending(what=what, cost=one, times=one.seconds / simple.seconds if simple.seconds else None) for what, one in named
        ),
        stages=tuple(stages), missing=tuple(f"{one.stage}/{one.fingerprint}" for one in whole if one not in made),
    )  # fmt: skip


def amount(value: float | None, unit: str) -> str:
    """A sum as the page prints it: seconds and joules, three digits, in a unit that one can read."""
    if value is None:
        return "not measured"
    larger = ((7200.0, 3600.0, "h"), (120.0, 60.0, "min")) if unit == "s" else ((1e6, 1e6, "MJ"), (1e3, 1e3, "kJ"))
    for least, size, name in larger:
        if value >= least:
            value, unit = value / size, name
            break
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
