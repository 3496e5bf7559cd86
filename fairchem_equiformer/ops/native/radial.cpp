// The radial function except its later matrix products; ops/radial.py says what. Of the 600
// Gaussians of a distance, the 37 or so that are not negligible are added up.

#include <cstring>

#include "matrix_products.h"
#include "norm.h"

namespace {

constexpr int MAX_WINDOW = 128;
constexpr int BLOCK = 64;  // edges whose gradients are summed together

}  // namespace

extern "C" {

struct Gaussians {
  const float* centers;  // [count], at equal spacing
  int64_t count, window;       // at most `window` of them count at one distance
  float spacing, coefficient;  // of (d - center)^2 in the exponent
  float reach;                 // from its center, beyond which a Gaussian is negligible
};

// Terms looked up by an edge's source and target elements.
struct Tables {
  const float* bias;       // [width]
  const float* rows[2];    // [elements, width]
  const int64_t* index[2];  // [edges]
  int64_t count;           // 2 or, where there are none, 0
};

}

namespace {

// Consecutive Gaussians.
struct Window {
  int64_t first, count;
  float values[MAX_WINDOW];
};

// By its bits, since the compiler takes every number to be finite.
INLINE bool is_nan(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return (bits & 0x7fffffff) > 0x7f800000;
}

INLINE void evaluate(const Gaussians& basis, float distance, Window& found) {
  if (is_nan(distance)) {  // so is every Gaussian, and the first one shows it
    found.first = 0;
    found.count = 1;
    found.values[0] = distance;
    return;
  }
  float start = (distance - basis.reach - basis.centers[0]) / basis.spacing;
  start = start > 0 ? start : 0;
  const int64_t last = basis.count - 1;
  found.first = start < last ? static_cast<int64_t>(start) : last;
  found.count = basis.count - found.first < basis.window ? basis.count - found.first : basis.window;
  for (int64_t k = 0; k < found.count; k += LANES) {
    Vec offset = {}, value;
    for (int i = 0; i < LANES && k + i < found.count; i++)
      offset[i] = distance - basis.centers[found.first + k + i];
    const Vec exponent = offset * offset * (basis.coefficient * LOG2_E);
    power_of_two<1>(&exponent, &value);
    store(value, found.values + k);
  }
}

// Adds to `out`, which has the terms that come of no Gaussian.
template <int V>
INLINE void sum_rows(const Window& window, const float* matrix, int64_t width, float* out) {
  Vec sum[V];
  load_all<V>(out, sum);
  for (int64_t k = 0; k < window.count; k++)
    for (int v = 0; v < V; v++) {
      Vec row;
      load(matrix + (window.first + k) * width + v * LANES, row);
      sum[v] += window.values[k] * row;
    }
  store_all<V>(sum, out);
}

template <int V>
INLINE void add_to_rows(const Window& window, const float* grad, int64_t width, float* matrix_grad) {
  Vec flow[V];
  load_all<V>(grad, flow);
  for (int64_t k = 0; k < window.count; k++)
    for (int v = 0; v < V; v++) {
      float* at = matrix_grad + (window.first + k) * width + v * LANES;
      Vec sum;
      load(at, sum);
      store(sum + window.values[k] * flow[v], at);
    }
}

static void products(const Gaussians& basis, const float* distance, const float* matrix,
                     int64_t width, const Tables& tables, float* out, int64_t first,
                     int64_t last) {
  for (int64_t e = first; e < last; e++) {
    Window window;
    evaluate(basis, distance[e], window);
    for (int64_t c = 0; c < width; c++) {
      float sum = tables.bias[c];
      for (int i = 0; i < tables.count; i++) sum += tables.rows[i][tables.index[i][e] * width + c];
      out[e * width + c] = sum;
    }
    for_vectors<8>(0, width, [&](auto vectors, int64_t c) INLINED {
      sum_rows<vectors>(window, matrix + c, width, out + e * width + c);
    });
  }
}

// Columns from `first` to `last`, in vectors, of the matrix.
static void products_backward(const Gaussians& basis, const float* distance,
                              const float* grad, int64_t width, float* matrix_grad,
                              int64_t edges, int64_t first, int64_t last) {
  for (int64_t e = 0; e < edges; e++) {
    Window window;
    evaluate(basis, distance[e], window);
    do {
      for_vectors<4>(first * LANES, last * LANES, [&](auto vectors, int64_t c) INLINED {
        add_to_rows<vectors>(window, grad + e * width + c, width, matrix_grad + c);
      });
    } while (is_nan(distance[e]) && ++window.first < basis.count);
  }
}

template <int V>
INLINE void norm_silu(const Norm& norm, const float* x, float* out, int64_t first, int64_t last) {
  for (int64_t i = first * V * LANES; i < last * V * LANES; i += V * LANES) {
    Vec u[V], s[V];
    load_all<V>(x + i, u);
    normalize<V>(u, norm.epsilon);
    weight_and_bias<V>(norm, u, u);
    sigmoid<V>(u, s);
    for (int v = 0; v < V; v++) u[v] *= s[v];
    store_all<V>(u, out + i);
  }
}

template <int V>
INLINE void norm_silu_backward(const Norm& norm, const float* x, const float* grad, float* x_grad,
                               float* sums, int64_t first, int64_t last) {
  for (int64_t i = first * V * LANES; i < last * V * LANES; i += V * LANES) {
    Vec normed[V], u[V], s[V], flow[V];
    load_all<V>(x + i, normed);
    load_all<V>(grad + i, flow);
    const float scale = normalize<V>(normed, norm.epsilon);
    weight_and_bias<V>(norm, normed, u);
    sigmoid<V>(u, s);
    for (int v = 0; v < V; v++) flow[v] *= s[v] * (1.0f + u[v] * (1.0f - s[v]));
    norm_backward<V>(norm, normed, scale, flow, sums);
    store_all<V>(flow, x_grad + i);
  }
}

static void some_norm_silu(const Norm& norm, int64_t channels, const float* x, float* out,
                           int64_t first, int64_t last) {
  for_width<16, 32, 64, 128>(channels, [&](auto vectors) INLINED {
    norm_silu<vectors>(norm, x, out, first, last);
  });
}

static void some_norm_silu_backward(const Norm& norm, int64_t channels, const float* x,
                                    const float* grad, float* x_grad, float* sums,
                                    int64_t first, int64_t last) {
  for_width<16, 32, 64, 128>(channels, [&](auto vectors) INLINED {
    norm_silu_backward<vectors>(norm, x, grad, x_grad, sums, first, last);
  });
}

}  // namespace

