#!/bin/sh
# The first half hour on a GPU, in parts of at most eight minutes each; see README.md beside this file.
#
#     examples/gpu/first_run.sh PART [--rehearse] [arguments of the part]
#
# PART: tests, trajectory, runs, directions, linear, ncu, steps, memory, generation, compile, profile, evidence, paper.
# Results: PART.json and PART.md in $OUT (default first_run), and rows on the console. --rehearse: the same on the CPU,
# with tiny shapes. Nothing is fetched from a network.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${OUT:-first_run}
python=${PYTHON:-python}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
part=${1:?name a part: tests, trajectory, directions, linear, ncu, steps, memory, generation, compile, evidence, paper}
shift
rehearse=
if [ "${1:-}" = --rehearse ]; then
    rehearse=--rehearse
    shift
fi
mkdir -p "$out"
case $part in
tests | trajectory | runs | directions | linear | steps | memory | generation | compile | profile | paper)
    # paper goes on where it was; call it as often as there is time
    timeout 480 "$python" "$here/parts.py" "$part" $rehearse --out "$out" "$@"
    ;;
ncu) # the kernel of `directions` that is furthest from a copy, under NVIDIA's profiler
    worst=$("$python" - "$out/directions.json" <<'END'
import json, sys
rows = json.load(open(sys.argv[1]))["rows"]
print(min((row for row in rows if ":" in row["what"]), key=lambda row: row["of a copy"])["what"])
END
    )
    echo "worst of $out/directions.json: $worst"
    if command -v ncu >/dev/null; then
        # clocks stay as they are, and few sections, or each kernel would run dozens of times
        timeout 480 ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis \
            --section SchedulerStats --section WarpStateStats --section InstructionStats --section Occupancy \
            -k regex:_kernel -c 2 --csv --log-file "$out/ncu.csv" \
            "$python" "$here/parts.py" directions --only "$worst" $rehearse --out "$out/ncu" "$@"
    elif [ -n "$rehearse" ]; then # as far as it goes without a profiler
        "$python" "$here/parts.py" directions --only "$worst" --rehearse --out "$out/ncu" "$@"
    else
        echo "ncu is not here; it comes with the CUDA toolkit" >&2
        exit 1
    fi
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
