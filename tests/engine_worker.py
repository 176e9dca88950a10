# SPDX-License-Identifier: Apache-2.0
"""Run the real vLLM engine for run_engines() of engines.py, in a process of its own.

    python engine_worker.py CASES.json RESULTS.json

Each case: {"name", "env": {…}, "llm": arguments of LLM, "piecewise": bool, "lora": adapter folder or null,
"set_use_mirage": bool or null, "long": lengths of single prompts}.  Each result: {"tokens", "logprobs", "lora_tokens",
"long": a step with each of those prompts, "reports", "error", "version"}.
The engines of one process run one after another; an exception of a case is its result.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Tokens, not text: what the tiny models answer to these is no matter of rounding, and the second answer repeats itself.
TOKENS = [
    [286, 72, 461, 265, 613, 28],
    [75, 329, 547, 273, 85, 201, 75, 329, 547, 297, 686, 201],
    [591, 532, 848, 28, 888, 383, 223, 289, 265, 381, 485, 486],
    [90],
]
PROMPTS = [{"prompt_token_ids": tokens} for tokens in TOKENS]
MAX_TOKENS = 12


def force_piecewise_backend() -> None:
    """Let vLLM's piecewise backend and its disk cache run on the CPU, as they do on a GPU.

    The CPU platform replaces them by a single traced graph, which never meets the cache.
    """
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def keep_mode(cls: Any, config: Any) -> None:
        compilation = config.compilation_config
        mode, wrap = compilation.mode, compilation.ir_enable_torch_wrap
        update(cls, config)
        if mode == CompilationMode.VLLM_COMPILE:
            compilation.mode, compilation.ir_enable_torch_wrap = mode, wrap
            compilation.backend, compilation.compile_sizes = "inductor", []

    CpuPlatform.check_and_update_config = classmethod(keep_mode)  # type: ignore[assignment,method-assign]
    # The pass names CUDA-only ops.
    FixFunctionalizationPass.__call__ = lambda self, graph: None  # type: ignore[method-assign]


def generate(llm: Any, lora: str | None) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=1)
    answers = [answer.outputs[0] for answer in llm.generate(PROMPTS, sampling, use_tqdm=False)]
    result = {
        "tokens": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
            for answer in answers
        ],
    }
    if lora:
        request = LoRARequest("adapter", 1, lora)
        adapted = llm.generate(PROMPTS, sampling, use_tqdm=False, lora_request=request)
        result["lora_tokens"] = [list(answer.outputs[0].token_ids) for answer in adapted]
    return result


def decode_once(llm: Any, length: int) -> list[int]:
    """The five likeliest tokens after a prompt of that many tokens."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": [(7 * i) % 251 + 1 for i in range(length)]}
    [answer] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, logprobs=5), use_tqdm=False)
    return sorted(answer.outputs[0].logprobs[0])


def reports_of(llm: Any) -> list[dict[str, Any]] | None:
    """mirage_report() of every worker; None of stock vLLM."""
    try:
        from vllm.model_executor.layers.fused_mirage_ops import collect_reports
    except ImportError:
        return None
    return collect_reports(llm)


def run(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    if case.get("set_use_mirage") is not None:
        from vllm.model_executor.layers.fused_mirage_ops import set_use_mirage

        set_use_mirage(case["set_use_mirage"])
    arguments = {"max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 32 << 20, "seed": 0}
    llm = LLM(**arguments, **case["llm"])
    try:
        result = generate(llm, case.get("lora"))
        if (reports := reports_of(llm)) is not None:
            result["reports"] = reports
        result["long"] = [{"tokens": decode_once(llm, length), "reports": reports_of(llm)} for length in case.get("long", [])]
        return result
    finally:
        llm.llm_engine.engine_core.shutdown()


def main(run: Callable[[dict[str, Any]], dict[str, Any]] = run) -> None:
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    cases = json.loads(Path(sys.argv[1]).read_text())
    if any(case.get("piecewise") for case in cases):
        force_piecewise_backend()
    environment = dict(os.environ)
    results = {}
    collect, gc.collect = gc.collect, lambda generation=2: 0  # vLLM collects eight times an engine, 0.2 s each: once is enough
    for case in cases:
        os.environ.clear()
        os.environ.update(environment, **case.get("env", {}))
        try:
            results[case["name"]] = run(case)
        except Exception as error:  # the case's result; the tests assert on it
            results[case["name"]] = {"error": f"{type(error).__name__}: {error}"}
        results[case["name"]]["version"] = vllm.__version__
        collect()
        cleanup_dist_env_and_memory()
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
