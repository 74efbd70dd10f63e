// Contextual, and the base model, in one launch: every block stays for all layers, and waits only for the tokens that it needs.
//
// Four phases, each a loop over its items:
//   encode     a channel: feature encoder, position encoding, query, key and value of its tokens
//   attend     a token: attention over its window, output projection, first normalisation
//   feed       a group of tokens and a slice of the hidden units: the slice's share of the feed-forward output
//   combine    a token: the slices' shares in their order, second normalisation, and the next layer's query, key and value;
//              after the last layer the last normalisation and the head
// Between them stand counters in device memory that only grow: `launches * items`. The grid must be resident as a whole
// (a cooperative launch). A wait that outlasts a second gives up, and the host is told.
struct Arguments {
  const float* input;     // (batch, N_CHANS, N_TIMES)
  float* output;          // (batch, N_OUTPUTS), or (batch, LENGTH, EMB) for the base model
  const float* weights;
  float* tokens;          // (batch, LENGTH, EMB), the residual stream between layers
  float* attended;        // (batch, LENGTH, EMB), after the first normalisation
  float* query;           // (batch, LENGTH, EMB)
  float* key_value;       // 2 layers in turn, (batch, HEADS, key and value in PIECES, LENGTH, VECTOR): see `key_value_at`
  float* shares;          // (SLICES, batch, LENGTH, EMB)
  float* head_shares;     // (batch, LENGTH, N_OUTPUTS)
#if PROFILE
  long long* profile;    // MARKS for each block
#endif
  unsigned* ready;        // counters: see `encoded`, `attended_of`, `fed`
  Counters* counters;
  Report* report;
  unsigned batch;
};

constexpr int LENGTH = N_CHANS * N_TOKENS;  // tokens of a window
constexpr int HEAD = EMB / HEADS;
constexpr int HIDDEN = FEED_FORWARD / SLICES;
constexpr int VECTOR = HEAD % 4 == 0 ? 4 : 1;         // numbers of a key or value that lie side by side
constexpr int PIECES = 2 * HEAD / VECTOR;             // neighbouring lanes read neighbouring keys, each a piece of VECTOR numbers
constexpr int LANE_VALUES = (EMB + 31) / 32;
constexpr int QKV_FLOATS = 3 * EMB * EMB + EMB;       // and the query's bias
constexpr long long PATIENCE = 1ll << 31;   // cycles, about a second

// ---- the feed-forward product on the matrix units: 16 x 8 results of 16 weight rows and 8 tokens ----

#if HALF
typedef unsigned Element;            // two halves
constexpr int PER_ELEMENT = 2, STEP = 16;
#else
typedef float Element;
constexpr int PER_ELEMENT = 1, STEP = 8;
#endif
constexpr int COLUMNS = (GROUP + 7) / 8;                   // of 8 tokens
constexpr int IN_STRIDE = EMB / PER_ELEMENT + 4;           // 4 more, so that a warp's reads meet all banks
constexpr int HIDDEN_STRIDE = HIDDEN / PER_ELEMENT + 4;
constexpr int IN_ROWS = HIDDEN / 16, OUT_ROWS = EMB / 16;  // tiles of 16 weight rows
constexpr int IN_TEAMS = WARPS / IN_ROWS, OUT_TEAMS = WARPS / OUT_ROWS;  // warps that share a tile's columns
constexpr int IN_STEPS = EMB / STEP, OUT_STEPS = HIDDEN / STEP;
static_assert(IN_TEAMS > 0 && OUT_TEAMS > 0 && EMB % 16 == 0 && HIDDEN % 16 == 0 && HEAD * HEADS == EMB, "sizes");

struct Shared {
  union {
    EncoderMemory<1> encoder;
    struct {
      Element in[8 * COLUMNS * IN_STRIDE];
      Element hidden[8 * COLUMNS * HIDDEN_STRIDE];
    } feed;
  };
  float qkv[QKV_IN_SHARED ? QKV_FLOATS : 4];     // of the layer whose query, key and value come next
  float out[EMB * EMB];                          // output projection of this layer
  float row[(N_TOKENS * EMB + 3) / 4 * 4];
  float partial[THREADS];
  unsigned ticket;
  unsigned failed;
};
TELL_SIZE(Shared)

