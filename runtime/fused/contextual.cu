// Computes Contextual, and the base model, in one launch. Every block stays for all layers, and waits only for the tokens that it
// needs.
//
// Four phases, each a loop over its items:
//   encode     a channel: feature encoder, position encoding, query, key and value of its tokens
//   attend     a token: attention over its window, output projection, first normalisation
//   feed       a group of tokens and a slice of the hidden units: the slice's share of the feed-forward output
//   combine    a token: the slices' shares in their order, second normalisation, and the next layer's query, key and value;
//              after the last layer the last normalisation and the head
// Keys and values stand behind counters in device memory that only grow: `number of the call * items`. What attend and feed hand on is
// marked instead: each number has the layer's mark beside it, and its readers read again until they see the mark. A buffer may be
// written again when its marks differ, as nothing of a layer begins before all keys and values of that layer exist. The grid must
// be resident as a whole (a cooperative launch). A wait that outlasts a second gives up, and the host is told.
typedef unsigned long long Marked;  // a float, and a mark above it

struct Arguments {
  const float* input;     // (batch, N_CHANS, N_TIMES)
  float* output;          // (batch, N_OUTPUTS), or (batch, LENGTH, EMB) for the base model
  const float* weights;
  float* tokens;          // (batch, LENGTH, EMB), the residual stream between layers
  Marked* attended;       // (batch, LENGTH, EMB), after the first normalisation
  float* query;           // (batch, LENGTH, EMB)
  void* key_value;        // 2 layers in turn, (batch, HEADS, key and value in PIECES, LENGTH, VECTOR): see `key_value_at`
  Marked* shares;         // (SLICES, batch, LENGTH, EMB)
  float* head_shares;     // (batch, LENGTH, N_OUTPUTS)
#if PROFILE
  long long* profile;    // MARKS for each block
#endif
  unsigned* ready;        // counters (LAYERS, batch): tokens with query, key and value
  Calls calls;
};

constexpr int LENGTH = N_CHANS * N_TOKENS;  // tokens of a window
constexpr int HEAD = EMB / HEADS;
constexpr int HIDDEN = FEED_FORWARD / SLICES;
#if HALF && EMB / HEADS % 8 == 0
typedef unsigned short Kept;                          // of keys and values: halves
constexpr int VECTOR = 8;                             // numbers of a key or value that lie side by side
DEVICE Kept keep(float v) { return to_half(v); }
DEVICE void load_piece(float* to, const Kept* from) {
  const uint4 bits = load_fresh_bits4(reinterpret_cast<const uint4*>(from));
  const float2 v[4] = {from_half2(bits.x), from_half2(bits.y), from_half2(bits.z), from_half2(bits.w)};
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = i % 2 ? v[i / 2].y : v[i / 2].x;
}
#else
typedef float Kept;
constexpr int VECTOR = HEAD % 4 == 0 ? 4 : 1;
DEVICE Kept keep(float v) { return v; }
DEVICE void load_piece(float* to, const Kept* from) {
  if constexpr (VECTOR == 4) {
    const float4 v = load_fresh4(reinterpret_cast<const float4*>(from));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    to[0] = load_fresh(from);
  }
}
#endif
constexpr int PIECES = 2 * HEAD / VECTOR;             // neighbouring lanes read neighbouring keys, each a piece of VECTOR numbers
constexpr int LANE_VALUES = (EMB + 31) / 32;
constexpr int QKV_FLOATS = 3 * EMB * EMB + EMB;       // and the query's bias
constexpr int TEAMS = HEADS < WARPS && LENGTH > 32 ? WARPS / HEADS : 1;  // warps that share a head's keys
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
  uint4 out_weights[OUT_ROWS * OUT_STEPS * 32];  // of this block's slice, second product
  float row[(N_TOKENS * EMB + 3) / 4 * 4];
  float partial[2 * THREADS];
  float mix[HEADS * TEAMS * (HEAD + 2)];
  unsigned word[2];
  unsigned ticket;
  unsigned failed;
};
TELL_SIZE(Shared)

DEVICE const float* layer_weights(const Arguments& a, int layer) { return a.weights + AT_LAYERS + layer * LAYER_FLOATS; }

