// SPDX-License-Identifier: Apache-2.0
// Device runtime of the generated kernels: prologue -> skinny GEMM -> epilogue, no CUTLASS, compiles with NVRTC and nvcc.
//
// out[token, n] = epilogue(sum_k tile[token, k] * weight[n, k]),  tile = prologue(activations),  weight as vLLM stores it: [N, K].
//
// A decode step reads every weight once, so the time of such a kernel is the time to stream [N, K] from device memory.
// Everything here serves that stream:
//   - a warp owns steps of 32 k for all weight rows and all tokens of its block. What it multiplies goes from global memory straight
//     into its registers, several steps ahead: no barrier and no shared memory before the end, and the prologue (residual add, sum of
//     squares, gamma) is computed on the fragments while later steps arrive. A prologue of its own, which puts the activations into
//     shared memory first, was measured at 18.3 us where this form took 16.5 (K 4096, N 6144, 16 tokens; docs/perf-log.md);
//   - weights are the A operand of mma.m16n8k16 (16 weight rows), tokens the B operand (8 columns): 1 to 8 tokens cost one mma.
//     A lane's 16 bytes are 8 neighbouring k of one row, used as the k of two mma steps in an order of our own; the activations'
//     16 bytes follow the same order, and a dot product does not care;
//   - K is split over the warps of a block and, for many tokens, over the blocks of a cluster: a block then loads only its share of the
//     activations. Partial sums meet in shared memory, so that no second kernel reduces them;
//   - for one or two tokens (Gemv) FMAs are enough. All threads of a block share a weight row and keep their k of the operand in registers, so
//     that a block reads one contiguous stretch of memory, as a bare read does.
#pragma once

#ifdef MIRAGE_EMULATE  // g++ build without a GPU: the same source, run by the emulator of the test-suite
#include "mirage_emulator.h"
#else
#ifdef __CUDACC_RTC__
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#define INFINITY __int_as_float(0x7f800000)
#else
#include <stdint.h>
#endif
#define MIRAGE_DEVICE __device__ __forceinline__
#define MIRAGE_UNROLL _Pragma("unroll")
#define MIRAGE_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace mirage {

constexpr int kWarp = 32;
constexpr int kVector = 8;    // 16-bit elements in 16 bytes
constexpr int kRowTile = 16;  // weight rows of one mma
constexpr int kStep = 32;     // k of one 16-byte load by the four lanes that share a row
constexpr int kColumns = 8;   // tokens of one mma

struct alignas(16) Vec {
  uint32_t word[4];
};

// ------------------------------------------------------------------------------------------------ element types
#ifdef MIRAGE_FP16
constexpr bool kIsFp16 = true;
#else
constexpr bool kIsFp16 = false;
#endif

#ifndef MIRAGE_EMULATE
MIRAGE_DEVICE float low_to_float(uint32_t pair) {
#ifdef MIRAGE_FP16
  float value;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(value) : "r"(pair));
  return value;
#else
  return __uint_as_float(pair << 16);
#endif
}
MIRAGE_DEVICE float high_to_float(uint32_t pair) {
#ifdef MIRAGE_FP16
  float value;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(pair));
  return value;
#else
  return __uint_as_float(pair & 0xffff0000u);
#endif
}
MIRAGE_DEVICE uint32_t to_pair(float low, float high) {
  uint32_t pair;
#ifdef MIRAGE_FP16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}
// Within 2 ulp (CUDA's programming guide, PTX). The exact ones branch, and take 390 instructions of a norm kernel's 660 (sm_90).
MIRAGE_DEVICE float inverse_sqrt(float x) { return rsqrtf(x); }
MIRAGE_DEVICE float divide(float x, float y) {
  float quotient;
  asm("div.full.f32 %0, %1, %2;" : "=f"(quotient) : "f"(x), "f"(y));
  return quotient;
}
MIRAGE_DEVICE float silu(float x) { return divide(x, 1.0f + __expf(-x)); }

// ------------------------------------------------------------------------------------------------ memory and mma
// All loads are volatile: NVVM leaves them in program order, which is the software pipeline. ptxas may still move them past each other and
// past arithmetic, and does; run_pipelined holds it back by keep_order().
MIRAGE_DEVICE Vec load_weights(void const *address) {  // read once a step: no place in L1
  Vec v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(address));
  return v;
}
// 16 bytes into shared memory, where the thread itself finds them after wait_for_copies().
MIRAGE_DEVICE void copy_to_shared(void *shared, void const *address) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(address) : "memory");
}
MIRAGE_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
MIRAGE_DEVICE void prefetch_l2(void const *address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }
MIRAGE_DEVICE Vec load_global(void const *address) {
  Vec v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(address)
               : "memory");
  return v;
}
MIRAGE_DEVICE void store_global(void *address, Vec v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
// The same under a predicate. With a branch ptxas gave gamma's fragments the scoreboard of the weights, so that each waited for both.
MIRAGE_DEVICE void store_global_if(bool condition, void *address, Vec v) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(address), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]), "r"(static_cast<uint32_t>(condition))
               : "memory");
}
MIRAGE_DEVICE void store_global(void *address, uint32_t pair) { *static_cast<uint32_t *>(address) = pair; }
MIRAGE_DEVICE uint32_t load_global_pair(void const *address) { return *static_cast<uint32_t const *>(address); }
MIRAGE_DEVICE void store_shared(void *address, Vec v) { *static_cast<Vec *>(address) = v; }
MIRAGE_DEVICE void store_shared(void *address, float v) { *static_cast<float *>(address) = v; }
MIRAGE_DEVICE Vec load_shared(void const *address) { return *static_cast<Vec const *>(address); }
MIRAGE_DEVICE float load_shared_float(void const *address) { return *static_cast<float const *>(address); }
MIRAGE_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#ifdef MIRAGE_FP16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
MIRAGE_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MIRAGE_DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
MIRAGE_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
MIRAGE_DEVICE uint32_t shuffle_xor(uint32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
MIRAGE_DEVICE void block_barrier() { __syncthreads(); }

// ------------------------------------------------------------------------------------------------ cluster and launch order
MIRAGE_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}
MIRAGE_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
MIRAGE_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
MIRAGE_DEVICE void store_cluster(void *address, int rank, float v) {  // the same shared address in block `rank` of the cluster
#if __CUDA_ARCH__ >= 900
  uint32_t local = static_cast<uint32_t>(__cvta_generic_to_shared(address)), remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(v) : "memory");
