// SiLU on the sphere without the sphere in memory; ops/s2_activation.py and ops/grid_mlp.py say what.
//
// A harmonic is a function of the latitude times a cosine or sine of the longitude, so that the sum
// over the R coefficients of an item factors: once for each latitude into its M orders, then once
// for each point. Both are sums and differences of halves: what is the same at a latitude and its
// mirror image south of the equator, or at a longitude and the one it is paired with, and what is
// opposite there (so3/grid.py). A block of points is all that is ever held.

#include "matrix_products.h"
#include "norm.h"
#include "simd.h"

namespace {

constexpr int MAX_ORDERS = 17;  // 2 mmax + 1
constexpr int MAX_ROWS = 81;    // (lmax + 1)^2
constexpr int BLOCK = 3;        // pairs of longitudes at a time
constexpr int STORED = 1;       // the same where points go to memory: one by one, and not in bursts
constexpr int AT_ONCE = 12;     // vectors whose sigmoids are computed together

}  // namespace

extern "C" {

// Coefficients as functions of the latitude, sorted by order, and in it those of even l + m first.
struct Latitudes {
  const float* values;    // [northern latitudes, rows]
  const int64_t* row;     // [rows] of these among the rows of an item
  const int64_t* starts;  // [2 orders + 1], where each order begins, and in it its odd l + m
  int64_t rows;
};

// Row r of an item is latitude[., r] * longitude[., order of r] on the grid.
struct Grid {
  Latitudes in, out;
  const float* longitude;  // [pairs + unpaired, orders] at the first of each pair
  // `latitudes` in the north; functions of the first `same` orders are the same at both of a pair,
  // those of others opposite, and zero at longitudes without another
  int64_t latitudes, pairs, unpaired, orders, same;
};

}

namespace {

// Of a latitude and its mirror image south of the equator.
template <int V>
struct Orders {
  Vec side[2][MAX_ORDERS * V];
};

// Sum of latitude[r] x[row r] over the rows r from `first` to `last`. V vectors of channels.
template <int V>
INLINE void sum_rows(const Latitudes& latitudes, const float* latitude, int64_t first, int64_t last,
                     const float* x, int64_t channels, Vec (&sum)[V]) {
  for (int v = 0; v < V; v++) sum[v] = Vec{};
  for (int64_t r = first; r < last; r++)
    for (int v = 0; v < V; v++) {
      Vec value;
      load(x + latitudes.row[r] * channels + v * LANES, value);
      sum[v] += latitude[r] * value;
    }
}

// Orders of the coefficients x at the b-th latitude and its mirror image.
template <int V>
INLINE void to_orders(const Grid& grid, const Latitudes& latitudes, int64_t b, const float* x,
                      int64_t channels, Orders<V>& orders) {
  const float* latitude = latitudes.values + b * latitudes.rows;
  for (int64_t m = 0; m < grid.orders; m++) {
    const int64_t* starts = latitudes.starts + 2 * m;
    Vec even[V], odd[V];
    sum_rows<V>(latitudes, latitude, starts[0], starts[1], x, channels, even);
    sum_rows<V>(latitudes, latitude, starts[1], starts[2], x, channels, odd);
    for (int v = 0; v < V; v++) {
      orders.side[0][m * V + v] = even[v] + odd[v];
      orders.side[1][m * V + v] = even[v] - odd[v];
    }
  }
}

template <int V>
INLINE void clear(const Grid& grid, Orders<V>& orders) {
  for (int side = 0; side < 2; side++)
    for (int i = 0; i < grid.orders * V; i++) orders.side[side][i] = Vec{};
}

// Coefficients, in the order of `latitudes`.
template <int V>
struct Rows {
  Vec sum[MAX_ROWS * V];

  explicit INLINED Rows(const Latitudes& latitudes) {
    for (int i = 0; i < latitudes.rows * V; i++) sum[i] = Vec{};
  }

