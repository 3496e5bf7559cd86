// Sums over an atom's edges weighted by each head, and what their gradients are made of: three
// products of numbers for edge and head, features of edges, and features for atom and head.
// ops/head_sums.py says which.

#include "simd.h"

namespace {

// Calls work(N, h) for N heads at a time, which begin at h.
template <typename Work>
INLINE void for_heads(int64_t heads, const Work& work) {
  int64_t h = 0;
  for (; h + 8 <= heads; h += 8) work(std::integral_constant<int, 8>{}, h);
  for (; h + 4 <= heads; h += 4) work(std::integral_constant<int, 4>{}, h);
  for (; h < heads; h++) work(std::integral_constant<int, 1>{}, h);
}

static void sums(const float* alpha, const float* x, const int64_t* target_ptr, int64_t heads,
                 int64_t channels, float* out, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++)
    for_heads(heads, [&](auto group, int64_t h) INLINED {
      for_vectors<2>(0, channels, [&](auto vectors, int64_t c) INLINED {
        constexpr int N = decltype(group)::value, V = decltype(vectors)::value;
        Vec sum[N][V];
        for (int k = 0; k < N; k++)
          for (int v = 0; v < V; v++) sum[k][v] = Vec{};
        for (int64_t e = target_ptr[i]; e < target_ptr[i + 1]; e++)
          for (int v = 0; v < V; v++) {
            Vec in;
            load(x + e * channels + c + v * LANES, in);
            for (int k = 0; k < N; k++) sum[k][v] += alpha[e * heads + h + k] * in;
          }
        for (int k = 0; k < N; k++)
          for (int v = 0; v < V; v++)
            store(sum[k][v], out + (i * heads + h + k) * channels + c + v * LANES);
      });
    });
}

static void dots(const float* x, const float* atoms, const int64_t* target, int64_t heads,
                 int64_t channels, float* out, int64_t first, int64_t last) {
  for (int64_t e = first; e < last; e++)
    for_heads(heads, [&](auto group, int64_t h) INLINED {
      constexpr int N = decltype(group)::value;
      const float* own = atoms + (target[e] * heads + h) * channels;
      Vec sum[N];
      for (int k = 0; k < N; k++) sum[k] = Vec{};
      for (int64_t c = 0; c < channels; c += LANES) {
        Vec in, other;
        load(x + e * channels + c, in);
        for (int k = 0; k < N; k++) {
          load(own + k * channels + c, other);
          sum[k] += in * other;
        }
      }
      for (int k = 0; k < N; k++) {
        float total = 0;
        for (int i = 0; i < LANES; i++) total += sum[k][i];
        out[e * heads + h + k] = total;
      }
    });
}

static void spread(const float* alpha, const float* atoms, const int64_t* target,
                   int64_t heads, int64_t channels, float* out, int64_t first, int64_t last) {
  for (int64_t e = first; e < last; e++) {
    const float* own = atoms + target[e] * heads * channels;
    for_vectors<2>(0, channels, [&](auto vectors, int64_t c) INLINED {
      constexpr int V = decltype(vectors)::value;
      Vec sum[V];
      for (int v = 0; v < V; v++) sum[v] = Vec{};
      for (int64_t h = 0; h < heads; h++)
        for (int v = 0; v < V; v++) {
          Vec in;
          load(own + h * channels + c + v * LANES, in);
          sum[v] += alpha[e * heads + h] * in;
        }
      for (int v = 0; v < V; v++) store(sum[v], out + e * channels + c + v * LANES);
    });
  }
}

}  // namespace

extern "C" {

// Null where such sizes fit, or else what does not.
const char* head_sums_misfit(int64_t channels) { return misfit_of_width(channels); }

// alpha [edges, heads] and x [edges, channels] to out [atoms, heads, channels].
void head_sum(const float* alpha, const float* x, const int64_t* target_ptr, int64_t heads,
              int64_t channels, float* out, int64_t atoms, int threads) {
  share(atoms, threads, [=](int64_t first, int64_t last) {
    sums(alpha, x, target_ptr, heads, channels, out, first, last);
  });
}

// x [edges, channels] and atoms [atoms, heads, channels] to out [edges, heads].
void head_dot(const float* x, const float* atoms, const int64_t* target, int64_t heads,
              int64_t channels, float* out, int64_t edges, int threads) {
  share(edges, threads, [=](int64_t first, int64_t last) {
    dots(x, atoms, target, heads, channels, out, first, last);
  });
}

// alpha [edges, heads] and atoms [atoms, heads, channels] to out [edges, channels].
void head_spread(const float* alpha, const float* atoms, const int64_t* target, int64_t heads,
                 int64_t channels, float* out, int64_t edges, int threads) {
  share(edges, threads, [=](int64_t first, int64_t last) {
    spread(alpha, atoms, target, heads, channels, out, first, last);
  });
}
}
