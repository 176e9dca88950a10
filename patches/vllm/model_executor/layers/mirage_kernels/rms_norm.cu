// SPDX-License-Identifier: Apache-2.0
// Generated from the μGraph rms_norm by `python -m mirage_codegen generate`; not to be edited.
//   S = add(X, R)
//   O = for each block and iteration:
//     s = input(S)
//     g = input(G)
//     s_scaled = mul(s, g)
//     acc = forloop_accum_no_red(s_scaled)
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
  void const *next_weights;
  int num_tokens;
  float eps;
};

using Plan = mirage::RowSchedule<MIRAGE_K, MIRAGE_THREADS, MIRAGE_NEXT_ROWS, MIRAGE_WARM>;

extern "C" __device__ const int mirage_launch_shape[5] = {
    Plan::WARM_BLOCKS, 1, Plan::THREADS, 1, Plan::SHARED_BYTES};

extern "C" __global__ void __launch_bounds__(Plan::THREADS) rms_norm(Arguments args) {
  using namespace mirage;
  MIRAGE_SHARED(shared);
  release_next_kernel();
  if (warm_next_weights<Plan>(args.next_weights, args.num_tokens)) return;  // a block behind those of the tokens
  wait_for_previous_kernel();
  const uint64_t row = static_cast<uint64_t>(blockIdx.x) * Plan::K;
  float s_scaled_kept[Plan::VECTORS_PER_THREAD][kVector];
  float sum_0 = 0.0f;
  MIRAGE_UNROLL
  for (int v = 0; v < Plan::VECTORS_PER_THREAD; ++v) {
    const int k = (v * Plan::THREADS + threadIdx.x) * kVector;
    if (Plan::K % (Plan::THREADS * kVector) != 0 && k >= Plan::K) continue;
    float X[kVector], R[kVector], G[kVector], S_out[kVector];
    const Vec G_fragment = load_global(element(args.G, k));
    const Vec X_fragment = load_global(element(args.X, row + k));
    const Vec R_fragment = load_global(element(args.R, row + k));
    unpack(X_fragment, X);
    unpack(R_fragment, R);
    unpack(G_fragment, G);
    MIRAGE_UNROLL
    for (int e = 0; e < kVector; ++e) {
      const float S = X[e] + R[e];
      const float s_scaled = S * G[e];
      sum_0 += S * S;
      s_scaled_kept[v][e] = s_scaled;
      S_out[e] = S;
    }
    store_global(element(args.S, row + k), pack(S_out));
  }
  const float square_of_rms = block_sum<Plan>(shared, sum_0) * (1.0f / Plan::K) + args.eps;
  const float inverse_rms = inverse_sqrt(square_of_rms);
  MIRAGE_UNROLL
  for (int v = 0; v < Plan::VECTORS_PER_THREAD; ++v) {
    const int k = (v * Plan::THREADS + threadIdx.x) * kVector;
    if (Plan::K % (Plan::THREADS * kVector) != 0 && k >= Plan::K) continue;
    float result[kVector];
    MIRAGE_UNROLL
    for (int e = 0; e < kVector; ++e) {
      const float out = s_scaled_kept[v][e] * inverse_rms;
      result[e] = out;
    }
    store_global(element(args.O, tiled_index(blockIdx.x, k, Plan::K)), pack(result));
  }
}
