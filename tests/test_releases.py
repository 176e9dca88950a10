# SPDX-License-Identifier: Apache-2.0
"""The overlay against the Python files of vLLM's oldest and newest supported release, which need not be importable.

The files come from the release's wheel (300 MB, downloaded once) and are kept in $MIRAGE_TEST_CACHE, or else in the
user's cache folder.
"""

import ast
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from conftest import made_once

REPOSITORY = Path(__file__).resolve().parents[1]
PATCHES = REPOSITORY / "patches" / "vllm"
QWEN3 = "model_executor/models/qwen3.py"
ATTENTION = "model_executor/layers/attention/attention.py"
FLASH = "v1/attention/backends/flash_attn.py"
LAYERS = "model_executor/layers/"
OURS = (QWEN3, *(f"{LAYERS}{name}.py" for name in ("fused_mirage_ops", "mirage_ops", "mirage_compile")))
STOCK_SHA256 = {
    "0.26.0": "44b1ebbb85a9701cdf754af554af2952f3a9a25d94da219d8ecfd0b7b01dda21",
    "0.33.0": "06bee457e1278cecc3d0745f45c44b4711243330e8c2c19d5c732625b67f1374",
}


# --------------------------------------------------------------------------------------------------------- releases
def cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm-mirage" / "releases"
    return Path(os.environ.get("MIRAGE_TEST_CACHE", default))


