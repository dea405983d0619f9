"""What comes from a form must stay where the worker's owner has put it.

Whoever may start a flow run types names and paths. They are taken below the root and below the data folder only, which
the worker's environment sets (PREFECT_LOCAL_STORAGE_PATH and CPDIFF_DATA_DIR), never a form.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.experiment_config import ExperimentConfig
from flows.startup import checked_device
from tasks.environment import ROOT_VARIABLE, check_root, chosen_settings, root

DATA_VARIABLE = "CPDIFF_DATA_DIR"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")


def worker_root() -> Path:
    """The root that the worker's owner has chosen, tried. Raises UserError if that is none that stays or can be used: what is
    not absolute would lie in the run's working folder, which the worker removes with all that is in it."""
    value = chosen_settings().get(ROOT_VARIABLE)
    if not value:
        raise UserError(f"{ROOT_VARIABLE}: is not set where the worker runs; start the worker with it, such as ~/.cpdiff")
    _check_absolute(ROOT_VARIABLE, value)
    check_root(path := root())
    return path


def data_dir() -> Path | None:
    """The folder with data that the worker's owner offers to forms, or None. Raises UserError if it is not absolute."""
    value = os.environ.get(DATA_VARIABLE)
    if value:
        _check_absolute(DATA_VARIABLE, value)
    return Path(value).expanduser().resolve() if value else None


def _check_absolute(variable: str, value: str) -> None:
    if not Path(value).expanduser().is_absolute():
        raise UserError(
            f"{variable} {value!r}: is relative, and every run has a working folder of its own, which is removed when it ends; "
            "start the worker with an absolute path"
        )


def runtime(device: str, num_threads: int | None) -> RuntimeConfig:
    """How a run that was started from a form is computed. Raises UserError for a root that cannot be used or a device that
    is not there."""
    worker_root()
    folder = data_dir()
    return RuntimeConfig(device=checked_device(device), num_threads=num_threads, data_dir=str(folder) if folder else None)


def named_folder(parent: Path, field: str, name: str) -> Path:
    """`parent/name`. Raises UserError unless `name` is a plain name, which `..`, slashes and links out are not."""
    folder = parent / name
    if not _NAME.fullmatch(name) or not folder.resolve().is_relative_to(parent.resolve()):
        raise UserError(f"{field} {name!r}: must be a plain name of letters, digits, dots, dashes and underscores")
    return folder


def data_file(field: str, name: str) -> Path:
    """A file below the data folder. Raises UserError if there is no data folder, the file lies outside, or is none."""
    folder = data_dir()
    if folder is None:
        raise UserError(f"{field} {name!r}: this worker offers no files; set {DATA_VARIABLE} where it runs")
    path = folder / name
    try:
        below, is_file = path.resolve().is_relative_to(folder), path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a zero
        below, is_file = True, False
    if Path(name).is_absolute() or not below:
        raise UserError(f"{field} {name!r}: must lie below {DATA_VARIABLE} of the worker; give a path relative to it")
    if not is_file:
        raise UserError(f"{field} {name[:200]!r}: is no file below {DATA_VARIABLE} of the worker, {str(folder)!r}")
    return path


def generator(parent: Path, name: str, experiments: Collection[str]) -> str:
    """A generator from a form: builtin/<name>, one of `experiments`, or a folder `parent/name`. Raises UserError."""
    if name in experiments:
        return name
    if name.startswith("builtin/"):
        named_folder(parent, "generator", name.removeprefix("builtin/"))
        return name
    folder = named_folder(parent, "generator", name)
    if not folder.is_dir():
        raise UserError(
            f"generator {name!r}: is no experiment whose generator can be taken and no folder below {str(parent)!r}; "
            "choose an experiment, builtin/NAME, or put a generator there with `cpdiff export-generator`"
        )
    return str(folder)


def check_experiment(experiment: ExperimentConfig) -> None:
    """Raises UserError if a full configuration from a form reads files outside the data folder."""
    for task in experiment.tasks:
        if task.data.kind == "files":
            data_file(f"tasks.{task.name}.data.train", task.data.train)
            data_file(f"tasks.{task.name}.data.validation", task.data.validation)
    check_model("base_model.name", experiment.base_model.name)


def check_model(field: str, name: str) -> None:
    """Raises UserError if a model from a form is a folder: known names and hub ids (`owner/name`) only."""
    part = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
    if not re.fullmatch(rf"{part}(/{part})?", name) or Path(name).exists():
        raise UserError(f"{field} {name!r}: a form takes a known name or a hub id; use `cpdiff run` for a local folder")
