#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check whether Mirage's kernels can run here, and say what mends what can't. Changes nothing; `./install.sh --doctor` calls it.

    doctor.py [--vllm-dir DIR]      with the Python that runs vLLM

Each check is a function of a Machine that returns a state and a sentence. ok: as it should be. warn: vLLM runs, but without
Mirage's kernels or with something to know. FAIL: to be mended; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import overlay_files

OK, WARN, FAIL = "ok", "warn", "FAIL"
COLOURS = {OK: "32", WARN: "33", FAIL: "31"}
SWITCH, SWITCH_VALUES = "VLLM_USE_MIRAGE", ("0", "1", "strict")
OPS_SWITCH = "VLLM_MIRAGE_OPS"
PACKAGE = "model_executor/layers/mirage_kernels"
SHIPPED = Path(__file__).resolve().parent / "vllm"
OP, K, N, EPS = "rms_norm_linear", 1024, 4096, 1e-6  # the QKV shape of Qwen3-0.6B
TOKENS = (1, 8)
MAX_ERROR = 2.0  # of the kernel over the unfused path's: a single call varies, no wrong kernel comes close
SMI_LIMIT_S = 30

Result = tuple[str, str]


@dataclass(frozen=True)
class Machine:
    """What the checks look at; where something could not be had, the sentence why instead of it."""

    tree: overlay_files.Tree | str
    overlay: overlay_files.Overlay | str
    torch: Any  # module | str
    kernels: Any  # package mirage_kernels | str
    python: tuple[int, int] = sys.version_info[:2]
    device: str = "cuda:0"

    @property
    def arch(self) -> str | None:
        """Architecture of the first GPU that torch can use, such as "sm_90"; None if there is none."""
        if isinstance(self.torch, str) or not self.torch.cuda.is_available():
            return None
        major, minor = self.torch.cuda.get_device_capability(0)
        return f"sm_{major}{minor}"


def survey(vllm_dir: str | None) -> Machine:
    tree: overlay_files.Tree | str = f"no vLLM is installed for {sys.executable}; run ./install.sh, or give its folder to --vllm-dir."
    overlay: overlay_files.Overlay | str
    try:
        if vllm_dir:
            tree = overlay_files.open_tree(vllm_dir)
    except overlay_files.Refusal as refusal:
        tree = str(refusal)
    try:
        overlay = overlay_files.read_overlay()
    except overlay_files.Refusal as refusal:
        overlay = str(refusal)
    return Machine(tree, overlay, load("torch"), load("mirage_kernels", kernels_folder(tree)))


def kernels_folder(tree: overlay_files.Tree | str) -> Path:
    """The installed kernels, or this checkout's where none are installed."""
    installed = SHIPPED if isinstance(tree, str) else tree.root
    return next((root / PACKAGE for root in (installed, SHIPPED) if (root / PACKAGE / "__init__.py").is_file()), SHIPPED / PACKAGE)


def load(name: str, folder: Path | None = None) -> Any:
    """The module of that name, from `folder` if given (importing all of vLLM takes long), or one sentence why it does not import."""
    try:
        if folder is None:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # whatever a broken installation raises
        sys.modules.pop(name, None)
        return f"{name} cannot be imported ({one_line(error)})"


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# ---------------------------------------------------------------- software


def check_python(machine: Machine) -> Result:
    found = "{}.{}".format(*machine.python)
    if (3, 10) <= machine.python < (3, 15):
        return OK, f"{found} at {sys.executable}"
    return FAIL, f"found {found} at {sys.executable}, vLLM needs 3.10 to 3.14; give another interpreter to --python."


def check_torch(machine: Machine) -> Result:
    if isinstance(machine.torch, str):
        return FAIL, f"{machine.torch}; run ./install.sh, or give the Python that runs vLLM to --python."
    cuda = machine.torch.version.cuda
    return OK, f"{machine.torch.__version__}, built {f'for CUDA {cuda}' if cuda else 'without CUDA'}"


def check_vllm(machine: Machine) -> Result:
    """Is it a release that the overlay can build on? Judged by the release's own qwen3.py, wherever that lies now."""
    tree, overlay = machine.tree, machine.overlay
    if isinstance(tree, str) or isinstance(overlay, str):
        return FAIL, tree if isinstance(tree, str) else str(overlay)
    stock = overlay_files.stock_now_at(tree, overlay_files.examine(tree, overlay))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        problem = overlay_files.stock_problem(tree, stock)
    if problem:
        again = overlay_files.reinstall_command(tree)
        return FAIL, f"{problem}; install vLLM {overlay_files.supported()}, or reinstall a damaged one with {again}."
    if warning := said.getvalue().strip():
        return WARN, f"{warning.removeprefix('warning: ')} Tested are {overlay_files.supported()} as released."
    return OK, f"{tree.version} in {tree.root}, supported"


