# SPDX-License-Identifier: Apache-2.0
"""Use the real vLLM engine in the ways of test_matrix.py and test_gpu_matrix.py, in a process of its own.

    python matrix_worker.py CASES.json RESULTS.json

A case is one of engine_worker.py's plus "use", the name of a function below. Each returns what the caller compares between the
stock and the fused path, and proof that the feature was in use.
"""

import importlib.machinery
import sys
import time
import traceback
import types
from collections import Counter
from pathlib import Path
from typing import Any

import engine_worker
from engine_worker import PROMPTS

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_mirage_qwen3 import TOP_K, _completion

MAX_TOKENS = 12
# 96 tokens that repeat: long enough for several blocks and chunks, and an n-gram speculator finds something in it
LONG = [{"prompt_token_ids": [3 + (7 * i + shift) % 24 for i in range(96)]} for shift in (0, 5)]
VOCABULARY = {"prompt_token_ids": list(range(3, 403))}  # two of five tokens that a tiny model may answer with


def greedy(llm: Any, prompts: Any, lora: Any = None, max_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    """The answers, and how they came about.

    tokens, cached  of each answer: its tokens, and how many of its prompt's came from the prefix cache
    rounds          one round for compare_arms() of test_mirage_qwen3.py: tokens and log-probabilities
    batches, steps  the runs of the model: the tokens of each request in each of them, and how many there were
    kernels         calls of Mirage's kernels
    """
    from vllm import SamplingParams

    batches, kernels = record_batches(llm), kernel_calls()
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=TOP_K)
    answers = llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    return {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "cached": [answer.num_cached_tokens for answer in answers],
        "rounds": [[_completion(answer) for answer in answers]],
        "batches": batches,
        "steps": len(batches),
        "kernels": kernel_calls() - kernels,
    }