DEVICE int group_count(const Arguments& a) { return ((int)a.calls.batch * LENGTH + GROUP - 1) / GROUP; }

DEVICE unsigned* encoded(const Arguments& a, int layer, int window) { return a.ready + layer * a.calls.batch + window; }

// What a layer of a call marks its numbers with.
DEVICE unsigned mark_of(unsigned number, int layer) { return number * LAYERS + layer; }

DEVICE void signal(unsigned* counter) {
  __syncthreads();
  if (thread() == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
  }
}

// Whether a wait that began at `start` goes on.
DEVICE bool patient(const Arguments& a, Shared& s, long long start) {
  if (load_volatile(&s.failed)) return false;
  if (now() - start > PATIENCE) {
    s.failed = 1;
    a.calls.report->failed = 1;
    __threadfence_system();
    return false;
  }
  pause();
  return true;
}

DEVICE void wait(const Arguments& a, Shared& s, const unsigned* counter, unsigned target) {
  if (thread() == 0) {
    const long long start = now();
    while ((int)(load_acquire(counter) - target) < 0 && patient(a, s, start)) {
    }
  }
  __syncthreads();
}

// Pairs of marked numbers at `from + at(i)`, once all have been marked with `mark`.
template <int N, class At>
DEVICE void receive(const Arguments& a, Shared& s, float2 (&to)[N], const Marked* from, At at, unsigned mark) {
  const long long start = now();
  bool all;
  do {
    all = true;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint4 v = load_marked2(from + at(i));
      to[i] = float2{__uint_as_float(v.x), __uint_as_float(v.z)};
      all &= v.y == mark && v.w == mark;
    }
  } while (!all && patient(a, s, start));
}

// Where the pieces of all keys and values of a head begin.
DEVICE Kept* key_value_at(const Arguments& a, int layer, int window, int head) {
  return static_cast<Kept*>(a.key_value) + ((layer % 2 * (int)a.calls.batch + window) * HEADS + head) * PIECES * LENGTH * VECTOR;
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
      key_value_at(a, layer, window, e / HEAD)[(d / VECTOR * LENGTH + first + row) * VECTOR + d % VECTOR] = keep(v);
    }
  });
}

// ---- phases ----

// What the first phase needs and no call changes.
DEVICE void prepare(const Arguments& a, Shared& s) {
  fetch_encoder(s.encoder, a.weights);
  fetch_qkv(a, s, 0);
  fetch(s.out, layer_weights(a, 0) + AT_OUT, EMB * EMB);
}

