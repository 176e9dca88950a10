# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: a stock and an overlaid copy of the installed vLLM, and tiny checkpoints.

The installed vLLM is never changed, and it may itself carry the overlay: both copies are made from its stock files.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[1]
PATCHES = REPOSITORY / "patches" / "vllm"
LAYERS = "model_executor/layers"
OURS = (*(f"{LAYERS}/{path.name}" for path in (PATCHES / LAYERS).iterdir() if path.name != "__pycache__"), ".mirage_overlay.json")

sys.path.insert(0, str(REPOSITORY))  # test_mirage_qwen3.py makes the tiny checkpoints
pytest.register_assert_rewrite("engines")


def _link_or_copy(source: str, target: str) -> str:
    """Shared libraries (400 MB) are hard-linked where that is possible; nothing ever writes into them."""
    if source.endswith(".so"):
        try:
            os.link(source, target)
            return target
        except OSError:
            pass
    return shutil.copy2(source, target)


def copy_stock(site: Path) -> Path:
    """Copy the installed vLLM to site/vllm, without the overlay if it has it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.fail("vLLM is not installed: run ./install.sh, then the tests with its Python")
    package = site / "vllm"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(spec.origin).parent, package, ignore=ignore, copy_function=_link_or_copy)
    models = package / "model_executor" / "models"
    if (models / "qwen3_stock.py").exists():
        (models / "qwen3_stock.py").replace(models / "qwen3.py")
        for name in OURS:
            path = package / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return package


def apply_overlay(package: Path) -> None:
    """Apply the overlay to a vllm package folder: with install.sh, or by the three manual copies."""
    installer = REPOSITORY / "install.sh"
    if installer.exists():
        done = subprocess.run(
            ["bash", str(installer), "--vllm-dir", str(package), "--no-mirage"],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return
    models = package / "model_executor" / "models"
    (models / "qwen3.py").rename(models / "qwen3_stock.py")
    shutil.copytree(PATCHES, package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, by make(folder) if there is none: whole or not there, also when several of pytest's workers ask for it at once."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            if not folder.exists():
                make(Path(scratch, "made"))
                Path(scratch, "made").rename(folder)
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this run, in which each of pytest's workers has its own."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def vllm_stock(run_folder: Path) -> Path:
    """A folder for PYTHONPATH whose vllm is stock."""
    return made_once(run_folder / "stock", copy_stock)


@pytest.fixture(scope="session")
def vllm_overlay(run_folder: Path) -> Path:
    """A folder for PYTHONPATH whose vllm has the overlay."""
    return made_once(run_folder / "overlay", lambda site: apply_overlay(copy_stock(site)))


@pytest.fixture(scope="session")
def ops(vllm_overlay: Path) -> Any:
    """The module fused_mirage_ops, imported into this process from the overlaid copy of vLLM."""
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    sys.path.insert(0, str(vllm_overlay))
    module = importlib.import_module("vllm.model_executor.layers.fused_mirage_ops")
    assert str(module.__file__).startswith(str(vllm_overlay)), "another vLLM was imported earlier in this process"
    return module


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_tiny(size="tiny", dtype="bfloat16"): the folder of a tiny random Qwen3, made once a session."""
    from test_mirage_qwen3 import make_tiny_qwen3

    made: dict[tuple[str, str], Path] = {}

    def make(size: str = "tiny", dtype: str = "bfloat16") -> Path:
        if (size, dtype) not in made:
            folder = tmp_path_factory.mktemp("model") / f"{size}-{dtype}"
            make_tiny_qwen3(folder, size=size, dtype=dtype)
            made[size, dtype] = folder
        return made[size, dtype]

    return make


@pytest.fixture(scope="session")
def tiny_model(make_tiny: Callable[..., Path]) -> Path:
    """A tiny bf16 Qwen3 checkpoint with a real tokenizer."""
    return make_tiny()
