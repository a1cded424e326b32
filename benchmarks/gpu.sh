#!/usr/bin/env bash
# Everything that only a CUDA device can show, in one command, under ten minutes, without a network:
#
#   benchmarks/gpu.sh --output /tmp/gpu
#   DEVICE=cpu benchmarks/gpu.sh --output /tmp/gpu     the script itself, on tiny models, in minutes
#
# Writes gpu.json and gpu.md there. Started again, it does only what is missing. See gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" benchmarks/gpu.py "$@"
