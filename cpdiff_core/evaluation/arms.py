"""Arms: the columns of a results table, and how each is read off stored outputs.

Every arm is some rows of a score artifact and a way to use them: the mean of their scores, their ensemble, or the one
that is best on validation (the paper's *original*, an oracle). There is no other code for any baseline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from pydantic import Field

from cpdiff_core.artifacts import Artifact, read_tensors
from cpdiff_core.config import Config
from cpdiff_core.domains.glue.data import ResolvedTask
from cpdiff_core.domains.glue.metrics import Floats
from cpdiff_core.domains.glue.text_tasks import TextTask
from cpdiff_core.evaluation.scores import OUTPUT_FILE, ReportArtifact, load_report_scores, predictions_of
from cpdiff_core.evaluation.selection import SelectionScores, oracle

AVERAGE = "average"
"""The last row of a table, over the tasks; no task can have this name."""

ArmName = Literal[
    "no-LoRA", "last", "original (oracle)", "original (selected)", "annealed", "model soup", "soup fine-tuned",
    "checkpoints (ensemble)", "generated", "generated (mean)", "generated (random)", "generated (ensemble)", "full",
]  # fmt: skip
ARM_NAMES: tuple[ArmName, ...] = get_args(ArmName)
PAPER_ARMS: tuple[ArmName, ...] = (
    "no-LoRA", "original (oracle)", "original (selected)", "model soup", "generated",
)  # fmt: skip
ALL_ARMS: tuple[ArmName, ...] = tuple(name for name in ARM_NAMES if name != "full")
NEEDS_ALL_CANDIDATES: frozenset[ArmName] = frozenset(
    {"generated (mean)", "generated (random)", "generated (ensemble)"}
)
MEANING: dict[ArmName, str] = {
    "no-LoRA": "the frozen base with its head",
    "last": "the last checkpoint of each run (mean over runs)",
    "original (oracle)": "the checkpoint that is best on validation itself, as in the paper: nobody can choose it",
    "original (selected)": "the checkpoint that is best on the selection split",
    "annealed": "the run continued with its learning rate decayed to 0 (the best run on the selection split)",
    "model soup": "the mean of all checkpoints",
    "soup fine-tuned": "the soup, trained on: the control that spends gradient steps instead of generating",
    "checkpoints (ensemble)": "the mean probabilities of as many random checkpoints, drawn over all runs",
    "generated": "the candidate that is best on the selection split",
    "generated (mean)": "the mean score of all candidates: what one draw is worth on average",
    "generated (random)": "the first draw, fixed before any is scored",
    "generated (ensemble)": "the mean probabilities of all candidates",
    "full": "all parameters of the base fine-tuned, the best checkpoint on the selection split",
}


class ScoredArm(Config):
    """One arm of one task: rows of scored vectors and what is made of them."""

    name: str
    scores: ReportArtifact
    rows: tuple[int, ...] = Field((), description="Rows of `scores`; all for an oracle.")
    use: Literal["mean", "ensemble", "oracle"] = "mean"


class AuditInputs(Config):
    """What the audit of one task is made of, each part scored on validation."""

    audit: Artifact
    trivial: Artifact
    trivial_arms: tuple[ScoredArm, ...] = Field(description="`<family> (mean)` and `<family> (best)` of each family.")
    trivial_selection: dict[str, SelectionScores] = Field(description="What the best family is picked by.")
    changed: tuple[ScoredArm, ...] = Field(description="Candidates of a changed condition, one arm per change.")
    right: ScoredArm = Field(description="As many candidates of the right condition, from the same noises.")


class TaskArms(Config):
    """One task of one seed: every arm on validation."""

    task: ResolvedTask
    num_checkpoints: int
    arms: tuple[ScoredArm, ...]
    audit: AuditInputs | None = None
    used: tuple[Artifact, ...] = Field((), description="Further artifacts behind these numbers, for the cost table.")

    def arm(self, name: str) -> ScoredArm:
        return next(arm for arm in self.arms if arm.name == name)


def ensemble_predictions(task: TextTask, logits_VBC: torch.Tensor) -> Floats:
    """[n]: the class of the largest mean probability over V vectors, or the mean value of a regression."""
    if task.labels is None:
        return predictions_of(task, logits_VBC.double().mean(0, keepdim=True))[0]
    return predictions_of(task, logits_VBC.double().softmax(-1).mean(0, keepdim=True))[0]


def arm_predictions(arm: ScoredArm, root: Path, task: TextTask) -> tuple[Floats, Floats]:
    """(predictions [V, n] whose scores are to be averaged, labels [n]) of an arm."""
    tensors = read_tensors(arm.scores.under(root), OUTPUT_FILE)
    rows = list(arm.rows)
    if arm.use == "oracle":
        rows = [oracle(load_report_scores(arm.scores, root, task))]
    logits_VBC = tensors["logits_VBC"][rows]
    labels = tensors["labels_B"].numpy()
    if arm.use == "ensemble":
        return ensemble_predictions(task, logits_VBC)[None], labels
    return predictions_of(task, logits_VBC), labels
