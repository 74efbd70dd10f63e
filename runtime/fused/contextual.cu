// Computes Contextual, and the base model, in one launch. Every block stays for all layers, and waits only for the numbers that it
// needs.
//
// Four phases, each a loop over its items:
//   encode     a channel: feature encoder, position encoding, query, key and value of its tokens
//   attend     a token: attention over its window, output projection, first normalisation
//   feed       a group of tokens and a slice of the hidden units: the slice's share of the feed-forward output
//   combine    a token: the slices' shares in their order, second normalisation, and the next layer's query, key and value;
//              after the last layer the last normalisation and the head
// What a phase hands on is marked: beside the numbers stands the layer's mark, and their readers read again until they see the
// mark. A buffer may be written again when its marks differ: whoever writes numbers of layer i + 2 needs those of layer i + 1, each of
// which was computed from all keys and values of layer i. The grid must be resident as a whole (a cooperative launch). A wait that
// outlasts a second gives up, and the host is told.
typedef uint4 Marked4;              // PER numbers, and a mark above them

struct Arguments {
  const float* input;     // (batch, N_CHANS, N_TIMES)
  float* output;          // (batch, N_OUTPUTS), or (batch, LENGTH, EMB) for the base model
  const float* weights;
  Marked* tokens;         // (batch, LENGTH, EMB), the residual stream between layers
  float* residual;        // (batch, LENGTH, EMB), after the first normalisation, for the block that wrote it
  Marked4* attended;      // (batch, LENGTH, EMB_UNITS), the same for the feed-forward product
  Marked* query;          // (batch, LENGTH, EMB)
  Marked4* key_value;     // 2 layers in turn, (batch, HEADS, KV_UNITS, LENGTH): keys, then values
  Marked* shares;         // (SLICES, batch, LENGTH, EMB)
  Marked* head_shares;    // (batch, LENGTH, N_OUTPUTS)
#if PROFILE
  long long* profile;    // MARKS for each block
#endif
  Calls calls;
};

constexpr int LENGTH = N_CHANS * N_TOKENS;  // tokens of a window
constexpr int HEAD = EMB / HEADS;
constexpr int HIDDEN = FEED_FORWARD / SLICES;
constexpr int LANE_VALUES = (EMB + 31) / 32;
constexpr int TEAMS = HEADS < WARPS && LENGTH > 32 ? WARPS / HEADS : 1;  // warps that share a head's keys
constexpr int PARTS = split_of(EMB, EMB), TERMS = EMB / PARTS;  // of a product with EMB terms: a thread has EMB columns' TERMS
constexpr bool HELD = TERMS <= 16;                               // whether a thread holds its weights of such products in registers
constexpr unsigned PATIENCE = 1u << 21;                          // of 1,024 cycles, about a second
constexpr float LOG2E = 1.44269504088896341f;                    // exponentials are powers of 2

// ---- numbers with a mark in 16 bytes: keys, values and the rows of the feed-forward product ----

#if HALF
constexpr int PER = 6;  // halves, and a mark of 32 bits
DEVICE bool marked_with(const Marked4& v, unsigned mark) { return v.w == mark; }
DEVICE Marked4 unlike(unsigned mark) { return Marked4{0, 0, 0, ~mark}; }
DEVICE float number_of(const Marked4& v, int i) {
  const float2 pair = from_half2(i / 2 == 0 ? v.x : i / 2 == 1 ? v.y : v.z);
  return i % 2 ? pair.y : pair.x;
}
DEVICE Marked4 marked4(const float (&v)[PER], unsigned mark) {
  return Marked4{to_half2(v[0], v[1]), to_half2(v[2], v[3]), to_half2(v[4], v[5]), mark};
}
#else
constexpr int PER = 4;  // numbers of 30 bits, 22 of them for the mantissa, and below each the two lowest bits of the mark
DEVICE bool marked_with(const Marked4& v, unsigned mark) {
  return (((v.x ^ mark) | (v.y ^ mark) | (v.z ^ mark) | (v.w ^ mark)) & 3) == 0;
}
DEVICE Marked4 unlike(unsigned mark) { return Marked4{~mark, ~mark, ~mark, ~mark}; }
DEVICE float number_of(const Marked4& v, int i) { return __uint_as_float((i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w) & ~3u); }
DEVICE unsigned marked_bits(float v, unsigned mark) {
  const unsigned bits = __float_as_uint(v), rounded = v == v ? bits + 2 : bits;  // beyond the largest number lies infinity, then NaN
  return (rounded & ~3u) | (mark & 3);
}
DEVICE Marked4 marked4(const float (&v)[PER], unsigned mark) {
  return Marked4{marked_bits(v[0], mark), marked_bits(v[1], mark), marked_bits(v[2], mark), marked_bits(v[3], mark)};
}
#endif
constexpr int KV_UNITS = (2 * HEAD + PER - 1) / PER, EMB_UNITS = (EMB + PER - 1) / PER;