  INLINED void store_to(float* to, const Latitudes& latitudes, int64_t channels) const {
    for (int64_t r = 0; r < latitudes.rows; r++)
      for (int v = 0; v < V; v++)
        store(sum[r * V + v], to + latitudes.row[r] * channels + v * LANES);
  }
};

// Adds what the b-th latitude and its mirror image contribute, and clears the orders for the next.
template <int V>
INLINE void from_orders(const Grid& grid, const Latitudes& latitudes, int64_t b, Orders<V>& orders,
                        Rows<V>& rows) {
  const float* latitude = latitudes.values + b * latitudes.rows;
  for (int64_t m = 0; m < grid.orders; m++) {
    const int64_t* starts = latitudes.starts + 2 * m;
    Vec even[V], odd[V];
    for (int v = 0; v < V; v++) {
      Vec &north = orders.side[0][m * V + v], &south = orders.side[1][m * V + v];
      even[v] = north + south;
      odd[v] = north - south;
      north = south = Vec{};
    }
    for (int64_t r = starts[0]; r < starts[1]; r++)
      for (int v = 0; v < V; v++) rows.sum[r * V + v] += latitude[r] * even[v];
    for (int64_t r = starts[1]; r < starts[2]; r++)
      for (int v = 0; v < V; v++) rows.sum[r * V + v] += latitude[r] * odd[v];
  }
}

// Adds the orders from `first` to `last` at P longitudes.
template <int P, int V>
INLINE void add_orders(const Grid& grid, const float* longitude, int64_t first, int64_t last,
                       const Vec* orders, Vec (&points)[P * V]) {
  for (int64_t m = first; m < last; m++)
    for (int p = 0; p < P; p++)
      for (int v = 0; v < V; v++)
        points[p * V + v] += longitude[p * grid.orders + m] * orders[m * V + v];
}

// Adds what P longitudes contribute to the orders from `first` to `last`.
template <int P, int V>
INLINE void add_points(const Grid& grid, const float* longitude, int64_t first, int64_t last,
                       const Vec (&points)[P * V], Vec* orders) {
  for (int64_t m = first; m < last; m++)
    for (int v = 0; v < V; v++) {
      Vec sum = orders[m * V + v];
      for (int p = 0; p < P; p++) sum += longitude[p * grid.orders + m] * points[p * V + v];
      orders[m * V + v] = sum;
    }
}

// What is the same at both of each pair. The first order's function is 1.
template <int P, int V>
INLINE void same_orders(const Grid& grid, const float* longitude, const Vec* orders,
                            Vec (&points)[P * V]) {
  for (int i = 0; i < P * V; i++) points[i] = orders[i % V];
  add_orders<P, V>(grid, longitude, 1, grid.same, orders, points);
}

template <int P, int V>
INLINE void add_same_points(const Grid& grid, const float* longitude, const Vec (&points)[P * V],
                            Vec* orders) {
  for (int i = 0; i < P * V; i++) orders[i % V] += points[i];
  add_points<P, V>(grid, longitude, 1, grid.same, points, orders);
}

// P pairs of longitudes of one latitude, pair after pair, V vectors of channels of each.
template <int P, int V>
struct Pairs {
  static constexpr int SIZE = 2 * P * V;

  // Where the first of a pair has its i-th vector of P V.
  static constexpr int first(int i) { return i / V * 2 * V + i % V; }

  static INLINED void to_points(const Grid& grid, const float* longitude, const Vec* orders,
                                Vec (&points)[SIZE]) {
    Vec same[P * V], opposite[P * V];
    same_orders<P, V>(grid, longitude, orders, same);
    for (int i = 0; i < P * V; i++) opposite[i] = Vec{};
    add_orders<P, V>(grid, longitude, grid.same, grid.orders, orders, opposite);
    for (int i = 0; i < P * V; i++) {
      points[first(i)] = same[i] + opposite[i];
      points[first(i) + V] = same[i] - opposite[i];
    }
  }

  static INLINED void from_points(const Grid& grid, const float* longitude,
                                  const Vec (&points)[SIZE], Vec* orders) {
    Vec same[P * V], opposite[P * V];
    for (int i = 0; i < P * V; i++) {
      same[i] = points[first(i)] + points[first(i) + V];
      opposite[i] = points[first(i)] - points[first(i) + V];
    }
    add_same_points<P, V>(grid, longitude, same, orders);
    add_points<P, V>(grid, longitude, grid.same, grid.orders, opposite, orders);
  }
};

// A longitude without another.
template <int V>
struct Unpaired {
  static constexpr int SIZE = V;

