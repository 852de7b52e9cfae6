"""Linear layers on variants that exist in registers alone: what an engine and a run make of them.

The kernel runs in Triton's interpreter, in a process of its own (this file as a script), on weights in host memory.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.config import reader
from mezo_dist.directions import registers
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.replicated import Replicated
from mezo_dist.errors import UserError
from mezo_dist.runs.load import audit, open_run
from mezo_dist.runs.training import train
from mezo_dist.storage.run_folder import read_log
from mezo_dist.testing import tiny_model, write_tiny_config
from tests.directions.test_gpu import interpreted, read_numbers_of_arrays

SHIFT = Combination.single(3, 0.05)
BOTH = [Variant(SHIFT), Variant(-SHIFT)]
IDS = [torch.tensor([[5, 9, 11], [3, 4, 6]]), torch.tensor([[7, 8]])]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference of outputs to those on materialised variants, as a part of the largest output."""


CALLS: list[int] = []
"""Of the kernel: numbers of outputs."""
SIZE = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def small() -> nn.Module:
    """An embedding and a linear layer with whole rademacher spans."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 3))


def evaluated(model: nn.Module, law: str, variants: list[Variant], linear: Any, **options: Any) -> list[list[Tensor]]:
    """Outputs by item and variant."""

    def forward(model: nn.Module, ids: Tensor) -> Tensor:
        output = model(ids)
        return output if isinstance(output, Tensor) else output.logits

    return Engine(model, Law(law), linear=linear, **options).evaluate(variants, IDS, forward)


def compared(usual: list[list[Tensor]], ours: list[list[Tensor]], variants: list[Variant]) -> str:
    """What is wrong with outputs of variants in registers; "" if nothing."""
    wrong = []
    for i in range(len(IDS)):
        for v, variant in enumerate(variants):
            a, b = usual[i][v], ours[i][v]
            if (a - b).abs().max() > CLOSE[a.dtype] * a.abs().max():
                wrong.append(f"variant {v} of item {i} differs by {float((a - b).abs().max())}")
            if not variant.shift and not torch.equal(a, b):
                wrong.append(f"variant {v} of item {i} is not moved, and has other bits than the model")
    if not CALLS:
        wrong.append("the kernel was not used")
    CALLS.clear()
    return "; ".join(wrong)


def both_signs() -> str:
    """Of a model with frozen biases and matrices among others, and the model as it is beside them."""
    config = transformers.OPTConfig(**SIZE, max_position_embeddings=16, ffn_dim=64, word_embed_proj_dim=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.OPTForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.endswith(("fc1.bias", "k_proj.weight"))
    variants = [*BOTH, Variant()]
    usual, ours = (evaluated(model, "rademacher", variants, linear) for linear in ("materialised", "registers"))
    alone = evaluated(model, "rademacher", BOTH[1:], "registers")
    if not all(torch.equal(alone[i][0], ours[i][1]) for i in range(len(IDS))):
        return "other bits alone"
    return compared(usual, ours, variants)


def other_dtype() -> str:
    """Variants in bf16 of weights in fp32."""
    usual, ours = (
        evaluated(small(), "rademacher", BOTH, linear, compute_dtype=torch.bfloat16)
        for linear in ("materialised", "registers")
    )
    return compared(usual, ours, BOTH)


def displaced() -> str:
    """Variants of two directions, and of others; the last one has too many."""
    anchor = Combination.of([(8, 0.02), (9, -0.01)])
    many = Combination.of((seed, 0.01) for seed in range(20, 25))
    variants = [Variant(anchor), Variant(SHIFT + anchor), Variant(SHIFT), Variant(many)]
    usual, ours = (evaluated(small(), "rademacher", variants, way) for way in ("materialised", "registers"))
    used = [len(IDS) * 3]  # by one call for all but the last one
    return compared(usual, ours, variants) if used == CALLS else f"the kernel was used for {CALLS}"


def gaussian() -> str:
    usual, ours = (evaluated(small(), "gaussian", BOTH, way) for way in ("materialised", "registers"))
    return compared(usual, ours, BOTH)


def said() -> str:
    """The log says once for every reason what is materialised."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mezo_dist.engines.lockstep.in_registers")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model = nn.Sequential(nn.Embedding(64, 8), nn.LayerNorm(8), nn.Linear(8, 2), nn.LayerNorm(2))
    many = Combination.of((seed, 0.01) for seed in range(5))
    for variants in (BOTH, [Variant(many)]):
        Engine(model, Law("rademacher"), linear="registers").evaluate(variants, IDS[:1], lambda m, ids: m(ids))
    usual = "layout.linear: variants of {} (and perhaps of other weights) are materialised: {}"
    reasons = [usual.format("0.weight", "not a linear layer")] * 2
    wanted = [*reasons, usual.format("2.weight", "a variant of more than 4 directions")]
    return "" if sorted(records) == sorted(wanted) else str(records)