// ---- the feed-forward product on the matrix units: 16 x 8 results of 16 weight rows and 8 tokens ----

#if HALF
typedef unsigned Element;  // two halves
constexpr int PER_ELEMENT = 2, STEP = 16;
#else
typedef float2 Element;    // what TensorFloat-32 holds of a number, and the rest
constexpr int PER_ELEMENT = 1, STEP = 8;
DEVICE Element element(float v) {
  if (TENSOR_FLOAT) return Element{__uint_as_float(to_tf32(v)), 0};
  return Element{__uint_as_float(upper_tf32(v)), __uint_as_float(lower_tf32(v))};
}
#endif
constexpr int COLUMNS = (GROUP + 7) / 8;                   // of 8 tokens
constexpr int IN_STRIDE = EMB / PER_ELEMENT + 4;           // 4 more, so that a warp's reads meet all banks
constexpr int HIDDEN_STRIDE = HIDDEN / PER_ELEMENT + 4;
constexpr int IN_ROWS = HIDDEN / 16, OUT_ROWS = EMB / 16;  // tiles of 16 weight rows
constexpr int IN_TEAMS = WARPS / IN_ROWS, OUT_TEAMS = WARPS / OUT_ROWS;  // warps that share a tile's columns
constexpr int IN_STEPS = EMB / STEP, OUT_STEPS = HIDDEN / STEP;
static_assert(IN_TEAMS > 0 && OUT_TEAMS > 0 && EMB % 16 == 0 && HIDDEN % 16 == 0 && HEAD * HEADS == EMB, "sizes");

struct alignas(16) Shared {
  union {
    struct {
      EncoderMemory<1> encoder;
      float qkv[QKV_IN_SHARED ? 3 * EMB * EMB : 4];  // of the first layer
    };
    struct {
      Element in[8 * COLUMNS * IN_STRIDE];
      Element hidden[8 * COLUMNS * HIDDEN_STRIDE];
    } feed;
  };
  uint4 out_weights[OUT_ROWS * OUT_STEPS * 32];  // of this block's slice, second product
  alignas(16) float vectors[3 * EMB];  // of the layer: bias of the output projection, scale and shift behind it
  alignas(16) float row[N_TOKENS * EMB];
  alignas(16) float rows[WARPS][EMB];  // of each warp: a copy of a row, or a query
  float partial[3 * THREADS];
  float mix[HEADS * TEAMS * (HEAD + 2)];
  unsigned word[2];
  unsigned ticket;
  unsigned failed;
};
TELL_SIZE(Shared)

DEVICE const float* layer_weights(const Arguments& a, int layer) { return a.weights + AT_LAYERS + layer * LAYER_FLOATS; }

DEVICE int group_count(const Arguments& a) { return ((int)a.calls.batch * LENGTH + GROUP - 1) / GROUP; }

// What a layer of a call marks its numbers with; the first call is number 1, and memory begins with zeros.
DEVICE unsigned mark_of(unsigned number, int layer) { return (number - 1) * LAYERS + layer + 1; }

DEVICE unsigned since() { return (unsigned)(now() >> 10); }

// Whether a wait that began at `start` goes on.
DEVICE bool patient(const Arguments& a, Shared& s, unsigned start) {
  if (load_volatile(&s.failed)) return false;
  if (since() - start > PATIENCE) {
    s.failed = 1;
    a.calls.report->failed = 1;
    __threadfence_system();
    return false;
  }
  pause();
  return true;
}

struct Patience {
  const Arguments& a;
  Shared& s;
  unsigned start;
  DEVICE_MEMBER bool operator()() const { return patient(a, s, start); }
};

