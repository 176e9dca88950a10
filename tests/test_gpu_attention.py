# SPDX-License-Identifier: Apache-2.0
"""The decode-attention kernel on a GPU: right for every number of requests, length and cache layout, in graphs, run after run.

The error is ‖out − expected‖ / ‖expected‖ against float64 (q/k norm, RoPE and softmax from the same 16-bit inputs), and is compared with
that of an unfused path in the same 16-bit type: q and k rounded where vLLM rounds them, softmax in fp32, its weights rounded as
FlashAttention rounds them.
"""

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "patches/vllm/model_executor/layers"))
import mirage_kernels
from mirage_kernels import plans

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

EPS, HEAD, SCALE, DEVICE = 1e-6, 128, 128**-0.5, torch.device("cuda", 0)
LONGEST = 3000
LENGTHS = (0, 1, 2, 15, 16, 17, 33, 100, 255, 256, 257, 1000, LONGEST)
TOKENS = (1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 48, 63, 64)
HEADS = [(16, 8), (32, 8), (40, 8), (64, 8)]  # Qwen3 0.6B and 1.7B, 4B and 8B, 14B, 32B
each_layout = pytest.mark.parametrize(("layout", "page"), [("NHD", 16), ("NHD", 32), ("HND", 16), ("HND", 32)])
each_heads = pytest.mark.parametrize(("heads", "kv_heads"), HEADS)


@functools.cache
def prepare(heads, kv_heads, dtype=torch.bfloat16):
    """The kernel with the shipped plans; with some that cover every cluster size where none are shipped."""
    major, minor = torch.cuda.get_device_capability(DEVICE)
    entries = plans.read_table(plans.TABLE).get(f"sm_{major}{minor}", {}).get("decode_attention", {}).get(f"{heads}x{kv_heads}")
    found = [plans.AttentionPlan(**entry) for entry in entries or []] or [
        plans.AttentionPlan(limit, cluster if major >= 9 else 1, warps)
        for limit, cluster, warps in ((2, 8, 2), (8, 4, 4), (32, 2, 4), (64, 1, 8))
    ]
    kernel = mirage_kernels.prepare_attention(heads=heads, kv_heads=kv_heads, dtype=dtype, device=DEVICE, plans=found)
    assert not isinstance(kernel, str), kernel
    return kernel


def normal(*size):
    return torch.randn(size, device=DEVICE)


