// Computes Contextual, and the base model, for many windows. A block takes WINDOWS windows through all layers, and no block waits
// for another.
//
// `contextual.cu` spreads one window over the whole GPU, and most of its time is waiting; here as many windows as there are
// multiprocessors are under way at once. A block keeps the rows of its tokens (the residual stream, float32) in shared memory.
//   trunk      all channels: feature encoder, position encoding                                               (trunk.cuh)
//   attend     a warp a head: query, key and value of all rows, which stay in registers; softmax; result to `mixed`
//   feed       a warp 16 or 32 rows and half of the hidden units: output projection, first normalisation, feed-forward; the hidden
//              layer stays in registers. The weights pass through SLOTS slots of shared memory, 128 units at a time, once a layer.
//              Two warps add their halves, and each normalises 8 of each 16 rows.
// 129 tokens are 9 tiles of 16 rows for 4 pairs of warps. The ninth would cost as much as four, so it is SPARE: each warp takes it for
// an eighth of the hidden units.
// The sums of a row depend on the row's place in the window alone, so that neither the batch nor the GPU changes a bit.
struct Arguments {
  const float* input;    // (batch, N_CHANS, N_TIMES)
  float* output;         // (batch, N_OUTPUTS), or (batch, LENGTH, EMB) for the base model
  const float* weights;
  unsigned batch;
#if PROFILE
  long long* profile;    // MARKS for each block
#endif
};

constexpr int LENGTH = N_CHANS * N_TOKENS;             // tokens of a window
constexpr int TILES = (LENGTH + 15) / 16;              // of 16 rows, of a window
constexpr int ALL_TILES = WINDOWS * TILES;             // of a block
constexpr int KEYS = (LENGTH + 7) / 8;                 // tiles of 8 keys
constexpr int STEPS_E = EMB / 16;                      // of a product over the embedding
constexpr int COLUMNS = EMB / 8;                       // tiles of 8 results that a row has
constexpr int PAIRS_E = EMB / 32, PAIRS_M = EMB / 16;  // weights (of two operands each) over these
constexpr int STRIDE = EMB + 8;                        // floats between rows; words of `mixed`: half of them
constexpr int MIXED = EMB / 2 + 4;
static_assert(EMB / HEADS == 8 && EMB % 32 == 0 && WARPS == 8, "sizes");

// Feed-forward.
constexpr int TEAMS = WARPS / 2;                       // pairs of warps, each for OWN tiles at a time
constexpr int UNITS = 128, STAGES = FEED_FORWARD / UNITS, SUBS = UNITS / 2 / 16;  // hidden units: of a stage, 16 at a time
constexpr bool SPARE = WINDOWS == 1 && ALL_TILES > 1 && ALL_TILES % (TEAMS * OWN) == 1;
constexpr int PASSES = (ALL_TILES - SPARE + TEAMS * OWN - 1) / (TEAMS * OWN);
constexpr int SUB_WEIGHTS = (2 * PAIRS_E + PAIRS_M) * WEIGHT;            // of 16 units, in 16 bytes
constexpr int SLOT_WEIGHTS = 2 * SUBS * SUB_WEIGHTS, SLOT = SLOT_WEIGHTS + UNITS / 4;  // and the units' biases
constexpr int ALL_STAGES = LAYERS * PASSES * STAGES;
static_assert(SUBS == TEAMS && OWN * TEAMS * 2 * COLUMNS * 32 * 8 <= SLOT * 16, "each team takes the spare tile once a stage");

// What a layer's rows are added to and normalised with, EMB floats each, in the order of AT_VECTORS.
enum Vector { OUT_BIAS, NORM1, SHIFT1, LINEAR2_BIAS, NORM2, SHIFT2, VECTORS };

struct Shared {
  float rows[ALL_TILES * 16 * STRIDE];
  union {
    struct {
      unsigned mixed[PIECES][ALL_TILES * 16 * MIXED];  // queries, and then what attention makes of them
      uint4 slots[SLOTS][SLOT];
    };
    Trunk trunk;
  };
  float vectors[2][VECTORS * EMB];  // of two layers in turn
  HeadSums head;
};
TELL_SIZE(Shared)

