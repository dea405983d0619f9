"""Measurements of speed: the loops that users would otherwise write, beside ours, in one run.

Every figure is a median of repeats and every claim a ratio taken in the same run on the same card. The plain loop is
transformers + PEFT as their documentation shows it: one task after another, bf16 autocast, dynamic padding, data
resident on the device, the same examples in the same order, the harvest's copies included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import set_peft_model_state_dict
from torch import nn

from cpdiff_core.config import Config, RuntimeConfig
from cpdiff_core.domains.base_models import FAMILIES, cached_classifier
from cpdiff_core.domains.glue.fine_tuning import FineTuning, HarvestConfig, StepProgram, batch_rows, run_seed
from cpdiff_core.domains.glue.stacks import build_stack, logits_of
from cpdiff_core.lora.layout import adapt, layout_of
from cpdiff_core.lora.packing import TokenizedTexts, pad


class Measurement(Config):
    """One row: what was done, per second, with what it is compared and the share of the device's own rate."""

    work: str
    ours: float
    unit: str
    reference: float | None = None
    reference_name: str = ""
    ratio: float | None = None
    rate_share: float | None = None
    peak_gib: float | None = None
    note: str = ""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, body: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> float:
    """Median wall-clock seconds of `body`, the device's work included."""
    for _ in range(warmup):
        body()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        body()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """The device's own rate of a large square matrix product, FLOP/s."""
    size = size or (8192 if device.type == "cuda" else 1536)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(device, lambda: a @ b, repeats=10, warmup=3)


def dense_parameters(model: nn.Module, *, stacked: bool = False) -> int:
    """Parameters of the base that multiply every token: all matrices but the embeddings and the head. In a stack those of
    the last block above its attention, which multiply the pooled tokens only, are left out (see `StackedClassifier`)."""
    base: Any = model.base_model
    unread = f"encoder.layer.{base.config.num_hidden_layers - 1}."
    return sum(
        p.numel()
        for name, p in base.named_parameters()
        if p.dim() == 2
        and "embeddings" not in name
        and "pooler" not in name
        and not (stacked and name.startswith(unread) and ".self." not in name)
    )


def plain_loop(
    member: HarvestConfig, head: Mapping[str, torch.Tensor], texts: TokenizedTexts, labels: torch.Tensor, device: torch.device,
    num_steps: int, autocast: bool = True, warmup: int = 5,
) -> tuple[float, int, torch.Tensor]:  # fmt: skip
    """Train one task the usual way for `num_steps`. Returns (seconds, unpadded tokens, the harvested w_NK)."""
    fine_tune, family = member.fine_tune, FAMILIES[member.base.family]
    classifier, _ = cached_classifier(member.base, member.task.task.num_classes)
    model = adapt(classifier, member.lora, family.target_modules, fine_tune.seed)
    model.load_state_dict({f"base_model.model.{name}": value for name, value in head.items()}, strict=False)
    model.to(device).eval()
    model.config.pad_token_id = model.config.pad_token_id or 0  # type: ignore[union-attr]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=fine_tune.learning_rate, weight_decay=fine_tune.weight_decay, fused=device.type == "cuda"
    )
    layout = layout_of(model, family.block_pattern)
    named = dict(model.named_parameters())
    order = [named[name.replace(".weight", ".default.weight")] for name in layout.names]
    rates = fine_tune.learning_rates(num_steps + warmup)
    resident, harvest, tokens, start = texts.to(device), [], 0, 0.0
    lengths = texts.lengths
    for step in range(num_steps + warmup):
        if step == warmup:
            synchronize(device)
            start = time.perf_counter()
        rows = torch.from_numpy(batch_rows(run_seed(member), step, fine_tune.batch_size, len(texts)))
        batch = pad(resident, rows[None].to(device), pad_token_id=0, row_length=int(lengths[rows].max()))
        optimizer.param_groups[0]["lr"] = float(rates[step])
        extra = {"token_type_ids": batch.token_type_ids} if member.base.family == "bert" else {}
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **extra).logits.float()
        target = labels[rows.to(device)]
        if member.task.task.labels is None:
            loss = nn.functional.mse_loss(logits[:, 0], target)
        else:
            loss = nn.functional.cross_entropy(logits, target.long())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, fine_tune.max_grad_norm)
        optimizer.step()
        if step >= warmup:
            harvest.append(torch.cat([p.detach().reshape(-1) for p in order]))
            tokens += int(lengths[rows].sum())
    synchronize(device)
    return time.perf_counter() - start, tokens, torch.stack(harvest).cpu()


