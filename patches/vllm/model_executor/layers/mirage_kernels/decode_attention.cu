// SPDX-License-Identifier: Apache-2.0
// q/k RMSNorm + RoPE + KV-cache write + paged attention of a decode step: one new token for each request. Written by hand: Mirage 0.2.2 has
// no operator for a gather through a block table, nor for a softmax that is rescaled while it runs.
//
// A cluster serves one KV head of one request, so that q heads which share keys read them once; its warps take tiles of 16 cached tokens in
// turn, each with a softmax of its own (Milakov & Gimelshein's rescaling), and meet once at the end: no second kernel combines splits.
// Cached keys and values depend on no kernel of this step, so the first tile of every warp is asked for before the previous kernel is done;
// the new token's key and value come straight from the QKV projection and are merged as one more split.
//
// Scores are Q·Kᵀ with the heads as the 16 rows of mma.m16n8k16 (8 at most are used) and 8 tokens as its columns; the result then has the
// layout that the second product, Vᵀ·Pᵀ, wants of its right operand. Both use a fragment's 16 bytes in an order of our own, as the GEMMs do.
#include "mirage_runtime.cuh"

struct Arguments {
  void *O;              // [num_tokens, HEADS * 128]
  void const *QKV;      // [num_tokens, (HEADS + 2 * KV_HEADS) * 128], before norm and RoPE
  void const *G_q;      // [128]
  void const *G_k;      // [128]
  void const *cos_sin;  // [positions, 128]: 64 cosines, 64 sines
  void const *positions;     // int64 [num_tokens]
  void *cache;               // pages of page_size tokens, a multiple of 16; a token's key, then its value, 128 elements each
  void const *slots;         // int64 [num_tokens]: where the new token goes; negative: nowhere
  void const *block_table;   // int32 [num_tokens, table_stride]
  void const *seq_lens;      // int32 [num_tokens], the new token included; 0: a row of padding
  long long page_stride, token_stride, head_stride;  // of the cache, in elements
  int page_size, table_stride;
  int num_tokens;
  float eps, scale;
};