class Step:
    """A decode step over a paged cache whose pages lie scattered. What no token has written is NaN, and page 0 is nobody's."""

    def __init__(self, seq_lens, heads, kv_heads, layout="NHD", page=16, dtype=torch.bfloat16, longest=LONGEST):
        self.heads, self.kv_heads, self.page, self.dtype = heads, kv_heads, page, dtype
        tokens, self.pages_each = len(seq_lens), -(-longest // page)
        pages = tokens * self.pages_each + 1
        shape = (pages, page, kv_heads, 2 * HEAD) if layout == "NHD" else (pages, kv_heads, page, 2 * HEAD)
        memory = torch.empty(shape, dtype=dtype, device=DEVICE)
        self.cache = memory.transpose(1, 2) if layout == "NHD" else memory  # [pages, kv_heads, page, key and value]
        self.qkv = torch.empty(tokens, (heads + 2 * kv_heads) * HEAD, dtype=dtype, device=DEVICE)
        self.seq_lens = torch.empty(tokens, dtype=torch.int32, device=DEVICE)
        self.table = torch.empty(tokens, self.pages_each, dtype=torch.int32, device=DEVICE)
        self.positions, self.slots = (torch.empty(tokens, dtype=torch.int64, device=DEVICE) for _ in range(2))
        self.gammas = [(1 + 0.25 * normal(HEAD)).to(dtype) for _ in range(2)]
        angle = torch.arange(longest, device=DEVICE)[:, None] * 1e6 ** (-torch.arange(HEAD // 2, device=DEVICE) / 64)
        self.angles = torch.cat([angle.cos(), angle.sin()], -1).to(dtype)
        self.fill(seq_lens)

    def fill(self, seq_lens):
        """New requests of these lengths in the same memory, as a replayed graph meets them."""
        self.seq_lens.copy_(torch.tensor(seq_lens))
        last = (self.seq_lens.long() - 1).clamp(min=0)
        self.positions.copy_(last)
        self.table.copy_((1 + torch.randperm(self.table.numel(), device=DEVICE)).view_as(self.table))
        self.qkv.copy_(normal(*self.qkv.shape) * normal(len(seq_lens), 1).exp())
        self.cache.normal_()
        cached = torch.arange(self.pages_each * self.page, device=DEVICE) < last[:, None]
        written = torch.zeros(self.cache.shape[0], self.page, dtype=torch.bool, device=DEVICE)
        written[self.table.flatten().long()] = cached.view(-1, self.page)
        self.cache.masked_fill_(~written[:, None, :, None], float("nan"))
        page = self.table.gather(1, (last // self.page)[:, None])[:, 0]
        self.slots.copy_(torch.where(self.seq_lens > 0, page * self.page + last % self.page, -1))

    def run(self, kernel, out=None):
        """[tokens, heads · 128]; `out` may be given."""
        out = self.qkv.new_empty(len(self.qkv), self.heads * HEAD) if out is None else out
        tensors = (self.qkv, self.positions, *self.gammas, self.angles, self.cache, self.slots, self.table, self.seq_lens)
        kernel(*tensors, EPS, SCALE, out)
        return out

    def bits(self):
        """The cache, so that NaN equals itself."""
        return self.cache.contiguous().view(torch.int16).clone()

    def new_tokens(self, exact):
        """q [tokens, heads, 128] and k [tokens, kv_heads, 128], normalised and rotated: in float64, or as vLLM rounds them."""
        wide, narrow = (torch.float64, torch.float64) if exact else (torch.float32, self.dtype)
        x = self.qkv.view(len(self.qkv), -1, HEAD)[:, : self.heads + self.kv_heads]
        cos, sin = self.angles[self.positions].to(narrow).unsqueeze(1).chunk(2, -1)

        def one(part, gamma):
            part = part.to(wide)
            normed = (part * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + EPS)).to(narrow) * gamma.to(narrow)
            low, high = normed.chunk(2, -1)
            return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

        return one(x[:, : self.heads], self.gammas[0]), one(x[:, self.heads :], self.gammas[1])

    def answer(self, exact):
        """Attention's output [tokens, heads · 128]: in float64, or by the unfused path."""
        q, k = self.new_tokens(exact)
        v = self.qkv.view(len(self.qkv), -1, HEAD)[:, -self.kv_heads :]
        wide, narrow = (torch.float64, torch.float64) if exact else (torch.float32, self.dtype)
        out = torch.zeros(len(q), self.heads, HEAD, dtype=narrow, device=DEVICE)
        for r, length in enumerate(self.seq_lens.tolist()):
            if length == 0:
                continue
            old = self.cache[self.table[r, : -(-length // self.page)].long()]  # [pages, kv_heads, page, 256]
            old = old.transpose(0, 1).flatten(1, 2)[:, : length - 1].to(wide)  # [kv_heads, length - 1, 256]
            keys = torch.cat([old[..., :HEAD], k[r, :, None].to(wide)], 1)
            values = torch.cat([old[..., HEAD:], v[r, :, None].to(wide)], 1)
            scores = torch.einsum("kgd,ktd->kgt", q[r].view(self.kv_heads, -1, HEAD).to(wide), keys) * SCALE
            weights = scores.softmax(-1).to(narrow).to(wide)
            out[r] = torch.einsum("kgt,ktd->kgd", weights, values).flatten(0, 1)
        return out.flatten(1)


def error(out, reference):
    return ((out.double() - reference).norm() / reference.norm()).item()


def lengths(count):
    """That many of LENGTHS, drawn at random; the first is not 0."""
    drawn = [LENGTHS[i] for i in torch.randint(len(LENGTHS), (count,)).tolist()]
    return [drawn[0] or 17, *drawn[1:]]


def up_to_limit(kernel, counts):
    """Those numbers of requests that the kernel takes, and its limit."""
    return sorted({count for count in counts if count < kernel.max_tokens} | {kernel.max_tokens})


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


class Errors:
    """Squared errors of the kernel and of the unfused path over many steps; one step by itself is held to what no wrong kernel meets."""

    def __init__(self):
        self.kernel = self.unfused = 0.0

    def add(self, out, step):
        reference = step.answer(exact=True)
        ours, stock = error(out, reference), error(step.answer(exact=False), reference)
        assert ours <= 2 * stock, step.seq_lens.tolist()
        self.kernel += ours**2
        self.unfused += stock**2

    def check(self):
        assert 0 < self.kernel**0.5 <= 1.05 * self.unfused**0.5


@each_layout
@each_heads
def test_error_is_at_most_the_unfused_paths(heads, kv_heads, layout, page):
    kernel, errors = prepare(heads, kv_heads), Errors()
    for seq_lens in [[length] for length in LENGTHS if length] + [lengths(count) for count in up_to_limit(kernel, TOKENS)]:
        step = Step(seq_lens, heads, kv_heads, layout, page)
        errors.add(step.run(kernel), step)
    errors.check()


@each_heads
def test_float16_error_is_at_most_the_unfused_paths(heads, kv_heads):
    kernel, errors = prepare(heads, kv_heads, torch.float16), Errors()
    for count in up_to_limit(kernel, (1, 4, 16)):
        step = Step(lengths(count), heads, kv_heads, dtype=torch.float16)
        errors.add(step.run(kernel), step)
    errors.check()


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS[:2])
def test_every_number_of_requests(heads, kv_heads):
    kernel, errors = prepare(heads, kv_heads), Errors()
    for count in range(1, kernel.max_tokens + 1):
        step = Step([min(length, 257) for length in lengths(count)], heads, kv_heads, longest=257)
        errors.add(step.run(kernel), step)
    errors.check()


@each_layout
@each_heads
def test_the_cache_gets_the_new_tokens_and_no_other_byte(heads, kv_heads, layout, page):
    kernel, squares = prepare(heads, kv_heads), torch.zeros(2, dtype=torch.float64)
    for count in up_to_limit(kernel, (1, 7, 40)):
        step = Step(lengths(count), heads, kv_heads, layout, page)
        before = step.bits()
        step.run(kernel)
        real = step.slots >= 0
        pages, rows = step.slots[real] // page, step.slots[real] % page
        stored = step.cache[pages, :, rows]  # [requests, kv_heads, 256]
        exact, unfused = (step.new_tokens(exact)[1][real] for exact in (True, False))
        squares += torch.tensor([error(keys, exact) ** 2 for keys in (stored[..., :HEAD], unfused)], dtype=torch.float64)
        assert torch.equal(stored[..., HEAD:], step.qkv.view(count, -1, HEAD)[real, -kv_heads:])
        after = step.bits()
        assert not torch.equal(after, before)
        after[pages, :, rows] = before[pages, :, rows]
        assert torch.equal(after, before)
    assert squares[0] ** 0.5 <= 1.05 * squares[1] ** 0.5


@each_heads
def test_every_output_is_written_and_nothing_beyond(heads, kv_heads):
    kernel = prepare(heads, kv_heads)
    for count in up_to_limit(kernel, (1, 2, 9, 32)):
        step = Step(lengths(count), heads, kv_heads)
        poisoned = torch.full((count + 3, heads * HEAD), float("nan"), dtype=step.dtype, device=DEVICE)
        step.run(kernel, poisoned[:count])
        assert not poisoned[:count].isnan().any() and poisoned[count:].isnan().all()
        assert (poisoned[:count][step.seq_lens == 0] == 0).all()  # rows of padding


@pytest.mark.parametrize("part", ["query", "key", "value"])
@each_heads
def test_nan_stays_in_its_heads(heads, kv_heads, part):
    kernel, group = prepare(heads, kv_heads), heads // kv_heads
    head = {"query": 0, "key": heads, "value": heads + kv_heads}[part]
    for count in up_to_limit(kernel, (3, 20)):
        step = Step([100] * count, heads, kv_heads, longest=100)
        right = step.run(kernel).view(count, heads, HEAD)
        step.qkv[1, head * HEAD + 7] = float("nan")
        out = step.run(kernel).view(count, heads, HEAD)
        # one element of a value spoils one column, a query its head, a key the heads that share it
        spoilt = torch.zeros_like(out, dtype=torch.bool)
        columns = slice(7, 8) if part == "value" else slice(None)
        spoilt[1, : 1 if part == "query" else group, columns] = True
        assert torch.equal(out.isnan(), spoilt)
        assert torch.equal(out[~spoilt], right[~spoilt])


@each_heads
def test_three_hundred_runs_are_bitwise_equal(heads, kv_heads):
    kernel = prepare(heads, kv_heads)
    for count in up_to_limit(kernel, (1, 7, 16)):
        step = Step(lengths(count), heads, kv_heads)
        first, different = step.run(kernel), torch.zeros((), dtype=torch.int64, device=DEVICE)
        cache = step.bits()
        for _ in range(300):
            different += (step.run(kernel) != first).sum()
        assert different.item() == 0 and torch.equal(step.bits(), cache)


@pytest.mark.parametrize("count", [1, 8, 33])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS[:2])
def test_graph_replay_follows_lengths_tables_and_inputs(heads, kv_heads, count):
    kernel, errors = prepare(heads, kv_heads), Errors()
    count = min(count, kernel.max_tokens)
    step = Step(lengths(count), heads, kv_heads)
    step.run(kernel)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moved = step.qkv * 1  # a predecessor on the stream, whose result the kernel reads at once
        given, step.qkv = step.qkv, moved
        out = step.run(kernel)
        step.qkv = given
    for _ in range(20):
        step.fill(lengths(count))
        cache = step.cache.clone()
        graph.replay()
        by_graph, written = out.clone(), step.bits()
        step.cache.copy_(cache)
        assert torch.equal(by_graph, step.run(kernel)) and torch.equal(written, step.bits())
        errors.add(by_graph, step)
    errors.check()
