"""Single vectors and costs: against the audit, the stored scores and sums done by hand; texts inside a script element."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from cpdiff_core.artifacts import Artifact, read_json, seal, write_json
from cpdiff_core.reports.cost import amount, behind, cost_report, total
from cpdiff_core.reports.html import embedded_json
from cpdiff_core.reports.vectors import mean_disagreement

if TYPE_CHECKING:
    from conftest import TextRun


def of_task(run: TextRun, stage: str, task: str) -> dict[str, Any]:
    """The configuration and folder of the one artifact of a stage that is of a task."""
    for path in sorted((run.root / stage).glob("*/config.json")):
        inputs = json.loads(path.read_text())["inputs"]
        named = inputs.get("training", inputs.get("config", {})).get("task", {})
        if named and named["task"]["name"] == task and inputs.get("vectors", {"kind": "candidates"})["kind"] == "candidates":
            sources = inputs.get("vectors", {"sources": [{"stage": "generate_candidates"}]})["sources"]
            if sources[0]["stage"] == "generate_candidates":
                return inputs | {"folder": path.parent}
    raise AssertionError(f"no {stage} of {task}")


@pytest.mark.parametrize("task", ["left", "right"])
def test_candidates_have_the_distances_of_the_audit_and_the_stored_scores(text_run: TextRun, task: str) -> None:
    frame = pd.read_csv(text_run.folder / "candidates.csv").query("task == @task")
    audit = read_json(of_task(text_run, "audit", task)["folder"], "audit.json")
    np.testing.assert_allclose(frame.distance, audit["novelty"]["product"]["generated"], rtol=1e-4)
    np.testing.assert_allclose(frame.relative_distance * audit["novelty"]["copy_distance"], frame.distance, rtol=1e-4)
    assert frame.disagreement_percent.mean() == pytest.approx(100 * audit["diversity"]["mean_disagreement"], rel=1e-4)
    for split in ("report", "selection"):
        stored = read_json(of_task(text_run, f"score_{split}", task)["folder"], "scores.json")["scores"]["accuracy"]
        np.testing.assert_allclose(frame[split], stored, rtol=1e-5)
    chosen = frame[frame.chosen]
    assert len(chosen) == 1
    assert chosen.selection.item() == frame.selection.max()


def test_disagreement_with_the_others_by_hand() -> None:
    predictions = [[0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]]
    assert mean_disagreement(predictions, regression=False) == pytest.approx([(1 / 4 + 1) / 2, (1 / 4 + 3 / 4) / 2, 7 / 8])
    assert mean_disagreement([[0.0, 1.0], [0.5, 1.6]], regression=True) == [0.5, 0.5], "0.5 is no difference, 0.6 is one"
    nothing = [[0.0, math.nan], [0.0, math.nan]]
    assert mean_disagreement(nothing, regression=False)[0] == 0.5, "what is no number agrees with nothing"
    assert mean_disagreement([[1, 2]], regression=False) == [None]


def made(root: Path, stage: str, inputs: Any = (), **provenance: Any) -> Artifact:
    artifact = Artifact(stage=stage, fingerprint="0" * 20)
    write_json(artifact.under(root) / "config.json", {"inputs": {"given": [one.model_dump() for one in inputs]}})
    seal(artifact.under(root))
    if provenance:
        write_json(artifact.under(root) / "provenance.json", {"device": "a GPU"} | provenance)
    return artifact


GPU = {"seconds": 10.0, "gpu_seconds": 10.0, "processor_seconds": 12.0, "gpu_joules": 3000.0, "gpu_idle_watts": 70.0}


def test_cost_is_of_everything_behind_and_each_artifact_once(tmp_path: Path) -> None:
    head = made(tmp_path, "fit_head", **GPU | {"seconds": 2.0, "gpu_seconds": 0.0, "gpu_joules": None, "gpu_idle_watts": None})
    run = made(tmp_path, "harvest_checkpoints", [head], **GPU)
    diffusion = made(tmp_path, "fit_diffusion", [run], **GPU | {"seconds": 30.0, "gpu_seconds": 30.0, "gpu_joules": 9000.0})
    scores = made(tmp_path, "score_report", [diffusion, run, head], **GPU)
    assert set(behind([scores], tmp_path)) == {head, run, diffusion, scores}
    report = cost_report([scores, head], [run], [diffusion], ("simple", "generated"), tmp_path)
    simple, generated, whole = (line.cost for line in report.lines)
    assert (simple.num, simple.seconds, simple.gpu_seconds, simple.joules) == (2, 12.0, 10.0, 3000.0)
    assert (generated.seconds, generated.joules, generated.idle_joules) == (42.0, 12000.0, 70.0 * 40)
    assert (whole.num, whole.seconds, whole.processor_seconds) == (4, 52.0, 48.0)
    assert whole.working_joules == 15000.0 - 70.0 * 50
    assert report.lines[1].times == 42.0 / 12.0
    assert report.missing == ()


def test_energy_that_one_stage_lacks_is_not_measured_for_the_sum(tmp_path: Path) -> None:
    old = {"seconds": 5.0, "peak_gpu_bytes": 2**20}  # a record of before there was a counter
    cost = total([GPU, old])
    assert (cost.gpu_seconds, cost.joules, cost.idle_joules, cost.processor_seconds) == (15.0, None, None, None)
    assert total([{"seconds": 5.0, "peak_gpu_bytes": None, "processor_seconds": 4.0}]).joules is None, "no GPU, no counter"
    assert amount(None, "J") == "not measured"
    gone = made(tmp_path, "fit_head")
    report = cost_report([made(tmp_path, "report", [gone], **GPU)], [], [], ("a", "b"), tmp_path)
    assert report.missing == (f"fit_head/{'0' * 20}",)


def test_report_s_costs_are_those_of_all_its_stages(text_run: TextRun) -> None:
    spending = read_json(text_run.folder, "facts.json")["spending"]
    simple, generated, whole = (line["cost"] for line in spending)
    recorded = {
        path.parent.parent.name + path.parent.name: json.loads(path.read_text())
        for path in text_run.root.glob("*/*/provenance.json")
        if path.parent.parent.name != "report"
    }
    assert whole["num"] == len(recorded), "every artifact of this root is behind its report"
    assert whole["seconds"] == pytest.approx(sum(one["seconds"] for one in recorded.values()))
    assert simple["num"] == 4, "a head and a run for each task"
    assert simple["seconds"] < generated["seconds"] < whole["seconds"]


def test_amounts_are_read_by_people() -> None:
    texts = [amount(value, "s") for value in (0.5, 95.04, 119.0, 130.0, 7199.0, 9000.0)]
    assert texts == ["0.5 s", "95 s", "119 s", "2.17 min", "120 min", "2.5 h"]
    assert [amount(value, "J") for value in (999.4, 1500.0, 2.5e6)] == ["999 J", "1.5 kJ", "2.5 MJ"]


def test_json_inside_a_script_element_ends_nothing() -> None:
    hostile = {"</script><!--<script>": ["\u2028\u2029\x00\x1f", "&lt;", "]]>"]}
    text = embedded_json(hostile)
    assert not set(text) & set("<>&\u2028\u2029\x00")
    assert text.isascii()
    assert json.loads(text) == hostile
    with pytest.raises(ValueError, match="JSON"):
        embedded_json(float("nan"))
