// SPDX-License-Identifier: Apache-2.0
// Runs a generated kernel on the CPU, one cluster of blocks at a time, from the same source that NVRTC compiles for a GPU.
//
// Every GPU thread is a fiber; a warp runs until all its lanes wait, and the next warp is chosen at random but for one that always
// comes last, so that warps drift apart as far as the barriers let them. Shared memory starts as NaN. Stores to shared memory either land at once or are held
// back until the storing thread reaches a barrier (`delayed`): a missing barrier then shows as NaN or as a wrong sum. Asynchronous copies land
// when they are waited for.
// Modelled: block and cluster barriers, distributed shared memory, mma m16n8k16, shuffles. Not modelled: time, caches, launch order.
#pragma once
#include <assert.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __restrict__
#define MIRAGE_DEVICE inline
#define MIRAGE_UNROLL
#define MIRAGE_SHARED(name) unsigned char *name = mirage::emulator::shared_memory()

struct Dim {
  unsigned x;
};
static Dim threadIdx, blockIdx;

namespace mirage {
struct alignas(16) Vec;

namespace emulator {
constexpr int kShared = 232448;
enum State { kReady, kAtWarp, kAtBlock, kAtCluster, kDone };
struct Store {
  unsigned char *address;
  unsigned char bytes[16];
  int size;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  int thread, block, arrivals;
  std::vector<Store> pending, copies;
};
struct WarpExchange {
  uint32_t a[32][4], b[32][2];
  float value[32];
};
static std::vector<Fiber> fibers;
static std::vector<unsigned char> memory;
static std::vector<WarpExchange> exchange;
static Fiber *self;
static ucontext_t scheduler;
static bool delayed;
static std::vector<void const *> prefetched;  // the address of each request
static int threads_per_block, first_block;
static void (*kernel_body)();

static unsigned char *shared_of(int block) {
  unsigned char *base = memory.data() + static_cast<size_t>(block) * (kShared + 128);
  return base + (128 - reinterpret_cast<uintptr_t>(base) % 128) % 128;
}
static unsigned char *shared_memory() { return shared_of(self->block); }
static void switch_to_scheduler(State state) {
  Fiber *fiber = self;
  fiber->state = state;
  swapcontext(&fiber->context, &scheduler);
}
static void land_stores() {
  for (Store &s : self->pending) memcpy(s.address, s.bytes, s.size);
  self->pending.clear();
}
static void trampoline() {
  kernel_body();
  land_stores();
  self->state = kDone;
  swapcontext(&self->context, &scheduler);
}
static void store(void *address, void const *value, int size) {
  assert(reinterpret_cast<uintptr_t>(address) % size == 0);
  if (!delayed) {
    memcpy(address, value, size);
    return;
  }
  Store s{static_cast<unsigned char *>(address), {}, size};
  memcpy(s.bytes, value, size);
  self->pending.push_back(s);
}
static void load(void *value, void const *address, int size) {
  assert(reinterpret_cast<uintptr_t>(address) % size == 0);
  memcpy(value, address, size);
  for (Store &s : self->pending)  // a thread sees its own stores
    if (s.address == address) memcpy(value, s.bytes, size);
}
static WarpExchange &my_warp() { return exchange[(self->block * threads_per_block + self->thread) / 32]; }
static void run_fiber(Fiber &fiber) {
  self = &fiber;
  threadIdx.x = fiber.thread;
  blockIdx.x = first_block + fiber.block;
  swapcontext(&scheduler, &fiber.context);
}
static bool run_warp(size_t first) {  // as far as it can go; true if anything ran
  bool progress = false;
  for (;;) {
    int waiting = 0, alive = 0;
    bool ran = false;
    for (size_t i = first; i < first + 32; ++i) {
      if (fibers[i].state == kReady) run_fiber(fibers[i]), ran = true;
      alive += fibers[i].state != kDone;
      waiting += fibers[i].state == kAtWarp;
    }
    if (alive && waiting == 32) {
      for (size_t i = first; i < first + 32; ++i) fibers[i].state = kReady;
      ran = true;
    }
    if (!ran) return progress;
    progress = true;
  }
}
static bool open_barriers(int blocks) {
  bool progress = false;
  int arrivals = 1 << 30;
  for (Fiber &f : fibers)
    if (f.state != kDone && f.arrivals < arrivals) arrivals = f.arrivals;
  for (Fiber &f : fibers)
    if (f.state == kAtCluster && f.arrivals <= arrivals) f.state = kReady, progress = true;
  for (int block = 0; block < blocks; ++block) {
    int waiting = 0, alive = 0;
    for (int t = 0; t < threads_per_block; ++t) {
      Fiber &f = fibers[block * threads_per_block + t];
      alive += f.state != kDone;
      waiting += f.state == kAtBlock;
    }
    if (waiting == 0 || waiting != alive) continue;
    for (int t = 0; t < threads_per_block; ++t)
      if (fibers[block * threads_per_block + t].state == kAtBlock) fibers[block * threads_per_block + t].state = kReady;
    progress = true;
  }
  return progress;
}
static int run_cluster(int block, int blocks, int threads, void (*body)()) {  // 0: done, 1: deadlock
  first_block = block, threads_per_block = threads, kernel_body = body;
  memory.assign(static_cast<size_t>(blocks) * (kShared + 128), 0xff);
  exchange.resize(static_cast<size_t>(blocks) * threads / 32);
  if (fibers.size() != static_cast<size_t>(blocks) * threads) fibers = std::vector<Fiber>(static_cast<size_t>(blocks) * threads);
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber &f = fibers[i];
    f.stack.resize(64 * 1024);
    f.state = kReady, f.thread = static_cast<int>(i) % threads, f.block = static_cast<int>(i) / threads, f.arrivals = 0;
    f.pending.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size(), f.context.uc_link = nullptr;
    makecontext(&f.context, trampoline, 0);
  }
  const size_t warps = fibers.size() / 32, late = rand() % warps;
  for (;;) {
    bool progress = false, done = true;
    const size_t start = rand() % warps;
    for (size_t i = 0; i < warps && !progress; ++i)
      if ((start + i) % warps != late) progress = run_warp((start + i) % warps * 32);
    if (!progress) progress = open_barriers(blocks) || run_warp(late * 32);
    for (Fiber &f : fibers) done = done && f.state == kDone;
    if (done) return 0;
    if (!progress) return 1;
  }
}
}  // namespace emulator

