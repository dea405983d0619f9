"""What a style generator folder and its adapters say of themselves: base, styles, scores, the image they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cpdiff_core.config import Config, LocalFile, UserError
from cpdiff_core.domains.glue.stacks import Precision
from cpdiff_core.domains.style.base import PixArtBase, StyleBase, resolve_base
from cpdiff_core.domains.style.features import FeatureConfig
from cpdiff_core.domains.style.sampling import ImageSamplingConfig
from cpdiff_core.generator.conditions import StyleImageCondition
from cpdiff_core.generator.diffusion import SamplingConfig
from cpdiff_core.lora.layout import LoraSpec, ParameterLayout

BASE_FOLDER = "base"


class StyleBaseReference(Config):
    """Which image model the adapters are for. The digests decide."""

    kind: Literal["tiny", "pixart"]
    name: str = Field(description="Hub id, or of a folder the last part of its path; of a tiny base its size.")
    revision: str | None = None
    files: dict[str, str] = Field(description="sha256 of every file by its path in the folder.")

    @classmethod
    def of(cls, base: StyleBase, root: Path, name: str, revision: str | None = None) -> StyleBaseReference:
        """name: as given to the experiment."""
        folder = base.path(root)
        files = [Path(file.path) for file in base.files] or [folder / "base.json", *folder.glob("transformer-*.safetensors")]
        local = Path(name).expanduser().is_dir()
        return cls(
            kind=base.kind, name=Path(name).expanduser().resolve().name if local else name, revision=revision,
            files={str(f.resolve().relative_to(folder.resolve())): LocalFile.of(f).sha256 for f in sorted(files)},
        )  # fmt: skip

    def find(self, inside: Path, name: str | None = None) -> StyleBase:
        """The base on this machine: in the folder `inside` that came along, or by its own or another name.

        Raises UserError if it is not there or has other weights.
        """
        if self.kind == "tiny":
            folder = (Path(name).expanduser() if name else inside).resolve()
            files = tuple(LocalFile.of(folder / file) for file in sorted(self.files))
            base = StyleBase(kind="tiny", files=files, folder=str(folder))
        else:
            base = resolve_base(PixArtBase(name=name or self.name, revision=None if name else self.revision))
        found = StyleBaseReference.of(base, Path(), name or self.name)
        weights = [{f: d for f, d in one.files.items() if f.endswith(".safetensors")} for one in (self, found)]
        if weights[0] != weights[1]:
            raise UserError(
                f"base model {name or self.name!r}: is not the one that the adapters are for ({self.name}); its weights "
                "differ; give --base the right folder or hub id"
            )
        return base


class StyleScore(Config):
    """One arm's images against real ones. Lower is better."""

    arm: str
    metric: str
    estimate: float
    std: float | None = Field(None, description="Of its bootstrap, where there was one.")
    num_images: int
    num_real: int


class StyleCard(Config):
    """A style that the generator was trained on."""

    name: str
    data: str = Field(description="Where its images came from, in words.")
    num_checkpoints: int
    scores: tuple[StyleScore, ...] = Field((), description="Arms of the run, on the images of its report.")


class StyleGeneratorCard(Config):
    """Everything about a style generator that is not a tensor."""

    format: Literal[1] = 1
    kind: Literal["style"] = "style"
    name: str
    description: str = ""
    base: StyleBaseReference
    lora: LoraSpec
    layout: ParameterLayout
    target_modules: tuple[str, ...]
    condition: StyleImageCondition
    condition_features: FeatureConfig = Field(description="Encoder of style images.")
    image_size: int = Field(description="Style images are brought to this many pixels first, as in training.")
    objective: Literal["weights", "through_base"]
    sampling: SamplingConfig
    images: ImageSamplingConfig = Field(description="How images are drawn for scores and contact sheets.")
    features: FeatureConfig = Field(description="Of the distance.")
    precision: Precision
    seed: int
    classes: tuple[str, ...] = Field(min_length=1, description="What the base can be asked for; captions come along.")
    prompts: tuple[str, ...] = Field(min_length=1, description="Classes that are drawn for scores and contact sheets.")
    styles: tuple[StyleCard, ...] = Field(min_length=1)
    compact: bool = False
    settings: dict[str, Any] = Field({}, description="Further settings of the run, for the record.")

    @property
    def style_names(self) -> tuple[str, ...]:
        return tuple(style.name for style in self.styles)

    def style(self, name: str) -> StyleCard:
        """Raises UserError with some of the known names."""
        for card in self.styles:
            if card.name == name:
                return card
        shown = ", ".join(self.style_names[:12]) + (", ..." if len(self.styles) > 12 else "")
        raise UserError(f"--task {name!r}: is not among this generator's {len(self.styles)} styles: {shown}")
