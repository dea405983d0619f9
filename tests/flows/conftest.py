"""A whole experiment small enough for a test: a random two-layer BERT in a folder and tasks in files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_child import CommandLine
from tiny import save_model, sentences, write_jsonl

from cpdiff_core.experiments import ExperimentConfig


def write_task(folder: Path, name: str, seed: int, num: int = 60) -> dict[str, Any]:
    """Files of a two-class task below `folder`, and the task as JSON."""
    for number, part in enumerate(("train", "validation")):
        texts, labels = sentences(num, seed + 1000 * number)
        write_jsonl(
            folder / f"{name}-{part}.jsonl",
            [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)],
        )
    return {
        "name": name, "text_columns": ["text"], "labels": ["no", "yes"], "metrics": ["accuracy"],
        "data": {"kind": "files", "train": f"{name}-train.jsonl", "validation": f"{name}-validation.jsonl"},
        "description": f"The task {name}.",
    }  # fmt: skip


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture
def tiny_values(tmp_path: Path, tiny_bert: Path) -> dict[str, Any]:
    """An experiment as one writes it in JSON; its files lie in tmp_path/data."""
    data = tmp_path / "data"
    training = {"steps": 4, "batch_size": 8}
    return {
        "name": "tiny", "base_model": {"name": str(tiny_bert)},
        "tasks": [write_task(data, "left", 1), write_task(data, "right", 2)],
        "splits": {"max_selection": 6, "max_report": 30},
        "fine_tune": {"num_steps": 8, "batch_size": 4, "warmup_steps": 2, "max_length": 16, "num_harvest": 5},
        "num_checkpoints": 5,
        "autoencoder": {"kind": "conv", "channels": 8, "length": 8, "training": training},
        "condition": {"kind": "one_hot"},
        "diffusion": {
            "kind": "diffusion", "training": training, "unet": {"width": 16, "multipliers": [1, 2], "time_width": 16},
        },
        "sampling": {"num_inference_steps": 3, "num_candidates": 3},
    }  # fmt: skip


@pytest.fixture
def cli(tmp_path: Path, prefect_server: str) -> Iterator[CommandLine]:
    command_line = CommandLine(tmp_path, prefect_server)
    yield command_line
    command_line.kill_all()


@pytest.fixture
def tiny_experiment(tiny_values: dict[str, Any]) -> ExperimentConfig:
    return ExperimentConfig.model_validate(tiny_values)
