// Multiplies 16 rows with weights on the matrix units, in 16-bit numbers, for the kernels of many windows.
//
// In float32 (PIECES == 2) a number is the sum of two halves, and a product the sum of three: that of the two lower pieces is below
// float32's rounding. Halves reach down to 6e-8 only, so weights are packed SCALE times as large as they are; LayerNorm keeps the
// rows near one. `pack_batch` in runtime/fused/batch_weights.py checks that no number leaves the range of halves.
//
// A warp holds 16 rows by 16 numbers as an operand (`Rows`), and 16 rows by 8 results in four floats a lane: lane 4 g + t has rows g
// and g + 8, columns 2 t and 2 t + 1. So two neighbouring results are an operand of the next product as they stand: nothing passes
// through shared memory from one product to the next.
struct Pair {
  unsigned piece[PIECES];  // two neighbouring numbers
};

struct Rows {
  unsigned part[PIECES][4];  // of lane 4 g + t: rows g, g + 8 at columns 2 t, 2 t + 1, then the same rows at columns 2 t + 8, 2 t + 9
};

DEVICE int row_of() { return lane() / 4; }
DEVICE int column_of() { return lane() % 4 * 2; }

DEVICE Pair pair_of(float low, float high) {
  Pair pair;
  pair.piece[0] = pack2(low, high);
  if constexpr (PIECES == 2) {
    const float2 upper = unpack2(pair.piece[0]);
    pair.piece[1] = pack2(low - upper.x, high - upper.y);
  }
  return pair;
}

DEVICE float relu(float v) { return v < 0 ? 0.0f : v; }  // keeps NaN

DEVICE Pair relu_pair_of(float low, float high) {
  if constexpr (PIECES == 2) return pair_of(relu(low), relu(high));
  Pair pair;
  pair.piece[0] = pack2_relu(low, high);
  return pair;
}

DEVICE void put(Rows& rows, int at, Pair pair) {
#pragma unroll
  for (int p = 0; p < PIECES; ++p) rows.part[p][at] = pair.piece[p];
}

// Results of columns 0 to 7 and 8 to 15 as an operand.
DEVICE Rows rows_of(const float (&left)[4], const float (&right)[4]) {
  Rows rows;
  put(rows, 0, pair_of(left[0], left[1]));
  put(rows, 1, pair_of(left[2], left[3]));
  put(rows, 2, pair_of(right[0], right[1]));
  put(rows, 3, pair_of(right[2], right[3]));
  return rows;
}

// 16 rows by 16 numbers of floats in shared memory; `from` is the first of them, rows are `stride` floats apart.
DEVICE Rows rows_at(const float* from, int stride) {
  Rows rows;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 v = *reinterpret_cast<const float2*>(from + (row_of() + i % 2 * 8) * stride + column_of() + i / 2 * 8);
    put(rows, i, pair_of(v.x, v.y));
  }
  return rows;
}

// Weights of 16 inputs and twice 8 outputs, or of twice 16 inputs and 8 outputs: two operands for each piece.
struct Weight {
  uint4 piece[PIECES];
};

DEVICE Weight weight_at(const uint4* shared) {
  Weight w;
#pragma unroll
  for (int p = 0; p < PIECES; ++p) w.piece[p] = shared[p * 32 + lane()];
  return w;
}

DEVICE Weight far_weight_at(const uint4* global) {
  Weight w;
#pragma unroll
  for (int p = 0; p < PIECES; ++p) w.piece[p] = load_weight4(global + p * 32 + lane());
  return w;
}

constexpr int WEIGHT = PIECES * 32;  // how far apart weights are, in units of 16 bytes

// sum (16 x 8) += rows (16 x 16) times the first or the second operand of `w`.
template <int SECOND>
DEVICE void multiply(float (&sum)[4], const Rows& rows, const Weight& w) {
  constexpr int LOWER = PIECES - 1;
  const unsigned upper0 = SECOND ? w.piece[0].z : w.piece[0].x, upper1 = SECOND ? w.piece[0].w : w.piece[0].y;
  if constexpr (PIECES == 2) {
    mma_16(sum, rows.part[LOWER], upper0, upper1);
    mma_16(sum, rows.part[0], SECOND ? w.piece[LOWER].z : w.piece[LOWER].x, SECOND ? w.piece[LOWER].w : w.piece[LOWER].y);
  }
  mma_16(sum, rows.part[0], upper0, upper1);
}
