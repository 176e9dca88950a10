#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in one go: the tests, compute-sanitizer, and the measurements of docs/results.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: tests/gpu.sh [--out DIR] [PART ...]

Runs with the Python of the active environment, which must hold vLLM with the overlay, torch for CUDA, and pytest.

  tests      pytest -m gpu (kernels, layers, uses of vLLM), and the functional test on tiny-0.6b under `strict`
  sanitize   compute-sanitizer: memcheck, racecheck, synccheck, initcheck over every kernel
  load       thousands of requests to `vllm serve` with the overlay, then to stock
  overhead   what an idle overlay costs: 0.6B and 8B
  step       decode steps, prefill and mixed steps
  context    decode steps at 2,000 and 8,000 tokens of context: 0.6B and 8B
  serve      latency and tokens/s through LLM.generate: 0.6B and 8B
  latency    `vllm bench latency` of both arms: 0.6B and 8B
  bench      `vllm bench serve` against a server of each arm: 0.6B and 8B
  kernel     each op by itself

  --out DIR  where reports and logs go (default: gpu-results)
  PART       these alone; default: all, in this order
  MODELS     variable: the models to measure (default: "0.6B 1.7B 4B 8B"; where two are named above, of those two)
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=gpu-results
parts=()
failed=()

parse_arguments() {
  while (($#)); do
    case $1 in
      --out) (($# > 1)) || { echo "--out needs a folder." >&2 && exit 2; }; out=$2 && shift ;;
      -h | --help) usage && exit 0 ;;
      tests | sanitize | load | overhead | step | context | serve | latency | bench | kernel) parts+=("$1") ;;
      *) echo "tests/gpu.sh knows no $1: --help lists its parts." >&2 && exit 2 ;;
    esac
    shift
  done
  local model
  for model in ${MODELS:-}; do
    [[ " 0.6B 1.7B 4B 8B " == *" $model "* ]] || { echo "MODELS names $model, which is none of 0.6B, 1.7B, 4B and 8B." >&2 && exit 2; }
  done
  ((${#parts[@]})) || parts=(tests sanitize load overhead step context serve latency bench kernel)
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

part_load() {
  local switch model
  model=$(python -c 'from test_mirage_qwen3 import cached_tiny_qwen3; print(cached_tiny_qwen3("tiny-0.6b"))')
  for switch in 1 0; do run "load-$switch" with_server "load-$switch" send_a_crowd "$switch" "$model"; done
}

send_a_crowd() { # of with_server: port and server are its own
  python tests/load_client.py --url "http://127.0.0.1:$port" --requests 5000 --concurrency 128 --max-prompt 1024 --max-tokens 256 \
    --pid "$server" --json "$out/$1.json"
}

with_server() { # with_server NAME COMMAND SWITCH MODEL OPTION...: COMMAND NAME MODEL runs while the server answers at $port
  local name=$1 command=$2 switch=$3 model=$4 port=$((8100 + $3)) server status=1
  shift 4
  VLLM_USE_MIRAGE=$switch VLLM_CACHE_ROOT="$out/cache-$switch" python -m vllm.entrypoints.cli.main serve "$model" --served-model-name measured \
    --port "$port" --max-model-len 2048 --kv-cache-memory-bytes $((8 << 30)) --gpu-memory-utilization 0.2 "$@" >"$out/server-$name.log" 2>&1 &
  server=$!
  for _ in $(seq 180); do
    kill -0 "$server" 2>/dev/null || break
    python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$port/health')" 2>/dev/null && status=0 && break
    sleep 1
  done
  ((status == 0)) && { "$command" "$name" "$model" || status=1; }
  kill "$server" 2>/dev/null
  wait "$server"
  return "$status"
}

part_overhead() {
  local model
  for model in $(of_models 0.6B 8B); do
    # two engines of 8B for each arm would need more than 140 GB
    run "overhead-$model" python tests/gpu_overhead.py --model "$model" --starts "$([[ $model == 0.6B ]] && echo 3 || echo 1)" --json "$out/overhead-$model.json"
  done
}

part_step() {
  local model
  for model in $(of_models 0.6B 1.7B 4B 8B); do
    measure "step-$model" step "$model" --batch-sizes 1 2 4 8 16 24 32 40 48 56 64 --profile "$out/layer-$model.png"
  done
}

part_context() {
  local model
  for model in $(of_models 0.6B 8B); do # 32 requests: both arms' caches must fit
    measure "context-$model" step "$model" --input-len 2000 8000 --batch-sizes 1 2 4 8 16 32 --num-iterations 6 --num-warmup 1
  done
}

part_serve() {
  local model
  for model in $(of_models 0.6B 8B); do
    measure "serve-$model" serve "$model"
  done
}

part_latency() {
  local model arm
  for model in $(of_models 0.6B 8B); do
    python -c "import pathlib, benchmark_mirage as b; b.write_dummy_config('$model', pathlib.Path('$out/model-$model'))"
    for arm in 0 1; do
      VLLM_USE_MIRAGE=$arm VLLM_CACHE_ROOT="$out/cache-$arm" run "latency-$model-$arm" python -m vllm.entrypoints.cli.main bench latency \
        --model "$out/model-$model" --load-format dummy --skip-tokenizer-init --max-model-len 2048 --input-len 128 --output-len 128 \
        --batch-size 1 --num-iters 10 --output-json "$out/latency-$model-$arm.json"
    done
  done
}

part_bench() {
  local model switch
  for model in $(of_models 0.6B 8B); do
    python - "$model" "$out/served-$model" <<'PYTHON'
# dummy weights in the model's shape, and a real tokenizer: the client draws its prompts from it
import pathlib, shutil, sys
import benchmark_mirage
from test_mirage_qwen3 import cached_tiny_qwen3

folder = pathlib.Path(sys.argv[2])
benchmark_mirage.write_dummy_config(sys.argv[1], folder)
for path in pathlib.Path(cached_tiny_qwen3("tiny")).glob("*token*"):
    shutil.copy(path, folder)
PYTHON
    for switch in 0 1; do
      run "bench-$model-$switch" with_server "bench-$model-$switch" bench_serve "$switch" "$out/served-$model" --load-format dummy
    done
  done
}

bench_serve() {
  python -m vllm.entrypoints.cli.main bench serve --model measured --tokenizer "$2" --port "$port" --dataset-name random --random-input-len 128 \
    --random-output-len 128 --num-prompts 64 --max-concurrency 4 --ignore-eos --save-result --result-dir "$out" --result-filename "$1.json"
}

part_kernel() {
  local model
  for model in $(of_models 0.6B 1.7B 4B 8B); do measure "kernel-$model" kernel "$model" --num-iterations 6; done
}

of_models() { # of_models MODEL...: those of them that $MODELS names
  local model
  for model in "$@"; do [[ " ${MODELS:-$*} " == *" $model "* ]] && echo "$model"; done
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
