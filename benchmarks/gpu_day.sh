#!/usr/bin/env bash
# All measurements that need a GPU: under 40 minutes, each part under 9. A part whose result is there is not run again.
#   benchmarks/gpu_day.sh [FOLDER]              on the first CUDA device
#   benchmarks/gpu_day.sh FOLDER --rehearse     on the CPU with tiny sizes, to see that it works
# At the end FOLDER/form.md holds the answers to the form "Benchmark result"; ENTITY="Your name" says who measured.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-benchmarks/results/gpu}
options=()
[ "${2:-}" = "--rehearse" ] && options=(--device cpu --rehearse)
failed=0

if [ "${#options[@]}" -eq 0 ] && [ ! -f "$out/tests.txt" ]; then
    mkdir -p "$out"
    timeout 540 python -m pytest -q -m gpu tests >"$out/tests.tmp" 2>&1 && mv "$out/tests.tmp" "$out/tests.txt" || failed=1
fi
for part in parity steps precision processes quality; do
    [ -f "$out/$part.json" ] && { echo "$part: done before"; continue; }
    timeout 540 python benchmarks/gpu_day.py "$part" --out "$out" "${options[@]}" || { echo "$part: failed"; failed=1; }
done
python benchmarks/gpu_day.py form --out "$out" --entity "${ENTITY:-anonymous}" "${options[@]}" || failed=1
exit $failed