  static INLINED void to_points(const Grid& grid, const float* longitude, const Vec* orders,
                                Vec (&points)[SIZE]) {
    same_orders<1, V>(grid, longitude, orders, points);
  }

  static INLINED void from_points(const Grid& grid, const float* longitude,
                                  const Vec (&points)[SIZE], Vec* orders) {
    add_same_points<1, V>(grid, longitude, points, orders);
  }
};

// Calls work(block, longitude, side) for all points of a latitude and its mirror image, at most P
// pairs at a time.
template <int P, int V, typename Work>
INLINE void for_points(const Grid& grid, const Work& work) {
  for (int side = 0; side < 2; side++) {
    const float* longitude = grid.longitude;
    int64_t p = 0;
    for (; p + P <= grid.pairs; p += P, longitude += P * grid.orders)
      work(Pairs<P, V>{}, longitude, side);
    for (; p < grid.pairs; p++, longitude += grid.orders) work(Pairs<1, V>{}, longitude, side);
    for (p = 0; p < grid.unpaired; p++, longitude += grid.orders)
      work(Unpaired<V>{}, longitude, side);
  }
}

INLINE int64_t num_points(const Grid& grid) {
  return 2 * grid.latitudes * (2 * grid.pairs + grid.unpaired);
}

// Points are kept in the order in which for_points comes to them.
template <int V, int N>
INLINE void load_points(const float* from, int64_t channels, Vec (&points)[N]) {
  for (int i = 0; i < N; i++) load(from + i / V * channels + i % V * LANES, points[i]);
}

template <int V, int N>
INLINE void store_points(const Vec (&points)[N], float* to, int64_t channels) {
  for (int i = 0; i < N; i++) store(points[i], to + i / V * channels + i % V * LANES);
}

template <int N>
INLINE void some_silu(Vec* x) {
  Vec s[N];
  sigmoid<N>(x, s);
  for (int i = 0; i < N; i++) x[i] *= s[i];
}

// SiLU, in place.
template <int N>
INLINE void silu(Vec (&x)[N]) {
  constexpr int REST = N % AT_ONCE;
  for (int i = 0; i < N - REST; i += AT_ONCE) some_silu<AT_ONCE>(x + i);
  if constexpr (REST > 0) some_silu<REST>(x + N - REST);
}

template <int N>
INLINE void some_silu_backward(const Vec* x, Vec* grad) {
  Vec s[N];
  sigmoid<N>(x, s);
  for (int i = 0; i < N; i++) grad[i] *= s[i] * (1.0f + x[i] * (1.0f - s[i]));
}

// Derivative of SiLU at x, times the gradient, in place.
template <int N>
INLINE void silu_backward(const Vec (&x)[N], Vec (&grad)[N]) {
  constexpr int REST = N % AT_ONCE;
  for (int i = 0; i < N - REST; i += AT_ONCE) some_silu_backward<AT_ONCE>(x + i, grad + i);
  if constexpr (REST > 0) some_silu_backward<REST>(x + N - REST, grad + N - REST);
}

template <int V>
INLINE void activate(const Grid& grid, const float* x, float* y, int64_t channels) {
  Rows<V> rows(grid.out);
  Orders<V> in, out;
  clear<V>(grid, out);
  for (int64_t b = 0; b < grid.latitudes; b++) {
    to_orders<V>(grid, grid.in, b, x, channels, in);
    for_points<BLOCK, V>(grid, [&](auto block, const float* longitude, int side) INLINED {
      Vec points[block.SIZE];
      block.to_points(grid, longitude, in.side[side], points);
      silu(points);
      block.from_points(grid, longitude, points, out.side[side]);
    });
    from_orders<V>(grid, grid.out, b, out, rows);
  }
  rows.store_to(y, grid.out, channels);
}

template <int V>
INLINE void activate_backward(const Grid& grid, const float* x, const float* y_grad, float* x_grad,
                              int64_t channels) {
  Rows<V> rows(grid.in);
  Orders<V> in, grads, out;
  clear<V>(grid, out);
  for (int64_t b = 0; b < grid.latitudes; b++) {
    to_orders<V>(grid, grid.in, b, x, channels, in);
    to_orders<V>(grid, grid.out, b, y_grad, channels, grads);
    for_points<BLOCK, V>(grid, [&](auto block, const float* longitude, int side) INLINED {
      Vec points[block.SIZE], flow[block.SIZE];
      block.to_points(grid, longitude, in.side[side], points);
      block.to_points(grid, longitude, grads.side[side], flow);
      silu_backward(points, flow);
      block.from_points(grid, longitude, flow, out.side[side]);
    });
    from_orders<V>(grid, grid.in, b, out, rows);
  }
  rows.store_to(x_grad, grid.in, channels);
}

template <int V>
INLINE void sample(const Grid& grid, const float* x, float* samples, int64_t channels) {
  Orders<V> in;
  for (int64_t b = 0; b < grid.latitudes; b++) {
    to_orders<V>(grid, grid.in, b, x, channels, in);
    for_points<STORED, V>(grid, [&](auto block, const float* longitude, int side) INLINED {
      Vec points[block.SIZE];
      block.to_points(grid, longitude, in.side[side], points);
      silu(points);
      store_points<V>(points, samples, channels);
      samples += block.SIZE / V * channels;
    });
  }
}

template <int V>
INLINE void sample_backward(const Grid& grid, const float* x, const float* samples_grad,
                            float* x_grad, int64_t channels) {
  Rows<V> rows(grid.in);
  Orders<V> in, out;
  clear<V>(grid, out);
  for (int64_t b = 0; b < grid.latitudes; b++) {
    to_orders<V>(grid, grid.in, b, x, channels, in);
    for_points<BLOCK, V>(grid, [&](auto block, const float* longitude, int side) INLINED {
      Vec points[block.SIZE], flow[block.SIZE];
      block.to_points(grid, longitude, in.side[side], points);
      load_points<V>(samples_grad, channels, flow);
      samples_grad += block.SIZE / V * channels;
      silu_backward(points, flow);
      block.from_points(grid, longitude, flow, out.side[side]);
    });
    from_orders<V>(grid, grid.in, b, out, rows);
  }
  rows.store_to(x_grad, grid.in, channels);
}

template <int V>
INLINE void integrate(const Grid& grid, const float* samples, float* y, int64_t channels) {
  Rows<V> rows(grid.out);
  Orders<V> out;
  clear<V>(grid, out);
  for (int64_t b = 0; b < grid.latitudes; b++) {
    for_points<BLOCK, V>(grid, [&](auto block, const float* longitude, int side) INLINED {
      Vec points[block.SIZE];
      load_points<V>(samples, channels, points);
      samples += block.SIZE / V * channels;
      silu(points);
      block.from_points(grid, longitude, points, out.side[side]);
    });
    from_orders<V>(grid, grid.out, b, out, rows);
  }
  rows.store_to(y, grid.out, channels);
}

template <int V>
INLINE void integrate_backward(const Grid& grid, const float* samples, const float* y_grad,
                               float* samples_grad, int64_t channels) {
  Orders<V> grads;
  for (int64_t b = 0; b < grid.latitudes; b++) {
    to_orders<V>(grid, grid.out, b, y_grad, channels, grads);
    for_points<STORED, V>(grid, [&](auto block, const float* longitude, int side) INLINED {
      Vec points[block.SIZE], flow[block.SIZE];
      block.to_points(grid, longitude, grads.side[side], flow);
      load_points<V>(samples, channels, points);
      silu_backward(points, flow);
      store_points<V>(flow, samples_grad, channels);
      samples += block.SIZE / V * channels;
      samples_grad += block.SIZE / V * channels;
    });
  }
}

// Items from `first` to `last`.
static void activate_items(const Grid& grid, const float* x, int64_t x_stride, float* y,
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

static void activate_items_backward(const Grid& grid, const float* x, int64_t x_stride,
                                    const float* y_grad, int64_t grad_stride, float* x_grad,
                                    int64_t x_grad_stride, int64_t channels, int64_t first,
                                    int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const float *at = x + i * x_stride, *from = y_grad + i * grad_stride;
    float* to = x_grad + i * x_grad_stride;
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      activate_backward<vectors>(grid, at + c, from + c, to + c, channels);
    });
  }
}

