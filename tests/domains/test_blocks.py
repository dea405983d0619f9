"""Block ranges of Table 4c: sizes, filling, and a range that a model does not have."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from cpdiff_core.config import UserError
from cpdiff_core.domains.base_models import FAMILIES
from cpdiff_core.domains.blocks import BlockConfig, block_columns, fill_columns
from cpdiff_core.lora.layout import LoraSpec, ParameterLayout, layout_of


def layout(hidden: int, num_blocks: int, rank: int) -> ParameterLayout:
    from peft import get_peft_model

    config = BertConfig(hidden_size=hidden, num_hidden_layers=num_blocks, num_attention_heads=12, intermediate_size=64)
    family = FAMILIES["bert"]
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
        adapted = get_peft_model(model, LoraSpec(rank=rank).peft_config(family.target_modules))
    return layout_of(adapted, family.block_pattern)


@pytest.mark.parametrize(
    ("hidden", "num_blocks", "sizes"),
    [
        (768, 12, {(0, 1): 12_288, (0, 4): 30_720, (0, 8): 55_296, (0, 11): 73_728}),
        (384, 6, {(0, 0): 3_072, (0, 2): 9_216, (0, 4): 15_360, (0, 5): 18_432}),
    ],
)
@pytest.mark.parametrize("rank", [1, 4])
def test_ranges_hold_as_many_parameters_as_the_paper_counts(hidden, num_blocks, sizes, rank):
    whole = layout(hidden, num_blocks, rank)
    for (first, last), size in sizes.items():
        assert int(block_columns(whole, BlockConfig(first=first, last=last)).sum()) == rank * size


def test_ranges_are_made_of_the_columns_of_their_own_modules():
    whole = layout(96, 3, 2)
    mask = block_columns(whole, BlockConfig(first=1, last=1))
    named = whole.unflatten(mask.float())
    assert {bool(tensor.all()) for name, tensor in named.items() if ".layer.1." in name} == {True}
    assert {bool(tensor.any()) for name, tensor in named.items() if ".layer.1." not in name} == {False}


@pytest.mark.parametrize(
    ("fill", "expected"), [("zero", [0.0, 0.0]), ("checkpoint", [3.0, 30.0]), ("soup", [2.0, 20.0])]
)
def test_other_columns_hold_what_the_filler_says(fill, expected):
    w_NK = torch.tensor([[1.0, 5.0, 10.0], [3.0, 7.0, 30.0]])
    mask = torch.tensor([False, True, False])
    whole = fill_columns(torch.tensor([[-1.0], [-2.0]]), mask, w_NK, fill)
    assert whole[:, 1].tolist() == [-1.0, -2.0]
    assert whole[0, [0, 2]].tolist() == whole[1, [0, 2]].tolist() == expected


def test_block_that_the_model_lacks_is_named():
    with pytest.raises(UserError, match=r"blocks.last 3: the base model's blocks are 0 to 2"):
        block_columns(layout(96, 3, 1), BlockConfig(last=3))
