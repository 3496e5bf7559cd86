// Attention logits z = a . SmoothLeakyReLU(LN(s)), and their softmax; ops/attention_softmax.py says
// what. The smooth leaky ReLU is u (0.2 + 0.8 sigmoid(u)).

#include <algorithm>
#include <limits>

#include "norm.h"

extern "C" {

struct Logits {
  Norm norm;
  const float* dot;  // [heads, channels]
  int64_t heads, channels;
};

}

namespace {

template <int V>
INLINE float logit(const Logits& logits, const float* scalars, const float* dot) {
  Vec u[V], s[V], a[V];
  load_all<V>(scalars, u);
  if (logits.norm.weight) {
    normalize<V>(u, logits.norm.epsilon);
    weight_and_bias<V>(logits.norm, u, u);
  }
  sigmoid<V>(u, s);
  load_all<V>(dot, a);
  for (int v = 0; v < V; v++) u[v] *= 0.2f + 0.8f * s[v];
  return mean_product<V>(u, a) * (V * LANES);
}

// `sums` are the gradients of norm weight, norm bias and dot, [3, channels], which are added to.
template <int V>
INLINE void logit_backward(const Logits& logits, const float* scalars, const float* dot, float grad,
                           float* scalars_grad, float* sums) {
  Vec normed[V], u[V], s[V], flow[V];
  float scale = 1;
  load_all<V>(scalars, normed);
  load_all<V>(scalars, u);
  if (logits.norm.weight) {
    scale = normalize<V>(normed, logits.norm.epsilon);
    weight_and_bias<V>(logits.norm, normed, u);
  }
  sigmoid<V>(u, s);
  load_all<V>(dot, flow);
  for (int v = 0; v < V; v++) {
    flow[v] *= grad * (0.2f + 0.8f * s[v] * (1.0f + u[v] * (1.0f - s[v])));
    u[v] *= grad * (0.2f + 0.8f * s[v]);
  }
  add_all<V>(u, sums + 2 * V * LANES);
  if (logits.norm.weight) norm_backward<V>(logits.norm, normed, scale, flow, sums);
  store_all<V>(flow, scalars_grad);
}

template <int V>
INLINE void logits_of(const Logits& logits, const float* scalars, int64_t stride, float* out,
                      int64_t first, int64_t last) {
  for (int64_t e = first; e < last; e++)
    for (int64_t h = 0; h < logits.heads; h++)
      out[e * logits.heads + h] = logit<V>(logits, scalars + e * stride + h * logits.channels,
                                           logits.dot + h * logits.channels);
}

template <int V>
INLINE void logits_backward_of(const Logits& logits, const float* scalars, int64_t stride,
                               const float* grad, float* scalars_grad, int64_t grad_stride,
                               float* sums, int64_t edges, int64_t first, int64_t last) {
  for (int64_t h = first; h < last; h++)
    for (int64_t e = 0; e < edges; e++) {
      const int64_t at = h * logits.channels;
      logit_backward<V>(logits, scalars + e * stride + at, logits.dot + at,
                        grad[e * logits.heads + h],
                        scalars_grad + e * grad_stride + at, sums + 3 * at);
    }
}

static void some_logits(const Logits& logits, const float* scalars, int64_t stride,
                        float* out, int64_t first, int64_t last) {
  for_width<16, 32, 64>(logits.channels, [&](auto vectors) INLINED {
    logits_of<vectors>(logits, scalars, stride, out, first, last);
  });
}

static void some_logits_backward(const Logits& logits, const float* scalars, int64_t stride,
                                 const float* grad, float* scalars_grad,
                                 int64_t grad_stride, float* sums, int64_t edges,
                                 int64_t first, int64_t last) {
  for_width<16, 32, 64>(logits.channels, [&](auto vectors) INLINED {
    logits_backward_of<vectors>(logits, scalars, stride, grad, scalars_grad, grad_stride, sums,
                                edges, first, last);
  });
}

}  // namespace

extern "C" {

int64_t sizeof_Logits() { return sizeof(Logits); }

// Null where such sizes fit, or else what does not.
const char* logits_misfit(int64_t channels) {
  return is_width<16, 32, 64>(channels) ? nullptr : "their number is not 16, 32 or 64";
}

// scalars [edges, heads channels], each edge dense, to out [edges, heads].
void attention_logits(const Logits* logits, const float* scalars, int64_t stride, float* out,
                      int64_t edges, int threads) {
  share(edges, threads, [=, logits = *logits](int64_t first, int64_t last) {
    some_logits(logits, scalars, stride, out, first, last);
  }, Items::edges);
}

// Writes scalars_grad, edges grad_stride apart; adds to sums [heads, 3, channels], the gradients of norm weight,
// norm bias and dot. Threads share the heads, so that their number changes no bit.
void attention_logits_backward(const Logits* logits, const float* scalars, int64_t stride,
                               const float* grad, float* scalars_grad, int64_t grad_stride,
                               float* sums, int64_t edges, int threads) {
  share(logits->heads, threads, [=, logits = *logits](int64_t first, int64_t last) {
    some_logits_backward(logits, scalars, stride, grad, scalars_grad, grad_stride, sums, edges,
                         first, last);
  });
}

// Softmax of logits [., heads] over the edges of each node, from edges[n] to edges[n + 1].
void edge_softmax(const float* logits, int64_t heads, const int64_t* edges, float* out,
                  int64_t nodes, int threads) {
  share(nodes, threads, [=](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++)
      for (int64_t h = 0; h < heads; h++) {
        float peak = std::numeric_limits<float>::lowest(), sum = 0;
        for (int64_t e = edges[n]; e < edges[n + 1]; e++) peak = std::max(peak, logits[e * heads + h]);
        for (int64_t e = edges[n]; e < edges[n + 1]; e++)
          sum += out[e * heads + h] = std::exp(logits[e * heads + h] - peak);
        for (int64_t e = edges[n]; e < edges[n + 1]; e++) out[e * heads + h] /= sum;
      }
  }, Items::atoms);
}

// From the gradient of the softmax alpha to that of its logits.
void edge_softmax_backward(const float* alpha, const float* grad, int64_t heads,
                           const int64_t* edges, float* out, int64_t nodes, int threads) {
  share(nodes, threads, [=](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++)
      for (int64_t h = 0; h < heads; h++) {
        float sum = 0;
        for (int64_t e = edges[n]; e < edges[n + 1]; e++)
          sum += alpha[e * heads + h] * grad[e * heads + h];
        for (int64_t e = edges[n]; e < edges[n + 1]; e++)
          out[e * heads + h] = alpha[e * heads + h] * (grad[e * heads + h] - sum);
      }
  }, Items::atoms);
}
}
