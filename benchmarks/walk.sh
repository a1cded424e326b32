#!/usr/bin/env bash
# The commands on a trained model, as README.md has them, on the embedded model, in their order; with the
# time of each. In a clone, with its environment active:
#   OMP_NUM_THREADS=1 benchmarks/walk.sh /tmp/walk
# The demo comes first, as it trains what the others take; its time is not theirs. In the end comes what a
# training step enters: modules, functions, calls.
set -euo pipefail
folder=${1:?the folder to work in, which is made}
steps=$(cd "$(dirname "$0")" && pwd)/train_step.py
mkdir -p "$folder"
cd "$folder"
TIMEFORMAT='[%R s, %U s of a processor]'

try() {
    echo "\$ $*"
    time "$@"
}

try dora-diffusion demo
try dora-diffusion extract --base embedded:tiny-sd --tuned demo-output/merged --rank 16 --output my-style.safetensors
try dora-diffusion combine demo-output/bolt_mug:0.7 my-style.safetensors:0.5 --base embedded:tiny-sd --output both.safetensors
(cd "$(dirname "$steps")/.." && python "$steps" --calls)
