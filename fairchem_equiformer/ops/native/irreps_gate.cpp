// Gate of irreps: SiLU of invariants, sigmoids of further ones times the channels of all else;
// ops/irreps_gate.py. Irreps have components first.

#include "simd.h"

namespace {

constexpr int AT_ONCE = 4;  // vectors of sigmoids

struct IrrepsGate {
  const int64_t *channels, *components;  // of each gated irrep
  int64_t irreps, scalars;
  int64_t in, out;  // numbers of a row: scalars, gates and gated irreps; the same without the gates
  float silu_scale, sigmoid_scale;
};

static void gated(const IrrepsGate& gate, const float* rows, float* out, int64_t first,
                  int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const float* x = rows + i * gate.in;
    float* y = out + i * gate.out;
    for_vectors<AT_ONCE>(0, gate.scalars, [&](auto vectors, int64_t c) INLINED {
      constexpr int V = vectors;
      Vec in[V], factor[V];
      for (int v = 0; v < V; v++) load(x + c + v * LANES, in[v]);
      sigmoid<V>(in, factor);
      for (int v = 0; v < V; v++)
        store(in[v] * factor[v] * gate.silu_scale, y + c + v * LANES);
    });
    const float *gates = x + gate.scalars, *part = x + gate.in - (gate.out - gate.scalars);
    float* written = y + gate.scalars;
    for (int64_t p = 0; p < gate.irreps; p++) {
      const int64_t channels = gate.channels[p], components = gate.components[p];
      for_vectors<AT_ONCE>(0, channels, [&](auto vectors, int64_t c) INLINED {
        constexpr int V = vectors;
        Vec in[V], factor[V];
        for (int v = 0; v < V; v++) load(gates + c + v * LANES, in[v]);
        sigmoid<V>(in, factor);
        for (int v = 0; v < V; v++) factor[v] *= gate.sigmoid_scale;
        for (int64_t k = 0; k < components; k++)
          for (int v = 0; v < V; v++) {
            const int64_t at = k * channels + c + v * LANES;
            load(part + at, in[v]);
            store(in[v] * factor[v], written + at);
          }
      });
      gates += channels;
      part += components * channels;
      written += components * channels;
    }
  }
}

static void gated_backward(const IrrepsGate& gate, const float* rows, const float* grads,
                           float* out, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const float *x = rows + i * gate.in, *grad = grads + i * gate.out;
    float* x_grad = out + i * gate.in;
    for_vectors<AT_ONCE>(0, gate.scalars, [&](auto vectors, int64_t c) INLINED {
      constexpr int V = vectors;
      Vec in[V], factor[V], flow;
      for (int v = 0; v < V; v++) load(x + c + v * LANES, in[v]);
      sigmoid<V>(in, factor);
      for (int v = 0; v < V; v++) {
        load(grad + c + v * LANES, flow);
        const Vec slope = factor[v] * (1.0f + in[v] * (1.0f - factor[v]));
        store(flow * slope * gate.silu_scale, x_grad + c + v * LANES);
      }
    });
    const int64_t start = gate.in - (gate.out - gate.scalars);
    const float *gates = x + gate.scalars, *part = x + start, *flows = grad + gate.scalars;
    float *gates_grad = x_grad + gate.scalars, *part_grad = x_grad + start;
    for (int64_t p = 0; p < gate.irreps; p++) {
      const int64_t channels = gate.channels[p], components = gate.components[p];
      for_vectors<AT_ONCE>(0, channels, [&](auto vectors, int64_t c) INLINED {
        constexpr int V = vectors;
        Vec in[V], factor[V], sum[V], flow;
        for (int v = 0; v < V; v++) load(gates + c + v * LANES, in[v]);
        sigmoid<V>(in, factor);
        for (int v = 0; v < V; v++) sum[v] = Vec{};
        for (int64_t k = 0; k < components; k++)
          for (int v = 0; v < V; v++) {
            const int64_t at = k * channels + c + v * LANES;
            load(part + at, in[v]);
            load(flows + at, flow);
            flow *= gate.sigmoid_scale;
            sum[v] += flow * in[v];
            store(flow * factor[v], part_grad + at);
          }
        for (int v = 0; v < V; v++)
          store(sum[v] * factor[v] * (1.0f - factor[v]), gates_grad + c + v * LANES);
      });
      gates += channels;
      gates_grad += channels;
      part += components * channels;
      part_grad += components * channels;
      flows += components * channels;
    }
  }
}

}  // namespace

extern "C" {

int64_t sizeof_IrrepsGate() { return sizeof(IrrepsGate); }

// Null where such sizes fit, or else what does not.
const char* irreps_gate_misfit(const IrrepsGate* gate) {
  if (const char* misfit = misfit_of_width(gate->scalars)) return misfit;
  for (int64_t p = 0; p < gate->irreps; p++)
    if (const char* misfit = misfit_of_width(gate->channels[p])) return misfit;
  return nullptr;
}

// Rows x [rows, in] to out [rows, out].
void irreps_gate(const IrrepsGate* gate, const float* x, float* out, int64_t rows, int threads) {
  share(rows, threads, [=, gate = *gate](int64_t first, int64_t last) {
    gated(gate, x, out, first, last);
  });
}

// Gradient of x [rows, in], given that of the result [rows, out].
void irreps_gate_backward(const IrrepsGate* gate, const float* x, const float* grad, float* x_grad,
                          int64_t rows, int threads) {
  share(rows, threads, [=, gate = *gate](int64_t first, int64_t last) {
    gated_backward(gate, x, grad, x_grad, first, last);
  });
}
}
