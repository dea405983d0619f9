"""A zoo: the harvests of all tasks and runs, cut to their last N checkpoints, and sets of vectors made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from cpdiff_core.artifacts import Artifact, read_tensors
from cpdiff_core.config import Config
from cpdiff_core.lora.vectors import soup

HARVEST_FILE = "checkpoints.safetensors"
CANDIDATE_FILE = "candidates.safetensors"


class TaskHarvests(Config):
    """All runs of one task."""

    task: str
    runs: tuple[Artifact, ...] = Field(min_length=1)


class Zoo(Config):
    """The training set of the generator: N checkpoints of each run of each task."""

    tasks: tuple[TaskHarvests, ...]
    num_checkpoints: int = Field(ge=1, description="N, the last of each run.")

    def load(self, root: Path) -> dict[str, torch.Tensor]:
        """task -> w_NK, runs end to end, oldest checkpoint first within each."""
        return {
            entry.task: torch.cat([load_checkpoints(run.under(root), self.num_checkpoints) for run in entry.runs])
            for entry in self.tasks
        }


def load_checkpoints(folder: Path, num_checkpoints: int) -> torch.Tensor:
    """The last `num_checkpoints` of a harvest, w_NK."""
    w_NK = read_tensors(folder, HARVEST_FILE)["w_NK"]
    if len(w_NK) < num_checkpoints:
        raise ValueError(f"harvest {folder.name} has {len(w_NK)} checkpoints, {num_checkpoints} are asked for")
    return w_NK[len(w_NK) - num_checkpoints :]


class VectorSet(Config):
    """An arm's vectors: what is scored. There is no baseline code, only other vectors."""

    kind: Literal["zeros", "checkpoints", "soup", "candidates"]
    sources: tuple[Artifact, ...] = Field((), description="Harvests of one task, or one set of candidates.")
    num_checkpoints: int = 0
    rows: tuple[int, ...] | None = Field(None, description="Which rows; all if None.")

    def load(self, root: Path, num_parameters: int) -> torch.Tensor:
        """w_VK, float32 on the CPU."""
        if self.kind == "zeros":
            return torch.zeros(1, num_parameters)
        if self.kind == "candidates":
            w_VK = torch.cat([read_tensors(source.under(root), CANDIDATE_FILE)["w_MK"] for source in self.sources])
        else:
            w_VK = torch.cat([load_checkpoints(source.under(root), self.num_checkpoints) for source in self.sources])
        if self.kind == "soup":
            return soup(w_VK)
        return w_VK if self.rows is None else w_VK[list(self.rows)]
