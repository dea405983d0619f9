"""The style table: what a style is, where its images come from, and how they are split.

A style is a value: its images (a folder, a Parquet file, or a metadata table with a filter) and nothing else. Adding
one is adding a row. Captions carry content only, "a picture of a {class}", so that style sits in the LoRA alone.

Splits are by group (the two crops of one drawing stay together): `train` is fine-tuned on and gives the training
conditions, `selection` chooses among checkpoints and candidates, `report` is what tables are measured against.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import Field

from cpdiff_core.config import Config, LocalFile, UserError
from cpdiff_core.domains.style.images import IMAGE_SUFFIXES, read_image
from cpdiff_core.domains.style.synthetic import PAIRS, VARIANTS, EffectName, stylise

SplitName = Literal["train", "selection", "report"]
StyleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
EXCERPT_FOLDER = Path(__file__).parent / "excerpt"


class ParquetImages(Config):
    """Images as bytes in a Parquet file, one row each."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(description="The file; relative paths start at --data-dir.")
    image_column: str = "image"
    class_column: str | None = Field("class", description="What is shown; for captions. None: `Style.content`.")
    group_column: str | None = Field("source", description="Rows with equal values stay in one split.")
    group_until: str = Field("#", description="Only the part of that value before this mark counts.")


class FolderImages(Config):
    """All images below a folder. The name of a subfolder is the class of its images."""

    kind: Literal["folder"] = "folder"
    path: str = Field(description="The folder; relative paths start at --data-dir.")


class Where(Config):
    """Keep the rows whose `column` contains `contains`, whatever the case."""

    column: str
    contains: str = Field(min_length=1)


class MetadataImages(Config):
    """Image files named by a table, of which a filter keeps some: WikiArt by artist, SemArt by technique."""

    kind: Literal["metadata"] = "metadata"
    table: str = Field(description="CSV or tab-separated file; relative paths start at --data-dir.")
    folder: str = Field(description="Where the image files lie.")
    where: tuple[Where, ...] = Field(min_length=1, description="All of these must hold.")
    file_column: str = "filename"
    class_column: str | None = None
    separator: str = ","
    encoding: str = "utf-8"


class ExcerptImages(Config):
    """The small excerpt inside this package, 32 px."""

    kind: Literal["excerpt"] = "excerpt"
    name: Literal["photo", "art_painting", "cartoon", "sketch", "van_gogh_drawing"]


PhotoSource = Annotated[ParquetImages | FolderImages | ExcerptImages, Field(discriminator="kind")]


class SyntheticImages(Config):
    """Photographs under a chain of effects (`synthetic.py`)."""

    kind: Literal["synthetic"] = "synthetic"
    photos: PhotoSource
    effects: tuple[EffectName, ...] = Field(min_length=1, description="Applied in this order.")
    seed: int = Field(0, ge=0, description="Of every effect's colours, angles and sizes.")
    split_as: str = Field(
        "photo",
        description="Divided as the style of this name: no photograph is trained on in one style and reported in another.",
    )
    max_images: int = Field(300, ge=8, description="Most images of each split, evenly spaced (ours: many styles, less of each).")


ImageSource = Annotated[
    ParquetImages | FolderImages | MetadataImages | ExcerptImages | SyntheticImages, Field(discriminator="kind")
]


class Style(Config):
    """One row of the style table."""

    name: StyleName
    source: ImageSource
    content: str = Field("scene", min_length=1, description="What its images show, where no class is known.")


class StyleSplits(Config):
    """How the images of a style are divided (ours: the paper says nothing)."""

    report_fraction: float = Field(0.4, gt=0, lt=1, description="Share of the groups that tables measure against.")
    selection_fraction: float = Field(0.1, gt=0, lt=1, description="Share of the groups for choosing.")
    max_report: int = Field(512, ge=8, description="Most images to measure against; the rest is trained on.")
    max_selection: int = Field(256, ge=4, description="Most images for choosing; the rest is trained on.")
    seed: int = Field(0, ge=0, description="Of the division.")


class ResolvedStyle(Config):
    """A style whose images have been found and digested. Its identity is content, classes and groups: no paths."""

    style: Style
    files: tuple[LocalFile, ...]
    classes: tuple[str, ...] = Field((), description="Of each file; empty for Parquet, which has a column.")

    @property
    def name(self) -> str:
        return self.style.name

    def identity(self) -> Any:
        source = _without_paths(self.style.source.model_dump())
        named = [[self.classes[i] if self.classes else "", file.sha256] for i, file in enumerate(self.files)]
        return {"name": self.style.name, "content": self.style.content, "source": source, "files": sorted(named)}


def _without_paths(source: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in source.items() if key not in ("path", "table", "folder", "where")}
    return {key: _without_paths(value) if isinstance(value, dict) else value for key, value in kept.items()}


@dataclass(frozen=True)
class StyleImages:
    """images_NCHW: uint8. classes: what each shows. groups: number of the work that each belongs to."""

    images_NCHW: torch.Tensor
    classes: tuple[str, ...]
    groups: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.classes)

    def rows(self, index: NDArray[np.int64]) -> StyleImages:
        images_NCHW = self.images_NCHW[torch.from_numpy(index)]
        return StyleImages(images_NCHW, tuple(self.classes[i] for i in index), self.groups[index])


