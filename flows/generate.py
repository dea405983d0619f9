"""The flow behind `cpdiff generate`: adapters for a described task from a portable generator."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from cpdiff_core.bundle import Generator
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.delivery import AdapterRequest, deliver
from cpdiff_core.domains.glue.stacks import device_of


@flow(name="generate-adapters", persist_result=False)
def generate_adapters(
    generator: str, request: AdapterRequest, out: str, runtime: RuntimeConfig = RuntimeConfig()
) -> list[str]:
    """Write PEFT folders with model cards, and return what there is to say about them.

    Args:
        generator: A generator folder or builtin/<name>.
        request: The task in words, how many candidates, and the data to choose on.
        out: Folder that the adapters are written to; must be empty.
        runtime: Where and how fast.
    """
    return deliver(Generator.load(generator, device_of(runtime)), request, Path(out), runtime)
