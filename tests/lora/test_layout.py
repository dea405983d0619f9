"""ParameterLayout against PEFT itself, and the sizes of the known base models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import CONFIGS, FAMILY_NAMES
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaConfig,
    GPT2Config,
    RobertaConfig,
)

from cpdiff_core.domains.base_models import FAMILIES
from cpdiff_core.lora.layout import LoraSpec, adapt, initial_vector, layout_of

DEBERTA = DebertaConfig(
    relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False, type_vocab_size=0
)
MINILM = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


def tiny(family: str) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(CONFIGS[family]).eval()


def random_vector(family: str, rank: int = 2, seed: int = 1):
    model, lora = tiny(family), LoraSpec(rank=rank)
    w_K, layout = initial_vector(model, lora, FAMILIES[family].target_modules, FAMILIES[family].block_pattern, 0)
    return model, lora, torch.randn(w_K.shape, generator=torch.Generator().manual_seed(seed)), layout


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(
    ("family", "config", "modules", "k_per_rank"),
    [
        ("bert", MINILM, 24, 18_432),
        ("bert", BertConfig(), 48, 73_728),
        ("roberta", RobertaConfig(), 48, 73_728),
        ("deberta", DEBERTA, 48, 92_160),
        ("gpt2", GPT2Config(), 24, 55_296),
    ],
    ids=["minilm", "bert", "roberta", "deberta", "gpt2"],
)
def test_number_of_parameters_is_that_of_table_1(family, config, modules, k_per_rank, rank) -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
        adapted = adapt(model, LoraSpec(rank=rank), FAMILIES[family].target_modules, 0)
    layout = layout_of(adapted, FAMILIES[family].block_pattern)
    assert (len(layout.factors), layout.num_parameters) == (modules, k_per_rank * rank)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert layout.num_parameters == trainable, "the head is not in the vector, and nothing else is missing"


def test_blocks_of_table_4c_have_their_published_sizes() -> None:
    with torch.device("meta"):
        adapted = adapt(
            AutoModelForSequenceClassification.from_config(BertConfig()), LoraSpec(), FAMILIES["bert"].target_modules, 0
        )
    layout = layout_of(adapted, FAMILIES["bert"].block_pattern)
    sizes = [
        sum(f.rank * (f.in_features + f.out_features) for f in layout.factors if f.block <= last)
        for last in (1, 4, 8, 11)
    ]
    assert sizes == [12_288, 30_720, 55_296, 73_728]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_factors_say_where_a_and_b_lie(family: str) -> None:
    _, _, w_K, layout = random_vector(family)
    state = layout.unflatten(w_K)
    for factor in layout.factors:
        a = w_K[factor.a_start : factor.a_start + factor.rank * factor.in_features].view(factor.rank, -1)
        b = w_K[factor.b_start : factor.b_start + factor.rank * factor.out_features].view(-1, factor.rank)
        assert torch.equal(a, state[f"{factor.module}.lora_A.weight"])
        assert torch.equal(b, state[f"{factor.module}.lora_B.weight"])
        assert factor.block in (0, 1)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_vector_to_peft_folder_and_back_is_bit_for_bit(family: str, tmp_path: Path) -> None:
    model, lora, w_K, layout = random_vector(family)
    adapted = adapt(model, lora, FAMILIES[family].target_modules, 0)
    set_peft_model_state_dict(adapted, layout.unflatten(w_K))
    adapted.save_pretrained(tmp_path)
    assert torch.equal(layout.flatten(load_file(tmp_path / "adapter_model.safetensors")), w_K), "the file itself"
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    assert torch.equal(layout.flatten(get_peft_model_state_dict(loaded)), w_K)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_merged_weights_give_the_outputs_of_the_attached_adapter(family: str) -> None:
    model, lora, w_K, layout = random_vector(family)
    adapted = adapt(model, lora, FAMILIES[family].target_modules, 0).eval()
    set_peft_model_state_dict(adapted, layout.unflatten(0.1 * w_K))
    ids = torch.randint(4, 40, (1, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        attached, plain = adapted(input_ids=ids).logits, model(input_ids=ids).logits
        merged = adapted.merge_and_unload()(input_ids=ids).logits
    assert (attached - plain).abs().max() > 1e-3, "the adapter does something"
    torch.testing.assert_close(merged, attached, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["kaiming", "gaussian"])
def test_initial_vector_is_pefts_own_draw(kind) -> None:
    model, family = tiny("bert"), FAMILIES["bert"]
    lora = LoraSpec(rank=2, init_lora_weights=kind)
    w_K, layout = initial_vector(model, lora, family.target_modules, family.block_pattern, seed=5)
    again, _ = initial_vector(model, lora, family.target_modules, family.block_pattern, seed=5)
    other, _ = initial_vector(model, lora, family.target_modules, family.block_pattern, seed=6)
    assert torch.equal(w_K, again)
    assert not torch.equal(w_K, other)
    state = layout.unflatten(w_K)
    assert all((tensor == 0).all() for name, tensor in state.items() if "lora_B" in name)
    a = torch.cat([tensor.flatten() for name, tensor in state.items() if "lora_A" in name])
    # PEFT: uniform on +-1/sqrt(fan in) has std 1/sqrt(3 fan in); its gaussian has std 1/rank.
    fan_in = torch.tensor([f.in_features for f in layout.factors for _ in range(f.rank * f.in_features)])
    expected = (1 / (3 * fan_in)).mean().sqrt() if kind == "kaiming" else torch.tensor(0.5)
    assert abs(float(a.std() / expected) - 1) < 0.1


def test_wrong_vectors_and_states_are_named() -> None:
    _, _, w_K, layout = random_vector("bert")
    with pytest.raises(ValueError, match=rf"shape \({len(w_K) - 1},\), this layout needs \({len(w_K)},\)"):
        layout.unflatten(w_K[:-1])
    state = layout.unflatten(w_K)
    first = layout.names[0]
    with pytest.raises(ValueError, match=r"missing \['base_model.*lora_A.*use the base model, rank and target"):
        layout.flatten({name: tensor for name, tensor in state.items() if name != first})
    with pytest.raises(ValueError, match=r"unexpected \['other.lora_A.weight'\]"):
        layout.flatten(state | {"other.lora_A.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"has shape \(1, 32\), the layout says \(2, 32\); check the rank"):
        layout.flatten(state | {first: torch.zeros(1, 32)})
    classifier = {"base_model.model.classifier.weight": torch.ones(2, 32)}
    assert torch.equal(layout.flatten(state | classifier), w_K), "a saved head is not part of the vector"
