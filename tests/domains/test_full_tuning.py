"""Full fine-tuning: it learns, every parameter moves, and stored logits are transformers' own."""

import pytest
import torch
from test_fine_tuning import RUNTIME, SPLITS
from transformers import AutoModelForSequenceClassification

from cpdiff_core.config import UserError
from cpdiff_core.domains.glue.data import tokenize
from cpdiff_core.domains.glue.full_tuning import FullTuningConfig, fresh_classifier, full_logits, tune_fully

CONFIG = FullTuningConfig(learning_rate=3e-3, num_epochs=12, batch_size=16, max_length=32, num_evaluations=3)


def test_full_fine_tuning_learns_the_cue_words_and_scores_as_transformers_does(bert, make_task):
    task = make_task("full", num=300)
    state = tune_fully(CONFIG, bert, task, SPLITS, RUNTIME)
    logits, labels = full_logits(CONFIG, bert, task, SPLITS, "report", state, RUNTIME)
    assert logits.shape == (1, len(labels), 2)
    assert (logits[0].argmax(-1) == labels).double().mean() > 0.9

    model = AutoModelForSequenceClassification.from_pretrained(bert.folder, num_labels=2).eval()
    model.load_state_dict(state)
    texts, _ = tokenize(task, SPLITS, "report", bert, CONFIG.max_length)
    for row in (0, 7, 21):
        part = slice(int(texts.starts[row]), int(texts.starts[row + 1]))
        ids, types = texts.ids[part][None], texts.types[part][None]
        torch.testing.assert_close(logits[0, row], model(input_ids=ids, token_type_ids=types).logits[0], atol=1e-4, rtol=1e-4)

    start = fresh_classifier(bert, task.task, CONFIG.seed).state_dict()
    moved = [name for name, value in state.items() if value.is_floating_point() and not torch.equal(value, start[name])]
    assert {"bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight",
            "classifier.weight"} <= set(moved)  # fmt: skip


@pytest.mark.parametrize("classes", [2, None])
def test_outputs_that_are_not_finite_are_refused_though_the_loss_before_them_was(bert, make_task, classes):
    far = CONFIG.model_copy(update={"learning_rate": 1e30, "num_epochs": 0.1, "num_evaluations": 1})
    with pytest.raises(UserError, match=r"lower full\.learning_rate \(now 1e\+30\)"):
        tune_fully(far, bert, make_task("far", classes, num=60), SPLITS, RUNTIME)
