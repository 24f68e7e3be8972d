#!/usr/bin/env bash
# What only a GPU can show, in at most four minutes: golden numbers and bit-exact resume on the device, training and
# sampling rates, waits per step, and the cost of a checkpoint. A table on standard output, gpu.json in OUT.
#
#     benchmarks/gpu.sh [OUT [CHECKOUT_OF_DIFFUSERS_OR_SCRIPT]]
#
# Without the second argument the rates have no reference. Without a GPU everything runs on the CPU with tiny sizes,
# which shows only that it runs. PYTHON names the interpreter.
set -u
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python}"
out="${1:-${OUT:-gpu-results}}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
rm -f "$out"/*.json
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
scale="${GPU_TIME_SCALE:-1}"  # of the limits, for a slow machine

part() {  # name, seconds, arguments
    local name="$1" limit="$(($2 * scale))"
    shift 2
    echo "== $name (at most $limit s)"
    timeout "$limit" "$python" "$here/gpu/$name.py" "$out/$name.json" "$@" || echo "== $name: status $?"
}

part golden 25
part resume 60 &  # its small runs leave the device almost idle
resume=$!
part sampling 45
wait "$resume"
part rates 145 ${2:+"$2"}
exec "$python" "$here/gpu/table.py" "$out"