DEVICE const float* layer_weights(const Arguments& a, int layer) { return a.weights + AT_LAYERS + layer * LAYER_FLOATS; }

DEVICE int group_count(const Arguments& a) { return ((int)a.batch * LENGTH + GROUP - 1) / GROUP; }

// Counters: tokens with query, key and value of (layer, window); tokens of (layer, group) after attention; slices of (layer, group).
DEVICE unsigned* encoded(const Arguments& a, int layer, int window) { return a.ready + layer * a.batch + window; }
DEVICE unsigned* attended_of(const Arguments& a, int layer, int group) {
  return a.ready + LAYERS * a.batch + layer * group_count(a) + group;
}
DEVICE unsigned* fed(const Arguments& a, int layer, int group) { return attended_of(a, LAYERS + layer, group); }

DEVICE void signal(unsigned* counter) {
  __syncthreads();
  if (thread() == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
  }
}

DEVICE void wait(const Arguments& a, Shared& s, const unsigned* counter, unsigned target) {
  if (thread() == 0 && !s.failed) {
    const long long start = now();
    while ((int)(load_acquire(counter) - target) < 0) {
      if (now() - start > PATIENCE) {
        s.failed = 1;
        a.report->failed = 1;
        break;
      }
      pause();
    }
    __threadfence();
  }
  __syncthreads();
}

// Where the pieces of all keys and values of a head begin.
DEVICE float* key_value_at(const Arguments& a, int layer, int window, int head) {
  return a.key_value + ((layer % 2 * (int)a.batch + window) * HEADS + head) * PIECES * LENGTH * VECTOR;
}

// ---- rows of EMB values in a warp ----

DEVICE void load_row(float (&v)[LANE_VALUES], const float* row) {
#pragma unroll
  for (int i = 0; i < LANE_VALUES; ++i) v[i] = lane() + 32 * i < EMB ? row[lane() + 32 * i] : 0.0f;
}

DEVICE void normalise(float (&v)[LANE_VALUES], const float (&scale)[LANE_VALUES], const float (&shift)[LANE_VALUES]) {
  float sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < LANE_VALUES; ++i) sum += lane() + 32 * i < EMB ? v[i] : 0.0f;
  const float mean = warp_sum(sum) / EMB;
#pragma unroll
  for (int i = 0; i < LANE_VALUES; ++i) {
    v[i] -= mean;
    squares += lane() + 32 * i < EMB ? v[i] * v[i] : 0.0f;
  }
  const float factor = 1.0f / sqrtf(warp_sum(squares) / EMB + EPS);
#pragma unroll
  for (int i = 0; i < LANE_VALUES; ++i) v[i] = fmaf(v[i] * factor, scale[i], shift[i]);
}

DEVICE void fetch_qkv(const Arguments& a, Shared& s, int layer) {
  if constexpr (QKV_IN_SHARED) fetch(s.qkv, layer_weights(a, layer) + AT_QKV, QKV_FLOATS);
}

// Query, key and value of ROWS tokens in s.row, the first of which is `token` (over all windows).
template <int ROWS>
DEVICE void project(const Arguments& a, Shared& s, int layer, int token) {
  const float* weight = QKV_IN_SHARED ? s.qkv : layer_weights(a, layer) + AT_QKV;
  const float* bias = weight + 3 * EMB * EMB;
  const int window = token / LENGTH, first = token % LENGTH;
  product<ROWS, EMB, 3 * EMB>(s.row, weight, s.partial, [&](int row, int m, float v) {
    const int e = m % EMB, which = m / EMB;
    if (which == 0) {
      a.query[(token + row) * EMB + e] = v + bias[e];
    } else {
      const int d = (which - 1) * HEAD + e % HEAD;
      key_value_at(a, layer, window, e / HEAD)[(d / VECTOR * LENGTH + first + row) * VECTOR + d % VECTOR] = v;
    }
  });
}

// ---- phases ----

