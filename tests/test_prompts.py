# SPDX-License-Identifier: Apache-2.0
"""test_prompts.txt: the benchmark's prompts are many, distinct and of every kind that they promise."""

import re
import unicodedata
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "test_prompts.txt"
PROMPTS = FILE.read_text(encoding="utf-8").split("\n")[:-1]  # the file ends with a newline


def test_there_are_at_least_120_prompts_one_on_each_line() -> None:
    assert len(PROMPTS) >= 120
    assert FILE.read_bytes().endswith(b"\n")
    assert not {"\r", "\u2028", "\u2029", "\x85"} & set("".join(PROMPTS)), "a line break inside a prompt"


def test_no_prompt_is_blank_or_padded() -> None:
    assert [p for p in PROMPTS if not p or p != p.strip()] == []


def test_no_prompt_occurs_twice() -> None:
    folded = [" ".join(unicodedata.normalize("NFKC", p).casefold().split()) for p in PROMPTS]
    assert len(set(folded)) == len(folded)


def test_short_medium_and_long_prompts_are_there() -> None:
    lengths = sorted(len(p) for p in PROMPTS)
    assert lengths[0] <= 10
    assert sum(60 <= n <= 400 for n in lengths) >= 40
    pieces = re.findall(r"[A-Za-z]+|\d|[^\w\s]", max(PROMPTS, key=len))  # words, digits, marks: close to tokens
    assert 1600 <= len(pieces) <= 2400


@pytest.mark.parametrize(
    ("kind", "pattern", "least"),
    [
        ("English", r"^[\x20-\x7e]+$", 40),
        ("Chinese", r"[\u4e00-\u9fff]{4}", 15),
        ("Japanese or Korean", r"[\u3040-\u30ff\uac00-\ud7a3]", 2),
        ("right-to-left", r"[\u0590-\u06ff]", 5),
        ("Cyrillic, Greek, Devanagari or Thai", r"[\u0370-\u04ff\u0900-\u097f\u0e00-\u0e7f]", 3),
        ("emoji and other planes", r"[\U00010000-\U0010ffff]", 3),
        ("code", r"\bdef |#include|SELECT |=> |\blet |CUDA|Python|pytest|for \(", 10),
        ("maths", r"[∫√²³π×]|derivative|eigen|prove|dice|heap", 8),
        ("table", r"\| .* \||\+---|,.*,.*\d+,.*\d{4}-|Markdown table|杯", 5),
        ("dialogue", r"(User|Assistant|Agent|Alice|Doctor|Teacher|客服)[:：]", 5),
    ],
)
def test_every_promised_kind_is_there(kind: str, pattern: str, least: int) -> None:
    found = [p for p in PROMPTS if re.search(pattern, p)]
    assert len(found) >= least, f"{len(found)} prompts with {kind}, expected at least {least}"
