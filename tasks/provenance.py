"""Where an artifact came from: code, versions, machine and cost. Written beside it and never part of its identity."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import cpdiff_core
from cpdiff_core import energy

PACKAGES = ("torch", "transformers", "peft", "diffusers", "prefect")


@functools.cache
def commit() -> str | None:
    """The git commit of the source tree, with '-dirty' if it has been changed; None for an installed package."""
    folder = Path(cpdiff_core.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"cpdiff": cpdiff_core.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def device_name(device: str) -> str:
    """The name of the hardware behind RuntimeConfig.device."""
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.cuda.get_device_name("cuda" if device == "auto" else device)
    return _processor()


def gpu_uuid(device: str) -> str | None:
    """What NVML calls the GPU behind RuntimeConfig.device; None if that is the processor."""
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return f"GPU-{torch.cuda.get_device_properties('cuda' if device == 'auto' else device).uuid}"
    return None


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def signed(provenance: dict[str, Any]) -> dict[str, Any]:
    """With a digest of itself: the manifest has none of it, because it differs between equal results."""
    return provenance | {"sha256": hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()}


def is_intact(provenance: Any) -> bool:
    """Whether what was read is what `signed` gave."""
    if not isinstance(provenance, dict):
        return False
    return signed({key: value for key, value in provenance.items() if key != "sha256"}) == provenance


class Meter:
    """Time, memory and energy of one stage, from when it is made."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._idle_watts = energy.idle_watts()  # measured by the first of a process, before any stage has begun
        self._counters = energy.counters()
        self._joules = self._counters.joules() if self._counters is not None else {}
        self._start = time.monotonic()
        self._processor = time.process_time()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def provenance(self) -> dict[str, Any]:
        """`peak_process_bytes` is the highest of the process so far, `peak_gpu_bytes` that of the stage (None without
        a GPU), or of what ran beside it in other threads; so are `processor_seconds`. `gpu_seconds`: how long it had a
        GPU. `gpu_joules`: of the whole board; None where no counter was read. `gpu_idle_watts`: None where unknown."""
        seconds = round(time.monotonic() - self._start, 3)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        gpu = gpu_uuid(self._device)
        now = self._counters.joules() if self._counters is not None and gpu is not None else {}
        joules = round(now[gpu] - self._joules[gpu], 3) if gpu in now and gpu in self._joules else None
        return {
            "commit": commit(),
            "versions": versions(),
            "device": device_name(self._device),
            "torch_threads": torch.get_num_threads(),
            "seconds": seconds,
            "processor_seconds": round(time.process_time() - self._processor, 3),
            "gpu_seconds": seconds if gpu is not None else 0.0,
            "gpu_joules": joules,
            "gpu_idle_watts": self._idle_watts.get(gpu) if gpu is not None else None,
            "peak_process_bytes": peak,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
