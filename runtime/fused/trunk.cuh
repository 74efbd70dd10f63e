// Computes the feature encoder of many channels at a time. The first convolution and its normalisation are in float32, as nothing
// bounds the samples. The products after them run on the matrix units.
// SIGNALS are the channels of a window, or PreLocal's virtual channels.
constexpr int STEP_DIMS = CONV_DIM[0];
constexpr int TAPS = CONV_KERNEL[0];
constexpr int SIGNAL = (N_TIMES + 3) / 4 * 4;  // floats of a channel
constexpr bool WIDE_READS = FIRST_STRIDE % 4 == 0 && TAPS % 4 == 0;
static_assert(STEP_DIMS % 8 == 0, "the first convolution");

// Words (two numbers each) of a row that convolution I reads, which is KERNEL steps side by side. 4 more, so that a warp's reads meet
// all banks.
constexpr int inputs_of(int i) { return CONV_DIM[i - 1] * CONV_KERNEL[i]; }
constexpr int row_words(int i) { return inputs_of(i) / 2 + 4; }
constexpr int layer_words(int parity) {  // of a channel, of the layers that read one of the two buffers
  int most = 4;
  for (int i = 1; i < N_CONVS; ++i)
    if (i % 2 == parity) most = larger(most, STEPS[i] * row_words(i));
  return most;
}
constexpr int CHANNEL_BYTES =
    4 * (larger(SIGNAL, PIECES * (layer_words(0) + layer_words(1))) + FIRST_STEPS * STEP_DIMS + 2 * STEP_DIMS);
constexpr int TABLE_BYTES = 4 * (TAPS + 2) * STEP_DIMS;

// Channels at a time: as many as TRUNK_BYTES hold, in equal parts.
constexpr int MOST_CHANNELS = larger(1, (TRUNK_BYTES - TABLE_BYTES) / CHANNEL_BYTES);
constexpr int CHANNEL_PARTS = (SIGNALS + MOST_CHANNELS - 1) / MOST_CHANNELS;
constexpr int CHANNELS = (SIGNALS + CHANNEL_PARTS - 1) / CHANNEL_PARTS;

struct Trunk {
  union {
    float signal[CHANNELS * SIGNAL];
    struct {  // what the products read, in turn; the signal has been read by then
      unsigned even[PIECES][CHANNELS * layer_words(0)];
      unsigned odd[PIECES][CHANNELS * layer_words(1)];
    };
  };
  float table[(TAPS + 2) * STEP_DIMS];             // first convolution (taps x dims), scale, shift
  float first[CHANNELS * FIRST_STEPS * STEP_DIMS];
  float2 moments[CHANNELS * STEP_DIMS];            // mean, and what a difference from it is multiplied with
};

// GELU with the error function of Abramowitz and Stegun 7.1.26, whose error is 1.5e-7: without branches, and half the instructions of
// erff.
DEVICE float quick_gelu(float x) {
  const float z = fabsf(x) * 0.70710678118654752f, t = reciprocal(fmaf(0.3275911f, z, 1.0f));
  const float sum = t * fmaf(t, fmaf(t, fmaf(t, fmaf(t, 1.061405429f, -1.453152027f), 1.421413741f), -0.284496736f), 0.254829592f);
  const float beyond = sum * power2(z * z * -1.44269504088896341f);  // 1 - erf(z)
  return 0.5f * x * (x < 0 ? beyond : 2.0f - beyond);
}

// Where the numbers at `dim` and `dim + 1` of a row of `dims` go, as convolution `next` reads them.
template <int NEXT>
DEVICE int word_for(int row, int dims, int dim) {
  constexpr int KERNEL_STEPS = CONV_KERNEL[NEXT], STRIDE_W = row_words(NEXT);
  return row / KERNEL_STEPS * STRIDE_W + (row % KERNEL_STEPS * dims + dim) / 2;
}

