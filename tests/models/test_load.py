"""Loading models: the right head, the same weights on every load, and clear words for what cannot be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE

from mezo_dist.config.schema import ModelConfig
from mezo_dist.errors import UserError
from mezo_dist.models.load import Pretrained, load_model
from mezo_dist.testing import tiny_model, tiny_tokenizer, write_tiny_model

SIZE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models on disk; tests that change one copy it."""
    root = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(root / name, name) for name in ("llama", "gpt2", "bert", "roberta", "t5")}


def load(folder: Path | str, seed: int = 0, num_labels: int = 2, **settings: Any) -> Pretrained:
    return load_model(ModelConfig(str(folder), **settings), num_labels=num_labels, seed=seed)


def weights(loaded: Pretrained) -> dict[str, torch.Tensor]:
    return dict(loaded.model.named_parameters())


def fault(folder: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "causal"), ("gpt2", "causal"), ("bert", "masked"), ("roberta", "masked")]
)
def test_auto_finds_the_kind_of_language_model(folders: dict[str, Path], name: str, kind: str) -> None:
    loaded = load(folders[name])
    assert loaded.kind == kind
    assert loaded.window == 64
    assert loaded.pad_id == tiny_tokenizer().pad_token_id
    assert not loaded.model.training
    reference = dict(tiny_model(name).named_parameters())
    assert weights(loaded).keys() == reference.keys()
    assert all(torch.equal(tensor, reference[key]) for key, tensor in weights(loaded).items())


def test_weights_come_in_the_wanted_dtype(folders: dict[str, Path]) -> None:
    assert {tensor.dtype for tensor in weights(load(folders["llama"], weights="bfloat16")).values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_fresh_head_is_the_same_on_every_load_with_a_seed(folders: dict[str, Path], name: str) -> None:
    torch.manual_seed(1)
    first = weights(load(folders[name], head="classifier", num_labels=3))
    torch.manual_seed(2)  # another rank may have drawn other things before
    before = torch.get_rng_state()
    again = weights(load(folders[name], head="classifier", num_labels=3))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = weights(load(folders[name], seed=1, head="classifier", num_labels=3))
    changed = {key for key in first if not torch.equal(first[key], other[key])}
    assert changed <= {"score.weight", "classifier.weight", "bert.pooler.dense.weight"}
    assert changed
    assert any(tensor.shape[0] == 3 for key, tensor in first.items() if key in changed)


def test_a_pad_token_that_the_model_does_not_know(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"new{number}" for number in range(30)])
    tokenizer.add_special_tokens({"pad_token": "<newpad>"})
    tokenizer.save_pretrained(folder)
    assert "has the id 73, but the model knows 64 tokens: resize its embeddings" in fault(folder)


