"""Stacked fine-tuning against a plain loop of transformers, peft and torch.optim, one run at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from cpdiff_core.artifacts import ResumeState
from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.domains.base_models import FAMILIES
from cpdiff_core.domains.glue.data import SplitConfig, tokenize
from cpdiff_core.domains.glue.fine_tuning import (
    FineTuneConfig,
    FineTuning,
    HarvestConfig,
    batch_rows,
    initial_weights,
    run_seed,
)
from cpdiff_core.domains.glue.heads import HeadConfig, fit_head
from cpdiff_core.lora.layout import LoraSpec, adapt, initial_vector

RUNTIME = RuntimeConfig(device="cpu", progress=False)
SPLITS = SplitConfig()
LORA = LoraSpec(rank=2, lora_alpha=4.0)
STEPS = 25
TUNE = FineTuneConfig(
    learning_rate=5e-3, num_steps=STEPS, batch_size=8, warmup_steps=5, weight_decay=0.1, max_grad_norm=0.5,
    max_length=32, num_harvest=STEPS,
)  # fmt: skip


@pytest.fixture(scope="module")
def members(bert, make_task) -> list[HarvestConfig]:
    tasks = [
        make_task("two"),
        make_task("three", classes=3, num=47, seed=1, pairs=True),
        make_task("real", None, 80, 2),
    ]
    return [HarvestConfig(base=bert, task=task, splits=SPLITS, lora=LORA, fine_tune=TUNE) for task in tasks]


@pytest.fixture(scope="module")
def heads(members) -> list[dict[str, torch.Tensor]]:
    random = HeadConfig(kind="random")
    return [fit_head(random, m.base, m.task, SPLITS, TUNE.max_length, runtime=RUNTIME) for m in members]


def changed(members: list[HarvestConfig], **fields) -> list[HarvestConfig]:
    tune = FineTuneConfig.model_validate(TUNE.model_dump() | fields)
    return [member.model_copy(update={"fine_tune": tune}) for member in members]


def plain_loop(member: HarvestConfig, head: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(w_NK after each step, losses, share of clipped steps) as one would train this run without the package."""
    tune, base = member.fine_tune, member.base
    labels_count = member.task.task.num_classes
    problem = "regression" if member.task.task.labels is None else "single_label_classification"
    model = AutoModelForSequenceClassification.from_pretrained(
        base.folder, num_labels=labels_count, problem_type=problem
    )
    model.load_state_dict(head, strict=False)
    family = FAMILIES[base.family]
    _, layout = initial_vector(model, member.lora, family.target_modules, family.block_pattern, 0)
    adapted = adapt(model, member.lora, family.target_modules, seed=tune.seed).eval()  # eval: no dropout in the base
    parameters = [p for name, p in adapted.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(parameters, lr=tune.learning_rate, weight_decay=tune.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / tune.warmup_steps))
    texts, labels = tokenize(member.task, member.splits, "train", base, tune.max_length)
    weights, losses, clipped = [], [], 0
    for step in range(tune.num_steps):
        rows = batch_rows(run_seed(member), step, tune.batch_size, len(texts))
        parts = [slice(int(texts.starts[row]), int(texts.starts[row + 1])) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence([texts.ids[part] for part in parts], batch_first=True)
        types = torch.nn.utils.rnn.pad_sequence([texts.types[part] for part in parts], batch_first=True)
        target = torch.from_numpy(labels[rows])
        target = target.float() if problem == "regression" else target.long()
        loss = adapted(input_ids=ids, attention_mask=(ids != 0).long(), token_type_ids=types, labels=target).loss
        optimizer.zero_grad()
        loss.backward()
        clipped += float(torch.nn.utils.clip_grad_norm_(parameters, tune.max_grad_norm)) > tune.max_grad_norm
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        state = {n.replace(".default", ""): p for n, p in adapted.named_parameters() if "lora_" in n}
        weights.append(layout.flatten(state))
    return torch.stack(weights), torch.tensor(losses), clipped / tune.num_steps


def test_stack_of_three_tasks_equals_the_plain_loop_of_each_alone(members, heads) -> None:
    together = FineTuning(members, heads, RUNTIME).run(RUNTIME)
    for member, head, harvest in zip(members, heads, together, strict=True):
        w_NK, losses, clipped = plain_loop(member, head)
        assert clipped > 0.2, "clipping was at work"
        torch.testing.assert_close(harvest.losses, losses, atol=2e-5, rtol=1e-5)
        moved = (w_NK - initial_weights(member)).abs().max()
        error = (harvest.w_NK - w_NK).abs().max()
        assert moved > 0.02
        assert error < 1e-4 * moved, f"{member.label}: differs by {error:.1e} after moving {moved:.1e}"
        assert harvest.steps.tolist() == list(range(1, STEPS + 1))


def test_loss_falls_on_a_task_that_can_be_learned(members, heads) -> None:
    harvest = FineTuning(changed(members[:1], num_steps=120, num_harvest=1), heads[:1], RUNTIME).run(RUNTIME)[0]
    assert harvest.losses[-20:].mean() < 0.5 * harvest.losses[:10].mean()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_group_is_bit_identical_and_other_groups_agree_within_rounding(members, heads, dropout: float) -> None:
    lora = LORA.model_copy(update={"lora_dropout": dropout})
    members = [member.model_copy(update={"lora": lora}) for member in members]
    first = FineTuning(members, heads, RUNTIME).run(RUNTIME)
    second = FineTuning(members, heads, RUNTIME).run(RUNTIME)
    alone = FineTuning(members[1:2], heads[1:2], RUNTIME).run(RUNTIME)[0]
    assert all(torch.equal(a.w_NK, b.w_NK) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(alone.w_NK, first[1].w_NK, atol=2e-5, rtol=1e-4)


def test_training_leaves_the_learning_rates_as_they_were_planned(members, heads) -> None:
    tuning = FineTuning(members, heads, RUNTIME)
    planned = tuning.rates_TS.copy()
    tuning.run(RUNTIME)
    assert (tuning.rates_TS == planned).all()


def test_runs_differ_in_order_and_share_their_start(members, heads) -> None:
    runs = [members[0].model_copy(update={"run": number}) for number in (0, 1)]
    assert torch.equal(initial_weights(runs[0]), initial_weights(runs[1]))
    own = changed(runs, same_initialization=False)
    assert not torch.equal(initial_weights(own[0]), initial_weights(own[1]))
    assert run_seed(runs[0]) != run_seed(runs[1])
    a, b = FineTuning(runs, heads[:1] * 2, RUNTIME).run(RUNTIME)
    assert not torch.equal(a.w_NK, b.w_NK)


def test_batches_are_reshuffled_epochs_with_nothing_left_out() -> None:
    rows = np.concatenate([batch_rows([1, 2], step, 8, 20) for step in range(10)])
    epochs = rows.reshape(4, 20)
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert not (epochs[0] == epochs[1]).all()
    assert not (rows == np.concatenate([batch_rows([1, 3], step, 8, 20) for step in range(10)])).all()


class Stopped(Exception):
    pass


class StopsAfter(ResumeState):
    """Saves after every step and stops the run after some, as a kill between two steps does."""

    def __init__(self, folder: Path, saves: int) -> None:
        super().__init__(folder, every_seconds=0.0)
        self.left = saves

    def save(self, tensors, numbers) -> None:
        super().save(tensors, numbers)
        self.left -= 1
        if self.left == 0:
            raise Stopped


@pytest.mark.parametrize("saves", [3, 20])
def test_resumed_run_is_bit_identical_to_an_undisturbed_one(members, heads, tmp_path: Path, saves: int) -> None:
    lora = LORA.model_copy(update={"lora_dropout": 0.2})
    members = [member.model_copy(update={"lora": lora}) for member in changed(members, num_harvest=10)]
    undisturbed = FineTuning(members, heads, RUNTIME).run(RUNTIME)
    with pytest.raises(Stopped):
        FineTuning(members, heads, RUNTIME).run(RUNTIME, StopsAfter(tmp_path, saves))
    resumed = FineTuning(members, heads, RUNTIME)
    results = resumed.run(RUNTIME, ResumeState(tmp_path))
    for a, b in zip(undisturbed, results, strict=True):
        assert torch.equal(a.w_NK, b.w_NK)
        assert torch.equal(a.losses, b.losses)


def test_loss_that_is_not_finite_names_task_step_and_remedy(members, heads) -> None:
    wild = changed(members, learning_rate=1e9, warmup_steps=0, max_grad_norm=1e9)
    with pytest.raises(UserError) as fault:
        FineTuning(wild, heads, RUNTIME).run(RUNTIME)
    text = str(fault.value)
    assert text.startswith(("task 'two': the loss of run 0 is not finite at step", "task 'real'", "task 'three'"))
    assert "lower fine_tune.learning_rate (now 1e+09)" in text
    assert 1 <= int(text.split("at step ")[1].split(";")[0]) <= STEPS


def test_harvest_every_keeps_every_so_many_steps_back_from_the_last(members, heads) -> None:
    all_steps = FineTuning(members[:1], heads[:1], RUNTIME).run(RUNTIME)[0]
    sparse = FineTuning(changed(members[:1], num_harvest=4, harvest_every=7), heads[:1], RUNTIME).run(RUNTIME)[0]
    assert sparse.steps.tolist() == [4, 11, 18, 25]
    assert torch.equal(sparse.w_NK, all_steps.w_NK[sparse.steps - 1])


def test_epochs_set_the_length_of_each_run_by_its_data(members, heads) -> None:
    """54 and 43 training examples are left after a tenth has been held out; 8 a step."""
    epochs = changed(members[:2], num_epochs=2.0, num_harvest=5)
    first, second = FineTuning(epochs, heads[:2], RUNTIME).run(RUNTIME)
    assert (len(first.losses), len(second.losses)) == (14, 11)
    assert first.steps.tolist() == [10, 11, 12, 13, 14]
    assert second.steps.tolist() == [7, 8, 9, 10, 11]
    alone = FineTuning(epochs[1:], heads[1:2], RUNTIME).run(RUNTIME)[0]
    torch.testing.assert_close(alone.w_NK, second.w_NK, atol=2e-5, rtol=1e-4)
    with pytest.raises(
        UserError, match=r"task 'two': num_harvest 20 needs 20 steps, 2.0 epochs are 14; raise num_epochs"
    ):
        FineTuning(changed(members[:1], num_epochs=2.0, num_harvest=20), heads[:1], RUNTIME)


def test_more_checkpoints_than_steps_is_refused_when_the_config_is_made() -> None:
    with pytest.raises(
        ValueError, match=r"num_harvest 30 every 2 steps needs 59 steps, num_steps is 50; raise num_steps"
    ):
        FineTuneConfig(num_steps=50, num_harvest=30, harvest_every=2)


def test_learning_rates_warm_up_and_decay() -> None:
    constant = FineTuneConfig(learning_rate=1.0, num_steps=150, warmup_steps=10).learning_rates(150)
    assert constant[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert (constant[10:] == 1.0).all()
    linear = FineTuneConfig(
        learning_rate=1.0, num_steps=150, warmup_steps=0, lr_scheduler_type="linear"
    ).learning_rates(150)
    assert linear[0] == 1.0
    assert linear[75] == pytest.approx(0.5)
    assert linear[-1] == pytest.approx(1 / 150)
    cosine = FineTuneConfig(learning_rate=1.0, warmup_steps=0, lr_scheduler_type="cosine").learning_rates(200)
    assert cosine == pytest.approx(0.5 * (1 + np.cos(np.pi * np.arange(200) / 200)))