// Pairs of marked numbers at `from + at(i)`, once all have been marked with `mark`.
template <int N, class At>
DEVICE void receive(const Arguments& a, Shared& s, float2 (&to)[N], const Marked* from, At at, unsigned mark) {
  const unsigned start = since();
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

// Those of the N units at `from + at(i)` that `wanted(i)`. What has come is not read again.
template <int N, class Wanted, class At>
DEVICE void receive(const Arguments& a, Shared& s, Marked4 (&to)[N], const Marked4* from, Wanted wanted, At at, unsigned mark) {
  const unsigned start = since();
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = unlike(mark);
  bool all;
  do {
    all = true;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (wanted(i) && !marked_with(to[i], mark)) to[i] = load_whole(from + at(i));
#pragma unroll
    for (int i = 0; i < N; ++i) all &= !wanted(i) || marked_with(to[i], mark);
  } while (!all && patient(a, s, start));
}

// Where the units of all keys and values of a head begin.
DEVICE Marked4* key_value_at(const Arguments& a, int layer, int window, int head) {
  return a.key_value + ((layer % 2 * (int)a.calls.batch + window) * HEADS + head) * KV_UNITS * LENGTH;
}

// ---- rows of EMB values in a warp ----

DEVICE void load_row(float (&v)[LANE_VALUES], const float* row) {
#pragma unroll
  for (int i = 0; i < LANE_VALUES; ++i) v[i] = lane() + 32 * i < EMB ? load_weight(row + lane() + 32 * i) : 0.0f;
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

// ---- a row times N matrices of EMB x EMB that lie side by side ----
// Thread `part * EMB + e` has the terms of `part` of column e of each. Weights are asked for early, as L2 takes long to answer.

template <int N, bool KEPT = HELD>
struct Columns {
  const float* weight;
  float held[N][KEPT ? TERMS : 1];

  DEVICE_MEMBER void ask(const float* from) {
    weight = from + thread() / EMB * TERMS * N * EMB + thread() % EMB;
    if constexpr (KEPT) {
      if (thread() >= PARTS * EMB) return;
#pragma unroll
      for (int k = 0; k < TERMS; ++k)
#pragma unroll
        for (int n = 0; n < N; ++n) held[n][k] = load_weight(weight + (k * N + n) * EMB);
    }
  }

  // The parts of the product with `row`, in shared memory.
  DEVICE_MEMBER void multiply(const float* row, float* partial) const {
    if (thread() >= PARTS * EMB) return;
    const float* x = row + thread() / EMB * TERMS;
    float sum[N] = {};
    constexpr int AT_ONCE = TERMS % 4 == 0 ? 4 : 1;
#pragma unroll(TERMS <= 16 ? TERMS / AT_ONCE : 2)
    for (int first = 0; first < TERMS; first += AT_ONCE) {
      float terms[AT_ONCE];
      if constexpr (AT_ONCE == 4) *reinterpret_cast<float4*>(terms) = *reinterpret_cast<const float4*>(x + first);
      else terms[0] = x[first];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const int k = first + i;
          sum[n] = fmaf(terms[i], KEPT ? held[n][KEPT ? k : 0] : weight[(k * N + n) * EMB], sum[n]);
        }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) partial[(thread() / EMB * N + n) * EMB + thread() % EMB] = sum[n];
  }

  // Number e of the product with matrix n.
  static DEVICE_MEMBER float sum(const float* partial, int n, int e) {
    float v = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) v += partial[(part * N + n) * EMB + e];
    return v;
  }
};

// What a thread needs for the query, key and value of a layer.
template <bool KEPT = HELD>
struct Projection {
  Columns<3, KEPT> columns;
  float bias;  // of this thread's number of the query

  DEVICE_MEMBER void ask(const float* layer, const float* weights) {
    columns.ask(weights);
    const int e = thread() - HEADS * KV_UNITS;
    bias = 0 <= e && e < EMB ? load_weight(layer + AT_QUERY_BIAS + e) : 0.0f;
  }
};
static_assert(HEADS * KV_UNITS + EMB <= THREADS, "a thread has a unit of keys and values, or a number of the query");