def check_overlay(machine: Machine) -> Result:
    if isinstance(machine.tree, str) or isinstance(machine.overlay, str):
        return FAIL, "cannot be checked without vLLM; run ./install.sh."
    found = overlay_files.status(machine.tree, machine.overlay)
    condition, version, files = found["overlay"], found["overlay_version"], found["files"]
    assert isinstance(files, dict)
    if condition == "none":
        return FAIL, "not installed; run ./install.sh."
    if condition == "manual":
        return WARN, f"{version}, copied by hand, so that later changes go unnoticed; run ./install.sh to record it."
    if condition != "installed":
        return FAIL, f"{condition}: {found['detail']} Run ./install.sh once that is settled; ./install.sh --status lists the files."
    if missing := [path for path, state in files.items() if state == "missing"]:
        return FAIL, f"{', '.join(missing)} is missing; run ./install.sh to put it back."
    if not found["up_to_date"]:
        return WARN, f"{version}, unchanged, but this checkout has other files ({found['checkout_version']}); run ./install.sh to update."
    return OK, f"{version}, {len(files)} files as installed"


def check_switches(_machine: Machine) -> Result:
    switch, ops = os.environ.get(SWITCH, "0"), os.environ.get(OPS_SWITCH, "all")
    known, names = known_ops(), {name.strip() for name in ops.split(",")}
    if switch not in SWITCH_VALUES:
        return FAIL, f"{SWITCH} is {switch!r}, expected 0, 1 or strict; export {SWITCH}=1."
    if names not in ({"all"}, {"none"}) and not names <= set(known):
        return FAIL, f"{OPS_SWITCH} is {ops!r}, expected all, none or a comma list of {', '.join(known)}; unset {OPS_SWITCH}."
    if switch == "0":
        return OK, f"{SWITCH} is 0 or unset: every layer takes the stock path; export {SWITCH}=1 for the fused path"
    return OK, f"{SWITCH}={switch}, {OPS_SWITCH}={ops}"


def known_ops() -> tuple[str, ...]:
    """OPS as mirage_ops.py writes it; importing that file would import vLLM."""
    module = ast.parse((SHIPPED / "model_executor/layers/mirage_ops.py").read_text())
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPS":
            return ast.literal_eval(node.value)
    raise ValueError("mirage_ops.py of this checkout names no OPS; run `git checkout -- patches`")


# ---------------------------------------------------------------- GPU and kernels


def check_gpu(machine: Machine) -> Result:
    listed = nvidia_smi()
    if machine.arch is None:
        if not listed:
            return WARN, "no NVIDIA GPU: with the switch on the PyTorch path will run, slower than stock vLLM; it serves testing."
        if isinstance(machine.torch, str) or machine.torch.version.cuda is None:
            return WARN, f"{listed} is there, but torch is not built for CUDA: the PyTorch path will run; install vLLM's CUDA build."
        return FAIL, f"torch cannot use {listed}; check CUDA_VISIBLE_DEVICES, and whether the driver is new enough for torch's CUDA."
    major, minor = machine.torch.cuda.get_device_capability(0)
    found = f"{machine.torch.cuda.get_device_name(0)}, {machine.arch}, {listed or 'driver unknown (nvidia-smi does not answer)'}"
    if not isinstance(machine.kernels, str) and major * 10 + minor < machine.kernels.MIN_CAPABILITY:
        return WARN, f"{found}: kernels need sm_{machine.kernels.MIN_CAPABILITY} or newer; the stock path will run."
    return OK, found