#endif
}
// Programmatic dependent launch: nothing that an earlier kernel wrote may be read before wait_for_previous_kernel().
MIRAGE_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
MIRAGE_DEVICE void release_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Once a block has released its next kernel, to do so again does nothing, but ptxas leaves loads on their side of it. Of nine instructions
// that were tried only this one and pmevent did that (NVRTC 13.0, sm_90); with pmevent all loads shared a scoreboard: each waited for all.
MIRAGE_DEVICE void keep_order() { release_next_kernel(); }
#endif  // MIRAGE_EMULATE

MIRAGE_DEVICE void unpack(Vec v, float (&out)[kVector]) {
  MIRAGE_UNROLL
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = low_to_float(v.word[i]);
    out[2 * i + 1] = high_to_float(v.word[i]);
  }
}
MIRAGE_DEVICE Vec pack(float const (&in)[kVector]) {
  Vec v;
  MIRAGE_UNROLL
  for (int i = 0; i < 4; ++i) v.word[i] = to_pair(in[2 * i], in[2 * i + 1]);
  return v;
}

// ------------------------------------------------------------------------------------------------ schedule
// Everything that the plan and the muGraph's grid, for-loop range and tile maps decide. Lengths are in elements.
template <int K_, int N_, int TOKENS_, int GRID_, int FORLOOP_, int CLUSTER_, int WARPS_, int STAGES_, int EARLY_, int PREFETCH_,
          int BUFFERED_, int TILED_, int LINES_, int PIPELINED_, int GEMV_, int GEMMS_, int INPUTS_, int VECTORS_, int ROW_SUMS_>
struct Schedule {
  static constexpr int K = K_, N = N_, TOKENS = TOKENS_, GRID = GRID_, FORLOOP = FORLOOP_, CLUSTER = CLUSTER_, WARPS = WARPS_;
  static constexpr int THREADS = WARPS * kWarp;
  static constexpr bool TILED = TILED_;                                         // activations lie in tiles, as a norm kernel leaves them
  static constexpr bool LINES = LINES_;                                         // activations lie in rows and are read as whole lines
  static constexpr bool PIPELINED = PIPELINED_;                                 // a step's operand is ready before its weights are waited for
  static constexpr bool GEMV = GEMV_;                                           // a step of weights is one row, by FMAs
  static constexpr int GROUP = LINES ? 2 : 1;                                   // steps whose activations are read together
  static constexpr int COLUMNS = GEMV ? 1 : kColumns;                           // tokens that are multiplied together
  static constexpr int GEMMS = GEMMS_;                                          // weight tiles that share the activations
  static constexpr int INPUTS = INPUTS_;                                        // activation tensors [num_tokens, K]
  static constexpr int VECTORS = VECTORS_;                                      // weight vectors [K]
  static constexpr int ROW_SUMS = ROW_SUMS_;                                    // sums over whole rows of the activations
  static constexpr int ROWS = (N / 2 + GRID - 1) / GRID * 2;                    // output columns of a cluster = weight rows of each GEMM, at most
  static constexpr bool UNEVEN = N % (GRID * 2) != 0;                           // some clusters have two fewer
  static constexpr int TILES = (ROWS + kRowTile - 1) / kRowTile, ROW_TILES = GEMMS * TILES;  // the last of a GEMM's may have fewer rows than 16
  static constexpr int TOKEN_TILES = TOKENS / COLUMNS;
  static constexpr int K_BLOCK = K / CLUSTER;                                   // k of this block
  static constexpr int K_ITERATION = K / FORLOOP;                               // k of one for-loop iteration
  static constexpr int UNITS = K_ITERATION / (WARPS * kStep);                   // neighbouring steps of a warp in an iteration
  static constexpr int SLICES = K / (THREADS * kVector);                        // 16 bytes of a row that a thread of a GEMV has
  static constexpr int STEPS = GEMV ? GEMMS * ROWS : K_BLOCK / (WARPS * kStep); // steps of a warp
  static constexpr int STAGES = STAGES_ < STEPS ? STAGES_ : STEPS;              // steps in flight
  static constexpr int BUFFERED = BUFFERED_ < STEPS - STAGES ? BUFFERED_ : STEPS - STAGES;  // behind these, that wait in shared memory
  static constexpr int EARLY = EARLY_ < STAGES ? EARLY_ : STAGES;               // steps of weights asked for before the previous kernel is done
  static constexpr int EARLY_ITERATIONS = (EARLY + UNITS - 1) / UNITS, LATE_ITERATIONS = FORLOOP / CLUSTER - EARLY_ITERATIONS;
  static constexpr int PREFETCH = PREFETCH_ < LATE_ITERATIONS ? PREFETCH_ : LATE_ITERATIONS;  // further iterations asked into L2 before that
  static_assert(TOKENS % COLUMNS == 0, "tokens come in columns of an mma");
  static_assert(N % 2 == 0, "clusters share N in pairs of rows");
  static_assert(!GEMV || (FORLOOP == SLICES && CLUSTER == 1 && !TILED && !LINES && !PIPELINED && PREFETCH_ == 0),
                "a GEMV's iteration is 16 bytes of a row for each thread");
  static_assert(GEMV || BUFFERED_ == 0, "the steps of an mma come through registers alone");
  static_assert(K % FORLOOP == 0 && FORLOOP % CLUSTER == 0 && UNITS * WARPS * kStep == K_ITERATION, "for-loop range must divide K into warps x 32");
  static_assert(CLUSTER == 1 || (!UNEVEN && ROWS % (2 * CLUSTER) == 0), "a cluster's blocks share its rows in pairs");
  static_assert(!LINES || (!TILED && UNITS % 2 == 0 && STAGES % 2 == 0), "a line of a row is two neighbouring steps");

