# SPDX-License-Identifier: Apache-2.0
"""The overlay in the real V1 engine on the CPU, eager, against stock vLLM.

Every engine runs in a process of its own (engine_worker.py), and every test asserts from mirage_report() which path
ran. Tokens are compared in fp32: in bf16 stock's own eager and compiled modes already differ.
"""

import json

import pytest
import torch
from engines import LAYERS, OPS, assert_path, assert_same_answers, case, paths, reports_of, run_engines, serving

pytestmark = pytest.mark.engine

BF16_LOGPROB = 0.5  # nats between two right bf16 runs, which round at other places

# ----------------------------------------------------------------------------------------------------- checkpoints
@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A random LoRA adapter for q_proj, k_proj and v_proj of the tiny model, strong enough to change its answers."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(len(LAYERS)):
        for name, rows in (("q_proj", 256), ("k_proj", 128), ("v_proj", 128)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(8, 256, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(rows, 8, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def int8_model(make_tiny, tmp_path_factory):
    """The tiny model with 8-bit weights and activations in all layers but the last: a quantised checkpoint."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("int8") / "model"
    shutil.copytree(make_tiny(), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 127  # [rows, 1]
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ----------------------------------------------------------------------------------------------- eager, one process
LORA = {"enable_lora": True, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def stock(work, vllm_stock, make_tiny, adapter):
    """Answers of stock vLLM."""
    fp32, bf16 = make_tiny(dtype="float32"), make_tiny()
    cases = [
        case("fp32", fp32),
        case("bf16", bf16, llm={"dtype": "bfloat16"}),
        case("lora", fp32, llm=LORA, lora=str(adapter)),
    ]
    results = run_engines(work / "stock", vllm_stock, cases)
    assert not any("reports" in result or "error" in result for result in results.values())
    return results


@pytest.fixture(scope="module")
def eager(work, vllm_overlay, make_tiny, adapter, int8_model):
    """Answers of the overlay, eager and in one process."""
    fp32, bf16 = make_tiny(dtype="float32"), make_tiny()
    cases = [
        case("off", fp32, "0"),
        case("on", fp32, "1"),
        case("bf16", bf16, "1", llm={"dtype": "bfloat16"}),
        case("lora", fp32, "1", llm=LORA, lora=str(adapter)),
        case("int8", int8_model, "1", llm={"dtype": "bfloat16"}),
        case("no ops", fp32, "1", env={"VLLM_MIRAGE_OPS": "none"}),
        case("two ops", fp32, "1", env={"VLLM_MIRAGE_OPS": "attention,down_proj"}),
        case("set", fp32, "0", set_use_mirage=True),
        case("strict", fp32, "strict"),
        case("bad switch", fp32, "yes"),
        case("bad op", fp32, "1", env={"VLLM_MIRAGE_OPS": "norm_kqv"}),
    ]
    return run_engines(work / "eager", vllm_overlay, cases)


def test_fused_answers_equal_stocks(eager, stock):
    assert_path(eager["on"], "fused", reason="no kernel: the weights are on the cpu")
    assert_same_answers(eager["on"], stock["fp32"])


def test_switched_off_answers_equal_stocks(eager, stock):
    assert_path(eager["off"], "stock", reason="VLLM_USE_MIRAGE=0")
    assert_same_answers(eager["off"], stock["fp32"])


def test_bf16_log_probabilities_are_within_rounding_of_stocks(eager, stock):
    assert_path(eager["bf16"], "fused")
    for ours, theirs, ours_p, theirs_p in zip(
        *(run[key] for key in ("tokens", "logprobs") for run in (eager["bf16"], stock["bf16"])), strict=True
    ):
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
        assert same >= 1
        difference = torch.tensor(ours_p[: same + 1]) - torch.tensor(theirs_p[: same + 1])
        assert difference.abs().max() <= BF16_LOGPROB


def test_lora_takes_the_stock_path_and_the_adapter_counts(eager, stock):
    """Attention has no weights that an adapter could change: it stays fused."""
    assert_path(eager["lora"], "stock", ("norm_qkv", "o_proj", "norm_gate_up", "down_proj"), reason="LoRA")
    assert_path(eager["lora"], "fused", ("attention",))
    assert eager["lora"]["lora_tokens"] == stock["lora"]["lora_tokens"]
    assert eager["lora"]["lora_tokens"] != eager["lora"]["tokens"] == stock["lora"]["tokens"]


def test_a_quantised_model_takes_the_stock_path(eager):
    projections = {"norm_qkv": "qkv_proj", "o_proj": "o_proj", "norm_gate_up": "gate_up_proj", "down_proj": "down_proj"}
    for op, projection in projections.items():
        assert_path(eager["int8"], "stock", (op,), reason=f"{projection} is quantised (CompressedTensorsLinearMethod)")
    assert all(len(tokens) for tokens in eager["int8"]["tokens"])


def test_ops_can_be_switched_off_one_by_one(eager, stock):
    assert_path(eager["no ops"], "stock", reason="VLLM_MIRAGE_OPS")  # the fused engines before it in its process are not counted
    assert_path(eager["two ops"], "fused", ("attention", "down_proj"))
    assert_path(eager["two ops"], "stock", ("norm_qkv", "o_proj", "norm_gate_up"), reason="VLLM_MIRAGE_OPS")
    for name in ("no ops", "two ops"):
        assert_same_answers(eager[name], stock["fp32"])


def test_set_use_mirage_decides_the_models_built_later(eager, stock):
    assert_path(eager["set"], "fused")
    assert_same_answers(eager["set"], stock["fp32"])


def test_settings_that_cannot_be_met_are_errors_at_start(eager):
    assert "model.layers.0 cannot run a Mirage kernel: no kernel" in eager["strict"]["error"]
    assert "0, 1 or strict was expected" in eager["bad switch"]["error"]
    assert "comma list of norm_qkv, attention, o_proj, norm_gate_up, down_proj was expected" in eager["bad op"]["error"]


def test_each_engine_logs_one_line(eager):
    lines = [line.partition("Mirage: ")[2] for line in eager["on"]["log"].splitlines() if "Mirage: " in line]
    assert [line[: len("3 of 3 layers fused")] for line in lines] == [
        "0 of 3 layers fused",  # off
        "3 of 3 layers fused",  # on
        "3 of 3 layers fused",  # bf16
        "3 of 3 layers fused",  # lora: attention
        "3 of 3 layers fused",  # int8: attention
        "0 of 3 layers fused",  # no ops
        "3 of 3 layers fused",  # two ops
        "3 of 3 layers fused",  # set
    ]


# ------------------------------------------------------------------------------------------------- several processes
def test_tensor_parallel_workers_report_the_fused_path(work, vllm_overlay, make_tiny, stock):
    parallel = case("tp", make_tiny(dtype="float32"), "1", llm={"tensor_parallel_size": 2})
    result = run_engines(work / "tp", vllm_overlay, [parallel], VLLM_ENABLE_V1_MULTIPROCESSING="1")["tp"]
    assert_path(result, "fused", reason="no kernel: the weights are on the cpu")
    assert sorted(report["rank"] for report in result["reports"]) == [0, 1]
    assert all(set(paths(report)) == {(layer, op) for layer in LAYERS for op in OPS} for report in result["reports"])
    assert result["log"].count("Mirage: 3 of 3 layers fused") == 1
    assert_same_answers(result, stock["fp32"])


# ------------------------------------------------------------------------------------------------------ OpenAI server
@pytest.fixture
def server(work, vllm_overlay, make_tiny):
    with serving(vllm_overlay, make_tiny(dtype="float32"), work / "server.log") as (url, _):
        yield url


def test_the_openai_server_answers_a_client_on_the_fused_path(server, stock):
    from engine_worker import MAX_TOKENS, TOKENS
    from openai import OpenAI

    client = OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    extra = {"ignore_eos": True, "return_token_ids": True}
    answer = client.completions.create(
        model="tiny", prompt=TOKENS, max_tokens=MAX_TOKENS, temperature=0, extra_body=extra
    )
    assert [choice["token_ids"] for choice in answer.model_dump()["choices"]] == stock["fp32"]["tokens"]

    reports = reports_of(server)
    assert_path({"reports": reports}, "fused")
