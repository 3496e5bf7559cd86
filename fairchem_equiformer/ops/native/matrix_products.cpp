// Matrix products C = [C +] sign A B, several in one parallel region; ops/native/matrix_products.py.
//
// MKL, which makes torch's products, keeps to AVX2 on processors of AMD. A tile of C stays in
// registers while a row of B and a column of A are multiplied into it. B is read in panels of
// columns, which pack_matrix lays out one after the other.

#include "matrix_products.h"

#include "simd.h"

namespace {

constexpr int WIDEST = 4;  // vectors of a panel
constexpr int STEP = 8;
constexpr int64_t LONGEST = 128;  // sum of products without one between
constexpr int TALLEST = 6;  // rows of a tile with AVX-512: 24 of 32 registers hold their sums

template <int V>
INLINE void finish(const MatrixProduct& p, int64_t row, int64_t column, const Vec* sum) {
  for (int v = 0; v < V; v++) {
    const int64_t j = column + v * LANES;
    float* outs[] = {p.c, p.also};
    for (float* out : outs) {
      if (!out) continue;
      Vec start = {};
      if (p.accumulate)
        load(out + row * p.c_row + j, start);
      else if (p.bias)
        load(p.bias + j, start);
      store(start + p.sign * sum[v], out + row * p.c_row + j);
    }
  }
}

// Numbers to be fetched meanwhile: `lines` lines for every STEP columns of A.
struct Ahead {
  const float* next;
  int64_t lines;
};

// sum = A B of a tile, over columns of A from `first` to `last`.
template <int R, int V>
INLINE void multiply(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                     int64_t first, int64_t last, Ahead& ahead, Vec (&sum)[R][V]) {
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = Vec{};
  for (int64_t start = first; start < last; start += STEP) {
    const int64_t stop = start + STEP < last ? start + STEP : last;
    for (int64_t i = 0; i < ahead.lines; i++, ahead.next += LANES)
      __builtin_prefetch(ahead.next, 0, 2);
    for (int64_t k = start; k < stop; k++) {
      Vec line[V];
      for (int v = 0; v < V; v++) load(b + k * b_row + v * LANES, line[v]);
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] += a[r * a_row + k * a_column] * line[v];
    }
  }
}

// Long sums are made of shorter ones: their rounding grows with the length.
template <int R, int V>
INLINE void tile(const MatrixProduct& p, const float* a, int64_t a_row, int64_t a_column,
                 const float* b, int64_t b_row, int64_t row, int64_t column, Ahead ahead) {
  Vec total[R][V], sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) total[r][v] = Vec{};
  for (int64_t k = 0; k < p.k; k += LONGEST) {
    const int64_t stop = k + LONGEST < p.k ? k + LONGEST : p.k;
    multiply<R, V>(a, a_row, a_column, b, b_row, k, stop, ahead, sum);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) total[r][v] += sum[r][v];
  }
  for (int r = 0; r < R; r++) finish<V>(p, row + r, column, total[r]);
}

// The tile of `rows` rows, R or fewer.
template <int R, int V, typename... Arguments>
INLINE void tile_of(int64_t rows, const Arguments&... arguments) {
  if constexpr (R > 1) {
    if (rows < R) return tile_of<R - 1, V>(rows, arguments...);
  }
  tile<R, V>(arguments...);
}

// Columns from `column` of rows from `first` to `last`.
template <int R, int V>
INLINE void panel(const MatrixProduct& p, int64_t column, int64_t first, int64_t last) {
  const bool packed = p.b_row == 0, summed = p.plus || p.norm;
  const float* b = p.b + column * (packed ? p.k : 1);
  const int64_t b_row = packed ? V * LANES : p.b_row;
  const float* a = summed ? p.sum : p.a;
  const int64_t a_row = summed ? p.k : p.a_row, a_column = summed ? 1 : p.a_column;
  const int64_t rows = last - first, tiles = (rows + R - 1) / R;
  // The next panel comes from far: a share of it is fetched during each tile.
  const int64_t lines = packed ? (STEP * V + tiles - 1) / tiles : 0;
  const int64_t share = lines * LANES * ((p.k + STEP - 1) / STEP);
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t row = first + rows * t / tiles, end = first + rows * (t + 1) / tiles;
    tile_of<R, V>(end - row, p, a + row * a_row, a_row, a_column, b, b_row, row, column,
                  Ahead{b + p.k * V * LANES + t * share, lines});
  }
}

