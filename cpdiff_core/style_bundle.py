"""A portable style generator: the twin of `bundle.py`, for images in the place of texts.

The folder also holds what drawing needs: the encoded captions of its prompts and, where the base is a tiny one that no
hub has, the base itself. PixArt-alpha is named by digest and found on the machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cpdiff_core.artifacts import read_tensors, sha256_of, write_json, write_tensors
from cpdiff_core.bundle import CARD_FILE, POOLED, another_version, load_parts, pooled, read_card, save_parts
from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.domains.style.base import Captions, StyleBase
from cpdiff_core.domains.style.features import image_features
from cpdiff_core.domains.style.images import read_image
from cpdiff_core.generator.autoencoder import ParameterAutoencoder
from cpdiff_core.generator.diffusion import LatentDiffusion, SamplingConfig
from cpdiff_core.generator.normalization import Normalizer
from cpdiff_core.style_cards import BASE_FOLDER, StyleGeneratorCard
from cpdiff_core.unseen_styles import nearest_style


@dataclass(frozen=True)
class StyleCondition:
    """y_1E: features of one image. style: the training style whose statistics apply; None: a style never seen."""

    y_1E: torch.Tensor
    style: str | None
    image: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class StyleCandidates:
    """w_MK: generated vectors in weights. statistics: the style whose normalisation they carry, or POOLED."""

    w_MK: torch.Tensor
    condition: StyleCondition
    statistics: str
    seed: int


class StyleGenerator:
    """A fitted style generator, ready to use. base_folder: where the files of a base that came along lie."""

    def __init__(
        self, card: StyleGeneratorCard, normalizer: Normalizer, autoencoder: ParameterAutoencoder,
        diffusion: LatentDiffusion, conditions: Mapping[str, torch.Tensor], captions: Captions,
        references: Mapping[str, torch.Tensor], base_folder: Path,
    ) -> None:  # fmt: skip
        self.card, self.normalizer, self.autoencoder, self.diffusion = card, normalizer, autoencoder, diffusion
        self.y_QE, self.y_mean_QE = conditions["y_QE"], conditions["y_mean_QE"]
        self.captions, self.references, self.base_folder = captions, dict(references), base_folder
        size, vectors = card.layout.num_parameters, autoencoder.num_parameters
        if size != vectors or any(factor.rank != card.lora.rank for factor in card.layout.factors):
            raise UserError(
                f"generator {card.name!r}: rank {card.lora.rank} and a layout of K = {size} do not match its "
                f"autoencoder of K = {vectors}; export it anew"
            )

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> StyleGenerator:
        """Read a style generator's folder. Raises UserError that names what is missing or unfit."""
        path, value = read_card(folder)
        where = f"generator {str(folder)!r}"
        if value.get("kind") != "style":
            raise UserError(f"{where}: makes adapters for texts, not for styles; give it --task-info")
        with another_version(where):
            card = StyleGeneratorCard.model_validate(value)
            normalizer, autoencoder, diffusion = load_parts(path, card.compact, device, where)
            tensors = read_tensors(path, "captions.safetensors")
            captions = Captions(tensors["states_PTE"], tensors["mask_PT"])
            conditions = read_tensors(path, "conditions.safetensors")
        references = read_tensors(path, "references.safetensors")
        return cls(card, normalizer, autoencoder, diffusion, conditions, captions, references, path / BASE_FOLDER)

    def save(self, folder: Path) -> None:
        """Write a folder that `load` reads, the base with it if that is a tiny one. Nothing is sealed."""
        write_json(folder / CARD_FILE, self.card.model_dump(mode="json"))
        save_parts(folder, self.normalizer, self.autoencoder, self.diffusion, self.card.compact)
        write_tensors(folder / "conditions.safetensors", {"y_QE": self.y_QE, "y_mean_QE": self.y_mean_QE})
        captions = {"states_PTE": self.captions.states_PTE, "mask_PT": self.captions.mask_PT}
        write_tensors(folder / "captions.safetensors", captions)
        write_tensors(folder / "references.safetensors", self.references)
        if self.card.base.kind == "tiny":
            (folder / BASE_FOLDER).mkdir(parents=True, exist_ok=True)
            for name in self.card.base.files:
                shutil.copy(self.base_folder / name, folder / BASE_FOLDER / name)

    def condition(
        self, image: str | Path | None = None, style: str | None = None, runtime: RuntimeConfig = RuntimeConfig(progress=False)
    ) -> StyleCondition:
        """The condition of an image file, of whatever kind, or of a training style by name.

        An image is taken as one of a style never seen. Raises UserError for neither or both, and for no usable image.
        """
        if (image is None) == (style is None):
            raise UserError("--style-image FILE or --task NAME of a training style: give one of the two")
        if style is not None:
            self.card.style(style)
            row = self.card.style_names.index(style)
            return StyleCondition(self.y_QE[row : row + 1], style)
        path = Path(str(image)).expanduser()
        if not path.is_file():
            raise UserError(f"--style-image {str(path)!r}: no such file; check the path")
        image_1CHW = read_image(path, self.card.image_size)[None]
        device = next(self.diffusion.parameters()).device
        y_1E = image_features(self.card.condition_features, image_1CHW, device, "features of the style image", runtime)
        return StyleCondition(y_1E, None, path.name, sha256_of(path))

    def generate(
        self, condition: StyleCondition | str | Path, num: int = 20, seed: int | None = None,
        sampling: SamplingConfig | None = None,
    ) -> StyleCandidates:  # fmt: skip
        """M = `num` candidates for a condition, for a training style by name, or for an image file.

        The same seed, device, thread count and `num` give the same bits.
        """
        if isinstance(condition, str | Path):
            named = str(condition) in self.card.style_names
            condition = self.condition(style=str(condition)) if named else self.condition(condition)
        if num < 1:
            raise UserError(f"num {num}: at least one candidate")
        seed = self.card.seed if seed is None else seed
        y_1E = condition.y_1E.to(next(self.diffusion.parameters()).device)
        z_MCL = self.diffusion.sample(y_1E, num, seed, sampling or self.card.sampling)[0]
        normalized_MK = self.autoencoder.decode(z_MCL).cpu()
        if condition.style is not None:
            return StyleCandidates(self.normalizer.invert(condition.style, normalized_MK), condition, condition.style, seed)
        return StyleCandidates(pooled(self.normalizer).invert("", normalized_MK), condition, POOLED, seed)

    def prompts(self, num: int) -> tuple[tuple[str, ...], Captions]:
        """The first `num` of the card's prompts, and their captions with the empty one last."""
        chosen = self.card.prompts[:num]
        rows = [*(self.card.classes.index(prompt) for prompt in chosen), len(self.card.classes)]
        return chosen, self.captions.rows(torch.tensor(rows))

    def nearest_style(self, condition: StyleCondition) -> tuple[str, float]:
        """The training style whose images look most alike, and the cosine of their features."""
        row, cosine = nearest_style(condition.y_1E[0].cpu(), self.y_mean_QE[:, None])
        return self.card.style_names[row], cosine

    def base(self, name: str | None = None) -> StyleBase:
        """The image model, on this machine."""
        return self.card.base.find(self.base_folder, name)
