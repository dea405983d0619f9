"""PEFT folders: adapter_config.json and adapter_model.safetensors, written so that PEFT loads them, and read with care.

A vector goes out and comes back bit for bit. The head travels in `modules_to_save`, so a loaded adapter is a whole
classifier. What is read comes from elsewhere, so everything about it is checked and a fault is one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from cpdiff_core.artifacts import write_tensors
from cpdiff_core.config import UserError
from cpdiff_core.lora.layout import LoraSpec, ParameterLayout

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings of other kinds of adapter, under which B A is not the whole of dW.
_FOREIGN = (
    "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "lora_bias", "layer_replication",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "kasa_config",
)  # fmt: skip
# Initialisations that change the base model's own weights, so that B A is a change of another base.
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftAdapter:
    """One adapter as it lies on disk: LoRA tensors and head by PEFT's names, without a vector's order yet."""

    folder: Path
    lora: LoraSpec
    base: str
    target_modules: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]

    def vector(self, layout: ParameterLayout) -> torch.Tensor:
        """w_K in the order of `layout`. Raises UserError for a missing, extra or misshapen tensor."""
        try:
            return layout.flatten(self.tensors)
        except ValueError as error:
            raise UserError(f"adapter {str(self.folder)!r}: {error}") from error


def write_adapter(
    folder: Path, w_K: torch.Tensor, layout: ParameterLayout, lora: LoraSpec, target_modules: Sequence[str], *,
    base: str, revision: str | None = None, head: Mapping[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Write w_K (weights, not normalised) as a PEFT folder for the base model `base`.

    head: parameters by their names in the classifier, saved as `modules_to_save`. Raises ValueError for another K.
    """
    write_state(folder, layout.unflatten(w_K), lora, target_modules, base=base, revision=revision, head=head)


def write_state(
    folder: Path, state: Mapping[str, torch.Tensor], lora: LoraSpec, target_modules: Sequence[str], *, base: str,
    revision: str | None = None, head: Mapping[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """As `write_adapter`, from LoRA tensors by PEFT's names."""
    config = lora.peft_config(sorted(target_modules))
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    if head:
        config.task_type = "SEQ_CLS"
        config.modules_to_save = sorted({name.split(".")[0] for name in head})
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    saved = {_PREFIX + name: tensor for name, tensor in (head or {}).items()}
    write_tensors(folder / WEIGHTS_FILE, {**state, **saved}, {"format": "pt"})


def read_adapter(folder: Path) -> PeftAdapter:
    """Read a PEFT folder of a plain LoRA adapter. Raises UserError that names the folder, the fault and the remedy."""
    where = f"adapter {str(folder)!r}"
    try:
        value = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: has no readable {CONFIG_FILE}; give a folder that PEFT has saved") from error
    except ValueError as error:
        raise UserError(f"{where}: {CONFIG_FILE} is not JSON; save the adapter again") from error
    if not isinstance(value, dict) or value.get("peft_type") != "LORA":
        raise UserError(f"{where}: {CONFIG_FILE} is not that of a LoRA adapter (peft_type LORA); give another folder")
    foreign = [name for name in _FOREIGN if value.get(name)]
    if foreign or value.get("bias", "none") != "none":
        raise UserError(f"{where}: {(foreign or ['bias'])[0]} is set; only plain LoRA can be read, save it without")
    start = str(value.get("init_lora_weights"))
    if start.startswith(_MOVES_THE_BASE):
        raise UserError(
            f"adapter {str(folder)!r}: init_lora_weights {start!r} changes the base model itself; convert it to plain LoRA "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    try:
        alpha = _scaling(value) * value["r"]
        lora = LoraSpec(rank=value["r"], lora_alpha=alpha, lora_dropout=value.get("lora_dropout") or 0.0)
        targets = value["target_modules"]
        if not isinstance(targets, str):
            targets = sorted(map(str, targets))
    except (KeyError, TypeError, ZeroDivisionError, ValidationError) as error:
        raise UserError(f"{where}: {CONFIG_FILE} lacks r, lora_alpha or target_modules; save it again") from error
    tensors = _read_weights(folder, where)
    lora_tensors = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    if other := [name for name in lora_tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]:
        raise UserError(
            f"{where}: {other[0].removeprefix(_PREFIX)} is no factor of a linear layer; only plain LoRA can be read, save it "
            "without embeddings among its target_modules"
        )
    ranks = {tensor.shape[0] for name, tensor in lora_tensors.items() if name.endswith("lora_A.weight")}
    if ranks - {lora.rank}:
        raise UserError(f"{where}: {CONFIG_FILE} says r = {lora.rank}, its weights have rank {sorted(ranks)}; mend it")
    head = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name not in lora_tensors}
    if bad := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise UserError(f"{where}: {bad[0]} holds values that are not finite; leave this adapter out")
    if isinstance(targets, str):  # a pattern: the modules that it has found stand in the weights
        targets = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in lora_tensors}
    return PeftAdapter(
        folder, lora, str(value.get("base_model_name_or_path") or ""), tuple(sorted(targets)), lora_tensors, head
    )


def _scaling(value: Mapping[str, Any]) -> float:
    """The factor of B A: alpha / r, or alpha / sqrt(r) of rank-stabilised LoRA."""
    return float(value["lora_alpha"] / (value["r"] ** 0.5 if value.get("use_rslora") else value["r"]))


def _read_weights(folder: Path, where: str) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        reason = " (adapter_model.bin is a pickle and is never opened)" if pickled else ""
        raise UserError(f"{where}: has no {WEIGHTS_FILE}{reason}; save it with safe_serialization=True")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: {WEIGHTS_FILE} is truncated or damaged; copy or save it again") from error
