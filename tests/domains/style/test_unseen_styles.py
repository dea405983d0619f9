"""Leaving a style out: training never meets it, and every arm of the comparison is what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from cpdiff_core.artifacts import seal
from cpdiff_core.domains.style.distances import frechet_distance
from cpdiff_core.style_experiments import StyleExperimentConfig
from cpdiff_core.unseen_styles import join_unseen, nearest_style, shuffled_conditions

LEFT_OUT = "ink"


def upstream(root: Path, inputs: object, seen: set[Path] | None = None) -> set[Path]:
    """Folders of every artifact that these inputs lead to, through whatever they lead to themselves."""
    seen = set() if seen is None else seen
    if isinstance(inputs, dict):
        if set(inputs) == {"stage", "fingerprint"}:
            folder = root / str(inputs["stage"]) / str(inputs["fingerprint"])
            if folder not in seen:
                seen.add(folder)
                upstream(root, json.loads((folder / "config.json").read_text())["inputs"], seen)
        else:
            for value in inputs.values():
                upstream(root, value, seen)
    elif isinstance(inputs, list):
        for value in inputs:
            upstream(root, value, seen)
    return seen


def test_nothing_that_leads_to_the_unseen_candidates_has_met_the_left_out_style(style_run) -> None:
    root, made = style_run.root, style_run.inputs("generate_unseen")
    assert len(made) == 4  # two objectives, and each with its conditions shuffled
    files = {value["sha256"] if isinstance(value, dict) else value for value in _digests(style_run, LEFT_OUT)}
    assert len(files) == 20
    for inputs in made.values():
        own = upstream(root, inputs["generator"])
        stages = {folder.parent.name for folder in own}
        assert {"fit_normalization", "fit_autoencoder", "encode_style_conditions", "harvest_style"} <= stages
        for folder in own:
            text = (folder / "config.json").read_text()
            assert not files & set(re.findall(r"[0-9a-f]{64}", text)), folder
            assert f'"{LEFT_OUT}"' not in text, folder
        # What it is shown of the style: one image, of a split that fine-tuning does not train on.
        assert inputs["style"] == LEFT_OUT
        shown = root / inputs["condition"]["stage"] / inputs["condition"]["fingerprint"]
        assert len(load_file(shown / "condition.safetensors")["image_1CHW"]) == 1
    # The search itself can fail: the generator of the table has met it.
    table = [i for i in style_run.inputs("generate_candidates").values()]
    assert all(any(f'"{LEFT_OUT}"' in (f / "config.json").read_text() for f in upstream(root, i)) for i in table)


def _digests(style_run, name: str) -> list[object]:
    for inputs in style_run.inputs("encode_style").values():
        if inputs["style"]["name"] == name:
            return [digest for _, digest in inputs["style"]["files"]]
    raise AssertionError(name)


def test_table_has_every_arm_and_its_distances_are_those_of_the_images(style_run) -> None:
    folder = next(iter(style_run.inputs("compare_unseen_styles")))
    frame = pd.read_csv(folder / "unseen.csv")
    assert list(frame["arm"]) == [
        "no-LoRA", "nearest training style's LoRA", "generated, weights", "shuffled condition, weights",
        "generated, through the base", "shuffled condition, through the base", "really fine-tuned",
        "floor: real against real",
    ]  # fmt: skip
    assert set(frame["style"]) == {LEFT_OUT}
    real = _real(style_run)
    by_arm = frame.set_index("arm")
    reported = style_run.inputs("score_style_report").items()
    scored = {json.dumps(i["vectors"]): f for f, i in reported if i["config"]["style"] == LEFT_OUT}
    assert len(scored) == 7
    zeros = next(f for key, f in scored.items() if '"zeros"' in key)
    x = load_file(zeros / "samples.safetensors")["features_VND"]
    assert by_arm.loc["no-LoRA", "estimate"] == pytest.approx(frechet_distance(x[0], real))
    unseen = {f.name: i["shuffled"] for f, i in style_run.inputs("generate_unseen").items()}
    means = {True: [], False: []}
    for key, scores in scored.items():
        source = json.loads(key)["sources"]
        if source and source[0]["stage"] == "generate_unseen":
            x_VND = load_file(scores / "samples.safetensors")["features_VND"]
            assert len(x_VND) == 3
            means[unseen[source[0]["fingerprint"]]].append(float(np.mean([frechet_distance(x, real) for x in x_VND])))
    for shuffled, word in ((False, "generated"), (True, "shuffled condition")):
        rows = by_arm[by_arm.index.str.startswith(word)]
        assert sorted(rows["estimate"]) == pytest.approx(sorted(means[shuffled]))
    row = by_arm.loc["generated, weights"]
    gains = (("no_lora", "no-LoRA"), ("nearest", "nearest training style's LoRA"), ("shuffled", "shuffled condition, weights"))
    for key, other in gains:
        assert row[f"gain_over_{key}"] == pytest.approx(by_arm.loc[other, "estimate"] - row["estimate"])
        assert row[f"gain_over_{key}_low"] <= row[f"gain_over_{key}"] <= row[f"gain_over_{key}_high"]
    summary = (style_run.report / "summary.txt").read_text()
    assert "generated, through the base, on 1 unseen style," in summary
    page = (style_run.report / "report.html").read_text()
    assert "<li>generated, through the base, on 1 unseen style," in page
    assert "<li>Nearest training styles: " in page
    alone = next(iter(style_run.inputs("compare_unseen_style")))
    for name in ("unseen.csv", "unseen.json", "unseen.txt", f"sheet_{LEFT_OUT}.png"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name


@pytest.mark.parametrize("other", ["other", "2024", "01", "NA", "None"])
def test_comparisons_of_several_styles_are_joined_as_they_are(style_run, tmp_path: Path, other: str) -> None:
    """A second style beside the first: the rows of both, unchanged, and what both say together."""
    first = next(iter(style_run.inputs("compare_unseen_style")))
    second, out = tmp_path / "second", tmp_path / "out"
    second.mkdir()
    out.mkdir()
    frame = pd.read_csv(first / "unseen.csv", float_precision="round_trip").assign(style=other)
    frame.to_csv(second / "unseen.csv", index=False)
    facts = json.loads((first / "unseen.json").read_text())
    facts["styles"][0] |= {"style": other, "sheet": "sheet_other.png"}
    (second / "unseen.json").write_text(json.dumps(facts))
    (second / "sheet_other.png").write_bytes((first / f"sheet_{LEFT_OUT}.png").read_bytes())
    seal(second)
    join_unseen(out, [first, second])
    joined = (out / "unseen.csv").read_text().splitlines()
    assert joined == (first / "unseen.csv").read_text().splitlines() + (second / "unseen.csv").read_text().splitlines()[1:]
    told = (out / "unseen.txt").read_text()
    assert "generated, weights, on 2 unseen styles," in told
    assert f"{LEFT_OUT}: {facts['styles'][0]['nearest']} (cosine" in told
    assert f"; {other}: " in told
    assert (out / "sheet_other.png").is_file()
    assert [found["style"] for found in json.loads((out / "unseen.json").read_text())["styles"]] == [LEFT_OUT, other]


def _real(style_run) -> torch.Tensor:
    folder = next(f for f, i in style_run.inputs("style_features").items() if i["style"]["name"] == LEFT_OUT)
    return load_file(folder / "features.safetensors")["report"]


def test_fine_tuned_arm_is_the_last_checkpoint_of_the_style_itself_and_the_nearest_of_another(style_run) -> None:
    harvests = {f: i["config"]["style"] for f, i in style_run.inputs("harvest_style").items()}
    scored = [i["vectors"] for i in style_run.inputs("score_style_report").values() if i["config"]["style"] == LEFT_OUT]
    single = [v for v in scored if v["kind"] == "checkpoints"]
    names = sorted(harvests[style_run.root / "harvest_style" / v["sources"][0]["fingerprint"]] for v in single)
    facts = json.loads((next(iter(style_run.inputs("compare_unseen_styles"))) / "unseen.json").read_text())
    assert names == sorted([LEFT_OUT, facts["styles"][0]["nearest"]])
    assert facts["styles"][0]["nearest"] != LEFT_OUT
    assert {v["num_checkpoints"] for v in single} == {1}


def test_only_the_scored_styles_stand_in_the_table(style_run) -> None:
    assert set(pd.read_csv(style_run.report / "results.csv")["style"]) == {"oil", "chalk"}


def test_nearest_style_is_by_direction_from_the_centre_of_all_styles() -> None:
    y_QPE = torch.tensor([[[10.0, 1.0], [10.0, 1.2]], [[10.0, -1.0], [10.0, -1.2]], [[13.0, 0.0], [13.0, 0.0]]])
    assert nearest_style(torch.tensor([10.2, 0.9]), y_QPE)[0] == 0
    assert nearest_style(torch.tensor([10.2, -0.3]), y_QPE)[0] == 1
    assert nearest_style(torch.tensor([19.0, 0.1]), y_QPE)[0] == 2


def test_nearest_of_one_style_is_told_with_the_cosine_itself() -> None:
    y_QPE = torch.tensor([[[3.0, 4.0], [3.0, 4.0]]])
    assert nearest_style(torch.tensor([6.0, 8.0]), y_QPE) == (0, pytest.approx(1.0))
    assert nearest_style(torch.tensor([-4.0, 3.0]), y_QPE) == (0, pytest.approx(0.0))


def test_shuffled_conditions_give_every_style_its_turn() -> None:
    y_QE = torch.arange(5.0)[:, None]
    drawn = shuffled_conditions(y_QE, 10, 3)
    assert sorted(drawn[:5, 0].tolist()) == sorted(drawn[5:, 0].tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(drawn, shuffled_conditions(y_QE, 10, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left_out": ["pastel"]}, "left_out: 'pastel' is none of the styles"),
        ({"scored": []}, "scored: is empty"),
        ({"left_out": []}, "compared_objectives: are compared on left-out styles"),
        ({"diffusion": {}}, "needs diffusion.prediction_type 'v_prediction'"),
        ({"left_out": ["ink", "ink"]}, "named twice"),
    ],
)
def test_experiment_that_cannot_be_is_refused(style_run, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        StyleExperimentConfig.model_validate(style_run.experiment.model_dump(mode="json") | changes)
