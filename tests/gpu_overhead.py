#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What an installed overlay costs on a GPU where no kernel of it runs: vLLM without the overlay against two idle ones.

    python tests/gpu_overhead.py --model 0.6B --starts 4 --json overhead.json

stock        vLLM as its wheel has it
off          with the overlay, VLLM_USE_MIRAGE=0
no kernel    with the overlay but without its kernels, VLLM_USE_MIRAGE=1

Two engines of the same vLLM differ by some percent in the times of a small model, start by start. So each arm starts several engines,
all are measured in turn, and the medians of the starts are compared, and the fastest starts. Stronger than any time: the kernels of a
decode step and of a prefill, by name and count, must be the same in all arms.

Exit status: 0 the same kernels, 1 other kernels or a failed measurement, 2 wrong input.
"""

import argparse
import functools
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import LAYERS, apply_overlay, copy_stock

import benchmark_mirage as benchmark

ARMS = {"stock": "0", "off": "0", "no kernel": "1"}  # and its VLLM_USE_MIRAGE


def make_sites(root: Path) -> dict[str, Path]:
    """A folder for PYTHONPATH for each arm, whose vllm is the installed one without or with the overlay."""
    sites = {arm: root / arm.replace(" ", "-") for arm in ARMS}
    with ThreadPoolExecutor() as pool:
        list(pool.map(make_site, sites, sites.values()))
    return sites


def make_site(arm: str, site: Path) -> None:
    site.mkdir()
    package = copy_stock(site)
    if arm != "stock":
        apply_overlay(package)
    if arm == "no kernel":
        shutil.rmtree(package / LAYERS / "mirage_kernels")


class Engine:
    """One start of an arm, and its samples in ms by what was measured."""

    def __init__(self, arm: str, site: Path, scratch: Path):
        self.arm, self.samples = arm, {}  # type: tuple[str, dict[str, list[float]]]
        path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", ""))))
        self.worker = benchmark.Worker(arm, scratch, True, PYTHONPATH=path, VLLM_USE_MIRAGE=ARMS[arm])

    def keep(self, times: dict[str, float]) -> None:
        for name, ms in times.items():
            self.samples.setdefault(name, []).append(ms)

    def decode(self, options: argparse.Namespace, model: benchmark.Model, batch: int) -> dict[str, float]:
        self.worker.call("fill", batch=batch, context=options.input_len[0], vocab=model.vocab, seed=0)
        return {str(batch): self.worker.call("step", replays=options.replays)}

    def prefill(self, options: argparse.Namespace, model: benchmark.Model) -> dict[str, float]:
        times = self.worker.call("prefill", vocab=model.vocab, seed=0)
        return {f"prefill, {name}": ms for name, ms in times.items()}

    def kernels(self, options: argparse.Namespace, model: benchmark.Model) -> dict[str, dict[str, int]]:
        return self.worker.call("kernels", batches=options.batch_sizes, context=options.input_len[0], vocab=model.vocab)

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])


def start_all(options: argparse.Namespace, settings: dict[str, Any], sites: dict[str, Path], scratch: Path) -> list[Engine]:
    """The first start of each arm compiles, the others find its graphs in the arm's cache."""
    engines: list[Engine] = []
    for count in (1, options.starts - 1):
        new = [Engine(arm, site, scratch) for _ in range(count) for arm, site in sites.items()]
        engines += new
        for engine in new:
            engine.worker.send("start", engine=settings)
        for engine in new:
            engine.worker.receive()
    return engines


def compare(engines: list[Engine]) -> list[dict[str, Any]]:
    """A row for each thing measured: median of the starts' medians for each arm, and the starts' spread."""
    rows = []
    for name in engines[0].samples:
        starts = {arm: [engine.median(name) for engine in engines if engine.arm == arm] for arm in ARMS}
        middle = {arm: statistics.median(times) for arm, times in starts.items()}
        rows.append({"what": name, "starts": starts, "median": middle, "ratio": {arm: middle["stock"] / middle[arm] for arm in ARMS}})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        spread = row["starts"]["stock"]
        cells = [row["what"], benchmark.digits(row["median"]["stock"]), f"{max(spread) / min(spread) - 1:.1%}"]
        fastest = {arm: min(spread) / min(row["starts"][arm]) for arm in ARMS}
        lines.append(cells + [f"{row['ratio'][arm]:.4f} ({fastest[arm]:.4f})" for arm in ARMS if arm != "stock"])
    benchmark.print_table(["batch", "stock, ms", "between its starts", "stock / off (fastest starts)", "stock / no kernel"], lines)


def run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="mirage-overhead-") as folder:
        scratch, engines = Path(folder), []
        model = benchmark.resolve_model(options.model, "bfloat16", scratch)
        settings = benchmark.engine_arguments(options, model, gpu=True)
        try:
            engines = start_all(options, settings, make_sites(scratch), scratch)
            steps: list[Callable[..., dict[str, float]]] = [functools.partial(Engine.decode, batch=batch) for batch in options.batch_sizes]
            for step in (*steps, Engine.prefill):
                for number in range(-1, options.num_iterations):  # the first round warms up
                    for engine in engines:
                        times = step(engine, options, model)
                        if number >= 0:
                            engine.keep(times)
            rows = compare(engines)
            show(rows)  # before the kernels are counted: should that fail, the times are not lost
            kernels = {engine.arm: engine.kernels(options, model) for engine in engines[: len(ARMS)]}
            environment = engines[-1].worker.call("describe")
        finally:
            for engine in engines:
                engine.worker.close()
    same = all(found == kernels["stock"] for found in kernels.values())
    print("The kernels of a decode step and of a prefill are " + ("the same in all arms." if same else "NOT the same in all arms."))
    result = {
        "command": "tests/gpu_overhead.py " + " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "environment": {key: environment[key] for key in ("gpu", "torch", "cuda", "vllm")} | {"state": benchmark.gpu_state()},
        "model": model.name,
        "same_kernels": same,
        "kernels": kernels["stock"] if same else kernels,
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(not same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=benchmark.QWEN3_SIZES, default="0.6B", help="dummy weights (default: %(default)s)")
    parser.add_argument("--starts", type=benchmark.positive, default=4, help="engines of each arm, all at once (default: %(default)s)")
    parser.add_argument("--num-iterations", type=benchmark.positive, default=4, help="rounds over all engines (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=benchmark.positive, nargs="+", default=[1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64])
    parser.add_argument("--json", type=Path, help="write every start's median to this file")
    given = parser.parse_args()
    import torch

    if not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None:
        print("tests/gpu_overhead.py measures GPU time: it needs vLLM and an NVIDIA GPU, and one of them is not here.", file=sys.stderr)
        return 2
    options = benchmark.parse(["--level", "step", "--replays", "50"])
    vars(options).update({key: value for key, value in vars(given).items() if value is not None}, dtype="bfloat16", enforce_eager=False)
    try:
        return run(options)
    except benchmark.MeasurementError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