namespace mirage {
constexpr int kHead = 128;
struct Attention {
  static constexpr int HEADS = MIRAGE_HEADS, KV_HEADS = MIRAGE_KV_HEADS, GROUP = HEADS / KV_HEADS, CLUSTER = MIRAGE_CLUSTER, WARPS = MIRAGE_WARPS;
  static constexpr int THREADS = WARPS * kWarp, TILE = 16, QKV = (HEADS + 2 * KV_HEADS) * kHead;
  static_assert(GROUP * KV_HEADS == HEADS && GROUP <= 8, "8 q heads of a KV head are the rows of one mma");
  static_assert(GROUP * kHead / 2 % CLUSTER == 0, "a cluster's blocks share the output in pairs");
  // shared memory: each warp's partial output, maximum and sum | the new token's scores | every block's partial output, maximum and sum
  static constexpr int PART = GROUP * (kHead + 2), SHARE = GROUP * kHead / CLUSTER, REMOTE = SHARE + 2 * GROUP;
  static constexpr int NEW_OFFSET = WARPS * PART * 4, REMOTE_OFFSET = NEW_OFFSET + GROUP * 4;
  static constexpr int SHARED_BYTES = REMOTE_OFFSET + (CLUSTER > 1 ? CLUSTER * REMOTE * 4 : 0);
};
using A = Attention;

// A head's row of 128 in the four lanes of a quad: this lane holds [32 * s + lane % 4 * 8, + 8) for s in 0..3, which puts both halves of a
// rotated pair into one lane.
struct HeadRow {
  float x[4][kVector];
  MIRAGE_DEVICE void load(void const *tensor, uint64_t index, int quad) {
    MIRAGE_UNROLL
    for (int s = 0; s < 4; ++s) unpack(load_global(element(tensor, index + s * kStep + quad * kVector)), x[s]);
  }
  MIRAGE_DEVICE void norm_and_rotate(Vec const (&gamma)[4], Vec const (&cos)[2], Vec const (&sin)[2], float eps) {
    float sum = 0.0f;
    MIRAGE_UNROLL
    for (int i = 0; i < 4 * kVector; ++i) sum += x[i / kVector][i % kVector] * x[i / kVector][i % kVector];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const float inverse_rms = inverse_sqrt(sum * (1.0f / kHead) + eps);
    MIRAGE_UNROLL
    for (int s = 0; s < 2; ++s) {
      float low[kVector], high[kVector], c[kVector], d[kVector];
      unpack(gamma[s], low);
      unpack(gamma[s + 2], high);
      unpack(cos[s], c);
      unpack(sin[s], d);
      MIRAGE_UNROLL
      for (int i = 0; i < kVector; ++i) {
        const float a = x[s][i] * inverse_rms * low[i], b = x[s + 2][i] * inverse_rms * high[i];
        x[s][i] = a * c[i] - b * d[i];
        x[s + 2][i] = b * c[i] + a * d[i];
      }
    }
  }
};

// One warp's 16 cached tokens: keys as the right operand of Q·Kᵀ, values as the left one of Vᵀ·Pᵀ.
struct Tile {
  Vec key[2][4], value[4][2];  // [tokens lane / 4 and + 8][k step], [tokens 2 * quad, + 1, + 8, + 9][d low, high half]
  MIRAGE_DEVICE void load_keys(Arguments const &args, uint64_t base, int valid, int lane) {
    MIRAGE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int token = half * 8 + lane / 4;
      MIRAGE_UNROLL
      for (int s = 0; s < 4; ++s) {
        key[half][s] = Vec{};
        if (token < valid) key[half][s] = load_global(element(args.cache, base + token * args.token_stride + s * kStep + lane % 4 * kVector));
      }
    }
  }
  MIRAGE_DEVICE void load_values(Arguments const &args, uint64_t base, int valid, int lane) {  // beyond `valid` 0: a weight of 0 hides no NaN
    MIRAGE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
      MIRAGE_UNROLL
      for (int half = 0; half < 2; ++half) {
        value[i][half] = Vec{};
        if (token < valid) value[i][half] = load_global(element(args.cache, base + token * args.token_stride + kHead + half * 64 + lane / 4 * kVector));
      }
    }
  }
};
MIRAGE_DEVICE uint32_t pack_low(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
MIRAGE_DEVICE uint32_t pack_high(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }
MIRAGE_DEVICE float weight_of(float maximum, float all) { return maximum == -INFINITY ? 0.0f : exp2_fast(maximum - all); }
MIRAGE_DEVICE unsigned char *slot(unsigned char *shared, int offset, int index) { return shared + offset + index * 4; }
}  // namespace mirage

extern "C" __device__ const int mirage_launch_shape[5] = {
    0, mirage::A::KV_HEADS * mirage::A::CLUSTER, mirage::A::THREADS, mirage::A::CLUSTER, mirage::A::SHARED_BYTES};

