"""What the benchmark measures of images: training the tiny base, LoRA on styles, and sampling with many adapters.

Weights are random, of the shape of the 64 px base (of the 32 px one on a CPU), since time does not depend on them; images
are the excerpt's. Every row stands beside the plain loop of diffusers and PEFT on the same images in the same run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpdiff_core.artifacts import Artifact, ResumeState, seal
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.style.base import (
    BLOCK_PATTERN,
    TARGET_MODULES,
    TEMPLATES,
    Captions,
    StyleBase,
    caption,
    encode_captions,
    load_transformer,
    spec_of,
    to_model_range,
)
from cpdiff_core.domains.style.encoding import encode_style
from cpdiff_core.domains.style.fine_tuning import READ_EVERY, StyleFineTuneConfig, StyleFineTuning, StyleHarvestConfig
from cpdiff_core.domains.style.pretraining import caption_rows, pretrain, save_base
from cpdiff_core.domains.style.sampling import ImageSamplingConfig, sample_images
from cpdiff_core.domains.style.stack import build_stack
from cpdiff_core.domains.style.styles import Style, StyleSplits, excerpt, resolve_style, split_images
from cpdiff_core.generator.diffusion import build_scheduler
from cpdiff_core.generator.training import BLOCK_STEPS, TrainingConfig
from cpdiff_core.lora.layout import LoraSpec, adapt, layout_of
from cpdiff_core.measure import Measurement, seconds, synchronize
from cpdiff_core.style_experiments import BASE_32, BASE_64, QUICKSTART_STYLE

LORA = LoraSpec(rank=4, lora_alpha=4.0)
_Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Captions]
STACKED = (("stacked", False), ("stacked, compiled", True))


class BlockClock(ResumeState):
    """Takes the place of a resume state to note when each block of steps has ended; the losses have been read by then."""

    def __init__(self) -> None:
        super().__init__(Path("nowhere"))
        self.ended: list[float] = []

    def due(self) -> bool:
        self.ended.append(time.perf_counter())
        return False

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        return None

    def seconds_per_block(self) -> float:
        """Without the first block, in which programs are compiled and captured."""
        return (self.ended[-1] - self.ended[0]) / (len(self.ended) - 1)


class StyleBench:
    """The shared parts: sizes, images, captions and a base of random weights in a folder of its own."""

    def __init__(self, device: torch.device, rate: float, runtime: RuntimeConfig, folder: Path) -> None:
        self.device, self.rate, self.runtime, self.folder = device, rate, runtime, folder
        self.gpu = device.type == "cuda"
        self.config = BASE_64 if self.gpu else BASE_32
        self.precision: Any = "bf16" if self.gpu else "fp32"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        size = self.config.size
        self.tokens = (size.sample_size // size.patch_size) ** 2
        self.photos = split_images(resolve_style(excerpt("photo"), None), StyleSplits(), "train", size.sample_size)
        texts = [caption(name, template) for name in caption_rows(self.photos)[0] for template in TEMPLATES]
        self.captions = encode_captions(StyleBase(kind="tiny"), Path(), texts, device)
        save_base(size.build(), folder / "base")
        self.base = StyleBase(kind="tiny", folder=str(folder / "base"))

    def share(self, images: float, seconds: float, passes: int) -> float:
        """Share of the matrix rate: passes x 2 x the blocks' matrices x tokens of the images, per second."""
        model = load_transformer(self.base, self.folder)
        dense = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "transformer_blocks" in name)
        return passes * 2 * dense * self.tokens * images / seconds / self.rate

    def encoded(self, style: Style) -> Artifact:
        """The images of a style as fine-tuning takes them."""
        artifact = Artifact(stage="encoded", fingerprint=style.name)
        target = artifact.under(self.folder)
        if not target.is_dir():
            target.mkdir(parents=True)
            encode_style(target, self.base, resolve_style(style, None), StyleSplits(), self.folder, self.runtime)
            seal(target)
        return artifact


def measure_styles(device: torch.device, rate: float, runtime: RuntimeConfig, steps: int) -> list[Measurement]:
    """All three, each with the plain loop first."""
    with tempfile.TemporaryDirectory() as folder:
        bench = StyleBench(device, rate, runtime, Path(folder))
        return [*_base(bench, steps), *_lora(bench, steps), *_sampling(bench)]