DEVICE void encode_phase(const Arguments& a, Shared& s) {
  for (int item = blockIdx.x; item < (int)a.calls.batch * N_CHANS; item += gridDim.x) {
    const int window = item / N_CHANS, channel = item % N_CHANS;
    take_signals<1>(s.encoder.signal, a.input, a.calls, item, 1);
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
  copies_arrived();  // of a block without a channel too: the encoder's weights lie where the feed-forward rows will
}

// Softmax over the keys of a window: TEAMS warps share a head's, a lane takes every (32 TEAMS)th, CHUNK at a time, and the sums are
// merged. The result is in s.row.
DEVICE void attention(const Arguments& a, Shared& s, int layer, int token) {
  constexpr int APART = 32 * TEAMS, NEEDED = (LENGTH + APART - 1) / APART;
  constexpr int CHUNK = NEEDED * HEAD <= 40 ? NEEDED : larger(1, 40 / HEAD);  // keys at a time
  const int window = token / LENGTH;
  for (int task = warp(); task < HEADS * TEAMS; task += WARPS) {
    const int head = task / TEAMS;
    const Kept* key_value = key_value_at(a, layer, window, head);
    float query[HEAD], mixed[HEAD] = {}, most = -INFINITY, total = 0;
#pragma unroll
    for (int d = 0; d < HEAD; ++d) query[d] = load_fresh(a.query + token * EMB + head * HEAD + d);
    for (int first = lane() + 32 * (task % TEAMS); first < LENGTH; first += APART * CHUNK) {
      float key[CHUNK][HEAD], value[CHUNK][HEAD], score[CHUNK], peak = most;
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        const int at = first + APART * i < LENGTH ? first + APART * i : first;
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
        score[i] = first + APART * i < LENGTH ? sum : -INFINITY;
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
    const float peak = warp_max(most), fade = most == -INFINITY ? 0.0f : expf(most - peak);  // a lane may have had no key
    float* mix = s.mix + task * (HEAD + 2);
    total = warp_sum(total * fade);
#pragma unroll
    for (int d = 0; d < HEAD; ++d) {
      const float sum = warp_sum(mixed[d] * fade);
      if (lane() == 0) mix[2 + d] = sum;
    }
    if (lane() == 0) mix[0] = peak, mix[1] = total;
  }
  __syncthreads();
  for (int e = thread(); e < EMB; e += THREADS) {
    const float* mix = s.mix + e / HEAD * TEAMS * (HEAD + 2);
    float peak = -INFINITY, sum = 0, total = 0;
    for (int i = 0; i < TEAMS; ++i) peak = fmaxf(peak, mix[i * (HEAD + 2)]);
    for (int i = 0; i < TEAMS; ++i) {
      const float* part = mix + i * (HEAD + 2);
      const float fade = part[1] == 0 ? 0.0f : expf(part[0] - peak);  // a warp may have had no key
      sum = fmaf(part[2 + e % HEAD], fade, sum);
      total = fmaf(part[1], fade, total);
    }
    s.row[e] = sum / total;
  }
  __syncthreads();
}

DEVICE void attend_phase(const Arguments& a, Shared& s, int layer, unsigned number) {
  const float* w = layer_weights(a, layer);
  if (layer + 1 < LAYERS) fetch_qkv(a, s, layer + 1);
  float bias[LANE_VALUES], scale[LANE_VALUES], shift[LANE_VALUES];  // early, as all that does not depend on other blocks
  load_row(bias, w + AT_OUT_BIAS);
  load_row(scale, w + AT_NORM1);
  load_row(shift, w + AT_NORM1 + EMB);
  for (int token = blockIdx.x; token < (int)a.calls.batch * LENGTH; token += gridDim.x) {
    const int window = token / LENGTH;
    wait(a, s, encoded(a, layer, window), number * (layer == 0 ? N_CHANS : LENGTH));
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
        if (const int e = lane() + 32 * i; e < EMB) store_marked(a.attended + token * EMB + e, v[i], mark_of(number, layer));
    }
    __syncthreads();
  }
  if (layer + 1 < LAYERS) fetch(s.out, layer_weights(a, layer + 1) + AT_OUT, EMB * EMB);
}

// sum[i] += tile(16 x 8 STEPS) of weights times columns first, first + apart, ... of `in`.
template <int STEPS_K, int TILES>
DEVICE void multiply(float (&sum)[TILES][4], const uint4 (&weight)[STEPS_K], const Element* in, int stride, int first, int apart) {
  const int row = lane() / 4, k = lane() % 4;
#if !HALF
  float small[TILES][4] = {};
#endif
#pragma unroll
  for (int step = 0; step < STEPS_K; ++step) {
#if HALF
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const Element* x = in + (first + i * apart) * 8 * stride + row * stride + step * 8 + k;
      if (first + i * apart < COLUMNS) mma_half(sum[i], weight[step], x[0], x[4]);
    }
#else
    const float w[4] = {__uint_as_float(weight[step].x), __uint_as_float(weight[step].y), __uint_as_float(weight[step].z),
                        __uint_as_float(weight[step].w)};
    float x[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const int column = first + i * apart < COLUMNS ? first + i * apart : first;
      x[i][0] = in[(column * 8 + row) * stride + step * 8 + k], x[i][1] = in[(column * 8 + row) * stride + step * 8 + k + 4];
    }
    if (TENSOR_FLOAT) {
      const uint4 rounded = {to_tf32(w[0]), to_tf32(w[1]), to_tf32(w[2]), to_tf32(w[3])};
#pragma unroll
      for (int i = 0; i < TILES; ++i) mma_tf32(sum[i], rounded, to_tf32(x[i][0]), to_tf32(x[i][1]));
      continue;
    }
    // Each number is the sum of two that TensorFloat-32 holds; the product of the two lower parts is below float32's rounding.
    const uint4 upper = {upper_tf32(w[0]), upper_tf32(w[1]), upper_tf32(w[2]), upper_tf32(w[3])};
    const uint4 lower = {lower_tf32(w[0]), lower_tf32(w[1]), lower_tf32(w[2]), lower_tf32(w[3])};
#pragma unroll
    for (int i = 0; i < TILES; ++i) mma_tf32(small[i], lower, upper_tf32(x[i][0]), upper_tf32(x[i][1]));
#pragma unroll
    for (int i = 0; i < TILES; ++i) mma_tf32(sum[i], upper, upper_tf32(x[i][0]), upper_tf32(x[i][1]));
#pragma unroll
    for (int i = 0; i < TILES; ++i) mma_tf32(small[i], upper, lower_tf32(x[i][0]), lower_tf32(x[i][1]));
#endif
  }
#if !HALF
#pragma unroll
  for (int i = 0; i < TILES; ++i)
    for (int j = 0; j < 4; ++j) sum[i][j] += small[i][j];
#endif
}

