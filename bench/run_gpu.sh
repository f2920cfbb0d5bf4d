#!/usr/bin/env bash
# On a machine with a GPU: every operator's tests on it, then every benchmark, into
# bench/results/<gpu>.json. A red test stops it: what is wrong is not timed.
#
#   bash bench/run_gpu.sh            PYTHON=... chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}

name=$("$PYTHON" -c '
import re, torch
if torch.cuda.is_available():
    print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))
')
if [ -z "$name" ]; then
    echo "bench/run_gpu.sh: torch sees no CUDA device, so there is nothing to measure here." >&2
    echo "On the CPU: $PYTHON -m bench.bench_linear_hdpo" >&2
    exit 1
fi

"$PYTHON" -m pytest tests -q -m gpu --ignore=tests/trainer
out=bench/results/$name.json
"$PYTHON" -m bench.bench_linear_hdpo --out "$out"
"$PYTHON" -m bench.bench_logprobs --out "$out"
"$PYTHON" -m bench.bench_advantages --out "$out"
"$PYTHON" -m bench.bench_prefix_attention --out "$out"
# A whole update needs the trainer's packages and torchao, which a bare machine may lack.
if reason=$("$PYTHON" -c 'import torchao, bench.bench_step' 2>&1); then
    "$PYTHON" -m bench.bench_step --out "$out"
else
    echo "whole updates are not timed: $(tail -n 1 <<<"$reason")" >&2
fi
echo "wrote $out"
