// Adds the shares of a block's threads to the outputs of a whole window.
constexpr int HEAD_AT_ONCE = N_OUTPUTS < 4 ? N_OUTPUTS : 4;

struct HeadSums {
  float part[HEAD_AT_ONCE][WARPS];
};

// Outputs `first` and on, of which every thread has a share; the shares are added in their order.
DEVICE void put_outputs(HeadSums& s, float* output, const float* bias, int first, float (&sum)[HEAD_AT_ONCE]) {
#pragma unroll
  for (int o = 0; o < HEAD_AT_ONCE; ++o) {
    sum[o] = warp_sum(sum[o]);
    if (lane() == 0) s.part[o][warp()] = sum[o];
  }
  __syncthreads();
  if (const int o = thread(); o < HEAD_AT_ONCE && first + o < N_OUTPUTS) {
    float all = bias[first + o];
    for (int i = 0; i < WARPS; ++i) all += s.part[o][i];
    output[first + o] = all;
  }
  __syncthreads();
}
