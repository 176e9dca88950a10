// SPDX-License-Identifier: Apache-2.0
// Generated from the μGraph linear by `python -m mirage_codegen generate`; not to be edited.
//   O = for each block and iteration:
//     x = input(X)
//     w = input(W)
//     product = matmul(x, w)
//     acc = forloop_accum_no_red(product)
//     O = output(acc)
#include "mirage_runtime.cuh"

struct Arguments {
  void *O;
  void const *X;
  void const *W;
  int num_tokens;
};

using Plan = mirage::Schedule<MIRAGE_K, MIRAGE_N, MIRAGE_TOKENS, MIRAGE_GRID, MIRAGE_FORLOOP, MIRAGE_CLUSTER, MIRAGE_WARPS,
                              MIRAGE_STAGES, MIRAGE_EARLY, MIRAGE_PREFETCH, MIRAGE_BUFFERED, MIRAGE_TILED, MIRAGE_LINES,
                              MIRAGE_PIPELINED, MIRAGE_GEMV, 1, 1, 0, 0>;

extern "C" __device__ const int mirage_launch_shape[5] = {
    Plan::GRID * Plan::CLUSTER, 0, Plan::THREADS, Plan::CLUSTER, Plan::SHARED_BYTES};

extern "C" __global__ void __launch_bounds__(Plan::THREADS, MIRAGE_OCCUPANCY) linear(Arguments args) {
  using namespace mirage;
  MIRAGE_SHARED(shared);
  const Position<Plan> at;
  if (Plan::CLUSTER > 1) cluster_arrive();
  Gemm<Plan> gemm(args.W, shared, at);
  gemm.start_early(args.W, at);
  release_next_kernel();
  wait_for_previous_kernel();
  auto load_step = [&](int step, Fragments<Plan> &f) {
    MIRAGE_UNROLL
    for (int c = 0; c < Plan::TOKEN_TILES; ++c) {
      f.input[0][c] = load_input<Plan>(at, args.X, args.num_tokens, c, step);
    }
  };
  auto prologue = [&](int, int c, Fragments<Plan> const &f) { return f.input[0][c]; };
  auto after_prologue = [&] {
    if (Plan::CLUSTER > 1) cluster_wait();  // the other blocks have started: their shared memory may be written
  };
  gemm.run(load_step, prologue, after_prologue);
  gemm.finish(shared, at, args.num_tokens, [&](int token, int n, float (&acc)[1][2]) {
    float result[2];
    MIRAGE_UNROLL
    for (int j = 0; j < 2; ++j) {
      result[j] = acc[0][j];
    }
    store_global(element(args.O, static_cast<uint64_t>(token) * Plan::N + n), to_pair(result[0], result[1]));
  });
}