def run() -> str:
    """Runs: losses close to those of the usual way, the same from one time to the next, weights that replay gives."""
    losses, comm = [], Communicator()
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_config(Path(folder), "llama-tied", "mezo", steps=2, batch_size=2, micro_batch=2)
        config = transformers.LlamaConfig(**SIZE, max_position_embeddings=64, intermediate_size=64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            transformers.LlamaForCausalLM(config).save_pretrained(Path(folder) / "model")
        CALLS.clear()
        for number, linear in enumerate(("materialised", "registers", "registers")):
            out = Path(folder) / f"run{number}"
            options = [f"layout.linear={linear}", "law=rademacher", "output.looks=0", "output.test=false",
                       "output.export=false", "output.answers=0", f"output.dir={out}", "monitor=[]"]  # fmt: skip
            train(reader.load(path, options), comm, quiet=True)
            losses.append([loss for step in read_log(out, comm).steps for some in step.rounds for loss in some.mean])
            audit(open_run(out, None, comm), comm)  # raises if replay gave other weights
    usual, ours, again = (torch.tensor(some, dtype=torch.float64) for some in losses)
    if not torch.equal(ours, again):
        return "losses differ from one time to the next"
    if not CALLS:  # losses alone do not tell: with some weights they are the same to the last bit
        return "the kernel was not used"
    return "" if torch.allclose(usual, ours, rtol=1e-4, atol=0) else f"{usual} {ours}"


CASES: dict[str, Callable[[], str]] = {
    case.__name__: case for case in (both_signs, other_dtype, displaced, gaussian, said, run)
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """By case: what is wrong."""
    return interpreted(__file__, "interpreter")


@pytest.mark.parametrize("name", CASES)
def test_in_registers(results: dict[str, str], name: str) -> None:
    assert results[name] == ""


def test_no_samples_give_no_outputs() -> None:
    """As an expert that is called for no tokens gets them."""
    inputs = [torch.empty(2, 0, 128)]
    (output,) = registers.linear(Law("gaussian"), torch.ones(3, 128), [SHIFT], inputs, None, param_id=1)
    assert output.shape == (2, 0, 3)


def test_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"layout.linear: registers needs weights on an NVIDIA GPU.* on cpu; set it to"):
        Engine(tiny_model("opt"), Law("gaussian"), linear="registers")


def test_low_rank_directions_and_shards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="lowrank directions are products of thin factors; set it to materialised"):
        Engine(tiny_model("opt"), Law("lowrank"), linear="registers")
    monkeypatch.setattr(Replicated, "is_sharded", True)
    with pytest.raises(UserError, match="needs whole weights"):
        Engine(tiny_model("opt"), Law("gaussian"), linear="registers")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["layout.name=fsdp"], "layout.name: fsdp shards them; set it to materialised"),
        (["layout.name=zero"], "layout.name: zero shards them; set it to materialised"),
        (["train.compile=units"], "train.compile: units compiles whole blocks; set it to materialised"),
        (["law=lowrank"], "those of lowrank are products of thin factors; set it to materialised"),
        (["model.peft.method=lora"], "model.peft.method: lora trains small ones; set it to materialised"),
        (
            ["model.peft.method=lora", "model.quantise=int8"],
            "model.quantise: int8 freezes them; set it to materialised",
        ),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, options: list[str], message: str) -> None:
    path = write_tiny_config(tmp_path, "opt", "mezo")
    with pytest.raises(UserError, match=message):
        reader.load(path, ["layout.linear=registers", *options])


def test_first_order_baselines_have_no_variants(tmp_path: Path) -> None:
    path = write_tiny_config(tmp_path, "opt", "sgd")
    with pytest.raises(UserError, match="sgd has none; set it to materialised"):
        reader.load(path, ["layout.linear=registers"])


def counted(*args: Any, **options: Any) -> list[Tensor]:
    outputs = linear(*args, **options)
    CALLS.append(len(outputs))
    return outputs


if __name__ == "__main__":
    read_numbers_of_arrays()
    linear, registers.linear = registers.linear, counted
    print(json.dumps({name: case() for name, case in CASES.items() if name in (sys.argv[2:] or CASES)}))
