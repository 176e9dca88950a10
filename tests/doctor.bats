#!/usr/bin/env bats
# SPDX-License-Identifier: Apache-2.0
# `./install.sh --doctor` against stand-ins; what its checks say is tested in test_doctor.py.
# shellcheck disable=SC2030,SC2031  # bats runs tests in subshells

load fixtures/install

setup() {
  prepare_stand_ins
  cp "$ROOT/patches/doctor.py" "$CHECKOUT/patches/"
  export XDG_CACHE_HOME="$BASE/cache" TMPDIR="$BASE/tmp"
  mkdir "$BASE/cache" "$BASE/tmp"
}

everything() { find "$BASE" -printf '%p %y %m %s %T@ %i\n' | sort; }

@test "--doctor changes nothing, and its exit status is 1 where something fails" {
  make_environment
  installer
  [[ $status -eq 0 ]]
  before="$(everything | grep -v "$BASE/tmp ")" # install.sh's own log comes and goes there
  installer --doctor
  [[ $status -eq 1 ]]
  grep -q '^FAIL  torch ' <<<"$output"
  grep -q '^ok    vLLM      0.33.0 in ' <<<"$output"
  grep -q '^ok    overlay   1.0, 4 files as installed$' <<<"$output"
  [[ "$output" != *Traceback* ]]
  [[ "$before" == "$(everything | grep -v "$BASE/tmp ")" ]]
}

@test "--doctor says where there is no vLLM" {
  make_environment
  rm -rf "$VLLM" "$SITE"/vllm-*.dist-info
  installer --doctor
  [[ $status -eq 1 ]]
  grep -q '^FAIL  vLLM      no vLLM is installed for .*; run ./install.sh' <<<"$output"
}
