// SiLU on the sphere without the sphere in memory; ops/s2_activation.py and ops/grid_mlp.py say what.
//
// A harmonic is a function of the latitude times a cosine or sine of the longitude, so that the sum
// over the R coefficients of an item factors: once for each latitude into its M orders, then once
// for each point. The points of one latitude are all that is ever held, in the first-level cache.

#include "simd.h"

namespace {

constexpr int MAX_LONGITUDES = 64;
constexpr int MAX_ORDERS = 17;  // 2 mmax + 1
constexpr int MAX_ROWS = 81;    // (lmax + 1)^2
constexpr int BLOCK = 6;        // points whose sums are held in registers at a time
constexpr int AT_ONCE = 8;      // vectors whose sigmoids are computed together

}  // namespace

extern "C" {

// Row r in of the coefficients x is latitude_in[., r] * longitude[., order_in[r]] on the grid.
struct Grid {
  const float* latitude_in;   // [latitudes, rows_in]
  const float* latitude_out;  // [latitudes, rows_out]
  const float* longitude;     // [longitudes, orders]
  const int64_t* order_in;    // [rows_in]
  const int64_t* order_out;   // [rows_out]
  int64_t latitudes, longitudes, orders, rows_in, rows_out;
};

}

namespace {

// orders[m] = sum of latitude[r] x[r] over the rows r of order m. V vectors of channels.
template <int V>
INLINE void to_orders(const float* x, int64_t channels, const float* latitude, const int64_t* order,
                      int64_t rows, int64_t num_orders, Vec* orders) {
  for (int i = 0; i < num_orders * V; i++) orders[i] = Vec{};
  for (int r = 0; r < rows; r++) {
    for (int v = 0; v < V; v++) {
      Vec value;
      load(x + r * channels + v * LANES, value);
      orders[order[r] * V + v] += latitude[r] * value;
    }
  }
}

// rows[r] += latitude[r] orders[order of r].
template <int V>
INLINE void from_orders(const Vec* orders, const float* latitude, const int64_t* order,
                        int64_t num_rows, Vec* rows) {
  for (int r = 0; r < num_rows; r++)
    for (int v = 0; v < V; v++) rows[r * V + v] += latitude[r] * orders[order[r] * V + v];
}

// Values at P points from the orders of their latitude.
template <int P, int V>
INLINE void to_some_points(const Vec* orders, const float* longitude, int64_t num_orders,
                           Vec* points) {
  Vec sum[P][V];
  for (int p = 0; p < P; p++)
    for (int v = 0; v < V; v++) sum[p][v] = Vec{};
  for (int m = 0; m < num_orders; m++)
    for (int p = 0; p < P; p++)
      for (int v = 0; v < V; v++) sum[p][v] += longitude[p * num_orders + m] * orders[m * V + v];
  for (int p = 0; p < P; p++)
    for (int v = 0; v < V; v++) points[p * V + v] = sum[p][v];
}

// Values at all points of a latitude.
template <int V>
INLINE void to_points(const Vec* orders, const Grid& grid, Vec* points) {
  int64_t p = 0;
  for (; p + BLOCK <= grid.longitudes; p += BLOCK)
    to_some_points<BLOCK, V>(orders, grid.longitude + p * grid.orders, grid.orders, points + p * V);
  for (; p < grid.longitudes; p++)
    to_some_points<1, V>(orders, grid.longitude + p * grid.orders, grid.orders, points + p * V);
}

// M orders from all points of one latitude.
template <int M, int V>
INLINE void some_from_points(const Vec* points, const float* longitude, const Grid& grid,
                             Vec* orders) {
  Vec sum[M][V];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) sum[m][v] = Vec{};
  for (int p = 0; p < grid.longitudes; p++)
    for (int m = 0; m < M; m++)
      for (int v = 0; v < V; v++) sum[m][v] += longitude[p * grid.orders + m] * points[p * V + v];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) orders[m * V + v] = sum[m][v];
}

template <int V>
INLINE void from_points(const Vec* points, const Grid& grid, Vec* orders) {
  int64_t m = 0;
  for (; m + 5 <= grid.orders; m += 5)
    some_from_points<5, V>(points, grid.longitude + m, grid, orders + m * V);
  for (; m < grid.orders; m++)
    some_from_points<1, V>(points, grid.longitude + m, grid, orders + m * V);
}

