"""The frozen image model: diffusers' PixArtTransformer2DModel, tiny and on pixels, or the real one on latents.

A tiny base is `base.json` and the safetensors files that it names, made by the pretraining stage or shipped with the
package; captions reach it as token states of MiniLM. PixArt-alpha is a diffusers folder or hub id; T5 and the VAE are
loaded to encode captions and images once and are never in memory while LoRA trains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cpdiff_core.artifacts import Artifact, checked
from cpdiff_core.config import Config, LocalFile, UserError, first_line
from cpdiff_core.domains.base_models import embedded_minilm, fetch_from_hub
from cpdiff_core.generator.diffusion import DiffusionConfig
from cpdiff_core.generator.training import TrainingConfig

TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
BLOCK_PATTERN = r"transformer_blocks\.(\d+)\."
SPEC_FILE = "base.json"
EMBEDDED_FOLDER = Path(__file__).parent / "tiny_base"
CAPTION_WIDTH = 384  # of MiniLM's token states
CAPTION_TOKENS = 12
PIXART_TOKENS = 120  # PixArt-alpha's own limit
TEMPLATES = ("a picture of a {}", "a photo of a {}", "a {}")
"""The base learns all three; LoRA and sampling use the first, so that only the LoRA carries style."""


class TinyPixArtConfig(Config):
    """Size of a base that is trained here (ours)."""

    sample_size: int = Field(64, ge=8, description="Image side in pixels.")
    patch_size: int = Field(4, ge=1, description="Side of a patch: (sample_size / patch_size)^2 tokens.")
    num_layers: int = Field(8, ge=1)
    num_attention_heads: int = Field(6, ge=1)
    attention_head_dim: int = Field(64, ge=8, multiple_of=8)

    def build(self) -> Any:
        """The model with diffusers' own initialisation."""
        from diffusers import PixArtTransformer2DModel  # seconds, which `cpdiff list` and cached runs are spared

        width = self.num_attention_heads * self.attention_head_dim
        return PixArtTransformer2DModel(
            num_attention_heads=self.num_attention_heads, attention_head_dim=self.attention_head_dim, in_channels=3,
            out_channels=3, num_layers=self.num_layers, cross_attention_dim=width, sample_size=self.sample_size,
            patch_size=self.patch_size, num_embeds_ada_norm=1000, use_additional_conditions=False,
            caption_channels=CAPTION_WIDTH, interpolation_scale=1,
        )  # fmt: skip


TINY_32 = TinyPixArtConfig(sample_size=32, num_layers=6, num_attention_heads=4, attention_head_dim=32)
PIXELS = DiffusionConfig(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
"""The noise process of tiny bases: cosine schedule, v-prediction (ours)."""


class EmbeddedBase(Config):
    """The 32 px base inside this package."""

    kind: Literal["embedded"] = "embedded"


class PretrainedBase(Config):
    """A tiny base trained from scratch on photographs by a stage of this pipeline."""

    kind: Literal["tiny"] = "tiny"
    size: TinyPixArtConfig = TinyPixArtConfig()
    training: TrainingConfig = Field(
        TrainingConfig(steps=6000, batch_size=256, learning_rate=1e-3, weight_decay=0.01, ema_decay=0.999, precision="bfloat16"),
        description="Optimisation (ours).",
    )
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="Share trained without caption, for guidance (ours).")


class PixArtBase(Config):
    """PixArt-alpha (the paper's base) from the hub or a diffusers folder."""

    kind: Literal["pixart"] = "pixart"
    name: str = Field("PixArt-alpha/PixArt-XL-2-512x512", min_length=1, description="Hub id, or a diffusers folder.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; its newest commit if None.")


StyleBaseConfig = Annotated[EmbeddedBase | PretrainedBase | PixArtBase, Field(discriminator="kind")]


