"""What a benchmark measures, part by part: every row beside its reference in the same run.

Ratios count, absolute times depend on the card. The loops that are timed stand in `measure`; the flow that runs the
parts and writes them down is `flows/benchmark.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from cpdiff_core import measure
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.base_models import BaseModel, BaseModelConfig, cached_classifier, resolve_base_model
from cpdiff_core.domains.glue.data import ResolvedTask, SplitConfig, resolve_task, tokenize
from cpdiff_core.domains.glue.fine_tuning import FineTuneConfig, FineTuning, HarvestConfig
from cpdiff_core.domains.glue.heads import HeadConfig, initial_head
from cpdiff_core.domains.glue.stacks import device_of, forget_stacks
from cpdiff_core.domains.glue.text_tasks import GLUE_TASKS, excerpt
from cpdiff_core.experiments import ExperimentConfig, experiment
from cpdiff_core.generator.autoencoder import ParameterAutoencoder, fit_autoencoder
from cpdiff_core.generator.conditions import one_hot_conditions
from cpdiff_core.generator.diffusion import LatentDiffusion, SamplingConfig, fit_diffusion
from cpdiff_core.lora.layout import LoraSpec
from cpdiff_core.measure import Measurement
from cpdiff_core.style_benchmarks import measure_styles

Part = Literal["harvest", "harvest_large", "scoring", "generator", "style", "quickstart_share", "growth", "several_gpus"]
ALL_PARTS: tuple[Part, ...] = (
    "harvest", "harvest_large", "scoring", "generator", "style", "quickstart_share", "growth", "several_gpus"
)  # fmt: skip
EAGER_STEPS = 200
"""Steps of the eager diffusion training that are timed; the whole training is so many times longer."""


class Bench:
    """What all parts share: the base model, the tasks, the device and its measured matrix rate."""

    def __init__(self, base_model: BaseModelConfig, runtime: RuntimeConfig, steps: int | None) -> None:
        self.runtime = runtime.model_copy(update={"progress": False})
        self.device = device_of(runtime)
        self.gpu = self.device.type == "cuda"
        self.precision: Literal["fp32", "bf16"] = "bf16" if self.gpu else "fp32"
        self.base: BaseModel = resolve_base_model(base_model)
        # On a CPU the six tasks take longer than a person waits; the excerpt takes minutes.
        data_dir = Path(runtime.data_dir) if self.gpu and runtime.data_dir and Path(runtime.data_dir, "glue").is_dir() else None
        tasks = GLUE_TASKS.values() if data_dir else [excerpt(name) for name in ("sst2", "cola", "stsb")]
        self.tasks: list[ResolvedTask] = [resolve_task(task, data_dir) for task in tasks]
        self.rate = self.matrix_rate()
        self.steps = steps or (100 if self.gpu else 10)

    def members(self, num_runs: int = 1, rank: int = 1, batch_size: int = 32, num_harvest: int = 20) -> list[HarvestConfig]:
        fine_tune = FineTuneConfig(precision=self.precision, num_steps=4000, batch_size=batch_size, num_harvest=num_harvest)
        return [
            HarvestConfig(base=self.base, task=task, splits=SplitConfig(), lora=LoraSpec(rank=rank), fine_tune=fine_tune, run=run)
            for task in self.tasks
            for run in range(num_runs)
        ]

    def head(self, member: HarvestConfig) -> dict[str, torch.Tensor]:
        return initial_head(HeadConfig(), self.base, member.task.task.num_classes)

    def tuning(self, members: Sequence[HarvestConfig], compiled: bool = False) -> FineTuning:
        forget_stacks()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        runtime = self.runtime.model_copy(update={"compile": compiled})
        return FineTuning(members, [self.head(member) for member in members], runtime)

    def matrix_rate(self) -> float:
        """The device's own rate of a large matrix product, FLOP/s."""
        return measure.matrix_rate(self.device, torch.bfloat16 if self.gpu else torch.float32)

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self.gpu else None

    def share(
        self, tokens: int, seconds: float, passes: int, rate: float | None = None, *, stacked: bool = True
    ) -> float:
        """Share of the device's matrix rate (`rate`, if it is another than at the start): `passes` x 2 x dense parameters x
        unpadded tokens per second, without what a stack need not compute."""
        classifier, _ = cached_classifier(self.base, 2)
        return passes * 2 * measure.dense_parameters(classifier, stacked=stacked) * tokens / seconds / (rate or self.rate)