static void sample_items(const Grid& grid, const float* x, int64_t x_stride, float* samples,
                         int64_t channels, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const float* from = x + i * x_stride;
    float* to = samples + i * num_points(grid) * channels;
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      sample<vectors>(grid, from + c, to + c, channels);
    });
  }
}

static void integrate_items(const Grid& grid, const float* samples, float* y,
                            int64_t channels, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const float* from = samples + i * num_points(grid) * channels;
    float* to = y + i * grid.out.rows * channels;
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      integrate<vectors>(grid, from + c, to + c, channels);
    });
  }
}

static void sample_items_backward(const Grid& grid, const float* x, int64_t x_stride,
                                  const float* samples_grad, float* x_grad,
                                  int64_t channels, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const float* at = x + i * x_stride;
    const float* from = samples_grad + i * num_points(grid) * channels;
    float* to = x_grad + i * grid.in.rows * channels;
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      sample_backward<vectors>(grid, at + c, from + c, to + c, channels);
    });
  }
}

static void integrate_items_backward(const Grid& grid, const float* samples,
                                     const float* y_grad, int64_t grad_stride,
                                     float* samples_grad, int64_t channels, int64_t first,
                                     int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const int64_t item = i * num_points(grid) * channels;
    const float *at = samples + item, *from = y_grad + i * grad_stride;
    float* to = samples_grad + item;
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      integrate_backward<vectors>(grid, at + c, from + c, to + c, channels);
    });
  }
}

