"""The probe against scikit-learn on the same features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from tiny import saved_base
from transformers import AutoModel

from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.base_models import build_classifier, load_tokenizer
from cpdiff_core.domains.glue.data import SplitConfig, examples_of
from cpdiff_core.domains.glue.heads import HeadConfig, fit_head

RUNTIME = RuntimeConfig(device="cpu", progress=False)
SPLITS = SplitConfig()


@torch.no_grad()
def pooled_features(base, task) -> tuple[np.ndarray, np.ndarray]:
    """BERT's pooler output of every training example, one at a time, by transformers alone."""
    model, tokenizer = AutoModel.from_pretrained(base.folder).eval(), load_tokenizer(base)
    examples = examples_of(task, SPLITS, "train")
    rows = [model(**tokenizer(*texts, return_tensors="pt")).pooler_output[0] for texts in examples.texts]
    return torch.stack(rows).double().numpy(), examples.labels


def test_two_class_probe_is_logistic_regression(bert, make_task) -> None:
    """Softmax over two classes with l2 on both rows is logistic regression with half of it on their difference."""
    task, l2 = make_task("probe", num=120, seed=5), 1e-3
    x, y = pooled_features(bert, task)
    head = fit_head(HeadConfig(l2=l2), bert, task, SPLITS, 64, runtime=RUNTIME)
    assert set(head) == {"classifier.weight", "classifier.bias"}
    reference = LogisticRegression(C=1 / (len(x) * l2), tol=1e-10, max_iter=5000).fit(x, y)
    difference = (head["classifier.weight"][1] - head["classifier.weight"][0]).numpy()
    ours = x @ difference + float(head["classifier.bias"][1] - head["classifier.bias"][0])
    np.testing.assert_allclose(ours, reference.decision_function(x), atol=2e-3)
    assert np.mean((ours > 0) == y) > 0.7, "the features know something of the task"


def test_many_class_probe_is_multinomial_regression(bert, make_task) -> None:
    task, l2 = make_task("probe3", classes=3, num=90, seed=6), 1e-2
    x, y = pooled_features(bert, task)
    head = fit_head(HeadConfig(l2=l2), bert, task, SPLITS, 64, runtime=RUNTIME)
    reference = LogisticRegression(C=1 / (2 * len(x) * l2), tol=1e-10, max_iter=5000).fit(x, y)
    logits = torch.from_numpy(x) @ head["classifier.weight"].double().T + head["classifier.bias"].double()
    np.testing.assert_allclose(logits.softmax(-1).numpy(), reference.predict_proba(x), atol=2e-3)


def test_regression_probe_is_ridge(bert, make_task) -> None:
    task, l2 = make_task("ridge", classes=None, num=120, seed=7), 1e-3
    x, y = pooled_features(bert, task)
    head = fit_head(HeadConfig(l2=l2), bert, task, SPLITS, 64, runtime=RUNTIME)
    reference = Ridge(alpha=len(x) * l2, solver="cholesky").fit(x, y)
    ours = x @ head["classifier.weight"].double().numpy()[0] + float(head["classifier.bias"])
    np.testing.assert_allclose(ours, reference.predict(x), atol=5e-3)


@pytest.mark.parametrize("family", ["roberta", "deberta", "gpt2"])
def test_probe_of_other_architectures_beats_the_random_head(family, make_task, tmp_path) -> None:
    base, task = saved_base(tmp_path, family), make_task("probe-two", num=120, seed=8)
    model, missing = build_classifier(base, 2)
    tokenizer, examples = load_tokenizer(base), examples_of(task, SPLITS, "train")
    losses = {}
    for kind in ("random", "probe"):
        head = fit_head(HeadConfig(kind=kind), base, task, SPLITS, 64, runtime=RUNTIME)
        assert set(head) == set(missing)
        model.load_state_dict(head, strict=False)
        with torch.no_grad():
            logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for (text,) in examples.texts])
        losses[kind] = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(examples.labels).long()))
    assert losses["probe"] < 0.9 * losses["random"]


def test_random_head_is_drawn_from_its_seed_as_transformers_does(bert, make_task) -> None:
    task = make_task("random-head")
    first, again, other = (
        fit_head(HeadConfig(kind="random", seed=seed), bert, task, SPLITS, 64, runtime=RUNTIME) for seed in (1, 1, 2)
    )
    assert torch.equal(first["classifier.weight"], again["classifier.weight"])
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    assert (first["classifier.bias"] == 0).all()
    assert float(first["classifier.weight"].std()) == pytest.approx(0.2, rel=0.3)  # the tiny model's initializer_range


def test_fewer_examples_are_a_draw_from_the_training_split(bert, make_task) -> None:
    task = make_task("few", num=60, seed=9)
    few = fit_head(HeadConfig(max_examples=20), bert, task, SPLITS, 64, runtime=RUNTIME)
    every = fit_head(HeadConfig(), bert, task, SPLITS, 64, runtime=RUNTIME)
    assert not torch.allclose(few["classifier.weight"], every["classifier.weight"], atol=1e-2)