DEVICE const float* layer_weights(const Arguments& a, int layer) { return a.weights + AT_LAYERS + layer * LAYER_FLOATS; }
DEVICE const uint4* operands(const float* weights) { return reinterpret_cast<const uint4*>(weights); }
DEVICE float2 two_at(const float* p) { return *reinterpret_cast<const float2*>(p); }

// A part of stage `number` of all layers on its way to its slot; behind the last stage the last one again, which nobody reads.
DEVICE void fetch_part(const Arguments& a, Shared& s, int number, int part) {
  constexpr int EACH = SLOT_WEIGHTS / SUBS / THREADS;
  static_assert(EACH * SUBS * THREADS == SLOT_WEIGHTS && UNITS / 4 <= THREADS, "every thread copies as much");
  const int last = number < ALL_STAGES ? number : ALL_STAGES - 1, layer = last / (PASSES * STAGES);
  const uint4* from = operands(layer_weights(a, layer) + AT_STAGES) + last % STAGES * SLOT + part * EACH * THREADS + thread();
  uint4* to = s.slots[number % SLOTS] + part * EACH * THREADS + thread();
#pragma unroll
  for (int i = 0; i < EACH; ++i) copy16(to + i * THREADS, from + i * THREADS);
  if (part == SUBS - 1 && thread() < UNITS / 4) copy16(to + EACH * THREADS, from + EACH * THREADS);  // biases
}

DEVICE void fetch_stage(const Arguments& a, Shared& s, int number) {
#pragma unroll
  for (int part = 0; part < SUBS; ++part) fetch_part(a, s, number, part);
}

// A layer's vectors, with the copies of its first stage.
DEVICE void fetch_vectors(const Arguments& a, Shared& s, int number) {
  const int layer = number / (PASSES * STAGES);
  if (number % (PASSES * STAGES) == 0 && layer < LAYERS) fetch(s.vectors[layer % 2], layer_weights(a, layer) + AT_VECTORS, VECTORS * EMB);
}

// The sum over a row, of which four lanes hold parts.
DEVICE float row_sum(float v) {
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}

DEVICE float row_max(float v) {
  v = fmaxf(v, shuffle_xor(v, 1));
  return fmaxf(v, shuffle_xor(v, 2));
}

// LayerNorm of one row: lane's columns 8 i + column_of() and the next.
DEVICE void normalise(float2 (&v)[COLUMNS], const float* scale, const float* shift) {
  float sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) sum += v[i].x + v[i].y;
  const float mean = row_sum(sum) / EMB;
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    v[i].x -= mean, v[i].y -= mean;
    squares = fmaf(v[i].x, v[i].x, fmaf(v[i].y, v[i].y, squares));
  }
  const float factor = 1.0f / sqrtf(row_sum(squares) / EMB + EPS);
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    const float2 w = two_at(scale + 8 * i + column_of()), b = two_at(shift + 8 * i + column_of());
    v[i] = float2{fmaf(v[i].x * factor, w.x, b.x), fmaf(v[i].y * factor, w.y, b.y)};
  }
}

// ---- attention ----

constexpr int LOWER_PIECE = PIECES - 1, MIXED_PIECE = ALL_TILES * 16 * MIXED;  // words between the pieces of `mixed`

// Queries of a tile times all keys, and the largest of each row.
struct Scores {
  float score[2 * TILES][4];
  float peak[2];
};