def harvest(bench: Bench) -> list[Measurement]:
    """Adapter-steps per second: the plain loop per task, one run of every task, five runs of every task."""
    rows, plain_seconds, steps = [], 0.0, bench.steps
    for member in bench.members():
        texts, labels = tokenize(member.task, member.splits, "train", bench.base, member.fine_tune.max_length)
        target = torch.from_numpy(labels).float().to(bench.device)
        spent, tokens, _ = measure.plain_loop(
            member, bench.head(member), texts, target, bench.device, steps, autocast=bench.gpu, warmup=max(2, steps // 4)
        )
        plain_seconds += spent / steps
        rows.append(
            Measurement(
                work=f"plain loop, {member.task.name}",
                ours=steps / spent,
                unit="adapter-steps/s",
                rate_share=bench.share(tokens, spent, 2, stacked=False),
                note=f"{tokens / spent:.0f} tokens/s",
            )
        )
    plain = len(bench.tasks) / plain_seconds
    compared = {"reference": plain, "reference_name": "plain loop, one task after another"}
    stacked = _stacked(bench, "stacked harvest", (1, 5), rank=1)
    return rows + [row.model_copy(update=compared | {"ratio": row.ours / plain}) for row in stacked]


def harvest_large(bench: Bench) -> list[Measurement]:
    """The share of the matrix rate on the base model given, r=4: one run and five of every task, eager graph and compiled."""
    compared = {"reference": bench.rate / 1e12, "reference_name": "TFLOP/s of a large matrix product"}
    stacked = _stacked(bench, f"stacked harvest, {bench.base.name}", (1, 5) if bench.gpu else (1,), rank=4)
    return [row.model_copy(update=compared) for row in stacked]


def _stacked(bench: Bench, work: str, runs: Sequence[int], rank: int) -> list[Measurement]:
    """Every task so many times in one stack, on a GPU compiled as well."""
    rows = []
    for num_runs in runs:
        for compiled in (False, True) if bench.gpu else (False,):
            members = bench.members(num_runs, rank)
            spent, tokens = measure.stacked_loop(bench.tuning(members, compiled), bench.steps, capture=bench.gpu)
            rows.append(
                Measurement(
                    work=f"{work}, {len(bench.tasks)} tasks x {num_runs} runs, r={rank}{', compiled' if compiled else ''}",
                    ours=bench.steps * len(members) / spent,
                    unit="adapter-steps/s",
                    rate_share=bench.share(tokens, spent, 2),
                    peak_gib=bench.peak_gib(),
                    note=f"{tokens / spent:.0f} tokens/s",
                )
            )
    return rows


def scoring(bench: Bench) -> list[Measurement]:
    """Many adapters on a validation set in stacked passes, against loading each into PEFT.

    On a GPU they are 170: 150 checkpoints and 20 candidates.
    """
    forget_stacks()
    member = bench.members()[0]
    texts, _ = tokenize(member.task, member.splits, "report", bench.base, member.fine_tune.max_length)
    tuning = bench.tuning([member])
    generator = torch.Generator().manual_seed(0)
    count, few = (170, 6) if bench.gpu else (8, 4)
    if not bench.gpu:
        texts = texts.take(torch.arange(64))
    w_VK = 0.02 * torch.randn(count, tuning.stack.layout.num_parameters, generator=generator)
    head = bench.head(member)
    ours, logits = measure.stacked_scoring(member, head, w_VK, texts, bench.runtime)
    plain, reference = measure.plain_scoring(member, head, w_VK[:few], texts, bench.device)
    agree = float((logits[:few].argmax(-1) == reference.argmax(-1)).float().mean())
    tokens = int(texts.lengths.sum()) * len(w_VK)
    return [
        Measurement(
            work=f"score {count} adapters on {len(texts)} examples, {member.task.name} validation",
            ours=ours,
            unit="s",
            reference=plain / few * len(w_VK),
            reference_name=f"PEFT, one adapter at a time ({few} measured, x {len(w_VK) / few:.1f})",
            ratio=plain / few * len(w_VK) / ours,
            rate_share=bench.share(tokens, ours, 1),
            peak_gib=bench.peak_gib(),
            note=f"same class for {agree:.2%} of predictions",
        )
    ]


def _vectors(bench: Bench) -> tuple[torch.Tensor, torch.Tensor]:
    """A real harvest of a few steps, normalised: 150 checkpoints per task."""
    # On a CPU steps of 32 texts would take longer than what is timed.
    tuning = bench.tuning(bench.members(batch_size=32 if bench.gpu else 4, num_harvest=150))
    measure.stacked_loop(tuning, 150, capture=bench.gpu)
    w_VK = tuning.ring_SNK.flatten(0, 1).cpu()
    task_V = torch.arange(len(bench.tasks)).repeat_interleave(150)
    return (w_VK - w_VK.mean()) / w_VK.std(), task_V


def generator(bench: Bench, config: ExperimentConfig) -> list[Measurement]:
    """Autoencoder and diffusion at r=1: eager float32, captured, compiled and captured. Then sampling."""
    w_VK, task_V = _vectors(bench)
    y_QPE = one_hot_conditions(len(bench.tasks))
    rows, reference = [], None
    condition = config.condition.model_copy()
    y_QPE = torch.nn.functional.pad(y_QPE, (0, 384 - y_QPE.shape[-1]))
    modes: list[tuple[str, bool | None]] = [("eager", False)]
    modes += [("one CUDA graph per step", None), ("compiled, one CUDA graph per step", True)] if bench.gpu else []
    for name, compiled in modes:
        runtime = bench.runtime.model_copy(update={"compile": compiled})
        start = time.perf_counter()
        autoencoder, _ = fit_autoencoder(config.autoencoder, w_VK, task_V, seed=0, device=bench.device, runtime=runtime)
        measure.synchronize(bench.device)
        middle = time.perf_counter()
        z_VCL = autoencoder.encode(w_VK.to(bench.device))
        training = config.diffusion.training
        factor = training.steps / EAGER_STEPS if compiled is False and bench.gpu else 1.0
        shortened = training.model_copy(update={"steps": round(training.steps / factor)})
        diffusion, losses = fit_diffusion(
            config.diffusion.model_copy(update={"training": shortened}),
            condition,
            z_VCL,
            task_V,
            y_QPE,
            seed=0,
            device=bench.device,
            runtime=runtime,
        )
        measure.synchronize(bench.device)
        spent = (middle - start) + (time.perf_counter() - middle) * factor
        reference = reference or spent
        name += f" (diffusion: {shortened.steps} steps measured, x {factor:.0f})" if factor > 1 else ""
        rows.append(
            Measurement(
                work=f"autoencoder + diffusion training, {name}",
                ours=spent,
                unit="s",
                reference=reference,
                reference_name="eager, float32",
                ratio=reference / spent,
                peak_gib=bench.peak_gib(),
                note=f"autoencoder {middle - start:.1f} s; last loss {float(losses[-100:].mean()):.4f}",
            )
        )
    num, y_QE, last = 20, y_QPE[:, 0], None
    for scheduler, steps in (
        (("ddpm", 1000), ("ddim", 50), ("dpmsolver++", 20)) if bench.gpu else (("ddim", 50), ("dpmsolver++", 20))
    ):
        sampling = SamplingConfig(scheduler=scheduler, num_inference_steps=steps)
        spent = measure.seconds(
            bench.device,
            partial(_draw, autoencoder, diffusion, y_QE, num, sampling),
            repeats=1 if steps > 100 else 5,
        )
        last = last or spent
        rows.append(
            Measurement(
                work=f"{num} candidates x {len(bench.tasks)} tasks, {scheduler}, {steps} steps, decoded",
                ours=spent,
                unit="s",
                reference=last,
                reference_name="the slowest sampler above",
                ratio=last / spent,
            )
        )
    return rows


def _draw(
    autoencoder: ParameterAutoencoder, diffusion: LatentDiffusion, y_QE: torch.Tensor, num: int, sampling: SamplingConfig
) -> torch.Tensor:
    return autoencoder.decode(diffusion.sample(y_QE, num, 0, sampling).flatten(0, 1))


def several_gpus(bench: Bench) -> list[Measurement]:
    """The same runs on one GPU and divided among all, one thread each, as `harvest_together` does."""
    if torch.cuda.device_count() < 2:
        return []
    rows = []
    for num_runs in (1, 5):
        members = bench.members(num_runs)
        one = bench.tuning(members)
        alone, _ = measure.stacked_loop(one, bench.steps, capture=True)
        forget_stacks()
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        parts = [members[i :: len(devices)] for i in range(len(devices))]
        tunings = [
            FineTuning(part, [bench.head(m) for m in part], bench.runtime.model_copy(update={"device": device}))
            for part, device in zip(parts, devices, strict=True)
        ]
        with ThreadPoolExecutor(len(devices)) as pool:
            shares = [pool.submit(measure.stacked_loop, tuning, bench.steps, True) for tuning in tunings]
            together = max(share.result()[0] for share in shares)
        rows.append(
            Measurement(
                work=f"{len(members)} adapters on {len(devices)} GPUs",
                ours=bench.steps * len(members) / together,
                unit="adapter-steps/s",
                reference=bench.steps * len(members) / alone,
                reference_name="the same on one GPU",
                ratio=alone / together,
            )
        )
    return rows


def quickstart_share(bench: Bench) -> list[Measurement]:
    """The quickstart's own training step and scoring pass, unchanged, as a share of the device's matrix rate."""
    config = experiment("quickstart")
    members = [
        HarvestConfig(
            base=bench.base, task=resolve_task(task, None), splits=config.splits, lora=config.lora, fine_tune=config.fine_tune
        )
        for task in config.tasks
    ]
    tuning = bench.tuning(members)
    share, spent, tokens = _beside_the_rate(bench, lambda: measure.stacked_loop(tuning, bench.steps, capture=bench.gpu), 2)
    rows = [
        Measurement(
            work=f"quickstart, training step, {len(members)} tasks x {config.fine_tune.batch_size} texts",
            ours=spent / bench.steps,
            unit="s",
            rate_share=share,
            peak_gib=bench.peak_gib(),
            note=f"{tokens / spent:.0f} tokens/s",
        )
    ]
    member = members[0]
    texts, _ = tokenize(member.task, member.splits, "report", bench.base, config.fine_tune.max_length)
    count = config.sampling.num_candidates if bench.gpu else 5
    w_VK = 0.02 * torch.randn(count, tuning.stack.layout.num_parameters, generator=torch.Generator().manual_seed(0))
    forget_stacks()
    tokens = int(texts.lengths.sum()) * count

    def score() -> tuple[float, int]:
        return measure.stacked_scoring(member, bench.head(member), w_VK, texts, bench.runtime)[0], tokens

    share, spent, tokens = _beside_the_rate(bench, score, 1)
    rows.append(
        Measurement(
            work=f"quickstart, scoring {count} candidates on {len(texts)} examples of {member.task.name}",
            ours=spent,
            unit="s",
            rate_share=share,
            peak_gib=bench.peak_gib(),
            note=f"{tokens / spent:.0f} tokens/s",
        )
    )
    return rows


def _beside_the_rate(bench: Bench, body: Callable[[], tuple[float, int]], passes: int) -> tuple[float, float, int]:
    """(share, seconds, tokens) of `body`, the median of three. The matrix rate, which on a shared CPU changes from minute to
    minute, is measured before and after each."""
    rounds = []
    for _ in range(3):
        before = bench.matrix_rate()
        spent, tokens = body()
        rate = (before + bench.matrix_rate()) / 2
        rounds.append((bench.share(tokens, spent, passes, rate), spent, tokens))
    return sorted(rounds)[1]


def growth(bench: Bench) -> list[Measurement]:
    """How time and memory grow: adapters in one stack and the rank, then vectors and numbers per vector."""
    return _growth_of_stacks(bench) + _growth_of_zoos(bench)


def _growth_of_zoos(bench: Bench) -> list[Measurement]:
    """The autoencoder's fit by the number of checkpoints N and the length K of a vector; random vectors of six tasks."""
    rows = []
    longest = ((73_728, 150), (1_179_648, 150), (8_257_536, 50)) if bench.gpu else ((73_728, 50),)
    config = experiment("glue6/minilm-r1" if bench.gpu else "quickstart").autoencoder
    for num_parameters, num_checkpoints in ((18_432, 1), (18_432, 50), (18_432, 150), (18_432, 500), *longest):
        if bench.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        w_VK = torch.randn(6 * num_checkpoints, num_parameters, generator=torch.Generator().manual_seed(0))
        task_V = torch.arange(6).repeat_interleave(num_checkpoints)
        start = time.perf_counter()
        fit_autoencoder(config, w_VK, task_V, seed=0, device=bench.device, runtime=bench.runtime)
        measure.synchronize(bench.device)
        spent = time.perf_counter() - start
        rows.append(
            Measurement(
                work=f"growth: autoencoder, 6 tasks x N={num_checkpoints}, K={num_parameters:,}",
                ours=spent / w_VK.numel() * 1e9,
                unit="ns per number of the zoo",
                peak_gib=bench.peak_gib(),
                note=f"{spent:.2f} s in all",
            )
        )
    return rows


def _growth_of_stacks(bench: Bench) -> list[Measurement]:
    rows = []
    steps = max(5, bench.steps // 5)
    cases = [(runs, 1) for runs in ((1, 2, 5, 10) if bench.gpu else (1, 2))] + [
        (1, rank) for rank in ((4, 16, 64) if bench.gpu else (4,))
    ]
    for num_runs, rank in cases:
        members = bench.members(num_runs, rank=rank, num_harvest=5)
        tuning = bench.tuning(members)
        spent, tokens = measure.stacked_loop(tuning, steps, capture=bench.gpu)
        rows.append(
            Measurement(
                work=f"growth: {len(members)} adapters, r={rank}, K={tuning.w_SK.shape[1]:,}",
                ours=spent / steps / len(members) * 1e3,
                unit="ms per adapter-step",
                rate_share=bench.share(tokens, spent, 2),
                peak_gib=bench.peak_gib(),
            )
        )
    return rows


def parts_of(bench: Bench, config: ExperimentConfig) -> dict[Part, Callable[[], list[Measurement]]]:
    """Every part by name, to be called when it is its turn. config: the experiment whose generator is timed."""
    return {
        "harvest": lambda: harvest(bench), "harvest_large": lambda: harvest_large(bench), "scoring": lambda: scoring(bench),
        "generator": lambda: generator(bench, config), "quickstart_share": lambda: quickstart_share(bench),
        "style": lambda: measure_styles(bench.device, bench.rate, bench.runtime, bench.steps),
        "growth": lambda: growth(bench), "several_gpus": lambda: several_gpus(bench),
    }  # fmt: skip
