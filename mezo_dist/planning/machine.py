"""The machines of a plan: what they have, in units that people write (``80GB``, ``100gbit``)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mezo_dist.errors import UserError
from mezo_dist.planning.allreduce import Reduce

GIB = 2**30
BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30,
         "tib": 2**40}  # fmt: skip
BITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9, "tbit": 10**12}
FLOPS = {"gflops": 10**9, "tflops": 10**12, "pflops": 10**15}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]+)(/s)?")


@dataclass(frozen=True)
class Machine:
    """What every host and rank of a plan has. Rates are those that are reached, not those of a data sheet.

    Sources of the defaults: see `ASSUMED`. `mezo_dist.planning.calibration` measures them on the machine at hand.
    """

    hosts: int = 1
    ranks_per_host: int = 1
    memory: int = 80 * 10**9
    """Bytes that a rank has for itself (of its GPU, or its share of the host)."""
    link: float = 100e9 / 8
    """Bytes per second between hosts, one way, for all ranks of a host together."""
    host_link: float = 300e9
    """Bytes per second that a rank gets from another one of its host."""
    latency: float = 30e-6
    """Seconds that a message between two ranks takes."""
    flops: float = 4e14
    """Floating-point operations per second of a rank's matrix products."""
    bandwidth: float = 2e12
    """Bytes per second of a rank's memory."""
    generate: float = 2e-12
    """Seconds to generate one element of one direction."""
    write: float = 3e-13
    """Seconds to read an element of a weight, add to it, and write one variant of it."""
    call: float = 1.1e-4
    """Seconds of the host for one module of one waiting pass: switching passes, Python, launches."""
    gpu: bool = True
    """Ranks compute on GPUs, where variants of several modules are made together, and which work while the host
    goes on."""
    runtime: int = 1 * GIB
    """Bytes that Python, torch, and the context of the device take in every rank."""
    reduce: Reduce = "ring"
    """The way that scalars take in an all-reduce; runs know the ring alone."""
    origin: str = "assumed: those of an H100"
    """Where the rates come from."""

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.hosts * self.ranks_per_host


ASSUMED = """Assumed for an H100: 400 TFLOPS of 16-bit matrix products (40 % of the 989 of the data sheet, what
published training runs reach), 2 TB/s of memory (60 % of 3.35), 300 GB/s from GPU to GPU (two thirds of NVLink's
450). Making directions and calling modules as measured on an H200, which has the same processor; there it is memory
that limits how variants are written, so an H100 is given more
time for it. `--calibrate` measures the machine at hand."""


def as_h200(machine: Machine) -> Machine:
    """``machine`` with the rates of an H200, measured on one by `examples/gpu/first_run.sh` (2026-11-26, torch 2.11,
    Triton 3.6, bf16): products of OPT-13B with 640 tokens; a copy; both signs and an update of a gaussian direction, in
    two equations; the host's time of an OPT-1.3B step, which is longer there than the GPU's."""
    return replace(
        machine, flops=6.2e14, bandwidth=4.1e12, generate=2e-12, write=1e-13, call=1.1e-4,
        origin="measured on an H200; links assumed",
    )  # fmt: skip


def parse_bytes(text: str, option: str) -> int:
    """``80GB`` (decimal), ``80GiB`` (binary) or a number of bytes.

    Args:
        text: the quantity.
        option: that it was given to, for messages.

    Raises:
        UserError: it is no quantity of bytes above zero.
    """
    if text.strip().isdigit() and int(text) > 0:
        return int(text)
    return round(_parsed(text, option, BYTES, "80GB or 80GiB"))


def parse_rate(text: str, option: str) -> float:
    """Bytes per second: ``100gbit``, ``12.5GB`` or ``12.5GB/s``; see `parse_bytes` for arguments and errors."""
    in_bits = {unit: factor / 8 for unit, factor in BITS.items()}
    return _parsed(text, option, {**BYTES, **in_bits}, "100gbit or 12.5GB/s")


def parse_flops(text: str, option: str) -> float:
    """Operations per second: ``400tflops``; see `parse_bytes` for arguments and errors."""
    return _parsed(text, option, FLOPS, "400tflops")


def _parsed(text: str, option: str, factors: dict[str, int] | dict[str, float], example: str) -> float:
    """A number times its unit.

    Args:
        text: the quantity.
        option: that it was given to, for messages.
        factors: by unit, in lower case.
        example: of a quantity, for messages.
    """
    match = _QUANTITY.fullmatch(text.strip().lower())
    value = float(match[1]) * factors[match[2]] if match and match[2] in factors else 0.0
    if match is None or match[2] not in factors:
        raise UserError(
            f"{option}: {text!r} is no quantity with one of the units {', '.join(factors)}, as {example} is"
        )
    if value <= 0:
        raise UserError(f"{option}: must be above 0, not {text!r}")
    return value