DEVICE void feed_phase(const Arguments& a, Shared& s, int layer, unsigned number) {
  constexpr int IN_TILES = (COLUMNS + IN_TEAMS - 1) / IN_TEAMS, OUT_TILES = (COLUMNS + OUT_TEAMS - 1) / OUT_TEAMS;
  const int slice = blockIdx.x % SLICES, teams = gridDim.x / SLICES, n_tokens = a.calls.batch * LENGTH;
  if ((int)blockIdx.x / SLICES >= teams) return;
  const float* w = layer_weights(a, layer);
  const int in_row = warp() % IN_ROWS, in_team = warp() / IN_ROWS, out_row = warp() % OUT_ROWS, out_team = warp() / OUT_ROWS;
  const uint4* in_weights = reinterpret_cast<const uint4*>(w + AT_LINEAR1) + (slice * IN_ROWS + in_row) * IN_STEPS * 32;
  const uint4* out_weights = reinterpret_cast<const uint4*>(w + AT_LINEAR2) + slice * OUT_ROWS * OUT_STEPS * 32;
  uint4 in_weight[IN_STEPS];
#pragma unroll
  for (int i = 0; i < IN_STEPS; ++i) in_weight[i] = load_weight4(in_weights + 32 * i + lane());
  for (int i = thread(); i < OUT_ROWS * OUT_STEPS * 32; i += THREADS) copy16(s.out_weights + i, out_weights + i);
  const int row = lane() / 4, pair = lane() % 4 * 2;
  const float* bias = w + AT_LINEAR1_BIAS + slice * HIDDEN + in_row * 16 + row;
  const float low_bias = bias[0], high_bias = bias[8];

  for (int group = blockIdx.x / SLICES; group < group_count(a); group += teams) {
    const int first = group * GROUP, count = n_tokens - first < GROUP ? n_tokens - first : GROUP;
    float2 x[(8 * COLUMNS * EMB / 2 + THREADS - 1) / THREADS];
    receive(a, s, x, a.attended + first * EMB, [&](int i) {
      const int at = 2 * (thread() + i * THREADS);
      return at < count * EMB ? at : 0;
    }, mark_of(number, layer));
    MARK(6 * layer + 4);
#pragma unroll
    for (int i = 0; i < (int)(sizeof x / sizeof *x); ++i) {
      const int at = 2 * (thread() + i * THREADS), token = at / EMB, e = at % EMB;
      if (token >= 8 * COLUMNS) continue;
      if (token >= count) x[i] = float2{0, 0};
#if HALF
      s.feed.in[token * IN_STRIDE + e / 2] = to_half2(x[i].x, x[i].y);
#else
      *reinterpret_cast<float2*>(s.feed.in + token * IN_STRIDE + e) = x[i];
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
    copies_arrived();
    __syncthreads();
    if (out_team < OUT_TEAMS) {
      uint4 out_weight[OUT_STEPS];
#pragma unroll
      for (int i = 0; i < OUT_STEPS; ++i) out_weight[i] = s.out_weights[(out_row * OUT_STEPS + i) * 32 + lane()];
      float sum[OUT_TILES][4] = {};
      multiply<OUT_STEPS, OUT_TILES>(sum, out_weight, s.feed.hidden, HIDDEN_STRIDE, out_team, OUT_TEAMS);
#pragma unroll
      for (int i = 0; i < OUT_TILES; ++i) {
        const int column = out_team + i * OUT_TEAMS;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int token = column * 8 + pair + j % 2, e = out_row * 16 + row + j / 2 * 8;
          if (token < count) store_marked(a.shares + (slice * n_tokens + first + token) * EMB + e, sum[i][j], mark_of(number, layer));
        }
      }
    }
    __syncthreads();
  }
}

