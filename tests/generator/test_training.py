"""The training loop against torch's own optimiser and average, and its promise about interrupted runs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cpdiff_core.artifacts import ResumeState
from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.generator.training import BLOCK_STEPS, TrainingConfig, train

CPU = torch.device("cpu")
RUNTIME = RuntimeConfig(progress=False)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def problem() -> tuple[nn.Linear, Callable[..., torch.Tensor], Callable[[torch.Generator], tuple[torch.Tensor, ...]]]:
    torch.manual_seed(0)
    model = nn.Linear(6, 1)

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        x_BI = torch.randn(16, 6, generator=generator)
        return x_BI, x_BI.sum(1, keepdim=True) + 0.1 * torch.randn(16, 1, generator=generator)

    def loss_of(x_BI: torch.Tensor, target_B1: torch.Tensor) -> torch.Tensor:
        return (model(x_BI) - target_B1).square().mean()

    return model, loss_of, draw


def run(config: TrainingConfig, seed: int = 0, resume: ResumeState | None = None, dies_at: int | None = None):  # type: ignore[no-untyped-def]
    model, loss_of, draw = problem()
    calls = 0

    def counted(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise Killed
        return draw(generator)

    losses = train("linear", model, loss_of, counted, config, seed=seed, device=CPU, runtime=RUNTIME, resume=resume)
    return model.weight.detach().clone(), losses, calls


def test_one_step_equals_plain_adamw() -> None:
    config = TrainingConfig(steps=1, learning_rate=0.1, lr_schedule="constant", warmup_fraction=0.0, weight_decay=0.1)
    seen = []
    model, loss_of, draw = problem()

    def spy(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        seen.append(draw(generator))
        return seen[-1]

    train("linear", model, loss_of, spy, config, seed=3, device=CPU, runtime=RUNTIME)
    expected, _, _ = problem()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.1, weight_decay=0.1)
    x_BI, target_B1 = seen[0]
    (expected(x_BI) - target_B1).square().mean().backward()
    nn.utils.clip_grad_norm_(expected.parameters(), config.max_grad_norm)
    optimizer.step()
    torch.testing.assert_close(model.weight, expected.weight)


def test_average_equals_the_bias_corrected_mean_of_the_weights_after_each_step() -> None:
    decay = 0.7
    plain = TrainingConfig(steps=4, learning_rate=0.1, lr_schedule="constant")
    weights = [run(plain.model_copy(update={"steps": 4, "ema_decay": None}))[0]]
    path = []
    for steps in range(1, 5):  # with a constant rate and no warm-up a shorter run is a prefix of a longer one
        path.append(run(TrainingConfig(steps=steps, learning_rate=0.1, lr_schedule="constant", warmup_fraction=0.0))[0])
    averaged, _, _ = run(
        TrainingConfig(steps=4, learning_rate=0.1, lr_schedule="constant", warmup_fraction=0.0, ema_decay=decay)
    )
    share = torch.tensor([decay**3, decay**2, decay, 1.0])
    expected = sum(s * w for s, w in zip(share / share.sum(), path, strict=True))
    torch.testing.assert_close(averaged, expected)
    assert not torch.equal(averaged, weights[0])


def test_killed_training_ends_bit_identical_to_an_undisturbed_one(tmp_path: Path) -> None:
    config = TrainingConfig(steps=3 * BLOCK_STEPS + 7, learning_rate=0.05, ema_decay=0.9)
    expected, expected_losses, _ = run(config)
    resume = ResumeState(tmp_path / "resume", every_seconds=0.0)
    with pytest.raises(Killed):
        run(config, resume=resume, dies_at=2 * BLOCK_STEPS + 20)
    weight, losses, calls = run(config, resume=resume)
    assert calls == BLOCK_STEPS + 7  # it went on from the last block and did not start again
    assert torch.equal(weight, expected)
    assert torch.equal(losses, expected_losses)


def test_state_of_another_network_is_ignored(tmp_path: Path) -> None:
    resume = ResumeState(tmp_path / "resume", every_seconds=0.0)
    resume.save({"parameter.0": torch.zeros(3)}, {"step": 5})
    config = TrainingConfig(steps=10)
    assert torch.equal(run(config, resume=resume)[0], run(config)[0])


def test_same_seed_is_bit_identical_and_another_seed_is_not() -> None:
    config = TrainingConfig(steps=60)
    assert torch.equal(run(config, seed=1)[0], run(config, seed=1)[0])
    assert not torch.equal(run(config, seed=1)[0], run(config, seed=2)[0])


def test_loss_that_is_not_finite_names_stage_and_step() -> None:
    model = nn.Linear(1, 1)
    count = 0

    def loss_of(x_B: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return model(x_B).sum() * (float("nan") if count == 8 else 1.0)

    with pytest.raises(UserError, match=r"toy: the loss is not finite at step 8 of 20; lower its training.learning_rate \(now"):
        train("toy", model, loss_of, lambda g: (torch.ones(1, 1),), TrainingConfig(steps=20), seed=0, device=CPU,
              runtime=RUNTIME)  # fmt: skip


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "constant"])
def test_learning_rate_rises_to_its_peak_and_falls_as_named(schedule: str) -> None:
    rates = TrainingConfig(steps=1000, learning_rate=0.5, lr_schedule=schedule).learning_rates()  # type: ignore[arg-type]
    assert float(rates.max()) == pytest.approx(0.5, rel=1e-2)
    assert float(rates[0]) < 0.02
    peak = {"cosine": 50, "one_cycle": 300, "constant": 50}[schedule]
    assert abs(int((rates >= 0.4999).nonzero()[0]) - peak) <= 15
    assert float(rates[-1]) == pytest.approx(0.5 if schedule == "constant" else 0.0, abs=1e-5)
