# SPDX-License-Identifier: Apache-2.0
"""Command line of the kernel generator: python -m mirage_codegen {graphs,generate,tune,own}."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def _report(stale: list[str], fresh_message: str) -> int:
    print("\n".join(stale) if stale else fresh_message)
    return 1 if stale else 0


def graphs(arguments: argparse.Namespace) -> int:
    """Exports the fused ops' μGraphs through Mirage, or checks that the stored ones are what Mirage exports."""
    from mirage_codegen import ops

    if arguments.check:
        return _report(ops.stale_graphs(), "The stored μGraphs are what Mirage exports.")
    for path in ops.write_graphs():
        print(f"wrote {path}")
    return 0


def generate(arguments: argparse.Namespace) -> int:
    """Lowers the stored μGraphs to CUDA, or checks that the shipped sources are what the lowering gives."""
    from mirage_codegen import generate as generator

    if arguments.check:
        return _report(generator.stale_files(), "The shipped kernels are what their μGraphs give.")
    for path in generator.write_files():
        print(f"wrote {path}")
    return 0


def tune(arguments: argparse.Namespace) -> int:
    """Measures plans on this machine's GPU and writes the plan table."""
    from mirage_codegen import tune as tuner

    return tuner.run(arguments)


def own(arguments: argparse.Namespace) -> int:
    """Compiles the CUDA that Mirage itself emits for rms_norm_linear, or measures on the GPU what was compiled."""
    from mirage_codegen import own_kernel

    return own_kernel.run(arguments)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m mirage_codegen", description="Fused ops as Mirage μGraphs, lowered to CUDA.")
    commands = top.add_subparsers(dest="command", required=True)
    for function in (graphs, generate):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.add_argument("--check", action="store_true", help="change nothing; exit 1 and say what differs")
        command.set_defaults(function=function)
    command = commands.add_parser("tune", help=tune.__doc__)
    models = "such as 0.6B, or 8B/2 for one of two tensor-parallel ranks (default: Qwen3 0.6B to 32B on one GPU, a few minutes each)"
    command.add_argument("--models", nargs="*", metavar="NAME", help=models)
    candidates = "plans tried for each op, form and token limit (default: 16)"
    command.add_argument("--candidates", type=_positive, default=16, metavar="N", help=candidates)
    measures = "in a step whose ops are all kernels, each op alone, or both (default)"
    command.add_argument("--measures", nargs="+", choices=("step", "alone"), default=("step", "alone"), metavar="HOW", help=measures)
    output = "the plan table to update (default: this user's, which wins over the shipped one)"
    command.add_argument("--output", metavar="FILE", help=output)
    command.set_defaults(function=tune)
    command = commands.add_parser("own", help=own.__doc__)
    job = command.add_mutually_exclusive_group(required=True)
    job.add_argument("--output", metavar="DIR", help="build libraries and index.json here (needs Mirage and nvcc, no GPU)")
    job.add_argument("--check", metavar="DIR", help="measure the libraries in here (needs a GPU, no Mirage)")
    command.add_argument("--shapes", nargs="+", metavar="KxN", help="such as 4096x6144 (default: Qwen3 0.6B, 1.7B, 4B and 8B)")
    command.add_argument("--tokens", nargs="+", type=int, metavar="M", help="a graph for each token count (default: 1 8 16)")
    command.add_argument("--json", metavar="FILE", help="with --check: also write what was measured here")
    command.set_defaults(function=own)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 done, 1 something differs, 2 bad input."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.function(arguments)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
