"""Vector arithmetic against explicit dW matrices and numpy."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from cpdiff_core.config import UserError
from cpdiff_core.lora import vectors
from cpdiff_core.lora.layout import Factor

RANK, SCALING = 3, 4.0
# Two modules of different shapes; B of the first lies before A of the second, as PEFT orders them.
FACTORS = (
    Factor(module="a", block=0, a_start=0, rank=RANK, in_features=7, b_start=21, out_features=5),
    Factor(module="b", block=1, a_start=36, rank=RANK, in_features=4, b_start=48, out_features=9),
)
K = 75


def random_vectors(num, seed):
    return torch.randn(num, K, generator=torch.Generator().manual_seed(seed))


def explicit_products(w_VK):
    rows = []
    for w in w_VK.double().numpy():
        parts = []
        for f in FACTORS:
            a = w[f.a_start : f.a_start + f.rank * f.in_features].reshape(f.rank, f.in_features)
            b = w[f.b_start : f.b_start + f.out_features * f.rank].reshape(f.out_features, f.rank)
            parts.append(SCALING * (b @ a).ravel())
        rows.append(np.concatenate(parts))
    return np.stack(rows)


@pytest.fixture(params=[2**22, 40])
def chunk(request, monkeypatch):
    """Everything in one piece, and in pieces of a few columns."""
    monkeypatch.setattr(vectors, "_CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
def test_min_l2_on_factors_and_products_equals_explicit_distances():
    a, b = random_vectors(6, 0), random_vectors(9, 1)
    np.testing.assert_allclose(vectors.min_l2(a, b), cdist(a, b).min(axis=1), rtol=1e-6)
    expected = cdist(explicit_products(a), explicit_products(b)).min(axis=1)
    np.testing.assert_allclose(vectors.min_l2_product(a, b, FACTORS, SCALING), expected, rtol=1e-9)


@pytest.mark.usefixtures("chunk")
def test_leave_one_out_ignores_the_vector_itself_but_not_its_double():
    w = random_vectors(8, 2)
    for explicit, found in (
        (w.double().numpy(), vectors.leave_one_out_min_l2(w)),
        (explicit_products(w), vectors.leave_one_out_min_l2_product(w, FACTORS, SCALING)),
    ):
        distances = cdist(explicit, explicit)
        np.fill_diagonal(distances, np.inf)
        np.testing.assert_allclose(found, distances.min(axis=1), rtol=1e-6)
    doubled = torch.cat([w, w[:1]])
    assert vectors.leave_one_out_min_l2(doubled)[0] == 0.0
    assert vectors.leave_one_out_min_l2_product(doubled, FACTORS, SCALING)[-1] == 0.0
    assert torch.isinf(vectors.leave_one_out_min_l2(w[:1])).all()


def test_copies_are_at_distance_exactly_zero_among_near_neighbours_far_from_the_origin():
    w = 100.0 + 1e-4 * random_vectors(5, 3)
    assert (vectors.min_l2(w[[3, 1]], w) == 0.0).all()
    assert (vectors.min_l2_product(w[[3, 1]], w, FACTORS, SCALING) == 0.0).all()


def test_small_distances_keep_their_digits():
    w = random_vectors(1, 4).double()
    step = 1e-7 * random_vectors(1, 5).double()
    expected = np.linalg.norm(explicit_products(w + step) - explicit_products(w))
    assert vectors.min_l2(w + step, w).item() == pytest.approx(step.norm().item(), rel=1e-6)
    assert vectors.min_l2_product(w + step, w, FACTORS, SCALING).item() == pytest.approx(expected, rel=1e-6)


def test_another_factoring_of_the_same_weights_is_far_on_factors_and_no_distance_on_products():
    w = random_vectors(1, 6).double()
    mixed = w.clone()
    for f in FACTORS:
        mix = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        a, b = slice(f.a_start, f.a_start + RANK * f.in_features), slice(f.b_start, f.b_start + f.out_features * RANK)
        mixed[0, a] = (torch.linalg.inv(mix) @ w[0, a].view(RANK, -1)).flatten()
        mixed[0, b] = (w[0, b].view(-1, RANK) @ mix).flatten()
    assert vectors.min_l2(mixed, w).item() > 1.0
    assert vectors.min_l2_product(mixed, w, FACTORS, SCALING).item() < 1e-5


def test_soup_is_the_mean_and_keeps_the_dtype():
    w = random_vectors(4, 8)
    assert vectors.soup(w).shape == (1, K)
    assert vectors.soup(w).dtype == torch.float32
    np.testing.assert_allclose(vectors.soup(w)[0], w.numpy().mean(axis=0), rtol=1e-5, atol=1e-7)
    assert torch.equal(vectors.soup(w[:1]), w[:1])


def test_interpolation_ends_exactly_at_its_ends():
    a, b = random_vectors(2, 9).split(1)
    assert torch.equal(vectors.interpolate(a, b, 0.0), a)
    assert torch.equal(vectors.interpolate(a, b, 1.0), b)
    torch.testing.assert_close(vectors.interpolate(a, b, 0.25), 0.75 * a + 0.25 * b)


def test_evenly_spaced_includes_the_last_and_refuses_too_many():
    assert vectors.evenly_spaced(150, 10) == tuple(range(14, 150, 15))
    assert vectors.evenly_spaced(7, 3) == (1, 3, 6)
    assert vectors.evenly_spaced(3, 3) == (0, 1, 2)
    assert vectors.evenly_spaced(5, 1) == (4,)
    for num in (0, 6):
        with pytest.raises(UserError, match=f"{num}.*5"):
            vectors.evenly_spaced(5, num)
