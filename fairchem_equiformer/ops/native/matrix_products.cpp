// Matrix products C = [C +] sign A B, several in one parallel region; ops/native/matrix_products.py.
//
// MKL, which makes torch's products, keeps to AVX2 on processors of AMD. A tile of C stays in
// registers while a row of B and a column of A are multiplied into it. B is read in panels of
// columns, which pack_matrix lays out one after the other.

#include "matrix_products.h"

#include "simd.h"
#include "tiles.h"

namespace {

constexpr int64_t LONGEST = 128;  // sum of products without one between

// sum = A B of a tile, over columns of A from `first` to `last`.
template <int R, int V>
INLINE void multiply(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                     int64_t first, int64_t last, Ahead& ahead, Vec (&sum)[R][V]) {
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = Vec{};
  for (int64_t start = first; start < last; start += STEP) {
    const int64_t stop = start + STEP < last ? start + STEP : last;
    fetch(ahead);
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

// Columns from `column` of rows from `first` to `last`.
template <int R, int V>
INLINE void panel(const MatrixProduct& p, int64_t column, int64_t first, int64_t last) {
  const bool packed = p.b_row == 0, summed = p.plus || p.norm;
  const float* b = static_cast<const float*>(p.b) + column * (packed ? p.k : 1);
  const int64_t b_row = packed ? V * LANES : p.b_row;
  const float* a = summed ? p.sum : p.a;
  const int64_t a_row = summed ? p.k : p.a_row, a_column = summed ? 1 : p.a_column;
  const float* next = packed ? b + p.k * V * LANES : nullptr;
  for_tiles<R, V>(first, last, next, p.k, [&](auto height, int64_t row, Ahead ahead) INLINED {
    tile<height, V>(p, a + row * a_row, a_row, a_column, b, b_row, row, column, ahead);
  });
}

// A + plus, for rows from `first` to `last`.
INLINE void add_plus(const MatrixProduct& p, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++)
    for (int64_t k = 0; k < p.k; k++)
      p.sum[i * p.k + k] = p.a[i * p.a_row + k] + p.plus[i * p.a_row + k];
}

}  // namespace

HIDDEN void product_rows(const MatrixProduct& p, int64_t first, int64_t last) {
  if (p.norm) norm_silu_rows(*p.norm, p.k, p.a, p.sum, first, last);
  if (p.pairs) return bfloat16_rows(p, first, last);
  if (first == last) return;
  if (p.plus) add_plus(p, first, last);
  for_panels(p.n, [&](auto vectors, int64_t column) INLINED {
    panel<TALLEST, vectors>(p, column, first, last);
  });
}

namespace {

// B, or B + factor * other.
struct Source {
  const float *b, *other;
  float factor;
  int64_t row, column;  // strides

  float operator()(int64_t i, int64_t j) const {
    const int64_t at = i * row + j * column;
    return other ? b[at] + factor * other[at] : b[at];
  }
};

// Rows from `first` to `k` of the panel of V vectors of columns from `column`.
template <int V>
INLINE void pack_panel(const Source& source, int64_t first, int64_t k, int64_t column, float* out) {
  for (int64_t i = first; i < k; i++)
    for (int64_t j = 0; j < V * LANES; j++) out[i * V * LANES + j] = source(i, column + j);
}

// The same of dense columns, by blocks that registers turn round; returns how many rows it did.
template <int V>
INLINE int64_t pack_panel_of_columns(const Source& source, int64_t k, int64_t column, float* out) {
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES)
    for (int64_t j = 0; j < V * LANES; j += LANES) {
      Vec block[LANES];
      for (int lane = 0; lane < LANES; lane++) {
        const int64_t at = i + (column + j + lane) * source.column;
        load(source.b + at, block[lane]);
        if (!source.other) continue;
        Vec other;
        load(source.other + at, other);
        block[lane] += source.factor * other;
      }
      transpose(block);
      for (int lane = 0; lane < LANES; lane++)
        store(block[lane], out + (i + lane) * V * LANES + j);
    }
  return i;
}

static void pack_some(const Source& source, int64_t k, int64_t n, float* out, int64_t first,
                      int64_t last) {
  for_panels(n, [&](auto vectors, int64_t column) INLINED {
    if (column < first || column >= last) return;
    float* panel = out + column * k;
    const int64_t done =
        source.row == 1 ? pack_panel_of_columns<vectors>(source, k, column, panel) : 0;
    pack_panel<vectors>(source, done, k, column, panel);
  });
}

}  // namespace

extern "C" {

int64_t sizeof_MatrixProduct() { return sizeof(MatrixProduct); }

// Whether these products are faster than torch's: AVX-512 on a processor for which MKL has none.
int prefers_own_products() {
#if defined(__AVX512F__)
  return __builtin_cpu_is("amd");
#else
  return 0;
#endif
}

// Whether the processor multiplies numbers in bfloat16, and the library knows how.
int has_bfloat16_products() {
#if defined(__AVX512F__) && !defined(__clang__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return 0;
#endif
}

// One after the other, all with the same number of rows where one reads what another wrote: a
// thread computes the same rows of each. Where `edges` is not 0, that is the number of their rows,
// and these are edges.
void matrix_products(const MatrixProduct* products, int64_t count, int64_t edges, int threads) {
  if (edges)
    return share(edges, threads, [=](int64_t first, int64_t last) {
      for (int64_t i = 0; i < count; i++) product_rows(products[i], first, last);
    }, Items::edges);
  share(0, threads, [=](int64_t, int64_t) {
    const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
    for (int64_t i = 0; i < count; i++) {
      const int64_t rows = products[i].rows;
      product_rows(products[i], rows * thread / all, rows * (thread + 1) / all);
    }
  });
}

// B + factor * other (or B alone where that is null), [k, n] with n in whole vectors, element
// (i, j) at i * b_row + j * b_column, to out [k n], in panels.
void pack_matrix(const float* b, const float* other, float factor, int64_t b_row, int64_t b_column,
                 int64_t k, int64_t n, float* out, int threads) {
  const Source source{b, other, factor, b_row, b_column};
  share(n / LANES, threads, [=](int64_t first, int64_t last) {
    pack_some(source, k, n, out, first * LANES, last * LANES);
  });
}
}
