// Features of both ends of an edge, turned into its frame and scaled by its radial weights, in one
// pass: w * D (x_source, x_target). ops/message.py says what.

#include "rows.h"
#include "simd.h"

namespace {

// `width` is 2 C: the channels of the two ends stand beside each other.
template <int R, int V>
INLINE void rotate_and_scale(const Rows& rows, int64_t i, const float* rotation, const float* x,
                             int64_t channels, const float* radial, float* out) {
  const int64_t width = 2 * channels;
  Vec turned[R][V];
  rotate<R, V>(rows, i, rotation, x, channels, turned);
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      Vec weight;
      load(radial + rows.weight[i + r] * width + v * LANES, weight);
      store(turned[r][v] * weight, out + rows.row[i + r] * width + v * LANES);
    }
}

template <int R, int V>
INLINE void differentiate(const Rows& rows, int64_t i, const float* rotation, const float* x,
                          int64_t channels, const float* radial, const float* grad,
                          float* radial_grad, Vec* x_grad) {
  const int64_t width = 2 * channels, degree = rows.degree[i], first = rows.first(degree);
  Vec turned[R][V];
  rotate<R, V>(rows, i, rotation, x, channels, turned);
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      Vec flow, weight, total;
      const int64_t at = rows.weight[i + r] * width + v * LANES;
      load(grad + rows.row[i + r] * width + v * LANES, flow);
      load(radial + at, weight);
      load(radial_grad + at, total);
      store(total + flow * turned[r][v], radial_grad + at);
      turned[r][v] = flow * weight;
    }
  for (int64_t k = 0; k < 2 * degree + 1; k++)
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++)
        x_grad[(first + k) * V + v] += rotation[rows.entry[i + r] + k] * turned[r][v];
}

template <int V>
INLINE void message(const Rows& rows, const float* rotation, const float* x, int64_t channels,
                    const float* radial, float* out) {
  for_rows(rows, [&](auto count, int64_t i) INLINED {
    rotate_and_scale<count, V>(rows, i, rotation, x, channels, radial, out);
  });
}

template <int V>
INLINE void message_backward(const Rows& rows, const float* rotation, const float* x,
                             int64_t channels, const float* radial, const float* grad,
                             float* radial_grad, float* x_grad) {
  Vec sum[MAX_COEFFICIENTS * V];
  for (int i = 0; i < rows.coefficients * V; i++) sum[i] = Vec{};
  for_rows(rows, [&](auto count, int64_t i) INLINED {
    differentiate<count, V>(rows, i, rotation, x, channels, radial, grad, radial_grad, sum);
  });
  for (int k = 0; k < rows.coefficients; k++)
    for (int v = 0; v < V; v++) store(sum[k * V + v], x_grad + k * channels + v * LANES);
}

static void messages(const Rows& rows, const float* rotations, const float* x,
                     const int64_t* const* ends, int64_t channels, const float* radial,
                     float* out, int64_t first, int64_t last) {
  for (int64_t e = first; e < last; e++)
    for (int end = 0; end < 2; end++) {
      const float* rotation = rotations + e * rows.entries;
      const float* features = x + ends[end][e] * rows.coefficients * channels;
      const float* weights = radial + (e * rows.weights * 2 + end) * channels;
      float* to = out + (e * rows.rows * 2 + end) * channels;
      for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
        message<vectors>(rows, rotation, features + c, channels, weights + c, to + c);
      });
    }
}

static void messages_backward(const Rows& rows, const float* rotations, const float* x,
                              const int64_t* const* ends, int64_t channels,
                              const float* radial, const float* grad, float* radial_grad,
                              float* const* x_grads, int64_t first, int64_t last) {
  for (int64_t e = first; e < last; e++)
    for (int end = 0; end < 2; end++) {
      const float* rotation = rotations + e * rows.entries;
      const float* features = x + ends[end][e] * rows.coefficients * channels;
      const int64_t weights = (e * rows.weights * 2 + end) * channels;
      const float* from = grad + (e * rows.rows * 2 + end) * channels;
      for (int64_t w = 0; w < rows.weights; w++)
        for (int64_t c = 0; c < channels; c++) radial_grad[weights + w * 2 * channels + c] = 0;
      float* to = x_grads[end] + e * rows.coefficients * channels;
      for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
        message_backward<vectors>(rows, rotation, features + c, channels, radial + weights + c,
                                  from + c, radial_grad + weights + c, to + c);
      });
    }
}

}  // namespace

extern "C" {

int64_t sizeof_Rows() { return sizeof(Rows); }

// Null where such sizes fit, or else what does not.
const char* message_misfit(const Rows* rows, int64_t channels) {
  return misfit_of_rows(*rows, channels);
}

// rotations [edges, entries], x [nodes, coefficients, channels], source and target [edges],
// radial [edges, weights, 2 channels] to out [edges, rows, 2 channels]; all contiguous.
void edge_message(const Rows* rows, const float* rotations, const float* x, const int64_t* source,
                  const int64_t* target, int64_t channels, const float* radial, float* out,
                  int64_t edges, int threads) {
  const int64_t* ends[] = {source, target};
  share(edges, threads, [=, rows = *rows](int64_t first, int64_t last) {
    messages(rows, rotations, x, ends, channels, radial, out, first, last);
  }, Items::edges);
}

// Writes radial_grad, and what each edge contributes to the gradients of the two features,
// [edges, coefficients, channels].
void edge_message_backward(const Rows* rows, const float* rotations, const float* x,
                           const int64_t* source, const int64_t* target, int64_t channels,
                           const float* radial, const float* grad, float* radial_grad,
                           float* source_grad, float* target_grad, int64_t edges, int threads) {
  const int64_t* ends[] = {source, target};
  float* const x_grads[] = {source_grad, target_grad};
  share(edges, threads, [=, rows = *rows](int64_t first, int64_t last) {
    messages_backward(rows, rotations, x, ends, channels, radial, grad, radial_grad, x_grads, first,
                      last);
  }, Items::edges);
}
}