DEVICE void encode_phase(const Arguments& a, Shared& s) {
  fetch_encoder(s.encoder, a.weights);
  fetch_qkv(a, s, 0);
  fetch(s.out, layer_weights(a, 0) + AT_OUT, EMB * EMB);
  for (int item = blockIdx.x; item < (int)a.batch * N_CHANS; item += gridDim.x) {
    const int window = item / N_CHANS, channel = item % N_CHANS;
    load_signals(s.encoder.signal, a.input + item * N_TIMES, 1);
    remove_offset(s.encoder.signal);
    const float* features = encode(s.encoder, a.weights);
    const float* position = a.weights + AT_POSITIONS + channel * N_TOKENS * EMB;
    for (int i = thread(); i < N_TOKENS * EMB; i += THREADS) {
      const float x = features[i] + position[i];
      s.row[i] = x;
      a.tokens[item * N_TOKENS * EMB + i] = x;
    }
    __syncthreads();
    project<N_TOKENS>(a, s, 0, item * N_TOKENS);
    signal(encoded(a, 0, window));
  }
}

DEVICE void load_piece(float* to, const float* from) {
  if constexpr (VECTOR == 4) {
    const float4 v = load_fresh4(reinterpret_cast<const float4*>(from));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    to[0] = load_fresh(from);
  }
}

// Softmax over the keys of a window: a lane takes every 32nd key, CHUNK at a time, and the lanes' sums are merged.
DEVICE void attention(const Arguments& a, Shared& s, int layer, int token) {
  constexpr int NEEDED = (LENGTH + 31) / 32, CHUNK = NEEDED * HEAD < 40 ? NEEDED : larger(1, 40 / HEAD);  // keys at a time
  const int window = token / LENGTH;
  for (int head = warp(); head < HEADS; head += WARPS) {
    const float* key_value = key_value_at(a, layer, window, head);
    float query[HEAD], mixed[HEAD] = {}, most = -INFINITY, total = 0;
#pragma unroll
    for (int d = 0; d < HEAD; ++d) query[d] = load_fresh(a.query + token * EMB + head * HEAD + d);
    for (int first = lane(); first < LENGTH; first += 32 * CHUNK) {
      float key[CHUNK][HEAD], value[CHUNK][HEAD], score[CHUNK], peak = most;
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        const int at = first + 32 * i < LENGTH ? first + 32 * i : first;
#pragma unroll
        for (int d = 0; d < HEAD; d += VECTOR) {
          load_piece(key[i] + d, key_value + (d / VECTOR * LENGTH + at) * VECTOR);
          load_piece(value[i] + d, key_value + ((HEAD + d) / VECTOR * LENGTH + at) * VECTOR);
        }
      }
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        float sum = 0;
#pragma unroll
        for (int d = 0; d < HEAD; ++d) sum = fmaf(query[d], key[i][d], sum);
        score[i] = first + 32 * i < LENGTH ? sum : -INFINITY;
        peak = fmaxf(peak, score[i]);
      }
      const float fade = expf(most - peak);  // of what was summed under a lower peak
      total *= fade;
#pragma unroll
      for (int d = 0; d < HEAD; ++d) mixed[d] *= fade;
      most = peak;
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        const float weight = expf(score[i] - peak);
        total += weight;
#pragma unroll
        for (int d = 0; d < HEAD; ++d) mixed[d] = fmaf(weight, value[i][d], mixed[d]);
      }
    }
    const float fade = expf(most - warp_max(most));
    total = warp_sum(total * fade);
#pragma unroll
    for (int d = 0; d < HEAD; ++d) {
      const float sum = warp_sum(mixed[d] * fade) / total;
      if (lane() == 0) s.row[head * HEAD + d] = sum;
    }
  }
  __syncthreads();
}

