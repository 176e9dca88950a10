#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the kernels under compute-sanitizer's four tools on a GPU (about a minute). Exit code 0: no error.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: tests/sanitize.sh [PYTHON]

Runs every kernel variant under compute-sanitizer's memcheck, racecheck, synccheck and initcheck with PYTHON
(default: python3), and prints each tool's summary. Needs an NVIDIA GPU and compute-sanitizer (CUDA toolkit).
TEXT
}

main() {
  local here python=${1:-python3} tool failed=0 api
  local kernels=(--kernel-regex kns=rms_norm --kernel-regex kns=linear --kernel-regex kns=silu --kernel-regex kns=decode_attention)
  case ${1:-} in -h | --help) usage && exit 0 ;; esac
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit." >&2 && exit 2; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # each tensor its own allocation: an access beside it is an error
  for tool in memcheck racecheck synccheck initcheck; do
    printf '%-10s ' "$tool"
    api=()
    # cuda-bindings asks the driver for functions that it may lack; memcheck would count each answer as an error of ours
    [[ $tool == memcheck ]] && api=(--report-api-errors no)
    compute-sanitizer --tool "$tool" ${api[@]+"${api[@]}"} "${kernels[@]}" --error-exitcode 1 "$python" "$here/sanitize.py" >"/tmp/sanitize.$$" 2>&1 || failed=1
    grep -E 'SUMMARY|calls' "/tmp/sanitize.$$" | tr '\n' ' '
    echo
    grep -E '^========= [A-Z]' "/tmp/sanitize.$$" | grep -v -E 'SUMMARY|COMPUTE-SANITIZER' | head -4
    grep -E 'Error:' "/tmp/sanitize.$$" | head -2
    rm -f "/tmp/sanitize.$$"
  done
  exit "$failed"
}

main "$@"
