#!/usr/bin/env bash
# All that there is to see on one GPU, in under ten minutes: benchmarks/gpu.sh FOLDER [--dry-run]
#
# Writes to FOLDER: tests.txt, tests_triton.txt, and what python -m benchmarks.gpu writes
# (results.jsonl, results.pt, table.md, rates.json, profile_*.txt). Called again with the same
# FOLDER, it leaves out what succeeded; delete NAME.done to have tests run again. Needs PyTorch,
# Triton, e3nn and pytest; for the stock model fairchem-core 1.10 on PYTHONPATH (an unpacked wheel
# does) and torch_geometric. Tests that also read structures need ase and lmdb, and are left out, by
# name, where these are missing. PYTHON names the interpreter. With --dry-run everything runs on the
# CPU, tiny.
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
failed=0

# tests NAME SECONDS ARGUMENTS...: of pytest, into NAME.txt, unless they passed before.
tests() {
    local name=$1 seconds=$2
    shift 2
    if [ -e "$folder/$name.done" ]; then
        echo "$name: passed before"
        return
    fi
    timeout "$seconds" "${pytest[@]}" "$@" >"$folder/$name.txt" 2>&1
    local code=$?
    tail -n 15 "$folder/$name.txt"
    if [ $code -eq 0 ]; then
        touch "$folder/$name.done"
    else
        echo "$name: exit code $code (124: it took longer than $seconds s)"
        failed=1
    fi
}

# 110 + 130 + 330 s, and what is under way then: below ten minutes.
if [ -n "$dry" ]; then
    tests tests 300 --noconftest tests/test_triton.py tests/test_ops.py \
        -k '(adds_up or softmax or segment_sum) and not cuda'
elif "$python" -c 'import ase, lmdb, torch_geometric, fairchem.core' 2>/dev/null; then
    tests tests 110 -m gpu tests
    tests tests_triton 130 tests/test_triton.py # compiling takes most of it
else
    echo 'left out for want of ase, lmdb or all of fairchem-core:' \
        'test_model.py, test_stock_equality.py, test_neighbors.py, test_recorded.py'
    tests tests 110 --noconftest tests/test_ops.py -k 'not cpu'
    tests tests_triton 130 --noconftest tests/test_triton.py
fi

timeout 350 "$python" -m benchmarks.gpu "$folder" $dry || failed=1
exit $failed