  // shared memory: partial sums of the warps | row sums of the warps and blocks | partial sums of the blocks, all used at the end only |
  // buffered weights
  static constexpr int PITCH = (GEMMS * ROWS + 15) / 16 * 16 + 4;               // 4 mod 16 words: the four lanes of a row hit different banks
  static constexpr int SUMS_OFFSET = WARPS * TOKENS * PITCH * 4;
  static constexpr int SUM_PARTS = WARPS * CLUSTER;
  static constexpr int CLUSTER_OFFSET = SUMS_OFFSET + ROW_SUMS * TOKENS * SUM_PARTS * 4;
  static constexpr int BUFFER_OFFSET = (CLUSTER_OFFSET + (CLUSTER > 1 ? TOKENS * GEMMS * ROWS * 4 : 0) + 15) / 16 * 16;
  static constexpr int SHARED_BYTES = BUFFER_OFFSET + BUFFERED * K * 2;
};

// Where this thread stands. A fragment's 16 bytes: row (weight row, token) lane / 4, k lane % 4 * 8 and on, of a step's 32. Whole lines of
// activations: of two steps the first reads the even tokens of a tile, the second the odd ones, each k lane % 8 * 8 and on of both steps' 64.
// In a GEMV the steps of activations are slices of K: a thread's 16 bytes lie beside its neighbours', over the whole block.
template <class S>
struct Position {
  int thread, lane, warp, rank, cluster, first_k, first_row, rows;  // rows: of the cluster, first_row and on
  MIRAGE_DEVICE Position()
      : thread(threadIdx.x), lane(threadIdx.x % kWarp), warp(threadIdx.x / kWarp), rank(S::CLUSTER > 1 ? cluster_rank() : 0),
        cluster(blockIdx.x / S::CLUSTER),
        first_k(S::GEMV ? thread * kVector : rank * S::K_BLOCK + warp * S::UNITS * kStep + lane % 4 * kVector),
        first_row(row_of(cluster)), rows(S::UNEVEN ? row_of(cluster + 1) - first_row : S::ROWS) {}
  MIRAGE_DEVICE int k(int step) const { return first_k + step_k(step); }  // from the tensor's start
  MIRAGE_DEVICE int token(int tile, int step) const {
    if (S::GEMV) return tile;
    return tile * kColumns + (S::LINES ? lane / 8 * 2 + step % 2 : lane / 4);
  }
  MIRAGE_DEVICE int activation_k(int step) const { return S::LINES ? k(step / 2 * 2) + (lane % 8 - lane % 4) * kVector : k(step); }
  static MIRAGE_DEVICE constexpr int step_k(int step) {
    return S::GEMV ? step * S::K_ITERATION : step / S::UNITS * S::K_ITERATION + step % S::UNITS * kStep;
  }
  static MIRAGE_DEVICE int row_of(int cluster) { return S::UNEVEN ? cluster * (S::N / 2) / S::GRID * 2 : cluster * S::ROWS; }
};

MIRAGE_DEVICE unsigned char const *element(void const *tensor, uint64_t index) { return static_cast<unsigned char const *>(tensor) + index * 2; }
MIRAGE_DEVICE unsigned char *element(void *tensor, uint64_t index) { return static_cast<unsigned char *>(tensor) + index * 2; }
// Where a norm kernel leaves [num_tokens, K] for its GEMM: in tiles of 8 tokens x 32 k, one behind the other along K. A warp loads such a
// tile as 4 whole lines; from rows it would take 8 halves of lines, which cost up to 1.5 us at 16 tokens (H200; docs/perf-log.md).
MIRAGE_DEVICE uint64_t tiled_index(int token, int k, int row_length) {
  return (static_cast<uint64_t>(token / kColumns) * row_length + k / kStep * kStep) * kColumns + token % kColumns * kStep + k % kStep;
}