DEVICE void combine_phase(const Arguments& a, Shared& s, int layer, unsigned number) {
  constexpr int PARTS = split_of(EMB / 2, SLICES), TERMS = SLICES / PARTS;
  const float* w = layer_weights(a, layer);
  const int n_tokens = a.calls.batch * LENGTH;
  float bias[LANE_VALUES], scale[LANE_VALUES], shift[LANE_VALUES], last_scale[LANE_VALUES], last_shift[LANE_VALUES];
  load_row(bias, w + AT_LINEAR2_BIAS);
  load_row(scale, w + AT_NORM2);
  load_row(shift, w + AT_NORM2 + EMB);
  load_row(last_scale, a.weights + AT_NORM);  // ones and zeros where the head has them
  load_row(last_shift, a.weights + AT_NORM + EMB);
  for (int token = blockIdx.x; token < n_tokens; token += gridDim.x) {
    const unsigned mark = mark_of(number, layer);
    if (thread() < EMB / 2) {
      float2 x[1];
      receive(a, s, x, a.attended + token * EMB + 2 * thread(), [](int) { return 0; }, mark);
      s.row[2 * thread()] = x[0].x, s.row[2 * thread() + 1] = x[0].y;
    }
    if (const int e = 2 * (thread() % (EMB / 2)), part = thread() / (EMB / 2); part < PARTS) {
      float2 share[TERMS], sum = {0, 0};
      receive(a, s, share, a.shares + (part * TERMS * n_tokens + token) * EMB + e, [&](int i) { return i * n_tokens * EMB; }, mark);
#pragma unroll
      for (int i = 0; i < TERMS; ++i) sum.x += share[i].x, sum.y += share[i].y;
      s.partial[part * EMB + e] = sum.x, s.partial[part * EMB + e + 1] = sum.y;
    }
    MARK(6 * layer + 6);
    float v[LANE_VALUES];
    __syncthreads();
    if (warp() == 0) {
      for (int i = 0; i < LANE_VALUES; ++i)
        if (const int e = lane() + 32 * i; e < EMB) {
          v[i] = s.row[e] + bias[i];
          for (int part = 0; part < PARTS; ++part) v[i] += s.partial[part * EMB + e];
        }
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
    if (!last_to_arrive(&a.calls.counters->arrived[window], LENGTH, &s.ticket)) continue;
    if (!BASE) {
      for (int o = warp(); o < N_OUTPUTS; o += WARPS) {
        float sum = 0;
        for (int t = lane(); t < LENGTH; t += 32) sum += load_fresh(a.head_shares + (window * LENGTH + t) * N_OUTPUTS + o);
        sum = warp_sum(sum);
        if (lane() == 0) put_output(a.calls, a.output, window * N_OUTPUTS + o, a.weights[AT_BIAS + o] + sum, number);
      }
    }
    finish_window(a.calls, number);
  }
}

KERNEL contextual(const Arguments a) {
  SHARED_MEMORY;
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  if (thread() == 0) s.failed = 0;
  MARK(0);
  prepare(a, s);
  for (unsigned number = a.calls.last; next_call(a.calls, number, s.word);) {
    __syncthreads();
    encode_phase(a, s);
    MARK(1);
    for (int layer = 0; layer < LAYERS; ++layer) {
      attend_phase(a, s, layer, number);
      MARK(6 * layer + 3);
      feed_phase(a, s, layer, number);
      MARK(6 * layer + 5);
      combine_phase(a, s, layer, number);
      MARK(6 * layer + 7);
    }
    if (!a.calls.request) break;
    __syncthreads();
    prepare(a, s);
  }
}
