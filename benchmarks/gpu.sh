#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the tests under the `gpu` marker, then the benchmarks. Results go to benchmarks/results/ (and, where
# $OUT names a folder, there too). Needs the installed package or the checkout on PYTHONPATH; no network.
#
#   bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
status=0
python3 -m pytest -q -m gpu tests || status=$?
python3 benchmarks/sft.py --device cuda || status=$?
python3 benchmarks/checkpoint.py --device cuda || status=$?
python3 benchmarks/torch_compile.py || status=$?
python3 benchmarks/distill.py --device cuda || status=$?
python3 benchmarks/dpo.py --device cuda || status=$?
python3 benchmarks/planner.py --device cuda || status=$?
if [[ -n ${OUT:-} ]]; then
  cp benchmarks/results/*-gpu.* "$OUT"/ 2>/dev/null || true
fi
exit "$status"
