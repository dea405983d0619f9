"""Style experiments as data: one value composes every choice; Table 2 and the presets are such values."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cpdiff_core.config import Config, UserError
from cpdiff_core.domains.style.base import (
    PIXELS,
    TINY_32,
    EmbeddedBase,
    PixArtBase,
    PretrainedBase,
    StyleBase,
    StyleBaseConfig,
    resolve_base,
    spec_of,
)
from cpdiff_core.domains.style.features import EfficientNetLite0Features, FeatureConfig
from cpdiff_core.domains.style.fine_tuning import StyleFineTuneConfig, check_lora
from cpdiff_core.domains.style.sampling import ImageSamplingConfig
from cpdiff_core.domains.style.styles import (
    STYLES,
    ExcerptImages,
    ParquetImages,
    ResolvedStyle,
    Style,
    StyleSplits,
    excerpt,
    resolve_style,
    synthetic_styles,
)
from cpdiff_core.domains.style.through_base import Objective, ThroughBaseObjective, WeightObjective
from cpdiff_core.generator.autoencoder import AutoencoderConfig, ConvAutoencoderConfig
from cpdiff_core.generator.conditions import StyleImageCondition
from cpdiff_core.generator.diffusion import DiffusionConfig, SamplingConfig, check_sampling
from cpdiff_core.generator.normalization import NormalizationConfig
from cpdiff_core.generator.training import TrainingConfig
from cpdiff_core.lora.layout import LoraSpec


class StyleExperimentConfig(Config):
    """Everything that decides the result of one style experiment. What the paper states is the default."""

    kind: Literal["style"] = "style"
    name: str = Field("my-style-experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]{0,79}$", description="Its name.")
    description: str = Field("", description="What it is for, with its expected cost.")
    base: StyleBaseConfig = Field(PretrainedBase(), description="The frozen image model (paper: PixArt-alpha).")
    photos: Style = Field(STYLES["photo"], description="What a tiny base is trained on and compared with.")
    styles: tuple[Style, ...] = Field(min_length=1, description="Q styles the generator is trained on.")
    splits: StyleSplits = StyleSplits()
    lora: LoraSpec = Field(LoraSpec(rank=4, lora_alpha=4.0), description="Rank and scale (ours: the paper states none).")
    fine_tune: StyleFineTuneConfig = StyleFineTuneConfig()
    num_runs: int = Field(1, ge=1, description="Runs per style; the paper harvests a single trajectory.")
    num_checkpoints: int = Field(64, ge=1, description="N: how many of the harvested checkpoints are used (paper: 64).")
    scored_checkpoints: int | None = Field(
        8, ge=1, description="Evenly spaced checkpoints scored for *original*; all N if None (ours)."
    )
    normalization: NormalizationConfig = NormalizationConfig()
    autoencoder: AutoencoderConfig = ConvAutoencoderConfig()
    condition: StyleImageCondition = StyleImageCondition()
    condition_features: FeatureConfig = Field(
        EfficientNetLite0Features(), description="Encoder of style images (paper: ResNet-18; ours is in the packages)."
    )
    diffusion: DiffusionConfig = DiffusionConfig()
    objective: Objective = Field(WeightObjective(), description="What the generator is trained to: weights is Eq. 8.")
    compared_objectives: tuple[Objective, ...] = Field(
        (), description="Further generators, which are compared with the first on left-out styles alone (ours)."
    )
    left_out: tuple[str, ...] = Field(
        (), description="Styles that are left out of training, one at a time, and then generated from one image (ours)."
    )
    scored: tuple[str, ...] | None = Field(None, description="Styles with a row in the table; all if None.")
    sampling: SamplingConfig = Field(SamplingConfig(num_candidates=8), description="Candidates (paper: unstated; ours 8).")
    images: ImageSamplingConfig = ImageSamplingConfig()
    features: FeatureConfig = Field(EfficientNetLite0Features(), description="Of the distance; inception gives FID.")
    select_by: Literal["kid", "frechet"] = Field(
        "kid", description="Distance that chooses (ours: KID is unbiased on the few images kept for choosing)."
    )
    seed: int = Field(42, ge=0, description="Of base, autoencoder, diffusion, conditions and sampling.")
    economies: tuple[str, ...] = Field((), description="What a small preset saves; printed under its table.")

    @model_validator(mode="after")
    def _consistent(self) -> StyleExperimentConfig:
        names = [style.name for style in (*self.styles, self.photos)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"styles: the name {twice[0]!r} occurs twice; names must differ, also from the photographs'")
        if self.num_checkpoints > self.fine_tune.num_harvest:
            raise ValueError(
                f"num_checkpoints {self.num_checkpoints} is more than fine_tune.num_harvest "
                f"{self.fine_tune.num_harvest}; harvest more or use fewer"
            )
        check_lora(self.lora)
        check_sampling(self.diffusion, self.sampling)
        for field in ("left_out", "scored"):
            chosen = getattr(self, field)
            if unknown := [name for name in chosen or () if name not in names[:-1]]:
                raise ValueError(f"{field}: {unknown[0]!r} is none of the styles; name those of `styles`")
            if chosen is not None and len(set(chosen)) < len(chosen):
                raise ValueError(f"{field}: a style is named twice; name each once")
        if self.scored == ():
            raise ValueError("scored: is empty; name at least one style, or leave it out for all")
        if self.left_out and len(self.styles) < 3:
            raise ValueError(f"left_out: {len(self.styles)} styles are too few to leave one out; at least 3 are needed")
        if self.compared_objectives and not self.left_out:
            raise ValueError("compared_objectives: are compared on left-out styles; name some in left_out")
        objectives = (self.objective, *self.compared_objectives)
        if any(one in objectives[:i] for i, one in enumerate(objectives)):
            raise ValueError("compared_objectives: an objective occurs twice; they must differ, also from `objective`")
        if any(o.kind == "through_base" for o in objectives) and self.diffusion.prediction_type != "v_prediction":
            raise ValueError("objective through_base: needs diffusion.prediction_type 'v_prediction'; set it")
        return self

    @property
    def scored_names(self) -> tuple[str, ...]:
        """The styles of the table, in the order of `styles`."""
        names = tuple(style.name for style in self.styles)
        return names if self.scored is None else tuple(name for name in names if name in self.scored)


class ResolvedStyleExperiment(Config):
    """A style experiment whose images have been found and digested."""

    config: StyleExperimentConfig
    base: StyleBase | None = Field(description="None: it is still to be pretrained.")
    photos: ResolvedStyle
    styles: tuple[ResolvedStyle, ...]


def resolve_styles(config: StyleExperimentConfig, data_dir: Path | None) -> ResolvedStyleExperiment:
    """Find the base and all images. Raises UserError for the first that is not there, and for images that the base's
    noise process cannot be sampled into as asked: known now, needed after everything has been trained."""
    base = None if isinstance(config.base, PretrainedBase) else resolve_base(config.base)
    process = PIXELS if base is None else spec_of(base, Path()).process
    images = SamplingConfig(scheduler=config.images.scheduler, num_inference_steps=config.images.num_inference_steps)
    try:
        check_sampling(process, images)
    except UserError as error:
        raise UserError(f"images: {error}") from error
    return ResolvedStyleExperiment(
        config=config, base=base, photos=resolve_style(config.photos, data_dir),
        styles=tuple(resolve_style(style, data_dir) for style in config.styles),
    )  # fmt: skip


BASE_32 = PretrainedBase(
    size=TINY_32,
    training=TrainingConfig(
        steps=58_500, batch_size=256, learning_rate=2e-3, weight_decay=0.01, ema_decay=0.999, precision="bfloat16"
    ),
)
"""What the package ships: 1.8 M parameters, 236 s of training on an H200, 300 s with compilation, by
`python -m flows.style_base --size 32`."""

BASE_64 = PretrainedBase(
    training=TrainingConfig(
        steps=14_000, batch_size=128, learning_rate=6e-4, weight_decay=0.01, ema_decay=0.999, precision="bfloat16"
    )
)
"""The default on a GPU: 20.4 M parameters, four and a half minutes of training on an H200."""

TABLE2_NAMES = ("art_painting", "cartoon", "sketch", "van_gogh_drawing")

QUICKSTART_STYLE = StyleExperimentConfig(
    name="quickstart-style",
    description="Four styles on a tiny PixArt, 32 px; under 10 minutes on 2 CPU cores.",
    base=EmbeddedBase(),
    photos=excerpt("photo"),
    styles=(excerpt("art_painting"), excerpt("cartoon"), excerpt("sketch"), excerpt("van_gogh_drawing")),
    fine_tune=StyleFineTuneConfig(num_steps=330, batch_size=16, warmup_steps=20, learning_rate=2e-3, harvest_every=5),
    scored_checkpoints=4,
    autoencoder=ConvAutoencoderConfig(training=TrainingConfig(steps=40, batch_size=32, learning_rate=3e-4)),
    condition=StyleImageCondition(num_images=180),
    diffusion=DiffusionConfig(training=TrainingConfig(steps=1000, batch_size=32, learning_rate=1e-3, ema_decay=0.99)),
    sampling=SamplingConfig(num_inference_steps=25, num_candidates=4),
    images=ImageSamplingConfig(num_images=64, scheduler="dpmsolver++", num_inference_steps=10, guidance_scale=1.0),
    economies=(
        "32 px, an excerpt of 268 to 360 images per style, LoRA batch of 16 images, one run per style, one seed",
        "64 checkpoints, one every 5 steps instead of 10; 4 evenly spaced ones stand for 'original'; 4 candidates",
        "64 images per arm, 10 steps of DPM-Solver++ without guidance",
    ),
)

TABLE2 = StyleExperimentConfig(
    name="table2/tiny",
    description="Table 2 on the styles at hand, with a 64 px PixArt pretrained on photographs; minutes on a GPU.",
    base=BASE_64,
    styles=tuple(STYLES[name] for name in TABLE2_NAMES),
    fine_tune=StyleFineTuneConfig(precision="bf16"),
)

TABLE2_PAPER = StyleExperimentConfig(
    name="table2/pixart",
    description="Table 2 as in the paper, PixArt-alpha at 512 px, for who has the images (WikiArt, SemArt) and it.",
    base=PixArtBase(),
    styles=tuple(STYLES[name] for name in ("van_gogh", "edvard", "chalk", "charcoal")),
    fine_tune=StyleFineTuneConfig(precision="bf16", batch_size=8, learning_rate=1e-4),
    images=ImageSamplingConfig(scheduler="dpmsolver++", num_inference_steps=20, guidance_scale=4.5),
)

STYLES_MANY = StyleExperimentConfig(
    name="styles-many",
    description="Styles from one image: 73 styles, 69 of them made from photographs; each of six left out once; GPU.",
    base=BASE_64,
    styles=(*(STYLES[name] for name in TABLE2_NAMES), *synthetic_styles(ParquetImages(path="vision/pacs_photo.parquet"))),
    fine_tune=StyleFineTuneConfig(precision="bf16", batch_size=32, num_steps=600, num_harvest=16),
    num_checkpoints=16,
    scored_checkpoints=4,
    normalization=NormalizationConfig(scope="batch"),
    autoencoder=ConvAutoencoderConfig(channels=128, training=TrainingConfig(steps=600, batch_size=64, learning_rate=1e-4)),
    condition=StyleImageCondition(width=128),
    diffusion=DiffusionConfig(prediction_type="v_prediction"),
    compared_objectives=(ThroughBaseObjective(),),
    left_out=(*TABLE2_NAMES, "halftone-2", "oil.vintage"),
    scored=TABLE2_NAMES,
)
"""One set of statistics for all styles, as an unseen one has none of its own; 64 components between styles and as many
inside them; v-prediction, which the objective through the base needs, for both objectives."""

STYLES_MANY_QUICK = STYLES_MANY.model_copy(
    update={
        "name": "styles-many/quick",
        "description": "The same at 32 px on the excerpt in the package: 12 styles, two left out; a check of the machinery.",
        "base": EmbeddedBase(), "photos": excerpt("photo"),
        "styles": (
            excerpt("art_painting"), excerpt("cartoon"), excerpt("sketch"), excerpt("van_gogh_drawing"),
            *synthetic_styles(ExcerptImages(name="photo"), max_images=100)[::9],
        ),
        "fine_tune": StyleFineTuneConfig(num_steps=120, batch_size=16, warmup_steps=20, learning_rate=2e-3, num_harvest=8),
        "num_checkpoints": 8, "scored_checkpoints": 2,
        "autoencoder": ConvAutoencoderConfig(training=TrainingConfig(steps=40, batch_size=32, learning_rate=3e-4)),
        "condition": StyleImageCondition(num_images=100),
        "diffusion": DiffusionConfig(
            prediction_type="v_prediction",
            training=TrainingConfig(steps=300, batch_size=32, learning_rate=1e-3, ema_decay=0.99),
        ),
        "compared_objectives": (
            ThroughBaseObjective(
                images_per_adapter=8,
                training=TrainingConfig(steps=150, batch_size=4, learning_rate=1e-3, ema_decay=0.98),
            ),
        ),
        "left_out": ("sketch", "palette-1"), "scored": ("sketch", "van_gogh_drawing"),
        "sampling": SamplingConfig(num_inference_steps=25, num_candidates=4),
        "images": ImageSamplingConfig(
            num_images=64, scheduler="dpmsolver++", num_inference_steps=10, guidance_scale=1.0
        ),
        "economies": (
            "32 px, an excerpt of 268 to 360 images per style, 120 LoRA steps of 16 images, one seed",
            "64 images per arm, 10 steps of DPM-Solver++ without guidance, 4 candidates",
            "no claim about unseen styles rests on this",
        ),
    }
)  # fmt: skip

STYLE_EXPERIMENTS = {
    item.name: item for item in (QUICKSTART_STYLE, TABLE2, STYLES_MANY, STYLES_MANY_QUICK, TABLE2_PAPER)
}