def nvidia_smi() -> str:
    """What nvidia-smi lists, such as "GPU 0: NVIDIA H200 with driver 580.82.07"; "" if there is no GPU or no nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=index,name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_LIMIT_S, check=True)
        rows = [line.split(", ") for line in done.stdout.splitlines()]
        return "; ".join(f"GPU {index}: {name} with driver {driver}" for index, name, driver in rows)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""


def check_nvrtc(machine: Machine) -> Result:
    if isinstance(machine.kernels, str):
        return FAIL, f"{machine.kernels}; run ./install.sh."
    try:
        return OK, f"{machine.kernels.compiler.nvrtc_version()}, compiles the kernels at the first start"
    except machine.kernels.compiler.CompileError as error:
        return (WARN, f"{error} (needed on a GPU only)") if machine.arch is None else (FAIL, f"{error}.")


def check_plans(machine: Machine) -> Result:
    if isinstance(machine.kernels, str):
        return FAIL, f"{machine.kernels}; run ./install.sh."
    plans = machine.kernels.plans
    try:
        own, shipped = plans.read_table(plans.user_table()), plans.read_table(plans.TABLE)
    except ValueError as error:
        return FAIL, str(error)
    if machine.arch is None:
        return WARN, f"for {', '.join(sorted(own.keys() | shipped.keys()))}; none is used without a GPU."
    if own.get(machine.arch, {}).keys() - {"alone", "measured"}:
        return OK, f"for {machine.arch}, measured on this machine ({plans.user_table()})"
    if machine.arch in shipped:
        return OK, f"for {machine.arch}, shipped"
    return WARN, f"none for {machine.arch}: the stock path will run; ./install.sh --tune measures them (a few minutes for each model)."


def check_cache(machine: Machine) -> Result:
    """Can the folder be written, or made, and by this user alone?"""
    if isinstance(machine.kernels, str):
        return FAIL, f"{machine.kernels}; run ./install.sh."
    folder = machine.kernels.plans.cache_folder()
    elsewhere = "set VLLM_CACHE_ROOT to a folder of your own"
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return FAIL, f"{existing} is not a folder; move it away, or {elsewhere}."
    if not os.access(existing, os.W_OK | os.X_OK):
        return FAIL, f"{existing} is not writable, so kernels cannot be kept; `chmod u+rwx` it, or {elsewhere}."
    if existing != folder:
        return OK, f"{folder} will be made at the first start"
    found = folder.stat()
    if found.st_uid != os.getuid():
        return FAIL, f"{folder} belongs to user {found.st_uid}, you are {os.getuid()}; {elsewhere}."
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return FAIL, f"others may write {folder} (mode {stat.S_IMODE(found.st_mode):o}); `chmod 700` it."
    return OK, f"{folder}, {len(list(folder.glob('*.cubin')))} compiled kernels"


def check_kernel(machine: Machine) -> Result:
    """Compile one kernel, past the user's cache, and hold its error against the unfused path's."""
    if machine.arch is None:
        return WARN, "not tried, for want of a GPU."
    if isinstance(machine.kernels, str):
        return FAIL, f"{machine.kernels}; run ./install.sh."
    plans = machine.kernels.plans.plans_for(OP, K, N, machine.arch)
    if isinstance(plans, str):
        return WARN, f"not tried: {plans}."
    device, dtype = machine.torch.device(machine.device), machine.torch.bfloat16
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, environment("VLLM_CACHE_ROOT", folder):
        kernel = machine.kernels.prepare(OP, k=K, n=N, dtype=dtype, device=device, plans=plans)
    if isinstance(kernel, str):
        return FAIL, f"{kernel}; without it the stock path runs."
    seconds = time.perf_counter() - started
    measured = []
    for num_tokens in TOKENS:
        ours, unfused = errors(machine, kernel, num_tokens)
        measured.append(f"{ours:.2e} for {num_tokens} tokens (unfused path {unfused:.2e})")
        if not ours <= MAX_ERROR * unfused:  # also true of NaN
            return FAIL, f"{K}→{N} is wrong: error {measured[-1]} against float64; export {SWITCH}=0 and report it with these lines."
    return OK, f"{K}→{N} compiled in {seconds:.1f} s; error against float64 {', '.join(measured)}"


def errors(machine: Machine, kernel: Any, num_tokens: int) -> tuple[float, float]:
    """‖out − expected‖ / ‖expected‖ of the kernel and of residual add, RMSNorm and GEMM one by one, in bfloat16 on random inputs."""
    torch = machine.torch
    generator = torch.Generator(machine.device).manual_seed(num_tokens)

    def normal(*size: int) -> Any:
        return torch.randn(size, generator=generator, device=machine.device)

    x, residual = normal(num_tokens, K).bfloat16(), normal(num_tokens, K).bfloat16()
    norm_weight, weight = (1 + 0.2 * normal(K)).bfloat16(), (0.02 * normal(N, K)).bfloat16()

    def norm(stream: Any) -> Any:  # [num_tokens, K], in the dtype of `stream`
        return stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + EPS)

    expected = norm(x.double() + residual.double()) * norm_weight.double() @ weight.double().t()
    unfused = norm(x.float() + residual.float()).bfloat16() * norm_weight @ weight.t()
    out, _ = kernel(x, residual, norm_weight, weight, EPS)

    def error(found: Any) -> float:
        return ((found.double() - expected).norm() / expected.norm()).item()

    return error(out), error(unfused)


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set one environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# ---------------------------------------------------------------- report

CHECKS: dict[str, Callable[[Machine], Result]] = {
    "Python": check_python,
    "torch": check_torch,
    "vLLM": check_vllm,
    "overlay": check_overlay,
    "switches": check_switches,
    "GPU": check_gpu,
    "NVRTC": check_nvrtc,
    "plans": check_plans,
    "cache": check_cache,
    "kernel": check_kernel,
}


def examine(machine: Machine) -> Iterator[tuple[str, str, str]]:
    """Name, state and sentence of every check; one that breaks is a FAIL, not the end."""
    for name, check in CHECKS.items():
        try:
            yield name, *check(machine)
        except Exception as error:
            yield name, FAIL, f"the check itself broke ({one_line(error)}); run ./install.sh --status and report it."


def paint(state: str) -> str:
    padded = f"{state:<4}"
    return f"\033[{COLOURS[state]}m{padded}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else padded


def report(machine: Machine) -> int:
    """Print a line for each check; the exit status."""
    states = []
    for name, state, sentence in examine(machine):
        print(f"{paint(state)}  {name:<8}  {sentence}", flush=True)
        states.append(state)
    return 1 if FAIL in states else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="doctor.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vllm-dir", metavar="DIR", help="vllm package folder, or a source tree with vllm/")
    arguments = parser.parse_args()
    sys.dont_write_bytecode = True
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != SHIPPED.parent]  # its vllm/ is not vLLM
    return report(survey(arguments.vllm_dir))


if __name__ == "__main__":
    sys.exit(main())
