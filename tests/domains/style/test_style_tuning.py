"""Stacked adapters and stacked fine-tuning against PEFT one at a time; groups, harvest, resumption, faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from style_bases import encoded_style, injected, saved_tiny_base

from cpdiff_core.artifacts import ResumeState
from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.domains.style import stack as style_stack
from cpdiff_core.domains.style.base import Captions, StyleBase, load_transformer, spec_of
from cpdiff_core.domains.style.fine_tuning import (
    StyleFineTuneConfig,
    StyleFineTuning,
    StyleHarvestConfig,
)
from cpdiff_core.domains.style.sampling import ImageSamplingConfig, draw_prompts, sample_images
from cpdiff_core.domains.style.stack import StackedPixArt, build_stack
from cpdiff_core.lora.layout import LoraSpec

CPU, QUIET = torch.device("cpu"), RuntimeConfig(device="cpu", progress=False)
LORA = LoraSpec(rank=2, lora_alpha=6.0)


@pytest.fixture
def base(tmp_path: Path) -> StyleBase:
    folder = tmp_path / "base"
    folder.mkdir()
    return saved_tiny_base(folder)[0]


def member(base: StyleBase, root: Path, name: str, seed: int = 0, **changes: object) -> StyleHarvestConfig:
    values = {"num_steps": 5, "batch_size": 4, "warmup_steps": 2, "num_harvest": 3, "harvest_every": 2} | changes
    return StyleHarvestConfig(
        base=base, style=name, encoded=encoded_style(root, name, seed=seed), lora=LORA,
        fine_tune=StyleFineTuneConfig(**values),  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("merged", [False, True])
def test_stack_of_three_equals_peft_one_at_a_time(
    base: StyleBase, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_stack = build_stack(base, Path(), LORA, CPU, torch.float32)
    stack = StackedPixArt(load_transformer(base, Path()), plain_stack.layout, LORA.scaling, merged)
    monkeypatch.setattr(style_stack, "MERGE_TOKENS", 1)
    merges = []
    monkeypatch.setattr(torch, "baddbmm", lambda *a, real=torch.baddbmm, **k: (merges.append(1), real(*a, **k))[1])
    torch.manual_seed(0)
    w_SK = 0.3 * torch.randn(3, stack.layout.num_parameters)
    x, t = torch.randn(6, 3, 8, 8), torch.tensor([5, 900, 30, 400, 2, 77])
    captions = Captions(torch.randn(6, 12, 384), (torch.rand(6, 12) > 0.4).float())
    with torch.no_grad():
        found = stack(w_SK, x, t, captions)
    assert bool(merges) == merged
    gradients = []
    for one in (plain_stack, stack):  # a stack that trains keeps the adapters apart
        merges.clear()
        wanted = w_SK.clone().requires_grad_()
        out = one(wanted, x, t, captions)
        torch.testing.assert_close(out.detach(), found, atol=1e-4, rtol=1e-4)
        gradients.append(torch.autograd.grad((out**2).sum(), wanted)[0])
        assert merges == []
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 1e-3
    apart = 0.0
    for s in range(3):
        rows = slice(2 * s, 2 * s + 2)
        with torch.no_grad():
            expected = injected(base, w_SK[s], LORA)(
                x[rows], encoder_hidden_states=captions.states_PTE[rows], timestep=t[rows],
                encoder_attention_mask=captions.mask_PT[rows],
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample  # fmt: skip
        torch.testing.assert_close(found[rows], expected, atol=1e-4, rtol=1e-4)
        plain = stack(torch.zeros_like(w_SK[:1]), x[rows], t[rows], captions.rows(torch.arange(6)[rows]))
        apart = max(apart, float((plain - expected).abs().max()))
    assert apart > 0.1  # the adapters do something


def test_stacked_training_equals_peft_and_torch_one_at_a_time(base: StyleBase, tmp_path: Path) -> None:
    members = [member(base, tmp_path, name, seed) for seed, name in enumerate(("ink", "chalk"))]
    tuning = StyleFineTuning(members, tmp_path, QUIET)
    start_K, process = tuning.w_SK[0].clone(), tuning.data.process
    inputs = [tuning.inputs_of(step) for step in range(5)]
    harvests = tuning.run(QUIET)
    for s in range(2):
        model = injected(base, start_K, LORA)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0)
        for rows, flips, times, noise, numbers in inputs:
            mine = slice(4 * s, 4 * s + 4)
            x = tuning.data.images[rows[mine]].float() / 127.5 - 1
            x = torch.stack([image.flip(2) if flip else image for image, flip in zip(x, flips[mine], strict=True)])
            alpha = process.alphas_cumprod[times[mine]].view(-1, 1, 1, 1)
            captions = tuning.data.captions.rows(tuning.data.caption_of[rows[mine]])
            prediction = model(
                alpha.sqrt() * x + (1 - alpha).sqrt() * noise[mine], encoder_hidden_states=captions.states_PTE,
                timestep=times[mine], encoder_attention_mask=captions.mask_PT,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample  # fmt: skip
            velocity = alpha.sqrt() * noise[mine] - (1 - alpha).sqrt() * x
            optimizer.param_groups[0]["lr"] = float(numbers[0])
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(prediction, velocity).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        expected = torch.cat([value.flatten() for value in get_peft_model_state_dict(model).values()])
        # AdamW divides by the root of tiny squares: the first steps amplify rounding.
        torch.testing.assert_close(harvests[s].w_NK[-1], expected, atol=2e-4, rtol=1e-3)
        assert float((expected - start_K).abs().max()) > 1e-3
        assert harvests[s].steps.tolist() == [1, 3, 5]


def test_a_run_does_not_depend_on_its_group(base: StyleBase, tmp_path: Path) -> None:
    members = [member(base, tmp_path, name, seed) for seed, name in enumerate(("ink", "chalk", "oil"))]
    together = StyleFineTuning(members, tmp_path, QUIET).run(QUIET)[1]
    alone = StyleFineTuning(members[1:2], tmp_path, QUIET).run(QUIET)[0]
    torch.testing.assert_close(together.w_NK, alone.w_NK, atol=1e-5, rtol=1e-4)
    again = StyleFineTuning(members, tmp_path, QUIET).run(QUIET)[1]
    assert torch.equal(together.w_NK, again.w_NK)


def test_killed_training_goes_on_to_the_same_end(base: StyleBase, tmp_path: Path) -> None:
    members = [member(base, tmp_path, "ink")]
    whole = StyleFineTuning(members, tmp_path, QUIET).run(QUIET)[0]
    state = ResumeState(tmp_path / "resume", every_seconds=0.0)

    class Killed(Exception):
        pass

    broken = StyleFineTuning(members, tmp_path, QUIET)
    step = broken.train_step

    def dying(*inputs: torch.Tensor) -> torch.Tensor:
        if broken.step == 3:
            raise Killed
        return step(*inputs)

    broken.train_step = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        broken.run(QUIET, state)
    continued = StyleFineTuning(members, tmp_path, QUIET)
    harvest = continued.run(QUIET, state)[0]
    assert torch.equal(harvest.w_NK, whole.w_NK)
    assert torch.equal(harvest.losses, whole.losses)


def test_style_smaller_than_the_batch_is_named(base: StyleBase, tmp_path: Path) -> None:
    config = member(base, tmp_path, "ink", batch_size=16)
    with pytest.raises(UserError, match=r"style 'ink': 12 training images are fewer than fine_tune.batch_size 16"):
        StyleFineTuning([config], tmp_path, QUIET)


def test_loss_that_is_not_finite_names_style_and_step(base: StyleBase, tmp_path: Path) -> None:
    config = member(base, tmp_path, "ink", learning_rate=1e30, warmup_steps=0)
    with pytest.raises(UserError, match=r"style 'ink': the loss of run 0 is not finite at step [2-5]; lower"):
        StyleFineTuning([config], tmp_path, QUIET).run(QUIET)


def test_more_checkpoints_than_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="num_harvest 64 every 10 steps needs 631 steps, num_steps is 100"):
        StyleFineTuneConfig(num_steps=100)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++"])
def test_images_do_not_depend_on_the_batch(base: StyleBase, guidance: float, scheduler: str) -> None:
    stack, spec = build_stack(base, Path(), LORA, CPU, torch.float32), spec_of(base, Path())
    torch.manual_seed(0)
    w_VK = 0.3 * torch.randn(3, stack.layout.num_parameters)
    captions = Captions(torch.randn(6, 12, 384), torch.ones(6, 12))
    config = ImageSamplingConfig(
        num_images=5, num_inference_steps=3, guidance_scale=guidance, scheduler=scheduler
    )

    def draw(rows: slice, **runtime: object) -> torch.Tensor:
        options = QUIET.model_copy(update=runtime)
        return sample_images(stack, spec, w_VK[rows], captions, config, 0, CPU, "", options)

    every = draw(slice(0, 3))
    assert every.shape == (3, 5, 3, 8, 8)
    torch.testing.assert_close(draw(slice(1, 2))[0], every[1], atol=1e-4, rtol=1e-4)
    few = draw(slice(0, 3), tokens_per_batch=64, adapters_per_batch=2)
    torch.testing.assert_close(few, every, atol=1e-4, rtol=1e-4)
    other = sample_images(stack, spec, w_VK[:1], captions, config, 1, CPU, "", QUIET)
    assert (other[0] - every[0]).abs().max() > 0.1


def test_prompts_follow_the_mix_of_classes() -> None:
    prompts = draw_prompts(["dog"] * 70 + ["house"] * 25 + ["tree"] * 5, 10)
    assert sorted(prompts) == ["dog"] * 7 + ["house"] * 2 + ["tree"] or sorted(prompts) == ["dog"] * 7 + ["house"] * 3
    assert len(draw_prompts(["a", "b", "c"], 256)) == 256
