// Values of all edges of an atom, weighted by attention, turned back and summed, in one pass:
// y_i = sum over e of D_e^T (alpha_e v_e). ops/aggregate.py says what.

#include "rows.h"
#include "simd.h"

namespace {

// Adds what R rows of one degree, starting with the i-th, contribute to the sum of V vectors.
template <int R, int V>
INLINE void turn_back(const Rows& rows, int64_t i, const float* rotation, const float* values,
                      int64_t channels, const float* alpha, Vec* sum) {
  const int64_t degree = rows.degree[i], first = rows.first(degree);
  Vec weighted[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      load(values + rows.row[i + r] * channels + v * LANES, weighted[r][v]);
      weighted[r][v] *= alpha[v];
    }
  for (int64_t k = 0; k < 2 * degree + 1; k++)
    for (int v = 0; v < V; v++) {
      Vec total = sum[(first + k) * V + v];
      for (int r = 0; r < R; r++) total += rotation[rows.entry[i + r] + k] * weighted[r][v];
      sum[(first + k) * V + v] = total;
    }
}

template <int V>
INLINE void aggregate(const Rows& rows, const float* rotations, const float* values,
                      const float* alpha, int64_t heads, int64_t value_channels, int64_t channel,
                      const float* rescale, float* out, int64_t first, int64_t last) {
  const int64_t channels = heads * value_channels;
  Vec sum[MAX_COEFFICIENTS * V];
  for (int i = 0; i < rows.coefficients * V; i++) sum[i] = Vec{};
  for (int64_t e = first; e < last; e++) {
    float weight[V];
    for (int v = 0; v < V; v++) weight[v] = alpha[e * heads + (channel + v * LANES) / value_channels];
    const float* rotation = rotations + e * rows.entries;
    const float* from = values + e * rows.rows * channels + channel;
    for_rows(rows, [&](auto count, int64_t i) INLINED {
      turn_back<count, V>(rows, i, rotation, from, channels, weight, sum);
    });
  }
  for (int k = 0; k < rows.coefficients; k++)
    for (int v = 0; v < V; v++)
      store(rescale[k] * sum[k * V + v], out + k * channels + channel + v * LANES);
}

template <int R, int V>
INLINE void turn(const Rows& rows, int64_t i, const float* rotation, const float* grad,
                 const float* values, int64_t channels, const float* alpha, float* values_grad,
                 Vec* alpha_grad) {
  Vec turned[R][V];
  rotate<R, V>(rows, i, rotation, grad, channels, turned);
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      const int64_t at = rows.row[i + r] * channels + v * LANES;
      Vec value;
      load(values + at, value);
      alpha_grad[v] += value * turned[r][v];
      store(alpha[v] * turned[r][v], values_grad + at);
    }
}

template <int V>
INLINE void aggregate_backward(const Rows& rows, const float* rotation, const float* grad,
                               const float* values, const float* alpha, int64_t heads,
                               int64_t value_channels, int64_t channel, float* values_grad,
                               float* alpha_grad) {
  const int64_t channels = heads * value_channels;
  float weight[V];
  Vec sum[V];
  for (int v = 0; v < V; v++) {
    weight[v] = alpha[(channel + v * LANES) / value_channels];
    sum[v] = Vec{};
  }
  for_rows(rows, [&](auto count, int64_t i) INLINED {
    turn<count, V>(rows, i, rotation, grad + channel, values + channel, channels, weight,
                   values_grad + channel, sum);
  });
  for (int v = 0; v < V; v++) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += sum[v][lane];
    alpha_grad[(channel + v * LANES) / value_channels] += total;
  }
}

static void aggregate_nodes(const Rows& rows, const float* rotations, const float* values,
                            const float* alpha, int64_t heads, int64_t value_channels,
                            const float* rescale, const int64_t* edges, float* out,
                            int64_t first, int64_t last) {
  const int64_t channels = heads * value_channels;
  for (int64_t n = first; n < last; n++) {
    float* to = out + n * rows.coefficients * channels;
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      aggregate<vectors>(rows, rotations, values, alpha, heads, value_channels, c, rescale, to,
                         edges[n], edges[n + 1]);
    });
  }
}

static void aggregate_edges_backward(const Rows& rows, const float* rotations,
                                     const float* grad, const int64_t* target,
                                     const float* values, const float* alpha, int64_t heads,
                                     int64_t value_channels, float* values_grad,
                                     float* alpha_grad, int64_t first, int64_t last) {
  const int64_t channels = heads * value_channels;
  for (int64_t e = first; e < last; e++) {
    const float* rotation = rotations + e * rows.entries;
    const float* from = grad + target[e] * rows.coefficients * channels;
    const int64_t at = e * rows.rows * channels;
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      aggregate_backward<vectors>(rows, rotation, from, values + at, alpha + e * heads, heads,
                                  value_channels, c, values_grad + at, alpha_grad + e * heads);
    });
  }
}

}  // namespace

extern "C" {

// Null where such sizes fit, or else what does not.
const char* aggregate_misfit(const Rows* rows, int64_t value_channels) {
  return misfit_of_rows(*rows, value_channels);
}

// rotations [., entries], values [., rows, heads value_channels] and alpha [., heads] of edges;
// node n has the edges from edges[n] to edges[n + 1]. To out [nodes, coefficients, channels].
void edge_aggregate(const Rows* rows, const float* rotations, const float* values,
                    const float* alpha, int64_t heads, int64_t value_channels, const float* rescale,
                    const int64_t* edges, float* out, int64_t nodes, int threads) {
  share(nodes, threads, [=, rows = *rows](int64_t first, int64_t last) {
    aggregate_nodes(rows, rotations, values, alpha, heads, value_channels, rescale, edges, out,
                    first, last);
  }, Items::atoms);
}

// grad [nodes, coefficients, channels], rescaled; target of each edge. Adds to alpha_grad.
void edge_aggregate_backward(const Rows* rows, const float* rotations, const float* grad,
                             const int64_t* target, const float* values, const float* alpha,
                             int64_t heads, int64_t value_channels, float* values_grad,
                             float* alpha_grad, int64_t edges, int threads) {
  share(edges, threads, [=, rows = *rows](int64_t first, int64_t last) {
    aggregate_edges_backward(rows, rotations, grad, target, values, alpha, heads, value_channels,
                             values_grad, alpha_grad, first, last);
  }, Items::edges);
}
}