DEVICE void score_tile(Scores& s, const unsigned* mine, const unsigned (&key)[PIECES][2 * TILES]) {
  unsigned q[PIECES][2];
#pragma unroll
  for (int p = 0; p < PIECES; ++p)
#pragma unroll
    for (int half = 0; half < 2; ++half) q[p][half] = mine[p * MIXED_PIECE + half * 8 * MIXED];
  s.peak[0] = s.peak[1] = -INFINITY;
#pragma unroll
  for (int j = 0; j < KEYS; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s.score[j][i] = 0;
    if constexpr (PIECES == 2) {
      mma_8(s.score[j], q[LOWER_PIECE][0], q[LOWER_PIECE][1], key[0][j]);
      mma_8(s.score[j], q[0][0], q[0][1], key[LOWER_PIECE][j]);
    }
    mma_8(s.score[j], q[0][0], q[0][1], key[0][j]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (j == KEYS - 1 && LENGTH % 8 && j * 8 + column_of() + i % 2 >= LENGTH) s.score[j][i] = -INFINITY;
      s.peak[i / 2] = fmaxf(s.peak[i / 2], s.score[j][i]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) s.peak[half] = row_max(s.peak[half]);
}

// Their softmax, and the sum of the values that it weighs, which takes the queries' place.
DEVICE void mix_tile(Scores& s, unsigned* mine, const unsigned (&value)[PIECES][2 * TILES]) {
  float total[2] = {0, 0}, mix[3][4] = {};  // three sums, as each product waits for the one before
#pragma unroll
  for (int k = 0; k < TILES; ++k) {
#pragma unroll
    for (int j = 2 * k; j < 2 * k + 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s.score[j][i] = j < KEYS ? power2(s.score[j][i] - s.peak[i / 2]) : 0.0f;
        total[i / 2] += s.score[j][i];
      }
    const Rows weights = rows_of(s.score[2 * k], s.score[2 * k + 1]);
    if constexpr (PIECES == 2) {
      mma_16(mix[k % 3], weights.part[LOWER_PIECE], value[0][2 * k], value[0][2 * k + 1]);
      mma_16(mix[k % 3], weights.part[0], value[LOWER_PIECE][2 * k], value[LOWER_PIECE][2 * k + 1]);
    }
    mma_16(mix[k % 3], weights.part[0], value[0][2 * k], value[0][2 * k + 1]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = 1.0f / row_sum(total[half]);
    const auto mixed = [&](int i) { return (mix[0][2 * half + i] + mix[1][2 * half + i] + mix[2][2 * half + i]) * factor; };
    const Pair pair = pair_of(mixed(0), mixed(1));
#pragma unroll
    for (int p = 0; p < PIECES; ++p) mine[p * MIXED_PIECE + half * 8 * MIXED] = pair.piece[p];
  }
}

// Weights have 1 / sqrt(head size) and log2(e) in those of the query, so that the weights of softmax are powers of two.
DEVICE void attend(const Arguments& a, Shared& s, const float* w) {
#pragma unroll 1
  for (int task = warp(); task < WINDOWS * HEADS; task += WARPS) {
    const int head = task % HEADS, first = task / HEADS * TILES * 16;
    unsigned key[PIECES][2 * TILES], value[PIECES][2 * TILES];  // of lane 4 g + t: key g, dims 2 t; keys 2 t, dim g
    unsigned* query = s.mixed[0] + (first + row_of()) * MIXED + head * 4 + lane() % 4;  // this lane's alone
    {
      Weight weight[3][PAIRS_E];
#pragma unroll
      for (int i = 0; i < 3; ++i)
        for (int k = 0; k < PAIRS_E; ++k)
          weight[i][k] = far_weight_at(operands(w + AT_QKV) + ((i * HEADS + head) * PAIRS_E + k) * WEIGHT);
      const float2 bias = two_at(w + AT_QUERY_BIAS + head * 8 + column_of());
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        float sum[3][4] = {{bias.x, bias.y, bias.x, bias.y}};
#pragma unroll
        for (int k = 0; k < PAIRS_E; ++k) {
          const float* from = s.rows + (first + tile * 16) * STRIDE + k * 32;
          const Rows left = rows_at(from, STRIDE), right = rows_at(from + 16, STRIDE);
#pragma unroll
          for (int i = 0; i < 3; ++i) multiply<0>(sum[i], left, weight[i][k]), multiply<1>(sum[i], right, weight[i][k]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Pair q = pair_of(sum[0][2 * half] / SCALE, sum[0][2 * half + 1] / SCALE);
          const Pair k = pair_of(sum[1][2 * half] / SCALE, sum[1][2 * half + 1] / SCALE);
          const Pair v = pair_of(sum[2][2 * half] / SCALE, sum[2][2 * half + 1] / SCALE);
#pragma unroll
          for (int p = 0; p < PIECES; ++p) {
            query[p * MIXED_PIECE + (tile * 16 + half * 8) * MIXED] = q.piece[p];
            key[p][2 * tile + half] = k.piece[p];
            value[p][2 * tile + half] = transpose8(v.piece[p]);
          }
        }
      }
    }
    constexpr int APART = 16 * MIXED;  // words between tiles
    if constexpr (PIECES == 1) {
      // The scores of the next tile while the powers of this one are on their way: they are different units' work.
      Scores even, odd;
      score_tile(even, query, key);
#pragma unroll 1
      for (int tile = 0; tile + 2 < TILES; tile += 2) {
        unsigned* mine = query + tile * APART;
        score_tile(odd, mine + APART, key);
        mix_tile(even, mine, value);
        score_tile(even, mine + 2 * APART, key);
        mix_tile(odd, mine + APART, value);
      }
      if constexpr (TILES % 2 == 0) score_tile(odd, query + (TILES - 1) * APART, key);
      mix_tile(even, query + (TILES - 1) / 2 * 2 * APART, value);
      if constexpr (TILES % 2 == 0) mix_tile(odd, query + (TILES - 1) * APART, value);
    } else {
#pragma unroll 1
      for (int tile = 0; tile < TILES; ++tile) {
        Scores scores;
        score_tile(scores, query + tile * APART, key);
        mix_tile(scores, query + tile * APART, value);
      }
    }
  }
}

// ---- feed-forward ----

// Output projection and first normalisation of N tiles: `x` as operands, and `kept` the rows of this warp's half as floats.
template <int N, int ALL>
DEVICE void project(const Shared& s, const float* w, const float* vectors, const int (&tile)[ALL], Rows (&x)[ALL][STEPS_E], float2 (&kept)[ALL][COLUMNS], int half) {
  float sum[N][COLUMNS][4];
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const float2 bias = two_at(vectors + OUT_BIAS * EMB + 8 * c + column_of());
#pragma unroll
    for (int t = 0; t < N; ++t) sum[t][c][0] = sum[t][c][2] = bias.x, sum[t][c][1] = sum[t][c][3] = bias.y;
  }
#pragma unroll
  for (int k = 0; k < PAIRS_E; ++k) {
    Rows rows[N][2];
#pragma unroll
    for (int t = 0; t < N; ++t)
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int p = 0; p < PIECES; ++p)
          rows[t][i / 4].part[p][i % 4] =
              s.mixed[p][(tile[t] * 16 + row_of() + i % 2 * 8) * MIXED + k * 16 + i / 4 * 8 + i / 2 % 2 * 4 + lane() % 4];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const Weight weight = far_weight_at(operands(w + AT_OUT) + (c * PAIRS_E + k) * WEIGHT);
#pragma unroll
      for (int t = 0; t < N; ++t) multiply<0>(sum[t][c], rows[t][0], weight), multiply<1>(sum[t][c], rows[t][1], weight);
    }
  }
#pragma unroll
  for (int t = 0; t < N; ++t) {
    float2 v[2][COLUMNS];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float* row = s.rows + (tile[t] * 16 + row_of() + 8 * h) * STRIDE + column_of();
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        const float2 before = two_at(row + 8 * c);
        v[h][c] = float2{before.x + sum[t][c][2 * h] / SCALE, before.y + sum[t][c][2 * h + 1] / SCALE};
      }
      normalise(v[h], vectors + NORM1 * EMB, vectors + SHIFT1 * EMB);
    }