// Asks the first BYTES of each of `rows` rows, ROWS at most and `pitch` bytes apart, into L2; `thread` of THREADS. At most 512 of every row
// before the next 512: in that order they are read. Bulk prefetches hold their thread up for some 0.7 us (H200; docs/perf-log.md).
template <int ROWS, int BYTES, int THREADS>
MIRAGE_DEVICE void prefetch_rows(unsigned char const *first, uint64_t pitch, int thread, int rows = ROWS) {
  if constexpr (BYTES > 0) {
    constexpr int EACH = 64;  // bytes of a request; 32 and 128 were up to 0.1 us slower
    constexpr int PART = BYTES % 512 == 0 ? 512 : BYTES % 256 == 0 ? 256 : BYTES % 128 == 0 ? 128 : 64, PER_PART = PART / EACH;
    static_assert(BYTES % PART == 0, "requests are whole");
    for (int i = thread; i < ROWS * (BYTES / EACH); i += THREADS) {
      const int row = i / PER_PART % ROWS, part = i / (PER_PART * ROWS);
      if (row < rows) prefetch_l2(first + row * pitch + part * PART + i % PER_PART * EACH);
    }
  }
}

// ------------------------------------------------------------------------------------------------ activations
// What a warp holds of one step: a fragment of each input for each tile of 8 tokens, and one of each vector.
template <class S>
struct Fragments {
  Vec input[S::INPUTS][S::TOKEN_TILES], vector[S::VECTORS > 0 ? S::VECTORS : 1];
};
template <class S>
MIRAGE_DEVICE Vec load_input(Position<S> const &at, void const *tensor, int num_tokens, int tile, int step) {  // rows from num_tokens on read as 0
  const int token = at.token(tile, step), k = at.activation_k(step);
  // tiled_index(token, k, K), as the lanes know it: the call takes up to a fifth more instructions (sm_90)
  const uint64_t in_tile = (static_cast<uint64_t>(tile) * S::K + k - at.lane % 4 * kVector) * kColumns + at.lane * kVector;
  Vec v = {};
  if (token < num_tokens) v = load_global(element(tensor, S::TILED ? in_tile : static_cast<uint64_t>(token) * S::K + k));
  return v;
}
template <class S>
MIRAGE_DEVICE Vec load_vector(Position<S> const &at, void const *tensor, int step) {
  if (step % S::GROUP != 0) return {};  // a line's second step uses the first one's fragment
  return load_global(element(tensor, at.activation_k(step)));
}
// An output [num_tokens, K] that every cluster knows in full: each writes the steps that fall to it.
template <class S>
MIRAGE_DEVICE void store_output(Position<S> const &at, void *tensor, int num_tokens, int tile, int step, float const (&values)[kVector]) {
  const int token = at.token(tile, step), k = at.activation_k(step);
  auto mine = [&] { return (token * (S::K / kStep) + k / kStep) % S::GRID == at.cluster; };
  if (S::PIPELINED) {
    store_global_if((token < num_tokens) & mine(), element(tensor, static_cast<uint64_t>(token) * S::K + k), pack(values));
  } else if (token < num_tokens && mine()) {
    store_global(element(tensor, static_cast<uint64_t>(token) * S::K + k), pack(values));
  }
}
// A tensor [num_tokens, N] that the epilogue reads. What a thread finishes first is asked for before the GEMM: behind it, it would be waited for.
template <class S>
struct LateInput {
  static constexpr int SHARE = S::ROWS / 2 / S::CLUSTER;  // pairs of neighbouring n that a block finishes of each token, in the order of its threads
  uint32_t first = 0;
  MIRAGE_DEVICE LateInput(Position<S> const &at, void const *tensor, int num_tokens) {
    const int token = at.thread / SHARE, row = (at.rank * SHARE + at.thread % SHARE) * 2, n = at.first_row + row;
    if (token < num_tokens && row < at.rows) first = load_global_pair(element(tensor, static_cast<uint64_t>(token) * S::N + n));
  }
  MIRAGE_DEVICE uint32_t pair(Position<S> const &at, void const *tensor, int token, int n) const {
    if (token * SHARE + (n - at.first_row) / 2 % SHARE == at.thread) return first;
    return load_global_pair(element(tensor, static_cast<uint64_t>(token) * S::N + n));
  }
};
// Leaves this warp's share of a sum over rows of the activations where every block of the cluster finds it after a barrier.
template <class S>
MIRAGE_DEVICE void store_row_sum(unsigned char *shared, Position<S> const &at, int index, int tile, float (&sums)[S::GROUP]) {
  constexpr int LANES = S::GEMV ? kWarp : 4 * S::GROUP;  // that share a token
  MIRAGE_UNROLL
  for (int i = 0; i < S::GROUP; ++i) {
    float sum = sums[i];
    MIRAGE_UNROLL
    for (int mask = 1; mask < LANES; mask *= 2) sum += shuffle_xor(sum, mask);
    const int slot = (index * S::TOKENS + at.token(tile, i)) * S::SUM_PARTS + at.rank * S::WARPS + at.warp;
    if (S::CLUSTER == 1) {
      if (at.lane % LANES == 0) store_shared(shared + S::SUMS_OFFSET + slot * 4, sum);
    } else {
      for (int rank = at.lane % LANES; rank < S::CLUSTER; rank += LANES) store_cluster(shared + S::SUMS_OFFSET + slot * 4, rank, sum);
    }
  }
}
template <class S>
MIRAGE_DEVICE float row_sum(unsigned char const *shared, int index, int token) {
  float sum = 0.0f;
  MIRAGE_UNROLL
  for (int p = 0; p < S::SUM_PARTS; ++p) sum += load_shared_float(shared + S::SUMS_OFFSET + ((index * S::TOKENS + token) * S::SUM_PARTS + p) * 4);
  return sum;
}
template <class S>
MIRAGE_DEVICE void cluster_barrier() {
  if (S::CLUSTER > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    block_barrier();
  }
}