def test_a_model_whose_config_wants_tuples(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    change(folder, "config.json", return_dict=False)
    assert load(folder).model(input_ids=torch.tensor([[5]])).logits.shape == (1, 1, 64)


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_a_single_file_that_exists(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    assert f"{name} is a single file; name a folder with config.json" in fault(tmp_path / name)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_folder_without_tokenizer(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "model")
    drop_tokenizer(folder)
    assert "it has no tokenizer: save the model's tokenizer there, too" in fault(folder)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@torch.no_grad()
def test_a_classifier_takes_padded_batches(folders: dict[str, Path], name: str) -> None:
    """Causal ones look for the last token that is no padding, so they must know the padding token."""
    model = load(folders[name], head="classifier").model
    short, long = torch.tensor([[5, 6, 0, 0]]), torch.tensor([[7, 8, 9, 10]])
    padded = model(input_ids=torch.cat([short, long]), attention_mask=torch.cat([short, long]).bool().long()).logits
    assert torch.allclose(padded[:1], model(input_ids=short[:, :2]).logits, atol=1e-6)
    assert torch.allclose(padded[1:], model(input_ids=long).logits, atol=1e-6)


def test_a_folder_may_be_named_from_home(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folders["llama"].parent))
    assert load("~/llama").kind == "causal"


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere", "runs/some/model", "../x"])
def test_a_folder_that_does_not_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    where = "" if name.startswith(("/", "~")) else " (relative paths start at "
    assert fault(name).startswith(f"model.name: folder {name} does not exist{where}")


def test_an_unknown_hub_name_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = fault("some/never-published-model")
    assert message.startswith(
        "model.name: 'some/never-published-model' could not be loaded from the hub (no folder has that name) as "
        "head: label-words, kind: auto: "
    )
    assert "internet connection" in message


def test_an_unknown_demo_model() -> None:
    assert "no demo asset 'demo:smolm'; did you mean 'demo:smollm2-135m'?" in fault("demo:smolm")


def change(folder: Path, name: str, **settings: Any) -> None:
    """Change a JSON file of a model; None removes."""
    data = json.loads((folder / name).read_text()) | settings
    (folder / name).write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def write_tokenizer(folder: Path, model: BPE) -> None:
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>").save_pretrained(folder)


def drop_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut_weights, "could not be loaded from its folder as head: label-words, kind: auto: Error while"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors: only safe"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not a valid JSON file"),
        (lambda folder: (folder / "config.json").unlink(), "Unrecognized model in"),
        (lambda folder: change(folder, "config.json", model_type="frob"), "model type `frob`"),
        (
            lambda folder: change(folder, "config.json", hidden_size=64),
            "these weights have another shape than needed: ",
        ),
        (drop_tokenizer, "could not be loaded from its folder"),
        (
            lambda folder: write_tokenizer(folder, BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.1)),
            "its tokenizer leaves out merges at random (BPE dropout), so that",
        ),
    ],
)
def test_damaged_folders(
    folders: dict[str, Path], tmp_path: Path, damage: Callable[[Path], Any], expected: str
) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    damage(folder)
    message = fault(folder)
    assert message.startswith("model.name: ")
    assert str(folder) in message
    assert expected in message
    assert len(message) < 800


def test_a_masked_model_whose_tokenizer_has_no_mask(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["bert"], tmp_path / "model")
    change(folder, "tokenizer_config.json", mask_token=None)
    assert f"model.kind: the tokenizer of '{folder}' has no mask token, which kind: masked needs" in fault(folder)


def test_a_model_that_is_no_language_model(folders: dict[str, Path]) -> None:
    message = fault(folders["t5"])
    assert message.startswith("model.kind: the checkpoint ")
    assert "(T5ForConditionalGeneration) is neither a causal nor a masked language model; set model.head: " in message


def test_a_kind_that_the_architecture_does_not_have(folders: dict[str, Path]) -> None:
    assert "as head: label-words, kind: masked: Unrecognized configuration class" in fault(
        folders["llama"], kind="masked"
    )


def test_a_language_model_head_is_never_made_up(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**SIZE, intermediate_size=48)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "(BertModel) is neither a causal nor a masked language model" in fault(tmp_path)
    message = fault(tmp_path, kind="masked")
    assert "lacks weights that kind: masked needs: cls.predictions.bias, " in message
    assert load(tmp_path, head="classifier").kind == "classifier"


def test_a_trained_head_for_other_classes(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SIZE, intermediate_size=48, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    message = fault(tmp_path, head="classifier")
    assert "these weights have another shape than needed: classifier.bias, classifier.weight; a head has" in message
    assert load(tmp_path, head="classifier", num_labels=3).kind == "classifier"


def test_freezing(folders: dict[str, Path]) -> None:
    loaded = load(folders["llama"], freeze=("*embed*", "model.layers.0.*"))
    frozen = {name for name, tensor in weights(loaded).items() if not tensor.requires_grad}
    assert frozen == {n for n in weights(loaded) if "embed" in n or n.startswith("model.layers.0.")}
    assert "model.freeze: 'decoder.*' matches no weight; names look like ['model." in fault(
        folders["llama"], freeze=("decoder.*",)
    )
    assert "nothing is left to train" in fault(folders["llama"], freeze=("*",))


def test_only_trainable_weights_are_trained(folders: dict[str, Path]) -> None:
    loaded = load(folders["llama"], trainable=("*norm*",), freeze=("model.norm.*",))
    names = [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    assert len(names) == 4, "two blocks with two norms each"
    assert all("layernorm" in name for name in names)
    assert "model.trainable: 'decoder.*' matches no weight" in fault(folders["llama"], trainable=("decoder.*",))
