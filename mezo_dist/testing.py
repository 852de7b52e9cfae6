"""For tests, ours and those of people who extend mezo_dist: tiny models and data, and processes over gloo.

Nothing here needs a network, a GPU or a port.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORDS = (
    "a the this that film movie plot cast scene story ending music camera It was and but very quite rather "
    "dull slow weak poor flat bland terrible awful boring bright fresh sharp warm funny lovely great superb"
).split()
BAD, GOOD = WORDS[20:29], WORDS[29:]


ResultT = TypeVar("ResultT")
_Result = tuple[int, object, "str | None"]
"""Rank, result, and the traceback of an error."""


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A word-level tokeniser over `WORDS`, with pad, unknown, mask and separator tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<mask>", "<eos>"]
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS, ".", ","])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        eos_token="<eos>",
        model_max_length=64,
    )


def tiny_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a few thousand weights: ``llama``, ``llama-tied``, ``opt``, ``gpt2``, ``bert``, ``roberta``,
    ``distilbert``, ``t5`` or ``mixtral``."""
    import torch
    import transformers as t

    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    window = {"max_position_embeddings": 64, "intermediate_size": 48}
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**size, **window, tie_word_embeddings=False)),
        "llama-tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**size, **window, tie_word_embeddings=True)),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(**size, max_position_embeddings=64, ffn_dim=48, word_embed_proj_dim=32)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=3, eos_token_id=3)
        ),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**size, **window)),
        "roberta": lambda: t.RobertaForMaskedLM(
            t.RobertaConfig(**size, intermediate_size=48, max_position_embeddings=66, pad_token_id=0)
        ),
        "distilbert": lambda: t.DistilBertForMaskedLM(
            t.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=64)
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
        "mixtral": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(**size, **window, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return makers[kind]().eval()


def write_tiny_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """Save `tiny_model` and `tiny_tokenizer` in ``folder``, for ``from_pretrained`` to load; returns the folder.

    Args:
        folder: where to; made if need be.
        kind: see `tiny_model`.
        seed: of the random weights.
    """
    tiny_model(kind, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_tiny_data(path: Path, num_rows: int = 96, seed: int = 0) -> Path:
    """A .jsonl file of short made-up reviews with fields ``text`` and ``label`` (0 or 1, alternating).

    Args:
        path: of the file.
        num_rows: number of reviews.
        seed: of the random words.
    """
    draw = random.Random(seed)
    rows = []
    for number in range(num_rows):
        label = number % 2
        words = draw.choices(WORDS[:20], k=draw.randint(2, 12)) + draw.choices(GOOD if label else BAD, k=2)
        rows.append({"text": " ".join(words), "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tiny_config(folder: Path, kind: str = "llama-tied", algorithm: str = "mezo-svrg", **train: int) -> Path:
    """A config, with model and data beside it, that trains in about a second; returns the config file.

    Args:
        folder: where to; made if need be.
        kind: see `tiny_model`.
        algorithm: its name.
    """
    import yaml

    folder = folder.resolve()  # relative paths in a config start at its folder
    folder.mkdir(parents=True, exist_ok=True)
    task = {
        "name": "tiny",
        "data": str(write_tiny_data(folder / "data.jsonl")),
        "splits": {name: {"source": "train", "size": size} for name, size in _SIZES.items()},
        "prompt": "{{ text }} . It was {{ answer }}",
        "plain": ["{{ text }}"],
        "labels": [{"value": 0, "word": "terrible"}, {"value": 1, "word": "great"}],
    }
    data = {
        "model": {"name": str(write_tiny_model(folder / "model", kind))},
        "task": task,
        "algorithm": {"name": algorithm, **_RATES.get(algorithm, {})},
        "train": {"steps": 6, "batch_size": 6, "micro_batch": 4, **train},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


_RATES = {"mezo": {"lr": 1e-6}, "mezo-svrg": {"lr": 1e-6, "anchor_lr": 5e-5}}
_SIZES = {"train": 30, "validation": 20, "test": 20}


PRELOAD = [
    "mezo_dist.config.reader",
    "mezo_dist.directions.kernels.cpu",
    "mezo_dist.runs.training",
    "datasets",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
]


def spawn(function: Callable[..., ResultT], world_size: int, *args: object, timeout_s: float = 120.0) -> list[ResultT]:
    """Call ``function(comm, *args)`` on ``world_size`` processes joined over gloo; one thread each.

    The processes are forked off a helper process that has imported what takes long and done nothing else, so that
    only the first call waits for imports. They get the environment of the call.

    Args:
        function: importable (defined at the top of a module); its result must pickle.
        world_size: number of processes.
        timeout_s: seconds for the whole call, and for every collective in it.

    Returns:
        The results, by rank.

    Raises:
        RuntimeError: a process failed (with its traceback), died, or did not finish in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = context.Queue()
    environments = [{**os.environ, "RANK": str(r), "WORLD_SIZE": str(world_size)} for r in range(world_size)]
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(
                target=_work,
                args=(function, rank, environment, f"file://{folder}/meet", timeout_s, results, args),
            )
            for rank, environment in enumerate(environments)
        ]
        for worker in workers:
            worker.start()
        try:
            returned = cast("list[ResultT]", _collect(workers, results, world_size, timeout_s))
            for worker in workers:
                worker.join(timeout=10)
            return returned
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def _work(
    function: Callable[..., object],
    rank: int,
    environment: dict[str, str],
    init_method: str,
    timeout_s: float,
    results: multiprocessing.Queue[_Result],
    args: tuple[object, ...],
) -> None:
    """One process of `spawn`: connect, call the function, and send the result.

    Args:
        function: see `spawn`.
        rank: of this process.
        environment: its environment variables.
        init_method: where the processes meet.
        timeout_s: seconds for every collective.
        results: where the result goes.
        args: arguments of the function after the communicator.
    """
    import torch

    from mezo_dist.distributed.connect import connect

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        connection = connect(timeout_s, init_method)
        results.put((rank, function(connection, *args), None))
        connection.close()
    except BaseException:  # noqa: BLE001 (sent to the parent, whatever it is)
        results.put((rank, None, traceback.format_exc()))
        raise SystemExit(1) from None


def _collect(
    workers: Sequence[BaseProcess], results: multiprocessing.Queue[_Result], world_size: int, timeout_s: float
) -> list[object]:
    """The results of all processes, by rank. Raises RuntimeError if one failed, died or is late.

    Args:
        workers: the processes.
        results: where their results come from.
        world_size: number of processes.
        timeout_s: seconds to wait for all.
    """
    returned: dict[int, object] = {}
    deadline = time.monotonic() + timeout_s
    while len(returned) < world_size:
        try:
            rank, value, error = results.get(timeout=0.2)
        except queue.Empty:
            dead = [r for r, w in enumerate(workers) if r not in returned and w.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(f"rank(s) {dead} died without a word") from None
            if time.monotonic() > deadline:
                raise RuntimeError(f"ranks {sorted(set(range(world_size)) - set(returned))} did not finish") from None
            continue
        if error is not None:
            raise RuntimeError(f"rank {rank} failed:\n{error}")
        returned[rank] = value
    return [returned[rank] for rank in range(world_size)]
