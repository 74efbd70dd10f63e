// What gpu_primitives.py times. All waits give up after PATIENCE cycles, so that nothing can hang the GPU.
#define PATIENCE (1ll << 31)

__device__ unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ unsigned load_system(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ void store_system(unsigned* p, unsigned v) { asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }

// One link of a chain of kernels; each adds one.
extern "C" __global__ void link(unsigned* word) {
  if (threadIdx.x == 0 && blockIdx.x == 0) *word += 1;
}

// The same, started before the one ahead of it has ended.
extern "C" __global__ void dependent_link(unsigned* word) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (threadIdx.x == 0 && blockIdx.x == 0) *word += 1;
}

// `rounds` barriers over the whole grid: one counter, one atomic a block, one thread a block that polls.
extern "C" __global__ void grid_barriers(unsigned* counter, unsigned base, int rounds, unsigned* failed) {
  for (int i = 1; i <= rounds; ++i) {
    __syncthreads();
    if (threadIdx.x == 0 && !*failed) {
      __threadfence();
      atomicAdd(counter, 1u);
      const long long start = clock64();
      while ((int)(load_acquire(counter) - (base + i * gridDim.x)) < 0)
        if (clock64() - start > PATIENCE) {
          *failed = 1;
          break;
        }
      __threadfence();
    }
    __syncthreads();
  }
}

// `rounds` barriers of a cluster of 8 blocks.
#if __CUDA_ARCH__ >= 900
extern "C" __global__ void __cluster_dims__(8, 1, 1) cluster_barriers(long long* cycles, int rounds) {
  const long long start = clock64();
  for (int i = 0; i < rounds; ++i)
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
}

// `rounds` exchanges: every block reads 256 floats of each of the other 7 after a barrier.
extern "C" __global__ void __cluster_dims__(8, 1, 1) cluster_exchanges(long long* cycles, float* out, int rounds) {
  __shared__ float mine[256];
  mine[threadIdx.x] = threadIdx.x + blockIdx.x;
  const unsigned address = (unsigned)__cvta_generic_to_shared(mine + threadIdx.x);
  const long long start = clock64();
  float sum = 0;
  for (int i = 0; i < rounds; ++i) {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    for (int block = 0; block < 8; ++block) {
      unsigned there;
      float v;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
      asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
      sum += v;
    }
  }
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  out[blockIdx.x * 256 + threadIdx.x] = sum;
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
}
#endif

// `n` pieces of 16 bytes read by the whole grid; every block says how many cycles its share took.
extern "C" __global__ void read_mapped(const float4* input, int n, float* out, long long* cycles) {
  __syncthreads();
  const long long start = clock64();
  float sum = 0;
  float4 v[4];
  for (int first = blockIdx.x * blockDim.x + threadIdx.x; first < n; first += 4 * gridDim.x * blockDim.x) {
    for (int i = 0; i < 4; ++i) {
      const int at = first + i * gridDim.x * blockDim.x;
      v[i] = float4{0, 0, 0, 0};
      if (at < n)
        asm volatile("ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v[i].x), "=f"(v[i].y), "=f"(v[i].z), "=f"(v[i].w) : "l"(input + at) : "memory");
    }
    for (int i = 0; i < 4; ++i) sum += v[i].x + v[i].y + v[i].z + v[i].w;
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
}

// A launch that only tells the host.
extern "C" __global__ void tell(unsigned* word, unsigned value) {
  if (threadIdx.x == 0 && blockIdx.x == 0) store_system(word, value);
}

// Answers `rounds` numbers that the host writes, then ends.
extern "C" __global__ void answer(const unsigned* question, unsigned* reply, unsigned rounds) {
  for (unsigned i = 1; i <= rounds; ++i) {
    const long long start = clock64();
    while (load_system(question) != i)
      if (clock64() - start > PATIENCE) {
        store_system(reply, 0xffffffffu);
        return;
      }
    store_system(reply, i);
  }
}
