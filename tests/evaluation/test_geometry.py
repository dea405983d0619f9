"""Dispersion and separation by hand; t-SNE keeps far apart what is far apart."""

import numpy as np
import pytest
import torch

from cpdiff_core.evaluation.geometry import embed, geometry


def test_spread_and_distance_between_tasks_by_hand():
    training = {"a": torch.tensor([[0.0, 0.0], [2.0, 0.0]]), "b": torch.tensor([[0.0, 6.0], [2.0, 6.0]])}
    generated = {"a": torch.tensor([[-2.0, 0.0], [4.0, 0.0]]), "b": torch.tensor([[1.0, 3.0], [1.0, 3.0]])}
    found = geometry(training, generated)
    assert found.within_training == {"a": 1.0, "b": 1.0}
    assert found.dispersion("a") == 3.0
    assert found.dispersion("b") == 0.0
    assert found.separation("training") == 6.0
    assert found.separation("generated") == pytest.approx(3.0 / 1.5)


def test_task_whose_training_vectors_do_not_vary_has_no_dispersion():
    found = geometry({"a": torch.ones(1, 3)}, {"a": torch.randn(4, 3)})
    assert found.dispersion("a") is None
    assert found.between_training == 0.0
    assert (found.separation("training"), found.separation("generated")) == (None, None), "a task alone"


def test_embedding_separates_tasks_that_are_far_apart():
    rng = torch.Generator().manual_seed(0)
    training = {name: 20.0 * i + torch.randn(30, 50, generator=rng) for i, name in enumerate("ab")}
    generated = {name: 20.0 * i + torch.randn(10, 50, generator=rng) for i, name in enumerate("ab")}
    plane = embed(training, generated, seed=0)
    assert {name: x.shape for name, x in plane.items()} == {
        "a/training": (30, 2), "a/generated": (10, 2), "b/training": (30, 2), "b/generated": (10, 2)
    }  # fmt: skip
    centre = plane["a/training"].mean(0), plane["b/training"].mean(0)
    distances = [np.linalg.norm(plane["a/generated"] - c, axis=1) for c in centre]
    assert (distances[0] < distances[1]).all()


def test_vectors_that_are_all_the_same_lie_in_one_place() -> None:
    """One checkpoint, and candidates that are copies of it: t-SNE itself would end the process."""
    w_K = torch.randn(40)
    plane = embed({"a": w_K.repeat(2, 1)}, {"a": w_K.repeat(20, 1)}, seed=0)
    assert plane["a/training"].shape == (2, 2)
    assert plane["a/generated"].shape == (20, 2)
    assert all((places == 0).all() for places in plane.values())