// Query, key and value of a token (over all windows), from the parts of its products.
DEVICE void hand_on(const Arguments& a, Shared& s, float bias, int layer, int token, unsigned mark) {
  if (const int head = thread() / KV_UNITS, unit = thread() % KV_UNITS; head < HEADS) {
    float v[PER];
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int at = unit * PER + i;  // of the head's key and, behind it, value
      v[i] = at < 2 * HEAD ? Columns<3>::sum(s.partial, 1 + at / HEAD, head * HEAD + at % HEAD) : 0.0f;
    }
    store_whole(key_value_at(a, layer, token / LENGTH, head) + unit * LENGTH + token % LENGTH, marked4(v, mark));
  } else if (const int e = thread() - HEADS * KV_UNITS; e < EMB) {
    store_marked(a.query + token * EMB + e, (Columns<3>::sum(s.partial, 0, e) + bias) * LOG2E, mark);
  }
}

// ---- phases ----

// What the first phase needs and no call changes.
DEVICE void prepare(const Arguments& a, Shared& s) {
  fetch_encoder(s.encoder, a.weights);
  if constexpr (QKV_IN_SHARED) fetch(s.qkv, layer_weights(a, 0) + AT_QKV, 3 * EMB * EMB);
}

DEVICE void encode_phase(const Arguments& a, Shared& s, unsigned number) {
  Projection<false> projection;
  projection.ask(layer_weights(a, 0), QKV_IN_SHARED ? s.qkv : layer_weights(a, 0) + AT_QKV);
  const unsigned mark = mark_of(number, 0);
  for (int item = blockIdx.x; item < (int)a.calls.batch * N_CHANS; item += gridDim.x) {
    const int channel = item % N_CHANS;
    take_signals<1>(s.encoder.signal, a.input, a.calls, item, 1);
    remove_offset(s.encoder.signal);
    const float* features = encode(s.encoder, a.weights);
    const float* position = a.weights + AT_POSITIONS + channel * N_TOKENS * EMB;
    for (int i = thread(); i < N_TOKENS * EMB; i += THREADS) {
      const float x = features[i] + position[i];
      s.row[i] = x;
      store_marked(a.tokens + item * N_TOKENS * EMB + i, x, mark);
    }
    __syncthreads();
    for (int row = 0; row < N_TOKENS; ++row) {
      projection.columns.multiply(s.row + row * EMB, s.partial);
      __syncthreads();
      hand_on(a, s, projection.bias, 0, item * N_TOKENS + row, mark);
      __syncthreads();
    }
  }
  copies_arrived();  // of a block without a channel too: the encoder's weights lie where the feed-forward rows will
}

// Sums of N values over a warp: lane `i * 32 / N` gets the one of v[i]. Half of what is left is exchanged at a time, where N is a power
// of 2.
template <int N>
DEVICE float sums_of(const float (&v)[N]) {
  if constexpr (N & (N - 1) || N > 32) {
    float mine = 0;
    for (int i = 0; i < N; ++i) {
      const float sum = warp_sum(v[i]);
      if (lane() == i * 32 / N) mine = sum;
    }
    return mine;
  } else {
    float left[N];
#pragma unroll
    for (int i = 0; i < N; ++i) left[i] = v[i];
    int mask = 16;
#pragma unroll
    for (int n = N / 2; n; n /= 2, mask /= 2) {
      const bool upper = lane() & mask;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const float mine = upper ? left[i + n] : left[i], other = upper ? left[i] : left[i + n];
        left[i] = mine + shuffle_xor(other, mask);
      }
    }
    for (; mask; mask /= 2) left[0] += shuffle_xor(left[0], mask);
    return left[0];
  }
}

