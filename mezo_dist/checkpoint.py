"""Writing weights: export to a Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from mezo_dist.errors import UserError


def export(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a folder that ``AutoModel*.from_pretrained`` loads; it appears under its name only when it is complete.

    Raises:
        UserError: the folder cannot be written (full disk, no permission).
    """
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part)  # type: ignore[operator]  # every Hugging Face model has it
        tokenizer.save_pretrained(part)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"export to {folder} failed: {error}; the trajectory still holds the run") from error
