"""All arms, the audit and several seeds through the real flow, on a random two-layer BERT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cpdiff_core.artifacts import read_json, read_tensors
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.evaluation.arms import ALL_ARMS
from cpdiff_core.experiments import ExperimentConfig
from cpdiff_core.reports.facts import FACTS_FILE, Facts

AUDIT = {"num_trivial": 5, "num_changed": 2, "num_trajectories": 2}


def run(values: dict[str, Any], data: Path) -> Path:
    from flows.pipeline import run_experiment

    runtime = RuntimeConfig(device="cpu", progress=False, data_dir=str(data))
    return Path(run_experiment(ExperimentConfig.model_validate(values), runtime)).parent


def test_all_arms_and_the_audit_of_two_seeds_and_two_runs(
    tiny_values: dict[str, Any], artifact_root: Path, tmp_path: Path
) -> None:
    values = tiny_values | {
        "arms": ALL_ARMS, "audit": AUDIT, "num_seeds": 2, "num_runs": 2, "scored_checkpoints": 4,
        "annealing": {"num_steps": 3}, "soup_tuning": {"num_steps": 3, "batch_size": 8, "learning_rate": 1e-3},
        "sampling": {"num_inference_steps": 3, "num_candidates": 5},
    }  # fmt: skip
    report = run(values, tmp_path / "data")
    frame = pd.read_csv(report / "results.csv").set_index(["task", "arm"])
    assert set(frame.index) == {(task, arm) for task in ("left", "right", "average") for arm in ALL_ARMS}
    assert set(frame.num_seeds) == {2}
    oracle, selected = frame.xs("original (oracle)", level="arm"), frame.xs("original (selected)", level="arm")
    assert (oracle.estimate >= selected.estimate).all()

    facts = Facts.model_validate(read_json(report, FACTS_FILE))
    assert facts.seeds == (42, 43)
    assert set(facts.tasks) == {"left", "right"}
    for task, found in facts.tasks.items():
        assert found.verdict.startswith(f"{task}: {found.kind}")
        told = {"an empty condition", "another task's condition", "another task's statistics"}
        assert set(found.effects) == told, "a one-hot condition in another order would be another task's, or its own"
        assert found.seed_claim in ("holds", "ties", "fails", "unmatched")
    page = (report / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6, "four figures, and two for readers without JavaScript"
    assert 'src="http' not in page, "the page needs no other file"
    figures = ("novelty", "similarity", "tsne", "trajectory", "vectors", "map")
    assert {path.stem for path in report.glob("*.svg")} == set(figures)

    # The soup's control started at the soup: with two heads and tasks, its two vectors are near their own soup.
    tuned = [path.parent for path in artifact_root.glob("continue_training/*/candidates.safetensors")]
    assert len(tuned) == 4, "annealed and soup, two seeds"
    assert sorted(len(read_tensors(path, "candidates.safetensors")["w_MK"]) for path in tuned) == [2, 2, 4, 4]


def test_blocks_that_are_not_generated_keep_the_last_checkpoint(
    tiny_values: dict[str, Any], artifact_root: Path, tmp_path: Path
) -> None:
    run(tiny_values | {"blocks": {"first": 1, "last": 1}}, tmp_path / "data")
    filled = {}
    for path in artifact_root.glob("fill_blocks/*"):
        inputs = json.loads((path / "config.json").read_text())["inputs"]
        filled[inputs["training"]["task"]["task"]["name"]] = (path, inputs["training"]["runs"][0])
    assert set(filled) == {"left", "right"}
    for path, source in filled.values():
        w_MK = read_tensors(path, "candidates.safetensors")["w_MK"]
        w_NK = read_tensors(artifact_root / source["stage"] / source["fingerprint"], "checkpoints.safetensors")["w_NK"]
        kept = (w_MK == w_NK[-1]).all(0)
        assert int(kept.sum()) * 2 == w_NK.shape[1], "block 0 of two is the checkpoint's"
        assert not torch.equal(w_MK[0], w_MK[1])
