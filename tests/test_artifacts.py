"""Digests: whatever happens to a manifest, it is named."""

from __future__ import annotations

from pathlib import Path

from cpdiff_core.artifacts import MANIFEST, seal, verify, write_json


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