HIDDEN void norm_silu_rows(const Norm& norm, int64_t channels, const float* x, float* out,
                           int64_t first, int64_t last) {
  some_norm_silu(norm, channels, x, out, first, last);
}

extern "C" {

int64_t sizeof_Gaussians() { return sizeof(Gaussians); }

int64_t sizeof_Tables() { return sizeof(Tables); }

// Null where such sizes fit, or else what does not.
const char* gaussians_misfit(const Gaussians* basis, int64_t width) {
  if (basis->window > MAX_WINDOW) return "more than 128 Gaussians overlap";
  return misfit_of_width(width);
}

// distance [edges], matrix [count, width] and tables to out [edges, width].
void gaussians_times(const Gaussians* basis, const float* distance, const float* matrix,
                     int64_t width, const Tables* tables, float* out, int64_t edges, int threads) {
  share(edges, threads, [=, basis = *basis, tables = *tables](int64_t first, int64_t last) {
    products(basis, distance, matrix, width, tables, out, first, last);
  }, Items::edges);
}

// Adds to matrix_grad. Threads share its columns, so that their number changes no bit.
void gaussians_times_backward(const Gaussians* basis, const float* distance, const float* grad,
                              int64_t width, float* matrix_grad, int64_t edges, int threads) {
  share(width / LANES, threads, [=, basis = *basis](int64_t first, int64_t last) {
    products_backward(basis, distance, grad, width, matrix_grad, edges, first, last);
  }, Items::columns);
}

int64_t sizeof_Norm() { return sizeof(Norm); }

// Null where such sizes fit, or else what does not.
const char* norm_misfit(int64_t channels) {
  return is_width<16, 32, 64, 128>(channels) ? nullptr : "their number is not 16, 32, 64 or 128";
}

// SiLU of the layer norm of x [items, channels].
void layer_norm_silu(const Norm* norm, int64_t channels, const float* x, float* out, int64_t items,
                     int threads) {
  share(items, threads, [=, norm = *norm](int64_t first, int64_t last) {
    some_norm_silu(norm, channels, x, out, first, last);
  }, Items::edges);
}

// Edges that one row of sums below belongs to.
int64_t norm_block() { return BLOCK; }

// Writes x_grad; adds the gradients of weight and bias to sums [blocks, 2, channels], those of each
// block of items to its own, so that the number of threads changes no bit.
void layer_norm_silu_backward(const Norm* norm, int64_t channels, const float* x, const float* grad,
                              float* x_grad, float* sums, int64_t items, int threads) {
  share((items + BLOCK - 1) / BLOCK, threads, [=, norm = *norm](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++)
      some_norm_silu_backward(norm, channels, x, grad, x_grad, sums + b * 2 * channels, b * BLOCK,
                              b * BLOCK + BLOCK < items ? b * BLOCK + BLOCK : items);
  });
}
}
