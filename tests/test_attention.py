# SPDX-License-Identifier: Apache-2.0
"""The decode attention kernel without a GPU: its own source, run on the CPU, against float64."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "patches/vllm/model_executor/layers")]

from mirage_codegen import emulate, generate  # noqa: E402
from mirage_codegen.lower import Kernel  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

HEAD, EPS, SCALE = 128, 1e-6, 128**-0.5
SOURCE = (generate.KERNELS_DIR / "decode_attention.cu").read_text()
KERNEL = Kernel("decode_attention", SOURCE, tuple(generate.HANDWRITTEN["decode_attention"]))


def macros(heads, kv_heads, cluster, warps):
    return {"MIRAGE_HEADS": heads, "MIRAGE_KV_HEADS": kv_heads, "MIRAGE_CLUSTER": cluster, "MIRAGE_WARPS": warps}


class Step:
    """A decode step over a paged cache: inputs as bf16 bits, `answer()` in float64 from those bits."""

    def __init__(self, seq_lens, heads, kv_heads, page, layout="NHD", seed=0):
        random = np.random.default_rng(seed)
        self.heads, self.kv_heads, self.page, self.layout = heads, kv_heads, page, layout
        self.seq_lens = np.array(seq_lens, np.int32)
        tokens, pages_each = len(seq_lens), max(1, -(-max(seq_lens) // page))
        pages = tokens * pages_each + 1
        self.table = (1 + random.permutation(tokens * pages_each).reshape(tokens, pages_each)).astype(np.int32)
        shape = (pages, page, kv_heads, 2 * HEAD) if layout == "NHD" else (pages, kv_heads, page, 2 * HEAD)
        self.cache = emulate.poisoned(shape)  # what no token has written is NaN
        view = self.view()
        for r, length in enumerate(seq_lens):
            for t in range(max(0, length - 1)):
                view[self.table[r, t // page], t % page] = emulate.to_bf16(random.standard_normal((kv_heads, 2 * HEAD)))
        width = (heads + 2 * kv_heads) * HEAD
        self.qkv = emulate.to_bf16(random.standard_normal((tokens, width)) * np.exp(random.standard_normal((tokens, 1))))
        self.gammas = [emulate.to_bf16(1 + 0.25 * random.standard_normal(HEAD)) for _ in range(2)]
        positions = max(1, *seq_lens) + 3
        angles = np.arange(positions)[:, None] * 10000.0 ** (-np.arange(64) / 64)[None]
        self.cos_sin = emulate.to_bf16(np.concatenate([np.cos(angles), np.sin(angles)], 1))
        self.positions = np.maximum(self.seq_lens - 1, 0).astype(np.int64)
        self.slots = np.array([self.slot(r) for r in range(tokens)], np.int64)

    def view(self):
        """The cache as [page, token in it, kv head, key and value]."""
        return self.cache if self.layout == "NHD" else self.cache.swapaxes(1, 2)

    def slot(self, r):
        last = int(self.seq_lens[r]) - 1
        return -1 if last < 0 else int(self.table[r, last // self.page]) * self.page + last % self.page

    def arguments(self, out):
        strides = [stride // 2 for stride in self.view().strides]
        names = {"O": out, "QKV": self.qkv, "G_q": self.gammas[0], "G_k": self.gammas[1], "cos_sin": self.cos_sin}
        names |= {"positions": self.positions, "cache": self.cache, "slots": self.slots, "block_table": self.table}
        names |= {"seq_lens": self.seq_lens, "page_stride": strides[0], "token_stride": strides[1], "head_stride": strides[2]}
        names |= {"page_size": self.page, "table_stride": self.table.shape[1], "num_tokens": len(self.seq_lens)}
        return names | {"eps": EPS, "scale": SCALE}

    def norm_and_rotate(self, x, gamma, position):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * emulate.from_bf16(gamma)
        cos, sin = np.split(emulate.from_bf16(self.cos_sin)[position], 2)
        low, high = x[..., :64], x[..., 64:]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    def answer(self):
        """(output [tokens, heads, 128], new keys and values [tokens, kv_heads, 256])"""
        qkv = emulate.from_bf16(self.qkv).reshape(len(self.seq_lens), -1, HEAD)
        outputs, written = [], []
        for r, length in enumerate(self.seq_lens):
            q = self.norm_and_rotate(qkv[r, : self.heads], self.gammas[0], self.positions[r])
            k = self.norm_and_rotate(qkv[r, self.heads : self.heads + self.kv_heads], self.gammas[1], self.positions[r])
            v = qkv[r, self.heads + self.kv_heads :]
            written.append(np.concatenate([k, v], -1))
            if length == 0:
                outputs.append(np.zeros((self.heads, HEAD)))
                continue
            old = [emulate.from_bf16(self.view()[self.table[r, t // self.page], t % self.page]) for t in range(length - 1)]
            keys = np.stack([*(entry[:, :HEAD] for entry in old), k])
            values = np.stack([*(entry[:, HEAD:] for entry in old), v])
            group = self.heads // self.kv_heads
            scores = np.einsum("hd,thd->ht", q, keys.repeat(group, 1)) * SCALE
            weights = np.exp(scores - scores.max(1, keepdims=True))
            outputs.append(np.einsum("ht,thd->hd", weights / weights.sum(1, keepdims=True), values.repeat(group, 1)))
        return np.stack(outputs), np.stack(written)


def run(step, folder, cluster, warps, seed=1, runtime=None):
    kernel = emulate.EmulatedKernel(KERNEL, macros(step.heads, step.kv_heads, cluster, warps), folder, runtime)
    out = emulate.poisoned((len(step.seq_lens) + 1, step.heads * HEAD))
    kernel(step.arguments(out), delayed=True, seed=seed)
    assert (out[-1] == 0x7FFF).all(), "written beyond its rows"
    return out[:-1]


def error(value, reference):
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.mark.parametrize(
    "heads, kv_heads, cluster, warps, page, layout",
    [(4, 2, 1, 2, 16, "NHD"), (4, 2, 2, 2, 16, "HND"), (8, 1, 4, 1, 32, "NHD"), (5, 1, 1, 4, 16, "NHD")],
)
def test_equals_float64_and_writes_the_cache(folder, heads, kv_heads, cluster, warps, page, layout):
    step = Step([1, 17, 0, 2, 75, 33], heads, kv_heads, page, layout)
    expected, written = step.answer()
    before = step.cache.copy()
    out = run(step, folder, cluster, warps)
    result = emulate.from_bf16(out).reshape(expected.shape)
    for r, length in enumerate(step.seq_lens):
        if length == 0:
            assert (result[r] == 0).all()
        else:
            assert error(result[r], expected[r]) < 6e-3, (r, length)
    # the new token's key and value, and not one byte more
    for r, slot in enumerate(step.slots):
        if slot >= 0:
            place = step.view()[slot // page, slot % page]
            assert error(emulate.from_bf16(place), written[r]) < 3e-3
            old = before if layout == "NHD" else before.swapaxes(1, 2)
            old[slot // page, slot % page] = place
    assert (before == step.cache).all()


def test_the_order_of_warps_does_not_show(folder):
    step = Step([40, 90], 4, 2, 16)
    cache = step.cache.copy()
    first = run(step, folder, 2, 2, seed=1).copy()
    step.cache[...] = cache
    assert (run(step, folder, 2, 2, seed=2) == first).all()


def test_nan_stays_in_its_request(folder):
    step = Step([20, 20, 20], 4, 2, 16)
    step.qkv[1, 7] = 0x7FFF  # in q head 0
    out = emulate.from_bf16(run(step, folder, 2, 2)).reshape(3, 4, HEAD)
    assert np.isnan(out[1, 0]).all() and np.isnan(out).sum() == HEAD


@pytest.mark.parametrize("statement", ["  block_barrier();\n  const bool has_new", "  cluster_arrive();\n  cluster_wait();\n  for"])
def test_a_barrier_removed_is_caught(folder, statement):
    assert SOURCE.count(statement) == 1
    broken = Kernel("decode_attention", SOURCE.replace(statement, statement.splitlines()[-1]), KERNEL.arguments)
    step = Step([70, 50], 4, 2, 16)
    expected, _ = step.answer()
    kernel = emulate.EmulatedKernel(broken, macros(4, 2, 2, 2), folder)
    errors = []
    for seed in range(3):
        out = emulate.poisoned((2, 4 * HEAD))
        kernel(step.arguments(out), delayed=True, seed=seed)
        errors.append(error(emulate.from_bf16(out).reshape(expected.shape), expected))
    assert not max(errors) < 6e-3
