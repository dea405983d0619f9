"""Runs that train together: several devices in one process, and other processes in the same root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpdiff_core.artifacts import Artifact
from cpdiff_core.config import RuntimeConfig
from tasks import groups, stages, style_stages
from tasks.groups import FINISHED_GROUP
from tasks.stage import resume_state

SEVERAL_DEVICES = """
import time
import torch
from cpdiff_core.artifacts import Artifact
from cpdiff_core.config import RuntimeConfig
from tasks import groups

def train(works, runtime, resume):
    time.sleep(0.02 * works[0])  # so that the later ones meet the first in the middle of its import
    from diffusers import DDPMScheduler
    return [{"w": torch.zeros(1)} for _ in works]

groups.all_devices = lambda runtime: ["cpu"] * 8
members = [groups.Member(Artifact(stage="toy", fingerprint=str(i)), str(i), i // 2, i // 2) for i in range(16)]
groups.train_together(groups.GroupedStage(train, print, ('diffusers',)), members, RuntimeConfig())
print("trained")
"""


def test_threads_of_several_devices_find_lazy_packages_whole(tmp_path: Path) -> None:
    own = {"PREFECT_LOCAL_STORAGE_PATH": str(tmp_path), "PREFECT_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_DEVICES], capture_output=True, text=True, check=False, env={**os.environ, **own}
    )
    assert done.stdout.splitlines()[-1:] == ["trained"], done.stderr


@pytest.mark.parametrize("together", [stages.harvest_together, style_stages.harvest_styles_together])
def test_harvests_name_what_they_import_lazily(together, monkeypatch: pytest.MonkeyPatch) -> None:
    named = []
    monkeypatch.setitem(together.__globals__, "train_together", lambda how, members, runtime: named.extend(how.lazy))
    together([], *[[]] * (together is stages.harvest_together), RuntimeConfig())
    assert {"transformers", "peft"} <= set(named)
    assert ("diffusers" in named) == (together is style_stages.harvest_styles_together)


def test_a_finished_group_that_is_being_written_is_left_alone(artifact_root: Path) -> None:
    """Another process writes it under the locks of its members, which cannot be known yet."""
    finished = resume_state(Artifact(stage=FINISHED_GROUP, fingerprint="f"), RuntimeConfig())
    finished.folder.mkdir(parents=True)
    scratch = finished.folder / ".state-1.safetensors"
    scratch.write_bytes(b"half")
    groups._hand_out_leftovers(RuntimeConfig())
    assert scratch.exists()
    member = Artifact(stage="toy", fingerprint="m")
    finished.save({"m.w": torch.ones(2)}, {"members": [member.model_dump()], "account": {}})
    groups._hand_out_leftovers(RuntimeConfig())
    assert not finished.folder.exists()
    tensors, numbers = resume_state(member, RuntimeConfig()).load()
    assert torch.equal(tensors["w"], torch.ones(2))
    assert numbers["finished"]
