#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs every check of vLLM-Mirage: ruff, mypy, shellcheck, bats, pytest. Needs no GPU.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: tests/run.sh [--quick] [PYTEST ARGUMENT ...]

Runs ruff, mypy, shellcheck, bats and pytest in the active virtual environment, or in .venv, and first lets
./install.sh put vLLM and the overlay there (a second run changes nothing).

  --quick            leave out bats and the tests that start vLLM's engine
  PYTEST ARGUMENT    passed on to pytest, for example -k norm_qkv; then only pytest runs
  -h, --help         this text
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
quick=0
pytest_args=()
passed=()
failed=()

parse_arguments() {
  while (($#)); do
    case $1 in
      --quick) quick=1 ;;
      -h | --help) usage && exit 0 ;;
      *) pytest_args+=("$1") ;;
    esac
    shift
  done
}

# vLLM, the overlay and the test tools in one environment, whose programs come first from here on.
prepare_environment() {
  local bin
  ./install.sh || exit 1
  bin=${VIRTUAL_ENV:-${CONDA_PREFIX:-$root/.venv}}/bin # as install.sh chooses it
  "$bin/python" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt || exit 1
  export PATH="$bin:$PATH"
}

# step NAME COMMAND...: runs one check and remembers how it ended.
step() {
  local name=$1 start=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  if "$@"; then
    passed+=("$name ($((SECONDS - start)) s)")
  else
    failed+=("$name ($((SECONDS - start)) s)")
  fi
}

# bats runs one test at a time and mypy on one core, so it runs beside the rest.
start_bats() {
  bats_output=$(mktemp)
  bats tests >"$bats_output" 2>&1 &
  bats_process=$!
  trap 'kill "$bats_process" 2>/dev/null; rm -f "$bats_output"' EXIT
}
finish_bats() {
  local status=0
  wait "$bats_process" || status=$?
  cat "$bats_output"
  trap - EXIT
  rm "$bats_output"
  return "$status"
}

files_named() { # files_named PATTERN: in this checkout, without what was cloned or installed into it
  find . \( -name .git -o -name .venv -o -name node_modules -o -path ./source \) -prune -o -name "$1" -print
}

run_shellcheck() {
  local scripts tests
  mapfile -t scripts < <(files_named '*.sh')
  mapfile -t tests < <(files_named '*.bats')
  shellcheck "${scripts[@]}" .ci/run \
    && shellcheck --severity=warning "${tests[@]}" # below it, findings about variables in bats' own subshells
}

run_chosen() {
  local selection=()
  ((quick)) && selection=(-m 'not engine')
  python -m pytest "${selection[@]}" "${pytest_args[@]}"
}

# One worker more than cores: engines wait for processes that they start. A file's tests share engines, so one worker runs them all;
# files start in the order of their names, of which the longest, test_compiled.py, is the fourth.
run_pytest() {
  local which='not gpu' workers=$(($(nproc) + 1))
  ((quick)) && which='not gpu and not engine'
  python -m pytest -m "$which" -n "$((workers < 8 ? workers : 8))" --dist loadfile --no-loadscope-reorder
}
run_gpu_tests() { python -m pytest tests/test_gpu_*.py; }

summary() {
  local line
  printf '\n== Summary\n'
  for line in "${passed[@]}"; do printf '  passed  %s\n' "$line"; done
  for line in "${failed[@]}"; do printf '  FAILED  %s\n' "$line"; done
  printf 'checks: %d passed, %d failed\n' "${#passed[@]}" "${#failed[@]}"
  ((${#failed[@]} == 0))
}

main() {
  parse_arguments "$@"
  cd "$root" || exit 1
  prepare_environment
  if ((${#pytest_args[@]} == 0)); then
    ((quick)) || start_bats
    step ruff ruff check .
    step mypy mypy .
    step shellcheck run_shellcheck
    step pytest run_pytest
    ((quick)) || step 'bats, beside the above' finish_bats
    step 'pytest, GPU' run_gpu_tests
  else
    step pytest run_chosen
  fi
  summary
}

main "$@"
