"""The generator of a tiny experiment (a random two-layer BERT, two tasks in files), bundled by the real flow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import save_model, sentences, write_jsonl

from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.base_models import BaseModel, BaseModelConfig, resolve_base_model
from cpdiff_core.experiments import ExperimentConfig

RUNTIME = RuntimeConfig(device="cpu", progress=False)


def write_task(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Files of a two-class task below `folder`, and the task as JSON."""
    for number, part in enumerate(("train", "validation")):
        texts, labels = sentences(60, seed + 1000 * number)
        rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
        write_jsonl(folder / f"{name}-{part}.jsonl", rows)
    return {
        "name": name, "text_columns": ["text"], "labels": ["no", "yes"], "metrics": ["accuracy"],
        "data": {"kind": "files", "train": f"{name}-train.jsonl", "validation": f"{name}-validation.jsonl"},
        "description": f"The task {name}.",
    }  # fmt: skip


def tiny_values(base: Path, data: Path) -> dict[str, Any]:
    training = {"steps": 4, "batch_size": 8}
    return {
        "name": "tiny", "base_model": {"name": str(base)},
        "tasks": [write_task(data, "left", 1), write_task(data, "right", 2)],
        "splits": {"max_selection": 6, "max_report": 30},
        "fine_tune": {"num_steps": 8, "batch_size": 4, "warmup_steps": 2, "max_length": 16, "num_harvest": 5},
        "num_checkpoints": 5, "lora": {"rank": 2, "lora_alpha": 6.0},
        "autoencoder": {"kind": "conv", "channels": 8, "length": 8, "training": training},
        "condition": {"kind": "task_info_few_shot", "num_prompts": 2, "width": 8},
        "diffusion": {
            "kind": "diffusion", "unet": {"width": 16, "multipliers": [1, 2], "time_width": 16}, "training": training,
        },
        "sampling": {"num_inference_steps": 3, "num_candidates": 3},
    }  # fmt: skip


@dataclass(frozen=True)
class Bundled:
    """A tiny experiment's generator as the flow bundles it, and the artifacts that it came from."""

    folder: Path
    base: BaseModel
    experiment: ExperimentConfig
    root: Path
    data: Path
    candidates: dict[str, Path]
    scores: dict[str, Path]
    runtime: RuntimeConfig


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Bundled:
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    from flows.bundles import bundle_experiment

    path = tmp_path_factory.mktemp("bundled")
    experiment = ExperimentConfig.model_validate(tiny_values(save_model(path / "bert"), path / "data"))
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: path / "root"}):
        made = Path(bundle_experiment(experiment, RUNTIME.model_copy(update={"data_dir": str(path / "data")})))
        assert made.is_relative_to((path / "root").resolve())
    candidates: dict[str, Path] = {}
    scores: dict[str, Path] = {}
    for config in (path / "root").glob("generate_candidates/*/config.json"):
        candidates[json.loads(config.read_text())["inputs"]["task"]] = config.parent
    for config in (path / "root").glob("score_report/*/config.json"):
        inputs = json.loads(config.read_text())["inputs"]
        if inputs["vectors"]["kind"] == "candidates":
            scores[inputs["config"]["task"]["task"]["name"]] = config.parent
    base = resolve_base_model(BaseModelConfig(name=str(path / "bert")))
    return Bundled(made, base, experiment, path / "root", path / "data", candidates, scores, RUNTIME)
