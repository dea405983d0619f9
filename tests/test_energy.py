"""Energy counters through the C interface of NVML: a driver library built here, of two boards one of which has no counter."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from cpdiff_core.energy import EnergyCounters, counters

# Board 0 takes 80 W and is idle; board 1 has no counter; board 2 is in use. Codes as in nvml.h: 0 success, 3 not supported.
DRIVER = r"""
#include <stdio.h>
#include <time.h>
typedef struct { int number; } *nvmlDevice_t;
static struct { int number; } boards[3] = {{0}, {1}, {2}};
static struct timespec first;
int nvmlInit_v2(void) { clock_gettime(CLOCK_MONOTONIC, &first); return FAILURE; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int i, nvmlDevice_t *device) { *device = (nvmlDevice_t)&boards[i]; return 0; }
int nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length) {
    snprintf(uuid, length, "GPU-%d", device->number); return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *millijoules) {
    struct timespec now;
    if (device->number == 1) return 3;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *millijoules = 5000000000ULL + 80.0 * ((now.tv_sec - first.tv_sec) * 1e3 + (now.tv_nsec - first.tv_nsec) / 1e6);
    return 0;
}
int nvmlDeviceGetUtilizationRates(nvmlDevice_t device, struct { unsigned int gpu, memory; } *share) {
    share->gpu = device->number == 2 ? 37 : 0; share->memory = 0; return 0;
}
"""


def driver(folder: Path, failure: int = 0) -> ctypes.CDLL:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler on this machine: the energy counters were not tested")
    (folder / "nvml.c").write_text(DRIVER)
    made = folder / f"libnvidia-ml-{failure}.so"
    command = [compiler, "-w", "-shared", "-fPIC", f"-DFAILURE={failure}", "-o", str(made), str(folder / "nvml.c")]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(made))


def test_joules_are_the_counter_s_and_a_board_without_one_has_none(tmp_path: Path) -> None:
    found = EnergyCounters(driver(tmp_path)).joules()
    assert found.keys() == {"GPU-0", "GPU-2"}
    assert found["GPU-0"] == pytest.approx(5_000_000.0, abs=80.0), "millijoules above 2^32 come through whole"


def test_idle_power_is_that_of_boards_that_nobody_uses(tmp_path: Path) -> None:
    watts = EnergyCounters(driver(tmp_path)).idle_watts(seconds=0.1)
    assert watts == {"GPU-0": pytest.approx(80.0, rel=0.1)}


def test_driver_that_does_not_start_is_no_counter(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nvmlInit_v2 gives error 9"):
        EnergyCounters(driver(tmp_path, failure=9))


def test_machine_without_the_driver_has_no_counters() -> None:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        assert counters() is None
    else:
        pytest.skip("this machine has NVML")