class StyleBase(Config):
    """A base that is there: an artifact of the pretraining stage, or files."""

    kind: Literal["tiny", "pixart"]
    artifact: Artifact | None = None
    files: tuple[LocalFile, ...] = ()
    folder: str = Field("", description="Where the files lie. Not part of the identity.")

    def identity(self) -> Any:
        names = {str(Path(file.path).relative_to(Path(self.folder).resolve())): file for file in self.files}
        return {"kind": self.kind, "artifact": self.artifact, "files": names}

    def path(self, root: Path) -> Path:
        return Path(self.folder) if self.artifact is None else self.artifact.under(root)


def embedded_quality() -> dict[str, Any]:
    """What was measured of the base in this package when it was made: `ratio` to the floor at `num_images`, `copies`."""
    value: dict[str, Any] = json.loads((EMBEDDED_FOLDER / "quality.json").read_text(encoding="utf-8"))
    return value


def resolve_base(config: EmbeddedBase | PixArtBase) -> StyleBase:
    """Find the files of a base and digest them. Raises UserError if something is missing."""
    if isinstance(config, EmbeddedBase):
        paths = [EMBEDDED_FOLDER / SPEC_FILE, *sorted(EMBEDDED_FOLDER.glob("*.safetensors"))]
        return _with_files("tiny", EMBEDDED_FOLDER, paths)
    folder = Path(config.name).expanduser()
    if not folder.is_dir():
        if config.name.startswith((".", "/", "~")):
            raise UserError(f"base.name {config.name!r}: no such folder; check the path")
        patterns = tuple(f"{part}/*" for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"))
        folder = fetch_from_hub(config.name, config.revision, patterns, "base.name")
    for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise UserError(f"base.name {config.name!r}: {str(folder)!r} has no folder {part!r}; give a diffusers folder")
    wanted = {".json", ".safetensors", ".model", ".txt"}
    return _with_files("pixart", folder, sorted(p for p in folder.rglob("*") if p.suffix in wanted and p.is_file()))


def _with_files(kind: Literal["tiny", "pixart"], folder: Path, paths: Sequence[Path]) -> StyleBase:
    return StyleBase(kind=kind, files=tuple(LocalFile.of(path) for path in paths), folder=str(folder.resolve()))


@dataclass(frozen=True)
class BaseSpec:
    """What sampling and training must know of a base: the size of its space, of its images, and its noise process."""

    size: int
    image_size: int
    channels: int
    process: DiffusionConfig


def spec_of(base: StyleBase, root: Path) -> BaseSpec:
    folder = base.path(root)
    if base.kind == "tiny":
        value = _spec(base, folder)
        size = value["transformer"]["sample_size"]
        return BaseSpec(size, size, 3, DiffusionConfig.model_validate(value["process"]))
    config = json.loads((folder / "transformer" / "config.json").read_text())
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    process = {
        "num_train_timesteps": scheduler.get("num_train_timesteps", 1000),
        "beta_start": scheduler["beta_start"], "beta_end": scheduler["beta_end"],
        "beta_schedule": scheduler["beta_schedule"], "prediction_type": scheduler.get("prediction_type", "epsilon"),
    }  # fmt: skip
    vae = json.loads((folder / "vae" / "config.json").read_text())
    size = config["sample_size"]
    image_size = size * 2 ** (len(vae["block_out_channels"]) - 1)
    return BaseSpec(size, image_size, config["in_channels"], DiffusionConfig.model_validate(process))


def _spec(base: StyleBase, folder: Path) -> dict[str, Any]:
    path = checked(folder, SPEC_FILE) if base.artifact else folder / SPEC_FILE
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


@lru_cache(maxsize=2)
def load_transformer(base: StyleBase, root: Path) -> nn.Module:
    """The frozen transformer, float32 on the CPU. Callers must not change it; copy it first."""
    from diffusers import PixArtTransformer2DModel

    folder = base.path(root)
    try:
        if base.kind == "pixart":
            model: Any = PixArtTransformer2DModel.from_pretrained(
                str(folder), subfolder="transformer", local_files_only=True, torch_dtype=torch.float32
            )
        else:
            spec = _spec(base, folder)
            model = PixArtTransformer2DModel(**spec["transformer"])
            parts = [checked(folder, name) if base.artifact else folder / name for name in spec["weights"]]
            state = {key: value.float() for part in parts for key, value in load_file(str(part)).items()}
            model.load_state_dict(state)
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(f"base model in {str(folder)!r}: cannot be loaded ({first_line(error)})") from error
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


@dataclass(frozen=True)
class Captions:
    """Encoded captions: states_PTE and mask_PT, 1 where a token counts. The last row is the empty caption."""

    states_PTE: torch.Tensor
    mask_PT: torch.Tensor

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Captions:
        return Captions(self.states_PTE.to(device, dtype), self.mask_PT.to(device, dtype))

    def rows(self, index: torch.Tensor) -> Captions:
        return Captions(self.states_PTE[index], self.mask_PT[index])


def caption(content: str, template: str = TEMPLATES[0]) -> str:
    """Content only; style is never named. Words of a class name are separated, whatever joined them."""
    return template.format(re.sub(r"[_\-.\s]+", " ", content).strip().lower())


@torch.no_grad()
def encode_captions(base: StyleBase, root: Path, texts: Sequence[str], device: torch.device) -> Captions:
    """Token states of `texts` and, as the last row, of the empty caption. The encoder is freed at the end."""
    if base.kind == "tiny":
        return _minilm_states([*texts, ""], device)
    from transformers import AutoTokenizer, T5EncoderModel

    folder = base.path(root)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    encoder: Any = T5EncoderModel.from_pretrained(str(folder / "text_encoder"), local_files_only=True, dtype=dtype)
    encoder = encoder.to(device).eval()
    batch = tokenizer([*texts, ""], padding="max_length", max_length=PIXART_TOKENS, truncation=True, return_tensors="pt").to(
        device
    )
    states = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return Captions(states.float().cpu(), batch["attention_mask"].float().cpu())


def _minilm_states(texts: Sequence[str], device: torch.device) -> Captions:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    folder = embedded_minilm()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    logging.disable_progress_bar()
    model: Any = AutoModel.from_pretrained(str(folder), local_files_only=True).eval().to(device)
    logging.enable_progress_bar()
    batch = tokenizer(list(texts), padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt").to(
        device
    )
    return Captions(model(**batch).last_hidden_state.float().cpu(), batch["attention_mask"].float().cpu())


def to_model_range(images_NCHW: torch.Tensor) -> torch.Tensor:
    """uint8 -> [-1, 1]."""
    return images_NCHW.float() / 127.5 - 1


def to_bytes(x_NCHW: torch.Tensor) -> torch.Tensor:
    """[-1, 1], clamped -> uint8."""
    return ((x_NCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class ImageCodec:
    """Between uint8 images and the space of the base: pixels for a tiny one, the VAE's latents for PixArt-alpha."""

    def __init__(self, base: StyleBase, root: Path, device: torch.device) -> None:
        self.vae: Any = None
        self.device = device
        if base.kind == "pixart":
            from diffusers import AutoencoderKL

            self.vae = AutoencoderKL.from_pretrained(str(base.path(root)), subfolder="vae", local_files_only=True)
            self.vae = self.vae.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """uint8 images -> what the base is trained on, on the CPU: the images themselves, or float32 latents."""
        if self.vae is None:
            return images_NCHW
        means = [self.vae.encode(to_model_range(part.to(self.device))).latent_dist.mean.cpu() for part in images_NCHW.split(8)]
        return torch.cat(means) * float(self.vae.config.scaling_factor)

    @torch.no_grad()
    def decode(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Samples of the base -> uint8 images on the CPU."""
        if self.vae is None:
            return to_bytes(x_NCHW).cpu()
        scale = float(self.vae.config.scaling_factor)
        return torch.cat([to_bytes(self.vae.decode(part.to(self.device) / scale).sample).cpu() for part in x_NCHW.split(8)])