DEVICE void attend_phase(const Arguments& a, Shared& s, int layer, unsigned launch) {
  const float* w = layer_weights(a, layer);
  if (layer + 1 < LAYERS) fetch_qkv(a, s, layer + 1);
  float bias[LANE_VALUES], scale[LANE_VALUES], shift[LANE_VALUES];  // early, as all that does not depend on other blocks
  load_row(bias, w + AT_OUT_BIAS);
  load_row(scale, w + AT_NORM1);
  load_row(shift, w + AT_NORM1 + EMB);
  for (int token = blockIdx.x; token < (int)a.batch * LENGTH; token += gridDim.x) {
    const int window = token / LENGTH;
    wait(a, s, encoded(a, layer, window), launch * (layer == 0 ? N_CHANS : LENGTH));
    MARK(6 * layer + 2);
    float v[LANE_VALUES];
    for (int i = 0; i < LANE_VALUES; ++i)
      if (const int e = lane() + 32 * i; warp() == 0 && e < EMB) v[i] = load_fresh(a.tokens + token * EMB + e) + bias[i];
    attention(a, s, layer, token);
    copies_arrived();
    __syncthreads();
    float* projected = s.partial;  // EMB results, over the parts that they were summed from
    product<1, EMB, EMB>(s.row, s.out, s.partial, [&](int, int m, float v) { projected[m] = v; });
    if (warp() == 0) {
      for (int i = 0; i < LANE_VALUES; ++i)
        if (const int e = lane() + 32 * i; e < EMB) v[i] += projected[e];
      normalise(v, scale, shift);
      for (int i = 0; i < LANE_VALUES; ++i)
        if (const int e = lane() + 32 * i; e < EMB) a.attended[token * EMB + e] = v[i];
    }
    signal(attended_of(a, layer, token / GROUP));
  }
  if (layer + 1 < LAYERS) fetch(s.out, layer_weights(a, layer + 1) + AT_OUT, EMB * EMB);
}

// sum[i] += tile(16 x 8 STEPS) of weights times columns first, first + apart, ... of `in`.
template <int STEPS_K, int TILES>
DEVICE void multiply(float (&sum)[TILES][4], const uint4 (&weight)[STEPS_K], const Element* in, int stride, int first, int apart) {
  const int row = lane() / 4, k = lane() % 4;
#pragma unroll
  for (int step = 0; step < STEPS_K; ++step) {
#if !HALF
    // Each number is the sum of two that TensorFloat-32 holds; the product of the two small parts is below float32's rounding.
    const float w[4] = {__uint_as_float(weight[step].x), __uint_as_float(weight[step].y), __uint_as_float(weight[step].z),
                        __uint_as_float(weight[step].w)};
    const uint4 big = {to_tf32(w[0]), to_tf32(w[1]), to_tf32(w[2]), to_tf32(w[3])};
    const uint4 small = {to_tf32(w[0] - __uint_as_float(big.x)), to_tf32(w[1] - __uint_as_float(big.y)),
                         to_tf32(w[2] - __uint_as_float(big.z)), to_tf32(w[3] - __uint_as_float(big.w))};
#endif
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const int column = first + i * apart;
      if (column < COLUMNS) {
        const Element* x = in + (column * 8 + row) * stride + step * 8 + k;
#if HALF
        mma_half(sum[i], weight[step], x[0], x[4]);
#else
        const unsigned b0 = to_tf32(x[0]), b1 = to_tf32(x[4]);
        if (!TENSOR_FLOAT) {
          mma_tf32(sum[i], small, b0, b1);
          mma_tf32(sum[i], big, to_tf32(x[0] - __uint_as_float(b0)), to_tf32(x[4] - __uint_as_float(b1)));
        }
        mma_tf32(sum[i], big, b0, b1);
#endif
      }
    }
  }
}