def resolve_style(style: Style, data_dir: Path | None) -> ResolvedStyle:
    """Find and digest a style's images. Raises UserError that says what was looked for and where."""
    source, base = style.source, data_dir or Path()
    if isinstance(source, SyntheticImages):
        found = resolve_style(style.model_copy(update={"source": source.photos}), data_dir)
        return found.model_copy(update={"style": style})
    if isinstance(source, ExcerptImages):
        return ResolvedStyle(style=style, files=(LocalFile.of(EXCERPT_FOLDER / f"{source.name}.parquet"),))
    if isinstance(source, ParquetImages):
        path = base / Path(source.path).expanduser()
        if not path.is_file():
            raise UserError(
                f"style {style.name!r}: image file {str(path)!r} does not exist; check the path or give --data-dir, "
                "or run quickstart-style, whose images are inside the package"
            )
        return ResolvedStyle(style=style, files=(LocalFile.of(path),))
    if isinstance(source, FolderImages):
        folder = base / Path(source.path).expanduser()
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        classes = [path.parent.name if path.parent != folder else style.content for path in paths]
    else:
        folder = base / Path(source.folder).expanduser()
        paths, classes = _from_table(style, source, base, folder)
    if not paths:
        raise UserError(
            f"style {style.name!r}: no image in {str(folder)!r}"
            + ("" if isinstance(source, FolderImages) else f" of the {len(classes)} that the filter keeps")
            + f"; endings looked for: {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return ResolvedStyle(style=style, files=tuple(LocalFile.of(path) for path in paths), classes=tuple(classes))


def _from_table(style: Style, source: MetadataImages, base: Path, folder: Path) -> tuple[list[Path], list[str]]:
    """The files that the filter keeps and that exist, with what they show."""
    table = base / Path(source.table).expanduser()
    try:
        rows = pd.read_csv(table, sep=source.separator, encoding=source.encoding, dtype=str, keep_default_na=False)
    except (OSError, UnicodeError, ValueError) as error:
        fault = f"style {style.name!r}: metadata table {str(table)!r} cannot be read ({error}); check it"
        raise UserError(fault) from error
    wanted = [source.file_column, *(where.column for where in source.where), *filter(None, [source.class_column])]
    if missing := [column for column in wanted if column not in rows]:
        raise UserError(
            f"style {style.name!r}: column {missing[0]!r} is not in {str(table)!r}; it has {', '.join(map(str, rows.columns))}"
        )
    for where in source.where:
        rows = rows[rows[where.column].str.contains(where.contains, case=False, regex=False)]
    if rows.empty:
        shown = " and ".join(f"{where.column} contains {where.contains!r}" for where in source.where)
        raise UserError(f"style {style.name!r}: no row of {str(table)!r} has {shown}; check the filter")
    classes = rows[source.class_column] if source.class_column else [style.content] * len(rows)
    files = [folder / name for name in rows[source.file_column]]
    found = [(file, shown) for file, shown in zip(files, classes, strict=True) if file.is_file()]
    return [path for path, _ in found], [shown for _, shown in found] if found else list(classes)


@lru_cache(maxsize=32)
def load_images(resolved: ResolvedStyle, size: int) -> StyleImages:
    """All images of a style at `size` px, in an order that depends on their content alone; of a synthetic one, its
    photographs."""
    style, source = resolved.style, resolved.style.source
    if isinstance(source, SyntheticImages):  # under one name, so that all styles made of them share what is read
        photos = Style(name=source.split_as, source=source.photos)
        return load_images(resolved.model_copy(update={"style": photos}), size)
    if isinstance(source, FolderImages | MetadataImages):
        order = sorted(range(len(resolved.files)), key=lambda i: (resolved.files[i].sha256, resolved.classes[i]))
        images = [read_image(Path(resolved.files[i].path), size) for i in order]
        # Files with the same bytes are one work.
        digests = {resolved.files[i].sha256: number for number, i in enumerate(order)}
        groups = np.array([digests[resolved.files[i].sha256] for i in order])
        return StyleImages(torch.stack(images), tuple(resolved.classes[i] for i in order), groups)
    if isinstance(source, ExcerptImages):
        source = ParquetImages(path=resolved.files[0].path)
    table = _read_parquet(style, source, Path(resolved.files[0].path))
    images = [read_image(data, size, f"{style.name} row {row}") for row, data in enumerate(_bytes_of(style, source, table))]
    classes = tuple(map(str, table[source.class_column])) if source.class_column else (style.content,) * len(table)
    groups = np.arange(len(table))
    if source.group_column is not None:
        works = table[source.group_column].astype(str)
        groups = pd.factorize(works.str.split(source.group_until).str[0] if source.group_until else works)[0]
    return StyleImages(torch.stack(images), classes, groups.astype(np.int64))


def _read_parquet(style: Style, source: ParquetImages, path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"style {style.name!r}: {str(path)!r} is no readable Parquet file ({error})") from error
    for column in filter(None, [source.image_column, source.class_column, source.group_column]):
        if column not in table:
            raise UserError(
                f"style {style.name!r}: column {column!r} is not in {str(path)!r}; it has {', '.join(map(str, table.columns))}"
            )
    if table.empty:
        raise UserError(f"style {style.name!r}: {str(path)!r} has no rows")
    return table


def _bytes_of(style: Style, source: ParquetImages, table: pd.DataFrame) -> list[bytes]:
    """Bytes alone, or the {"bytes": ...} of the datasets library."""
    cells = [value.get("bytes") if isinstance(value, dict) else value for value in table[source.image_column]]
    values = [value for value in cells if isinstance(value, bytes)]
    if len(values) < len(cells):
        raise UserError(f"style {style.name!r}: column {source.image_column!r} must hold the bytes of image files")
    return values


def split_rows(images: StyleImages, splits: StyleSplits, name: str, split: SplitName) -> NDArray[np.int64]:
    """The rows of one split, groups kept together, as a function of the style's name and the seed.

    Raises UserError if a style is too small to be split.
    """
    groups = np.unique(images.groups)
    order = np.random.default_rng([splits.seed, zlib.crc32(name.encode())]).permutation(len(groups))
    sizes = np.bincount(images.groups)[groups][order].cumsum()
    report = min(round(splits.report_fraction * len(groups)), int(np.searchsorted(sizes, splits.max_report, side="right")))
    left = sizes[report:] - (sizes[report - 1] if report else 0)
    selection = min(
        round(splits.selection_fraction * len(groups)), int(np.searchsorted(left, splits.max_selection, side="right"))
    )
    cuts = np.split(order, [report, report + selection])
    parts: dict[SplitName, NDArray[np.int64]] = dict(zip(("report", "selection", "train"), cuts, strict=True))
    if min(map(len, parts.values())) == 0:
        raise UserError(
            f"style {name!r}: {len(images)} images of {len(groups)} works are too few for training, choosing and "
            "reporting; give more images"
        )
    return np.flatnonzero(np.isin(images.groups, groups[parts[split]]))


def split_images(resolved: ResolvedStyle, splits: StyleSplits, split: SplitName, size: int) -> StyleImages:
    """The images of one split at `size` px."""
    images, source = load_images(resolved, size), resolved.style.source
    if not isinstance(source, SyntheticImages):
        return images.rows(split_rows(images, splits, resolved.name, split))
    rows = split_rows(images, splits, source.split_as, split)
    rows = rows[np.arange(min(len(rows), source.max_images)) * len(rows) // min(len(rows), source.max_images)]
    photos = images.rows(rows)
    return replace(photos, images_NCHW=stylise(photos.images_NCHW, source.effects, source.seed))


def _parquet(name: str, file: str) -> Style:
    return Style(name=name, source=ParquetImages(path=f"vision/{file}.parquet"))


def _wikiart(name: str, artist: str) -> Style:
    return Style(
        name=name, content="painting",
        source=MetadataImages(
            table="wikiart/classes.csv", folder="wikiart", where=(Where(column="artist", contains=artist),)
        ),
    )  # fmt: skip


def _semart(name: str, technique: str) -> Style:
    return Style(
        name=name, content="drawing",
        source=MetadataImages(
            table="SemArt/semart_train.csv", folder="SemArt/Images", separator="\t", encoding="latin-1",
            file_column="IMAGE_FILE", where=(Where(column="TECHNIQUE", contains=technique),),
        ),
    )  # fmt: skip


STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        _parquet("photo", "pacs_photo"),
        _parquet("art_painting", "pacs_art_painting"),
        _parquet("cartoon", "pacs_cartoon"),
        _parquet("sketch", "pacs_sketch"),
        _parquet("van_gogh_drawing", "van_gogh_drawing"),
        _wikiart("van_gogh", "vincent van gogh"),
        _wikiart("edvard", "edvard munch"),
        _semart("chalk", "chalk"),
        _semart("charcoal", "charcoal"),
    )
}
"""Ours: the paper names Van Gogh, Edvard, Chalk and Charcoal and says neither where from nor how chosen."""


def excerpt(name: Literal["photo", "art_painting", "cartoon", "sketch", "van_gogh_drawing"]) -> Style:
    """A style on the excerpt inside this package."""
    return Style(name=name, source=ExcerptImages(name=name))


def synthetic_styles(photos: PhotoSource, **options: Any) -> tuple[Style, ...]:
    """The rows of the table that are made from these photographs: single effects by seed, and pairs of effects."""
    chains: list[tuple[tuple[EffectName, ...], int]] = [
        ((effect,), seed) for effect, number in VARIANTS.items() for seed in range(1, number + 1)
    ]
    chains += [(pair, 100 + number) for number, pair in enumerate(PAIRS)]
    return tuple(
        Style(
            name=".".join(effects) + (f"-{seed}" if len(effects) == 1 else ""),
            source=SyntheticImages(photos=photos, effects=effects, seed=seed, **options),
        )
        for effects, seed in chains
    )  # fmt: skip
