# SPDX-License-Identifier: Apache-2.0
"""`./install.sh --doctor`: what each check says of a healthy machine and of a broken one. GPU, driver and kernels are stand-ins."""

import ast
import dataclasses
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests/fixtures"
sys.path.append(str(ROOT / "patches"))

import doctor  # noqa: E402
import overlay_files  # noqa: E402

sys.path.remove(str(ROOT / "patches"))  # its vllm/ is not vLLM

KERNELS = doctor.load("doctor_mirage_kernels", ROOT / "patches/vllm" / doctor.PACKAGE)
GPU = "GPU 0: NVIDIA H200 with driver 580.82.07"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A healthy machine without a GPU: the overlay is installed in a vLLM 0.33.0 and the switch is on."""
    package = tmp_path / "site/vllm"
    (package / "model_executor/models").mkdir(parents=True)
    (package / "model_executor/layers").mkdir()
    (package / "__init__.py").touch()
    (package / "_version.py").write_text("__version__ = version = '0.33.0'\n")
    shutil.copy(FIXTURES / "qwen3-0.33.0.py.txt", package / overlay_files.REPLACED)
    tree, overlay = overlay_files.open_tree(str(package)), overlay_files.read_overlay()
    overlay_files.install(tree, overlay, force=False, dry_run=False)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv(doctor.SWITCH, "1")
    monkeypatch.delenv(doctor.OPS_SWITCH, raising=False)
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: "")
    monkeypatch.setattr(KERNELS.compiler, "nvrtc_version", lambda: "13.0")
    without_gpu = torch_with(cuda=SimpleNamespace(is_available=lambda: False), version=SimpleNamespace(cuda=None))
    return doctor.Machine(tree, overlay, without_gpu, KERNELS, python=(3, 11))


def torch_with(**replaced):
    return SimpleNamespace(**{**vars(torch), **replaced})


def with_gpu(machine, monkeypatch, capability=(9, 0)):
    """The same machine with a GPU of that compute capability; its tensors are on the CPU."""
    cuda = SimpleNamespace(
        is_available=lambda: True, get_device_capability=lambda index: capability, get_device_name=lambda index: "NVIDIA H200"
    )
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: GPU)
    return dataclasses.replace(machine, torch=torch_with(cuda=cuda, version=SimpleNamespace(cuda="13.0")), device="cpu")


def states(machine):
    return {name: state for name, state, _ in doctor.examine(machine)}


def sentence(machine, check):
    return next(text for name, _, text in doctor.examine(machine) if name == check)


def prepares(monkeypatch, kernel):
    """Let `prepare` return `kernel` (or the sentence that it is); the list of cache folders it was called with."""
    folders = []

    def prepare(op, **arguments):
        folders.append(os.environ["VLLM_CACHE_ROOT"])
        return kernel

    monkeypatch.setattr(KERNELS, "prepare", prepare)
    return folders


def right_kernel(x, residual, norm_weight, weight, eps):
    stream = x.float() + residual.float()
    normed = stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + eps) * norm_weight.float()
    return (normed @ weight.float().t()).bfloat16(), None


def kernel_without_residual(x, residual, norm_weight, weight, eps):
    return right_kernel(x, torch.zeros_like(x), norm_weight, weight, eps)


def kernel_of_nan(*arguments):
    return right_kernel(*arguments)[0] * float("nan"), None


# ---------------------------------------------------------------- without a GPU


def test_a_healthy_machine_without_a_gpu_has_no_failure(machine, capsys):
    assert doctor.report(machine) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(doctor.CHECKS)
    found = {line.split()[1]: line.split()[0] for line in lines}
    assert found == {name: "warn" if name in ("GPU", "plans", "kernel") else "ok" for name in doctor.CHECKS}
    assert "the PyTorch path will run" in sentence(machine, "GPU")


@pytest.mark.parametrize(
    "variable, value, state",
    [
        (doctor.SWITCH, "strict", "ok"),
        (doctor.SWITCH, "yes", "FAIL"),
        (doctor.SWITCH, "", "FAIL"),
        (doctor.OPS_SWITCH, " none ", "ok"),
        (doctor.OPS_SWITCH, "norm_qkv", "ok"),
        (doctor.OPS_SWITCH, "norm_qkv,no_op", "FAIL"),
        (doctor.OPS_SWITCH, "all,norm_qkv", "FAIL"),
    ],
)
def test_a_switch_is_judged_as_the_overlay_judges_it(machine, monkeypatch, capsys, variable, value, state):
    monkeypatch.setenv(variable, value)
    assert states(machine)["switches"] == state == overlays_own_judgement()
    assert doctor.report(machine) == (state == "FAIL")
    assert state == "ok" or f"{variable} is {value!r}" in capsys.readouterr().out


def overlays_own_judgement():
    """What mirage_switch() and enabled_ops() say, taken out of fused_mirage_ops.py because importing that imports vLLM."""
    source = (ROOT / "patches/vllm/model_executor/layers/fused_mirage_ops.py").read_text()
    wanted = ("mirage_switch", "enabled_ops")
    functions: list[ast.stmt] = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    names: dict[str, Any] = {"os": os, "SWITCH": doctor.SWITCH, "OPS_SWITCH": doctor.OPS_SWITCH, "OPS": doctor.known_ops()}
    exec(compile(ast.Module(functions, []), "fused_mirage_ops.py", "exec"), names)
    try:
        for name in wanted:
            names[name]()
    except ValueError:
        return "FAIL"
    return "ok"


def test_a_changed_file_is_named(machine):
    changed = machine.tree.path(doctor.PACKAGE) / "plans.py"
    changed.write_text(changed.read_text() + "# mine\n")
    assert states(machine)["overlay"] == "FAIL"
    assert str(changed) in sentence(machine, "overlay")


def test_a_missing_file_is_named(machine):
    (machine.tree.path(doctor.PACKAGE) / "linear.cu").unlink()
    assert states(machine)["overlay"] == "FAIL"
    assert "linear.cu is missing; run ./install.sh" in sentence(machine, "overlay")


def test_an_overlay_that_is_not_installed_fails(machine):
    overlay_files.uninstall(machine.tree, machine.overlay, force=False, dry_run=False)
    assert states(machine)["overlay"] == "FAIL"
    assert states(machine)["vLLM"] == "ok"


def test_an_upgrade_underneath_the_overlay_fails(machine):
    shutil.copy(FIXTURES / "qwen3-0.33.0.py.txt", machine.tree.path(overlay_files.REPLACED))
    assert states(machine)["overlay"] == "FAIL"
    assert "underneath the overlay" in sentence(machine, "overlay")


def test_an_unsupported_vllm_fails(machine):
    machine.tree.path("_version.py").write_text("__version__ = version = '0.25.1'\n")
    assert states(machine)["vLLM"] == "FAIL"
    assert "found vLLM 0.25.1, expected 0.26 to 0.33" in sentence(machine, "vLLM")


def test_no_vllm_and_no_torch_are_two_failures_with_their_mend(capsys):
    no_vllm, no_torch = "no vLLM is installed; run ./install.sh.", "torch cannot be imported (x)"
    machine = doctor.Machine(no_vllm, overlay_files.read_overlay(), no_torch, KERNELS)
    assert doctor.report(machine) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert [line.split()[1] for line in lines] == ["torch", "vLLM", "overlay"]
    assert all("./install.sh" in line for line in lines)


def test_a_python_that_vllm_does_not_run_on_fails(machine):
    assert states(dataclasses.replace(machine, python=(3, 9)))["Python"] == "FAIL"


def test_a_package_that_does_not_import_is_a_sentence(tmp_path):
    (tmp_path / "__init__.py").write_text("raise RuntimeError('two\\nlines')")
    assert doctor.load("mirage_kernels_broken", tmp_path) == "mirage_kernels_broken cannot be imported (RuntimeError: two lines)"
    assert "mirage_kernels_broken" not in sys.modules


def test_a_check_that_breaks_does_not_end_the_others(machine, monkeypatch):
    monkeypatch.setitem(doctor.CHECKS, "GPU", lambda machine: 1 / 0)
    assert states(machine)["GPU"] == "FAIL"
    assert states(machine)["cache"] == "ok"


# ---------------------------------------------------------------- cache


def cache(tmp_path):
    folder = tmp_path / "cache/mirage_kernels"
    folder.mkdir(parents=True, mode=0o700)
    return folder


def test_the_cache_counts_its_kernels(machine, tmp_path):
    (cache(tmp_path) / "a.cubin").touch()
    assert "1 compiled kernels" in sentence(machine, "cache")


def test_a_cache_that_others_may_write_fails(machine, tmp_path):
    cache(tmp_path).chmod(0o777)
    assert states(machine)["cache"] == "FAIL"
    assert "mode 777" in sentence(machine, "cache")


def test_a_cache_of_another_user_fails(machine, tmp_path, monkeypatch):
    owner = cache(tmp_path).stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert states(machine)["cache"] == "FAIL"


@pytest.mark.parametrize("exists", [True, False])
def test_a_cache_that_cannot_be_written_fails(machine, tmp_path, monkeypatch, exists):
    unwritable = cache(tmp_path) if exists else tmp_path
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != unwritable)  # root may write everywhere
    assert states(machine)["cache"] == "FAIL"
    assert f"{unwritable} is not writable" in sentence(machine, "cache")


def test_a_file_in_the_place_of_the_cache_fails(machine, tmp_path):
    (tmp_path / "cache").write_text("")
    assert states(machine)["cache"] == "FAIL"
    assert f"{tmp_path / 'cache'} is not a folder" in sentence(machine, "cache")


# ---------------------------------------------------------------- with a GPU


def test_a_healthy_gpu_is_all_ok_and_its_kernel_is_compiled_past_the_users_cache(machine, monkeypatch, tmp_path):
    folders = prepares(monkeypatch, right_kernel)
    machine = with_gpu(machine, monkeypatch)
    assert set(states(machine).values()) == {"ok"}
    assert "sm_90" in sentence(machine, "GPU") and "driver 580.82.07" in sentence(machine, "GPU")
    assert folders and str(tmp_path / "cache") not in folders
    assert not any(map(os.path.exists, folders))
    assert os.environ["VLLM_CACHE_ROOT"] == str(tmp_path / "cache")


@pytest.mark.parametrize("kernel", [kernel_without_residual, kernel_of_nan])
def test_a_kernel_that_computes_something_else_fails(machine, monkeypatch, kernel):
    prepares(monkeypatch, kernel)
    machine = with_gpu(machine, monkeypatch)
    assert states(machine)["kernel"] == "FAIL"
    assert "against float64" in sentence(machine, "kernel")


def test_a_kernel_that_cannot_be_built_fails_with_the_reason(machine, monkeypatch):
    prepares(monkeypatch, "the kernels cannot be built here: no luck")
    machine = with_gpu(machine, monkeypatch)
    assert states(machine)["kernel"] == "FAIL"
    assert "no luck" in sentence(machine, "kernel")


@pytest.mark.parametrize("gpu", [False, True])
def test_a_missing_nvrtc_fails_only_where_there_is_a_gpu(machine, monkeypatch, gpu):
    def missing():
        raise KERNELS.compiler.CompileError("NVRTC is not usable; mend with: pip install nvidia-cuda-nvrtc")

    monkeypatch.setattr(KERNELS.compiler, "nvrtc_version", missing)
    prepares(monkeypatch, right_kernel)
    machine = with_gpu(machine, monkeypatch) if gpu else machine
    assert states(machine)["NVRTC"] == ("FAIL" if gpu else "warn")
    assert "pip install nvidia-cuda-nvrtc" in sentence(machine, "NVRTC")


def test_an_architecture_without_plans_is_told_of_tuning(machine, monkeypatch):
    machine = with_gpu(machine, monkeypatch, (8, 6))
    found = states(machine)
    assert (found["plans"], found["kernel"]) == ("warn", "warn")
    assert "./install.sh --tune" in sentence(machine, "plans")


def test_a_gpu_that_is_too_old_is_told_so(machine, monkeypatch):
    machine = with_gpu(machine, monkeypatch, (7, 5))
    assert states(machine)["GPU"] == "warn"
    assert "kernels need sm_80" in sentence(machine, "GPU")


@pytest.mark.parametrize("built_for, state", [(None, "warn"), ("13.0", "FAIL")])
def test_a_gpu_that_torch_cannot_use_is_explained(machine, monkeypatch, built_for, state):
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: GPU)
    machine.torch.version.cuda = built_for
    assert states(machine)["GPU"] == state
    assert GPU in sentence(machine, "GPU")


def test_a_damaged_plan_table_of_the_user_fails_with_its_mend(machine, tmp_path):
    (cache(tmp_path) / "plans.json").write_text("{")
    assert states(machine)["plans"] == "FAIL"
    assert "./install.sh --tune" in sentence(machine, "plans")


def test_nvidia_smi_is_read_as_it_prints(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, NVIDIA H200, 580.82.07'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor.nvidia_smi() == GPU
    program.write_text("#!/bin/sh\nexit 9\n")
    assert doctor.nvidia_smi() == ""


def test_colour_only_on_a_terminal_and_never_with_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert doctor.paint("ok") == "ok  "
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert doctor.paint("ok") == "\033[32mok  \033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert doctor.paint("ok") == "ok  "
