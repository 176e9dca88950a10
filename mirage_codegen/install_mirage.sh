#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Install mirage-project for the kernel generator, with or without a GPU, nvcc, cmake or any CUDA version.
#
# The source is the registry's, unmodified. Its setup.py runs cmake and make, which want the CUDA toolkit for kernels
# that only superoptimize() launches. So for the time of the build both names lead to shims: `cmake` does nothing, and
# `make` compiles Mirage's host code (graphs, checks, transpiler) with g++ against the stand-ins in without_cuda/.

set -euo pipefail

readonly MIRAGE_VERSION=0.2.2
# libz3's file name carries its version: Mirage must run with the z3-solver that it was built with.
readonly Z3_VERSION=5.4.1.0
readonly CYTHON_VERSION=3.3.1
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly HERE

usage() {
  cat <<EOT
usage: install_mirage.sh PYTHON [--mirage-dir PATH]

Installs mirage-project $MIRAGE_VERSION for PYTHON (a virtual environment's interpreter) from the registry.

  --mirage-dir PATH   install the checkout at PATH instead, again each time. A checkout of $MIRAGE_VERSION is built
                      without CUDA like the registry's; any other version by its own build, which needs CUDA.

MIRAGE_BUILD_JOBS     compilers at a time (default: one a core)
EOT
}

main() {
  parse_arguments "$@"
  check_tools
  if [[ -z $MIRAGE_DIR ]] && is_installed; then
    say "mirage-project $MIRAGE_VERSION is already installed for $PYTHON."
    return
  fi
  WORK=$(mktemp -d)
  trap 'rm -rf "$WORK"' EXIT
  LOG=$WORK/install.log
  ensure_pip
  install_requirements
  if [[ -n $MIRAGE_DIR && $(checkout_version) != "$MIRAGE_VERSION" ]]; then
    build_with_cuda
  else
    build_without_cuda
  fi
  is_usable || fail "mirage-project was installed for $PYTHON, but it cannot build a graph: $(last_line "$LOG")"
  say "mirage-project $(installed_version) is installed for $PYTHON."
}

parse_arguments() {
  PYTHON='' MIRAGE_DIR=''
  while (($#)); do
    case $1 in
      -h | --help) usage && exit ;;
      --mirage-dir)
        [[ $# -ge 2 && -f $2/setup.py ]] || fail "--mirage-dir needs the path of a mirage checkout, got '${2:-}'."
        MIRAGE_DIR=$(cd "$2" && pwd)
        shift
        ;;
      -*) fail "Unknown option '$1': run install_mirage.sh --help." ;;
      *)
        [[ -z $PYTHON ]] || fail "Expected one PYTHON, got '$PYTHON' and '$1'."
        PYTHON=$1
        ;;
    esac
    shift
  done
  [[ -n $PYTHON ]] || fail "PYTHON is missing: run install_mirage.sh --help."
}

check_tools() {
  command -v "$PYTHON" >/dev/null || fail "There is no interpreter at '$PYTHON'."
  PYTHON=$(command -v "$PYTHON")
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$PYTHON is older than Python 3.10."
  command -v g++ >/dev/null || fail "g++ was not found: install it (Debian and Ubuntu: apt-get install g++)."
  has_pip || command -v uv >/dev/null || fail "$PYTHON has no pip and there is no uv: install one of them."
}

has_pip() { "$PYTHON" -m pip --version >/dev/null 2>&1; }

# uv makes environments without pip, and its own builds put the environment's cmake before our shim: there pip itself
# comes by uv, into a folder of ours.
ensure_pip() {
  has_pip && return
  uv pip install --python "$PYTHON" --target "$WORK/pip" pip >>"$LOG" 2>&1 ||
    fail_with_log "Could not download pip from the registry"
  export PYTHONPATH=$WORK/pip
}

pip_install() {
  "$PYTHON" -m pip install --disable-pip-version-check --no-cache-dir --no-deps "$@" >>"$LOG" 2>&1
}

installed_version() { version_of mirage-project; }

version_of() {
  "$PYTHON" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2>/dev/null
}

is_installed() {
  [[ $(installed_version) == "$MIRAGE_VERSION" ]] || return 1
  LOG=/dev/null is_usable
}

# Can it build and transpile a graph? (An import alone does not touch libz3 or the transpiler.)
is_usable() {
  MIRAGE_PYTHON=$PYTHON PYTHONPATH=$HERE/.. "$PYTHON" -c '
from mirage_codegen.ops import CANONICAL, OPS
OPS["linear"](CANONICAL["linear"]).export()' >>"$LOG" 2>&1
}

checkout_version() {
  { cat "$MIRAGE_DIR"/python/mirage/{version,__init__}.py "$MIRAGE_DIR"/setup.py 2>/dev/null || true; } |
    sed -nE 's/.*\<(__)?version(__)? *= *"([0-9.]+)".*/\3/p' | head -1
}

# What Mirage needs to run and what its metadata asks for, each only where it is missing and without dependencies:
# nothing that the environment has is moved.
install_requirements() {
  local requirement
  for requirement in "z3-solver==$Z3_VERSION" graphviz 'numpy<2.4' "cython==$CYTHON_VERSION" 'cmake>=3.24,<4'; do
    [[ -n $(version_of "${requirement%%[=<>]*}") ]] && continue
    say "Installing $requirement ..."
    pip_install "$requirement" || fail_with_log "Could not download $requirement from the registry"
  done
}

build_without_cuda() {
  # Older setuptools leave setup.py's own folder empty; the environment's own must stay (torch 2.11 wants < 82).
  pip_install --target "$WORK/tools" 'setuptools>=80,<82' wheel packaging "cython==$CYTHON_VERSION" ||
    fail_with_log "Could not download setuptools and wheel from the registry"
  make_shims
  local source=mirage-project==$MIRAGE_VERSION
  if [[ -n $MIRAGE_DIR ]]; then
    source=$WORK/checkout # a copy, because setup.py builds inside its own folder
    cp -r "$MIRAGE_DIR" "$source"
  fi
  say "Building mirage-project $MIRAGE_VERSION (about 2 minutes on 2 cores) ..."
  PATH=$WORK/bin:$PATH PYTHONPATH=$WORK/tools:${PYTHONPATH:-} CFLAGS="-O0 -w -I$WORK/include" LIBRARY_PATH=$WORK/lib \
    LDFLAGS="-L$WORK/lib -Wl,--as-needed" \
    pip_install --no-build-isolation --no-binary mirage-project "$source" ||
    fail_with_log "Could not download or build mirage-project $MIRAGE_VERSION"
}

# bin/cmake and bin/make in the place of the real ones, and an empty library for each name that setup.py links.
make_shims() {
  local name z3_include
  z3_include=$("$PYTHON" -c 'import os, z3; print(os.path.join(os.path.dirname(z3.__file__), "include"))')
  mkdir -p "$WORK/bin" "$WORK/lib"
  cp -r "$HERE/without_cuda/include" "$WORK/include"
  for name in cudadevrt cudart_static cudart cudnn cublas cuda; do
    echo | g++ -shared -fPIC -x c++ - -o "$WORK/lib/lib$name.so"
  done
  printf '#!/bin/sh\nexit 0\n' >"$WORK/bin/cmake"
  cat >"$WORK/bin/make" <<EOT
#!/usr/bin/env bash
# setup.py calls this in the source's build folder, twice: pip asks it for the metadata first.
# src/layout.cc is an old copy of src/base/layout.cc.
set -euo pipefail
cd ..
cp "$HERE/without_cuda/kernels.cc" build/kernels.cc
{ find src -name '*.cc' ! -path src/layout.cc && echo build/kernels.cc; } |
  xargs -P "${MIRAGE_BUILD_JOBS:-$(nproc)}" -I{} sh -c '
    object=build/\$(echo {} | tr / _).o
    [ -e "\$object" ] || nice g++ -std=c++17 -O0 -fPIC -w -I"$WORK/include" -Iinclude -Ideps/json/include \
      -Ideps/cutlass/include -I"$z3_include" -c {} -o "\$object"'
rm -f build/libmirage_runtime.a
ar rcs build/libmirage_runtime.a build/*.o
EOT
  chmod +x "$WORK/bin/cmake" "$WORK/bin/make"
}

build_with_cuda() {
  say "Building the checkout $MIRAGE_DIR (version $(checkout_version)) with its own build ..."
  pip_install "$MIRAGE_DIR" || fail_with_log "The checkout $MIRAGE_DIR does not build"
}

last_line() { grep -v '^[[:space:]]*$' "$1" | tail -1; }

say() { echo "$@"; }

fail() {
  echo "install_mirage.sh: $*" >&2
  exit 1
}

# The first error in the log says most; the whole log is kept.
fail_with_log() {
  local kept reason
  kept=$(mktemp --suffix=.install_mirage.log)
  cp "$LOG" "$kept"
  reason=$(grep -E 'error:|ERROR:|CMake Error' "$kept" | grep -vm1 'subprocess-exited' | sed 's/^ *//; s/[.:]*$//' || true)
  fail "$1 (${reason:-see the log}); the whole log is $kept."
}

main "$@"; exit # on one line: bash reads no further, even if this file changes while it runs
