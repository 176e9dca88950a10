#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the kernels under compute-sanitizer's four tools at once on a GPU. Exit code 0: no error.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: tests/sanitize.sh [PYTHON]

Runs every kernel variant under compute-sanitizer's memcheck, racecheck, synccheck and initcheck (small shapes) with PYTHON
(default: python3), and prints each tool's summary. Needs an NVIDIA GPU and compute-sanitizer (CUDA toolkit).
TEXT
}

watch() { # watch TOOL PYTHON SCRIPT REPORT
  local options=(--kernel-regex kns=rms_norm --kernel-regex kns=linear --kernel-regex kns=silu --kernel-regex kns=decode_attention)
  # cuda-bindings asks the driver for functions that it may lack; memcheck would count each answer as an error of ours
  [[ $1 == memcheck ]] && options+=(--report-api-errors no)
  local shapes=()
  [[ $1 == initcheck ]] && shapes=(small)
  compute-sanitizer --tool "$1" "${options[@]}" --error-exitcode 1 "$2" "$3" ${shapes[@]+"${shapes[@]}"} >"$4" 2>&1
}

main() {
  local here python=${1:-python3} reports tool tools=(memcheck racecheck synccheck initcheck) running=() failed=0 i
  case ${1:-} in -h | --help) usage && exit 0 ;; esac
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit." >&2 && exit 2; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # each tensor its own allocation: an access beside it is an error
  reports=$(mktemp -d)
  for tool in "${tools[@]}"; do
    watch "$tool" "$python" "$here/sanitize.py" "$reports/$tool" &
    running+=($!)
  done
  for i in "${!tools[@]}"; do
    wait "${running[i]}" || failed=1
    printf '%-10s ' "${tools[i]}"
    grep -E 'SUMMARY|calls' "$reports/${tools[i]}" | tr '\n' ' '
    echo
    grep -E '^========= [A-Z]' "$reports/${tools[i]}" | grep -v -E 'SUMMARY|COMPUTE-SANITIZER' | head -4
    grep -E 'Error:' "$reports/${tools[i]}" | head -2
  done
  rm -r "$reports"
  exit "$failed"
}

main "$@"