def _base(bench: StyleBench, steps: int) -> list[Measurement]:
    """Steps of pretraining: the plain loop, the product's own eagerly, and as it runs them."""
    blocks = max(1, steps // BLOCK_STEPS)
    small = {} if bench.gpu else {"batch_size": 2, "precision": "float32"}
    training = bench.config.training.model_copy(update={"steps": BLOCK_STEPS * (blocks + 1), **small})
    config = bench.config.model_copy(update={"training": training})
    work, size = f"style base, {config.size.sample_size} px, {training.batch_size} images a step", training.batch_size
    rows = [_row(bench, f"{work}, plain loop by diffusers", _plain_base(bench, training, steps), size, 3, None)]
    modes = (("eager", False), ("blocks compiled, one CUDA graph per step", None))
    for name, compiled in modes if bench.gpu else modes[:1]:
        clock = BlockClock()
        runtime = bench.runtime.model_copy(update={"compile": compiled})
        pretrain(config, bench.photos, bench.captions, seed=0, device=bench.device, runtime=runtime, resume=clock)
        spent = clock.seconds_per_block() / BLOCK_STEPS
        rows.append(_row(bench, f"{work}, {name}", spent, size, 3, rows[0]))
    return rows


def _plain_base(bench: StyleBench, training: TrainingConfig, steps: int) -> float:
    """Seconds of a step of pretraining by diffusers: random draws, and the average of the weights."""
    model: Any = bench.config.size.build().to(bench.device)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    images, captions = to_model_range(bench.photos.images_NCHW).to(bench.device), bench.captions.to(bench.device)
    process = build_scheduler(spec_of(bench.base, bench.folder).process, "ddpm")
    process.alphas_cumprod = process.alphas_cumprod.to(bench.device)
    size = training.batch_size

    def drawn(step: int) -> _Drawn:
        x_BCHW = images[torch.randint(len(images), (size,), device=bench.device)]
        t_B = torch.randint(len(process.alphas_cumprod), (size,), device=bench.device)
        noise_BCHW = torch.randn_like(x_BCHW)
        return x_BCHW, t_B, noise_BCHW, captions.rows(torch.randint(len(captions.mask_PT), (size,), device=bench.device))

    def averaged() -> None:
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), 1 - (training.ema_decay or 0.0))

    return _plain_training(bench, model, process, drawn, steps, training.learning_rate, training.max_grad_norm, averaged)


