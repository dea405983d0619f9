"""The classification head of a task: fitted once, fixed from step 0 of every run.

`probe` (default): fitted on the frozen base's features, so that no-LoRA is a linear probe and an honest baseline.
`random`: transformers' own initialisation, never trained, as in the released code. The head is every parameter that
the base checkpoint lacks, so what it is depends on the architecture: BERT's classifier, RoBERTa's dense and
out_proj, DeBERTa's pooler and classifier, GPT-2's score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field

from cpdiff_core.config import Config, RuntimeConfig
from cpdiff_core.domains.base_models import BaseModel, cached_classifier
from cpdiff_core.domains.glue.data import ResolvedTask, SplitConfig, tokenize
from cpdiff_core.domains.glue.stacks import build_stack, features_of
from cpdiff_core.lora.layout import LoraSpec
from cpdiff_core.lora.packing import TokenizedTexts


class HeadConfig(Config):
    kind: Literal["probe", "random"] = Field("probe", description="probe: fitted on frozen features. random: released code.")
    max_examples: int | None = Field(None, ge=2, description="Training examples the probe is fitted on; all if None.")
    l2: float = Field(1e-3, ge=0, description="Weight of the squared norm of the head's matrices (ours).")
    seed: int = Field(0, ge=0, description="Of the initialisation.")


def fit_head(
    config: HeadConfig, base: BaseModel, task: ResolvedTask, splits: SplitConfig, max_length: int, *, runtime: RuntimeConfig
) -> dict[str, torch.Tensor]:
    """The head's parameters by their names in the classifier, float32 on the CPU."""
    num_classes = task.task.num_classes
    head = initial_head(config, base, num_classes)
    if config.kind == "random":
        return head
    texts, labels = tokenize(task, splits, "train", base, max_length)
    if config.max_examples is not None:
        rows = np.sort(np.random.default_rng(config.seed).permutation(len(texts))[: config.max_examples])
        texts, labels = texts.take(torch.from_numpy(rows)), labels[rows]
    return fit_probe(config, base, task, texts, labels, runtime)


def fit_probe(
    config: HeadConfig, base: BaseModel, task: ResolvedTask, texts: TokenizedTexts, labels: NDArray[np.float64],
    runtime: RuntimeConfig,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A head of `task` fitted on these texts alone, as the frozen base sees them."""
    num_classes = task.task.num_classes
    head = initial_head(config, base, num_classes)
    stack = build_stack(base, LoraSpec(), num_classes, "fp32", runtime)
    features_BH = features_of(stack, texts, f"head {task.name}", runtime)
    return _fit(config, stack.model.apply_head, head, stack.model.own_head, features_BH.to(stack.device), labels, task)


def initial_head(config: HeadConfig, base: BaseModel, num_classes: int) -> dict[str, torch.Tensor]:
    """transformers' initialisation of a linear layer, from the config's seed: normal of std 0.02, biases zero."""
    model, names = cached_classifier(base, num_classes)
    std = float(getattr(model.config, "initializer_range", 0.02))
    generator = torch.Generator().manual_seed(config.seed)
    own = model.state_dict()
    return {
        name: torch.zeros_like(own[name])
        if name.endswith("bias")
        else torch.randn(own[name].shape, generator=generator) * std
        for name in names
    }


def _fit(
    config: HeadConfig, apply_head: Callable[..., torch.Tensor], head: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor],
    features_BH: torch.Tensor, labels: NDArray[np.float64], task: ResolvedTask,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Minimise the task's loss over all examples by L-BFGS in double precision: convex where the head is one layer."""
    features = features_BH.double()[None]
    target = torch.from_numpy(labels).to(features.device)
    fixed = {name: value.to(features)[None] for name, value in own.items() if name not in head}
    free = {name: value.to(features)[None].requires_grad_() for name, value in head.items()}
    if task.task.labels is None:  # start regression at the mean, so that the norm is spent on the slope
        last = [name for name in free if name.endswith("bias")]
        with torch.no_grad():
            for name in last[-1:]:
                free[name] += target.mean()
    optimizer = torch.optim.LBFGS(
        list(free.values()), max_iter=300, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-10
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = apply_head(features, fixed | free, dtype=torch.float64)[0]
        regression = task.task.labels is None
        loss = F.mse_loss(logits[:, 0], target) if regression else F.cross_entropy(logits, target.long())
        loss = loss + config.l2 * sum((value**2).sum() for name, value in free.items() if name.endswith("weight"))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return {name: value.detach()[0].float().cpu() for name, value in free.items()}
