"""What is tortured: a whole experiment on a random two-layer BERT, with deaths that can be ordered in advance.

Runs in children forked from a process that has imported everything, so that a run takes seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from prefect.settings import PREFECT_API_URL, PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from tiny import save_model, sentences, write_jsonl

from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.experiments import ExperimentConfig
from flows.pipeline import run_experiment
from tasks.report import tally

Death = Literal["in a body", "before a record", "in a resume write", "in a group commit"]
DEATHS: tuple[Death, ...] = ("in a body", "before a record", "in a resume write", "in a group commit")


def write_subject(folder: Path) -> Path:
    """The experiment as a JSON file, with its model and data beside it."""
    names = ("left", "right")
    for seed, name in enumerate(names):
        for part, offset in (("train", 0), ("validation", 1000)):
            texts, labels = sentences(60, seed + offset)
            rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
            write_jsonl(folder / f"{name}-{part}.jsonl", rows)
    training = {"steps": 60, "batch_size": 8}
    tasks = [
        {
            "name": name, "text_columns": ["text"], "labels": ["no", "yes"], "metrics": ["accuracy"],
            "data": {"kind": "files", "train": f"{name}-train.jsonl", "validation": f"{name}-validation.jsonl"},
            "description": f"The task {name}.",
        }
        for name in names
    ]  # fmt: skip
    values = {
        "name": "tortured", "base_model": {"name": str(save_model(folder / "bert"))}, "tasks": tasks,
        "splits": {"max_selection": 6, "max_report": 20},
        "fine_tune": {"num_steps": 12, "batch_size": 4, "warmup_steps": 2, "max_length": 16, "num_harvest": 5},
        "num_checkpoints": 5,
        "autoencoder": {"kind": "conv", "channels": 8, "length": 8, "training": training},
        "condition": {"kind": "one_hot"},
        "diffusion": {"kind": "diffusion", "unet": {"width": 16, "multipliers": [1, 2], "time_width": 16}, "training": training},
        "sampling": {"num_inference_steps": 3, "num_candidates": 3},
    }  # fmt: skip
    file = folder / "experiment.json"
    file.write_text(json.dumps(values))
    return file


def run(root: Path, api_url: str, file: Path, death: Death | None = None, seed: int = 0) -> None:
    """Run the experiment; die as ordered. Leaves `<pid>.outcome` beside `file`: the stages computed, or the user's error."""
    if death is not None and death != "in a body":
        _die_at(_TRIGGERS[death], random.Random(seed))
    outcome: dict[str, Any]
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: root, PREFECT_API_URL: api_url}):
        experiment = ExperimentConfig.model_validate(json.loads(file.read_text()))
        runtime = RuntimeConfig(device="cpu", data_dir=str(file.parent), resume_seconds=1e-6, progress=False)
        try:
            run_experiment(experiment, runtime)
            outcome = {"computed": tally()["computed"]}
        except UserError as error:
            outcome = {"error": str(error)}
    (file.parent / f"{os.getpid()}.outcome").write_text(json.dumps(outcome))


def _writes(arguments: tuple[Any, ...]) -> bool:
    return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))


_COMMITS = ("finished_group", "harvest_checkpoints")

_Trigger = tuple[Callable[[str, tuple[Any, ...]], bool], int, float]
"""Whether an audit event is the moment; of how many moments one is drawn; seconds after it within which to die."""

_TRIGGERS: dict[Death, _Trigger] = {
    # The folder is in place; Prefect opens the record to write it.
    "before a record": (lambda e, a: e == "open" and str(a[0]).endswith("/result.json") and _writes(a), 20, 0.0),
    # A save begins by making its folder; a few milliseconds cover writing the file and renaming it.
    "in a resume write": (lambda e, a: e == "os.mkdir" and "/.resume/" in str(a[0]), 14, 0.004),
    # A finished group is saved as a whole, then its members one after another.
    "in a group commit": (lambda e, a: e == "os.mkdir" and str(a[0]).split("/")[-2] in _COMMITS, 3, 0.01),
}


def _die_at(trigger: _Trigger, rng: random.Random) -> None:
    is_moment, moments, within = trigger
    left, delay = rng.randrange(moments), rng.uniform(0, within)

    def die() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.mkdir") and is_moment(event, arguments):
            left -= 1
            if left == -1:
                if delay:
                    threading.Thread(target=die).start()
                else:
                    die()

    sys.addaudithook(hook)