def _plain_training(
    bench: StyleBench, model: Any, process: Any, drawn: Callable[[int], _Drawn],
    steps: int, learning_rate: float, max_grad_norm: float, after: Callable[[], None] = lambda: None,
) -> float:  # fmt: skip
    """Seconds of a step of training as it is usually written: autocast, fused AdamW, clipping, then `after`.

    drawn: (images, their times, the noise, the captions) of a step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, fused=bench.gpu)
    begin, warmup = 0.0, 2
    for step in range(steps + warmup):
        if step == warmup:
            synchronize(bench.device)
            begin = time.perf_counter()
        x_BCHW, t_B, noise_BCHW, captions = drawn(step)
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.gpu):
            out = _plain(model, process.add_noise(x_BCHW, noise_BCHW, t_B), t_B, captions)
        loss = nn.functional.mse_loss(out.float(), process.get_velocity(x_BCHW, noise_BCHW, t_B))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
        after()
    synchronize(bench.device)
    return (time.perf_counter() - begin) / steps


def _lora(bench: StyleBench, steps: int) -> list[Measurement]:
    """Steps of LoRA on four styles: one after another by PEFT, stacked, stacked and compiled."""
    size = 64 if bench.gpu else 4
    blocks = max(2, steps // READ_EVERY) if bench.gpu else 3
    num_steps = READ_EVERY * (blocks + 1) if bench.gpu else blocks + 1  # a CPU looks at the loss after every step
    fine_tune = StyleFineTuneConfig(num_steps=num_steps, num_harvest=1, batch_size=size, precision=bench.precision)
    runs = [
        StyleHarvestConfig(base=bench.base, style=style.name, encoded=bench.encoded(style), lora=LORA, fine_tune=fine_tune)
        for style in QUICKSTART_STYLE.styles
    ]
    each = _plain_lora(bench, runs[0], steps if bench.gpu else blocks)
    work = f"LoRA on {len(runs)} styles x {size} images a step, one after another through PEFT"
    rows = [_row(bench, work, each * len(runs), size * len(runs), 2, None)]
    for name, compiled in STACKED if bench.gpu else STACKED[:1]:
        clock = BlockClock()
        StyleFineTuning(runs, bench.folder, bench.runtime.model_copy(update={"compile": compiled})).run(bench.runtime, clock)
        spent = clock.seconds_per_block() / (READ_EVERY if bench.gpu else 1)
        work = f"LoRA on {len(runs)} styles x {size} images a step, {name}"
        rows.append(_row(bench, work, spent, size * len(runs), 2, rows[0]))
    return rows


def _plain_lora(bench: StyleBench, run: StyleHarvestConfig, steps: int) -> float:
    """Seconds of a step on one style by diffusers and PEFT: the same images and noise as ours."""
    tuning = StyleFineTuning([run], bench.folder, bench.runtime)
    data = tuning.data
    model: Any = adapt(load_transformer(bench.base, bench.folder), LORA, TARGET_MODULES, 0)
    model.to(bench.device)
    captions = data.captions.to(bench.device)

    def drawn(step: int) -> _Drawn:
        rows, flips, times, noise, _ = tuning.inputs_of(step)
        images = to_model_range(data.images[rows])
        images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
        return images, times, noise, captions.rows(data.caption_of[rows])

    fine_tune = run.fine_tune
    return _plain_training(bench, model, data.process, drawn, steps, fine_tune.learning_rate, fine_tune.max_grad_norm)


def _plain(model: Any, x: torch.Tensor, t: torch.Tensor, captions: Captions) -> torch.Tensor:
    return model(  # type: ignore[no-any-return]
        x, encoder_hidden_states=captions.states_PTE, timestep=t, encoder_attention_mask=captions.mask_PT,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
    )[0]  # fmt: skip


def _sampling(bench: StyleBench) -> list[Measurement]:
    """Images of several adapters with guidance: each loaded into PEFT, and in one batch."""
    from peft import set_peft_model_state_dict

    num, count = (8, 256) if bench.gpu else (2, 8)
    config = ImageSamplingConfig(num_images=count, num_inference_steps=25 if bench.gpu else 2)
    model: Any = adapt(load_transformer(bench.base, bench.folder), LORA, TARGET_MODULES, 0).to(bench.device).eval()
    layout = layout_of(model, BLOCK_PATTERN)
    w_VK = 0.02 * torch.randn(num, layout.num_parameters, generator=torch.Generator().manual_seed(0))
    prompts = torch.arange(count) % (len(bench.captions.mask_PT) - 1)
    captions = bench.captions.rows(torch.cat([prompts, torch.tensor([len(bench.captions.mask_PT) - 1])]))
    spec = spec_of(bench.base, bench.folder)

    @torch.no_grad()
    def plain() -> None:
        both = captions.to(bench.device).rows(torch.cat([torch.arange(count), torch.full((count,), count)]))
        for w_K in w_VK:
            set_peft_model_state_dict(model, layout.unflatten(w_K))
            scheduler = build_scheduler(spec.process, config.scheduler)
            scheduler.set_timesteps(config.num_inference_steps, device=bench.device)
            x = torch.randn(count, spec.channels, spec.size, spec.size, device=bench.device)
            for t in scheduler.timesteps:
                with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.gpu):
                    out = _plain(model, torch.cat([x, x]), t.expand(2 * count), both).float()
                with_text, without = out.chunk(2)
                x = scheduler.step(without + config.guidance_scale * (with_text - without), t, x).prev_sample

    passes = num * count * config.num_inference_steps * 2
    work = f"{num} adapters x {count} images, {config.num_inference_steps} guided steps"
    rows = [_row(bench, f"{work}, one after another through PEFT", seconds(bench.device, plain, repeats=1), passes, 1, None)]
    for name, compiled in STACKED if bench.gpu else STACKED[:1]:
        stack = build_stack(bench.base, bench.folder, LORA, bench.device, bench.dtype, compiled)

        def ours(stack: Any = stack) -> None:
            sample_images(stack, spec, w_VK, captions, config, 0, bench.device, "", bench.runtime)

        rows.append(_row(bench, f"{work}, {name}", seconds(bench.device, ours, repeats=3), passes, 1, rows[0]))
    return rows


def _row(
    bench: StyleBench, work: str, spent: float, images: float, passes: int, reference: Measurement | None
) -> Measurement:
    row = Measurement(work=work, ours=spent, unit="s", rate_share=bench.share(images, spent, passes))
    if reference is None:
        return row
    name = reference.work.rsplit(", ", 1)[-1]
    return row.model_copy(update={"reference": reference.ours, "reference_name": name, "ratio": reference.ours / spent})
