"""Normalisation against numpy's mean and std, and at its edges (one checkpoint, constant coordinates)."""

import numpy as np
import pytest
import torch

from cpdiff_core.artifacts import read_tensors, seal, write_tensors
from cpdiff_core.config import UserError
from cpdiff_core.generator.normalization import NormalizationConfig, Normalizer

CONFIGS = [
    NormalizationConfig(scope=scope, axis=axis)
    for scope in ("none", "batch", "task")
    for axis in ("coordinate", "vector")
]


def harvests() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sst2": 0.02 * torch.randn(7, 50, generator=generator) + 0.3,
        "a task/with sign": 3.0 * torch.randn(5, 50, generator=generator) - 1.0,
    }


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_invert_after_normalize_gives_the_weights_back(config: NormalizationConfig) -> None:
    normalizer = Normalizer.fit(config, harvests())
    for task, w_NK in harvests().items():
        torch.testing.assert_close(normalizer.invert(task, normalizer.normalize(task, w_NK)), w_NK)


@pytest.mark.parametrize(
    ("scope", "axis"), [("batch", "coordinate"), ("batch", "vector"), ("task", "coordinate"), ("task", "vector")]
)
def test_normalized_values_equal_numpy_statistics(scope: str, axis: str) -> None:
    normalizer = Normalizer.fit(NormalizationConfig(scope=scope, axis=axis), harvests())
    for task, w_NK in harvests().items():
        source = np.concatenate([w.numpy() for w in harvests().values()]) if scope == "batch" else w_NK.numpy()
        source = source.astype(np.float64)
        over = 0 if axis == "coordinate" else None
        expected = (w_NK.numpy() - source.mean(over)) / source.std(over)
        np.testing.assert_allclose(normalizer.normalize(task, w_NK).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_zero_inverts_to_the_soup_only_under_task_and_coordinate() -> None:
    for config in CONFIGS:
        normalizer = Normalizer.fit(config, harvests())
        w_NK = harvests()["sst2"]
        is_soup = torch.allclose(normalizer.invert("sst2", torch.zeros(1, 50)), w_NK.mean(0, keepdim=True), atol=1e-6)
        assert is_soup == (config.scope == "task" and config.axis == "coordinate")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("num_checkpoints", [1, 150])
def test_constant_coordinates_stay_finite_and_invertible(config: NormalizationConfig, num_checkpoints: int) -> None:
    w_NK = torch.full((num_checkpoints, 10), 0.1)  # 0.1 has no exact binary form: its mean over N carries rounding
    normalizer = Normalizer.fit(config, {"only": w_NK})
    normalized = normalizer.normalize("only", w_NK)
    assert bool(normalized.isfinite().all())
    assert float(normalized.abs().max()) < 1.0
    torch.testing.assert_close(normalizer.invert("only", normalized), w_NK)
    # A candidate that differs from the constant is not blown up either.
    assert float((normalizer.invert("only", torch.ones(1, 10)) - w_NK[:1]).abs().max()) <= 1.0 + 1e-6


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_statistics_survive_a_file(config: NormalizationConfig, tmp_path) -> None:  # type: ignore[no-untyped-def]
    normalizer = Normalizer.fit(config, harvests())
    write_tensors(tmp_path / "statistics.safetensors", normalizer.tensors())
    seal(tmp_path)
    again = Normalizer.from_tensors(config, tuple(harvests()), read_tensors(tmp_path, "statistics.safetensors"))
    for task, w_NK in harvests().items():
        assert torch.equal(again.normalize(task, w_NK), normalizer.normalize(task, w_NK))


def test_task_without_statistics_is_refused_by_name() -> None:
    normalizer = Normalizer.fit(NormalizationConfig(), harvests())
    with pytest.raises(UserError, match=r"'rte'.*known tasks"):
        normalizer.normalize("rte", torch.zeros(1, 50))


def test_vectors_of_another_layout_are_refused_with_both_shapes() -> None:
    normalizer = Normalizer.fit(NormalizationConfig(axis="coordinate"), harvests())
    with pytest.raises(ValueError, match=r"\(1, 51\).*\(50,\)"):
        normalizer.invert("sst2", torch.zeros(1, 51))


def test_unequal_sizes_and_infinite_values_are_refused() -> None:
    with pytest.raises(UserError, match=r"differ in size"):
        Normalizer.fit(NormalizationConfig(), {"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)})
    with pytest.raises(UserError, match=r"'a'.*not finite"):
        Normalizer.fit(NormalizationConfig(), {"a": torch.tensor([[float("nan")]])})
