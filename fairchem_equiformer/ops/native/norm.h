// Layer norm of V vectors of channels.
#pragma once

#include <cmath>

#include "simd.h"

// Whether the channels are one of these numbers.
template <int... Widths>
constexpr bool is_width(int64_t channels) {
  return ((channels == Widths) || ...);
}

// Calls work(V) for the vectors of such channels.
template <int... Widths, typename Work>
INLINE void for_width(int64_t channels, const Work& work) {
  ((channels == Widths ? work(Vectors<Widths / LANES>{}) : void()), ...);
}

template <int V>
INLINE void load_all(const float* from, Vec (&to)[V]) {
  for (int v = 0; v < V; v++) load(from + v * LANES, to[v]);
}

template <int V>
INLINE void store_all(const Vec (&from)[V], float* to) {
  for (int v = 0; v < V; v++) store(from[v], to + v * LANES);
}

template <int V>
INLINE void add_all(const Vec (&x)[V], float* to) {
  for (int v = 0; v < V; v++) {
    Vec sum;
    load(to + v * LANES, sum);
    store(sum + x[v], to + v * LANES);
  }
}

template <int V>
INLINE float mean(const Vec (&x)[V]) {
  Vec sum = x[0];
  for (int v = 1; v < V; v++) sum += x[v];
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += sum[lane];
  return total / (V * LANES);
}

template <int V>
INLINE float mean_product(const Vec (&x)[V], const Vec (&y)[V]) {
  Vec product[V];
  for (int v = 0; v < V; v++) product[v] = x[v] * y[v];
  return mean<V>(product);
}

struct Norm {
  const float *weight, *bias;  // [channels]; null where there is no norm
  float epsilon;
};

// Subtracts the mean and divides by the deviation; returns one over it.
template <int V>
INLINE float normalize(Vec (&x)[V], float epsilon) {
  const float center = mean<V>(x);
  for (int v = 0; v < V; v++) x[v] -= center;
  const float scale = 1.0f / std::sqrt(mean_product<V>(x, x) + epsilon);
  for (int v = 0; v < V; v++) x[v] *= scale;
  return scale;
}

// weight * x + bias, out of place or in place.
template <int V>
INLINE void weight_and_bias(const Norm& norm, const Vec (&x)[V], Vec (&out)[V]) {
  Vec weight[V], bias[V];
  load_all<V>(norm.weight, weight);
  load_all<V>(norm.bias, bias);
  for (int v = 0; v < V; v++) out[v] = x[v] * weight[v] + bias[v];
}

// From the gradient of weight * normed + bias, in place, to that of what was normalized; adds those
// of weight and bias to `sums` [2, channels].
template <int V>
INLINE void norm_backward(const Norm& norm, const Vec (&normed)[V], float scale, Vec (&grad)[V],
                          float* sums) {
  Vec weight[V], part[V];
  load_all<V>(norm.weight, weight);
  for (int v = 0; v < V; v++) part[v] = grad[v] * normed[v];
  add_all<V>(part, sums);
  add_all<V>(grad, sums + V * LANES);
  for (int v = 0; v < V; v++) grad[v] *= weight[v];
  const float center = mean<V>(grad), along = mean_product<V>(grad, normed);
  for (int v = 0; v < V; v++) grad[v] = scale * (grad[v] - center - along * normed[v]);
}
