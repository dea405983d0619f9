"""A training step as a CUDA graph, from any thread and on any GPU of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_ONE_CAPTURE = threading.Lock()
"""torch documents one capture at a time in a process. Two at once, on two GPUs, invalidate each other."""


def warm_up(device: torch.device, body: Callable[[], object], times: int) -> None:
    """Run `body` on a side stream: libraries choose kernels and allocate workspaces before a capture."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(times):
                body()
        torch.cuda.current_stream().wait_stream(side)


def capture(device: torch.device, body: Callable[[], T], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """`body` as a graph, and what it returned, which every replay writes anew. pool: memory shared with other graphs.

    The stream is made here, since torch's own for captures belongs to the GPU that captured first. Other threads go on
    meanwhile, on other GPUs. Raises RuntimeError if something in `body` cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with _ONE_CAPTURE, torch.cuda.device(device):
        context = torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream(), capture_error_mode="thread_local")
        with context:
            out = body()
    return graph, out


def replaying(graph: torch.cuda.CUDAGraph, static: Sequence[torch.Tensor], out: T) -> Callable[..., T]:
    """A function that copies its arguments to where the graph reads them, `static`, and runs it. Returns `out`."""

    def replay(*inputs: torch.Tensor) -> T:
        for target, source in zip(static, inputs, strict=True):
            target.copy_(source)
        graph.replay()
        return out

    return replay