// Of whole lines, makes the fragments of two steps: four lanes hold the second half of an even token's line and want the second step of an odd
// token's, their neighbours the reverse.
MIRAGE_DEVICE void exchange_halves(Vec &first, Vec &second) {
  const bool odd = threadIdx.x & 4;
  MIRAGE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t other = shuffle_xor(odd ? first.word[i] : second.word[i], 4);
    first.word[i] = odd ? other : first.word[i];
    second.word[i] = odd ? second.word[i] : other;
  }
}

// ------------------------------------------------------------------------------------------------ rows
// A kernel without a GEMM, in front of one: a block for each token, 8 neighbouring k for each thread.
template <int K_, int THREADS_, int NEXT_ROWS_, int WARM_>
struct RowSchedule {
  static constexpr int NEXT_ROWS = NEXT_ROWS_, WARM = WARM_;                    // rows of the next kernel's weights, bytes of each to warm
  static constexpr int WARM_BLOCKS = WARM > 0 ? 64 : 0;                         // as fast as 120, 24 were slower at 1 token (K 4096, N 6144, H200)
  static constexpr int K = K_, THREADS = THREADS_, VECTORS_PER_THREAD = (K / kVector + THREADS - 1) / THREADS;
  static constexpr int WARPS = THREADS / kWarp, SHARED_BYTES = WARPS * 4;
  static_assert(K % kVector == 0 && THREADS % kWarp == 0, "a row is a whole number of 16-byte vectors");
};
// Blocks behind those of the tokens ask the start of the next kernel's weights into L2, and are done: the GPU needs some 1 us to start that
// kernel, in which memory would idle (docs/perf-log.md). True in such a block.
template <class S>
MIRAGE_DEVICE bool warm_next_weights(void const *weights, int num_tokens) {
  static_assert(S::WARM <= S::K * 2, "the start of a row is inside it");
  const int block = static_cast<int>(blockIdx.x) - num_tokens;
  if (S::WARM == 0 || block < 0) return false;
  prefetch_rows<S::NEXT_ROWS, S::WARM, S::THREADS * S::WARM_BLOCKS>(element(weights, 0), S::K * 2, block * S::THREADS + threadIdx.x);
  return true;
}
template <class S>
MIRAGE_DEVICE float block_sum(unsigned char *shared, float sum) {
  MIRAGE_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (threadIdx.x % kWarp == 0) store_shared(shared + threadIdx.x / kWarp * 4, sum);
  block_barrier();
  sum = 0.0f;
  MIRAGE_UNROLL
  for (int w = 0; w < S::WARPS; ++w) sum += load_shared_float(shared + w * 4);
  return sum;
}

// ------------------------------------------------------------------------------------------------ epilogue
template <class S>
MIRAGE_DEVICE int partial_slot(int warp, int token, int row) { return ((warp * S::TOKENS + token) * S::PITCH + row) * 4; }  // row of all GEMMS
template <class S>
MIRAGE_DEVICE float warp_sum(unsigned char const *shared, int token, int row) {
  float sum = 0.0f;
  MIRAGE_UNROLL
  for (int w = 0; w < S::WARPS; ++w) sum += load_shared_float(shared + partial_slot<S>(w, token, row));
  return sum;
}
template <class S>
MIRAGE_DEVICE int cluster_slot(int rank, int token, int gemm, int row) {  // row counts inside the share of the block that finishes it
  return S::CLUSTER_OFFSET + (((rank * S::TOKENS + token) * S::GEMMS + gemm) * (S::ROWS / S::CLUSTER) + row) * 4;
}
template <class S>
MIRAGE_DEVICE float rank_sum(unsigned char const *shared, int token, int gemm, int row) {
  float sum = 0.0f;
  MIRAGE_UNROLL
  for (int rank = 0; rank < S::CLUSTER; ++rank) sum += load_shared_float(shared + cluster_slot<S>(rank, token, gemm, row));
  return sum;
}
// Sums the shares that the warps have left in partial_slot() and the cluster's, then calls epilogue(token, n, values[GEMMS][2]) for two
// neighbouring n of each token.
template <class S, class Epilogue>
MIRAGE_DEVICE void finish_rows(unsigned char *shared, Position<S> const &at, int num_tokens, Epilogue epilogue) {
  block_barrier();
  constexpr int PAIRS = S::ROWS / 2, SHARE = PAIRS / S::CLUSTER;
  if (S::CLUSTER > 1) {
    for (int i = at.thread; i < num_tokens * S::GEMMS * PAIRS; i += S::THREADS) {  // push each sum to the block that finishes it
      const int pair = i % PAIRS, gemm = i / PAIRS % S::GEMMS, token = i / (PAIRS * S::GEMMS);
      MIRAGE_UNROLL
      for (int j = 0; j < 2; ++j)
        store_cluster(shared + cluster_slot<S>(at.rank, token, gemm, pair % SHARE * 2 + j), pair / SHARE,
                      warp_sum<S>(shared, token, gemm * S::ROWS + pair * 2 + j));
    }
    cluster_barrier<S>();
  }
  for (int i = at.thread; i < num_tokens * SHARE; i += S::THREADS) {
    const int pair = i % SHARE, token = i / SHARE;
    if (S::UNEVEN && pair * 2 >= at.rows) continue;
    float values[S::GEMMS][2];
    MIRAGE_UNROLL
    for (int v = 0; v < S::GEMMS * 2; ++v)
      values[v / 2][v % 2] =
          S::CLUSTER > 1 ? rank_sum<S>(shared, token, v / 2, pair * 2 + v % 2) : warp_sum<S>(shared, token, v / 2 * S::ROWS + pair * 2 + v % 2);
    epilogue(token, at.first_row + (at.rank * SHARE + pair) * 2, values);
  }
}

