// Holds the code that the kernels of one window share: sums, products, the feature encoder of one block, and the end of a launch.
//
// Into how many parts the sums of `outputs` products over k terms are split, so that every thread has work.
constexpr int split_of(int outputs, int k) {
  int split = 1;
  while (2 * split * outputs <= THREADS && k % (2 * split) == 0) split *= 2;
  return split;
}

template <int TERMS, int M>
DEVICE float dot(const float* row, const float* column) {
  if constexpr (TERMS % 4 == 0) {
    float sum[4] = {0, 0, 0, 0};
#pragma unroll 8
    for (int k = 0; k < TERMS; k += 4) {
      const float4 x = *reinterpret_cast<const float4*>(row + k);
      sum[0] = fmaf(x.x, column[k * M], sum[0]);
      sum[1] = fmaf(x.y, column[(k + 1) * M], sum[1]);
      sum[2] = fmaf(x.z, column[(k + 2) * M], sum[2]);
      sum[3] = fmaf(x.w, column[(k + 3) * M], sum[3]);
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  } else {
    float sum = 0;
    for (int k = 0; k < TERMS; ++k) sum = fmaf(row[k], column[k * M], sum);
    return sum;
  }
}

// rows (ROWS x K, shared) times weight (K x M); `use(row, m, value)` takes each result. `partial` holds THREADS floats.
// Begins with shared memory that is ready to be read, and ends with a barrier.
template <int ROWS, int K, int M, class Use>
DEVICE void product(const float* rows, const float* weight, float* partial, Use use) {
  constexpr int OUTPUTS = ROWS * M, SPLIT = split_of(OUTPUTS, K), TERMS = K / SPLIT;
  if constexpr (SPLIT == 1) {
    for (int i = thread(); i < OUTPUTS; i += THREADS) use(i / M, i % M, dot<K, M>(rows + i / M * K, weight + i % M));
  } else {
    const int i = thread() % OUTPUTS, part = thread() / OUTPUTS;
    if (part < SPLIT) {
      const int k = part * TERMS;
      partial[thread()] = dot<TERMS, M>(rows + i / M * K + k, weight + k * M + i % M);
    }
    __syncthreads();
    if (part == 0) {
      float sum = 0;
      for (int p = 0; p < SPLIT; ++p) sum += partial[p * OUTPUTS + i];
      use(i / M, i % M, sum);
    }
  }
  __syncthreads();
}

// ---- feature encoder ----

constexpr int activations(int signals) {
  int most = FIRST_STEPS * CONV_DIM[0];
  for (int i = 0; i < N_CONVS; ++i) most = larger(most, STEPS[i] * CONV_DIM[i]);
  return (signals * most + 3) / 4 * 4;
}

// The buffers of `SIGNALS` signals. All sizes are multiples of 16 bytes.
template <int SIGNALS>
struct EncoderMemory {
  float weights[ENCODER_IN_SHARED ? ENCODER_FLOATS : 4];
  float signal[(SIGNALS * N_TIMES + 3) / 4 * 4];
  float one[activations(SIGNALS)], other[activations(SIGNALS)];
  float partial[THREADS];
};

template <int SIGNALS>
DEVICE void fetch_encoder(EncoderMemory<SIGNALS>& s, const float* weights) {
  if constexpr (ENCODER_IN_SHARED) fetch(s.weights, weights + AT_ENCODER, ENCODER_FLOATS);
}

template <int I, int SIGNALS>
DEVICE const float* encoder_layers(float* in, float* out, const float* weight, float* partial) {
  if constexpr (I == N_CONVS) {
    return in;
  } else {
    constexpr int K = CONV_DIM[I - 1] * CONV_KERNEL[I], M = CONV_DIM[I];
    product<SIGNALS * STEPS[I], K, M>(in, weight, partial, [&](int row, int m, float v) { out[row * M + m] = gelu(v); });
    return encoder_layers<I + 1, SIGNALS>(out, in, weight + K * M, partial);
  }
}

// s.signal (SIGNALS x N_TIMES, without offset) to tokens (SIGNALS x N_TOKENS x EMB), which are returned. Begins with a barrier
// behind it and ends with one. Weights: first convolution (taps x dim), scale, shift, then each product (K x M).
template <int SIGNALS>
DEVICE const float* encode(EncoderMemory<SIGNALS>& s, const float* global_weights) {
  constexpr int D = CONV_DIM[0], TAPS = CONV_KERNEL[0];
  const float* weights = ENCODER_IN_SHARED ? s.weights : global_weights + AT_ENCODER;
  for (int i = thread(); i < SIGNALS * FIRST_STEPS * D; i += THREADS) {
    const int d = i % D, step = i / D % FIRST_STEPS, signal = i / (D * FIRST_STEPS);
    const float* x = s.signal + signal * N_TIMES + step * FIRST_STRIDE;
    float sum[2] = {0, 0};
#pragma unroll 16
    for (int k = 0; k < TAPS; ++k) sum[k % 2] = fmaf(x[k], weights[k * D + d], sum[k % 2]);
    s.one[i] = sum[0] + sum[1];
  }
  __syncthreads();
  // Two passes over the values, as a sum of squares would lose the digits that a large signal leaves.
  const float *scale = weights + TAPS * D, *shift = scale + D;
  for (int task = warp(); task < SIGNALS * D; task += WARPS) {
    const int d = task % D, signal = task / D;
    const float* x = s.one + signal * FIRST_STEPS * D + d;
    float sum = 0, squares = 0;
    for (int step = lane(); step < FIRST_STEPS; step += 32) sum += x[step * D];
    const float mean = warp_sum(sum) / FIRST_STEPS;
    for (int step = lane(); step < FIRST_STEPS; step += 32) {
      const float difference = x[step * D] - mean;
      squares = fmaf(difference, difference, squares);
    }
    const float factor = scale[d] / sqrtf(warp_sum(squares) / FIRST_STEPS + EPS);
    for (int step = lane(); step < STEPS[0]; step += 32)
      s.other[(signal * STEPS[0] + step) * D + d] = gelu(fmaf(x[step * D] - mean, factor, shift[d]));
  }
  __syncthreads();
  return encoder_layers<1, SIGNALS>(s.other, s.one, weights + (TAPS + 2) * D, s.partial);
}

// `count` signals of N_TIMES samples, at most MOST, from the input to shared memory. All loads of a thread are under way before the
// first is stored, as each takes a microsecond or two over PCIe. Ends with a barrier, after which this block's `copy16` have arrived.
template <int MOST>
DEVICE void load_signals(float* shared, const float* input, int count) {
  constexpr int LOADS = (MOST * N_TIMES / (N_TIMES % 4 == 0 ? 4 : 1) + THREADS - 1) / THREADS, AT_ONCE = LOADS < 8 ? LOADS : 8;
  if constexpr (N_TIMES % 4 == 0) {
    const int n = count * N_TIMES / 4;
    for (int first = thread(); first < n; first += AT_ONCE * THREADS) {
      float4 v[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        if (first + i * THREADS < n) v[i] = load_input4(reinterpret_cast<const float4*>(input) + first + i * THREADS);
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        if (first + i * THREADS < n) reinterpret_cast<float4*>(shared)[first + i * THREADS] = v[i];
    }
  } else {
    const int n = count * N_TIMES;
    for (int first = thread(); first < n; first += AT_ONCE * THREADS) {
      float v[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        if (first + i * THREADS < n) v[i] = load_input(input + first + i * THREADS);
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        if (first + i * THREADS < n) shared[first + i * THREADS] = v[i];
    }
  }
  copies_arrived();
  __syncthreads();
}

#if ROLLS
// How many numbers apart the newest samples of two signals lie: no two share a line of memory. Where they did, one sample of each
// took 20 us longer than whole windows, most likely as the GPU keeps no line of host memory and reads it anew for each warp in turn.
DEVICE int apart(int fresh) { return (fresh + LINE - 1) / LINE * LINE; }

// The same of a stream whose window before, without offset removed, is in `history` at the first of these signals: `input` holds the
// newest `fresh` samples of each alone, `apart`. No other block touches these signals of the history, so that it can be brought up to
// date here.
// Kept are samples, not outputs of the first convolution: no two windows share those, as each loses its own first sample before the
// products, without which float32 would lose digits to the electrode offset.
template <int MOST>
DEVICE void load_newest(float* shared, const float* input, float* history, int fresh, int count) {
  constexpr int LOADS = (MOST * N_TIMES + THREADS - 1) / THREADS, AT_ONCE = LOADS < 8 ? LOADS : 8;
  const int n = count * N_TIMES, kept = N_TIMES - fresh;
  for (int first = thread(); first < n; first += AT_ONCE * THREADS) {
    float v[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int at = first + i * THREADS, signal = at / N_TIMES, t = at % N_TIMES;
      if (at < n) v[i] = load_input(t < kept ? history + at + fresh : input + signal * apart(fresh) + t - kept);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (first + i * THREADS < n) shared[first + i * THREADS] = v[i];
  }
  copies_arrived();
  __syncthreads();
  for (int i = thread(); i < n; i += THREADS) history[i] = shared[i];
}
#endif

// Subtract the first sample of a signal from all: the normalisation removes any offset, but float32 would lose digits to it.
// Ends with a barrier.
DEVICE void remove_offset(float* signal) {
  const float offset = signal[0];
  __syncthreads();
  for (int t = thread(); t < N_TIMES; t += THREADS) signal[t] -= offset;
  __syncthreads();
}

// ---- calls ----

// Words in device memory that are zero before the first launch.
struct Counters {
  unsigned launches;             // calls that ended
  unsigned finished;             // windows of this call
  unsigned long long asked;      // what the host asks a resident kernel, for the blocks that do not look at host memory themselves
  unsigned arrived[MAX_BATCH];   // blocks or tokens of each window
};

// Words in host memory.
struct Report {
  unsigned launches;  // calls that ended, written last
  unsigned failed;    // whether a wait inside the kernel ran out of time
};

// How the host and a launch speak. A launch answers one call, or, if `request` is there, all calls until the host ends it or is
// silent for IDLE_NS: a host that was killed or stopped leaves no kernel behind.
struct Calls {
  const unsigned long long* request;  // host memory: number of the newest call, above it LEAVE if the kernel is to end
  unsigned long long* marked;         // host memory: outputs with the call's number beside them; or null
  Counters* counters;
  Report* report;
  unsigned last;                      // the call before the first of a resident launch
  unsigned residency;                 // number of this resident launch
  unsigned batch;
#if ROLLS
  unsigned fresh;                     // newest samples of each channel, which are in the input, `apart`
  float* history;                     // (N_CHANS, N_TIMES), the window before
#endif
};

constexpr long long IDLE_NS = 1000000ll * IDLE_MS, BUSY_NS = 100000;

constexpr unsigned long long LEAVE = 1ull << 32;

// Wait for the call after `number`, and take its number; false: end. One block looks at host memory and tells the others, with the
// residency beside the number: what an earlier one was asked still stands there.
DEVICE bool next_call(const Calls& calls, unsigned& number, unsigned* word) {
  if (!calls.request) {
    number = load_volatile(&calls.counters->launches) + 1;
    return true;
  }
  __syncthreads();
  if (thread() == 0) {
    const unsigned long long residency = (unsigned long long)calls.residency << 33;
    unsigned long long asked = number;
    if (blockIdx.x == 0) {
      const long long start = nanoseconds();
      while (asked == number) {
        const long long waited = nanoseconds() - start;
        asked = load_acquire_system(calls.request);
        if (waited > IDLE_NS) asked |= LEAVE;
        if (waited > BUSY_NS) rest();
      }
      if (CLUSTER == 1) store_release(&calls.counters->asked, residency | asked);
    } else if (CLUSTER == 1) {
      for (bool told = false; !told;) {
        asked = load_acquire(&calls.counters->asked) ^ residency;
        told = asked >> 33 == 0 && asked != number;
        if (!told) pause();
      }
    }
    word[0] = (unsigned)asked, word[1] = (asked & LEAVE) != 0;
  }
  __syncthreads();
  cluster_sync();
  const unsigned next = CLUSTER > 1 ? load_remote(word, 0) : word[0];
  const bool end = CLUSTER > 1 ? load_remote(word + 1, 0) : word[1];
  cluster_sync();  // no block writes its words, or ends, before the others have read them
  number = next;
  return !end;
}

// Signals `first` to `first + count`, at most MOST, of all windows to shared memory.
template <int MOST>
DEVICE void take_signals(float* shared, const float* input, const Calls& calls, int first, int count) {
#if ROLLS
  load_newest<MOST>(shared, input + first * apart(calls.fresh), calls.history + first * N_TIMES, calls.fresh, count);
#else
  load_signals<MOST>(shared, input + first * N_TIMES, count);
#endif
}

// ---- numbers that blocks hand to each other ----
typedef unsigned long long Marked;  // a float, and a mark above it

// N marked numbers at `from + at(i)`, asked for before they are needed.
template <int N>
struct Pending {
  Marked v[N];

  template <class At>
  DEVICE_MEMBER void ask(const Marked* from, At at) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = load_marked(from + at(i));
  }

  // The numbers, once all have been marked with `mark`, or `go_on` says that they never will.
  template <class At, class GoOn>
  DEVICE_MEMBER void receive(float (&to)[N], const Marked* from, At at, unsigned mark, GoOn go_on) {
    for (;;) {
      bool all = true;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        to[i] = __uint_as_float((unsigned)v[i]);
        all &= (unsigned)(v[i] >> 32) == mark;
      }
      if (all || !go_on()) return;
      ask(from, at);
    }
  }
};

// Whether this block is the last of `n` that arrive here for `window`; then it sees what the others wrote before.
DEVICE bool last_to_arrive(unsigned* arrived, unsigned n, unsigned* ticket) {
  __syncthreads();
  if (thread() == 0) {
    __threadfence();
    *ticket = atomicAdd(arrived, 1u);
    if (*ticket == n - 1) *arrived = 0;
    __threadfence();
  }
  __syncthreads();
  return *ticket == n - 1;
}

// Output `at` of all windows for the host.
DEVICE void put_output(const Calls& calls, float* output, int at, float v, unsigned number) {
  if (calls.marked) store_marked_system(calls.marked + at, v, number);
  else output[at] = v;
}

// One block has put the outputs of a window; that of the last window ends the call. Where outputs carry no mark, the host is told.
DEVICE void finish_window(const Calls& calls, unsigned number) {
  __syncthreads();
  if (thread() == 0) {
    if (!calls.marked) __threadfence_system();
    if (calls.batch == 1 || atomicAdd(&calls.counters->finished, 1u) == calls.batch - 1) {
      calls.counters->finished = 0;
      calls.counters->launches = number;
      if (!calls.marked) {
        __threadfence_system();
        store_release_system(&calls.report->launches, number);
      }
    }
  }
}