#pragma unroll
    for (int k = 0; k < STEPS_E; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) put(x[t][k], i, pair_of(v[i % 2][2 * k + i / 2].x, v[i % 2][2 * k + i / 2].y));
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) kept[t][c] = half ? v[1][c] : v[0][c];
  }
}

// 16 hidden units of N tiles before the activation: x W1 + b.
template <int N, int ALL>
DEVICE void feed_in(const uint4* weights, const float* bias, const Rows (&x)[ALL][STEPS_E], float (&hidden)[ALL][2][4]) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float2 b = two_at(bias + 8 * c + column_of());
#pragma unroll
    for (int t = 0; t < N; ++t) hidden[t][c][0] = hidden[t][c][2] = b.x, hidden[t][c][1] = hidden[t][c][3] = b.y;
  }
#pragma unroll
  for (int k = 0; k < PAIRS_E; ++k) {
    const Weight w[2] = {weight_at(weights + k * WEIGHT), weight_at(weights + (PAIRS_E + k) * WEIGHT)};
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) multiply<0>(hidden[i / 2][i % 2], x[i / 2][2 * k], w[i % 2]);  // sums in turn: each waits for its last
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) multiply<1>(hidden[i / 2][i % 2], x[i / 2][2 * k + 1], w[i % 2]);
  }
}