extern "C" __global__ void __launch_bounds__(mirage::A::THREADS) decode_attention(Arguments args) {
  using namespace mirage;
  MIRAGE_SHARED(shared);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, quad = lane % 4, row = lane / 4;
  const int rank = A::CLUSTER > 1 ? cluster_rank() : 0, pair = blockIdx.x / A::CLUSTER, kv_head = pair % A::KV_HEADS, token = pair / A::KV_HEADS;
  if (A::CLUSTER > 1) cluster_arrive();
  release_next_kernel();

  // What no kernel of this step writes: lengths, tables, earlier tokens, weights of the norms, angles.
  const int seq_len = static_cast<int const *>(args.seq_lens)[token], cached = seq_len > 0 ? seq_len - 1 : 0;
  const int tiles = (cached + A::TILE - 1) / A::TILE, stride = A::WARPS * A::CLUSTER;
  auto base_of = [&](int tile) {
    const int first = tile * A::TILE;
    const int page = static_cast<int const *>(args.block_table)[static_cast<uint64_t>(token) * args.table_stride + first / args.page_size];
    return static_cast<uint64_t>(page) * args.page_stride + first % args.page_size * args.token_stride + kv_head * args.head_stride;
  };
  int tile = warp * A::CLUSTER + rank;  // consecutive tiles on different multiprocessors
  Tile now;
  if (tile < tiles) {
    const uint64_t base = base_of(tile);
    now.load_keys(args, base, cached - tile * A::TILE, lane);
    now.load_values(args, base, cached - tile * A::TILE, lane);
  }
  const long long position = static_cast<long long const *>(args.positions)[token], target = static_cast<long long const *>(args.slots)[token];
  Vec cos[2], sin[2], gamma_q[4], gamma_k[4];
  MIRAGE_UNROLL
  for (int s = 0; s < 4; ++s) {
    if (s < 2) {
      cos[s] = load_global(element(args.cos_sin, position * kHead + s * kStep + quad * kVector));
      sin[s] = load_global(element(args.cos_sin, position * kHead + 64 + s * kStep + quad * kVector));
    }
    gamma_q[s] = load_global(element(args.G_q, s * kStep + quad * kVector));
    gamma_k[s] = load_global(element(args.G_k, s * kStep + quad * kVector));
  }
  wait_for_previous_kernel();

  const uint64_t qkv = static_cast<uint64_t>(token) * A::QKV;
  const uint64_t new_key = qkv + (A::HEADS + kv_head) * kHead, new_value = new_key + A::KV_HEADS * kHead;
  HeadRow q;
  q.load(args.QKV, qkv + (kv_head * A::GROUP + row % A::GROUP) * kHead, quad);  // rows beyond the group repeat it and are never read
  HeadRow k;
  const bool first = rank == 0 && warp == 0;
  if (first) k.load(args.QKV, new_key, quad);  // in every quad: each needs it for its own head's score
  q.norm_and_rotate(gamma_q, cos, sin, args.eps);
  Vec query[4];
  MIRAGE_UNROLL
  for (int s = 0; s < 4; ++s) query[s] = pack(q.x[s]);
  const float to_log2 = args.scale * 1.4426950408889634f;
  if (first) {
    k.norm_and_rotate(gamma_k, cos, sin, args.eps);
    float score = 0.0f;
    MIRAGE_UNROLL
    for (int s = 0; s < 4; ++s) {
      const Vec rounded = pack(k.x[s]);
      float a[kVector], b[kVector];
      unpack(rounded, b);
      unpack(query[s], a);
      MIRAGE_UNROLL
      for (int i = 0; i < kVector; ++i) score += a[i] * b[i];
      if (target >= 0 && row == 0) {
        const uint64_t there = static_cast<uint64_t>(target / args.page_size) * args.page_stride + target % args.page_size * args.token_stride +
                               kv_head * args.head_stride + s * kStep + quad * kVector;
        store_global(element(args.cache, there), rounded);
        store_global(element(args.cache, there + kHead), load_global(element(args.QKV, new_value + s * kStep + quad * kVector)));
      }
    }
    score += shuffle_xor(score, 1);
    score += shuffle_xor(score, 2);
    if (quad == 0 && row < A::GROUP) store_shared(slot(shared, A::NEW_OFFSET, row), score * to_log2);
  }

  float maximum = -INFINITY, sum = 0.0f;  // of head `row`; sum over this lane's tokens
  float out[8][4] = {};                   // d = lane / 4 * 8 + j (+ 64 from i = 2 on) of heads 2 * quad + i % 2
  for (; tile < tiles; tile += stride) {
    float scores[2][4];
    MIRAGE_UNROLL
    for (int half = 0; half < 2; ++half) {
      MIRAGE_UNROLL
      for (int i = 0; i < 4; ++i) scores[half][i] = 0.0f;
      MIRAGE_UNROLL
      for (int s = 0; s < 4; ++s) {
        mma(scores[half], query[s].word[0], 0, query[s].word[1], 0, now.key[half][s].word[0], now.key[half][s].word[1]);
        mma(scores[half], query[s].word[2], 0, query[s].word[3], 0, now.key[half][s].word[2], now.key[half][s].word[3]);
      }
    }
    const int valid = cached - tile * A::TILE, next = tile + stride;
    uint64_t base = 0;
    if (next < tiles) {
      base = base_of(next);
      now.load_keys(args, base, cached - next * A::TILE, lane);
    }
    float best = maximum;
    MIRAGE_UNROLL
    for (int i = 0; i < 4; ++i) {
      float &score = scores[i / 2][i % 2];
      score = i / 2 * 8 + quad * 2 + i % 2 < valid ? score * to_log2 : -INFINITY;
      best = fmaxf(best, score);
    }
    best = fmaxf(best, shuffle_xor(best, 1));
    best = fmaxf(best, shuffle_xor(best, 2));
    const float fade = exp2_fast(maximum - best);
    maximum = best;
    sum *= fade;
    MIRAGE_UNROLL
    for (int i = 0; i < 4; ++i) {
      scores[i / 2][i % 2] = exp2_fast(scores[i / 2][i % 2] - best);
      sum += scores[i / 2][i % 2];
    }
    const uint32_t p0 = to_pair(scores[0][0], scores[0][1]), p1 = to_pair(scores[1][0], scores[1][1]);
    const float fades[2] = {shuffle(fade, quad * 8), shuffle(fade, quad * 8 + 4)};
    MIRAGE_UNROLL
    for (int j = 0; j < kVector; ++j) {
      MIRAGE_UNROLL
      for (int i = 0; i < 4; ++i) out[j][i] *= fades[i % 2];
      uint32_t a[4];
      MIRAGE_UNROLL
      for (int i = 0; i < 4; ++i) {  // a[0], a[1]: tokens 2 * quad, + 1 of the low and high half of d; a[2], a[3]: 8 tokens on
        const uint32_t even = now.value[i / 2 * 2][i % 2].word[j / 2], odd = now.value[i / 2 * 2 + 1][i % 2].word[j / 2];
        a[i] = j % 2 ? pack_high(even, odd) : pack_low(even, odd);
      }
      mma(out[j], a[0], a[1], a[2], a[3], p0, p1);
    }
    if (next < tiles) now.load_values(args, base, cached - next * A::TILE, lane);
  }
  sum += shuffle_xor(sum, 1);
  sum += shuffle_xor(sum, 2);

  const int part = warp * A::PART;  // outputs of each head, then maxima, then sums
  MIRAGE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int head = quad * 2 + i % 2;
    MIRAGE_UNROLL
    for (int j = 0; j < kVector; ++j)
      if (head < A::GROUP) store_shared(slot(shared, 0, part + head * kHead + i / 2 * 64 + row * kVector + j), out[j][i]);
  }
  if (quad == 0 && row < A::GROUP) {
    store_shared(slot(shared, 0, part + A::GROUP * kHead + row), maximum);
    store_shared(slot(shared, 0, part + A::GROUP * (kHead + 1) + row), sum);
  }
  block_barrier();
  const bool has_new = rank == 0 && seq_len > 0;
  auto read = [&](int offset, int index) { return load_shared_float(slot(shared, offset, index)); };
  auto block_maximum = [&](int head) {
    float all = has_new ? read(A::NEW_OFFSET, head) : -INFINITY;
    MIRAGE_UNROLL
    for (int w = 0; w < A::WARPS; ++w) all = fmaxf(all, read(0, w * A::PART + A::GROUP * kHead + head));
    return all;
  };
  auto block_sum_of = [&](int head, float all) {
    float total = has_new ? exp2_fast(read(A::NEW_OFFSET, head) - all) : 0.0f;
    MIRAGE_UNROLL
    for (int w = 0; w < A::WARPS; ++w)
      total += weight_of(read(0, w * A::PART + A::GROUP * kHead + head), all) * read(0, w * A::PART + A::GROUP * (kHead + 1) + head);
    return total;
  };
  auto block_pair = [&](int index, float all, float (&value)[2]) {  // two neighbouring d of a head
    const int head = index / (kHead / 2), d = index % (kHead / 2) * 2;
    value[0] = value[1] = 0.0f;
    if (has_new) {
      const float weight = exp2_fast(read(A::NEW_OFFSET, head) - all);
      const uint32_t v = load_global_pair(element(args.QKV, new_value + d));
      value[0] = weight * low_to_float(v);
      value[1] = weight * high_to_float(v);
    }
    MIRAGE_UNROLL
    for (int w = 0; w < A::WARPS; ++w) {
      const float weight = weight_of(read(0, w * A::PART + A::GROUP * kHead + head), all);
      value[0] += weight * read(0, w * A::PART + head * kHead + d);
      value[1] += weight * read(0, w * A::PART + head * kHead + d + 1);
    }
  };
  const uint64_t output = static_cast<uint64_t>(token) * A::HEADS * kHead + kv_head * A::GROUP * kHead;
  if (A::CLUSTER == 1) {
    for (int index = thread; index < A::GROUP * kHead / 2; index += A::THREADS) {
      const int head = index / (kHead / 2);
      const float all = block_maximum(head), total = block_sum_of(head, all), inverse = total == 0.0f ? 0.0f : divide(1.0f, total);  // NaN stays NaN
      float value[2];
      block_pair(index, all, value);
      store_global(element(args.O, output + index * 2), to_pair(value[0] * inverse, value[1] * inverse));
    }
    return;
  }
  cluster_wait();  // the other blocks have started: their shared memory may be written
  for (int index = thread; index < A::GROUP * kHead / 2; index += A::THREADS) {
    float value[2];
    block_pair(index, block_maximum(index / (kHead / 2)), value);
    const int owner = index * 2 / A::SHARE, at = A::REMOTE_OFFSET + (rank * A::REMOTE + index * 2 % A::SHARE) * 4;
    store_cluster(shared + at, owner, value[0]);
    store_cluster(shared + at + 4, owner, value[1]);
  }
  for (int index = thread; index < A::GROUP * A::CLUSTER; index += A::THREADS) {
    const int head = index % A::GROUP, at = A::REMOTE_OFFSET + (rank * A::REMOTE + A::SHARE + head) * 4;
    const float all = block_maximum(head);
    store_cluster(shared + at, index / A::GROUP, all);
    store_cluster(shared + at + A::GROUP * 4, index / A::GROUP, block_sum_of(head, all));
  }
  cluster_arrive();
  cluster_wait();
  for (int index = thread; index < A::SHARE / 2; index += A::THREADS) {
    const int head = (rank * A::SHARE + index * 2) / kHead;
    float all = -INFINITY, total = 0.0f, value[2] = {0.0f, 0.0f};
    MIRAGE_UNROLL
    for (int r = 0; r < A::CLUSTER; ++r) all = fmaxf(all, read(A::REMOTE_OFFSET, r * A::REMOTE + A::SHARE + head));
    MIRAGE_UNROLL
    for (int r = 0; r < A::CLUSTER; ++r) {
      const float weight = weight_of(read(A::REMOTE_OFFSET, r * A::REMOTE + A::SHARE + head), all);
      total += weight * read(A::REMOTE_OFFSET, r * A::REMOTE + A::SHARE + A::GROUP + head);
      value[0] += weight * read(A::REMOTE_OFFSET, r * A::REMOTE + index * 2);
      value[1] += weight * read(A::REMOTE_OFFSET, r * A::REMOTE + index * 2 + 1);
    }
    const float inverse = total == 0.0f ? 0.0f : divide(1.0f, total);  // NaN stays NaN
    store_global(element(args.O, output + rank * A::SHARE + index * 2), to_pair(value[0] * inverse, value[1] * inverse));
  }
}
