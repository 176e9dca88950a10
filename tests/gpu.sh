#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in one go: the tests, compute-sanitizer, and the measurements of docs/results.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: tests/gpu.sh [--out DIR] [PART ...]

Runs with the Python of the active environment, which must hold vLLM with the overlay, torch for CUDA, and pytest.

  tests      pytest -m gpu, and the functional test on tiny-0.6b under `strict`
  sanitize   compute-sanitizer: memcheck, racecheck, synccheck, initcheck over every kernel
  step       decode steps, prefill and mixed steps of 0.6B, 1.7B, 4B and 8B
  context    decode steps of 0.6B and 8B at 2,000 and 8,000 tokens of context
  serve      latency and tokens/s of 0.6B and 8B through LLM.generate
  kernel     each op by itself, 0.6B and 8B

  --out DIR  where reports and logs go (default: gpu-results)
  PART       these alone; default: all, in this order
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=gpu-results
parts=()
failed=()

parse_arguments() {
  while (($#)); do
    case $1 in
      --out) out=${2:?--out needs a folder} && shift ;;
      -h | --help) usage && exit 0 ;;
      tests | sanitize | step | context | serve | kernel) parts+=("$1") ;;
      *) echo "tests/gpu.sh knows no $1: --help lists its parts." >&2 && exit 2 ;;
    esac
    shift
  done
  ((${#parts[@]})) || parts=(tests sanitize step context serve kernel)
}

# run NAME COMMAND...: its output goes to OUT/NAME.log, its last lines and its end to the screen.
run() {
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$out/$name.log" 2>&1; then
    printf '== %s: done in %d s\n' "$name" $((SECONDS - start))
  else
    printf '== %s: FAILED after %d s (%s)\n' "$name" $((SECONDS - start)) "$out/$name.log"
    failed+=("$name")
  fi
  tail -n 14 "$out/$name.log" | cut -c 1-180
}

measure() { # measure NAME LEVEL MODEL OPTION...
  local name=$1 level=$2 model=$3
  shift 3
  run "$name" python benchmark_mirage.py --level "$level" --model "$model" --json "$out/$name.json" "$@"
}

part_tests() {
  run gpu-tests python -m pytest -q -m gpu
  VLLM_USE_MIRAGE=strict run functional python test_mirage_qwen3.py --model tiny-0.6b
}

part_sanitize() { run sanitize bash tests/sanitize.sh; }

part_step() {
  local model
  for model in 0.6B 1.7B 4B 8B; do
    measure "step-$model" step "$model" --batch-sizes 1 2 4 8 16 24 32 48 64 --profile "$out/layer-$model.png"
  done
}

part_context() {
  local model context
  for model in 0.6B 8B; do
    for context in 2000 8000; do # 32 requests: both arms' caches must fit
      measure "step-$model-context-$context" step "$model" --input-len "$context" --batch-sizes 1 8 32
    done
  done
}

part_serve() {
  local model
  for model in 0.6B 8B; do
    measure "serve-$model" serve "$model" --input-len 128 --batch-sizes 1 4 16
    measure "prefill-$model" serve "$model" --input-len 1000 --max-tokens 1 --batch-sizes 1 8
  done
}

part_kernel() {
  local model
  for model in 0.6B 8B; do measure "kernel-$model" kernel "$model" --num-iterations 6; done
}

main() {
  local part
  parse_arguments "$@"
  cd "$root" || exit 1
  python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
    || { echo "tests/gpu.sh needs an NVIDIA GPU and torch for CUDA, and the active Python finds none." >&2 && exit 2; }
  mkdir -p "$out"
  export VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0
  for part in "${parts[@]}"; do "part_$part"; done
  printf '\nfailed: %s\n' "${failed[*]:-none}"
  ((${#failed[@]} == 0))
}

main "$@"
