"""Full fine-tuning: the *full* rows of Table 1. All parameters of a transformers classifier, one task at a time.

Plain transformers and AdamW, since nothing is shared between tasks here. The checkpoint that is best on the selection
split is kept, out of evenly spaced ones.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from cpdiff_core.config import Config, RuntimeConfig, UserError
from cpdiff_core.domains.base_models import BaseModel, cached_classifier
from cpdiff_core.domains.glue.data import ResolvedTask, SplitConfig, SplitName, tokenize
from cpdiff_core.domains.glue.metrics import metric
from cpdiff_core.domains.glue.stacks import device_of
from cpdiff_core.domains.glue.text_tasks import TextTask
from cpdiff_core.lora.packing import TokenizedTexts
from cpdiff_core.progress import track

_EVALUATION_BATCH = 128


class FullTuningConfig(Config):
    """Full fine-tuning. The paper states nothing; these are the usual values for BERT on GLUE (Devlin et al., 2019)."""

    learning_rate: float = Field(2e-5, gt=0, description="Peak of AdamW (Devlin et al.: 2e-5 to 5e-5).")
    num_epochs: float = Field(3.0, gt=0, description="Devlin et al.: 3.")
    batch_size: int = Field(32, ge=1, description="Devlin et al.: 32.")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Devlin et al.: 0.1; then linear to 0.")
    weight_decay: float = Field(0.01, ge=0, description="Devlin et al.: 0.01.")
    num_evaluations: int = Field(6, ge=1, description="Evenly spaced checkpoints to choose from (ours).")
    max_length: int = Field(128, ge=4, le=512, description="Tokens; longer texts are cut.")
    seed: int = Field(42, ge=0, description="Of head, data order and dropout.")


def tune_fully(
    config: FullTuningConfig, base: BaseModel, task: ResolvedTask, splits: SplitConfig, runtime: RuntimeConfig
) -> dict[str, torch.Tensor]:
    """The parameters of the checkpoint that is best on the selection split.

    Raises UserError for a loss or for outputs that are not finite.
    """
    device = device_of(runtime)
    texts, labels = tokenize(task, splits, "train", base, config.max_length)
    chosen_on = tokenize(task, splits, "selection", base, config.max_length)
    num_steps = max(1, round(config.num_epochs * len(texts) / config.batch_size))
    warmup = max(1, round(config.warmup_ratio * num_steps))
    evaluated_at = {(i + 1) * num_steps // config.num_evaluations for i in range(config.num_evaluations)}
    rng = np.random.default_rng(config.seed)
    order = np.concatenate([rng.permutation(len(texts)) for _ in range(math.ceil(config.num_epochs) + 1)])
    model = fresh_classifier(base, task.task, config.seed).to(device)
    best: dict[str, torch.Tensor] = {}
    best_score = -math.inf
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), track(f"full {task.name}", num_steps, runtime) as progress:
        torch.manual_seed(config.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup))
        )
        for step in range(num_steps):
            rows = order[step * config.batch_size : (step + 1) * config.batch_size]
            model.train()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(**_batch(texts, rows, device, model)).logits
            target = torch.from_numpy(labels[rows]).to(device)
            if task.task.labels is None:
                loss = F.mse_loss(logits[:, 0].float(), target.float())
            else:
                loss = F.cross_entropy(logits.float(), target.long())
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            progress.step()
            if step + 1 in evaluated_at:
                score = _score(model, task.task, *chosen_on, device)
                if not (math.isfinite(loss.item()) and math.isfinite(score)):
                    raise UserError(
                        f"task {task.name!r}: full fine-tuning has no finite loss or outputs; lower full.learning_rate (now "
                        f"{config.learning_rate:g})"
                    )
                if score > best_score:
                    best_score = score
                    best = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    return best


def full_logits(
    config: FullTuningConfig, base: BaseModel, task: ResolvedTask, splits: SplitConfig, split: SplitName,
    state: dict[str, torch.Tensor], runtime: RuntimeConfig,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(logits_VBC with V = 1, labels_B) of a fully fine-tuned model on one split."""
    device = device_of(runtime)
    model = fresh_classifier(base, task.task, config.seed)
    model.load_state_dict(state)
    texts, labels = tokenize(task, splits, split, base, config.max_length)
    return _logits(model.to(device), texts, device)[None], torch.from_numpy(labels)


def fresh_classifier(base: BaseModel, task: TextTask, seed: int) -> nn.Module:
    """A copy of the base with a newly drawn head, everything trainable."""
    shared, names = cached_classifier(base, task.num_classes)
    model = copy.deepcopy(shared).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    std = float(getattr(model.config, "initializer_range", 0.02))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.zero_() if name.endswith("bias") else parameter.normal_(0.0, std, generator=generator)
    return model


def _batch(
    texts: TokenizedTexts, rows: np.ndarray, device: torch.device, model: nn.Module
) -> dict[str, torch.Tensor]:
    """Sequences `rows`, padded on the right to the longest of them."""
    length = int(texts.lengths[torch.from_numpy(rows)].max())
    shape = (len(rows), length)
    ids = torch.full(shape, int(model.config.pad_token_id))  # type: ignore[union-attr, arg-type]
    types, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for i, row in enumerate(rows):
        start, end = int(texts.starts[row]), int(texts.starts[row + 1])
        ids[i, : end - start], types[i, : end - start] = texts.ids[start:end], texts.types[start:end]
        mask[i, : end - start] = 1
    batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = types.to(device)
    return batch


@torch.no_grad()
def _logits(model: nn.Module, texts: TokenizedTexts, device: torch.device) -> torch.Tensor:
    model.eval()
    order = torch.argsort(texts.lengths, stable=True).numpy()
    out: list[torch.Tensor] = []
    for start in range(0, len(order), _EVALUATION_BATCH):
        batch = _batch(texts, order[start : start + _EVALUATION_BATCH], device, model)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out.append(model(**batch).logits.float().cpu())
    logits = torch.cat(out)
    return torch.empty_like(logits).index_copy_(0, torch.from_numpy(order), logits)


def _score(model: nn.Module, task: TextTask, texts: TokenizedTexts, labels: np.ndarray, device: torch.device) -> float:
    logits = _logits(model, texts, device)
    if not logits.isfinite().all():
        return math.nan
    predicted = logits[:, 0].double().numpy() if task.labels is None else logits.argmax(-1).numpy()
    return float(metric(task.primary_metric, predicted, labels, task.metrics))