static float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
#ifdef MIRAGE_FP16
static float element_to_float(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
static uint16_t float_to_element(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
#else
static float element_to_float(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }
static uint16_t float_to_element(float value) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
#endif
static inline float low_to_float(uint32_t pair) { return element_to_float(static_cast<uint16_t>(pair)); }
static inline float high_to_float(uint32_t pair) { return element_to_float(static_cast<uint16_t>(pair >> 16)); }
static inline uint32_t to_pair(float low, float high) { return float_to_element(low) | static_cast<uint32_t>(float_to_element(high)) << 16; }
static inline float inverse_sqrt(float x) { return 1.0f / sqrtf(x); }
static inline float divide(float x, float y) { return x / y; }
static inline float silu(float x) { return x / (1.0f + expf(-x)); }

template <class V>
static inline V load_bytes(void const *address) {
  V v;
  assert(reinterpret_cast<uintptr_t>(address) % sizeof(V) == 0);
  memcpy(&v, address, sizeof(V));
  return v;
}
#define load_weights(address) load_bytes<Vec>(address)
#define load_global(address) load_bytes<Vec>(address)
#define load_global_pair(address) load_bytes<uint32_t>(address)
template <class V>
static inline void store_global(void *address, V v) {
  assert(reinterpret_cast<uintptr_t>(address) % sizeof(V) == 0);
  memcpy(address, &v, sizeof(V));
}
template <class V>
static inline void store_global_if(bool condition, void *address, V v) {
  if (condition) store_global(address, v);
}
template <class V>
static inline void store_shared(void *address, V v) {
  emulator::store(address, &v, sizeof(V));
}
template <class V>
static inline V load_shared_as(void const *address) {
  V v;
  emulator::load(&v, address, sizeof(V));
  return v;
}
#define load_shared(address) load_shared_as<Vec>(address)
#define load_shared_float(address) load_shared_as<float>(address)

static inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulator::WarpExchange &warp = emulator::my_warp();
  const int lane = emulator::self->thread % 32;
  warp.a[lane][0] = a0, warp.a[lane][1] = a1, warp.a[lane][2] = a2, warp.a[lane][3] = a3;
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  emulator::switch_to_scheduler(emulator::kAtWarp);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const uint32_t a = warp.a[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8], b = warp.b[column * 4 + k % 8 / 2][k / 8];
      sum += static_cast<double>(k % 2 ? high_to_float(a) : low_to_float(a)) * (k % 2 ? high_to_float(b) : low_to_float(b));
    }
    c[i] += static_cast<float>(sum);
  }
  emulator::switch_to_scheduler(emulator::kAtWarp);
}
static inline float exp2_fast(float x) { return exp2f(x); }
static inline float shuffle(float v, int from) {
  emulator::WarpExchange &warp = emulator::my_warp();
  warp.value[emulator::self->thread % 32] = v;
  emulator::switch_to_scheduler(emulator::kAtWarp);
  const float other = warp.value[from];
  emulator::switch_to_scheduler(emulator::kAtWarp);
  return other;
}
static inline float shuffle_xor(float v, int mask) { return shuffle(v, emulator::self->thread % 32 ^ mask); }
static inline uint32_t shuffle_xor(uint32_t v, int mask) {
  float bits;
  memcpy(&bits, &v, 4);
  bits = shuffle_xor(bits, mask);
  memcpy(&v, &bits, 4);
  return v;
}
static inline void block_barrier() {
  emulator::land_stores();
  emulator::switch_to_scheduler(emulator::kAtBlock);
}
static inline void cluster_arrive() {
  emulator::land_stores();
  ++emulator::self->arrivals;
}
static inline void cluster_wait() { emulator::switch_to_scheduler(emulator::kAtCluster); }
static inline int cluster_rank() { return emulator::self->block; }
static inline void store_cluster(void *address, int rank, float v) {
  unsigned char *remote = emulator::shared_of(rank) + (static_cast<unsigned char *>(address) - emulator::shared_memory());
  emulator::store(remote, &v, sizeof v);
}
static inline void prefetch_l2(void const *address) { emulator::prefetched.push_back(address); }
static inline void copy_to_shared(void *shared, void const *address) {
  assert(reinterpret_cast<uintptr_t>(shared) % 16 == 0 && reinterpret_cast<uintptr_t>(address) % 16 == 0);
  emulator::Store s{static_cast<unsigned char *>(shared), {}, 16};
  memcpy(s.bytes, address, 16);
  emulator::self->copies.push_back(s);
}
static inline void wait_for_copies() {
  for (emulator::Store &s : emulator::self->copies) memcpy(s.address, s.bytes, s.size);
  emulator::self->copies.clear();
}
static inline void wait_for_previous_kernel() {}
static inline void release_next_kernel() {}
static inline void keep_order() {}
}  // namespace mirage
