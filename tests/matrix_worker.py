# SPDX-License-Identifier: Apache-2.0
"""Use the real vLLM engine in the ways of test_matrix.py, in a process of its own.

    python matrix_worker.py CASES.json RESULTS.json

A case is one of engine_worker.py's plus "use", the name of a function below. Each returns what the caller compares between the
stock and the fused path, and proof that the feature was in use.
"""

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import engine_worker
from engine_worker import PROMPTS

MAX_TOKENS = 12
# 96 tokens that repeat: long enough for several blocks and chunks, and an n-gram speculator finds something in it
LONG = [{"prompt_token_ids": [3 + (7 * i + shift) % 24 for i in range(96)]} for shift in (0, 5)]


def greedy(llm: Any, prompts: Any, lora: Any = None, max_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    """The answers; "steps" counts model runs, so it tells chunking and speculation from plain decoding."""
    from vllm import SamplingParams

    runs = count_runs(llm)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    answers = llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    return {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "cached": [answer.num_cached_tokens for answer in answers],
        "steps": runs(),
    }


def count_runs(llm: Any) -> Any:
    """A function that tells how often the engine has stepped since now."""
    engine = llm.llm_engine
    step, count = type(engine).step, 0

    def counted() -> Any:
        nonlocal count
        count += 1
        return step(engine)

    engine.step = counted
    return lambda: count


def plain(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    return greedy(llm, PROMPTS)


def long_prompts(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    return greedy(llm, LONG)


def repetition(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """The tiny model's answer to this prompt repeats itself, which is what an n-gram speculator lives on."""
    return greedy(llm, PROMPTS[1])


def twice(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """The same prompt twice: the second one's beginning comes from the prefix cache."""
    runs = [greedy(llm, LONG[:1]), greedy(llm, LONG[:1])]
    return {key: [run[key] for run in runs] for key in runs[0]}


def adapters(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Adapters come, stand side by side in one batch, and leave.

    No request without an adapter is in that batch: vLLM's CPU build would give it an adapter too, on both paths.
    """
    from vllm.lora.request import LoRARequest

    first, second = (LoRARequest(Path(folder).name, i + 1, folder) for i, folder in enumerate(case["adapters"]))
    engine = llm.llm_engine
    prompts = [PROMPTS[0]] * 3
    tokens = {"none": greedy(llm, prompts)["tokens"]}
    assert engine.add_lora(first)
    tokens["first"] = greedy(llm, prompts, [first] * 3)["tokens"]
    tokens["mixed"] = greedy(llm, prompts, [second, first, second])["tokens"]
    assert engine.remove_lora(1) and engine.list_loras() == {2}
    tokens["second"] = greedy(llm, prompts, [second] * 3)["tokens"]
    assert engine.remove_lora(2) and not engine.list_loras()
    tokens["removed"] = greedy(llm, prompts)["tokens"]
    return {"tokens": tokens}


def reload(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Another checkpoint's weights into the running engine, then the first one's again."""
    tokens = [greedy(llm, PROMPTS)["tokens"]]
    for folder in (case["other"], case["llm"]["model"]):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        llm.reset_prefix_cache()
        tokens.append(greedy(llm, PROMPTS)["tokens"])
    return {"tokens": tokens}


def embed(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    return {"vectors": [answer.outputs.embedding for answer in llm.embed(PROMPTS, use_tqdm=False)]}


USES = {use.__name__: use for use in (plain, long_prompts, repetition, twice, adapters, reload, embed)}


def run(case: dict[str, Any]) -> dict[str, Any]:
    from vllm.model_executor.layers import fused_mirage_ops as mirage

    try:
        result = answer(case)
    except Exception as error:  # a row that the CPU build cannot run: its model was built, so the path is told all the same
        result = {"error": f"{type(error).__name__}: {error}"}
    return {**result, "reports": [mirage.mirage_report()]}


def answer(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.model_executor.layers import fused_mirage_ops as mirage

    llm = LLM(**{"max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 32 << 20, "seed": 0, **case["llm"]})
    before = mirage.mirage_report()["calls"]
    try:
        result = USES[case["use"]](llm, case)
        result["modules"] = llm.apply_model(lambda model: sorted({type(module).__name__ for module in model.modules()}))[0]
        result["calls"] = {body: count - before[body] for body, count in mirage.mirage_report()["calls"].items()}
        return result
    finally:
        llm.llm_engine.engine_core.shutdown()


def stand_in_for_numba() -> None:
    """vLLM's n-gram speculator compiles its loops with numba, which the CPU install lacks: as plain Python they give the same.

    Also where numba is installed: with numba 0.65.0 every engine after the n-gram one failed to start in this process.
    """
    stub: Any = types.ModuleType("numba")
    stub.__spec__ = importlib.machinery.ModuleSpec("numba", None)  # or find_spec() would raise
    stub.get_num_threads, stub.set_num_threads, stub.prange = (lambda: 1), (lambda count: None), range
    stub.jit = stub.njit = lambda *args, **options: args[0] if args else (lambda function: function)
    sys.modules["numba"] = stub


if __name__ == "__main__":
    stand_in_for_numba()
    engine_worker.main(run)