def stacked_loop(tuning: FineTuning, num_steps: int, capture: bool) -> tuple[float, int]:
    """Seconds and unpadded tokens of `num_steps` steps of a whole stack, harvest copies included."""
    device = tuning.stack.device
    if device.index is not None:
        torch.cuda.set_device(device)  # of this thread
    program = StepProgram(tuning, capture)
    warmup = 20 if capture else 2
    lengths, tokens, start = tuning.lengths, 0, 0.0
    # Every shape is captured before the clock starts, as a run of thousands of steps would have done early on.
    for step in [*range(num_steps), *range(warmup)] if capture else range(warmup):
        program.prepare(step)
    for step in range(num_steps):
        if step == 0:
            synchronize(device)
            start = time.perf_counter()
        tuning.losses_ST[:, 0] = program(step)
        tuning.ring_SNK[:, step % tuning.ring_SNK.shape[1]] = tuning.w_SK
    synchronize(device)
    spent = time.perf_counter() - start
    for step in range(num_steps):
        tokens += int(lengths[tuning.inputs_of(step)[0].rows_SB.numpy()].sum())
    return spent, tokens


def plain_scoring(
    member: HarvestConfig, head: Mapping[str, torch.Tensor], w_VK: torch.Tensor, texts: TokenizedTexts, device: torch.device,
    batch_size: int = 64,
) -> tuple[float, torch.Tensor]:  # fmt: skip
    """Seconds to load each adapter into PEFT and predict, one at a time, sorted by length; and the logits."""
    family = FAMILIES[member.base.family]
    classifier, _ = cached_classifier(member.base, member.task.task.num_classes)
    model = adapt(classifier, member.lora, family.target_modules, 0)
    model.load_state_dict({f"base_model.model.{name}": value for name, value in head.items()}, strict=False)
    model.to(device).eval()
    layout = layout_of(model, family.block_pattern)
    order = torch.argsort(texts.lengths, descending=True, stable=True)
    resident = texts.to(device)
    out = torch.empty(len(w_VK), len(texts), member.task.task.num_classes)

    def run() -> None:
        for v, w_K in enumerate(w_VK):
            set_peft_model_state_dict(model, layout.unflatten(w_K))
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size]
                batch = pad(resident, rows[None].to(device), pad_token_id=0, row_length=int(texts.lengths[rows].max()))
                extra = {"token_type_ids": batch.token_type_ids} if member.base.family == "bert" else {}
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **extra).logits
                out[v, rows] = logits.float().cpu()

    return seconds(device, run, repeats=1, warmup=1), out


def stacked_scoring(
    member: HarvestConfig, head: Mapping[str, torch.Tensor], w_VK: torch.Tensor, texts: TokenizedTexts, runtime: RuntimeConfig
) -> tuple[float, torch.Tensor]:
    """Seconds of `logits_of` for all vectors, and the logits."""
    num_classes = member.task.task.num_classes
    stack = build_stack(member.base, member.lora, num_classes, member.fine_tune.precision, runtime)
    logits: list[torch.Tensor] = []
    quiet = runtime.model_copy(update={"progress": False})
    spent = seconds(
        stack.device, lambda: logits.append(logits_of(stack, w_VK, head, num_classes, texts, "", quiet)), repeats=3
    )
    return spent, logits[-1]


def profile(body: Callable[[], Any], top: int = 15) -> list[tuple[str, float, int]]:
    """(kernel, microseconds, calls) of the device kernels of `body`, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        body()
        torch.cuda.synchronize()
    rows: Sequence[Any] = sorted(record.key_averages(), key=lambda row: -row.self_device_time_total)
    return [(row.key[:90], row.self_device_time_total, row.count) for row in rows[:top]]