// ------------------------------------------------------------------------------------------------ skinny GEMM
template <class S>
struct SkinnyGemm {
  Vec ring[S::STAGES][S::ROW_TILES][2];  // weights in flight: rows lane / 4 and lane / 4 + 8 of each row tile
  Fragments<S> activations[S::STAGES];
  float acc[S::ROW_TILES][S::TOKEN_TILES][4];
  unsigned char const *weight;           // this lane's 16 bytes of row lane / 4 of the cluster, at step 0
  int const my_rows;                     // of the cluster, from this lane's first on

  MIRAGE_DEVICE SkinnyGemm(void const *tensor, unsigned char *, Position<S> const &at) : ring(), my_rows(at.rows - at.lane / 4) {
    weight = element(tensor, static_cast<uint64_t>(at.first_row + at.lane / 4) * S::K + at.first_k);
    MIRAGE_UNROLL
    for (int i = 0; i < S::ROW_TILES * S::TOKEN_TILES * 4; ++i) acc[i / (S::TOKEN_TILES * 4)][i / 4 % S::TOKEN_TILES][i % 4] = 0.0f;
  }
  // May run before the previous kernel has finished: weights do not depend on it.
  MIRAGE_DEVICE void start_early(void const *tensor, Position<S> const &at) {
    MIRAGE_UNROLL
    for (int step = 0; step < S::EARLY; ++step) load(step);
    MIRAGE_UNROLL
    for (int g = 0; g < S::GEMMS; ++g) {
      const uint64_t row = static_cast<uint64_t>(g) * S::N + at.first_row, k = at.rank * S::K_BLOCK + S::EARLY_ITERATIONS * S::K_ITERATION;
      prefetch_rows<S::ROWS, S::PREFETCH * S::K_ITERATION * 2, S::THREADS>(element(tensor, row * S::K + k), S::K * 2, at.thread, at.rows);
    }
  }
  MIRAGE_DEVICE void load(int step) {  // GEMM g multiplies rows g * N of the weight tensor and on; rows that the cluster lacks stay 0
    MIRAGE_UNROLL
    for (int i = 0; i < S::ROW_TILES * 2; ++i) {
      const int r = i / 2, half = i % 2, row = r % S::TILES * kRowTile + half * 8;
      if (row >= S::ROWS || (row + 8 > S::ROWS - 2 * S::UNEVEN && row >= my_rows)) continue;
      const uint64_t index = (static_cast<uint64_t>(r / S::TILES) * S::N + row) * S::K + Position<S>::step_k(step);
      ring[step % S::STAGES][r][half] = load_weights(element(weight, index));
    }
  }
  MIRAGE_DEVICE void multiply(int step, int c, Vec b) {
    MIRAGE_UNROLL
    for (int r = 0; r < S::ROW_TILES; ++r) {
      Vec const &low = ring[step % S::STAGES][r][0], &high = ring[step % S::STAGES][r][1];
      mma(acc[r][c], low.word[0], high.word[0], low.word[1], high.word[1], b.word[0], b.word[1]);
      mma(acc[r][c], low.word[2], high.word[2], low.word[3], high.word[3], b.word[2], b.word[3]);
    }
  }
  // The operands of a group of steps, from the fragments that each of them loaded.
  template <class Prologue>
  MIRAGE_DEVICE void prepare(Prologue prologue, int step, int c, Fragments<S> (&loaded)[S::STAGES], int first, Vec (&operand)[S::GROUP]) {
    MIRAGE_UNROLL
    for (int i = 0; i < S::GROUP; ++i) {
      Fragments<S> &f = loaded[(first + i) % S::STAGES];
      MIRAGE_UNROLL
      for (int v = 0; v < S::VECTORS; ++v) f.vector[v] = loaded[first % S::STAGES].vector[v];
      operand[i] = prologue(step + i, c, f);
    }
    if (S::LINES) exchange_halves(operand[0], operand[S::GROUP - 1]);
  }
  // load_step(step, fragments&) loads the activations of a step; prologue(step, tile, fragments) makes of them the operand's
  // fragment for one tile of 8 tokens; after_prologue() runs once behind the last of these.
  template <class LoadStep, class Prologue, class AfterPrologue>
  MIRAGE_DEVICE void run(LoadStep load_step, Prologue prologue, AfterPrologue after_prologue) {
    if constexpr (S::PIPELINED) run_pipelined(load_step, prologue);
    else run_plain(load_step, prologue);
    after_prologue();
  }
  template <class LoadStep, class Prologue>
  MIRAGE_DEVICE void run_plain(LoadStep load_step, Prologue prologue) {
    MIRAGE_UNROLL
    for (int step = 0; step < S::STAGES; ++step) {
      load_step(step, activations[step]);  // before the weights of the step: they would wait behind them
      if (step >= S::EARLY) load(step);
    }
    MIRAGE_UNROLL
    for (int step = 0; step < S::STEPS; step += S::GROUP) {
      MIRAGE_UNROLL
      for (int c = 0; c < S::TOKEN_TILES; ++c) {
        Vec operand[S::GROUP];
        prepare(prologue, step, c, activations, step, operand);
        MIRAGE_UNROLL
        for (int i = 0; i < S::GROUP; ++i) multiply(step + i, c, operand[i]);
      }
      MIRAGE_UNROLL
      for (int next = step + S::STAGES; next < step + S::STAGES + S::GROUP; ++next) {
        if (next < S::STEPS) {
          load_step(next, activations[next % S::STAGES]);
          load(next);
        }
      }
    }
  }
  // The same with the operand of a step ready before its weights are waited for. A slot of the ring holds the operand beside the weights; the
  // activations of a step are asked for one group before its weights and are gone once these are asked for. With a prologue that computes, 1
  // token, H200: 14.6 us where run_plain() takes 15.6 (K 4096, N 6144), 48.9 instead of 52.8 with gate and up (N 12288); docs/perf-log.md.
  template <class LoadStep, class Prologue>
  MIRAGE_DEVICE void run_pipelined(LoadStep load_step, Prologue prologue) {
    Vec operand[S::STAGES / S::GROUP][S::TOKEN_TILES][S::GROUP];
    auto prepare_group = [&](int step, int first) {
      MIRAGE_UNROLL
      for (int c = 0; c < S::TOKEN_TILES; ++c) prepare(prologue, step, c, activations, first, operand[step % S::STAGES / S::GROUP][c]);
    };
    auto load_group = [&](int step) {
      MIRAGE_UNROLL
      for (int i = 0; i < S::GROUP; ++i) load_step(step + i, activations[i]);
    };
    MIRAGE_UNROLL
    for (int step = 0; step < S::STAGES; ++step) load_step(step, activations[step]);
    MIRAGE_UNROLL
    for (int step = S::EARLY; step < S::STAGES; ++step) load(step);
    MIRAGE_UNROLL
    for (int step = 0; step < S::STAGES; step += S::GROUP) prepare_group(step, step);
    if (S::STAGES < S::STEPS) load_group(S::STAGES);
    keep_order();
    MIRAGE_UNROLL
    for (int step = 0; step < S::STEPS; step += S::GROUP) {
      const int next = step + S::STAGES;
      MIRAGE_UNROLL
      for (int i = 0; i < S::GROUP; ++i)
        MIRAGE_UNROLL
      for (int c = 0; c < S::TOKEN_TILES; ++c) multiply(step + i, c, operand[step % S::STAGES / S::GROUP][c][i]);
      if (next < S::STEPS) {
        MIRAGE_UNROLL
        for (int i = 0; i < S::GROUP; ++i) load(next + i);
        keep_order();
        prepare_group(next, 0);
        if (next + S::GROUP < S::STEPS) load_group(next + S::GROUP);
        keep_order();
      }
    }
  }
  template <class Epilogue>
  MIRAGE_DEVICE void finish(unsigned char *shared, Position<S> const &at, int num_tokens, Epilogue epilogue) {
    MIRAGE_UNROLL
    for (int r = 0; r < S::ROW_TILES; ++r)
      MIRAGE_UNROLL
    for (int c = 0; c < S::TOKEN_TILES; ++c)
      MIRAGE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int token = c * kColumns + at.lane % 4 * 2 + i % 2, row = r % S::TILES * kRowTile + at.lane / 4 + i / 2 * 8;
      if (token < num_tokens && row < S::ROWS) store_shared(shared + partial_slot<S>(at.warp, token, r / S::TILES * S::ROWS + row), acc[r][c][i]);
    }
    finish_rows(shared, at, num_tokens, epilogue);
  }
};