DEVICE void feed_phase(const Arguments& a, Shared& s, int layer, unsigned launch) {
  constexpr int IN_TILES = (COLUMNS + IN_TEAMS - 1) / IN_TEAMS, OUT_TILES = (COLUMNS + OUT_TEAMS - 1) / OUT_TEAMS;
  const int slice = blockIdx.x % SLICES, teams = gridDim.x / SLICES, n_tokens = a.batch * LENGTH;
  if ((int)blockIdx.x / SLICES >= teams) return;
  const float* w = layer_weights(a, layer);
  const int in_row = warp() % IN_ROWS, in_team = warp() / IN_ROWS, out_row = warp() % OUT_ROWS, out_team = warp() / OUT_ROWS;
  const uint4* in_weights = reinterpret_cast<const uint4*>(w + AT_LINEAR1) + (slice * IN_ROWS + in_row) * IN_STEPS * 32;
  const uint4* out_weights = reinterpret_cast<const uint4*>(w + AT_LINEAR2) + (slice * OUT_ROWS + out_row) * OUT_STEPS * 32;
  uint4 in_weight[IN_STEPS], out_weight[OUT_STEPS];
#pragma unroll
  for (int i = 0; i < IN_STEPS; ++i) in_weight[i] = load_weight4(in_weights + 32 * i + lane());
#pragma unroll
  for (int i = 0; i < OUT_STEPS; ++i) out_weight[i] = load_weight4(out_weights + 32 * i + lane());
  const int row = lane() / 4, pair = lane() % 4 * 2;
  const float* bias = w + AT_LINEAR1_BIAS + slice * HIDDEN + in_row * 16 + row;
  const float low_bias = bias[0], high_bias = bias[8];

  for (int group = blockIdx.x / SLICES; group < group_count(a); group += teams) {
    const int first = group * GROUP, count = n_tokens - first < GROUP ? n_tokens - first : GROUP;
    wait(a, s, attended_of(a, layer, group), launch * count);
    MARK(6 * layer + 4);
    float4 x[(8 * COLUMNS * EMB / 4 + THREADS - 1) / THREADS];
#pragma unroll
    for (int i = 0; i < (int)(sizeof x / 16); ++i) {
      const int at = 4 * (thread() + i * THREADS);
      x[i] = float4{0, 0, 0, 0};
      if (at < count * EMB) x[i] = load_fresh4(reinterpret_cast<const float4*>(a.attended + first * EMB + at));
    }
#pragma unroll
    for (int i = 0; i < (int)(sizeof x / 16); ++i) {
      const int at = 4 * (thread() + i * THREADS), token = at / EMB, e = at % EMB;
      if (token >= 8 * COLUMNS) continue;
#if HALF
      s.feed.in[token * IN_STRIDE + e / 2] = to_half2(x[i].x, x[i].y);
      s.feed.in[token * IN_STRIDE + e / 2 + 1] = to_half2(x[i].z, x[i].w);
#else
      *reinterpret_cast<float4*>(s.feed.in + token * IN_STRIDE + e) = x[i];
#endif
    }
    __syncthreads();
    if (in_team < IN_TEAMS) {
      float sum[IN_TILES][4];
      for (int i = 0; i < IN_TILES; ++i) sum[i][0] = sum[i][1] = low_bias, sum[i][2] = sum[i][3] = high_bias;
      multiply<IN_STEPS, IN_TILES>(sum, in_weight, s.feed.in, IN_STRIDE, in_team, IN_TEAMS);
#pragma unroll
      for (int i = 0; i < IN_TILES; ++i) {
        const int column = in_team + i * IN_TEAMS;
        if (column >= COLUMNS) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int token = column * 8 + pair + j % 2, unit = in_row * 16 + row + j / 2 * 8;
          const float v = sum[i][j] < 0 ? 0.0f : sum[i][j];  // keeps NaN
#if HALF
          const float neighbour = shuffle_xor(v, 4);  // the unit beside this one is 4 lanes on
          if (row % 2 == 0) s.feed.hidden[token * HIDDEN_STRIDE + unit / 2] = to_half2(v, neighbour);
#else
          s.feed.hidden[token * HIDDEN_STRIDE + unit] = v;
#endif
        }
      }
    }
    __syncthreads();
    if (out_team < OUT_TEAMS) {
      float sum[OUT_TILES][4] = {};
      multiply<OUT_STEPS, OUT_TILES>(sum, out_weight, s.feed.hidden, HIDDEN_STRIDE, out_team, OUT_TEAMS);
#pragma unroll
      for (int i = 0; i < OUT_TILES; ++i) {
        const int column = out_team + i * OUT_TEAMS;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int token = column * 8 + pair + j % 2, e = out_row * 16 + row + j / 2 * 8;
          if (token < count) a.shares[(slice * n_tokens + first + token) * EMB + e] = sum[i][j];
        }
      }
    }
    signal(fed(a, layer, group));
  }
}

