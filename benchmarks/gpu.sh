#!/usr/bin/env bash
# All GPU checks in under ten minutes: the tests of the compiled kernel and of the CUDA paths, then benchmarks/gpu.py.
# Run it in the project's folder, in an environment with lark-store and its dev extra, a CUDA build of torch, and triton.
# Results also go to $OUT (default: gpu-results).
set -u
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-results}
mkdir -p "$OUT"
$PYTHON -m pytest tests/gradients/test_kernel_gpu.py tests/gradients/test_oporp.py tests/gradients/test_gradients.py tests/query/test_query.py -q -W default 2>&1 | tail -30 | tee "$OUT/tests.txt"
$PYTHON benchmarks/gpu.py --json "$OUT/gpu.json" 2>&1 | tee "$OUT/gpu.md"
$PYTHON benchmarks/ingest.py --growth --device cuda --samples 16 --batch-tokens 8192 2>&1 | tee "$OUT/growth.md"
