"""Records from a hostile or damaged root: nothing is unpickled, imported or believed."""

from __future__ import annotations

import base64
import json
import os
import pickle  # noqa: TID251 - only to make what must not be read
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_stages import Number, load, logged, number

from cpdiff_core.artifacts import Artifact
from tasks.record import is_sound
from tasks.stage import folder, is_done

ONE = Number(value=1)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def pickled(record: dict[str, Any], trap: Path) -> None:
    record["metadata"]["serializer"] = {"type": "pickle", "picklelib": "cloudpickle", "picklelib_version": None}
    record["result"] = base64.encodebytes(pickle.dumps(Touch(trap))).decode()


def decoded_by_another_function(record: dict[str, Any], trap: Path) -> None:
    record["metadata"]["serializer"]["object_decoder"] = "os.mkdir"
    record["result"] = json.dumps(str(trap))


def of_another_class(record: dict[str, Any], trap: Path) -> None:
    result = json.loads(record["result"])
    record["result"] = json.dumps({"__class__": "cpdiff_core.config.LocalFile", "data": result["data"]})


def of_another_artifact(record: dict[str, Any], trap: Path) -> None:
    record["result"] = record["result"].replace(json.loads(record["result"])["data"]["fingerprint"], "0" * 20)


@pytest.mark.parametrize("forge", [pickled, decoded_by_another_function, of_another_class, of_another_artifact])
def test_forged_record_is_removed_unread_and_the_stage_runs_again(
    artifact_root: Path, tmp_path: Path, forge: Callable[[dict[str, Any], Path], None]
) -> None:
    artifact = number(ONE)
    file = folder(artifact) / "result.json"
    record = json.loads(file.read_text())
    before = json.dumps(record)
    forge(record, tmp_path / "trap")
    assert json.dumps(record) != before
    file.write_text(json.dumps(record))

    assert not is_done(artifact)
    assert load(number(ONE)) == 1.0
    assert logged(artifact_root) == ["number 1", "number 1"]
    assert not (tmp_path / "trap").exists()
    assert is_done(artifact)


def test_record_with_any_byte_flipped_or_cut_is_no_hit_or_the_same_hit(artifact_root: Path) -> None:
    artifact = number(ONE)
    record = (folder(artifact) / "result.json").read_bytes()
    assert is_sound(record, artifact)
    assert not any(is_sound(record[:length], artifact) for length in range(len(record.rstrip())))
    flipped = [record[:place] + bytes([record[place] ^ 1]) + record[place + 1 :] for place in range(len(record))]
    accepted = {place for place, text in enumerate(flipped) if is_sound(text, artifact)}
    # Where and by which version it was written decides nothing.
    free = re.finditer(rb'"(storage_key|prefect_version|storage_block_id)":("[^"]*"|null)', record)
    assert accepted <= {place for span in free for place in range(*span.span())}
    assert not is_sound(record, Artifact(stage="number", fingerprint="0" * 20))