// ------------------------------------------------------------------------------------------------ GEMV
// Reads each weight row over all threads of the block, one row after the other, several in flight; gate and up take turns. What follows the first
// STAGES rows is asked for together with them and waits in shared memory: loads into registers alone, however many, start memory more slowly.
// 1 token, H200: K 4096, N 2560 in 6.7 us where SkinnyGemm takes 8.5; K 4096, N 6144 in 12.7, 13.5 without the buffer (docs/perf-log.md).
template <class S>
struct Gemv {
  static constexpr int PART = S::STEPS % 16 == 0 ? 16 : S::STEPS % 8 == 0 ? 8 : S::STEPS % 4 == 0 ? 4 : 2;  // rows that a warp sums together
  Vec ring[S::STAGES][S::SLICES];  // weights in flight
  unsigned char const *weight;     // this thread's first 16 bytes of the block's first row
  unsigned char *const shared, *const buffer;
  Position<S> const &at;

  MIRAGE_DEVICE Gemv(void const *tensor, unsigned char *shared, Position<S> const &at)
      : weight(element(tensor, static_cast<uint64_t>(at.first_row) * S::K + at.first_k)), shared(shared),
        buffer(shared + S::BUFFER_OFFSET + at.thread * 16), at(at) {}
  // May run before the previous kernel has finished: weights do not depend on it.
  MIRAGE_DEVICE void start_early(void const *, Position<S> const &) {
    MIRAGE_UNROLL
    for (int step = 0; step < S::EARLY; ++step) load(step);
    if (S::EARLY > 0) load_buffered();
  }
  static MIRAGE_DEVICE constexpr bool is_buffered(int step) { return step >= S::STAGES && step < S::STAGES + S::BUFFERED; }
  static MIRAGE_DEVICE constexpr int slot(int step) { return (step < S::STAGES ? step : step - S::BUFFERED) % S::STAGES; }  // of the ring
  MIRAGE_DEVICE unsigned char *buffered(int step, int slice) { return buffer + ((step - S::STAGES) * S::SLICES + slice) * S::THREADS * 16; }
  template <class Take>
  MIRAGE_DEVICE void for_slices(int step, Take take) {  // take(slice, its address), unless the block lacks the row
    const int gemm = step % S::GEMMS, row = step / S::GEMMS;
    if (S::UNEVEN && row >= S::ROWS - 2 && row >= at.rows) return;
    MIRAGE_UNROLL
    for (int slice = 0; slice < S::SLICES; ++slice)
      take(slice, element(weight, (static_cast<uint64_t>(gemm) * S::N + row) * S::K + Position<S>::step_k(slice)));
  }
  MIRAGE_DEVICE void load(int step) {
    for_slices(step, [&](int slice, void const *address) { ring[slot(step)][slice] = load_weights(address); });
  }
  MIRAGE_DEVICE void load_buffered() {
    MIRAGE_UNROLL
    for (int step = S::STAGES; step < S::STAGES + S::BUFFERED; ++step)
      for_slices(step, [&](int slice, void const *address) { copy_to_shared(buffered(step, slice), address); });
  }
  // As SkinnyGemm::run(), with a slice of K in place of a step and a token in place of a tile.
  template <class LoadStep, class Prologue, class AfterPrologue>
  MIRAGE_DEVICE void run(LoadStep load_step, Prologue prologue, AfterPrologue after_prologue) {
    Fragments<S> activations[S::SLICES];
    MIRAGE_UNROLL
    for (int slice = 0; slice < S::SLICES; ++slice) load_step(slice, activations[slice]);
    MIRAGE_UNROLL
    for (int step = S::EARLY; step < S::STAGES; ++step) load(step);
    if (S::EARLY == 0) load_buffered();
    keep_order();
    float operand[S::TOKENS][S::SLICES][kVector];
    MIRAGE_UNROLL
    for (int slice = 0; slice < S::SLICES; ++slice)
      MIRAGE_UNROLL
    for (int token = 0; token < S::TOKENS; ++token) unpack(prologue(slice, token, activations[slice]), operand[token][slice]);
    after_prologue();
    keep_order();
    MIRAGE_UNROLL
    for (int part = 0; part < S::STEPS / PART; ++part) {
      float sums[S::TOKENS][PART];
      MIRAGE_UNROLL
      for (int i = 0; i < PART; ++i) {
        const int step = part * PART + i;
        if (S::BUFFERED > 0 && step == S::STAGES) wait_for_copies();
        multiply(step, operand, sums, i);
        const int next = step + S::STAGES + (step < S::STAGES) * S::BUFFERED;  // to take the place of this one in the ring
        if (!is_buffered(step) && next < S::STEPS) load(next);
        keep_order();
      }
      store_sums(part * PART, sums);
    }
  }
  MIRAGE_DEVICE void multiply(int step, float const (&operand)[S::TOKENS][S::SLICES][kVector], float (&sums)[S::TOKENS][PART], int i) {
    float two[S::TOKENS][2] = {};  // chains of FMAs, half as long as one
    MIRAGE_UNROLL
    for (int slice = 0; slice < S::SLICES; ++slice) {
      float row[kVector];
      unpack(is_buffered(step) ? load_shared(buffered(step, slice)) : ring[slot(step)][slice], row);
      MIRAGE_UNROLL
      for (int token = 0; token < S::TOKENS; ++token)
        MIRAGE_UNROLL
      for (int e = 0; e < kVector; ++e) two[token][e % 2] += row[e] * operand[token][slice][e];
    }
    MIRAGE_UNROLL
    for (int token = 0; token < S::TOKENS; ++token) sums[token][i] = two[token][0] + two[token][1];
  }
  // Leaves the warp's sums of rows first, first + 1, … where finish_rows() looks for them.
  MIRAGE_DEVICE void store_sums(int first, float (&sums)[S::TOKENS][PART]) {
    constexpr int LANES = kWarp / PART;
    const int step = first + at.lane / LANES;
    MIRAGE_UNROLL
    for (int token = 0; token < S::TOKENS; ++token) {
      const float sum = sum_over_lanes(sums[token]);
      if (at.lane % LANES == 0) store_shared(shared + partial_slot<S>(at.warp, token, step % S::GEMMS * S::ROWS + step / S::GEMMS), sum);
    }
  }
  // Sums each of PART values over the warp; the 32 / PART lanes from lane i * 32 / PART on return value i. Lanes swap halves of what they
  // have, so that PART - 1 shuffles do for all but the last rounds.
  static MIRAGE_DEVICE float sum_over_lanes(float (&values)[PART]) {
    const int lane = threadIdx.x % kWarp;
    int mask = kWarp / 2;
    MIRAGE_UNROLL
    for (int half = PART / 2; half > 0; half /= 2, mask /= 2) {
      const bool upper = lane & mask;
      MIRAGE_UNROLL
      for (int i = 0; i < half; ++i) {
        const float other = shuffle_xor(upper ? values[i] : values[i + half], mask);
        values[i] = (upper ? values[i + half] : values[i]) + other;
      }
    }
    float sum = values[0];
    MIRAGE_UNROLL
    for (; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
  }
  template <class Epilogue>
  MIRAGE_DEVICE void finish(unsigned char *, Position<S> const &, int num_tokens, Epilogue epilogue) {
    finish_rows(shared, at, num_tokens, epilogue);
  }
};

template <bool GEMV, class S>
struct Choose {
  using Gemm = SkinnyGemm<S>;
};
template <class S>
struct Choose<true, S> {
  using Gemm = Gemv<S>;
};
template <class S>
using Gemm = typename Choose<S::GEMV, S>::Gemm;

}  // namespace mirage
