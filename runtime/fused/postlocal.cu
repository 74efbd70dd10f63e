// Computes PostLocal in one launch. A block takes one channel of one window through the encoder and the head, which is one linear
// map of all tokens. The block of a window's last channel adds the channels' shares in their order. Each share has the call's number
// beside it, and this block reads again until it sees the number: all blocks are resident at once (a cooperative launch), and each
// takes its items in rising order.
struct Arguments {
  const float* input;    // (batch, N_CHANS, N_TIMES)
  float* output;         // (batch, N_OUTPUTS)
  const float* weights;
  Marked* shares;        // (batch, N_CHANS, N_OUTPUTS)
#if PROFILE
  long long* profile;    // MARKS for each block
#endif
  Calls calls;
};

constexpr int FEATURES = N_TOKENS * EMB;
constexpr bool HEAD_IN_SHARED = N_OUTPUTS * FEATURES <= 4096 && FEATURES % 4 == 0;

struct Shared {
  EncoderMemory<1> encoder;
  float head[HEAD_IN_SHARED ? N_OUTPUTS * FEATURES : 4];  // of the channel at hand
  unsigned word[2];
};
TELL_SIZE(Shared)

DEVICE void fetch_head(const Arguments& a, Shared& s, int channel) {
  if constexpr (HEAD_IN_SHARED)
    for (int o = 0; o < N_OUTPUTS; ++o)
      fetch(s.head + o * FEATURES, a.weights + AT_HEAD + (o * N_CHANS + channel) * FEATURES, FEATURES);
}

DEVICE void answer(const Arguments& a, Shared& s, unsigned number, float bias, int& held) {
  for (int item = blockIdx.x; item < (int)a.calls.batch * N_CHANS; item += gridDim.x) {
    const int window = item / N_CHANS, channel = item % N_CHANS;
    if (channel != held) fetch_head(a, s, held = channel);
    take_signals<1>(s.encoder.signal, a.input, a.calls, item, 1);
    remove_offset(s.encoder.signal);
    MARK(1);
    const float* tokens = encode(s.encoder, a.weights);
    MARK(2);
    for (int o = warp(); o < N_OUTPUTS; o += WARPS) {
      const float* weight = HEAD_IN_SHARED ? s.head + o * FEATURES : a.weights + AT_HEAD + (o * N_CHANS + channel) * FEATURES;
      float sum = 0;
      for (int i = lane(); i < FEATURES; i += 32) sum = fmaf(tokens[i], weight[i], sum);
      sum = warp_sum(sum);
      if (lane() == 0) store_marked(a.shares + item * N_OUTPUTS + o, sum, number);
    }
    MARK(3);
    __syncthreads();
    if (channel != N_CHANS - 1) continue;
    for (int o = warp(); o < N_OUTPUTS; o += WARPS) {
      constexpr int AT_ONCE = (N_CHANS + 31) / 32 < 8 ? (N_CHANS + 31) / 32 : 8;
      const Marked* from = a.shares + window * N_CHANS * N_OUTPUTS + o;
      float sum = 0;
      for (int first = 0; first < N_CHANS; first += 32 * AT_ONCE) {
        const auto channel_of = [&](int i) { return first + 32 * i + lane(); };
        const auto at = [&](int i) { return (channel_of(i) < N_CHANS ? channel_of(i) : 0) * N_OUTPUTS; };
        Pending<AT_ONCE> pending;
        float share[AT_ONCE];
        pending.ask(from, at);
        pending.receive(share, from, at, number, [] { pause(); return true; });
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) sum += channel_of(i) < N_CHANS ? share[i] : 0.0f;
      }
      MARK(4);
      sum = warp_sum(sum);
      if (lane() == 0) put_output(a.calls, a.output, window * N_OUTPUTS + o, (o < WARPS ? bias : a.weights[AT_BIAS + o]) + sum, number);
    }
    MARK(5);
    finish_window(a.calls, number);
  }
}

KERNEL postlocal(const Arguments a) {
  SHARED_MEMORY;
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  MARK(0);
  fetch_encoder(s.encoder, a.weights);
  const float bias = a.weights[AT_BIAS + (warp() < N_OUTPUTS ? warp() : 0)];  // early: what comes last is on the critical path
  int held = blockIdx.x % N_CHANS;  // whose head is in shared memory
  fetch_head(a, s, held);
  for (unsigned number = a.calls.last; next_call(a.calls, number, s.word);) {
    answer(a, s, number, bias, held);
    if (!a.calls.request) break;
  }
}