static void silu_rows(const float* x, int64_t x_stride, float* y, int64_t y_stride,
                      int64_t channels, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++)
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      Vec u[vectors], s[vectors];
      load_all<vectors>(x + i * x_stride + c, u);
      sigmoid<vectors>(u, s);
      for (int v = 0; v < vectors; v++) u[v] *= s[v];
      store_all<vectors>(u, y + i * y_stride + c);
    });
}

static void silu_rows_backward(const float* x, int64_t x_stride, const float* y_grad,
                               int64_t grad_stride, float* x_grad, int64_t x_grad_stride,
                               int64_t channels, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++)
    for_vectors<4>(0, channels, [&](auto vectors, int64_t c) INLINED {
      Vec u[vectors], s[vectors], flow[vectors];
      load_all<vectors>(x + i * x_stride + c, u);
      load_all<vectors>(y_grad + i * grad_stride + c, flow);
      sigmoid<vectors>(u, s);
      for (int v = 0; v < vectors; v++) flow[v] *= s[v] * (1.0f + u[v] * (1.0f - s[v]));
      store_all<vectors>(flow, x_grad + i * x_grad_stride + c);
    });
}

}  // namespace

extern "C" {

int64_t sizeof_Grid() { return sizeof(Grid); }

// Null where the arrays above hold such sizes and vectors are whole, or else what does not fit.
const char* s2_grid_misfit(const Grid* grid, int64_t channels) {
  if (grid->orders > MAX_ORDERS || grid->in.rows > MAX_ROWS || grid->out.rows > MAX_ROWS)
    return "lmax is above 8";
  return misfit_of_width(channels);
}

// x [items, rows_in, channels] to y [items, rows_out, channels]; each item lies dense.
void s2_activation(const Grid* grid, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                   int64_t items, int64_t channels, int threads) {
  share(items, threads, [=, grid = *grid](int64_t first, int64_t last) {
    activate_items(grid, x, x_stride, y, y_stride, channels, first, last);
  }, Items::edges);
}

void s2_activation_backward(const Grid* grid, const float* x, int64_t x_stride, const float* y_grad,
                            int64_t grad_stride, float* x_grad, int64_t x_grad_stride,
                            int64_t items, int64_t channels, int threads) {
  share(items, threads, [=, grid = *grid](int64_t first, int64_t last) {
    activate_items_backward(grid, x, x_stride, y_grad, grad_stride, x_grad, x_grad_stride, channels,
                            first, last);
  }, Items::edges);
}

// SiLU of x [items, channels], rows x_stride apart, to y, rows y_stride apart.
void silu(const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t items,
          int64_t channels, int threads) {
  share(items, threads, [=](int64_t first, int64_t last) {
    silu_rows(x, x_stride, y, y_stride, channels, first, last);
  }, Items::edges);
}

// Writes x_grad, rows x_grad_stride apart.
void silu_backward(const float* x, int64_t x_stride, const float* y_grad, int64_t grad_stride,
                   float* x_grad, int64_t x_grad_stride, int64_t items, int64_t channels,
                   int threads) {
  share(items, threads, [=](int64_t first, int64_t last) {
    silu_rows_backward(x, x_stride, y_grad, grad_stride, x_grad, x_grad_stride, channels, first,
                       last);
  }, Items::edges);
}

// SiLU(G x): [items, rows_in, channels] to [items, points, channels].
void silu_samples(const Grid* grid, const float* x, int64_t x_stride, float* samples, int64_t items,
                  int64_t channels, int threads) {
  share(items, threads, [=, grid = *grid](int64_t first, int64_t last) {
    sample_items(grid, x, x_stride, samples, channels, first, last);
  }, Items::edges);
}

// G^-1 SiLU(s): [items, points, channels] to [items, rows_out, channels].
void integrate_silu(const Grid* grid, const float* samples, float* y, int64_t items,
                    int64_t channels, int threads) {
  share(items, threads, [=, grid = *grid](int64_t first, int64_t last) {
    integrate_items(grid, samples, y, channels, first, last);
  }, Items::edges);
}

// Gradient of silu_samples: samples_grad [items, points, channels] to x_grad, contiguous.
void silu_samples_backward(const Grid* grid, const float* x, int64_t x_stride,
                           const float* samples_grad, float* x_grad, int64_t items,
                           int64_t channels, int threads) {
  share(items, threads, [=, grid = *grid](int64_t first, int64_t last) {
    sample_items_backward(grid, x, x_stride, samples_grad, x_grad, channels, first, last);
  }, Items::edges);
}

// Gradient of integrate_silu: y_grad [items, rows_out, channels] to samples_grad, contiguous.
void integrate_silu_backward(const Grid* grid, const float* samples, const float* y_grad,
                             int64_t grad_stride, float* samples_grad, int64_t items,
                             int64_t channels, int threads) {
  share(items, threads, [=, grid = *grid](int64_t first, int64_t last) {
    integrate_items_backward(grid, samples, y_grad, grad_stride, samples_grad, channels, first,
                             last);
  }, Items::edges);
}

// G^-1 SiLU(W SiLU(G x)), item by item: of the points, a thread holds those of one.
// W is packed, buffers [threads, 2, points, channels], y contiguous.
void grid_mlp(const Grid* grid, const float* x, int64_t x_stride, const float* weight,
              float* buffers, int64_t points, float* y, int64_t items, int64_t channels,
              int threads) {
  const int64_t size = points * channels;
  share(items, threads, [=, grid = *grid](int64_t first, int64_t last) {
    float* samples = buffers + omp_get_thread_num() * 2 * size;
    float* mixed = samples + size;
    MatrixProduct product = {};
    product.a = samples;
    product.b = weight;
    product.c = mixed;
    product.rows = points;
    product.n = product.k = product.a_row = product.c_row = channels;
    product.a_column = 1;
    product.sign = 1;
    for (int64_t i = first; i < last; i++) {
      sample_items(grid, x + i * x_stride, x_stride, samples, channels, 0, 1);
      product_rows(product, 0, points);
      integrate_items(grid, mixed, y + i * grid.out.rows * channels, channels, 0, 1);
    }
  }, Items::edges);
}
}
