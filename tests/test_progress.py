"""How a loop is watched and stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpdiff_core import progress
from cpdiff_core.artifacts import ResumeState
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.generator.training import BLOCK_STEPS, TrainingConfig, train
from cpdiff_core.progress import Cancelled, observed, track

QUIET = RuntimeConfig(progress=False)


@pytest.fixture
def _observed_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_OBSERVED_SECONDS", 0.0)


@pytest.mark.usefixtures("_observed_at_every_step")
def test_loop_that_is_to_stop_saves_its_state_and_ends_at_the_next_step(tmp_path: Path) -> None:
    told = []

    def observer(stage: str, done: int, total: int, loss: float | None) -> bool:
        told.append((stage, done, total, loss))
        return done < 3

    resume = ResumeState(tmp_path / "state", every_seconds=1e6)

    def loop() -> None:
        with track("loop", 9, QUIET) as bar:
            for step in range(1, 10):
                bar.step(loss=float(step))
                if resume.due():
                    resume.save({"step": torch.tensor(step)}, {"step": step})

    with observed(observer), pytest.raises(Cancelled, match="loop: stopped at 3 of 9"):
        loop()
    assert told == [("loop", 1, 9, 1.0), ("loop", 2, 9, 2.0), ("loop", 3, 9, 3.0)]
    state = resume.load()
    assert state is not None
    assert state[1] == {"step": 3}
    assert not resume.due(), "the wish to stop ends with the loop"


@pytest.mark.usefixtures("_observed_at_every_step")
def test_cancelled_training_goes_on_where_it_stopped_and_ends_bit_identical(tmp_path: Path) -> None:
    target = torch.randn(6, generator=torch.Generator().manual_seed(1))

    def fit(resume: ResumeState) -> torch.Tensor:
        module = torch.nn.Linear(6, 1, bias=False)
        torch.nn.init.zeros_(module.weight)
        train(
            "fit", module, lambda x_BI: ((module(x_BI)[:, 0] - x_BI @ target) ** 2).mean(),
            lambda generator: (torch.randn(8, 6, generator=generator),), TrainingConfig(steps=4 * BLOCK_STEPS),
            seed=0, device=torch.device("cpu"), runtime=QUIET, resume=resume,
        )  # fmt: skip
        return module.weight.detach().clone()

    undisturbed = fit(ResumeState(tmp_path / "a", 1e6))
    resume = ResumeState(tmp_path / "b", 1e6)
    with observed(lambda stage, done, total, loss: False), pytest.raises(Cancelled):
        fit(resume)
    state = resume.load()
    assert state is not None
    assert state[1]["step"] == BLOCK_STEPS
    assert torch.equal(fit(resume), undisturbed)


def test_numbers_of_a_saved_state_are_read_without_its_tensors_and_none_if_it_is_cut(tmp_path: Path) -> None:
    resume = ResumeState(tmp_path)
    assert resume.numbers() is None
    resume.save({"w_NK": torch.zeros(4, 1000)}, {"finished": True, "step": 3})
    assert resume.numbers() == {"finished": True, "step": 3}
    file = tmp_path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    assert resume.numbers() is None
    assert resume.load() is None