// Softmax over the keys of a window: TEAMS warps share a head's, a lane takes every (32 TEAMS)th, CHUNK at a time, and the sums are
// merged. The result is in s.row, behind a barrier.
DEVICE void attention(const Arguments& a, Shared& s, int layer, int token, unsigned mark) {
  constexpr int APART = 32 * TEAMS, NEEDED = (LENGTH + APART - 1) / APART;
  constexpr int CHUNK = NEEDED < MOST_KEYS ? NEEDED : MOST_KEYS;  // keys at a time
  const int window = token / LENGTH;
  for (int task = warp(); task < HEADS * TEAMS; task += WARPS) {
    const int head = task / TEAMS;
    const Marked4* key_value = key_value_at(a, layer, window, head);
    const Marked* asked = a.query + token * EMB + head * HEAD;
    constexpr int PENDING = (HEAD + 31) / 32;
    const auto each = [](int i) { return lane() + 32 * i < HEAD ? lane() + 32 * i : 0; };
    Pending<PENDING> pending;
    pending.ask(asked, each);
    const float* query = s.rows[warp()];
    float mixed[HEAD] = {}, most = -INFINITY, total = 0;
#pragma unroll 1
    for (int begin = 32 * (task % TEAMS); begin < LENGTH; begin += APART * CHUNK) {
      const int first = begin + lane();
      Marked4 unit[CHUNK * KV_UNITS];
      receive(a, s, unit, key_value, [&](int i) { return first + i / KV_UNITS * APART < LENGTH; },
              [&](int i) { return i % KV_UNITS * LENGTH + first + i / KV_UNITS * APART; }, mark);
      if (begin < APART) {
        float numbers[PENDING];
        pending.receive(numbers, asked, each, mark, Patience{a, s, since()});
#pragma unroll
        for (int i = 0; i < PENDING; ++i)
          if (lane() + 32 * i < HEAD) s.rows[warp()][lane() + 32 * i] = numbers[i];
        __syncwarp();
      }
      MARK(8 * layer + 2);
      float score[CHUNK], peak = -INFINITY;
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        float sum = 0;
#pragma unroll
        for (int d = 0; d < HEAD; ++d) sum = fmaf(query[d], number_of(unit[i * KV_UNITS + d / PER], d % PER), sum);
        score[i] = first + APART * i < LENGTH ? sum : -INFINITY;
        peak = fmaxf(peak, score[i]);
      }
      peak = fmaxf(most, warp_max(peak));  // lane 0 has a key
      if constexpr (CHUNK < NEEDED) {
        const float fade = power2(most - peak);  // of what was summed under a lower peak
        total *= fade;
#pragma unroll
        for (int d = 0; d < HEAD; ++d) mixed[d] *= fade;
      }
      most = peak;
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        if (first + APART * i >= LENGTH) continue;
        const float weight = power2(score[i] - peak);
        total += weight;
#pragma unroll
        for (int d = 0; d < HEAD; ++d)
          mixed[d] = fmaf(weight, number_of(unit[i * KV_UNITS + (HEAD + d) / PER], (HEAD + d) % PER), mixed[d]);
      }
    }
    total = warp_sum(total);
    const float sum = sums_of(mixed);
    float* mix = s.mix + task * (HEAD + 2);
    for (int d = 0; d < HEAD; ++d) {
      if (lane() != d * 32 / HEAD) continue;
      if (TEAMS == 1) s.row[head * HEAD + d] = sum / total;
      else mix[2 + d] = sum;
    }
    if (TEAMS > 1 && lane() == 0) mix[0] = most, mix[1] = total;
  }
  __syncthreads();
  for (int e = thread(); TEAMS > 1 && e < EMB; e += THREADS) {
    const float* mix = s.mix + e / HEAD * TEAMS * (HEAD + 2);
    float peak = -INFINITY, sum = 0, total = 0;
    for (int i = 0; i < TEAMS; ++i) peak = fmaxf(peak, mix[i * (HEAD + 2)]);
    for (int i = 0; i < TEAMS; ++i) {
      const float* part = mix + i * (HEAD + 2);
      const float fade = part[1] == 0 ? 0.0f : power2(part[0] - peak);  // a warp may have had no key
      sum = fmaf(part[2 + e % HEAD], fade, sum);
      total = fmaf(part[1], fade, total);
    }
    s.row[e] = sum / total;
  }
  if (TEAMS > 1) __syncthreads();
}

