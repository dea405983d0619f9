"""Digests: whatever happens to a manifest, it is named."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from cpdiff_core.artifacts import (
    MANIFEST,
    PROVENANCE,
    Artifact,
    ResumeState,
    provenance_of,
    read_table,
    seal,
    verify,
    write_json,
    write_tensors,
)
from cpdiff_core.config import UserError


def test_every_flipped_bit_of_a_manifest_is_named(tmp_path: Path) -> None:
    """All bits, not some: a flip in the name of a field was once read past."""
    write_json(tmp_path / "scores.json", {"accuracy": 0.5})
    seal(tmp_path)
    manifest = tmp_path / MANIFEST
    content = manifest.read_bytes()
    assert verify(tmp_path) == []
    unnoticed = []
    for place in range(len(content)):
        for bit in range(8):
            manifest.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
            if not verify(tmp_path):
                unnoticed.append((place, bit))
    assert unnoticed == []


def test_tensors_may_be_read_by_whom_other_new_files_may(tmp_path: Path) -> None:
    """safetensors itself writes for the owner alone, so that a root could not be shared."""
    (tmp_path / "other").touch()
    write_tensors(tmp_path / "numbers.safetensors", {"a": torch.zeros(2)})
    assert (tmp_path / "numbers.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    ResumeState(tmp_path / "state").save({"a": torch.zeros(2)}, {})
    assert (tmp_path / "state" / "state.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_damaged_provenance_names_the_stage_to_run_again(tmp_path: Path, text: str) -> None:
    artifact = Artifact(stage="fit_head", fingerprint="0" * 20)
    assert provenance_of([artifact], tmp_path) == {}
    artifact.under(tmp_path).mkdir(parents=True)
    (artifact.under(tmp_path) / PROVENANCE).write_text(text)
    with pytest.raises(UserError, match=r"provenance\.json': is damaged; delete the folder .*stage 'fit_head' will be"):
        provenance_of([artifact], tmp_path)


def test_tables_keep_names_as_text_and_numbers_to_the_bit(tmp_path: Path) -> None:
    written = pd.DataFrame(
        {
            "style": ["2024", "01", "NA", "None"], "arm": ["null", "nan", "generated", "1e3"],
            "estimate": [0.1 + 0.2, 1 / 3, None, 7.0],
        }
    )  # fmt: skip
    written.to_csv(tmp_path / "results.csv", index=False)
    seal(tmp_path)
    pd.testing.assert_frame_equal(read_table(tmp_path, "results.csv"), written, check_exact=True, check_dtype=False)
    (tmp_path / "results.csv").write_text("style\nother\n")
    with pytest.raises(UserError, match="truncated or altered"):
        read_table(tmp_path, "results.csv")