// A + plus, for rows from `first` to `last`.
INLINE void add_plus(const MatrixProduct& p, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++)
    for (int64_t k = 0; k < p.k; k++)
      p.sum[i * p.k + k] = p.a[i * p.a_row + k] + p.plus[i * p.a_row + k];
}

// Calls work(V, column) for the panels of n columns: four vectors each, then two, then one.
template <typename Work>
INLINE void for_panels(int64_t n, const Work& work) {
  int64_t column = 0;
  for (; column + WIDEST * LANES <= n; column += WIDEST * LANES) work(Vectors<WIDEST>{}, column);
  for (; column + 2 * LANES <= n; column += 2 * LANES) work(Vectors<2>{}, column);
  for (; column < n; column += LANES) work(Vectors<1>{}, column);
}

// In tiles of R rows.
template <int R>
INLINE void some_rows_by(const MatrixProduct& p, int64_t first, int64_t last) {
  if (first == last) return;
  if (p.plus) add_plus(p, first, last);
  for_panels(p.n, [&](auto vectors, int64_t column) INLINED {
    panel<R, vectors>(p, column, first, last);
  });
}

#if defined(__x86_64__) && !defined(__clang__)
__attribute__((target("arch=x86-64-v4"))) void some_rows_with_avx512(const MatrixProduct& p,
                                                                      int64_t first,
                                                                      int64_t last) {
  some_rows_by<TALLEST>(p, first, last);
}
#endif

// Right anywhere, and fast nowhere: fewer registers hold no tile.
static void some_rows_anywhere(const MatrixProduct& p, int64_t first, int64_t last) {
  some_rows_by<1>(p, first, last);
}

INLINE bool has_avx512() {
#if defined(__x86_64__) && !defined(__clang__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd");
#else
  return false;
#endif
}

}  // namespace

HIDDEN void product_rows(const MatrixProduct& p, int64_t first, int64_t last) {
  if (p.norm) norm_silu_rows(*p.norm, p.k, p.a, p.sum, first, last);
#if defined(__x86_64__) && !defined(__clang__)
  if (has_avx512()) return some_rows_with_avx512(p, first, last);
#endif
  some_rows_anywhere(p, first, last);
}

namespace {

// The panel of V vectors of columns from `column`.
template <int V>
INLINE void pack_panel(const float* b, const float* other, float factor, int64_t b_row,
                       int64_t b_column, int64_t k, int64_t column, float* out) {
  for (int64_t i = 0; i < k; i++)
    for (int64_t j = 0; j < V * LANES; j++) {
      const int64_t at = i * b_row + (column + j) * b_column;
      out[i * V * LANES + j] = other ? b[at] + factor * other[at] : b[at];
    }
}

FOR_EVERY_CPU void pack_some(const float* b, const float* other, float factor, int64_t b_row,
                             int64_t b_column, int64_t k, int64_t n, float* out, int64_t first,
                             int64_t last) {
  for_panels(n, [&](auto vectors, int64_t column) INLINED {
    if (column >= first && column < last)
      pack_panel<vectors>(b, other, factor, b_row, b_column, k, column, out + column * k);
  });
}

}  // namespace

extern "C" {

int64_t sizeof_MatrixProduct() { return sizeof(MatrixProduct); }

// Whether these products are faster than torch's: AVX-512 on a processor for which MKL has none.
int prefers_own_products() {
#if defined(__x86_64__) && !defined(__clang__)
  return has_avx512() && __builtin_cpu_is("amd");
#else
  return 0;
#endif
}

// One after the other, all with the same number of rows where one reads what another wrote: a
// thread computes the same rows of each.
void matrix_products(const MatrixProduct* products, int64_t count, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
    for (int64_t i = 0; i < count; i++) {
      const int64_t rows = products[i].rows;
      product_rows(products[i], rows * thread / all, rows * (thread + 1) / all);
    }
  }
}

// B + factor * other (or B alone where that is null), [k, n] with n in whole vectors, element
// (i, j) at i * b_row + j * b_column, to out [k n], in panels.
void pack_matrix(const float* b, const float* other, float factor, int64_t b_row, int64_t b_column,
                 int64_t k, int64_t n, float* out, int threads) {
  share(n / LANES, threads, [&](int64_t first, int64_t last) {
    pack_some(b, other, factor, b_row, b_column, k, n, out, first * LANES, last * LANES);
  });
}
}