def one_after_another(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Several results of greedy() as one: a list for each key, and all rounds."""
    return {**{key: [run[key] for run in runs] for key in runs[0]}, "rounds": [run["rounds"][0] for run in runs]}


def record_batches(llm: Any) -> list[list[int]]:
    """A list that grows with each run of the model from now on; empty where the engine is in another process."""
    batches: list[list[int]] = []
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is not None:
        executor = core.model_executor
        execute = type(executor).execute_model

        def recorded(scheduled: Any, *args: Any, **options: Any) -> Any:
            if scheduled.num_scheduled_tokens:
                batches.append(list(scheduled.num_scheduled_tokens.values()))
            return execute(executor, scheduled, *args, **options)

        executor.execute_model = recorded
    return batches


def kernel_calls() -> int:
    from vllm.model_executor.layers import mirage_ops

    return sum(count for body, count in mirage_ops.calls.items() if body.endswith(".kernel"))


def plain(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    return greedy(llm, PROMPTS)


def long_prompts(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    return greedy(llm, LONG)


def mixed_lengths(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """One request alone, then six of 1 to 96 tokens at once."""
    return one_after_another([greedy(llm, PROMPTS[:1]), greedy(llm, [*PROMPTS, *LONG])])


def repetition(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """The tiny model's answer to this prompt repeats itself, which is what an n-gram speculator lives on."""
    return greedy(llm, PROMPTS[1])


def lookup(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """A prompt in which an n-gram speculator finds many of the answer's tokens, whatever the model says."""
    return greedy(llm, [VOCABULARY], max_tokens=4 * MAX_TOKENS)


def twice(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """The same prompt twice: the second one's beginning comes from the prefix cache."""
    return one_after_another([greedy(llm, LONG[:1]), greedy(llm, LONG[:1])])


def adapters(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Adapters come, stand side by side in one batch, and leave.

    No request without an adapter is in that batch: vLLM's CPU build would give it an adapter too, on both paths.
    """
    from vllm.lora.request import LoRARequest

    first, second = (LoRARequest(Path(folder).name, i + 1, folder) for i, folder in enumerate(case["adapters"]))
    engine = llm.llm_engine
    prompts = [PROMPTS[0]] * 3
    runs = {"none": greedy(llm, prompts)}
    assert engine.add_lora(first)
    runs["first"] = greedy(llm, prompts, [first] * 3)
    runs["mixed"] = greedy(llm, prompts, [second, first, second])
    assert engine.remove_lora(1) and engine.list_loras() == {2}
    runs["second"] = greedy(llm, prompts, [second] * 3)
    assert engine.remove_lora(2) and not engine.list_loras()
    runs["removed"] = greedy(llm, prompts)
    return {**one_after_another(list(runs.values())), "tokens": {name: run["tokens"] for name, run in runs.items()}}


def reload(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Another checkpoint's weights into the running engine, then the first one's again."""
    runs = [greedy(llm, PROMPTS)]
    for folder in (case["other"], case["llm"]["model"]):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        llm.reset_prefix_cache()
        runs.append(greedy(llm, PROMPTS))
    return one_after_another(runs)


def sleep(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Asleep on level 1, from which the weights come back out of the CPU's memory, and on level 2, after which they are loaded again."""
    import torch

    runs, freed = [greedy(llm, PROMPTS)], []
    for level in (1, 2):
        before = torch.cuda.mem_get_info()[0]
        llm.sleep(level=level)
        assert llm.llm_engine.is_sleeping()
        freed.append(torch.cuda.mem_get_info()[0] - before)
        if level == 1:
            llm.wake_up()
        else:
            llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights")
            llm.wake_up(tags=["kv_cache"])
        assert not llm.llm_engine.is_sleeping()
        runs.append(greedy(llm, PROMPTS))
    return {**one_after_another(runs), "freed": freed}


def embed(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """One prompt at a time: few tokens in a run, which kernels take."""
    kernels = kernel_calls()
    vectors = [llm.embed([prompt], use_tqdm=False)[0].outputs.embedding for prompt in PROMPTS]
    return {"vectors": vectors, "kernels": kernel_calls() - kernels}


def experts(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    [modules] = llm.apply_model(lambda model: sorted({type(module).__name__ for module in model.modules()}))
    return {**greedy(llm, PROMPTS), "modules": modules}


def batch_invariant(llm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Releases keep the module that sets the mode in different places."""
    modules = [module for name, module in sys.modules.items() if name.endswith(".batch_invariant")]
    return {**greedy(llm, PROMPTS), "mode": any(getattr(module, "_batch_invariant_MODE", False) for module in modules)}


USES = {
    use.__name__: use
    for use in (
        plain,
        long_prompts,
        mixed_lengths,
        repetition,
        lookup,
        twice,
        adapters,
        reload,
        sleep,
        embed,
        experts,
        batch_invariant,
    )
}


def run(case: dict[str, Any]) -> dict[str, Any]:
    from vllm.model_executor.layers import fused_mirage_ops as mirage

    started = time.perf_counter()
    try:
        result = answer(case)
    except Exception as error:  # a row that this build cannot run: its model was built, so the path is told all the same
        trace = traceback.format_exc()
        result = {"error": f"{type(error).__name__}: {error}", "trace": trace, "reports": [mirage.mirage_report()]}
    return {**result, "seconds": time.perf_counter() - started}


def answer(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    llm = LLM(**{"max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 32 << 20, "seed": 0, **case["llm"]})
    try:
        before = reports(llm)
        result = USES[case["use"]](llm, case)
        after = reports(llm)
        calls = [dict(Counter(new["calls"]) - Counter(old["calls"])) for old, new in zip(before, after, strict=True)]
        graphs = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name
        return {**result, "reports": after, "calls": calls, "graphs": graphs}
    finally:
        llm.llm_engine.engine_core.shutdown()


def reports(llm: Any) -> list[dict[str, Any]]:
    """mirage_report() of each worker; of the one in this process also where no Qwen3 taught it to answer."""
    from vllm.model_executor.layers import fused_mirage_ops as mirage

    here = hasattr(llm.llm_engine.engine_core, "engine_core")
    return [mirage.mirage_report()] if here else mirage.collect_reports(llm)


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
