// Wraps the GPU instructions that the kernels need beyond CUDA C++. Everything that is not plain C++ stands here, so that
// tests/gpu_on_cpu.h can replace this file and run the kernels on a CPU.
#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define SHARED_MEMORY extern __shared__ __align__(16) unsigned char shared_memory[]
#ifndef RESIDENT
#define RESIDENT 1  // blocks that a multiprocessor holds at once
#endif
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
#if CLUSTER > 1
#define CLUSTER_KERNEL extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
#else
#define CLUSTER_KERNEL KERNEL
#endif
// How the host learns the size of a block's shared memory: a kernel of its own, as compilers differ in which variables they show.
#define TELL_SIZE(type) \
  extern "C" __global__ void shared_bytes(unsigned* size) { *size = sizeof(type); }
#define INFINITY __int_as_float(0x7f800000)

// Weights: nothing writes them while a kernel runs. Volatile, so that a load stays before the wait that it is meant to overlap.
DEVICE uint4 load_weight4(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

DEVICE float load_weight(const float* p) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}

// What another block wrote in this launch: from L2, never from a line that this multiprocessor has kept.
DEVICE float load_fresh(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}

DEVICE float4 load_fresh4(const float4* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}

DEVICE uint4 load_fresh_bits4(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// The input, which lies in pinned host memory or in device memory and changes between launches.
DEVICE float load_input(const float* p) {
  float v;
  asm volatile("ld.volatile.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}

DEVICE float4 load_input4(const float4* p) {
  float4 v;
  asm volatile("ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}

// The input where it lies in device memory and no launch changes it.
DEVICE float load_once(const float* p) { return __ldg(p); }
DEVICE float4 load_once4(const float4* p) { return __ldg(p); }

// 16 bytes from global to shared memory without passing through registers; `copies_arrived` waits for this thread's.
DEVICE void copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
}

// The same in groups: `commit_copies` ends a group, `wait_copies<N>` waits for all of this thread's groups but the newest N.
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

DEVICE void copies_arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A number and a mark in one access of 8 bytes, which the memory model keeps whole: who sees the mark has the number, with neither a
// fence nor a counter. `p` points to pairs of a float and its mark; a load takes two of them.
DEVICE void store_marked(unsigned long long* p, float v, unsigned mark) {
  const unsigned long long both = (unsigned long long)mark << 32 | __float_as_uint(v);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(both) : "memory");
}

DEVICE void store_marked_system(unsigned long long* p, float v, unsigned mark) {
  const unsigned long long both = (unsigned long long)mark << 32 | __float_as_uint(v);
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(both) : "memory");
}

DEVICE uint4 load_marked2(const unsigned long long* p) {
  unsigned long long one, other;
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(one), "=l"(other) : "l"(p) : "memory");
  return uint4{(unsigned)one, (unsigned)(one >> 32), (unsigned)other, (unsigned)(other >> 32)};
}

DEVICE unsigned long long load_marked(const unsigned long long* p) {
  unsigned long long v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

// The same of 16 bytes that are kept whole.
DEVICE void store_whole(uint4* p, const uint4& v) {
  asm volatile(
      "{.reg .b64 low, high; .reg .b128 all; mov.b64 low, {%1, %2}; mov.b64 high, {%3, %4}; mov.b128 all, {low, high};"
      " st.relaxed.gpu.global.b128 [%0], all;}" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

DEVICE uint4 load_whole(const uint4* p) {
  uint4 v;
  asm volatile(
      "{.reg .b64 low, high; .reg .b128 all; ld.relaxed.gpu.global.b128 all, [%4]; mov.b128 {low, high}, all;"
      " mov.b64 {%0, %1}, low; mov.b64 {%2, %3}, high;}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

DEVICE unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

DEVICE unsigned long long load_acquire(const unsigned long long* p) {
  unsigned long long v;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

DEVICE void store_release(unsigned long long* p, unsigned long long v) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

DEVICE unsigned long long load_acquire_system(const unsigned long long* p) {
  unsigned long long v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

DEVICE unsigned load_volatile(const unsigned* p) { return *(const volatile unsigned*)p; }

DEVICE void store_release_system(unsigned* p, unsigned v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

DEVICE long long now() { return clock64(); }

DEVICE long long nanoseconds() {
  long long v;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(v));
  return v;
}

DEVICE void pause() {}
DEVICE void rest() { __nanosleep(100); }

DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

// ---- clusters (compute capability 9.0) ----

DEVICE void cluster_sync() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

DEVICE unsigned remote_address(const void* shared, unsigned rank) {
  unsigned address = 0;
#if CLUSTER > 1
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"((unsigned)__cvta_generic_to_shared(shared)), "r"(rank));
#endif
  return address;
}

DEVICE unsigned load_remote(const unsigned* shared, unsigned rank) {
  unsigned v = 0;
#if CLUSTER > 1
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(remote_address(shared, rank)) : "memory");
#endif
  return v;
}

// The value at the same place in the shared memory of block `rank` of this cluster.
DEVICE float load_remote(const float* shared, unsigned rank) {
  float v = 0;
#if CLUSTER > 1
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(remote_address(shared, rank)) : "memory");
#endif
  return v;
}

DEVICE void store_remote(float* shared, unsigned rank, float v) {
#if CLUSTER > 1
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote_address(shared, rank)), "f"(v) : "memory");
#endif
}

// ---- matrix units: sum(16 x 8) += a(16 x K) b(K x 8), one warp ----

DEVICE unsigned to_tf32(float v) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// The upper part of `v` that TensorFloat-32 holds, and the rest, rounded: mma reads the upper 19 bits of an operand. What is left over
// is below float32's rounding. Arithmetic on the bits, as conversions are slow.
DEVICE unsigned upper_tf32(float v) { return __float_as_uint(v) & 0xffffe000u; }
DEVICE unsigned lower_tf32(float v) { return __float_as_uint(v - __uint_as_float(upper_tf32(v))) + 0x1000u; }

DEVICE unsigned short to_half(float v) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}

DEVICE float2 from_half2(unsigned bits) {
  float2 v;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}" : "=f"(v.x), "=f"(v.y) : "r"(bits));
  return v;
}

DEVICE unsigned to_half2(float low, float high) {
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

DEVICE void mma_tf32(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1) {
  asm(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

DEVICE void mma_half(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// ---- the same of 16-bit numbers, two in a register: halves, or bfloat16 where BFLOAT ----
#if BFLOAT
#define PAIR "bf16x2"
#define NUMBER "bf16"
#else
#define PAIR "f16x2"
#define NUMBER "f16"
#endif

DEVICE unsigned pack2(float low, float high) {
  unsigned bits;
  asm("cvt.rn." PAIR ".f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// Negative numbers become zero; NaN stays.
DEVICE unsigned pack2_relu(float low, float high) {
  unsigned bits;
  asm("cvt.rn.relu." PAIR ".f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

DEVICE float2 unpack2(unsigned bits) {
#if BFLOAT
  return float2{__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
#else
  return from_half2(bits);
#endif
}

DEVICE void mma_16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." NUMBER "." NUMBER ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma_8(float (&sum)[4], unsigned a0, unsigned a1, unsigned b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32." NUMBER "." NUMBER ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Of 8 x 8 numbers in a warp, lane 4 r + c holding columns 2 c and 2 c + 1 of row r: the transpose, held alike.
DEVICE unsigned transpose8(unsigned v) {
  unsigned bits;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(bits) : "r"(v));
  return bits;
}

// 2 to the power of `v`, and 1 over `v`; the errors are two units in the last place, and one.
DEVICE float power2(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

DEVICE float reciprocal(float v) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