// out += relu(hidden) W2.
template <int N, int ALL>
DEVICE void feed_out(const uint4* weights, const float (&hidden)[ALL][2][4], float (&out)[ALL][COLUMNS][4]) {
  Rows active[N];
#pragma unroll
  for (int t = 0; t < N; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = hidden[t][i / 2] + i % 2 * 2;
      put(active[t], i, relu_pair_of(pair[0] / SCALE, pair[1] / SCALE));
    }
#pragma unroll
  for (int m = 0; m < PAIRS_M; ++m) {
    const Weight w = weight_at(weights + (2 * PAIRS_E + m) * WEIGHT);
#pragma unroll
    for (int t = 0; t < N; ++t) multiply<0>(out[t][2 * m], active[t], w), multiply<1>(out[t][2 * m + 1], active[t], w);
  }
}

// The second normalisation of the row that this lane has of `tile`, whose feed-forward result is `v`; after the last layer the last one.
DEVICE void finish_row(const Arguments& a, Shared& s, const float* vectors, int tile, int half, float2 (&v)[COLUMNS], bool last) {
  float* row = s.rows + (tile * 16 + 8 * half + row_of()) * STRIDE + column_of();
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const float2 bias = two_at(vectors + LINEAR2_BIAS * EMB + 8 * c + column_of()), x = two_at(row + 8 * c);
    v[c] = float2{x.x + bias.x + v[c].x / SCALE, x.y + bias.y + v[c].y / SCALE};
  }
  normalise(v, vectors + NORM2 * EMB, vectors + SHIFT2 * EMB);
  if (last) normalise(v, a.weights + AT_NORM, a.weights + AT_NORM + EMB);
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) *reinterpret_cast<float2*>(row + 8 * c) = v[c];
}

// Where the lanes of a warp leave two numbers for the lanes of another.
DEVICE int exchange(int of_warp, int tile, int column) { return ((tile * WARPS + of_warp) * COLUMNS + column) * 32 + lane(); }

