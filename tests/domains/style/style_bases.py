"""A tiny base with random weights, in files, and adapters and data for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

from cpdiff_core.artifacts import Artifact, seal, write_tensors
from cpdiff_core.config import LocalFile
from cpdiff_core.domains.style.base import TARGET_MODULES, StyleBase, TinyPixArtConfig, load_transformer
from cpdiff_core.domains.style.denoising import ENCODED_FILE
from cpdiff_core.domains.style.pretraining import save_base
from cpdiff_core.domains.style.stack import initial_adapter
from cpdiff_core.lora.layout import LoraSpec

TINY = TinyPixArtConfig(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8)


def saved_tiny_base(folder: Path, seed: int = 0) -> tuple[StyleBase, Any]:
    """(the base, its model); weights larger than usual, so that an untrained model tells inputs apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TINY.build()
        for parameter in model.parameters():
            parameter.data.mul_(2)
    save_base(model, folder)
    files = tuple(LocalFile.of(path) for path in sorted(folder.iterdir()) if path.is_file())
    return StyleBase(kind="tiny", files=files, folder=str(folder.resolve())), model.eval()


def encoded_style(root: Path, name: str, num: int = 12, seed: int = 0) -> Artifact:
    """Random images and captions, as the stage of encoding writes them."""
    generator = torch.Generator().manual_seed(seed)
    artifact = Artifact(stage="encode_style", fingerprint=name)
    write_tensors(
        artifact.under(root) / ENCODED_FILE,
        {
            "images": torch.randint(0, 256, (num, 3, 8, 8), generator=generator, dtype=torch.uint8),
            "caption_N": torch.randint(2, (num,), generator=generator),
            "states_PTE": torch.randn(3, 12, 384, generator=generator), "mask_PT": torch.ones(3, 12),
        },
    )  # fmt: skip
    seal(artifact.under(root))
    return artifact


def injected(base: StyleBase, w_K: torch.Tensor, lora: LoraSpec) -> torch.nn.Module:
    """The base with PEFT's own adapter holding w_K, names without the prefix of a wrapped model."""
    _, layout = initial_adapter(base, Path(), lora, 0)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.lora_alpha, target_modules=list(TARGET_MODULES))
    model = inject_adapter_in_model(config, copy.deepcopy(load_transformer(base, Path())))
    state = {name.removeprefix("base_model.model."): value for name, value in layout.unflatten(w_K).items()}
    set_peft_model_state_dict(model, state)
    assert list(get_peft_model_state_dict(model)) == [name.removeprefix("base_model.model.") for name in layout.names]
    return model
