// PreLocal in one launch: CLUSTER_BLOCKS blocks a window, each with a share of the channels.
//
// Every block sums the spatial filters over its channels. With clusters (CLUSTER > 1), block v then takes virtual channel v through
// the encoder, reading the other blocks' sums from their shared memory. Without, the block that arrives last takes them all.
struct Arguments {
  const float* input;    // (batch, N_CHANS, N_TIMES)
  float* output;         // (batch, N_OUTPUTS)
  const float* weights;
  float* sums;           // (batch, BLOCKS, FILTERS, N_TIMES), unused with clusters
#if PROFILE
  long long* profile;    // MARKS for each block
#endif
  Counters* counters;
  Report* report;
  unsigned batch;
};

constexpr int SHARE = (N_CHANS + BLOCKS - 1) / BLOCKS;  // channels of a block
constexpr int SIGNALS = CLUSTER > 1 ? 1 : FILTERS;      // virtual channels that a block encodes at a time
constexpr int FEATURES = N_TOKENS * EMB;

struct Shared {
  EncoderMemory<SIGNALS> encoder;
  float input[(SHARE * N_TIMES + 3) / 4 * 4];
  float sums[(FILTERS * N_TIMES + 3) / 4 * 4];
  float filters[(SHARE * FILTERS + 3) / 4 * 4];
  float outputs[FILTERS * N_OUTPUTS];
  unsigned ticket;
};
EXPORTED unsigned shared_bytes = sizeof(Shared);

DEVICE void head(const Arguments& a, const float* tokens, int filter, float* outputs, unsigned rank) {
  for (int o = warp(); o < N_OUTPUTS; o += WARPS) {
    const float* weight = a.weights + AT_HEAD + (o * FILTERS + filter) * FEATURES;
    float sum = 0;
    for (int i = lane(); i < FEATURES; i += 32) sum = fmaf(tokens[i], weight[i], sum);
    sum = warp_sum(sum);
    if (lane() == 0) {
      if (CLUSTER > 1) store_remote(outputs + filter * N_OUTPUTS + o, rank, sum);
      else outputs[filter * N_OUTPUTS + o] = sum;
    }
  }
}

CLUSTER_KERNEL prelocal(const Arguments a) {
  SHARED_MEMORY;
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  const int rank = blockIdx.x % BLOCKS, window = blockIdx.x / BLOCKS;
  const int first = rank * SHARE, count = larger(0, N_CHANS - first < SHARE ? N_CHANS - first : SHARE);
  MARK(0);
  fetch_encoder(s.encoder, a.weights);
  for (int i = thread(); i < count * FILTERS; i += THREADS) s.filters[i] = a.weights[AT_FILTERS + first * FILTERS + i];
  load_signals(s.input, a.input + (window * N_CHANS + first) * N_TIMES, count);
  MARK(1);

  for (int t = thread(); t < N_TIMES; t += THREADS) {
    float sum[FILTERS] = {};
    for (int c = 0; c < count; ++c)
      for (int v = 0; v < FILTERS; ++v) sum[v] = fmaf(s.input[c * N_TIMES + t], s.filters[c * FILTERS + v], sum[v]);
    for (int v = 0; v < FILTERS; ++v) {
      if (CLUSTER > 1) s.sums[v * N_TIMES + t] = sum[v];
      else a.sums[(blockIdx.x * FILTERS + v) * N_TIMES + t] = sum[v];
    }
  }
  copies_arrived();
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
      head(a, encode(s.encoder, a.weights), v, s.outputs, 0);
      __syncthreads();
    }
    MARK(4);
    cluster_sync();
    if (rank != 0) return;
  } else {
    if (!last_to_arrive(&a.counters->arrived[window], BLOCKS, &s.ticket)) return;
    MARK(3);
    for (int i = thread(); i < FILTERS * N_TIMES; i += THREADS) {
      float part[BLOCKS], sum = 0;
      for (int block = 0; block < BLOCKS; ++block)
        part[block] = load_fresh(a.sums + (window * BLOCKS + block) * FILTERS * N_TIMES + i);
      for (int block = 0; block < BLOCKS; ++block) sum += part[block];
      s.encoder.signal[i] = sum;
    }
    __syncthreads();
    const float* tokens = encode(s.encoder, a.weights);
    for (int v = 0; v < FILTERS; ++v) head(a, tokens + v * FEATURES, v, s.outputs, 0);
    __syncthreads();
    MARK(4);
  }
  for (int o = thread(); o < N_OUTPUTS; o += THREADS) {
    float sum = a.weights[AT_BIAS + o];
    for (int v = 0; v < FILTERS; ++v) sum += s.outputs[v * N_OUTPUTS + o];
    a.output[window * N_OUTPUTS + o] = sum;
  }
  finish_window(a.counters, a.report, a.batch);
  MARK(5);
}
