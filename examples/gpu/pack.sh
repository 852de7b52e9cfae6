#!/bin/sh
# Packs what the first half hour on a GPU needs into one file of at most 64 MiB; see README.md beside this file.
#
#     examples/gpu/pack.sh [FILE]
#
# The code as committed, wheels for Python 3.12 that the machine lacks, MiniLM-L6 in fp16 and the movie sentences (both
# from this machine's cache, see python -m mezo_dist.assets). Needs pip, and a package index for the wheels.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
file=$(realpath -m "${1:-first_run.tar.gz}")
python=${PYTHON:-python}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/wheels" "$folder/cache" "$folder/code"

wheels() { # the packages by name, with those options of pip
    "$python" -m pip download -q --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
        --platform manylinux2014_x86_64 --platform any --dest "$folder/wheels" "$@"
}
wheels pydantic hypothesis # with what they need: pydantic takes one version of its core alone
wheels --no-deps greenlet pytest pytest-timeout pluggy iniconfig
git -C "$root" archive HEAD | tar -x -C "$folder/code"
"$python" - "$folder/cache" <<'END'
import shutil, sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mezo_dist.assets.registry import resolve_data, resolve_model

cache, model = Path(sys.argv[1]), resolve_model("demo:minilm-l6")
data = next(iter(resolve_data("demo:movie-sentences").values())).parent
shutil.copytree(data, cache / data.name)
shutil.copytree(model, cache / model.name, ignore=shutil.ignore_patterns("*.safetensors"))
tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(model / "model.safetensors").items()}
save_file(tensors, cache / model.name / "model.safetensors", metadata={"format": "pt"})
END
tar -czf "$file" -C "$folder" wheels cache code
size=$(($(wc -c <"$file") / 1048576))
echo "$file: $size MiB"
[ "$size" -lt 64 ] || { echo "that is more than 64 MiB" >&2; exit 1; }