// Channels of a window in global memory, without their offset: the normalisation removes any, but float32 would lose digits to it.
DEVICE void load_channels(Trunk& s, const float* input, int count) {
  constexpr int VECTOR = N_TIMES % 4 == 0 ? 4 : 1, AT_ONCE = 8;
  const int n = count * N_TIMES / VECTOR;
  for (int first = thread(); first < n; first += AT_ONCE * THREADS) {
    float4 v[AT_ONCE];
    float offset[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int at = (first + i * THREADS) * VECTOR;
      if (first + i * THREADS >= n) continue;
      if constexpr (VECTOR == 4) v[i] = load_once4(reinterpret_cast<const float4*>(input + at));
      else v[i].x = load_once(input + at);
      offset[i] = load_once(input + at / N_TIMES * N_TIMES);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int at = (first + i * THREADS) * VECTOR;
      if (first + i * THREADS >= n) continue;
      float* to = s.signal + at / N_TIMES * SIGNAL + at % N_TIMES;
      if constexpr (VECTOR == 4)
        *reinterpret_cast<float4*>(to) = float4{v[i].x - offset[i], v[i].y - offset[i], v[i].z - offset[i], v[i].w - offset[i]};
      else *to = v[i].x - offset[i];
    }
  }
}

// One step of the first convolution of two channels, 8 dimensions.
DEVICE void first_convolution(Trunk& s, int count) {
  constexpr int PARTS = STEP_DIMS / 8;
  for (int i = thread(); i < (count + 1) / 2 * FIRST_STEPS * PARTS; i += THREADS) {
    const int step = i / PARTS % FIRST_STEPS, one = i / (PARTS * FIRST_STEPS) * 2, other = one + 1 < count ? one + 1 : one;
    const float* table = s.table + i % PARTS * 8;
    const float *x = s.signal + one * SIGNAL + step * FIRST_STRIDE, *y = s.signal + other * SIGNAL + step * FIRST_STRIDE;
    float sum[2][8] = {};
    const auto add = [&](int k, float a, float b) {
      const float4 low = *reinterpret_cast<const float4*>(table + k * STEP_DIMS);
      const float4 high = *reinterpret_cast<const float4*>(table + k * STEP_DIMS + 4);
      const float w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int d = 0; d < 8; ++d) sum[0][d] = fmaf(a, w[d], sum[0][d]), sum[1][d] = fmaf(b, w[d], sum[1][d]);
    };
    if constexpr (WIDE_READS) {
#pragma unroll 4
      for (int k = 0; k < TAPS; k += 4) {
        const float4 a = *reinterpret_cast<const float4*>(x + k), b = *reinterpret_cast<const float4*>(y + k);
        add(k, a.x, b.x), add(k + 1, a.y, b.y), add(k + 2, a.z, b.z), add(k + 3, a.w, b.w);
      }
    } else {
      for (int k = 0; k < TAPS; ++k) add(k, x[k], y[k]);
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float* to = s.first + ((c ? other : one) * FIRST_STEPS + step) * STEP_DIMS + i % PARTS * 8;
      if (c && other == one) continue;
      reinterpret_cast<float4*>(to)[0] = float4{sum[c][0], sum[c][1], sum[c][2], sum[c][3]};
      reinterpret_cast<float4*>(to)[1] = float4{sum[c][4], sum[c][5], sum[c][6], sum[c][7]};
    }
  }
}

// Two passes over the values, as a sum of squares would lose the digits that a large signal leaves.
DEVICE void find_moments(Trunk& s, int count) {
  for (int i = thread(); i < count * STEP_DIMS; i += THREADS) {
    const int d = i % STEP_DIMS;
    const float* x = s.first + i / STEP_DIMS * FIRST_STEPS * STEP_DIMS + d;
    float sum[2] = {0, 0}, squares[2] = {0, 0};
#pragma unroll 4
    for (int step = 0; step < FIRST_STEPS; ++step) sum[step % 2] += x[step * STEP_DIMS];
    const float mean = (sum[0] + sum[1]) / FIRST_STEPS;
#pragma unroll 4
    for (int step = 0; step < FIRST_STEPS; ++step) {
      const float difference = x[step * STEP_DIMS] - mean;
      squares[step % 2] = fmaf(difference, difference, squares[step % 2]);
    }
    s.moments[i] = float2{mean, s.table[TAPS * STEP_DIMS + d] / sqrtf((squares[0] + squares[1]) / FIRST_STEPS + EPS)};
  }
}