template <int N>
INLINE void silu(Vec* x) {
  Vec s[N];
  sigmoid<N>(x, s);
  for (int i = 0; i < N; i++) x[i] *= s[i];
}

// SiLU of `count` vectors, in place.
INLINE void silu(Vec* x, int64_t count) {
  int64_t i = 0;
  for (; i + AT_ONCE <= count; i += AT_ONCE) silu<AT_ONCE>(x + i);
  for (; i < count; i++) silu<1>(x + i);
}

template <int N>
INLINE void silu_backward(const Vec* x, Vec* grad) {
  Vec s[N];
  sigmoid<N>(x, s);
  for (int i = 0; i < N; i++) grad[i] *= s[i] * (1.0f + x[i] * (1.0f - s[i]));
}

// Derivative of SiLU at `count` vectors x, times the gradient, in place.
INLINE void silu_backward(const Vec* x, Vec* grad, int64_t count) {
  int64_t i = 0;
  for (; i + AT_ONCE <= count; i += AT_ONCE) silu_backward<AT_ONCE>(x + i, grad + i);
  for (; i < count; i++) silu_backward<1>(x + i, grad + i);
}

template <int V>
INLINE void activate(const Grid& grid, const float* x, float* y, int64_t channels) {
  Vec rows[MAX_ROWS * V], orders[MAX_ORDERS * V], points[MAX_LONGITUDES * V];
  for (int i = 0; i < grid.rows_out * V; i++) rows[i] = Vec{};
  for (int64_t b = 0; b < grid.latitudes; b++) {
    to_orders<V>(x, channels, grid.latitude_in + b * grid.rows_in, grid.order_in, grid.rows_in,
                 grid.orders, orders);
    to_points<V>(orders, grid, points);
    silu(points, grid.longitudes * V);
    from_points<V>(points, grid, orders);
    from_orders<V>(orders, grid.latitude_out + b * grid.rows_out, grid.order_out, grid.rows_out,
                   rows);
  }
  for (int i = 0; i < grid.rows_out; i++)
    for (int v = 0; v < V; v++) store(rows[i * V + v], y + i * channels + v * LANES);
}

template <int V>
INLINE void activate_backward(const Grid& grid, const float* x, const float* y_grad, float* x_grad,
                              int64_t channels) {
  Vec rows[MAX_ROWS * V], orders[MAX_ORDERS * V], grads[MAX_ORDERS * V];
  Vec points[MAX_LONGITUDES * V], flow[MAX_LONGITUDES * V];
  for (int i = 0; i < grid.rows_in * V; i++) rows[i] = Vec{};
  for (int64_t b = 0; b < grid.latitudes; b++) {
    const float* in = grid.latitude_in + b * grid.rows_in;
    to_orders<V>(x, channels, in, grid.order_in, grid.rows_in, grid.orders, orders);
    to_orders<V>(y_grad, channels, grid.latitude_out + b * grid.rows_out, grid.order_out,
                 grid.rows_out, grid.orders, grads);
    to_points<V>(orders, grid, points);
    to_points<V>(grads, grid, flow);
    silu_backward(points, flow, grid.longitudes * V);
    from_points<V>(flow, grid, orders);
    from_orders<V>(orders, in, grid.order_in, grid.rows_in, rows);
  }
  for (int i = 0; i < grid.rows_in; i++)
    for (int v = 0; v < V; v++) store(rows[i * V + v], x_grad + i * channels + v * LANES);
}

template <int V>
INLINE void load_latitude(const Grid& grid, int64_t latitude, const float* samples,
                          int64_t channels, Vec* points) {
  const float* from = samples + latitude * grid.longitudes * channels;
  for (int64_t p = 0; p < grid.longitudes; p++)
    for (int v = 0; v < V; v++) load(from + p * channels + v * LANES, points[p * V + v]);
}

template <int V>
INLINE void store_latitude(const Grid& grid, int64_t latitude, const Vec* points, float* samples,
                           int64_t channels) {
  float* to = samples + latitude * grid.longitudes * channels;
  for (int64_t p = 0; p < grid.longitudes; p++)
    for (int v = 0; v < V; v++) store(points[p * V + v], to + p * channels + v * LANES);
}

