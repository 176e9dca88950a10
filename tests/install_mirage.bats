#!/usr/bin/env bats
# SPDX-License-Identifier: Apache-2.0
# mirage_codegen/install_mirage.sh: its refusals, each one sentence. (What it builds is tested by tests/test_mugraph.py.)

setup() {
  installer=$BATS_TEST_DIRNAME/../mirage_codegen/install_mirage.sh
  python=$(python3 -c 'import sys; print(sys.executable)')
  tools=$BATS_TEST_TMPDIR/bin
  mkdir -p "$tools"
}

# A PATH with nothing in it but the named programs.
only() {
  local name
  for name in "$@"; do ln -s "$(command -v "$name")" "$tools/$name"; done
}

@test "--help says what it does and changes nothing" {
  run "$installer" --help
  [ "$status" -eq 0 ]
  [[ $output == usage:* ]]
}

@test "an unknown option is refused" {
  run "$installer" --mirage_dir x
  [ "$status" -eq 1 ]
  [ "$output" = "install_mirage.sh: Unknown option '--mirage_dir': run install_mirage.sh --help." ]
}

@test "without PYTHON it says so" {
  run "$installer"
  [ "$status" -eq 1 ]
  [ "$output" = "install_mirage.sh: PYTHON is missing: run install_mirage.sh --help." ]
}

@test "an interpreter that is not there is named" {
  run "$installer" /no/such/python
  [ "$status" -eq 1 ]
  [ "$output" = "install_mirage.sh: There is no interpreter at '/no/such/python'." ]
}

@test "a --mirage-dir that is no checkout is named" {
  run "$installer" "$python" --mirage-dir "$BATS_TEST_TMPDIR"
  [ "$status" -eq 1 ]
  [ "$output" = "install_mirage.sh: --mirage-dir needs the path of a mirage checkout, got '$BATS_TEST_TMPDIR'." ]
}

@test "without g++ it says how to get it" {
  only bash dirname
  run env PATH="$tools" bash "$installer" "$python"
  [ "$status" -eq 1 ]
  [ "$output" = "install_mirage.sh: g++ was not found: install it (Debian and Ubuntu: apt-get install g++)." ]
}

@test "without the registry it says in one sentence what it could not download" {
  "$python" -m venv "$BATS_TEST_TMPDIR/env"
  run env PIP_NO_INDEX=1 PIP_FIND_LINKS="$BATS_TEST_TMPDIR" "$installer" "$BATS_TEST_TMPDIR/env/bin/python"
  [ "$status" -eq 1 ]
  [ "${lines[0]}" = "Installing z3-solver==5.4.1.0 ..." ]
  [ "${#lines[@]}" -eq 2 ]
  [[ ${lines[1]} == "install_mirage.sh: Could not download z3-solver==5.4.1.0 from the registry ("* ]]
  [[ ${lines[1]} == *"; the whole log is "* ]]
}
