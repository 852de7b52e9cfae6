#!/bin/sh
# The first half hour on a GPU, in parts of at most eight minutes each; see README.md beside this file.
#
#     examples/gpu/first_run.sh PART [--rehearse] [arguments of the part]
#
# PART: tests, directions, steps, memory, generation, evidence. Results: $OUT (default first_run)/PART.json, and a table
# on the console. --rehearse: the same on the CPU, with tiny shapes. Nothing is fetched from a network.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${OUT:-first_run}
python=${PYTHON:-python}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
part=${1:?name a part: tests, directions, steps, memory, generation, evidence}
shift
rehearse=
if [ "${1:-}" = --rehearse ]; then
    rehearse=--rehearse
    shift
fi
mkdir -p "$out"
case $part in
tests) # the bits of every kernel equal the reference, on the GPU where there is one
    [ -z "$rehearse" ] || set -- -k 'test_is_the_implementation_for_cuda or test_what_would_wait' "$@"
    cd "$root"
    timeout 480 "$python" -m pytest tests/directions/test_gpu.py tests/gpu -q --junitxml="$out/tests.xml" "$@"
    ;;
directions | steps | memory | generation)
    timeout 480 "$python" "$here/parts.py" "$part" $rehearse --out "$out" "$@"
    ;;
evidence) # starts again where it was; call it as often as there is time
    preset=gpu
    [ -z "$rehearse" ] || preset=smoke
    timeout 480 "$python" "$root/examples/studies/learning_curves.py" --preset "$preset" --out "$out" "$@"
    ;;
*)
    echo "no part is called $part" >&2
    exit 2
    ;;
esac
