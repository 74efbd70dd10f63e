// Computes PreLocal and PostLocal for many windows. A block takes a window through the encoder and the head, which is one linear
// map of all tokens, and no block waits for another. PreLocal's signals are its channels through the spatial filters.
struct Arguments {
  const float* input;    // (batch, N_CHANS, N_TIMES)
  float* output;         // (batch, N_OUTPUTS)
  const float* weights;
  unsigned batch;
#if PROFILE
  long long* profile;    // MARKS for each block
#endif
};

static_assert(N_OUTPUTS == HEAD_AT_ONCE, "every thread keeps its share of all outputs");

struct Shared {
  Trunk trunk;
#if PRELOCAL
  float filters[N_CHANS * 4];  // four of them at a time
#endif
  HeadSums head;
};
TELL_SIZE(Shared)

#if PRELOCAL
// Signals `first` and on: sums over all channels, each without its offset.
DEVICE void load_filtered(Shared& s, const float* input, const float* filters, int first, int count) {
#pragma unroll 1
  for (int v = 0; v < count; v += 4) {
    __syncthreads();
    for (int i = thread(); i < N_CHANS * 4; i += THREADS)
      s.filters[i] = v + i % 4 < count ? filters[(first + v + i % 4) * N_CHANS + i / 4] : 0.0f;
    __syncthreads();
#pragma unroll 1
    for (int t = thread(); t < N_TIMES; t += THREADS) {
      float sum[4] = {};
#pragma unroll 16
      for (int c = 0; c < N_CHANS; ++c) {
        const float x = load_once(input + c * N_TIMES + t) - load_once(input + c * N_TIMES);
        const float4 w = *reinterpret_cast<const float4*>(s.filters + 4 * c);
        sum[0] = fmaf(x, w.x, sum[0]), sum[1] = fmaf(x, w.y, sum[1]), sum[2] = fmaf(x, w.z, sum[2]), sum[3] = fmaf(x, w.w, sum[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (v + i < count) s.trunk.signal[(v + i) * SIGNAL + t] = sum[i];
    }
  }
}
#endif

KERNEL local_batch(const Arguments a) {
  SHARED_MEMORY;
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  const float* input = a.input + blockIdx.x * (N_CHANS * N_TIMES);
  float sum[N_OUTPUTS] = {};
  MARK(0);
  encode_channels(
      s.trunk, a.weights + AT_FIRST, reinterpret_cast<const uint4*>(a.weights + AT_CONVS),
      [&](int first, int count) {
#if PRELOCAL
        load_filtered(s, input, a.weights + AT_FILTERS, first, count);
#else
        load_channels(s.trunk, input + first * N_TIMES, count);
#endif
      },
      [&](int token, int dim, float low, float high) {
#pragma unroll
        for (int o = 0; o < N_OUTPUTS; ++o) {
          const float* weight = a.weights + AT_HEAD + (o * SIGNALS * N_TOKENS + token) * EMB + dim;
          const float2 w = *reinterpret_cast<const float2*>(weight);
          sum[o] = fmaf(low, w.x, fmaf(high, w.y, sum[o]));
        }
      });
  MARK(1);
  put_outputs(s.head, a.output + blockIdx.x * N_OUTPUTS, a.weights + AT_BIAS, 0, sum);
  MARK(2);
}