DEVICE void normalise_first(Trunk& s, int count) {
  constexpr int PAIRS = STEP_DIMS / 2, KEPT = STEPS[0];
  for (int i = thread(); i < count * KEPT * PAIRS; i += THREADS) {
    const int d = i % PAIRS * 2, row = i / PAIRS, channel = row / KEPT, step = row % KEPT;
    const float2 x = *reinterpret_cast<const float2*>(s.first + (channel * FIRST_STEPS + step) * STEP_DIMS + d);
    const float4 m = *reinterpret_cast<const float4*>(s.moments + channel * STEP_DIMS + d);
    const float* shift = s.table + (TAPS + 1) * STEP_DIMS + d;
    const Pair pair = pair_of(quick_gelu(fmaf(x.x - m.x, m.y, shift[0])), quick_gelu(fmaf(x.y - m.z, m.w, shift[1])));
#pragma unroll
    for (int p = 0; p < PIECES; ++p) s.odd[p][word_for<1>(row, STEP_DIMS, d)] = pair.piece[p];
  }
}

// Convolution I of `count` channels and those behind it; `use(row, dim, low, high)` takes two neighbouring numbers of a token.
template <int I, class Use>
DEVICE void convolve(Trunk& s, const uint4* weights, int count, Use use) {
  if constexpr (I < N_CONVS) {
    constexpr int K = inputs_of(I) / 16, M = CONV_DIM[I], GROUPS_M = M / 16, STRIDE_W = row_words(I), KEPT = STEPS[I];
    static_assert(inputs_of(I) % 16 == 0 && M % 16 == 0, "sizes of the convolutions");
    const int n_rows = count * KEPT, tiles = (n_rows + 15) / 16;
    for (int task = warp(); task < tiles * GROUPS_M; task += WARPS) {
      const int tile = task / GROUPS_M, group = task % GROUPS_M, row = tile * 16 + row_of();
      const int low = row < n_rows ? row : n_rows - 1, high = row + 8 < n_rows ? row + 8 : n_rows - 1;
      float sum[2][4] = {};
#pragma unroll 4
      for (int k = 0; k < K; ++k) {
        Rows rows;
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
          const unsigned* from = (I % 2 ? s.odd[p] : s.even[p]) + k * 8 + lane() % 4;
          rows.part[p][0] = from[low * STRIDE_W], rows.part[p][1] = from[high * STRIDE_W];
          rows.part[p][2] = from[low * STRIDE_W + 4], rows.part[p][3] = from[high * STRIDE_W + 4];
        }
        const Weight w = far_weight_at(weights + (group * K + k) * WEIGHT);
        multiply<0>(sum[0], rows, w);
        multiply<1>(sum[1], rows, w);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + i % 2 * 8, dim = group * 16 + i / 2 * 8 + column_of();
        if (r >= n_rows) continue;
        const float one = quick_gelu(sum[i / 2][i % 2 * 2] / SCALE), other = quick_gelu(sum[i / 2][i % 2 * 2 + 1] / SCALE);
        if constexpr (I + 1 < N_CONVS) {
          const Pair pair = pair_of(one, other);
#pragma unroll
          for (int p = 0; p < PIECES; ++p) (I % 2 ? s.even[p] : s.odd[p])[word_for<I + 1>(r, M, dim)] = pair.piece[p];
        } else {
          use(r, dim, one, other);
        }
      }
    }
    __syncthreads();
    convolve<I + 1>(s, weights + GROUPS_M * K * WEIGHT, count, use);
  }
}

// All signals of a window. `load(first, count)` puts some of them into `s.signal`; `use(token, dim, low, high)` takes two neighbouring
// numbers of a token of the window. Begins with shared memory that is free, and ends with a barrier.
template <class Load, class Use>
DEVICE void encode_channels(Trunk& s, const float* table, const uint4* weights, Load load, Use use) {
  for (int i = thread(); i < (TAPS + 2) * STEP_DIMS; i += THREADS) s.table[i] = table[i];
#pragma unroll 1
  for (int first = 0; first < SIGNALS; first += CHANNELS) {
    const int count = SIGNALS - first < CHANNELS ? SIGNALS - first : CHANNELS;
    load(first, count);
    __syncthreads();
    first_convolution(s, count);
    __syncthreads();
    find_moments(s, count);
    __syncthreads();
    normalise_first(s, count);
    __syncthreads();
    convolve<1>(s, weights, count, [&](int row, int dim, float low, float high) { use(first * N_TOKENS + row, dim, low, high); });
  }
}
