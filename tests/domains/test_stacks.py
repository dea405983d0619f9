"""The device of a stage, and how many CPU threads it may use there."""

from __future__ import annotations

import pytest
import torch

from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.glue.stacks import THREADS_BESIDE_A_GPU, device_of


@pytest.mark.parametrize(
    ("runtime", "variable", "expected"),
    [
        (RuntimeConfig(device="cuda"), None, [THREADS_BESIDE_A_GPU]),
        (RuntimeConfig(device="cuda"), "32", []),
        (RuntimeConfig(device="cuda", num_threads=12), None, [12]),
        (RuntimeConfig(device="cpu"), None, []),
        (RuntimeConfig(device="cpu", num_threads=3), None, [3]),
    ],
)
def test_a_process_with_a_gpu_takes_few_threads_unless_told(
    runtime: RuntimeConfig, variable: str | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 32)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert device_of(runtime).type == runtime.device
    assert asked == expected
