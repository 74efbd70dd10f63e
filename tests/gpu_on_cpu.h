// Stands in for runtime/fused/device.cuh: kernels compiled with g++, each thread of a block a fiber.
//
// A fiber runs until it meets a barrier, a warp's exchange or a wait. A barrier that not all threads of the block reach, or a wait
// for what never comes, ends the launch with an error. Threads run in ascending or in descending order between barriers: results
// that differ tell of a race. Shared memory starts as NaN and ends at a page that may not be touched.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <vector>

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { unsigned x = 0, y = 0, z = 0; };

namespace gpu {

struct Barrier {
  unsigned size = 0, arrived = 0, generation = 0;
};
struct Warp {
  Barrier barrier;
  float value[32];
  unsigned a[32][4], b[32][2];
  float* sum[32];
};
struct Block {
  Index index;
  unsigned char* shared = nullptr;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Block*> cluster;
  Barrier* cluster_barrier = nullptr;
};
struct Copy {
  void* to;
  const void* from;
  unsigned group;
};
struct Fiber {
  Index thread;
  Block* block = nullptr;
  jmp_buf where;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  bool started = false, ended = false;
  std::vector<Copy> copies;            // that it began and has not waited for
  unsigned n_groups = 0;               // of copies that it committed
  const unsigned* waits_at = nullptr;  // sleeps while this generation lasts
  unsigned generation = 0;
  unsigned seen = 0, looks = 0;        // `progress` at its latest pause, and its pauses at that progress
};

// A thread asks for numbers early, waits for others, and then judges the early ones. The write that it misses may have happened in
// between, and nothing may ever be written after it: the thread must look again before it sleeps. A thread has at most this many early
// looks at a time, `before` and `pending` in contextual.cu, so that its next pause at the same progress follows a fresh one.
constexpr unsigned EARLY_LOOKS = 2;
constexpr size_t STACK = 32768;
static thread_local Fiber* self;
static thread_local jmp_buf scheduler;
static thread_local Index grid_size, block_size;
static thread_local unsigned progress;  // grows with every write that another block may wait for
static thread_local bool nothing_comes;  // all that is left waits for such a write

static void yield() {
  if (!_setjmp(self->where)) _longjmp(scheduler, 1);
}

static void arrive(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  self->waits_at = &barrier.generation;
  self->generation = generation;
  yield();
}

static Warp& my_warp() { return self->block->warps[self->thread.x / 32]; }
static unsigned my_lane() { return self->thread.x % 32; }
static float of_bits(unsigned bits) { float v; std::memcpy(&v, &bits, 4); return v; }
static unsigned bits_of(float v) { unsigned bits; std::memcpy(&bits, &v, 4); return bits; }

}  // namespace gpu

#define threadIdx (gpu::self->thread)
#define blockIdx (gpu::self->block->index)
#define gridDim (gpu::grid_size)
#define DEVICE [[maybe_unused]] static inline
#define DEVICE_MEMBER inline
#define SHARED_MEMORY unsigned char* shared_memory = gpu::self->block->shared
#define KERNEL extern "C" void
#define CLUSTER_KERNEL KERNEL
#define TELL_SIZE(type) unsigned shared_bytes = sizeof(type);

DEVICE void __syncthreads() { gpu::arrive(gpu::self->block->barrier); }
DEVICE void __syncwarp() { gpu::arrive(gpu::my_warp().barrier); }
DEVICE void __threadfence() {}
DEVICE void __threadfence_system() {}
DEVICE unsigned atomicAdd(unsigned* p, unsigned v) { const unsigned old = *p; *p += v; ++gpu::progress; return old; }
DEVICE float __uint_as_float(unsigned bits) { return gpu::of_bits(bits); }
DEVICE unsigned __float_as_uint(float v) { return gpu::bits_of(v); }

DEVICE uint4 load_weight4(const uint4* p) { return *p; }
DEVICE float load_weight(const float* p) { return *p; }
DEVICE float load_fresh(const float* p) { return *p; }
DEVICE float4 load_fresh4(const float4* p) { return *p; }
DEVICE float load_input(const float* p) { return *p; }
DEVICE float4 load_input4(const float4* p) { return *p; }
DEVICE float load_once(const float* p) { return *p; }
DEVICE float4 load_once4(const float4* p) { return *p; }