template <int V>
INLINE void sample(const Grid& grid, const float* x, float* samples, int64_t channels) {
  Vec orders[MAX_ORDERS * V], points[MAX_LONGITUDES * V];
  for (int64_t b = 0; b < grid.latitudes; b++) {
    to_orders<V>(x, channels, grid.latitude_in + b * grid.rows_in, grid.order_in, grid.rows_in,
                 grid.orders, orders);
    to_points<V>(orders, grid, points);
    silu(points, grid.longitudes * V);
    store_latitude<V>(grid, b, points, samples, channels);
  }
}

template <int V>
INLINE void sample_backward(const Grid& grid, const float* x, const float* samples_grad,
                            float* x_grad, int64_t channels) {
  Vec rows[MAX_ROWS * V], orders[MAX_ORDERS * V];
  Vec points[MAX_LONGITUDES * V], flow[MAX_LONGITUDES * V];
  for (int i = 0; i < grid.rows_in * V; i++) rows[i] = Vec{};
  for (int64_t b = 0; b < grid.latitudes; b++) {
    const float* in = grid.latitude_in + b * grid.rows_in;
    to_orders<V>(x, channels, in, grid.order_in, grid.rows_in, grid.orders, orders);
    to_points<V>(orders, grid, points);
    load_latitude<V>(grid, b, samples_grad, channels, flow);
    silu_backward(points, flow, grid.longitudes * V);
    from_points<V>(flow, grid, orders);
    from_orders<V>(orders, in, grid.order_in, grid.rows_in, rows);
  }
  for (int i = 0; i < grid.rows_in; i++)
    for (int v = 0; v < V; v++) store(rows[i * V + v], x_grad + i * channels + v * LANES);
}

template <int V>
INLINE void integrate(const Grid& grid, const float* samples, float* y, int64_t channels) {
  Vec rows[MAX_ROWS * V], orders[MAX_ORDERS * V], points[MAX_LONGITUDES * V];
  for (int i = 0; i < grid.rows_out * V; i++) rows[i] = Vec{};
  for (int64_t b = 0; b < grid.latitudes; b++) {
    load_latitude<V>(grid, b, samples, channels, points);
    silu(points, grid.longitudes * V);
    from_points<V>(points, grid, orders);
    from_orders<V>(orders, grid.latitude_out + b * grid.rows_out, grid.order_out, grid.rows_out,
                   rows);
  }
  for (int i = 0; i < grid.rows_out; i++)
    for (int v = 0; v < V; v++) store(rows[i * V + v], y + i * channels + v * LANES);
}

template <int V>
INLINE void integrate_backward(const Grid& grid, const float* samples, const float* y_grad,
                               float* samples_grad, int64_t channels) {
  Vec orders[MAX_ORDERS * V], points[MAX_LONGITUDES * V], flow[MAX_LONGITUDES * V];
  for (int64_t b = 0; b < grid.latitudes; b++) {
    to_orders<V>(y_grad, channels, grid.latitude_out + b * grid.rows_out, grid.order_out,
                 grid.rows_out, grid.orders, orders);
    to_points<V>(orders, grid, flow);
    load_latitude<V>(grid, b, samples, channels, points);
    silu_backward(points, flow, grid.longitudes * V);
    store_latitude<V>(grid, b, flow, samples_grad, channels);
  }
}

// Items from `first` to `last`.
FOR_EVERY_CPU void activate_items(const Grid& grid, const float* x, int64_t x_stride, float* y,
                                  int64_t y_stride, int64_t channels, int64_t first,
                                  int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const float* from = x + i * x_stride;
    float* to = y + i * y_stride;
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      activate<vectors>(grid, from + c, to + c, channels);
    });
  }
}

FOR_EVERY_CPU void activate_items_backward(const Grid& grid, const float* x, int64_t x_stride,
                                           const float* y_grad, int64_t grad_stride, float* x_grad,
                                           int64_t channels, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const float *at = x + i * x_stride, *from = y_grad + i * grad_stride;
    float* to = x_grad + i * grid.rows_in * channels;
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      activate_backward<vectors>(grid, at + c, from + c, to + c, channels);
    });
  }
}

FOR_EVERY_CPU void sample_items(const Grid& grid, const float* x, int64_t x_stride, float* samples,
                                int64_t channels, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const float* from = x + i * x_stride;
    float* to = samples + i * grid.latitudes * grid.longitudes * channels;
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      sample<vectors>(grid, from + c, to + c, channels);
    });
  }
}

