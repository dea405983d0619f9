"""A stack of adapters equals PEFT with one adapter at a time: outputs, gradients, packed and padded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import set_peft_model_state_dict
from tiny import FAMILY_NAMES, WORDS, saved_base
from torch._dynamo import lookup_backend
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModelForSequenceClassification

from cpdiff_core.domains.base_models import (
    FAMILIES,
    BaseModel,
    BaseModelConfig,
    build_classifier,
    load_tokenizer,
    resolve_base_model,
)
from cpdiff_core.lora.layout import LoraSpec, adapt, initial_vector
from cpdiff_core.lora.packing import TokenBatch, TokenizedTexts, join, pack, pad, place
from cpdiff_core.lora.stacked import StackedClassifier, StackedLora, _Adapted, _attention, counter_dropout

S, B, CLASSES = 3, 4, 3
HEADS = {
    "bert": {"classifier.bias", "classifier.weight"},
    "roberta": {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("bias", "weight")},
    "deberta": {f"{layer}.{kind}" for layer in ("pooler.dense", "classifier") for kind in ("bias", "weight")},
    "gpt2": {"score.weight"},
}


@dataclass
class Case:
    family: str
    base: BaseModel
    classifier: torch.nn.Module
    lora: LoraSpec
    layout: Any
    w_SK: torch.Tensor
    heads: list[dict[str, torch.Tensor]]
    texts: TokenizedTexts
    rows_SB: torch.Tensor

    @property
    def reading(self) -> dict[str, Any]:
        """What the architecture asks of a batch: which token its head reads, and where positions start."""
        family = FAMILIES[self.family]
        return {
            "last_token": family.pooling == "last",
            "position_offset": family.position_offset(self.classifier.config),
        }

    def model(self, dropout: float = 0.0) -> StackedClassifier:
        head, scaling = FAMILIES[self.family].head, self.lora.scaling
        return StackedClassifier(self.classifier, self.layout, head, scaling=scaling, dropout=dropout)

    def pad(self, rows_SB: torch.Tensor, **options: Any) -> TokenBatch:
        pad_token_id = self.classifier.config.pad_token_id
        return pad(self.texts, rows_SB, pad_token_id=pad_token_id, **self.reading, **options)

    def pack(self, rows_SB: torch.Tensor, row_length: int, empty_rows: int = 0, **options: Any) -> TokenBatch:
        starts, num_rows = place(self.texts.lengths[rows_SB.flatten()].numpy(), row_length)
        places_SB = torch.from_numpy(starts).view(rows_SB.shape)
        return pack(
            self.texts, rows_SB, places_SB, num_rows + empty_rows, row_length, causal=self.family == "gpt2",
            **self.reading, **options,
        )  # fmt: skip

    def batches(self, **options: Any) -> dict[str, TokenBatch]:
        """The same sequences in every layout that the architecture allows."""
        made = {
            "padded": self.pad(self.rows_SB, **options),
            "padded to 20": self.pad(self.rows_SB, row_length=20, **options),
        }
        if FAMILIES[self.family].packed:
            made |= {
                "packed": self.pack(self.rows_SB, 16, **options),
                "packed in long rows": self.pack(self.rows_SB, 40, **options),
                "packed with empty rows": self.pack(self.rows_SB, 16, empty_rows=3, **options),
            }
        return made


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def case(request, tmp_path_factory) -> Case:
    family = request.param
    base = saved_base(tmp_path_factory.mktemp("model") / family, family)
    classifier, _ = build_classifier(base, CLASSES)
    lora = LoraSpec(rank=2)
    w_K, layout = initial_vector(classifier, lora, FAMILIES[family].target_modules, FAMILIES[family].block_pattern, 1)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    w_SK = w_K + 0.2 * torch.randn(S, len(w_K), generator=generator)
    collections, rows = [], []
    for _ in range(S):
        lengths = rng.integers(3, 12, size=10)
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        ids = torch.from_numpy(rng.integers(4, len(WORDS), size=int(starts[-1])))
        types = torch.from_numpy(np.concatenate([np.arange(n) >= n // 2 for n in lengths]).astype(np.int64))
        collections.append(TokenizedTexts(ids, types, starts))
        rows.append(torch.from_numpy(rng.permutation(10)[:B]))
    texts, firsts = join(collections)
    own = {name: value for name, value in classifier.state_dict().items() if name in HEADS[family]}
    heads = [{k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in own.items()} for _ in range(S)]
    rows_SB = torch.stack([row + first for row, first in zip(rows, firsts, strict=True)])
    return Case(family, base, classifier, lora, layout, w_SK, heads, texts, rows_SB)


def peft_one_at_a_time(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits S x B x classes, gradients S x K of the sum of squared logits) from PEFT and transformers alone."""
    adapted = adapt(case.classifier, case.lora, FAMILIES[case.family].target_modules, 1).eval()
    takes_types = getattr(case.classifier.config, "type_vocab_size", 0) > 1
    logits, gradients = [], []
    for s in range(S):
        set_peft_model_state_dict(adapted, case.layout.unflatten(case.w_SK[s]))
        adapted.load_state_dict({f"base_model.model.{k}": v for k, v in case.heads[s].items()}, strict=False)
        members = [slice(int(case.texts.starts[row]), int(case.texts.starts[row + 1])) for row in case.rows_SB[s]]
        longest = max(part.stop - part.start for part in members)
        ids = torch.full((B, longest), case.classifier.config.pad_token_id)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for b, part in enumerate(members):
            n = part.stop - part.start
            ids[b, :n], types[b, :n], mask[b, :n] = case.texts.ids[part], case.texts.types[part], 1
        extra = {"token_type_ids": types} if takes_types else {}
        adapted.zero_grad()
        out = adapted(input_ids=ids, attention_mask=mask, **extra).logits
        (out**2).sum().backward()
        grads = {name.replace(".default", ""): p.grad for name, p in adapted.named_parameters() if "lora_" in name}
        logits.append(out.detach())
        gradients.append(case.layout.flatten(grads))
    return torch.stack(logits), torch.stack(gradients)


