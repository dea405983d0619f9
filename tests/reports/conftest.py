"""One audited experiment through the real flow, at a size for tests, with texts that a page must not obey."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import save_model, sentences, write_jsonl

from cpdiff_core.config import RuntimeConfig
from cpdiff_core.evaluation.arms import ALL_ARMS

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\u2028\x07 \"'&amp;{{ 7 * 7 }}"


@dataclass(frozen=True)
class TextRun:
    """folder: of the report. values: the experiment as one writes it in JSON."""

    folder: Path
    root: Path
    values: dict[str, Any]
    runtime: RuntimeConfig

    @property
    def page(self) -> Path:
        return self.folder / "report.html"


def _task(folder: Path, name: str, seed: int) -> dict[str, Any]:
    for number, part in enumerate(("train", "validation")):
        rows = [{"text": text, "label": label} for text, label in zip(*sentences(60, seed + 100 * number), strict=True)]
        write_jsonl(folder / f"{name}-{part}.jsonl", rows)
    data = {"kind": "files", "train": f"{name}-train.jsonl", "validation": f"{name}-validation.jsonl"}
    return {
        "name": name, "text_columns": ["text"], "labels": ["no", "yes"], "metrics": ["accuracy"], "data": data,
        "description": HOSTILE,
    }  # fmt: skip


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> TextRun:
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    from cpdiff_core.experiments import ExperimentConfig
    from flows.pipeline import run_experiment

    path = tmp_path_factory.mktemp("text_run")
    training = {"steps": 8, "batch_size": 8}
    values = {
        "name": "tiny-page", "description": HOSTILE, "base_model": {"name": str(save_model(path / "bert"))},
        "tasks": [_task(path / "data", "left", 1), _task(path / "data", "right", 2)],
        "splits": {"max_selection": 6, "max_report": 30},
        "fine_tune": {"num_steps": 12, "batch_size": 4, "warmup_steps": 2, "max_length": 16, "num_harvest": 8},
        "num_checkpoints": 8, "scored_checkpoints": 4, "arms": [arm for arm in ALL_ARMS if arm != "annealed"],
        "soup_tuning": {"num_steps": 2, "batch_size": 4, "learning_rate": 1e-3},
        "autoencoder": {"kind": "conv", "channels": 8, "length": 8, "training": training}, "condition": {"kind": "one_hot"},
        "diffusion": {"training": training, "unet": {"width": 16, "multipliers": [1, 2], "time_width": 16}},
        "sampling": {"num_inference_steps": 4, "num_candidates": 5},
        "audit": {"num_trivial": 4, "num_changed": 2, "num_trajectories": 2},
    }  # fmt: skip
    runtime = RuntimeConfig(device="cpu", progress=False, data_dir=str(path / "data"))
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: path / "root"}):
        page = Path(run_experiment(ExperimentConfig.model_validate(values), runtime))
    return TextRun(page.parent, path / "root", values, runtime)
