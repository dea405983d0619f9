"""Artifacts on disk: tensors as safetensors, everything else as JSON, with a digest of every file.

An `Artifact` is a name (stage and fingerprint), never a path, so a moved root keeps working. `seal` writes the
manifest when a stage has written its files, and every reader goes through `read_tensors`, `read_json` or
`checked`, which compare the digest first: a truncated or altered file is named and never used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cpdiff_core.config import Config, UserError
from cpdiff_core.progress import is_cancelled

if TYPE_CHECKING:
    import pandas as pd

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"


class Artifact(Config):
    """The output of one stage: its name and its fingerprint."""

    stage: str
    fingerprint: str

    def under(self, root: Path) -> Path:
        """The folder of this artifact below `root`."""
        return root / self.stage / self.fingerprint


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` as one safetensors file, on the CPU and contiguous. The bytes depend on the values only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    path.touch()
    rights = path.stat().st_mode  # of any new file here; safetensors puts another in its place, for its owner alone
    save_file(plain, str(path), metadata=dict(metadata or {}))
    path.chmod(stat.S_IMODE(rights))


def give_usual_rights(folder: Path) -> None:
    """Of a model's folder as libraries save it: its safetensors, which only their owner may read, get config.json's rights."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


def check_out(out: Path) -> None:
    """Whether a folder that a user has named can take what is made. It need not exist, and is not made.

    Raises UserError if there is a file, if the folder is not empty, or if it can be neither made nor written.
    """
    try:
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"--out {str(out)!r}: is not empty; choose another folder or remove it")
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"--out {str(out)!r}: {str(there)!r} is a file, not a folder; choose another name")
        with tempfile.TemporaryDirectory(dir=there, prefix=".probe-"):
            pass
    except OSError as error:
        raise UserError(f"--out {str(out)[:200]!r}: cannot be written ({error.strerror}); choose another folder") from error


def seal(folder: Path) -> None:
    """Write the manifest: the digest and size of every file under `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    write_json(
        folder / MANIFEST,
        {str(path.relative_to(folder)): {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in files},
    )


def checked(folder: Path, name: str) -> Path:
    """The path of file `name` of the artifact in `folder`, after its digest has been compared.

    Raises UserError that names the file and the stage to run again if it is missing, truncated or altered.
    """
    remedy = _remedy(folder)
    path = folder / name
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = manifest[name]["sha256"], manifest[name]["bytes"]
    except FileNotFoundError as error:
        raise UserError(f"artifact {str(folder)!r}: {MANIFEST} is missing; {remedy}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"artifact {str(folder)!r}: {MANIFEST} is damaged or lacks {name!r}; {remedy}") from error
    if not path.is_file():
        raise UserError(f"artifact file {str(path)!r}: is missing; {remedy}")
    if (sha256_of(path), path.stat().st_size) != expected:
        raise UserError(f"artifact file {str(path)!r}: is truncated or altered; {remedy}")
    return path


def _remedy(folder: Path) -> str:
    return f"delete the folder {str(folder)!r} and run again: stage {folder.parent.name!r} will be recomputed"


def verify(folder: Path) -> list[str]:
    """Every fault of the artifact in `folder`, one line each; empty if all its files are as they were written."""
    faults = []
    try:
        names = list(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return [f"artifact {str(folder)!r}: {MANIFEST} is missing or damaged"]
    for name in names:
        try:
            checked(folder, name)
        except UserError as error:
            faults.append(str(error))
    return faults


def read_json(folder: Path, name: str) -> Any:
    return json.loads(checked(folder, name).read_text(encoding="utf-8"))


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """A CSV of an artifact, checked. Numbers are those that were written, bit for bit, and names of tasks, styles, arms and
    metrics are text: a style may be called 2024 or NA."""
    import pandas as pd  # half a second, which most that read artifacts are spared

    return pd.read_csv(
        checked(folder, name), dtype=dict.fromkeys(("task", "style", "arm", "metric"), str), keep_default_na=False,
        na_values=[""], float_precision="round_trip",
    )  # fmt: skip


def provenance_of(artifacts: Iterable[Artifact], root: Path) -> dict[Artifact, dict[str, Any]]:
    """What is known of how each artifact was made; shared ones once, those without a record left out. Raises UserError for
    a damaged record."""
    found = {}
    for artifact in dict.fromkeys(artifacts):
        path = artifact.under(root) / PROVENANCE
        if path.is_file():
            try:
                found[artifact] = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise UserError(f"artifact file {str(path)!r}: is damaged; {_remedy(path.parent)}") from error
    return found


def read_tensors(folder: Path, name: str, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    path = checked(folder, name)
    with safe_open(str(path), framework="pt", device=str(device)) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


class ResumeState:
    """What a long stage needs to go on after a kill: tensors and a few numbers, replaced atomically.

    Lives outside the artifact and is discarded after the commit. A damaged or missing state reads as None: the
    stage starts from the beginning, which costs time and never correctness.
    """

    def __init__(self, folder: Path, every_seconds: float = 30.0) -> None:
        self.folder = folder
        self.every_seconds = every_seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether `every_seconds` have passed since the last save (or since this object was made), or the loop around
        has been asked to stop."""
        return is_cancelled() or time.monotonic() - self._last >= self.every_seconds

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f".state-{os.getpid()}.safetensors"
        write_tensors(scratch, tensors, {"numbers": json.dumps(dict(numbers), sort_keys=True)})
        os.replace(scratch, self.folder / "state.safetensors")
        self._last = time.monotonic()

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        path = self.folder / "state.safetensors"
        try:
            with safe_open(str(path), framework="pt") as file:
                numbers = json.loads(file.metadata()["numbers"])
                return {key: file.get_tensor(key) for key in file.keys()}, numbers  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None

    def numbers(self) -> dict[str, Any] | None:
        """The numbers of the saved state without its tensors, which may be gigabytes; None as `load`."""
        try:
            with safe_open(str(self.folder / "state.safetensors"), framework="pt") as file:
                value: dict[str, Any] = json.loads(file.metadata()["numbers"])
                return value
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
