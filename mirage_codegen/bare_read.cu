// SPDX-License-Identifier: Apache-2.0
// Only reads: what any kernel takes for these bytes, its launch, first access and drain included.
#include "mirage_runtime.cuh"

struct Arguments {
  mirage::Vec const *begin;
  mirage::Vec const *end;
  uint32_t *out;
  int num_tokens;  // not used: the launcher asks for it
};

extern "C" __device__ const int mirage_launch_shape[5] = {MIRAGE_BLOCKS, 0, MIRAGE_THREADS, 1, 0};

extern "C" __global__ void __launch_bounds__(MIRAGE_THREADS) bare_read(Arguments args) {
  using namespace mirage;
  constexpr int kLoads = 4;  // in flight for each thread
  constexpr int kLine = 8;   // vectors of 128 bytes: each block reads whole lines, one behind the other
  const uint64_t share = (args.end - args.begin + MIRAGE_BLOCKS * kLine - 1) / (MIRAGE_BLOCKS * kLine) * kLine;
  Vec const *begin = args.begin + blockIdx.x * share;
  Vec const *end = begin + share < args.end ? begin + share : args.end;
  uint32_t sum = 0;
  for (Vec const *at = begin + threadIdx.x; at < end; at += kLoads * MIRAGE_THREADS) {
    Vec loaded[kLoads] = {};
    MIRAGE_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      if (at + i * MIRAGE_THREADS < end) loaded[i] = load_weights(at + i * MIRAGE_THREADS);
    }
    MIRAGE_UNROLL
    for (int i = 0; i < kLoads; ++i) sum += loaded[i].word[0] + loaded[i].word[1] + loaded[i].word[2] + loaded[i].word[3];
  }
  if (sum == 0x12345678) *args.out = sum;  // hardly ever, which the compiler cannot know
}
