# SPDX-License-Identifier: Apache-2.0
"""The documents hold what was measured, both READMEs say the same, and every command and link in them is one that exists."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import benchmark_mirage
import mirage_codegen.__main__ as mirage_codegen_cli
import test_mirage_qwen3 as functional_test
from docs import tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
GUIDES = ("README.md", "QUICK_START.md", "BENCHMARK_GUIDE.md")
LINKED = (*GUIDES, "README.zh-CN.md", "patches/README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)  # language, code


def test_the_readmes_table_is_the_measured_one() -> None:
    """README's decode steps come from docs/results by docs/tables.py; the Chinese table is held to README's below."""
    assert "\n".join(tables.step_table()) in read("README.md")


@pytest.mark.parametrize("made", [tables.context_table, tables.serve_table, tables.kernel_table, tables.bench_table])
def test_the_guides_tables_are_the_measured_ones(made) -> None:
    assert "\n".join(made()) in read("BENCHMARK_GUIDE.md")


def test_a_kernels_share_of_a_bare_read_is_said_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*which: str, read=tables.rows) -> dict[int, dict]:
        found = read(*which)
        for batch, line in found.items():
            line["bare_read"] = line["mirage"]["median"] / 2 if batch == 1 else None
        return found

    monkeypatch.setattr(tables, "rows", rows)
    assert "| share of a bare read | 50% | – | – | – | – | – | – | – |" in tables.kernel_table()


def test_what_the_readme_says_of_prefill_is_what_was_measured() -> None:
    sentences = {"wall clock": "runs at {} of stock's speed", "kernels": "by wall clock, and at {} by the sum of its kernels"}
    slower = []
    for measure, sentence in sentences.items():
        said = []
        for model in tables.MODELS:
            report = json.loads((RESULTS / f"step-{model}.json").read_text())
            [line] = [line for line in report["rows"] if re.fullmatch(f"prefill .* {measure}", line["metric"])]
            said.append(f"{line['speedup']['ratio']:.3f}")
            slower += [f"{model}'s {measure}"] if line["speedup"]["verdict"] == "slower" else []
        assert sentence.format(f"{', '.join(said[:-1])} and {said[-1]}") in " ".join(read("README.md").split())
    which = f"{' and '.join(slower)} lie below 1 beyond the scatter of their run, others not"
    assert f"({which if slower else 'none lies below 1 beyond the scatter of its run'})" in " ".join(read("README.md").split())


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def prose(document: str) -> str:
    """The document without its fenced code."""
    return FENCE.sub("", read(document))


def heading_levels(document: str) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", prose(document), re.M)]


def table_numbers(document: str) -> list[list[str]]:
    """For each table row the numbers in it, sorted: the order of words differs between languages."""
    rows = [line for line in prose(document).splitlines() if line.startswith("|")]
    return [sorted(re.findall(r"\d+(?:\.\d+)*", row)) for row in rows]


def test_the_chinese_readme_has_the_same_headings_code_and_numbers() -> None:
    ours, theirs = "README.md", "README.zh-CN.md"
    assert heading_levels(ours) == heading_levels(theirs)
    assert FENCE.findall(read(ours)) == FENCE.findall(read(theirs))
    assert table_numbers(ours) == table_numbers(theirs)


def test_the_two_readmes_link_to_each_other_in_their_first_lines() -> None:
    assert "(README.zh-CN.md)" in read("README.md")[:100]
    assert "(README.md)" in read("README.zh-CN.md")[:100]


def bash_blocks(document: str) -> list[str]:
    return [code for language, code in FENCE.findall(read(document)) if language == "bash"]


def commands_of(block: str) -> list[list[str]]:
    """The block's commands as words, without comments; an open quote or a backslash continues a command on the next line."""
    commands: list[list[str]] = []
    pending = ""
    for line in block.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote is still open
            pending += "\n"
            continue
        if words:
            commands.append(words)
        pending = ""
    assert not pending, f"unfinished command: {pending}"
    return commands


def documented_commands(document: str) -> list[list[str]]:
    """Commands of the bash blocks and those between backticks, without variable assignments before them."""
    inline = re.findall(r"`((?:\./install\.sh|tests/run\.sh|python (?:-m mirage_codegen|\w+\.py)) ?[^`]*)`", prose(document))
    commands = [words for block in (*bash_blocks(document), *inline) for words in commands_of(block)]
    for words in commands:
        while re.match(r"[A-Z_]+=", words[0]):
            del words[0]
    return commands


def options_in_help(script: str) -> set[str]:
    done = subprocess.run(["bash", str(ROOT / script), "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", done.stdout))


def check_command(words: list[str]) -> None:
    """Fails unless our own program knows every option of this command; commands of others pass."""
    match words:
        case ["./install.sh" | "tests/run.sh", *arguments]:
            unknown = {word for word in arguments if word.startswith("-")} - options_in_help(words[0])
            assert not unknown, f"{words[0]} has no {unknown}"
        case ["python", "test_mirage_qwen3.py", *arguments]:
            functional_test.parse_arguments(arguments)
        case ["python", "benchmark_mirage.py", *arguments]:
            benchmark_mirage.parse(arguments)
        case ["python", "-m", "mirage_codegen", *arguments]:
            mirage_codegen_cli.parser().parse_args(arguments)


def files_of_the_repository(words: list[str]) -> list[str]:
    """The files and folders of this repository that a command names."""
    if words[0] in ("cp", "mv"):  # inside vLLM's folder
        return [word.removeprefix("REPOSITORY/") for word in words if word.startswith("REPOSITORY/")]
    return [word for word in words if re.fullmatch(r"(?:\./)?\w[\w/.-]*\.(?:py|sh|txt)", word)]


@pytest.mark.parametrize("document", GUIDES)
def test_every_bash_block_is_bash(document: str) -> None:
    for block in bash_blocks(document):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), block


@pytest.mark.parametrize("document", GUIDES)
def test_every_command_is_one_that_our_programs_know(document: str) -> None:
    commands = documented_commands(document)
    ours = [words for words in commands if words[0] in ("./install.sh", "tests/run.sh", "python")]
    assert len(ours) >= 2, "the commands were not found"
    for words in commands:
        try:
            check_command(words)
        except (SystemExit, functional_test.BadInput, benchmark_mirage.UsageError) as error:
            pytest.fail(f"{shlex.join(words)}: {error}")
        for name in files_of_the_repository(words):
            assert (ROOT / name).exists(), f"{shlex.join(words)}: there is no {name}"


@pytest.mark.parametrize("document", LINKED)
def test_every_relative_link_leads_somewhere(document: str) -> None:
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)) if "://" not in target]
    missing = [target for target in targets if target and not ((ROOT / document).parent / target).exists()]
    assert not missing
