// Computes PreLocal in one launch. Each window has CLUSTER_BLOCKS blocks, and each block has a share of the channels.
//
// Every block sums the spatial filters over its channels. With clusters (CLUSTER > 1), block v then takes virtual channel v through
// the encoder, and reads the other blocks' sums from their shared memory. Without clusters, the block that arrives last
// takes them all.
struct Arguments {
  const float* input;    // (batch, N_CHANS, N_TIMES)
  float* output;         // (batch, N_OUTPUTS)
  const float* weights;
  float* sums;           // (batch, BLOCKS, FILTERS, N_TIMES), unused with clusters
#if PROFILE
  long long* profile;    // MARKS for each block
#endif
  Calls calls;
};

constexpr int SHARE = (N_CHANS + BLOCKS - 1) / BLOCKS;  // channels of a block
constexpr int SIGNALS = CLUSTER > 1 ? 1 : FILTERS;      // virtual channels that a block encodes at a time
constexpr int FEATURES = N_TOKENS * EMB;
constexpr int PADDED = (FILTERS + 3) / 4 * 4;           // numbers of a channel in the table of the filters
constexpr int HEAD_FLOATS = N_OUTPUTS * FILTERS * FEATURES;
constexpr int GROUPS = N_TIMES * 2 > THREADS ? 1 : THREADS / N_TIMES < 8 ? THREADS / N_TIMES : 8;  // of channels, summed apart
constexpr bool HEAD_IN_SHARED = HEAD_FLOATS <= 4096 && HEAD_FLOATS % 4 == 0;

struct Shared {
  EncoderMemory<SIGNALS> encoder;
  float input[(SHARE * N_TIMES + 3) / 4 * 4];
  float parts[GROUPS * FILTERS * N_TIMES];  // sums over each group of channels
  float sums[(FILTERS * N_TIMES + 3) / 4 * 4];
  float filters[SHARE * PADDED];
  float head[HEAD_IN_SHARED ? HEAD_FLOATS : 4];
  float outputs[FILTERS * N_OUTPUTS];
  unsigned ticket;
  unsigned word[2];
};
TELL_SIZE(Shared)

DEVICE void head(const Arguments& a, const Shared& s, const float* tokens, int filter, float* outputs, unsigned rank) {
  for (int o = warp(); o < N_OUTPUTS; o += WARPS) {
    const float* weight = (HEAD_IN_SHARED ? s.head : a.weights + AT_HEAD) + (o * FILTERS + filter) * FEATURES;
    float sum = 0;
    for (int i = lane(); i < FEATURES; i += 32) sum = fmaf(tokens[i], weight[i], sum);
    sum = warp_sum(sum);
    if (lane() == 0) {
      if (CLUSTER > 1) store_remote(outputs + filter * N_OUTPUTS + o, rank, sum);
      else outputs[filter * N_OUTPUTS + o] = sum;
    }
  }
}