// Tiles `first` and on. WITH_SPARE: and the spare one. Ends with a barrier.
template <bool WITH_SPARE>
DEVICE void feed_pass(const Arguments& a, Shared& s, int layer, int first, int& number) {
  constexpr int ALL = OWN + WITH_SPARE;
  const float *w = layer_weights(a, layer), *vectors = s.vectors[layer % 2];
  const bool last_layer = layer == LAYERS - 1;
  const int team = warp() % TEAMS, half = warp() / TEAMS, partner = warp() ^ TEAMS;
  int tile[ALL];
#pragma unroll
  for (int t = 0; t < ALL; ++t) tile[t] = t == OWN ? ALL_TILES - 1 : first + team * OWN + t;
  bool busy[ALL];
#pragma unroll
  for (int t = 0; t < ALL; ++t) {
    busy[t] = tile[t] < ALL_TILES;
    if (!busy[t]) tile[t] = 0;  // computed and not kept
  }
  Rows x[ALL][STEPS_E];
  {
    float2 kept[ALL][COLUMNS];
    project<ALL>(s, w, vectors, tile, x, kept, half);
    __syncthreads();  // all have read what is written over now
#pragma unroll
    for (int t = 0; t < ALL; ++t)
      if (busy[t] && (t < OWN || team == 0))
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
          *reinterpret_cast<float2*>(s.rows + (tile[t] * 16 + 8 * half + row_of()) * STRIDE + 8 * c + column_of()) = kept[t][c];
  }
  float out[ALL][COLUMNS][4] = {};
#pragma unroll 1
  for (int stage = 0; stage < STAGES; ++stage, ++number) {
    wait_copies<SLOTS - 2>();
    __syncthreads();
    fetch_vectors(a, s, number + SLOTS - 1);  // copies go to the slot that all have left, between the products
    const uint4* slot = s.slots[number % SLOTS];
    const float* biases = reinterpret_cast<const float*>(slot + SLOT_WEIGHTS);
    const auto at = [&](int i) { return half * SUBS + (WITH_SPARE ? (team + i) % SUBS : i); };
#if PIECES == 2
    // Matrix units cut off what they add; so their sums are short, and floats add them up.
    float part[ALL][COLUMNS][4] = {};
#else
    auto& part = out;
#endif
    float hidden[2][ALL][2][4];  // in turn: the matrix units have the next units to begin while these are rounded
    feed_in<ALL>(slot + at(0) * SUB_WEIGHTS, biases + at(0) * 16, x, hidden[0]);
#pragma unroll
    for (int i = 0; i < SUBS; ++i) {
      fetch_part(a, s, number + SLOTS - 1, i);
      if (i + 1 < SUBS) feed_in<OWN>(slot + at(i + 1) * SUB_WEIGHTS, biases + at(i + 1) * 16, x, hidden[(i + 1) % 2]);
      if (i == 0) feed_out<ALL>(slot + at(i) * SUB_WEIGHTS, hidden[0], part);
      else feed_out<OWN>(slot + at(i) * SUB_WEIGHTS, hidden[i % 2], part);
    }
    commit_copies();
#if PIECES == 2
#pragma unroll
    for (int t = 0; t < ALL; ++t)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[t][c][i] += part[t][c][i];
#endif
  }
  __syncthreads();
  float2* free_slot = reinterpret_cast<float2*>(s.slots[(number - 1) % SLOTS]);
  float2* spare_parts = reinterpret_cast<float2*>(s.mixed);  // whose last readers were the projections
#pragma unroll
  for (int t = 0; t < OWN; ++t)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
      free_slot[exchange(warp(), t, c)] = half ? float2{out[t][c][0], out[t][c][1]} : float2{out[t][c][2], out[t][c][3]};
  const auto leave_spare = [&](int h) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) spare_parts[exchange(warp(), 0, c)] = float2{out[ALL - 1][c][2 * h], out[ALL - 1][c][2 * h + 1]};
  };
  const auto finish_spare = [&](int h) {
    if (warp() != h * TEAMS) return;
    float2 v[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      v[c] = float2{0, 0};
#pragma unroll
      for (int i = 0; i < WARPS; ++i) {
        const float2 part = spare_parts[exchange(i, 0, c)];
        v[c].x += part.x, v[c].y += part.y;
      }
    }
    finish_row(a, s, vectors, ALL_TILES - 1, h, v, last_layer);
  };
  if constexpr (WITH_SPARE) leave_spare(0);
  __syncthreads();
