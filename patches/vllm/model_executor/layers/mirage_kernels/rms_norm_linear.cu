// SPDX-License-Identifier: Apache-2.0
// Generated from the μGraph rms_norm_linear by `python -m mirage_codegen generate`; not to be edited.
//   S = add(X, R)
//   O = for each block and iteration:
//     s = input(S)
//     g = input(G)
//     s_scaled = mul(s, g)
//     w = input(W)
//     product = matmul(s_scaled, w)
//     acc = forloop_accum_no_red(product)
//     rms = forloop_accum_red_ld_rms(s)
//     out = div(acc, rms)
//     O = output(out)
#include "mirage_runtime.cuh"

struct Arguments {
  void *O;
  void *S;
  void const *X;
  void const *R;
  void const *G;
  void const *W;
  int num_tokens;
  float eps;
};

using Plan = mirage::Schedule<MIRAGE_K, MIRAGE_N, MIRAGE_TOKENS, MIRAGE_GRID, MIRAGE_FORLOOP, MIRAGE_CLUSTER, MIRAGE_WARPS,
                              MIRAGE_STAGES, MIRAGE_EARLY, MIRAGE_PREFETCH, MIRAGE_BUFFERED, MIRAGE_TILED, MIRAGE_LINES,
                              MIRAGE_PIPELINED, MIRAGE_GEMV, 1, 2, 1, 1>;

extern "C" __device__ const int mirage_launch_shape[5] = {
    Plan::GRID * Plan::CLUSTER, 0, Plan::THREADS, Plan::CLUSTER, Plan::SHARED_BYTES};

extern "C" __global__ void __launch_bounds__(Plan::THREADS, MIRAGE_OCCUPANCY) rms_norm_linear(Arguments args) {
  using namespace mirage;
  MIRAGE_SHARED(shared);
  const Position<Plan> at;
  if (Plan::CLUSTER > 1) cluster_arrive();
  Gemm<Plan> gemm(args.W, shared, at);
  gemm.start_early(args.W, at);
  release_next_kernel();
  wait_for_previous_kernel();
  auto load_step = [&](int step, Fragments<Plan> &f) {
    f.vector[0] = load_vector<Plan>(at, args.G, step);
    MIRAGE_UNROLL
    for (int c = 0; c < Plan::TOKEN_TILES; ++c) {
      f.input[0][c] = load_input<Plan>(at, args.X, args.num_tokens, c, step);
      f.input[1][c] = load_input<Plan>(at, args.R, args.num_tokens, c, step);
    }
  };
  float sum_0[Plan::TOKEN_TILES][Plan::GROUP] = {};
  auto prologue = [&](int step, int c, Fragments<Plan> const &f) {
    float X[kVector], R[kVector], G[kVector], S_out[kVector], operand[kVector];
    unpack(f.input[0][c], X);
    unpack(f.input[1][c], R);
    unpack(f.vector[0], G);
    MIRAGE_UNROLL
    for (int e = 0; e < kVector; ++e) {
      const float S = X[e] + R[e];
      const float s_scaled = S * G[e];
      sum_0[c][step % Plan::GROUP] += S * S;
      S_out[e] = S;
      operand[e] = s_scaled;
    }
    store_output<Plan>(at, args.S, args.num_tokens, c, step, S_out);
    return pack(operand);
  };
  auto after_prologue = [&] {
    if (Plan::CLUSTER > 1) cluster_wait();  // the other blocks have started: their shared memory may be written
    MIRAGE_UNROLL
    for (int c = 0; c < Plan::TOKEN_TILES; ++c) store_row_sum<Plan>(shared, at, 0, c, sum_0[c]);
  };
  gemm.run(load_step, prologue, after_prologue);
  gemm.finish(shared, at, args.num_tokens, [&](int token, int n, float (&acc)[1][2]) {
    const float square_of_rms = row_sum<Plan>(shared, 0, token) * (1.0f / Plan::K) + args.eps;
    const float inverse_rms = inverse_sqrt(square_of_rms);
    float result[2];
    MIRAGE_UNROLL
    for (int j = 0; j < 2; ++j) {
      const float out = acc[0][j] * inverse_rms;
      result[j] = out;
    }
    store_global(element(args.O, static_cast<uint64_t>(token) * Plan::N + n), to_pair(result[0], result[1]));
  });
}
