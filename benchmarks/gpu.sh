#!/usr/bin/env bash
# All that there is to see on one GPU, in under ten minutes: benchmarks/gpu.sh FOLDER [--dry-run]
#
# Writes to FOLDER: tests.txt, and what python -m benchmarks.gpu writes (results.jsonl, table.md,
# rates.json, profile_*.txt). Needs PyTorch, Triton, e3nn and pytest; for the stock model
# fairchem-core 1.10 on PYTHONPATH (an unpacked wheel does) and torch_geometric. Tests that also read
# structures need ase and lmdb, and are left out, by name, where these are missing. PYTHON names the
# interpreter. With --dry-run everything runs on the CPU, tiny.
set -uo pipefail
folder=${1:?usage: benchmarks/gpu.sh FOLDER [--dry-run]}
dry=${2:-}
if [ -n "$dry" ] && [ "$dry" != --dry-run ]; then
    echo "benchmarks/gpu.sh: unknown option $dry; there is --dry-run" >&2
    exit 2
fi
mkdir -p "$folder" || exit 1
folder=$(cd "$folder" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
pytest=("$python" -m pytest -q -p no:cacheprovider -o addopts=)

{
    if [ -n "$dry" ]; then
        timeout 300 "${pytest[@]}" --noconftest tests/test_triton.py tests/test_ops.py \
            -k '(adds_up or softmax or segment_sum) and not cuda'
    elif "$python" -c 'import ase, lmdb, torch_geometric, fairchem.core' 2>/dev/null; then
        timeout 240 "${pytest[@]}" -m gpu tests
        timeout 200 "${pytest[@]}" tests/test_triton.py  # compiling takes most of it
    else
        echo 'left out for want of ase, lmdb or all of fairchem-core:' \
            'test_model.py, test_stock_equality.py, test_neighbors.py, test_recorded.py'
        timeout 240 "${pytest[@]}" --noconftest tests/test_triton.py tests/test_ops.py -k 'not cpu'
    fi
} 2>&1 | tee "$folder/tests.txt" | tail -n 15
tests=${PIPESTATUS[0]}

timeout 540 "$python" -m benchmarks.gpu "$folder" $dry
measured=$?
exit $((tests || measured))