DEVICE void answer(const Arguments& a, Shared& s, unsigned number, float bias) {
  const int rank = blockIdx.x % BLOCKS, window = blockIdx.x / BLOCKS;
  const int first = rank * SHARE, count = larger(0, N_CHANS - first < SHARE ? N_CHANS - first : SHARE);
  take_signals<SHARE>(s.input, a.input, a.calls, window * N_CHANS + first, count);
  MARK(1);

  for (int i = thread(); i < GROUPS * N_TIMES; i += THREADS) {
    const int t = i % N_TIMES, group = i / N_TIMES;
    float sum[PADDED] = {};
#pragma unroll 4
    for (int c = group; c < count; c += GROUPS) {
      const float x = s.input[c * N_TIMES + t] - s.input[c * N_TIMES];  // the normalisation removes any offset; float32 needs it gone
      for (int v = 0; v < PADDED; v += 4) {
        const float4 w = *reinterpret_cast<const float4*>(s.filters + c * PADDED + v);
        sum[v] = fmaf(x, w.x, sum[v]);
        sum[v + 1] = fmaf(x, w.y, sum[v + 1]);
        sum[v + 2] = fmaf(x, w.z, sum[v + 2]);
        sum[v + 3] = fmaf(x, w.w, sum[v + 3]);
      }
    }
    for (int v = 0; v < FILTERS; ++v) s.parts[(group * FILTERS + v) * N_TIMES + t] = sum[v];
  }
  __syncthreads();
  for (int i = thread(); i < FILTERS * N_TIMES; i += THREADS) {
    float sum = 0;
    for (int group = 0; group < GROUPS; ++group) sum += s.parts[group * FILTERS * N_TIMES + i];
    if (CLUSTER > 1) s.sums[i] = sum;
    else a.sums[blockIdx.x * FILTERS * N_TIMES + i] = sum;
  }
  MARK(2);
  if constexpr (CLUSTER > 1) {
    cluster_sync();
    MARK(3);
    for (int v = rank; v < FILTERS; v += BLOCKS) {
      for (int t = thread(); t < N_TIMES; t += THREADS) {
        float part[BLOCKS], sum = 0;
        for (int block = 0; block < BLOCKS; ++block) part[block] = load_remote(s.sums + v * N_TIMES + t, block);
        for (int block = 0; block < BLOCKS; ++block) sum += part[block];
        s.encoder.signal[t] = sum;
      }
      __syncthreads();
      head(a, s, encode(s.encoder, a.weights), v, s.outputs, 0);
      __syncthreads();
    }
    MARK(4);
    cluster_sync();
    if (rank != 0) return;
  } else {
    if (!last_to_arrive(&a.calls.counters->arrived[window], BLOCKS, &s.ticket)) return;
    MARK(3);
    const float* sums = a.sums + window * BLOCKS * FILTERS * N_TIMES;
    if constexpr (FILTERS * N_TIMES % 4 == 0) {
      for (int i = 4 * thread(); i < FILTERS * N_TIMES; i += 4 * THREADS) {
        float4 part[BLOCKS], sum = {0, 0, 0, 0};
        for (int b = 0; b < BLOCKS; ++b) part[b] = load_fresh4(reinterpret_cast<const float4*>(sums + b * FILTERS * N_TIMES + i));
        for (int b = 0; b < BLOCKS; ++b) sum.x += part[b].x, sum.y += part[b].y, sum.z += part[b].z, sum.w += part[b].w;
        *reinterpret_cast<float4*>(s.encoder.signal + i) = sum;
      }
    } else {
      for (int i = thread(); i < FILTERS * N_TIMES; i += THREADS) {
        float sum = 0;
        for (int b = 0; b < BLOCKS; ++b) sum += load_fresh(sums + b * FILTERS * N_TIMES + i);
        s.encoder.signal[i] = sum;
      }
    }
    __syncthreads();
    const float* tokens = encode(s.encoder, a.weights);
    for (int v = 0; v < FILTERS; ++v) head(a, s, tokens + v * FEATURES, v, s.outputs, 0);
    __syncthreads();
    MARK(4);
  }
  for (int o = thread(); o < N_OUTPUTS; o += THREADS) {
    float sum = o < THREADS ? bias : a.weights[AT_BIAS + o];
    for (int v = 0; v < FILTERS; ++v) sum += s.outputs[v * N_OUTPUTS + o];
    put_output(a.calls, a.output, window * N_OUTPUTS + o, sum, number);
  }
  MARK(5);
  finish_window(a.calls, number);
}

CLUSTER_KERNEL prelocal(const Arguments a) {
  SHARED_MEMORY;
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  const int first = blockIdx.x % BLOCKS * SHARE, count = larger(0, N_CHANS - first < SHARE ? N_CHANS - first : SHARE);
  MARK(0);
  fetch_encoder(s.encoder, a.weights);
  fetch(s.filters, a.weights + AT_FILTERS + first * PADDED, count * PADDED);
  if constexpr (HEAD_IN_SHARED) fetch(s.head, a.weights + AT_HEAD, HEAD_FLOATS);
  const float bias = a.weights[AT_BIAS + (thread() < N_OUTPUTS ? thread() : 0)];  // early: what comes last is on the critical path
  for (unsigned number = a.calls.last; next_call(a.calls, number, s.word);) {
    answer(a, s, number, bias);
    if (!a.calls.request) break;
  }
}
