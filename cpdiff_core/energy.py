"""Electrical energy of the GPUs, by the counters that their driver keeps (NVML).

A counter counts what its whole board takes, whoever uses it. What the board takes when nothing runs is measured apart,
once in a process, before its first stage. Without NVML, without such a counter (before Volta, and in MIG slices) there
is no value: nothing here estimates.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Mapping
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
IDLE_SECONDS = 1.0
"""How long the counters are watched for the power of an idle board; they advance every 20 to 100 ms."""
_UUID_BYTES = 96


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class EnergyCounters:
    """The energy counters of all GPUs that the driver shows. library: NVML, loaded.

    Raises OSError if NVML does not start.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._check("nvmlInit_v2")
        count = ctypes.c_uint()
        self._check("nvmlDeviceGetCount_v2", ctypes.byref(count))
        self._boards: dict[str, ctypes.c_void_p] = {}
        for index in range(count.value):
            board, uuid = ctypes.c_void_p(), ctypes.create_string_buffer(_UUID_BYTES)
            self._check("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(board))
            self._check("nvmlDeviceGetUUID", board, uuid, ctypes.c_uint(_UUID_BYTES))
            self._boards[uuid.value.decode()] = board

    def joules(self) -> dict[str, float]:
        """UUID -> energy since the driver was loaded. Boards without a counter are left out."""
        found = {}
        for uuid, board in self._boards.items():
            millijoules = ctypes.c_ulonglong()
            if self._library.nvmlDeviceGetTotalEnergyConsumption(board, ctypes.byref(millijoules)) == 0:
                found[uuid] = millijoules.value / 1000.0
        return found

    def idle_watts(self, seconds: float = IDLE_SECONDS) -> dict[str, float]:
        """UUID -> mean power over the next `seconds`, of the boards that nobody uses before and after."""
        quiet, before, start = self._unused(), self.joules(), time.monotonic()
        if not quiet & before.keys():
            return {}
        time.sleep(seconds)
        spent, after = time.monotonic() - start, self.joules()
        return {uuid: (after[uuid] - before[uuid]) / spent for uuid in sorted(quiet & self._unused() & after.keys())}

    def _unused(self) -> set[str]:
        found = set()
        for uuid, board in self._boards.items():
            share = _Utilization()
            if self._library.nvmlDeviceGetUtilizationRates(board, ctypes.byref(share)) == 0 and share.gpu == 0:
                found.add(uuid)
        return found

    def _check(self, function: str, *arguments: Any) -> None:
        if (code := getattr(self._library, function)(*arguments)) != 0:
            raise OSError(f"{function} gives error {code}")


@functools.cache
def counters() -> EnergyCounters | None:
    """The counters of this machine; None without an NVIDIA driver."""
    try:
        return EnergyCounters(ctypes.CDLL(LIBRARY))
    except (OSError, AttributeError):  # no such library, no such function in it, or no driver behind it
        return None


@functools.cache
def idle_watts() -> Mapping[str, float]:
    """The power of the boards that were idle when this was first called in this process."""
    found = counters()
    return found.idle_watts() if found is not None else {}
