"""A short torture: five kills, a race and damaged files. `make torture` is the long one."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from torture import Bench, damage, race


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Bench:
    return Bench(tmp_path_factory.mktemp("torture"), prefect_server)


@pytest.mark.parametrize(
    ("death", "seed"),
    [("in a body", 0), ("in a body", 1), ("before a record", 2), ("in a resume write", 3), ("in a group commit", 4)],
)
def test_run_killed_there_ends_as_undisturbed_when_it_is_run_again(bench: Bench, death, seed: int) -> None:
    died, wrong = bench.kill(death, seed)
    assert died
    assert wrong == ""


def test_two_processes_that_race_for_an_experiment_compute_each_stage_once(bench: Bench) -> None:
    assert race(bench, 2) == ""


def test_every_file_of_every_artifact_damaged_is_named(bench: Bench) -> None:
    count, unnamed = damage(bench, random.Random(0))
    assert unnamed == ""
    assert count > 100