DEVICE void attend_phase(const Arguments& a, Shared& s, int layer, unsigned number) {
  const float* w = layer_weights(a, layer);
  const unsigned mark = mark_of(number, layer);
  Columns<1> out;
  out.ask(w + AT_OUT);
  fetch(s.vectors, w + AT_OUT_BIAS, EMB);
  fetch(s.vectors + EMB, w + AT_NORM1, 2 * EMB);
  for (int token = blockIdx.x; token < (int)a.calls.batch * LENGTH; token += gridDim.x) {
    const auto each = [](int i) { return lane() + 32 * i < EMB ? lane() + 32 * i : EMB - 1; };
    Pending<LANE_VALUES> before;
    if (warp() == 0) before.ask(a.tokens + token * EMB, each);
    attention(a, s, layer, token, mark);
    MARK(8 * layer + 3);
    out.multiply(s.row, s.partial);
    copies_arrived();
    __syncthreads();
    if (warp() == 0) {
      float v[LANE_VALUES], scale[LANE_VALUES], shift[LANE_VALUES];
      before.receive(v, a.tokens + token * EMB, each, mark, Patience{a, s, since()});
#pragma unroll
      for (int i = 0; i < LANE_VALUES; ++i)
        if (const int e = lane() + 32 * i; e < EMB) v[i] += s.vectors[e] + Columns<1>::sum(s.partial, 0, e), scale[i] = s.vectors[EMB + e], shift[i] = s.vectors[2 * EMB + e];
      normalise(v, scale, shift);
#pragma unroll
      for (int i = 0; i < LANE_VALUES; ++i)
        if (const int e = lane() + 32 * i; e < EMB) s.row[e] = v[i];
      __syncwarp();
      for (int unit = lane(); unit < EMB_UNITS; unit += 32) {
        float x[PER];
#pragma unroll
        for (int i = 0; i < PER; ++i) x[i] = unit * PER + i < EMB ? s.row[unit * PER + i] : 0.0f;
        store_whole(a.attended + token * EMB_UNITS + unit, marked4(x, mark));
      }
#pragma unroll
      for (int i = 0; i < LANE_VALUES; ++i)
        if (const int e = lane() + 32 * i; e < EMB) a.residual[token * EMB + e] = v[i];
    }
    __syncthreads();
  }
}

