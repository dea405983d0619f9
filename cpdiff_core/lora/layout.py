"""ParameterLayout: PEFT state dict <-> flat LoRA vector w_K (Sec. 3.1).

Order and names are PEFT's own (`get_peft_model_state_dict`), taken from a model on the meta device, so a vector
goes to a PEFT folder and back bit for bit. The classifier head is never part of the vector.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import nn

from cpdiff_core.config import Config

if TYPE_CHECKING:  # importing PEFT takes seconds, and a run whose every stage is cached needs none of it
    from peft import LoraConfig


class LoraSpec(Config):
    """The adapter. Names as in PEFT's LoraConfig."""

    rank: int = Field(1, ge=1, description="r. Table 1 uses 1, 2, 4 and 16.")
    lora_alpha: float = Field(8.0, gt=0, description="Scaling is lora_alpha / rank. Released settings: 8 at r=1, 32 at r=16.")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the adapter's input. 0.1 in the released settings; ours is 0."
    )
    init_lora_weights: Literal["kaiming", "gaussian"] = Field(
        "kaiming", description="PEFT's default A (Kaiming-uniform, B zero), or its gaussian A of std 1/rank."
    )

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.rank

    def peft_config(self, target_modules: Sequence[str]) -> LoraConfig:
        """PEFT's own config. task_type stays unset: SEQ_CLS would add the head to `modules_to_save`."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
            lora_dropout=self.lora_dropout,
            target_modules=list(target_modules),
            init_lora_weights=True if self.init_lora_weights == "kaiming" else "gaussian",
        )


class Factor(Config):
    """One adapted module: where its A (rank x in) and B (out x rank) lie in the vector."""

    module: str
    block: int | None
    a_start: int
    rank: int
    in_features: int
    b_start: int
    out_features: int


class ParameterLayout(Config):
    """Names and shapes of the LoRA tensors of one base model and rank, in PEFT's order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    factors: tuple[Factor, ...]

    @property
    def num_parameters(self) -> int:
        """K."""
        return sum(rows * columns for rows, columns in self.shapes)

    def flatten(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """PEFT state dict -> w_K, float32. Raises ValueError on a missing, extra or misshapen tensor."""
        lora = {name: tensor for name, tensor in state.items() if "lora_" in name}
        missing, extra = set(self.names) - set(lora), set(lora) - set(self.names)
        if missing or extra:
            raise ValueError(
                f"PEFT state does not match the layout: missing {sorted(missing)[:2]}, unexpected {sorted(extra)[:2]}; "
                "use the base model, rank and target modules that the layout was made for"
            )
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tuple(lora[name].shape) != shape:
                raise ValueError(f"{name} has shape {tuple(lora[name].shape)}, the layout says {shape}; check the rank")
        return torch.cat([lora[name].detach().to("cpu", torch.float32).reshape(-1) for name in self.names])

    def unflatten(self, w_K: torch.Tensor) -> dict[str, torch.Tensor]:
        """w_K -> PEFT state dict (copies). Raises ValueError if K is another."""
        if w_K.shape != (self.num_parameters,):
            raise ValueError(f"vector has shape {tuple(w_K.shape)}, this layout needs ({self.num_parameters},)")
        parts = w_K.split([rows * columns for rows, columns in self.shapes])
        return {
            name: part.reshape(shape).clone() for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }

    def views(self, w_SK: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """w_SK -> module name -> (A_SrI, B_SOr), views through one `split`, so that the backward is one `cat`."""
        parts = w_SK.split([rows * columns for rows, columns in self.shapes], dim=1)
        tensors = {
            name: part.unflatten(1, shape) for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }
        return {
            factor.module: (tensors[f"{factor.module}.lora_A.weight"], tensors[f"{factor.module}.lora_B.weight"])
            for factor in self.factors
        }


def layout_of(peft_model: nn.Module, block_pattern: str) -> ParameterLayout:
    """The layout of a model that PEFT has adapted. The model may be on the meta device."""
    from peft import get_peft_model_state_dict

    state = {name: t for name, t in get_peft_model_state_dict(peft_model).items() if "lora_" in name}
    starts, position = {}, 0
    for name, tensor in state.items():
        starts[name] = position
        position += tensor.numel()
    factors = []
    for name, tensor in state.items():
        if not name.endswith("lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        b_name = f"{module}.lora_B.weight"
        block = re.search(block_pattern, name)
        factors.append(
            Factor(
                module=module, block=int(block[1]) if block else None, a_start=starts[name], rank=tensor.shape[0],
                in_features=tensor.shape[1], b_start=starts[b_name], out_features=state[b_name].shape[0],
            )
        )  # fmt: skip
    shapes = tuple((tensor.shape[0], tensor.shape[1]) for tensor in state.values())
    return ParameterLayout(names=tuple(state), shapes=shapes, factors=tuple(factors))


def adapt(model: nn.Module, lora: LoraSpec, target_modules: Sequence[str], seed: int) -> nn.Module:
    """A PEFT model on a copy of `model`, its LoRA weights drawn by PEFT itself from `seed`."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own, raised by PEFT
        torch.manual_seed(seed)
        adapted: nn.Module = get_peft_model(copy.deepcopy(model), lora.peft_config(target_modules))  # type: ignore[arg-type]
    return adapted


def initial_vector(
    model: nn.Module, lora: LoraSpec, target_modules: Sequence[str], block_pattern: str, seed: int
) -> tuple[torch.Tensor, ParameterLayout]:
    """(w_K as PEFT initialises it from `seed`, the layout) for `model` on the CPU."""
    from peft import get_peft_model_state_dict

    adapted = adapt(model, lora, target_modules, seed)
    layout = layout_of(adapted, block_pattern)
    return layout.flatten(get_peft_model_state_dict(adapted)), layout
