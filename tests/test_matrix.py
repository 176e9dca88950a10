# SPDX-License-Identifier: Apache-2.0
"""What vLLM can do with a Qwen3, in the real engine on the CPU: the answers with VLLM_USE_MIRAGE=1 are those with 0.

Each row of ROWS runs twice in one process (matrix_worker.py). A row says which path norm + QKV must take, and a test below it
proves that the feature was in use. test_engine.py holds the rows of the switch, bf16, int8, TP and the server, test_compiled.py
the compiled ones and PP.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import run_engines
from safetensors.torch import load_file, save_file

from test_mirage_qwen3 import TOLERANCE, compare_arms, make_tiny_qwen3

pytestmark = pytest.mark.engine

WORKER = Path(__file__).parent / "matrix_worker.py"
LAYERS = 3
EXPERTS = 4


# ----------------------------------------------------------------------------------------------------- checkpoints
def derive(folder: Path, source: Path, config: dict[str, Any], change: Any) -> Path:
    """A copy of the checkpoint `source` with these settings, and with the tensors that change(name, tensor) gives instead."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = load_file(source / "model.safetensors")
    changed = [change(name, tensor) for name, tensor in tensors.items()]
    save_file({k: v.contiguous() for part in changed for k, v in part.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def biased(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return {name: tensor, name.replace(".weight", ".bias"): 8 * tensor[:, 0]}
    return {name: tensor}


def in_fp8(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if not name.endswith("_proj.weight"):
        return {name: tensor}
    scale = tensor.abs().max().float() / torch.finfo(torch.float8_e4m3fn).max
    return {name: (tensor.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def four_bits(name: str, tensor: torch.Tensor, packed_dim: int) -> dict[str, torch.Tensor]:
    """Random 4-bit weights of the tensor's shape [N, K] and size, 8 in an int32 along K (0) or N (1), zero point 8."""
    if not name.endswith("_proj.weight"):
        return {name: tensor}
    (n, k), groups = tensor.shape, tensor.shape[1] // 64
    stem = name.removesuffix("weight")
    shape = (k // 8, n) if packed_dim == 0 else (k, n // 8)
    generator = torch.Generator().manual_seed(len(name) + n + k)
    zero = 0x77777777 if packed_dim == 0 else 0x88888888  # GPTQ stores its zero point less one
    return {
        f"{stem}qweight": torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32),
        f"{stem}qzeros": torch.full((groups, n // 8), zero).to(torch.uint32).view(torch.int32),
        f"{stem}scales": torch.full((groups, n), float(tensor.float().std()) / 4.6).to(torch.bfloat16),
    }


def in_awq(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return four_bits(name, tensor, packed_dim=1)


def in_gptq(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = four_bits(name, tensor, packed_dim=0)
    if name not in tensors:
        tensors[name.replace(".weight", ".g_idx")] = (torch.arange(tensor.shape[1]) // 64).to(torch.int32)
    return tensors


def with_experts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The dense MLP becomes EXPERTS experts, each the MLP in another scale, and a router."""
    if ".mlp." not in name:
        return {name: tensor}
    stem, _, projection = name.partition(".mlp.")
    experts = {f"{stem}.mlp.experts.{i}.{projection}": tensor * (1 + 0.25 * i) for i in range(EXPERTS)}
    return experts | ({f"{stem}.mlp.gate.weight": tensor[:EXPERTS] * 4} if projection == "gate_proj.weight" else {})


def make_models(root: Path, plain: Path, bf16: Path, other: Path) -> dict[str, Path]:
    """{name: checkpoint folder}: two equal models, of which the second one is in bf16, another one, and all that is made of them."""
    four_bit = {"bits": 4, "group_size": 64}
    awq = {"quant_method": "awq", "version": "gemm", "zero_point": True, **four_bit}
    gptq = {"quant_method": "gptq", "desc_act": False, "sym": True, **four_bit}
    moe = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": json.loads((plain / "config.json").read_text())["intermediate_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return {
        "plain": plain,
        "other": other,
        "bias": derive(root / "bias", plain, {"attention_bias": True}, biased),
        "fp8": derive(root / "fp8", bf16, {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, in_fp8),
        "awq": derive(root / "awq", bf16, {"quantization_config": awq}, in_awq),
        "gptq": derive(root / "gptq", bf16, {"quantization_config": gptq}, in_gptq),
        "moe": derive(root / "moe", plain, moe, with_experts),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_tiny):
    root = tmp_path_factory.mktemp("matrix")
    other = make_tiny_qwen3(root / "other", dtype="float32", seed=1)
    return make_models(root, make_tiny(dtype="float32"), make_tiny(), other)


def make_adapter(folder: Path, seed: int, targets: dict[str, tuple[int, int]], layers: int = LAYERS) -> str:
    """A random LoRA adapter for these projections {name: (rows, columns)}, strong enough to change the answers."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in targets.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(8, columns, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(rows, 8, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """{kind: two adapters}: of the query projection, and of the output projection alone."""
    root = tmp_path_factory.mktemp("adapters")
    kinds = {"q_proj": (256, 256), "o_proj": (256, 256)}
    return {name: [make_adapter(root / name / str(seed), seed, {name: shape}) for seed in (1, 2)] for name, shape in kinds.items()}


# ------------------------------------------------------------------------------------------------------------ rows
@dataclass(frozen=True)
class Row:
    """One use of a model, and the path that its norm + QKV must take."""

    use: str = "plain"  # a function of matrix_worker.py
    model: str = "plain"
    llm: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    path: str | None = "fused"  # None: the model has no layer of ours
    reason: str = ""
    adapters: str | None = None
    stops: str = ""  # what the CPU build says when it cannot run this; the path was decided before


LORA = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
BF16 = {"dtype": "bfloat16"}
NO_4_BIT_GEMM = "" if torch.cpu._is_avx512_supported() else "cpu_gemm_wna16"  # vLLM has CPU builds with AVX-512 and without
ROWS = {
    "plain": Row("long_prompts"),
    "prefix caching": Row("twice", llm={"enable_prefix_caching": True, "block_size": 32}),
    "chunked prefill": Row("long_prompts", llm={"max_num_batched_tokens": 40, "enable_chunked_prefill": True}),
    "n-gram": Row("repetition", llm={"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}}),
    "draft": Row("long_prompts", llm={"speculative_config": {"model": "plain", "num_speculative_tokens": 3}}),
    "wrong draft": Row("long_prompts", llm={"speculative_config": {"model": "other", "num_speculative_tokens": 3}}),
    "lora": Row("adapters", llm=LORA, path="stock", reason="LoRA", adapters="q_proj"),
    "lora on o_proj": Row("adapters", llm={**LORA, "lora_target_modules": ["o_proj"]}, adapters="o_proj"),
    "awq": Row(model="awq", llm=BF16, path="stock", reason="quantised (AutoAWQMarlinLinearMethod)", stops=NO_4_BIT_GEMM),
    "gptq": Row(model="gptq", llm=BF16, path="stock", reason="quantised (AutoGPTQLinearMethod)", stops=NO_4_BIT_GEMM),
    # Without AMX the CPU build has no fp8 GEMM, and fails at the first run of the model.
    "fp8": Row(model="fp8", llm=BF16, path="stock", reason="quantised (Fp8LinearMethod)", stops="scaled_fp8_quant"),
    "bias": Row(model="bias", path="stock", reason="qkv_proj has a bias"),
    "reload": Row("reload"),
    "embedding": Row("embed", llm={"runner": "pooling", "convert": "embed"}),
    "moe": Row("experts", model="moe", path=None),
    # vLLM's batch-invariant operators are Triton's, which the CPU build lacks. Last: they stay in the process.
    "batch-invariant": Row(env={"VLLM_BATCH_INVARIANT": "1"}, path="stock", reason="VLLM_BATCH_INVARIANT", stops="not subscriptable"),
}


def as_case(row: Row, switch: str, models: dict[str, Path], adapters: dict[str, list[str]], **engine: Any) -> dict[str, Any]:
    """The row as a case of matrix_worker.py; engine: arguments of every LLM."""
    llm = {"model": str(models[row.model]), "enforce_eager": True, **engine, **row.llm}
    if "model" in (speculative := llm.get("speculative_config", {})):
        llm["speculative_config"] = {**speculative, "model": str(models[speculative["model"]])}
    case = {"use": row.use, "llm": llm, "env": {"VLLM_USE_MIRAGE": switch, **row.env}, "other": str(models["other"])}
    return case | ({"adapters": adapters[row.adapters]} if row.adapters else {})


@pytest.fixture(scope="module")
def results(tmp_path_factory, vllm_overlay, models, adapters):
    """{(row, switch): result}"""
    cases = [
        {"name": f"{name}={switch}", **as_case(row, switch, models, adapters, dtype="float32")}
        for name, row in ROWS.items()
        for switch in "01"
    ]
    return run_engines(tmp_path_factory.mktemp("run") / "matrix", vllm_overlay, cases, worker=WORKER)


def norm_qkv(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [layer for report in result["reports"] for layer in report["layers"] if layer["op"] == "norm_qkv"]


def works(name: str, results: dict[str, Any]) -> bool:
    """Whether the engine ran the row; fails if it stopped otherwise than the row says."""
    errors = [results[f"{name}={switch}"].get("error", "") for switch in "01"]
    assert all(not error or (ROWS[name].stops and ROWS[name].stops in error) for error in errors), errors
    return not any(errors)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.path])
def test_the_path_is_the_rows(results, name):
    row, ran = ROWS[name], works(name, results)
    layers = norm_qkv(results[f"{name}=1"])
    print(f"{name}: {layers[0]['path']} ({layers[0]['reason']})")
    assert len(layers) >= LAYERS
    assert {layer["path"] for layer in layers} == {row.path}
    assert all(row.reason in layer["reason"] for layer in layers)
    assert {layer["path"] for layer in norm_qkv(results[f"{name}=0"])} == {"stock"}
    if ran:
        [stock], [ours] = (results[f"{name}={switch}"]["calls"] for switch in "01")
        assert not stock
        assert any(body.startswith("norm_qkv.") for body in ours) == (row.path == "fused")


@pytest.mark.parametrize("name", [name for name in ROWS if name != "embedding"])
def test_the_tokens_are_stocks(results, name):
    if not works(name, results):
        pytest.skip(f"the CPU build stops at {ROWS[name].stops}, on both paths")
    stock, ours = (results[f"{name}={switch}"] for switch in "01")
    if ROWS[name].llm.get("dtype") == "bfloat16":  # q and k are rounded at other places than by the CPU build's attention
        assert not compare_arms(stock, ours, TOLERANCE["bfloat16"]).failures
    else:
        assert ours["tokens"] == stock["tokens"]


def test_embeddings_are_stocks(results):
    assert works("embedding", results)
    ours, stock = (torch.tensor(results[f"embedding={switch}"]["vectors"]) for switch in "10")
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)
    assert ours.std(dim=0).mean() > 1e-3  # the prompts differ


# ------------------------------------------------------------------------------- the features were in use, in both arms
@pytest.mark.parametrize("switch", "01")
class TestTheFeatureWasInUse:
    def test_prefix_caching(self, results, switch):
        assert results[f"prefix caching={switch}"]["cached"] == [[0], [64]]

    def test_chunked_prefill(self, results, switch):
        chunked, plain = (results[f"{name}={switch}"] for name in ("chunked prefill", "plain"))
        assert chunked["steps"] > plain["steps"] and chunked["tokens"] == plain["tokens"]

    def test_speculation(self, results, switch):
        ngram, right, wrong, plain = (results[f"{name}={switch}"] for name in ("n-gram", "draft", "wrong draft", "plain"))
        assert ngram["steps"] < len(ngram["tokens"][0])
        assert right["steps"] < wrong["steps"] and right["tokens"] == wrong["tokens"] == plain["tokens"]

    @pytest.mark.parametrize("name", ["lora", "lora on o_proj"])
    def test_adapters(self, results, name, switch):
        tokens = results[f"{name}={switch}"]["tokens"]
        none, first, second = (tokens[key][0] for key in ("none", "first", "second"))
        assert len({str(answer) for answer in (none, first, second)}) == 3
        assert tokens["mixed"] == [second, first, second]
        assert tokens["removed"] == tokens["none"] == [none] * 3

    def test_reload(self, results, switch):
        before, other, after = results[f"reload={switch}"]["tokens"]
        assert before == after != other

    def test_experts(self, results, switch):
        result = results[f"moe={switch}"]
        assert "Qwen3MoeDecoderLayer" in result["modules"] and "Qwen3DecoderLayer" not in result["modules"]
        assert result["calls"] == [{}]


def test_off_the_cpu_no_weight_is_kept(ops):
    """Sleep mode takes the weights away and wakes with others in their place. The CPU build has no sleep mode."""
    projection = SimpleNamespace(prefix="model.layers.0.mlp.down_proj", tp_size=1, weight=torch.empty(4, 4, device="meta"))
    fused = ops.FusedLinear(projection)
    for value in (1.0, 2.0):
        projection.weight = torch.full((4, 4), value)
        assert torch.equal(fused(torch.ones(1, 4), torch.ones(1, 4))[0], torch.full((1, 4), 4 * value))
