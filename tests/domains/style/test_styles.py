"""The style table: folders, Parquet, metadata with a filter; identity by content; splits by work."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from style_pictures import encoded, picture

from cpdiff_core.config import UserError, fingerprint
from cpdiff_core.domains.style.styles import (
    STYLES,
    FolderImages,
    MetadataImages,
    ParquetImages,
    Style,
    StyleSplits,
    Where,
    excerpt,
    load_images,
    resolve_style,
    split_images,
    split_rows,
)


def key(resolved: object) -> str:
    return fingerprint("test", 1, {"style": resolved})


def test_folder_takes_classes_from_subfolders(make_style, tmp_path: Path) -> None:
    resolved = make_style("inks", 6)
    (tmp_path / "inks" / "notes.txt").write_text("no image")
    picture(99).save(tmp_path / "inks" / "loose.png")
    again = resolve_style(resolved.style.model_copy(update={"content": "tree"}), tmp_path)
    assert sorted(load_images(again, 8).classes) == ["dog"] * 3 + ["house"] * 3 + ["tree"]


def test_identity_is_content_and_class_never_the_path(make_style, tmp_path: Path) -> None:
    resolved = make_style("inks", 4)
    moved = shutil.copytree(tmp_path / "inks", tmp_path / "elsewhere" / "inks")
    style = Style(name="inks", source=FolderImages(path=str(moved)))
    assert key(resolve_style(style, None)) == key(resolved)
    picture(77).save(moved / "dog" / "0.png")
    changed = key(resolve_style(style, None))
    assert changed != key(resolved)
    shutil.move(moved / "dog" / "2.png", moved / "house" / "2.png")
    assert key(resolve_style(style, None)) not in (changed, key(resolved))


def parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    pd.DataFrame(rows).to_parquet(path)
    return path


def test_crops_of_one_work_stay_in_one_split(tmp_path: Path) -> None:
    rows = [
        {"image": encoded(picture(work), "PNG"), "class": "landscape", "source": f"Tree {work}#{crop}"}
        for work in range(30) for crop in range(2)
    ]  # fmt: skip
    style = Style(name="drawing", source=ParquetImages(path=str(parquet(tmp_path / "a.parquet", rows))))
    images = load_images(resolve_style(style, None), 8)
    rows_of = [split_rows(images, StyleSplits(), "drawing", split) for split in ("train", "selection", "report")]
    parts = [set(images.groups[part]) for part in rows_of]
    assert [len(part) for part in parts] == [15, 3, 12]
    assert len(parts[0] | parts[1] | parts[2]) == 30


def test_splits_are_disjoint_complete_and_limited(make_style) -> None:
    images = load_images(make_style("inks", 50), 8)
    splits = StyleSplits(max_report=10, max_selection=4, selection_fraction=0.2)
    parts = [split_rows(images, splits, "inks", s) for s in ("train", "selection", "report")]
    assert [len(part) for part in parts] == [36, 4, 10]
    assert sorted(np.concatenate(parts)) == list(range(50))
    other = split_rows(images, splits.model_copy(update={"seed": 1}), "inks", "report")
    assert set(other) != set(parts[2])


def test_metadata_filter_keeps_matching_rows_that_exist(tmp_path: Path) -> None:
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    table = tmp_path / "table.tsv"
    table.write_text(
        "IMAGE_FILE\tTECHNIQUE\tTYPE\n0.png\tBlack Chalk on paper\tportrait\n1.png\tOil\tportrait\n"
        "2.png\tRed chalk\tlandscape\n9.png\tchalk\tstudy\n", encoding="latin-1"
    )  # fmt: skip
    source = MetadataImages(
        table="table.tsv", folder=".", separator="\t", encoding="latin-1", file_column="IMAGE_FILE",
        class_column="TYPE", where=(Where(column="TECHNIQUE", contains="chalk"),),
    )  # fmt: skip
    resolved = resolve_style(Style(name="chalk", source=source), tmp_path)
    assert [Path(file.path).name for file in resolved.files] == ["0.png", "2.png"]
    assert resolved.classes == ("portrait", "landscape")


def metadata(tmp_path: Path, **changes: object) -> Style:
    (tmp_path / "t.csv").write_text("filename,artist\na.png,Munch\n")
    values = {"table": "t.csv", "folder": ".", "where": (Where(column="artist", contains="munch"),)} | changes
    return Style(name="edvard", source=MetadataImages(**values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no image in .* of the 1 that the filter keeps"),
        ({"table": "gone.csv"}, "metadata table .*gone.csv.* cannot be read"),
        ({"file_column": "file"}, "column 'file' is not in .*; it has filename, artist"),
        ({"where": (Where(column="artist", contains="klee"),)}, "no row of .* has artist contains 'klee'"),
    ],
)
def test_metadata_fault_is_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"style 'edvard': {message}") as fault:
        resolve_style(metadata(tmp_path, **changes), tmp_path)
    assert "\n" not in str(fault.value)


def test_folder_without_an_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"style 'x': no image in .*empty"):
        resolve_style(Style(name="x", source=FolderImages(path="empty")), tmp_path)


def test_parquet_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"style 'sketch': .*pacs_sketch.parquet' does not exist"):
        resolve_style(STYLES["sketch"], tmp_path)
    path = parquet(tmp_path / "a.parquet", [{"image": "text", "class": "dog", "source": "a"}])
    style = Style(name="x", source=ParquetImages(path=str(path)))
    with pytest.raises(UserError, match="column 'image' must hold the bytes"):
        load_images(resolve_style(style, None), 8)
    style = Style(name="x", source=ParquetImages(path=str(path), image_column="picture"))
    with pytest.raises(UserError, match="column 'picture' is not in"):
        load_images(resolve_style(style, None), 8)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    style = Style(name="x", source=ParquetImages(path=str(tmp_path / "b.parquet")))
    with pytest.raises(UserError, match="no readable Parquet file"):
        load_images(resolve_style(style, None), 8)


def test_style_too_small_to_split_is_named(make_style) -> None:
    with pytest.raises(UserError, match="style 'tiny': 2 images of 2 works are too few"):
        split_images(make_style("tiny", 2), StyleSplits(), "train", 8)


def test_photographs_that_the_embedded_base_was_trained_on_are_training_images_of_the_excerpt() -> None:
    """The excerpt's column `split` says where each photograph was when the base was made from the whole set."""
    resolved = resolve_style(excerpt("photo"), None)
    then = pd.read_parquet(resolved.files[0].path)["split"].to_numpy()
    images = load_images(resolved, 32)
    for split in ("train", "selection", "report"):
        assert set(then[split_rows(images, StyleSplits(), "photo", split)]) == {split}


def test_excerpt_splits_four_styles_and_photographs() -> None:
    for name in ("photo", "van_gogh_drawing"):
        images = split_images(resolve_style(excerpt(name), None), StyleSplits(), "train", 32)
        assert images.images_NCHW.shape[1:] == (3, 32, 32)
        assert len(images) > 100
