"""Names of random things: 64-bit seeds of directions and 32-bit ids of parameters, by hashing (torch-free).

Invariant: a seed depends on what it is for and on the run's seed, never on the rank, the clock or the call order.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable


def derive_seed(run_seed: int, *purpose: int | str) -> int:
    """The 64-bit seed for ``purpose`` in the run with ``run_seed``.

    BLAKE2b (8-byte digest, little-endian) of the purpose written as text, so that neighbouring steps share nothing.
    Parts are joined by slashes; a slash or backslash inside a part follows a backslash, so that ``"a/b"`` is not
    ``"a", "b"``. The number 1 and the text ``"1"`` are the same.

    >>> derive_seed(0, "step", 1) == derive_seed(0, "step", 1) != derive_seed(0, "step", 2)
    True
    """
    return int.from_bytes(hashlib.blake2b(_text(run_seed, purpose).encode(), digest_size=8).digest(), "little")


def _text(run_seed: int, purpose: Iterable[int | str]) -> str:
    parts = (str(part).replace("\\", "\\\\").replace("/", "\\/") for part in purpose)
    return "/".join(["mezo_dist/v1", str(run_seed), *parts])


def shuffled(size: int, run_seed: int, *purpose: int | str) -> array[int]:
    """The numbers below ``size`` in the order of ``derive_seed(run_seed, *purpose, number)``.

    By hashing, not by a library's generator, whose streams may change between versions.

    >>> list(shuffled(5, 0, "order", 1)) == sorted(range(5), key=lambda i: derive_seed(0, "order", 1, i))
    True
    """
    import numpy as np  # here, for planners and configs need no numpy

    copy = hashlib.blake2b(f"{_text(run_seed, purpose)}/".encode(), digest_size=8).copy
    digests = []
    for number in range(size):
        state = copy()
        state.update(b"%d" % number)
        digests.append(state.digest())
    seeds = np.frombuffer(b"".join(digests), dtype="<u8")
    order = np.argsort(seeds, kind="stable")  # equal seeds leave the numbers in their order
    return array("q", order.astype(np.int64).tobytes())


def param_id(name: str) -> int:
    """The 32-bit id of the parameter with canonical ``name``: first 4 bytes (little-endian) of its 64-byte BLAKE2b.

    >>> param_id("model.norm.weight")
    1747749143
    """
    return int.from_bytes(hashlib.blake2b(name.encode()).digest()[:4], "little")


def param_ids(names: Iterable[str]) -> dict[str, int]:
    """Ids of all parameters of a model.

    Raises:
        RuntimeError: two names share an id (about 1 in 2**32 per pair); they would share their noise.
    """
    by_id: dict[int, str] = {}
    for name in names:
        other = by_id.setdefault(param_id(name), name)
        if other != name:
            raise RuntimeError(f"parameters {other!r} and {name!r} hash to the same id; rename one of them")
    return {name: number for number, name in by_id.items()}
