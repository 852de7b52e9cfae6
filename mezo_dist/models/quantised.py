"""Base models whose linear layers are kept in 8 or 4 bits, by torchao and bitsandbytes, through transformers.

They are frozen: LoRA beside them is trained. Quantising rounds to nearest, so it gives the same bits every time; the
fingerprint of a run covers them (`mezo_dist.engines.payload`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mezo_dist.config.schema import ModelConfig
from mezo_dist.engines.payload import is_quantised
from mezo_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EXTRA = "pip install 'mezo_dist[quantised]'"


def quantisation(config: ModelConfig) -> Any:
    """What ``from_pretrained`` of transformers takes as its ``quantization_config``; None: nothing is quantised.

    Raises:
        UserError: the package that ``model.quantise`` needs is not there.
    """
    if config.quantise is None:
        return None
    import transformers

    try:
        if config.quantise == "int8":
            from torchao.quantization import Int8WeightOnlyConfig

            return transformers.TorchAoConfig(Int8WeightOnlyConfig())
        import bitsandbytes  # noqa: F401  # transformers needs it
    except ImportError as error:
        package = {"int8": "torchao", "int4": "bitsandbytes"}[config.quantise]
        raise UserError(f"model.quantise: {config.quantise} needs {package}: {EXTRA} ({error})") from error
    dtype = getattr(torch, config.weights)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def check_checkpoint(config: ModelConfig, hf_config: PreTrainedConfig, *, whole: bool) -> None:
    """Check what a run can do with a checkpoint that was saved quantised.

    Args:
        config: which model, and what is trained.
        hf_config: the checkpoint's.
        whole: every process has the whole model.

    Raises:
        UserError: nothing, as things are set.
    """
    saved = getattr(hf_config, "quantization_config", None)
    if saved is None:
        return
    facts = saved if isinstance(saved, dict) else saved.to_dict()
    method = str(facts.get("quant_method", "an unknown method"))
    method = method.rpartition(".")[2].lower()
    what = f"model.name: the checkpoint {config.name!r} is quantised by {method}"
    if config.quantise is not None:
        raise UserError(f"model.quantise: the checkpoint {config.name!r} is quantised already; leave it out")
    if method == "bitsandbytes" and not facts.get("load_in_4bit"):
        raise UserError(f"{what} in 8 bits, which rounds activations as well; choose one in 4 bits, or model.quantise")
    if method not in ("torchao", "bitsandbytes"):
        raise UserError(f"{what}; torchao and bitsandbytes (4 bits) are supported: choose the unquantised model")
    if config.peft.method != "lora":
        raise UserError(f"{what}, and quantised weights cannot be trained; set model.peft.method: lora")
    if not whole:
        raise UserError(f"{what}, and such weights cannot be cut; set layout.name: replicated")
    if config.head == "classifier":
        raise UserError(f"{what}, which is not for model.head: classifier, whose head is trained")
    if config.compute not in (None, config.weights):
        raise UserError(f"{what}: its layers compute in the dtype of model.weights; leave model.compute out")


def settle(config: ModelConfig, model: nn.Module) -> None:
    """Keep a loaded model from changing its quantised weights by itself.

    Raises:
        UserError: ``model.quantise`` is set, and no weight was quantised: its layers are of other kinds.
    """
    for module in model.modules():
        # Where a CPU has instructions for it, bitsandbytes packs weights anew in their first forward pass, and rounds
        # their scales to 16 bits: that writes to the base, and other CPUs would compute other bits.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if config.quantise is not None and not any(map(is_quantised, model.parameters())):
        raise UserError(
            f"model.quantise: no layer of {config.name!r}, a {type(model).__name__}, was quantised in "
            f"{config.quantise}: it has no linear layers of torch; leave it out"
        )
