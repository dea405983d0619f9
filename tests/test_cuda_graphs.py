"""Steps captured in several threads, each on a GPU of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cpdiff_core.cuda_graphs import capture, warm_up

GPUS = torch.cuda.device_count()


@pytest.mark.skipif(GPUS < 1, reason="capture needs a GPU")
@pytest.mark.parametrize("num", [1, pytest.param(2, marks=pytest.mark.skipif(GPUS < 2, reason="needs two GPUs"))])
def test_threads_capture_and_replay_on_their_own_gpus(num: int) -> None:
    def repeated(index: int) -> float:
        device = torch.device("cuda", index)
        weight, total = torch.full((64, 64), 0.5, device=device), torch.zeros((), device=device)

        def step() -> torch.Tensor:
            total.add_((weight @ weight).sum())
            return total

        for _ in range(20):  # so that the captures of the threads meet
            warm_up(device, step, 1)
            total.zero_()
            graph, result = capture(device, step)
            for _ in range(3):
                graph.replay()
        return float(result)

    with ThreadPoolExecutor(num) as pool:
        assert list(pool.map(repeated, range(num))) == [3 * 64**3 * 0.25] * num