DEVICE void combine_phase(const Arguments& a, Shared& s, int layer, unsigned launch) {
  constexpr int PARTS = split_of(EMB, SLICES), TERMS = SLICES / PARTS;
  const float* w = layer_weights(a, layer);
  const int n_tokens = a.batch * LENGTH;
  float bias[LANE_VALUES], scale[LANE_VALUES], shift[LANE_VALUES], last_scale[LANE_VALUES], last_shift[LANE_VALUES];
  load_row(bias, w + AT_LINEAR2_BIAS);
  load_row(scale, w + AT_NORM2);
  load_row(shift, w + AT_NORM2 + EMB);
  load_row(last_scale, a.weights + AT_NORM);  // ones and zeros where the head has them
  load_row(last_shift, a.weights + AT_NORM + EMB);
  for (int token = blockIdx.x; token < n_tokens; token += gridDim.x) {
    wait(a, s, fed(a, layer, token / GROUP), launch * SLICES);
    MARK(6 * layer + 6);
    float v[LANE_VALUES];
    for (int i = 0; i < LANE_VALUES; ++i)
      if (const int e = lane() + 32 * i; warp() == 0 && e < EMB) v[i] = load_fresh(a.attended + token * EMB + e) + bias[i];
    if (const int e = thread() % EMB, part = thread() / EMB; part < PARTS) {
      float share[TERMS], sum = 0;
#pragma unroll
      for (int i = 0; i < TERMS; ++i) share[i] = load_fresh(a.shares + ((part * TERMS + i) * n_tokens + token) * EMB + e);
#pragma unroll
      for (int i = 0; i < TERMS; ++i) sum += share[i];
      s.partial[part * EMB + e] = sum;
    }
    __syncthreads();
    if (warp() == 0) {
      for (int i = 0; i < LANE_VALUES; ++i)
        if (const int e = lane() + 32 * i; e < EMB)
          for (int part = 0; part < PARTS; ++part) v[i] += s.partial[part * EMB + e];
      normalise(v, scale, shift);
      if (layer == LAYERS - 1) normalise(v, last_scale, last_shift);
      for (int i = 0; i < LANE_VALUES; ++i) {
        const int e = lane() + 32 * i;
        if (e >= EMB) continue;
        s.row[e] = v[i];
        if (layer < LAYERS - 1) a.tokens[token * EMB + e] = v[i];
        else if (BASE) a.output[token * EMB + e] = v[i];
      }
    }
    copies_arrived();
    __syncthreads();
    const int window = token / LENGTH;
    if (layer < LAYERS - 1) {
      project<1>(a, s, layer + 1, token);
      signal(encoded(a, layer + 1, window));
      continue;
    }
    if (!BASE) {
      for (int o = warp(); o < N_OUTPUTS; o += WARPS) {
        const float* weight = a.weights + AT_HEAD + (o * LENGTH + token % LENGTH) * EMB;
        float sum = 0;
        for (int e = lane(); e < EMB; e += 32) sum = fmaf(s.row[e], weight[e], sum);
        sum = warp_sum(sum);
        if (lane() == 0) a.head_shares[token * N_OUTPUTS + o] = sum;
      }
    }
    if (BASE) __threadfence_system();
    if (!last_to_arrive(&a.counters->arrived[window], LENGTH, &s.ticket)) continue;
    if (!BASE) {
      for (int o = warp(); o < N_OUTPUTS; o += WARPS) {
        float sum = 0;
        for (int t = lane(); t < LENGTH; t += 32) sum += load_fresh(a.head_shares + (window * LENGTH + t) * N_OUTPUTS + o);
        sum = warp_sum(sum);
        if (lane() == 0) a.output[window * N_OUTPUTS + o] = a.weights[AT_BIAS + o] + sum;
      }
    }
    finish_window(a.counters, a.report, a.batch);
  }
}

KERNEL contextual(const Arguments a) {
  SHARED_MEMORY;
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  if (thread() == 0) s.failed = 0;
  const unsigned launch = a.counters->launches + 1;
  __syncthreads();
  MARK(0);
  encode_phase(a, s);
  MARK(1);
  for (int layer = 0; layer < LAYERS; ++layer) {
    attend_phase(a, s, layer, launch);
    MARK(6 * layer + 3);
    feed_phase(a, s, layer, launch);
    MARK(6 * layer + 5);
    combine_phase(a, s, layer, launch);
    MARK(6 * layer + 7);
  }
}