#pragma unroll
  for (int t = 0; t < OWN; ++t) {
    float2 v[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const float2 other = free_slot[exchange(partner, t, c)];
      v[c] = float2{(half ? out[t][c][2] : out[t][c][0]) + other.x, (half ? out[t][c][3] : out[t][c][1]) + other.y};
    }
    if (busy[t]) finish_row(a, s, vectors, tile[t], half, v, last_layer);
  }
  if constexpr (WITH_SPARE) finish_spare(0);
  if constexpr (WITH_SPARE && (LENGTH - 1) % 16 >= 8) {  // the spare tile has more than 8 rows
    __syncthreads();
    leave_spare(1);
    __syncthreads();
    finish_spare(1);
  }
  __syncthreads();
}

// ---- the block ----

DEVICE void give(const Arguments& a, Shared& s, int window, const float* rows) {
#if BASE
  for (int i = thread(); i < LENGTH * EMB; i += THREADS) a.output[window * LENGTH * EMB + i] = rows[i / EMB * STRIDE + i % EMB];
#else
#pragma unroll 1
  for (int first = 0; first < N_OUTPUTS; first += HEAD_AT_ONCE) {
    float sum[HEAD_AT_ONCE] = {};
#pragma unroll 4
    for (int i = 4 * thread(); i < LENGTH * EMB; i += 4 * THREADS) {
      const float4 v = *reinterpret_cast<const float4*>(rows + i / EMB * STRIDE + i % EMB);
#pragma unroll
      for (int o = 0; o < HEAD_AT_ONCE; ++o) {
        if (first + o >= N_OUTPUTS) continue;
        const float4 w = load_once4(reinterpret_cast<const float4*>(a.weights + AT_HEAD + (first + o) * LENGTH * EMB + i));
        sum[o] = fmaf(v.x, w.x, fmaf(v.y, w.y, fmaf(v.z, w.z, fmaf(v.w, w.w, sum[o]))));
      }
    }
    put_outputs(s.head, a.output + window * N_OUTPUTS, a.weights + AT_BIAS, first, sum);
  }
#endif
}

KERNEL contextual_batch(const Arguments a) {
  SHARED_MEMORY;
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  const int first = blockIdx.x * WINDOWS, count = (int)a.batch - first < WINDOWS ? (int)a.batch - first : WINDOWS;
  MARK(0);
  for (int i = thread(); i < ALL_TILES * 16 * STRIDE; i += THREADS) s.rows[i] = 0;  // rows behind a window's last token stay finite
  __syncthreads();
#pragma unroll 1
  for (int window = 0; window < count; ++window) {
    float* rows = s.rows + window * TILES * 16 * STRIDE;
    const float* input = a.input + (first + window) * N_CHANS * N_TIMES;
    encode_channels(
        s.trunk, a.weights + AT_FIRST, operands(a.weights + AT_CONVS),
        [&](int channel, int n) { load_channels(s.trunk, input + channel * N_TIMES, n); },
        [&](int token, int dim, float low, float high) {
          const float2 position = two_at(a.weights + AT_POSITIONS + token * EMB + dim);
          *reinterpret_cast<float2*>(rows + token * STRIDE + dim) = float2{low + position.x, high + position.y};
        });
  }
  MARK(1);
  int number = 0;
  for (int stage = 0; stage < SLOTS - 1; ++stage) {
    fetch_vectors(a, s, stage);
    fetch_stage(a, s, stage);
    commit_copies();
  }
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; ++layer) {
    attend(a, s, layer_weights(a, layer));
    wait_copies<SLOTS - 2>();  // the layer's vectors
    __syncthreads();
    MARK(2 * layer + 2);
#pragma unroll 1
    for (int pass = 0; pass < PASSES - SPARE; ++pass) feed_pass<false>(a, s, layer, pass * TEAMS * OWN, number);
    if constexpr (SPARE) feed_pass<true>(a, s, layer, (PASSES - 1) * TEAMS * OWN, number);
    MARK(2 * layer + 3);
  }
#pragma unroll 1
  for (int window = 0; window < count; ++window) give(a, s, first + window, s.rows + window * TILES * 16 * STRIDE);
  MARK(2 * LAYERS + 2);
}
