// Gives every kernel its sizes, the numbers of a thread, and sums over a warp.
//
// Sizes are macros that runtime/fused/program.py and batch_program.py define for each model. A block has THREADS threads. Names that
// end in 4 move 16 bytes.
constexpr int WARPS = THREADS / 32;
constexpr int CONV_DIM[] = {CONV_DIMS};        // outputs of each convolution
constexpr int CONV_KERNEL[] = {CONV_KERNELS};  // its taps
constexpr int STEPS[] = {CONV_STEPS};          // its time steps that reach a token
constexpr float EPS = 1e-5f;                   // of PyTorch's normalisations

// Records cycle counts at numbered places of a block, for benchmarks/gpu_fused.py alone.
#if PROFILE
#define MARK(i) \
  if (threadIdx.x == 0) a.profile[blockIdx.x * MARKS + (i)] = now()
#else
#define MARK(i)
#endif

DEVICE int thread() { return (int)threadIdx.x; }
DEVICE int warp() { return (int)threadIdx.x / 32; }
DEVICE int lane() { return (int)threadIdx.x % 32; }

DEVICE float warp_sum(float v) {
  for (int mask = 16; mask; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

DEVICE float warp_max(float v) {
  for (int mask = 16; mask; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
  return v;
}

DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

constexpr int larger(int a, int b) { return a > b ? a : b; }

// `n` floats, a multiple of 4, from global to shared memory; `copies_arrived` and a barrier later they are there.
DEVICE void fetch(float* shared, const float* weights, int n) {
  for (int i = 4 * thread(); i < n; i += 4 * THREADS) copy16(shared + i, weights + i);
}