FOR_EVERY_CPU void integrate_items(const Grid& grid, const float* samples, float* y,
                                   int64_t channels, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const float* from = samples + i * grid.latitudes * grid.longitudes * channels;
    float* to = y + i * grid.rows_out * channels;
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      integrate<vectors>(grid, from + c, to + c, channels);
    });
  }
}

FOR_EVERY_CPU void sample_items_backward(const Grid& grid, const float* x, int64_t x_stride,
                                         const float* samples_grad, float* x_grad,
                                         int64_t channels, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const float* at = x + i * x_stride;
    const float* from = samples_grad + i * grid.latitudes * grid.longitudes * channels;
    float* to = x_grad + i * grid.rows_in * channels;
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      sample_backward<vectors>(grid, at + c, from + c, to + c, channels);
    });
  }
}

FOR_EVERY_CPU void integrate_items_backward(const Grid& grid, const float* samples,
                                            const float* y_grad, int64_t grad_stride,
                                            float* samples_grad, int64_t channels, int64_t first,
                                            int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const int64_t item = i * grid.latitudes * grid.longitudes * channels;
    const float *at = samples + item, *from = y_grad + i * grad_stride;
    float* to = samples_grad + item;
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      integrate_backward<vectors>(grid, at + c, from + c, to + c, channels);
    });
  }
}

}  // namespace

extern "C" {

int64_t sizeof_Grid() { return sizeof(Grid); }

// Null where the arrays above hold such sizes and vectors are whole, or else what does not fit.
const char* s2_grid_misfit(const Grid* grid, int64_t channels) {
  if (grid->longitudes > MAX_LONGITUDES) return "the grid has more than 64 longitudes";
  if (grid->orders > MAX_ORDERS || grid->rows_in > MAX_ROWS || grid->rows_out > MAX_ROWS)
    return "lmax is above 8";
  return misfit_of_width(channels);
}

// x [items, rows_in, channels] to y [items, rows_out, channels]; each item lies dense.
void s2_activation(const Grid* grid, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                   int64_t items, int64_t channels, int threads) {
  share(items, threads, [&](int64_t first, int64_t last) {
    activate_items(*grid, x, x_stride, y, y_stride, channels, first, last);
  });
}

void s2_activation_backward(const Grid* grid, const float* x, int64_t x_stride, const float* y_grad,
                            int64_t grad_stride, float* x_grad, int64_t items, int64_t channels,
                            int threads) {
  share(items, threads, [&](int64_t first, int64_t last) {
    activate_items_backward(*grid, x, x_stride, y_grad, grad_stride, x_grad, channels, first, last);
  });
}

// SiLU(G x): [items, rows_in, channels] to [items, points, channels].
void silu_samples(const Grid* grid, const float* x, int64_t x_stride, float* samples, int64_t items,
                  int64_t channels, int threads) {
  share(items, threads, [&](int64_t first, int64_t last) {
    sample_items(*grid, x, x_stride, samples, channels, first, last);
  });
}

// G^-1 SiLU(s): [items, points, channels] to [items, rows_out, channels].
void integrate_silu(const Grid* grid, const float* samples, float* y, int64_t items,
                    int64_t channels, int threads) {
  share(items, threads, [&](int64_t first, int64_t last) {
    integrate_items(*grid, samples, y, channels, first, last);
  });
}

// Gradient of silu_samples: samples_grad [items, points, channels] to x_grad, contiguous.
void silu_samples_backward(const Grid* grid, const float* x, int64_t x_stride,
                           const float* samples_grad, float* x_grad, int64_t items,
                           int64_t channels, int threads) {
  share(items, threads, [&](int64_t first, int64_t last) {
    sample_items_backward(*grid, x, x_stride, samples_grad, x_grad, channels, first, last);
  });
}

// Gradient of integrate_silu: y_grad [items, rows_out, channels] to samples_grad, contiguous.
void integrate_silu_backward(const Grid* grid, const float* samples, const float* y_grad,
                             int64_t grad_stride, float* samples_grad, int64_t items,
                             int64_t channels, int threads) {
  share(items, threads, [&](int64_t first, int64_t last) {
    integrate_items_backward(*grid, samples, y_grad, grad_stride, samples_grad, channels, first,
                             last);
  });
}
}
