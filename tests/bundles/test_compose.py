"""Composing adapters against PEFT and explicit matrices; comparing experiments against resampling by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import saved_base
from transformers import AutoModelForSequenceClassification

from cpdiff_core.comparison import check_comparable, compare, comparison_table
from cpdiff_core.compose import compose
from cpdiff_core.config import UserError
from cpdiff_core.domains.base_models import FAMILIES, build_classifier
from cpdiff_core.domains.glue.text_tasks import excerpt
from cpdiff_core.evaluation.bootstrap import resample, resample_counts
from cpdiff_core.experiment_config import ExperimentConfig
from cpdiff_core.lora.layout import LoraSpec, initial_vector
from cpdiff_core.lora.peft_folder import WEIGHTS_FILE, write_adapter
from cpdiff_core.reports.tables import with_average
from cpdiff_core.style_experiments import STYLE_EXPERIMENTS


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base and four adapters: a, b of rank 2, c of rank 3 with another scaling, d of another base."""
    path = tmp_path_factory.mktemp("compose")
    base = saved_base(path / "base")
    model, head_names = build_classifier(base, 2)
    row = FAMILIES["bert"]
    made = {}
    for number, name in enumerate("abcd"):
        lora = LoraSpec(rank=3, lora_alpha=6) if name == "c" else LoraSpec(rank=2)
        w_K, layout = initial_vector(model, lora, row.target_modules, row.block_pattern, 0)
        generator = torch.Generator().manual_seed(number)
        w_K = 0.1 * torch.randn(w_K.shape, generator=generator)
        head = {key: torch.randn(model.state_dict()[key].shape, generator=generator) for key in head_names}
        where = "elsewhere" if name == "d" else str(base.folder)
        write_adapter(path / name, w_K, layout, lora, row.target_modules, base=where, head=head)
        made[name] = path / name
    return base.folder, made


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()


def test_sum_adds_the_changes_of_the_weights_exactly(adapters, tmp_path) -> None:
    base, made = adapters
    compose("add", [made["a"], made["c"]], [1.0, -0.5], tmp_path / "sum")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).state_dict()
    total, a, c = (merged(base, folder) for folder in (tmp_path / "sum", made["a"], made["c"]))
    changed = [name for name in plain if "attention" in name and name.endswith("weight") and "Norm" not in name]
    assert len(changed) == 8
    for name in changed:
        expected = (a[name] - plain[name]) - 0.5 * (c[name] - plain[name])
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(total[name] - plain[name], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(total["classifier.weight"], a["classifier.weight"])
    assert "first adapter's" in (tmp_path / "sum" / "README.md").read_text()


def test_interpolation_ends_at_both_adapters_and_average_is_the_mean_of_factors(adapters, tmp_path) -> None:
    _, made = adapters
    state = {name: load_file(folder / WEIGHTS_FILE) for name, folder in made.items()}
    for share, same in ((0.0, "a"), (1.0, "b")):
        compose("interpolate", [made["a"], made["b"]], [share], tmp_path / same)
        found = load_file(tmp_path / same / WEIGHTS_FILE)
        assert all(torch.equal(found[name], state[same][name]) for name in found if "lora_" in name)
    compose("average", [made["a"], made["b"], made["a"]], None, tmp_path / "mean")
    found = load_file(tmp_path / "mean" / WEIGHTS_FILE)
    for name in found:
        expected = (2 * state["a"][name] + state["b"][name]) / 3 if "lora_" in name else state["a"][name]
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("how", "names", "weights", "message"),
    [
        ("average", "ac", None, "cpdiff add"),
        ("add", "ad", None, "different base models"),
        ("add", "ab", [1.0], "give one each"),
        ("average", "ab", [float("nan"), 1.0], "--weights nan: is not a finite number"),
        ("interpolate", "ab", [float("inf")], "is not a finite number"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(adapters, tmp_path, how, names, weights, message) -> None:
    with pytest.raises(UserError, match=message):
        compose(how, [adapters[1][name] for name in names], weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def results(predictions: dict[str, np.ndarray], labels: np.ndarray, seeds: int = 1) -> dict:
    """A results table of one arm; predictions: task -> [n]."""
    return with_average(
        {
            task: {"generated": resample("generated", task, [row] * seeds, labels, name="accuracy")}
            for task, row in predictions.items()
        }
    )


def test_comparison_is_paired_and_averages_over_shared_tasks() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=200)
    a = np.where(rng.random(200) < 0.8, labels, 1 - labels)
    b = np.where(rng.random(200) < 0.1, 1 - a, a)  # nearly the same mistakes: pairing makes the interval narrow
    frame = compare(
        results({"x": a, "y": b, "z": a}, labels), results({"x": b, "y": b, "w": a}, labels)
    ).set_index("task")
    assert list(frame.index) == ["x", "y", "average"]
    gap = (a == labels).astype(float) - (b == labels)
    assert frame.loc["x", "estimate"] == pytest.approx(100 * gap.mean())
    low, high = np.quantile(100 * resample_counts("x", 200, 1000) @ gap / 200, (0.025, 0.975))
    assert (frame.loc["x", "low"], frame.loc["x", "high"]) == pytest.approx((low, high))
    assert frame.loc["y", ["estimate", "low", "high"]].tolist() == [0, 0, 0]
    assert frame.loc["average", "estimate"] == pytest.approx(50 * gap.mean())
    assert frame.loc["x", "claim"] == "one seed"
    assert f"{100 * gap.mean():+.1f}" in comparison_table(frame.reset_index(), "first", "second")


def test_comparison_of_what_does_not_compare_is_refused() -> None:
    labels = np.array([0, 1] * 20)
    with pytest.raises(UserError, match="no task and arm in common"):
        compare(results({"x": labels}, labels), results({"y": labels}, labels))
    with pytest.raises(UserError, match="same data"):
        compare(results({"x": labels}, labels), results({"x": labels[:30]}, labels[:30]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": (excerpt("cola"),)}, "no task and arm in common"),
        ({"arms": ("last",)}, "no task and arm in common"),
        ({"num_seeds": 3}, "2 and 3 seeds do not pair up"),
        ({"tasks": (excerpt("sst2").model_copy(update={"metrics": ("f1",)}),)}, "'sst2' is scored by accuracy and by f1"),
        (None, "on styles"),
    ],
)
def test_what_does_not_compare_is_known_before_it_is_computed(changes: dict[str, Any] | None, message: str) -> None:
    first = ExperimentConfig(tasks=(excerpt("sst2"),), num_seeds=2)
    check_comparable(first, first.model_copy(update={"num_seeds": 1}))
    second = STYLE_EXPERIMENTS["quickstart-style"] if changes is None else first.model_copy(update=changes)
    with pytest.raises(UserError, match=message):
        check_comparable(first, second)