// sum[i] += tile(16 x 8 STEPS) times columns first, first + apart, ... of `in`. `weight(step)` is this lane's part of the tile.
template <int STEPS_K, int TILES, class Weight>
DEVICE void multiply(float (&sum)[TILES][4], Weight weight, const Element* in, int stride, int first, int apart) {
  const int row = lane() / 4, k = lane() % 4;
#if !HALF
  float small[TILES][4] = {};
#endif
#pragma unroll(STEPS_K <= 8 ? STEPS_K : 4)
  for (int step = 0; step < STEPS_K; ++step) {
    const uint4 tile = weight(step);
    Element x[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const int column = first + i * apart < COLUMNS ? first + i * apart : 0;
      const Element* at = in + (column * 8 + row) * stride + step * 8 + k;
      x[i][0] = at[0], x[i][1] = at[4];
    }
#if HALF
#pragma unroll
    for (int i = 0; i < TILES; ++i)
      if (first + i * apart < COLUMNS) mma_half(sum[i], tile, x[i][0], x[i][1]);
#else
    const float w[4] = {__uint_as_float(tile.x), __uint_as_float(tile.y), __uint_as_float(tile.z),
                        __uint_as_float(tile.w)};
    unsigned upper[TILES][2], lower[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; ++i)
      for (int j = 0; j < 2; ++j) upper[i][j] = __float_as_uint(x[i][j].x), lower[i][j] = __float_as_uint(x[i][j].y);
    if (TENSOR_FLOAT) {
      const uint4 rounded = {to_tf32(w[0]), to_tf32(w[1]), to_tf32(w[2]), to_tf32(w[3])};
#pragma unroll
      for (int i = 0; i < TILES; ++i)
        if (first + i * apart < COLUMNS) mma_tf32(sum[i], rounded, upper[i][0], upper[i][1]);
      continue;
    }
    // Each number is the sum of two that TensorFloat-32 holds; the product of the two lower parts is below float32's rounding.
    const uint4 high = {upper_tf32(w[0]), upper_tf32(w[1]), upper_tf32(w[2]), upper_tf32(w[3])};
    const uint4 rest = {lower_tf32(w[0]), lower_tf32(w[1]), lower_tf32(w[2]), lower_tf32(w[3])};
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (first + i * apart >= COLUMNS) continue;
      mma_tf32(small[i], rest, upper[i][0], upper[i][1]);
      mma_tf32(sum[i], high, upper[i][0], upper[i][1]);
      mma_tf32(small[i], high, lower[i][0], lower[i][1]);
    }
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
  const float low_bias = load_weight(bias), high_bias = load_weight(bias + 8);

  for (int group = blockIdx.x / SLICES; group < group_count(a); group += teams) {
    const int first = group * GROUP, count = n_tokens - first < GROUP ? n_tokens - first : GROUP;
    constexpr int ROWS_UNITS = 8 * COLUMNS * EMB_UNITS;
    Marked4 x[(ROWS_UNITS + THREADS - 1) / THREADS];
    receive(a, s, x, a.attended + first * EMB_UNITS, [&](int i) { return thread() + i * THREADS < count * EMB_UNITS; },
            [&](int i) { return thread() + i * THREADS; }, mark_of(number, layer));
    MARK(8 * layer + 5);
#pragma unroll
    for (int i = 0; i < (int)(sizeof x / sizeof *x); ++i) {
      const int at = thread() + i * THREADS, token = at / EMB_UNITS, unit = at % EMB_UNITS;
      if (at >= ROWS_UNITS) continue;
      if (token >= count) x[i] = Marked4{0, 0, 0, 0};
      Element* to = s.feed.in + token * IN_STRIDE + unit * PER / PER_ELEMENT;
#if HALF
      const Element words[3] = {x[i].x, x[i].y, x[i].z};
#pragma unroll
      for (int k = 0; k < 3; ++k)
        if (unit * 3 + k < EMB / 2) to[k] = words[k];
#else
#pragma unroll
      for (int k = 0; k < 4; ++k) to[k] = element(number_of(x[i], k));
#endif
    }
    __syncthreads();
    if (in_team < IN_TEAMS) {
      float sum[IN_TILES][4];
      for (int i = 0; i < IN_TILES; ++i) sum[i][0] = sum[i][1] = low_bias, sum[i][2] = sum[i][3] = high_bias;
      multiply<IN_STEPS, IN_TILES>(sum, [&](int step) { return in_weight[step]; }, s.feed.in, IN_STRIDE, in_team, IN_TEAMS);
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
          s.feed.hidden[token * HIDDEN_STRIDE + unit] = element(v);
#endif
        }
      }
    }
    copies_arrived();
    __syncthreads();
    MARK(8 * layer + 6);
    if (out_team < OUT_TEAMS) {
      const uint4* mine = s.out_weights + out_row * OUT_STEPS * 32 + lane();
      float sum[OUT_TILES][4] = {};
      multiply<OUT_STEPS, OUT_TILES>(sum, [&](int step) { return mine[32 * step]; }, s.feed.hidden, HIDDEN_STRIDE, out_team, OUT_TEAMS);
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
  constexpr int SPLIT = split_of(EMB / 2, SLICES) < 32 ? split_of(EMB / 2, SLICES) : 32, SHARES = SLICES / SPLIT;
  constexpr int PAIRS = 32 / SPLIT;  // of numbers that a warp sums, a lane SHARES of each
  const float* w = layer_weights(a, layer);
  const int n_tokens = a.calls.batch * LENGTH;
  const unsigned mark = mark_of(number, layer);
  const bool last = layer == LAYERS - 1;
  Projection<> projection;
  if (!last) projection.ask(layer_weights(a, layer + 1), layer_weights(a, layer + 1) + AT_QKV);
  float bias[LANE_VALUES], scale[LANE_VALUES], shift[LANE_VALUES], last_scale[LANE_VALUES], last_shift[LANE_VALUES];
  load_row(bias, w + AT_LINEAR2_BIAS);
  load_row(scale, w + AT_NORM2);
  load_row(shift, w + AT_NORM2 + EMB);
  load_row(last_scale, a.weights + AT_NORM);  // ones and zeros where the head has them
  load_row(last_shift, a.weights + AT_NORM + EMB);
  for (int token = blockIdx.x; token < n_tokens; token += gridDim.x) {
    float v[LANE_VALUES], head[LANE_VALUES], head_bias = 0;
    const auto ask_head = [&](int o) {
      load_row(head, a.weights + AT_HEAD + (o * LENGTH + token % LENGTH) * EMB);
      head_bias = load_weight(a.weights + AT_BIAS + o);
    };
    if (last && !BASE && warp() < N_OUTPUTS) ask_head(warp());
#pragma unroll
    for (int i = 0; i < LANE_VALUES; ++i)
      if (const int e = lane() + 32 * i; e < EMB) v[i] = a.residual[token * EMB + e] + bias[i];
    if (const int pair = warp() * PAIRS + lane() / SPLIT, part = lane() % SPLIT; warp() * PAIRS < EMB / 2) {
      const Marked* from = a.shares + (part * SHARES * n_tokens + token) * EMB + 2 * pair;
      float2 share[SHARES], sum = {0, 0};
      receive(a, s, share, from, [&](int i) { return i * n_tokens * EMB; }, mark);
#pragma unroll
      for (int i = 0; i < SHARES; ++i) sum.x += share[i].x, sum.y += share[i].y;
#pragma unroll
      for (int mask = 1; mask < SPLIT; mask *= 2) sum.x += shuffle_xor(sum.x, mask), sum.y += shuffle_xor(sum.y, mask);
      if (part == 0) s.row[2 * pair] = sum.x, s.row[2 * pair + 1] = sum.y;
    }
    __syncthreads();
    MARK(8 * layer + 8);
#pragma unroll
    for (int i = 0; i < LANE_VALUES; ++i)
      if (const int e = lane() + 32 * i; e < EMB) v[i] += s.row[e];
    normalise(v, scale, shift);  // every warp, so that none waits for another
    if (!last) {
#pragma unroll
      for (int i = 0; i < LANE_VALUES; ++i) {
        const int e = lane() + 32 * i;
        if (e >= EMB) continue;
        s.rows[warp()][e] = v[i];
        if (warp() == 0) store_marked(a.tokens + token * EMB + e, v[i], mark_of(number, layer + 1));
      }
      __syncwarp();
      projection.columns.multiply(s.rows[warp()], s.partial);
      __syncthreads();
      hand_on(a, s, projection.bias, layer + 1, token, mark_of(number, layer + 1));
      __syncthreads();
      continue;
    }
    normalise(v, last_scale, last_shift);
    const int window = token / LENGTH;
    if constexpr (BASE) {
#pragma unroll
      for (int i = 0; i < LANE_VALUES; ++i)
        if (const int e = lane() + 32 * i; warp() == 0 && e < EMB) a.output[token * EMB + e] = v[i];
      __threadfence_system();
      if (last_to_arrive(&a.calls.counters->arrived[window], LENGTH, &s.ticket)) finish_window(a.calls, number);
    } else {
      for (int o = warp(); o < N_OUTPUTS; o += WARPS) {
        if (o != warp()) ask_head(o);
        float sum = 0;
#pragma unroll
        for (int i = 0; i < LANE_VALUES; ++i)
          if (lane() + 32 * i < EMB) sum = fmaf(v[i], head[i], sum);
        sum = warp_sum(sum);
        if (lane() == 0) store_marked(a.head_shares + token * N_OUTPUTS + o, sum, mark);
      }
      if (token % LENGTH == LENGTH - 1) {
        for (int o = warp(); o < N_OUTPUTS; o += WARPS) {
          if (N_OUTPUTS > WARPS) head_bias = load_weight(a.weights + AT_BIAS + o);
          float sum = 0;
          constexpr int AT_ONCE = (LENGTH + 31) / 32 < 8 ? (LENGTH + 31) / 32 : 8;
          for (int first = lane(); first - lane() < LENGTH; first += 32 * AT_ONCE) {
            const Marked* from = a.head_shares + window * LENGTH * N_OUTPUTS + o;
            const auto at = [&](int i) { return (first + 32 * i < LENGTH ? first + 32 * i : 0) * N_OUTPUTS; };
            Pending<AT_ONCE> pending;
            float share[AT_ONCE];
            pending.ask(from, at);
            pending.receive(share, from, at, mark, Patience{a, s, since()});
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) sum += first + 32 * i < LENGTH ? share[i] : 0.0f;
          }
          sum = warp_sum(sum);
          if (lane() == 0) put_output(a.calls, a.output, window * N_OUTPUTS + o, head_bias + sum, number);
        }
        finish_window(a.calls, number);
      }
      __syncthreads();
    }
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
    encode_phase(a, s, number);
    MARK(1);
    for (int layer = 0; layer < LAYERS; ++layer) {
      attend_phase(a, s, layer, number);
      MARK(8 * layer + 4);
      feed_phase(a, s, layer, number);
      MARK(8 * layer + 7);
      combine_phase(a, s, layer, number);
      MARK(8 * layer + 9);
    }
    if (!a.calls.request) break;
    __syncthreads();
    prepare(a, s);
  }
}