def download(version: str, target: Path) -> None:
    """Put the Python files of vLLM's wheel into target/vllm."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--platform", "manylinux_2_28_x86_64", "--dest", scratch]
        done = subprocess.run([*command, f"vllm=={version}"], capture_output=True, text=True)
        if done.returncode:
            pytest.fail(
                f"the wheel of vLLM {version} could not be downloaded ({done.stderr.strip()[-300:]}): set "
                f"MIRAGE_TEST_CACHE to a folder that has {version}/vllm"
            )
        [wheel] = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
            archive.extractall(target, names)


@pytest.fixture(scope="module", params=sorted(STOCK_SHA256))
def release(request) -> Path:
    """The package folder of a release."""
    return made_once(cache_folder() / request.param, lambda folder: download(request.param, folder)) / "vllm"


def version_of(release: Path) -> str:
    return release.parent.name


# ------------------------------------------------------------------------------------------------------ syntax trees
@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def statements(body):
    """The statements that run at import, also those inside if, try and with."""
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
                yield from statements(getattr(node, field, []))


def module_file(package: Path, name: str) -> Path | None:
    """The file of module `name` ("vllm.config"), None if there is none."""
    path = package.parent.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported_module(node: ast.ImportFrom, package: Path, file: Path) -> str:
    """The absolute name of the module that `from … import` in `file` reads."""
    if not node.level:
        return node.module or ""
    parts = file.relative_to(package.parent).with_suffix("").parts[: -node.level]
    return ".".join([*parts, *([node.module] if node.module else [])])


def bound_names(package: Path, file: Path) -> set[str]:
    """The names that a module has after its import."""
    names: set[str] = set()
    for node in statements(tree(file).body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
        elif isinstance(node, ast.Import):
            names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
            source = module_file(package, imported_module(node, package, file))
            if node.names[0].name == "*" and source:
                names.update(name for name in bound_names(package, source) if not name.startswith("_"))
    return names


def find_class(package: Path, file: str, name: str) -> ast.ClassDef:
    [found] = [node for node in tree(package / file).body if isinstance(node, ast.ClassDef) and node.name == name]
    return found


def method(cls: ast.ClassDef, name: str) -> ast.FunctionDef:
    [found] = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return found


def attributes(cls: ast.ClassDef) -> set[str]:
    """Fields of the class and attributes that its methods set on self."""
    names = {
        node.target.id for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "self.register_parameter":
            names.add(ast.literal_eval(node.args[0]))
    return names


def parameters(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in function.args.args]


# ------------------------------------------------------------------------------------------------------ the releases
def test_the_replaced_file_is_the_known_one(release):
    assert hashlib.sha256((release / QWEN3).read_bytes()).hexdigest() == STOCK_SHA256[version_of(release)]


def test_everything_others_import_from_qwen3_is_still_there(release):
    wanted: dict[str, set[str]] = {}
    for file in release.rglob("*.py"):
        if "qwen3" not in file.read_text(encoding="utf-8"):
            continue
        for node in ast.walk(tree(file)):
            if not isinstance(node, ast.ImportFrom):
                continue
            module = imported_module(node, release, file)
            names = {alias.name for alias in node.names}
            assert not (module == "vllm.model_executor.models" and "qwen3" in names), f"{file} takes the whole module"
            if module == "vllm.model_executor.models.qwen3":
                wanted[str(file)] = names
    assert len(wanted) >= 8 and any("Qwen3DecoderLayer" in names for names in wanted.values())
    exported = {name for name in bound_names(release, release / QWEN3) if not name.startswith("_")}
    exported |= bound_names(PATCHES, PATCHES / QWEN3)
    assert {name for names in wanted.values() for name in names} <= exported
    assert "__all__" not in bound_names(release, release / QWEN3)  # it would limit `import *`


STOCK_ATTENTION = """\
def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    qkv, _ = self.qkv_proj(hidden_states)
    q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
    q_by_head = q.view(*q.shape[:-1], q.shape[-1] // self.head_dim, self.head_dim)
    q_by_head = self.q_norm(q_by_head)
    q = q_by_head.view(q.shape)
    k_by_head = k.view(*k.shape[:-1], k.shape[-1] // self.head_dim, self.head_dim)
    k_by_head = self.k_norm(k_by_head)
    k = k_by_head.view(k.shape)
    q, k = self.rotary_emb(positions, q, k)
    attn_output = self.attn(q, k, v)
    output, _ = self.o_proj(attn_output)
    return output"""

STOCK_LAYER = """\
def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None) \
-> tuple[torch.Tensor, torch.Tensor]:
    if residual is None:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
    else:
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
    hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
    hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
    hidden_states = self.mlp(hidden_states)
    return (hidden_states, residual)"""


@pytest.mark.parametrize(("cls", "forward"), [("Qwen3Attention", STOCK_ATTENTION), ("Qwen3DecoderLayer", STOCK_LAYER)])
def test_the_forwards_that_ours_restates_are_unchanged(release, cls, forward):
    assert ast.unparse(method(find_class(release, QWEN3, cls), "forward")) == forward


def test_our_forward_takes_what_stocks_takes(release):
    ours = method(find_class(PATCHES, QWEN3, "Qwen3DecoderLayer"), "forward")
    stock = method(find_class(release, QWEN3, "Qwen3DecoderLayer"), "forward")
    assert ast.dump(ours.args) == ast.dump(stock.args)
    constructor = method(find_class(release, QWEN3, "Qwen3DecoderLayer"), "__init__")
    assert parameters(constructor)[:2] == ["self", "config"]


def test_the_model_finds_our_layer(release):
    """Up to 0.31 it reads the module's global, from 0.32 on a class attribute; ours sets both."""
    model = find_class(release, QWEN3, "Qwen3Model")
    arguments = [
        keyword.value
        for node in ast.walk(method(model, "__init__"))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "decoder_layer_type"
    ]
    by_attribute = "decoder_layer_type" in attributes(model)
    assert [ast.unparse(node) for node in arguments] == [
        "self.decoder_layer_type" if by_attribute else "Qwen3DecoderLayer"
    ]
    assert "ALL_DECODER_LAYER_TYPES" in bound_names(release, release / QWEN3)


@pytest.mark.parametrize("ours", OURS)
def test_every_vllm_name_our_files_import_exists(release, ours):
    checked = 0
    for node in ast.walk(tree(PATCHES / ours)):
        if not isinstance(node, ast.ImportFrom) or node.level or not node.module or not node.module.startswith("vllm"):
            continue
        if node.module == "vllm.model_executor.layers.mirage_ops":
            continue  # ours
        file = module_file(release, node.module)
        assert file is not None, f"{node.module} is not in vLLM {version_of(release)}"
        for alias in node.names:
            submodule = module_file(release, f"{node.module}.{alias.name}")
            own = alias.name in ("fused_mirage_ops", "mirage_compile", "mirage_ops", "mirage_kernels")
            assert own or submodule or alias.name in bound_names(release, file), f"{node.module} has no {alias.name}"
            checked += 1
    assert checked


USED_ATTRIBUTES = [
    (QWEN3, "Qwen3Attention", {"q_size", "kv_size", "head_dim", "qkv_proj", "q_norm", "k_norm", "rotary_emb", "attn"}),
    (QWEN3, "Qwen3Attention", {"o_proj", "num_heads", "num_kv_heads"}),
    ("model_executor/models/qwen2.py", "Qwen2MLP", {"gate_up_proj", "down_proj", "act_fn"}),
    (QWEN3, "Qwen3DecoderLayer", {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}),
    (
        "model_executor/layers/layernorm.py",
        "RMSNorm",
        {"weight", "has_weight", "variance_epsilon", "variance_size_override"},
    ),
    ("model_executor/layers/linear.py", "LinearBase", {"prefix", "quant_method", "tp_size"}),
    ("model_executor/layers/linear.py", "ColumnParallelLinear", {"gather_output", "bias"}),
    ("model_executor/layers/linear.py", "RowParallelLinear", {"input_is_parallel", "reduce_results", "bias"}),
    ("model_executor/layers/rotary_embedding/base.py", "RotaryEmbeddingBase", {"rotary_dim", "is_neox_style", "cos_sin_cache"}),
    (
        ATTENTION,
        "Attention",
        {"impl", "layer_name", "attn_backend", "kv_cache", "kv_cache_dtype", "kv_sharing_target_layer_name", "query_quant"},
    ),
    ("v1/attention/backend.py", "AttentionBackend", {"forward_includes_kv_cache_update"}),
    (FLASH, "FlashAttentionImpl", {"head_size", "scale", "sliding_window", "alibi_slopes", "logits_soft_cap", "sinks"}),
    (FLASH, "FlashAttentionMetadata", {"max_query_len", "seq_lens", "block_table", "causal"}),
    ("forward_context.py", "ForwardContext", {"attn_metadata", "slot_mapping", "cudagraph_runtime_mode"}),
    ("config/vllm.py", "VllmConfig", {"lora_config", "compilation_config", "parallel_config", "kv_transfer_config"}),
    ("config/compilation.py", "CompilationConfig", {"pass_config", "splitting_ops", "cudagraph_mode", "use_inductor_graph_partition"}),
    ("config/compilation.py", "CompilationConfig", {"compile_ranges_endpoints", "inductor_compile_config"}),
    ("config/compilation.py", "PassConfig", {"fuse_allreduce_rms", "fuse_attn_quant"}),
    ("config/lora.py", "LoRAConfig", {"target_modules"}),
    ("platforms/interface.py", "Platform", {"device_name"}),
    ("distributed/parallel_state.py", "GroupCoordinator", {"rank_in_group", "world_size"}),
]


@pytest.mark.parametrize(("file", "cls", "used"), USED_ATTRIBUTES)
def test_the_attributes_our_files_read_exist(release, file, cls, used):
    assert used <= attributes(find_class(release, file, cls))


def test_the_calls_our_files_make_fit(release):
    def function(file, name):
        [found] = [n for n in tree(release / file).body if isinstance(n, ast.FunctionDef) and n.name == name]
        return found

    assert parameters(function("distributed/utils.py", "get_pp_indices")) == [
        "num_hidden_layers",
        "pp_rank",
        "pp_size",
    ]
    for name in ("get_pp_group", "get_tensor_model_parallel_rank"):
        assert parameters(function("distributed/parallel_state.py", name)) == []
    platform = find_class(release, "platforms/interface.py", "Platform")
    for name in ("is_cuda", "is_cpu"):
        assert parameters(method(platform, name)) == ["self"]
    rpc = method(find_class(release, "entrypoints/llm.py", "LLM"), "collective_rpc")
    assert parameters(rpc)[:2] == ["self", "method"]
    for name in ("QKVParallelLinear", "MergedColumnParallelLinear"):
        linear = find_class(release, "model_executor/layers/linear.py", name)
        assert [ast.unparse(base) for base in linear.bases] == ["ColumnParallelLinear"]
    assert parameters(function("distributed/communication_op.py", "tensor_model_parallel_all_reduce")) == ["input_"]
    assert parameters(function("forward_context.py", "get_forward_context")) == []
    assert parameters(function(ATTENTION, "get_attention_context")) == ["layer_name"]
    assert "return (attn_metadata, attn_layer, kv_cache, layer_slot_mapping)" in ast.unparse(function(ATTENTION, "get_attention_context"))
    assert parameters(function(ATTENTION, "unified_kv_cache_update")) == ["key", "value", "layer_name"]
    assert parameters(function(ATTENTION, "unified_attention_with_output"))[:5] == ["query", "key", "value", "output", "layer_name"]


STOCK_MLP = """\
def forward(self, x):
    gate_up, _ = self.gate_up_proj(x)
    x = self.act_fn(gate_up)
    x, _ = self.down_proj(x)
    return x"""

STOCK_CACHE = "key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)"


def test_what_our_ops_restate_is_unchanged(release):
    """The MLP, the names of FlashAttention's cache dimensions, and what an Inductor pass of ours overrides."""
    assert ast.unparse(method(find_class(release, "model_executor/models/qwen2.py", "Qwen2MLP"), "forward")) == STOCK_MLP
    assert STOCK_CACHE in ast.unparse(method(find_class(release, FLASH, "FlashAttentionImpl"), "do_kv_cache_update"))
    inductor_pass = find_class(release, "compilation/passes/inductor_pass.py", "InductorPass")
    defined = {node.name for node in inductor_pass.body if isinstance(node, ast.FunctionDef)}
    assert {"uuid", "is_applicable_for_range", "hash_source"} <= defined


def test_a_layer_may_hand_on_the_residual_stream_alone(release):
    """What down_proj relies on where it adds the residual: between layers nobody needs two tensors, behind the last one somebody does."""
    forward = method(find_class(release, "model_executor/models/qwen2.py", "Qwen2Model"), "forward")
    [loop] = [node for node in ast.walk(forward) if isinstance(node, ast.For) and "self.layers" in ast.unparse(node.iter)]
    assert [ast.unparse(statement) for statement in loop.body] == [
        "hidden_states, residual = layer(positions, hidden_states, residual)",
        "self._maybe_add_hidden_state(aux_hidden_states, idx + 1, hidden_states, residual)",
    ]
    interfaces = ast.walk(tree(release / "model_executor/models/interfaces.py"))
    [aux] = [node for node in interfaces if isinstance(node, ast.FunctionDef) and node.name == "_maybe_add_hidden_state"]
    assert "hidden_states + residual if residual is not None else hidden_states" in ast.unparse(aux)
    layer = ast.unparse(method(find_class(release, "model_executor/models/qwen3.py", "Qwen3DecoderLayer"), "forward"))
    assert "if residual is None:\n        residual = hidden_states\n        hidden_states = self.input_layernorm(hidden_states)" in layer
    assert "speculative_config: SpeculativeConfig | None" in ast.unparse(find_class(release, "config/vllm.py", "VllmConfig"))


def test_the_range_that_is_compiled_for_is_known_to_passes(release):
    file = "compilation/passes/inductor_pass.py"
    assert "self.compile_range: Range = compile_range" in ast.unparse(find_class(release, file, "PassContext"))
    assert "get_pass_context" in bound_names(release, release / file)


def test_declared_variables_reach_the_compile_cache_key(release):
    """vLLM calls every getter in environment_variables when it makes the key."""
    [factors] = [
        node
        for node in tree(release / "envs.py").body
        if isinstance(node, ast.FunctionDef) and node.name == "compile_factors"
    ]
    source = ast.unparse(factors)
    assert "for factor, getter in environment_variables.items()" in source and "raw = getter()" in source
    assert {"environment_variables", "VLLM_BATCH_INVARIANT"} <= bound_names(release, release / "envs.py")
    for user in ("compilation/backends.py", "compilation/caching.py"):
        assert "envs.compile_factors()" in (release / user).read_text(encoding="utf-8")


def test_workers_find_the_report_by_name(release):
    """collective_rpc("mirage_report") ends in a lookup on a worker, which is a WorkerBase."""
    assert "getattr(self.worker, method)" in ast.unparse(tree(release / "v1/executor/multiproc_executor.py"))
    assert "run_method(self.driver_worker, method, args, kwargs)" in ast.unparse(
        tree(release / "v1/executor/uniproc_executor.py")
    )
    for file, cls in (("v1/worker/gpu_worker.py", "Worker"), ("v1/worker/cpu_worker.py", "CPUWorker")):
        bases = [ast.unparse(base) for base in find_class(release, file, cls).bases]
        assert bases in (["WorkerBase"], ["Worker"])