// A copy happens when its thread waits for it, as late as it may on a GPU.
DEVICE void copy16(void* shared, const void* global) { gpu::self->copies.push_back({shared, global, gpu::self->n_groups}); }
DEVICE void commit_copies() { ++gpu::self->n_groups; }
DEVICE void finish_copies(unsigned before) {
  std::vector<gpu::Copy>& copies = gpu::self->copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < before; ++done) std::memcpy(copies[done].to, copies[done].from, 16);
  copies.erase(copies.begin(), copies.begin() + done);
}
template <int N>
DEVICE void wait_copies() {
  if (gpu::self->n_groups > N) finish_copies(gpu::self->n_groups - N);
}
DEVICE void copies_arrived() { finish_copies(gpu::self->n_groups + 1); }
DEVICE uint4 load_fresh_bits4(const uint4* p) { return *p; }
DEVICE unsigned load_acquire(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
DEVICE unsigned load_volatile(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
DEVICE unsigned long long load_acquire_system(const unsigned long long* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
DEVICE unsigned long long load_acquire(const unsigned long long* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
DEVICE void store_release(unsigned long long* p, unsigned long long v) { ++gpu::progress; __atomic_store_n(p, v, __ATOMIC_RELEASE); }
DEVICE void store_release_system(unsigned* p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
DEVICE void store_marked(unsigned long long* p, float v, unsigned mark) {
  ++gpu::progress;
  __atomic_store_n(p, (unsigned long long)mark << 32 | gpu::bits_of(v), __ATOMIC_RELEASE);
}
DEVICE void store_marked_system(unsigned long long* p, float v, unsigned mark) { store_marked(p, v, mark); }
DEVICE uint4 load_marked2(const unsigned long long* p) {
  return uint4{(unsigned)p[0], (unsigned)(p[0] >> 32), (unsigned)p[1], (unsigned)(p[1] >> 32)};
}
DEVICE unsigned long long load_marked(const unsigned long long* p) { return *p; }
DEVICE void store_whole(uint4* p, const uint4& v) { ++gpu::progress; *p = v; }
DEVICE uint4 load_whole(const uint4* p) { return *p; }
DEVICE long long now() { return gpu::nothing_comes ? 1ll << 40 : 0; }
DEVICE long long nanoseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}
DEVICE void pause() {
  gpu::Fiber& me = *gpu::self;
  if (me.seen != gpu::progress) me.seen = gpu::progress, me.looks = 0;
  if (++me.looks > gpu::EARLY_LOOKS) me.waits_at = &gpu::progress, me.generation = gpu::progress;
  gpu::yield();
}
DEVICE void rest() { gpu::yield(); }

DEVICE float shuffle_xor(float v, int mask) {
  gpu::Warp& warp = gpu::my_warp();
  warp.value[gpu::my_lane()] = v;
  gpu::arrive(warp.barrier);
  const float other = warp.value[gpu::my_lane() ^ mask];
  gpu::arrive(warp.barrier);
  return other;
}

DEVICE void cluster_sync() { if (CLUSTER > 1) gpu::arrive(*gpu::self->block->cluster_barrier); }
template <class T>
static T* remote(T* shared, unsigned rank) {
  gpu::Block* there = gpu::self->block->cluster[rank];
  return reinterpret_cast<T*>(there->shared + (reinterpret_cast<const unsigned char*>(shared) - gpu::self->block->shared));
}
DEVICE float load_remote(const float* shared, unsigned rank) { return *remote(shared, rank); }
DEVICE unsigned load_remote(const unsigned* shared, unsigned rank) { return *remote(shared, rank); }
DEVICE void store_remote(float* shared, unsigned rank, float v) { *remote(shared, rank) = v; }

// Round to nearest, ties away from zero, at 10 bits of mantissa; NaN and infinity stay.
DEVICE unsigned to_tf32(float v) {
  const unsigned bits = gpu::bits_of(v);
  return std::isfinite(v) ? (bits + 0x1000u) & ~0x1fffu : bits & ~0x1fffu;
}

DEVICE unsigned upper_tf32(float v) { return gpu::bits_of(v) & 0xffffe000u; }
DEVICE unsigned lower_tf32(float v) { return gpu::bits_of(v - gpu::of_bits(upper_tf32(v))) + 0x1000u; }

DEVICE unsigned short to_half(float v) {
  const _Float16 half = (_Float16)v;
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

DEVICE float2 from_half2(unsigned bits) {
  _Float16 halves[2];
  std::memcpy(halves, &bits, 4);
  return float2{(float)halves[0], (float)halves[1]};
}

DEVICE unsigned to_half2(float low, float high) {
  const _Float16 halves[2] = {(_Float16)low, (_Float16)high};
  unsigned bits;
  std::memcpy(&bits, halves, 4);
  return bits;
}

namespace gpu {

// The fragments of PTX's mma.m16n8kK, K = 8 numbers in 32 bits or 16 halves: see "Matrix fragments for mma.m16n8k8" in PTX's manual.
// The lane that comes last does the work of all.
template <int K, class Get>
static void mma(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1, Get get) {
  Warp& warp = my_warp();
  const unsigned mine = my_lane();
  const unsigned regs[4] = {a.x, a.y, a.z, a.w};
  std::copy(regs, regs + 4, warp.a[mine]);
  warp.b[mine][0] = b0, warp.b[mine][1] = b1;
  warp.sum[mine] = sum;
  if (warp.barrier.arrived + 1 == warp.barrier.size) {
    constexpr int QUARTER = K / 2;  // numbers of the first register of each operand's four lanes
    float left[16][K], right[8][K];
    for (int k = 0; k < K; ++k) {
      const unsigned in_quad = k % QUARTER, part = in_quad % (QUARTER / 4), quad = in_quad / (QUARTER / 4), high = k / QUARTER;
      for (int row = 0; row < 16; ++row) left[row][k] = get(warp.a[row % 8 * 4 + quad][row / 8 + high * 2], part);
      for (int column = 0; column < 8; ++column) right[column][k] = get(warp.b[column * 4 + quad][high], part);
    }
    for (unsigned lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        float total = 0;
        for (int k = 0; k < K; ++k) total += left[lane / 4 + i / 2 * 8][k] * right[lane % 4 * 2 + i % 2][k];
        warp.sum[lane][i] += total;
      }
  }
  arrive(warp.barrier);
}

}  // namespace gpu

DEVICE void mma_tf32(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1) {
  gpu::mma<8>(sum, a, b0, b1, [](unsigned bits, unsigned) { return gpu::of_bits(bits & ~0x1fffu); });
}

DEVICE void mma_half(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1) {
  gpu::mma<16>(sum, a, b0, b1, [](unsigned bits, unsigned part) {
    _Float16 halves[2];
    std::memcpy(halves, &bits, 4);
    return (float)halves[part];
  });
}

// ---- 16-bit numbers, two in a register ----

namespace gpu {

#if BFLOAT
static float number(unsigned bits, unsigned part) { return of_bits(part ? bits & 0xffff0000u : bits << 16); }
static unsigned short rounded(float v) {
  const unsigned bits = bits_of(v);
  return std::isnan(v) ? 0x7fff : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
#else
static float number(unsigned bits, unsigned part) { return part ? from_half2(bits).y : from_half2(bits).x; }
static unsigned short rounded(float v) { return to_half(v); }
#endif

}  // namespace gpu

DEVICE unsigned pack2(float low, float high) { return gpu::rounded(low) | (unsigned)gpu::rounded(high) << 16; }
DEVICE unsigned pack2_relu(float low, float high) { return pack2(low < 0 ? 0.0f : low, high < 0 ? 0.0f : high); }
DEVICE float2 unpack2(unsigned bits) { return float2{gpu::number(bits, 0), gpu::number(bits, 1)}; }
DEVICE float power2(float v) { return exp2f(v); }
DEVICE float reciprocal(float v) { return 1.0f / v; }

DEVICE void mma_16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  gpu::mma<16>(sum, uint4{a[0], a[1], a[2], a[3]}, b0, b1, gpu::number);
}

// K = 8: "Matrix fragments for mma.m16n8k8" of 16-bit numbers, which are the lower halves of those for K = 16.
DEVICE void mma_8(float (&sum)[4], unsigned a0, unsigned a1, unsigned b) {
  gpu::mma<16>(sum, uint4{a0, a1, 0, 0}, b, 0, gpu::number);
}

DEVICE unsigned transpose8(unsigned v) {
  gpu::Warp& warp = gpu::my_warp();
  const unsigned lane = gpu::my_lane();
  warp.a[lane][0] = v;
  gpu::arrive(warp.barrier);
  unsigned result = 0;
  for (unsigned i = 0; i < 2; ++i) {  // row lane / 4, columns lane % 4 * 2 + i of the transpose
    const unsigned row = lane % 4 * 2 + i, column = lane / 4;
    result |= (warp.a[row * 4 + column / 2][0] >> column % 2 * 16 & 0xffffu) << i * 16;
  }
  gpu::arrive(warp.barrier);
  return result;
}
