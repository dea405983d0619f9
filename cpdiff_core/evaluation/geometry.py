"""Where generated vectors lie among the training vectors of all tasks: dispersion, between and within tasks, t-SNE.

Sec. 4.4 shows t-SNE plots alone. Two plots can look alike whatever the distances are, so the distances stand beside.
"""

from __future__ import annotations

import numpy as np
import torch

from cpdiff_core.config import Config
from cpdiff_core.domains.glue.metrics import Floats

_MAX_PLOTTED = 100


class Geometry(Config):
    """Root mean square distances, on raw factors."""

    within_training: dict[str, float]
    within_generated: dict[str, float]
    between_training: float
    between_generated: float

    def dispersion(self, task: str) -> float | None:
        """Spread of the generated vectors over spread of the training vectors; None if those do not vary."""
        return self.within_generated[task] / self.within_training[task] if self.within_training[task] > 0 else None

    def separation(self, which: str) -> float | None:
        """Distance between tasks' means over spread inside tasks: how well the tasks are told apart. None if there is one
        task, or no spread."""
        between = self.between_training if which == "training" else self.between_generated
        within = self.within_training if which == "training" else self.within_generated
        spread = float(np.mean(list(within.values())))
        return between / spread if len(within) > 1 and spread > 0 else None


def geometry(w_NK_by_task: dict[str, torch.Tensor], w_MK_by_task: dict[str, torch.Tensor]) -> Geometry:
    """Spread about the own mean in every task, and distances between the means of the tasks."""
    return Geometry(
        within_training={task: _spread(w) for task, w in w_NK_by_task.items()},
        within_generated={task: _spread(w) for task, w in w_MK_by_task.items()},
        between_training=_between(list(w_NK_by_task.values())),
        between_generated=_between(list(w_MK_by_task.values())),
    )


def embed(w_NK_by_task: dict[str, torch.Tensor], w_MK_by_task: dict[str, torch.Tensor], seed: int) -> dict[str, Floats]:
    """2-D t-SNE (scikit-learn) of at most 100 training and all generated vectors of each task, fitted together.

    Returns `<task>/training` and `<task>/generated`, [n, 2] each. Vectors that are all the same lie in one place.
    """
    from sklearn.manifold import TSNE

    names, parts = [], []
    for task, w_NK in w_NK_by_task.items():
        rows = torch.linspace(0, len(w_NK) - 1, min(len(w_NK), _MAX_PLOTTED)).round().long()
        names += [f"{task}/training", f"{task}/generated"]
        parts += [w_NK[rows], w_MK_by_task[task]]
    x_VK = torch.cat(parts).double()
    x_VK = x_VK - x_VK.mean(0)
    # All distances are kept by the components of the V x V matrix of inner products, which are few.
    value, vector = torch.linalg.eigh(x_VK @ x_VK.T)
    scores = (vector * value.clamp_min(0.0).sqrt()).flip(1)[:, :50].numpy()
    plane = np.zeros((len(scores), 2))
    if scores[:, 0].astype(np.float32).std() > 0:  # scikit-learn divides by it, and ends the process on what comes of 0
        perplexity = min(30.0, (len(scores) - 1) / 3.0)
        plane = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(scores)
    cuts = np.cumsum([len(part) for part in parts])[:-1]
    return dict(zip(names, np.split(plane.astype(np.float64), cuts), strict=True))


def _spread(w_VK: torch.Tensor) -> float:
    return float((w_VK.double() - w_VK.double().mean(0)).square().sum(1).mean().sqrt())


def _between(parts: list[torch.Tensor]) -> float:
    """Root mean square distance between the means of two different tasks; 0 if there is one."""
    mean_QK = torch.stack([part.double().mean(0) for part in parts])
    distances = torch.cdist(mean_QK, mean_QK)
    count = len(parts) * (len(parts) - 1)
    return float((distances.square().sum() / count).sqrt()) if count else 0.0
