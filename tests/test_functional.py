# SPDX-License-Identifier: Apache-2.0
"""test_mirage_qwen3.py itself: it passes on the overlay, and it fails when the overlay computes something else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import run_engines
from sabotage_worker import SABOTAGES
from safetensors.torch import load_file
from tokenizers import Tokenizer

import test_mirage_qwen3 as script

SCRIPT = Path(script.__file__)
SABOTAGE_WORKER = Path(__file__).parent / "sabotage_worker.py"
OPS_FILE = "model_executor/layers/fused_mirage_ops.py"


def run_script(*arguments, pythonpath):
    environment = {**os.environ, "PYTHONPATH": str(pythonpath), "VLLM_CACHE_ROOT": f"{pythonpath}/cache"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# --------------------------------------------------------------------------- the real engine
@pytest.mark.engine
def test_the_overlay_passes_on_the_tiny_model(vllm_overlay, monkeypatch):
    monkeypatch.delenv("VLLM_USE_MIRAGE", raising=False)
    monkeypatch.delenv("VLLM_MIRAGE_OPS", raising=False)
    done = run_script("--model", "tiny", "--max-tokens", "16", pythonpath=vllm_overlay)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "112 of 112 tokens" in done.stdout  # 7 prompts (the first one twice), float32: none differs
    for op in ("norm_qkv", "attention", "o_proj", "norm_gate_up", "down_proj"):
        assert f"model.layers.0 to 2: fused path, op {op}" in done.stdout
    assert done.stdout.splitlines()[-1] == "PASS: the overlay's answers equal stock vLLM's."


@pytest.fixture(scope="module")
def arms(vllm_overlay, tmp_path_factory):
    """What the stock path, wrong overlays, one without ops and the right one answer: in one process, where the script has one for each."""
    spec = script.engine_spec(script.parse_arguments(["--model", "tiny", "--max-tokens", "16"]), script.count_gpus())
    on = {"spec": spec, "env": {"VLLM_USE_MIRAGE": "1"}}
    cases = [{"name": "stock", "spec": spec, "env": {"VLLM_USE_MIRAGE": "0"}}]
    cases += [{"name": name, "sabotage": name, **on} for name in SABOTAGES]
    cases += [{"name": "no ops", "spec": spec, "env": {"VLLM_USE_MIRAGE": "1", "VLLM_MIRAGE_OPS": "none"}}, {"name": "right", **on}]
    results = run_engines(tmp_path_factory.mktemp("arms") / "all", vllm_overlay, cases, worker=SABOTAGE_WORKER)
    assert not {name: arm["error"] for name, arm in results.items() if "error" in arm}
    return results


@pytest.mark.engine
@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_a_wrong_overlay_fails(sabotage, arms, capsys):
    overlay = arms[sabotage]
    assert not script.check_overlay_report(overlay["reports"])  # the path is right: the answers give it away
    assert script.report(arms["stock"], overlay, verbose=False, random_weights=True) == 1
    assert "FAIL: the answers differ." in capsys.readouterr().out


@pytest.mark.engine
def test_the_right_overlay_passes_after_the_wrong_ones(arms, capsys):
    """So what they fail of is not left behind in their process."""
    assert script.report(arms["stock"], arms["right"], verbose=False, random_weights=True) == 0
    assert "PASS" in capsys.readouterr().out


@pytest.mark.engine
def test_an_overlay_that_stays_on_the_stock_path_fails(arms, capsys):
    assert script.report(arms["stock"], arms["no ops"], verbose=False, random_weights=True) == 1
    output = capsys.readouterr().out
    assert "3 of 3 layers took the stock path" in output and "VLLM_MIRAGE_OPS" in output
    assert "FAIL: the path is not the one asked for." in output


# --------------------------------------------------------------------------- the comparison
def arm(*tokens, logprobs=None):
    """One completion; at each position the chosen token has -0.1, token 99 has -4, unless `logprobs` says otherwise."""
    top = [{str(token): -0.1, "99": -4.0} for token in tokens]
    for position, values in (logprobs or {}).items():
        top[position] = {str(token): value for token, value in values.items()}
    return {"prompt": "p", "text": "t", "token_ids": list(tokens), "top": top}


def compare(left, right, tolerance=0.1):
    result = script.Comparison()
    script.compare_completions([left], [right], tolerance, result)
    return result


def test_equal_answers_have_no_failure():
    result = compare(arm(1, 2, 3), arm(1, 2, 3))
    assert not result.failures and not result.notes
    assert (result.tokens, result.of_tokens, result.logprobs, result.largest) == (3, 3, 6, 0.0)


def test_a_difference_inside_the_rounding_is_noted_and_ends_the_comparison():
    left = arm(1, 2, 3, logprobs={1: {2: -0.70, 5: -0.75}, 2: {3: -0.1}})
    right = arm(1, 5, 4, logprobs={1: {2: -0.78, 5: -0.68}, 2: {3: -9.0, 4: -0.1}})
    result = compare(left, right)
    assert not result.failures and result.tokens == 2
    assert "position 1 stock chose token 2, the overlay token 5" in result.notes[0]
    assert "0.05 in stock and 0.1 in the overlay" in result.notes[0]


def test_a_difference_with_a_larger_margin_fails():
    left = arm(1, logprobs={0: {1: -0.3, 5: -0.45}})
    right = arm(5, logprobs={0: {1: -0.48, 5: -0.37}})  # 0.15 + 0.11 > 2 x 0.1
    assert "more than the rounding" in compare(left, right).failures[-1]


def test_a_choice_outside_the_other_arms_top_tokens_fails():
    assert "not among" in compare(arm(1), arm(5)).failures[-1]


def test_a_moved_log_probability_fails_although_the_tokens_agree():
    result = compare(arm(1, 2), arm(1, 2, logprobs={1: {2: -0.25, 99: -4.0}}))
    assert "at position 1 moved by 0.15, more than 0.1" in result.failures[0]


def test_a_token_in_the_tail_does_not_count():
    left, right = (arm(1, logprobs={0: {1: -0.1, 7: value}}) for value in (-8.0, -9.0))
    assert not compare(left, right).failures


@pytest.mark.parametrize("broken", ["stock", "overlay"])
def test_nan_fails(broken):
    nan, good = arm(1, logprobs={0: {1: float("nan")}}), arm(1)
    left, right = (nan, good) if broken == "stock" else (good, nan)
    assert "moved by inf" in compare(left, right).failures[0]


def test_a_completion_that_ends_early_fails():
    assert "stock ended after 3 tokens, the overlay after 2" in compare(arm(1, 2, 3), arm(1, 2)).failures[0]


def test_answers_of_one_repeated_token_prove_nothing():
    same = {"rounds": [[arm(1, 1, 1)]]}
    assert "prove nothing" in script.compare_arms(same, same, 0.1).failures[0]


# --------------------------------------------------------------------------- the report
def layer(index, path="fused", kernel=None, reason=None, op="norm_qkv"):
    return {"name": f"model.layers.{index}", "op": op, "path": path, "kernel": kernel, "reason": reason}


def path_report(layers, kernel_calls=0, torch_calls=0):
    return {"layers": layers, "calls": {"norm_qkv.kernel": kernel_calls, "norm_qkv.torch": torch_calls}}


def test_like_layers_of_an_op_share_a_line():
    layers = [layer(0, kernel="k"), layer(1, kernel="k"), layer(2, "stock", reason="bias"), layer(3, kernel="k")]
    mixed = [entry for i, first in enumerate(layers) for entry in (first, layer(i, reason="on the CPU", op="o_proj"))]
    assert list(script.layer_lines(path_report(mixed), verbose=False)) == [
        "model.layers.0 to 1: fused path, op norm_qkv, kernel k",
        "model.layers.2: stock path, op norm_qkv (bias)",
        "model.layers.3: fused path, op norm_qkv, kernel k",
        "model.layers.0 to 3: fused path, op o_proj, computed by PyTorch (on the CPU)",
    ]
    assert len(list(script.layer_lines(path_report(mixed), verbose=True))) == 8


@pytest.mark.parametrize(
    ("report", "failure"),
    [
        (path_report([]), "No decoder layer"),
        (path_report([layer(0)]), "The op norm_qkv is fused on rank 0 but was never"),
        (path_report([layer(0), layer(1, "stock", reason="bias")], torch_calls=4), "1 of 2 layers took the stock path on rank 0: bias."),
        (path_report([layer(0, kernel="k")], torch_calls=4), "The kernel of norm_qkv was made on rank 0 but never"),
        (path_report([layer(0), layer(0, op="o_proj")], torch_calls=4), "The op o_proj is fused on rank 0 but was never"),
    ],
)
def test_an_overlay_report_that_proves_no_fused_path_fails(report, failure):
    [sentence] = script.check_overlay_report([report])
    assert sentence.startswith(failure)


def test_an_op_without_a_kernel_may_be_stock_in_a_fused_layer():
    layers = [layer(0, kernel="k"), layer(0, "stock", reason="no kernel", op="o_proj")]
    assert not script.check_overlay_report([path_report(layers, kernel_calls=4)])


def test_a_stock_arm_that_was_not_stock_fails():
    assert script.check_stock_report([path_report([layer(0)])])
    assert script.check_stock_report([path_report([layer(0, "stock", reason="0")], torch_calls=1)])
    assert not script.check_stock_report([path_report([layer(0, "stock", reason="0")])])


# --------------------------------------------------------------------------- bad input
@pytest.fixture
def with_overlay(monkeypatch):
    monkeypatch.setattr(script, "check_overlay_installed", lambda: None)


def one_sentence(capsys):
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and output.rstrip().endswith("."), output
    return output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "./no/such/folder"], "There is no model folder ./no/such/folder"),
        (["--model", "no-such-model"], "There is no model folder no-such-model"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--max-tokens", "0"], "'0' is not a whole number of at least 1"),
        (["--max-model-len", "many"], "'many' is not a whole number of at least 2"),
        (["--gpu-memory-utilization", "85"], "'85' is not a fraction"),
        (["--prompts", "no-such-file.txt"], "The prompts in no-such-file.txt cannot be read"),
        (["--no-such-option"], "nrecognized arguments: --no-such-option"),
    ],
)
def test_bad_arguments_end_with_2_and_one_sentence(arguments, says, with_overlay, capsys):
    assert script.main(arguments) == 2
    assert says in one_sentence(capsys)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "holds no config.json"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps({"architectures": ["LlamaForCausalLM"]}), "is LlamaForCausalLM, but the overlay is for Qwen3"),
    ],
)
def test_a_folder_that_is_no_qwen3_ends_with_2(config, says, with_overlay, tmp_path, capsys):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert script.main(["--model", str(tmp_path)]) == 2
    assert says in one_sentence(capsys)


def test_another_value_of_the_switch_ends_with_2(with_overlay, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_USE_MIRAGE", "2")
    assert script.main(["--model", "tiny"]) == 2
    assert "0, 1 or strict was expected" in one_sentence(capsys)


def test_an_empty_prompt_file_ends_with_2(with_overlay, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n  \n")
    assert script.main(["--model", "tiny", "--prompts", str(tmp_path / "prompts.txt")]) == 2
    assert "holds no prompt" in one_sentence(capsys)


def fake_vllm(site, init="", files=()):
    package = site / "vllm"
    for name in ("__init__.py", *files):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(init if name == "__init__.py" else "")
    return site


def test_a_vllm_without_the_overlay_ends_with_2(tmp_path):
    done = run_script("--model", "tiny", pythonpath=fake_vllm(tmp_path))
    assert done.returncode == 2
    assert done.stdout.startswith("The overlay is not installed") and done.stdout.endswith("run ./install.sh.\n")


def test_an_engine_that_does_not_start_ends_with_1_and_its_error(tmp_path):
    files = (OPS_FILE, "model_executor/models/qwen3_stock.py")
    site = fake_vllm(tmp_path, init="raise RuntimeError('no engine today')", files=files)
    done = run_script("--model", "tiny", pythonpath=site)
    assert done.returncode == 1
    assert "stopped with exit code 1: RuntimeError: no engine today" in done.stdout
    assert done.stdout.splitlines()[-1] == "FAIL: an engine did not answer."


@pytest.mark.parametrize(("prefix", "says"), [("/a b/.venv", "a path with a space (/a b/.venv): make"), ("/a/.venv", "C++ compile error")])
def test_a_compiler_that_a_space_stops_is_told_with_the_mend(prefix, says, tmp_path, monkeypatch):
    (tmp_path / "log").write_text("[rank0]: torch._inductor.exc.InductorError: CppCompileError: C++ compile error\n")
    monkeypatch.setattr(sys, "prefix", prefix)
    assert says in str(script.ArmFailed("0", 1, tmp_path / "log"))


# --------------------------------------------------------------------------- the tiny models
def test_tiny_weights_follow_the_seed_and_no_norm_is_one(tmp_path):
    models = [load_file(script.make_tiny_qwen3(tmp_path / str(i), seed=seed) / "model.safetensors") for i, seed in
              enumerate((0, 0, 1))]  # fmt: skip
    first, again, other = models
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    norms = [tensor for name, tensor in first.items() if "norm" in name]
    assert len(norms) == 3 * 4 + 1
    assert all((norm.float() - 1).abs().mean() > 0.1 for norm in norms)


@pytest.mark.parametrize(("size", "dtype"), [("tiny", "bfloat16"), ("tiny", "float32")])
def test_tiny_checkpoint_is_complete(size, dtype, tmp_path):
    folder = script.make_tiny_qwen3(tmp_path, size, dtype)
    shapes = script.TINY_SIZES[size]
    weights = load_file(folder / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{dtype}"}
    assert weights["model.layers.0.self_attn.q_proj.weight"].shape == (shapes.heads * shapes.head_dim, shapes.hidden)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == script.TINY_VOCAB == weights["lm_head.weight"].shape[0]
    text = "Zażółć gęślą jaźń: 1, 2, 3 ✓"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tiny_0_6b_has_the_shapes_of_qwen3_0_6b():
    shapes = script.TINY_SIZES["tiny-0.6b"]
    assert (shapes.hidden, shapes.intermediate) == (1024, 3072)
    assert (shapes.heads, shapes.kv_heads, shapes.head_dim) == (16, 8, 128)


def test_the_cached_model_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = script.cached_tiny_qwen3("tiny")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert script.cached_tiny_qwen3("tiny") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