def test_stack_equals_peft_in_outputs_and_gradients_packed_and_padded(case: Case) -> None:
    expected, gradient = peft_one_at_a_time(case)
    assert expected.std() > 0.1
    model = case.model()
    for name, batch in case.batches().items():
        w_SK = case.w_SK.clone().requires_grad_()
        logits = model(w_SK, model.stack_heads(case.heads, CLASSES), batch)
        (logits**2).sum().backward()
        torch.testing.assert_close(
            logits.detach(), expected, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
        error = float((w_SK.grad - gradient).norm() / gradient.norm())
        assert error < 1e-5, f"{name}: the gradients differ by {error:.1e}"


def test_same_texts_for_many_adapters_equal_each_adapter_alone(case: Case) -> None:
    model = case.model()
    one = case.pack(case.rows_SB[:1], 16) if FAMILIES[case.family].packed else case.pad(case.rows_SB[:1])
    with torch.no_grad():
        together = model(case.w_SK, model.stack_heads(case.heads, CLASSES), one.repeat(S))
        for s in range(S):
            alone = model(case.w_SK[s : s + 1], model.stack_heads(case.heads[s : s + 1], CLASSES), one)
            torch.testing.assert_close(together[s], alone[0], atol=2e-5, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize(("dtype", "merges"), [(torch.float32, True), (torch.bfloat16, False)])
def test_scoring_on_a_cpu_merges_adapters_into_the_weights_in_float32_alone(
    case: Case, dtype: torch.dtype, merges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = []

    def noted(layer: StackedLora, x: torch.Tensor) -> torch.Tensor:
        merged.append(layer)
        return _Adapted._merged(layer, x)

    monkeypatch.setattr(StackedLora, "_merged", noted)
    model = case.model().to(dtype)
    batch = case.pad(case.rows_SB)
    heads = model.stack_heads(case.heads, CLASSES)
    apart = model(case.w_SK.clone().requires_grad_(), heads, batch)
    assert not merged, "training keeps them apart"
    with torch.no_grad():
        found = model(case.w_SK, heads, batch)
    assert bool(merged) == merges
    torch.testing.assert_close(found, apart.detach(), atol=2e-5, rtol=1e-4)


def test_few_programs_serve_all_layers_and_any_number_of_rows(case: Case) -> None:
    """Three for the first number of rows: the first layer (no gradient goes below it), the last (see `_OfPooledTokens`)
    and those between; and three for all others. After eight torch would run the layers eagerly."""
    if case.family == "deberta":
        pytest.skip("DeBERTa's own Python has branches that depend on numbers of tokens")
    config = copy.deepcopy(case.classifier.config)
    config.num_hidden_layers = 5
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    family = FAMILIES[case.family]
    w_K, layout = initial_vector(classifier, case.lora, family.target_modules, family.block_pattern, 1)
    w_SK = w_K + 0.2 * torch.randn(S, len(w_K), generator=torch.Generator().manual_seed(0))
    model, plain = (StackedClassifier(classifier, layout, family.head, scaling=case.lora.scaling) for _ in range(2))
    torch.compiler.reset()
    counter, numbers = CompileCounter(), set()
    model.compile_layers(backend=counter)
    for rows in (case.rows_SB[:, :1], case.rows_SB[:, :2], case.rows_SB[:, :3], case.rows_SB, case.rows_SB.repeat(1, 2)):
        batch = case.pack(rows, 16)
        numbers.add(len(batch.input_ids))
        logits = model(w_SK.requires_grad_(), model.stack_heads(case.heads, CLASSES), batch)
        logits.sum().backward()
        torch.testing.assert_close(logits, plain(w_SK, plain.stack_heads(case.heads, CLASSES), batch), atol=2e-5, rtol=1e-4)
    torch.compiler.reset()
    assert len(numbers) >= 4
    assert 3 <= counter.frame_count <= 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="its kernel needs a GPU")
def test_attention_of_compiled_layers_equals_torchs_own_in_values_and_gradients() -> None:
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(module.code)
        return lookup_backend("inductor")(module, inputs)

    torch.compiler.reset()
    compiled = torch.compile(_attention, backend=backend)
    for rows, length, width in ((3, 128, 32), (4, 128, 32), (7, 136, 32), (5, 64, 64), (2, 16, 16)):
        inputs = [torch.randn(rows, 4, length, width, device="cuda", requires_grad=True) for _ in range(3)]
        text = torch.randint(5, (rows, length), device="cuda").sort(dim=1)[0]
        apart = (text[:, None, :, None] != text[:, None, None, :]).expand(rows, 1, length, length)
        mask = torch.zeros(apart.shape, device="cuda").masked_fill(apart, torch.finfo(torch.float32).min)
        found, expected = compiled(*inputs, mask), _attention(*inputs, mask)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        for mine, theirs in zip(*(torch.autograd.grad((out**2).sum(), inputs) for out in (found, expected)), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
    torch.compiler.reset()
    assert all("flex_attention" in code for code in graphs)


def test_logits_after_saving_and_loading_are_those_of_the_saved_model(case: Case, tmp_path: Path) -> None:
    """A whole classifier, saved by transformers: nothing is missing, and the stack without an adapter repeats it."""
    config = AutoConfig.from_pretrained(case.base.folder, num_labels=CLASSES)
    config.pad_token_id = case.classifier.config.pad_token_id
    torch.manual_seed(3)
    saved = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    saved.save_pretrained(tmp_path)
    load_tokenizer(case.base).save_pretrained(tmp_path)
    loaded, missing = build_classifier(resolve_base_model(BaseModelConfig(name=str(tmp_path))), CLASSES)
    assert missing == ()
    ids = torch.randint(4, len(WORDS), (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = saved(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        stack = StackedClassifier(loaded, case.layout, FAMILIES[case.family].head, scaling=1.0)
        texts = TokenizedTexts(ids[0], torch.zeros(9, dtype=torch.int64), torch.tensor([0, 9]))
        row = torch.zeros(1, 1, dtype=torch.int64)
        batch = pad(texts, row, pad_token_id=config.pad_token_id, **case.reading)
        zero = torch.zeros(1, case.layout.num_parameters)
        logits = stack(zero, stack.stack_heads([{}], CLASSES), batch)
    torch.testing.assert_close(logits[0], expected, atol=1e-5, rtol=1e-5)


def test_head_is_every_parameter_that_the_checkpoint_lacks(case: Case) -> None:
    _, missing = build_classifier(case.base, CLASSES)
    assert set(missing) == HEADS[case.family]


def test_dropout_does_not_depend_on_grouping_or_padding(case: Case) -> None:
    keys_S = torch.tensor([11, 2**31 + 5, 70_000])
    model = case.model(dropout=0.5)

    def logits_of(batch: TokenBatch, first: int = 0, last: int = S) -> torch.Tensor:
        return model(case.w_SK[first:last], model.stack_heads(case.heads[first:last], CLASSES), batch)

    with torch.no_grad():
        alone = [logits_of(case.pad(case.rows_SB[s : s + 1], keys_S=keys_S[s : s + 1]), s, s + 1)[0] for s in range(S)]
        expected = torch.stack(alone)
        for name, batch in case.batches(keys_S=keys_S).items():
            assert torch.allclose(logits_of(batch), expected, atol=2e-5, rtol=1e-4), name
        without, other = logits_of(case.pad(case.rows_SB)), logits_of(case.pad(case.rows_SB, keys_S=keys_S + 1))
    assert (without - expected).abs().max() > 0.05, "dropout does something"
    assert (other - expected).abs().max() > 0.05, "another step's key gives another mask"


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_has_its_rate_keeps_the_mean_and_looks_independent(p: float) -> None:
    keys = (torch.arange(8)[:, None] * 4096 + torch.arange(64)).flatten() + 123456
    masks = [counter_dropout(torch.ones(len(keys), 384), keys, salt, p) for salt in (1, 2)]
    dropped = [(mask == 0).double() for mask in masks]
    n = dropped[0].numel()
    for mask, zeros in zip(masks, dropped, strict=True):
        assert abs(float(zeros.mean()) - p) < 5 * (p * (1 - p) / n) ** 0.5
        assert torch.equal(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / (1 - p)))
        for axis in (0, 1):  # each channel and each token too, within 6 standard errors
            rate = zeros.mean(axis)
            assert float((rate - p).abs().max()) < 6 * (p * (1 - p) / zeros.shape[axis]) ** 0.5
    # Uncorrelated between layers, neighbouring tokens and neighbouring channels.
    a, b = dropped[0] - p, dropped[1] - p
    for left, right in ((a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1])):
        correlation = float((left * right).mean() / (p * (1 - p)))
        assert abs(correlation) < 5 / n**0.5


def test_places_do_not_overlap_and_waste_little() -> None:
    lengths = np.random.default_rng(0).integers(3, 40, 500)
    starts, num_rows = place(lengths, 64)
    taken = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    assert len(np.unique(taken)) == lengths.sum(), "no two sequences share a token's place"
    assert ((starts + lengths - 1) // 64 == starts // 64).all(), "no sequence crosses the end of its row"
    assert taken.max() < 64 * num_rows
    assert lengths.sum() / (64 * num_rows) > 0.97
    with pytest.raises(ValueError, match="a text of 65 tokens does not fit a row of 64"):
        place(np.array([3, 65]), 64)
