"""`make torture KILLS=100`: kill a run at the worst moments, damage its files, starve its disk; then look what is left.

Every scenario ends with a rerun whose artifacts must equal those of an undisturbed run bit by bit. Prints one line per
scenario and, at the end, the table for docs/RELIABILITY.md; exit code 1 if anything differed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from subject import DEATHS, Death, run, write_subject  # noqa: E402 - its folder has just become importable
from warm import warm_parent  # noqa: E402

from cpdiff_core.artifacts import MANIFEST  # noqa: E402
from tasks.inventory import digests, faults, survey  # noqa: E402

LIBRARY = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"

USED = (
    "cpdiff_core.domains.glue.metric_module", "diffusers.schedulers", "matplotlib.figure", "peft", "scipy.stats",
    "sklearn.linear_model", "sklearn.manifold",
)  # fmt: skip
"""What a run imports only where it is used, which would be seconds of every child."""


class Bench:
    """A warm parent for children, an experiment, and what an undisturbed run of it leaves."""

    def __init__(self, folder: Path, api_url: str) -> None:
        self.folder = folder
        self.api_url = api_url
        self.file = write_subject(folder / "subject")
        self._count = 0
        self.finish(self.new_root())  # the first child imports everything
        root = self.new_root()
        started = time.monotonic()
        self.finish(root)
        self.seconds = time.monotonic() - started
        self.expected = contents(root)
        self.undisturbed = root

    def new_root(self) -> Path:
        self._count += 1
        return self.folder / f"root{self._count}"

    def start(self, root: Path, death: Death | None = None, seed: int = 0, api_url: str | None = None) -> Any:
        arguments = (root, api_url or self.api_url, self.file, death, seed)
        process = warm_parent(["subject", *USED]).Process(target=run, args=arguments)
        process.start()
        return process

    def finish(self, root: Path) -> dict[str, Any]:
        """Run to the end and say what was computed."""
        process = self.start(root)
        process.join(300)
        if process.exitcode != 0:
            raise RuntimeError(f"the rerun ended with {process.exitcode}")
        ended = self.outcome(process.pid)
        if "error" in ended:
            raise RuntimeError(f"the rerun ended with: {ended['error']}")
        return ended

    def outcome(self, pid: int) -> dict[str, Any]:
        """What a child that was not killed has left."""
        file = self.file.with_name(f"{pid}.outcome")
        value: dict[str, Any] = json.loads(file.read_text())
        file.unlink()
        return value

    def check(self, root: Path) -> str:
        """Rerun and compare; what is wrong, or nothing."""
        self.finish(root)
        if contents(root) != self.expected:
            return "artifacts differ from those of an undisturbed run"
        found = [line for item in survey(root).values() for line in faults(item)]
        left = list((root / ".resume").glob("*/*"))
        return found[0] if found else "resume states are left" if left else ""

    def kill(self, death: Death, seed: int) -> tuple[bool, str]:
        """(whether the run died, what is wrong after a rerun)"""
        wait = random.Random(seed).uniform(0.2, 1.0) * self.seconds
        for _ in range(5):  # a machine that has become faster ends the run before the blow: then strike earlier
            root = self.new_root()
            process = self.start(root, death, seed)
            if death == "in a body":
                process.join(wait)
                process.kill()
            process.join(300)
            died = process.exitcode == -signal.SIGKILL
            wrong = self.check(root)
            shutil.rmtree(root, ignore_errors=True)
            if died or wrong or death != "in a body":
                break
            wait /= 2
        return died, wrong


def contents(root: Path) -> dict[str, dict[str, str]]:
    """Key -> digests of the files of each artifact."""
    return {key: digests(item) for key, item in survey(root).items() if item.complete}


def race(bench: Bench, count: int) -> str:
    root = bench.new_root()
    processes = [bench.start(root) for _ in range(count)]
    for process in processes:
        process.join(600)
    if any(process.exitcode for process in processes):
        return f"exit codes {[process.exitcode for process in processes]}"
    computed = [bench.outcome(process.pid)["computed"] for process in processes]
    if sum(computed) != len(bench.expected):
        return f"{sum(computed)} stages computed for {len(bench.expected)} artifacts: {computed}"
    return "" if contents(root) == bench.expected else "artifacts differ"


def damage(bench: Bench, rng: random.Random) -> tuple[int, str]:
    """Flip a byte of every file of every artifact, then cut each: (files damaged, what was not named)."""
    count = 0
    for item in survey(bench.undisturbed).values():
        for file in sorted(path for path in item.folder.rglob("*") if path.is_file() and path.name != "result.json"):
            content = file.read_bytes()
            place = rng.randrange(len(content))
            for kind, bad in (
                ("flipped", content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]),
                ("cut", content[: rng.randrange(len(content))]),
            ):
                file.write_bytes(bad)
                named = any(file.name in line or file.name == MANIFEST for line in faults(item))
                file.write_bytes(content)
                count += 1
                if not named:
                    return count, f"{file} {kind} at {place} was not named"
    return count, ""


@contextmanager
def disk(folder: Path, size: str) -> Any:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        raise PermissionError(mounted.stderr.strip())
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def starved(bench: Bench, first: str, then: str, expected: str) -> str:
    """A disk that is too small or read-only at first: one line for the user, and a rerun after it is mended."""
    with disk(bench.folder / f"disk-{first.replace('=', '')}", "100m" if first == "ro" else "150k") as remount:
        root = bench.folder / f"disk-{first.replace('=', '')}" / "root"
        if first == "ro":
            root.mkdir()
            remount("ro")
        process = bench.start(root)
        process.join(300)
        remount("rw" if first == "ro" else then)
        error = bench.outcome(process.pid).get("error", "")
        if expected not in error or "\n" in error:
            return f"the user was told {error!r}"
        return bench.check(root)


def clock_back(bench: Bench) -> str:
    """A run is killed half-way; the rerun's clock is two days behind."""
    root = bench.new_root()
    process = bench.start(root)
    process.join(0.5 * bench.seconds)
    process.kill()
    process.join()
    code = f"import sys; sys.path[:0] = {sys.path[:2]!r}\nfrom pathlib import Path\nfrom subject import run\n"
    code += f"run(Path({str(root)!r}), {bench.api_url!r}, Path({str(bench.file)!r}))"
    environment = os.environ | {"LD_PRELOAD": LIBRARY, "FAKETIME": "-2d", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    if ended.returncode:
        return ended.stderr.strip().splitlines()[-1]
    return bench.check(root)


def server_stopped(bench: Bench) -> str:
    """The server goes away in the middle of a run; the run may fail, a rerun with a server must not."""
    from tasks.server import TemporaryServer

    root = bench.new_root()
    server = TemporaryServer(bench.folder / "second.log")
    server.wait(120)
    process = bench.start(root, api_url=server.api_url)
    process.join(0.5 * bench.seconds)
    server.stop()
    process.join(90)
    process.kill()
    return bench.check(root)


def torture(bench: Bench, kills: int, seed: int) -> int:
    rng = random.Random(seed)
    died: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(kills):
        death = DEATHS[number % len(DEATHS)]
        killed, fault = bench.kill(death, rng.randrange(1 << 30))
        died[death] += killed
        if fault:
            wrong.append(f"kill {number} {death}: {fault}")
            print(wrong[-1], flush=True)
    for death in DEATHS:
        total = len(range(DEATHS.index(death), kills, len(DEATHS)))
        print(f"| kill -9 {death} | {total} runs, {died[death]} died there | {_count(wrong, death)} differed |", flush=True)

    scenarios: list[tuple[str, Callable[[], str]]] = [
        ("2 processes race", lambda: race(bench, 2)),
        ("8 processes race", lambda: race(bench, 8)),
        ("disk of 150 kB, then 100 MB", lambda: starved(bench, "size=150k", "size=100m", "disk is full")),
        ("root read-only, then writable", lambda: starved(bench, "ro", "rw", "cannot be written")),
        ("clock two days back on the rerun", lambda: clock_back(bench)),
        ("server stopped in the middle", lambda: server_stopped(bench)),
    ]
    for name, scenario in scenarios:
        try:
            fault = scenario()
        except PermissionError as error:
            print(f"| {name} | skipped: {error} | |", flush=True)
            continue
        wrong += [f"{name}: {fault}"] if fault else []
        print(f"| {name} | 1 run | {fault or 'as undisturbed'} |", flush=True)
    count, fault = damage(bench, rng)
    wrong += [fault] if fault else []
    print(f"| every file flipped, then cut | {count} damages | {fault or 'all named'} |", flush=True)
    return len(wrong)


def _count(wrong: list[str], death: str) -> int:
    return sum(death in line for line in wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from tasks.environment import DEFAULTS

    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    from tasks.server import TemporaryServer

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        server = TemporaryServer(Path(folder, "server.log"))
        server.wait(180)
        bench = Bench(Path(folder), server.api_url)
        print(f"an undisturbed run: {bench.seconds:.1f} s, {len(bench.expected)} artifacts", flush=True)
        wrong = torture(bench, arguments.kills, arguments.seed)
        server.stop()
    print(f"{wrong} faults, {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
