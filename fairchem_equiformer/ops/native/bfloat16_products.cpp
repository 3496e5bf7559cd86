// Matrix products of numbers rounded to bfloat16, with sums in float; matrix_products.cpp says how.
//
// The instruction takes two columns of A and two rows of B at a time. So numbers lie in pairs:
// those of a row of A next to each other, those of a column of B likewise.

#include "matrix_products.h"

#if defined(__AVX512F__) && !defined(__clang__)

#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's intrinsics have it
#pragma GCC target("avx512bf16")  // also for what the next header defines
#include "tiles.h"

namespace {

INLINE __m512bh as_bfloat16(const void* from) {
  return (__m512bh)_mm512_loadu_si512(from);
}

template <int R, int V>
INLINE void tile(const MatrixProduct& p, const uint16_t* b, int64_t row, int64_t column,
                 Ahead ahead) {
  const uint32_t* a = p.pairs + row * p.pair_row;
  const int64_t pairs = (p.k + 1) / 2;
  __m512 sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = _mm512_setzero_ps();
  for (int64_t start = 0; start < pairs; start += STEP) {
    const int64_t stop = start + STEP < pairs ? start + STEP : pairs;
    fetch(ahead);
    for (int64_t k = start; k < stop; k++) {
      __m512bh line[V];
      for (int v = 0; v < V; v++) line[v] = as_bfloat16(b + (k * V + v) * 2 * LANES);
      for (int r = 0; r < R; r++) {
        const uint32_t pair = a[r * p.pair_row + k * p.pair_column];
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < V; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], both, line[v]);
      }
    }
  }
  for (int r = 0; r < R; r++) {
    Vec total[V];
    for (int v = 0; v < V; v++) total[v] = (Vec)sum[r][v];
    finish<V>(p, row + r, column, total);
  }
}

// The pair of each lane, the first of its two in the lower half.
INLINE __m512i pairs_of(__m512 first, __m512 second) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Lanes from `at` that lie before `end`.
INLINE __mmask16 lanes_before(int64_t at, int64_t end) {
  if (end - at >= LANES) return 0xffff;
  return end > at ? (1u << (end - at)) - 1 : 0;
}

// `count` numbers `apart`, sixteen at a time from each of two starts, as pairs; a missing second
// one is zero. out(i, pairs, mask) takes those of lanes i...
template <typename Out>
INLINE void pair_up(const float* first, const float* second, int64_t count, const Out& out) {
  for (int64_t i = 0; i < count; i += LANES) {
    const __mmask16 mask = lanes_before(i, count);
    const __m512 low = _mm512_maskz_loadu_ps(mask, first + i);
    const __m512 high = second ? _mm512_maskz_loadu_ps(mask, second + i) : _mm512_setzero_ps();
    out(i, pairs_of(low, high), mask);
  }
}

// Pairs of dense numbers, as many as there are.
INLINE __m512i sixteen_pairs(const float* from, int64_t count) {
  const __mmask16 low = lanes_before(0, count), high = lanes_before(LANES, count);
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, from + LANES),
                                      _mm512_maskz_loadu_ps(low, from));
}

// A row of A with dense numbers.
INLINE void round_row(const float* a, int64_t k, uint32_t* pairs) {
  for (int64_t i = 0; i < k; i += 2 * LANES)
    _mm512_mask_storeu_epi32(pairs + i / 2, lanes_before(0, (k - i + 1) / 2),
                             sixteen_pairs(a + i, k - i));
}

// Rows of A from `first` to `last`, to `pairs`: dense rows, or dense columns of a transposed A.
INLINE void round_rows(const MatrixProduct& p, int64_t first, int64_t last) {
  const float* a = p.norm ? p.sum : p.a;
  const int64_t a_row = p.norm ? p.k : p.a_row;
  if (p.norm || p.a_column == 1) {
    for (int64_t row = first; row < last; row++)
      round_row(a + row * a_row, p.k, p.pairs + row * p.pair_row);
    return;
  }
  for (int64_t k = 0; k < p.k; k += 2) {
    const float* column = a + k * p.a_column + first;
    uint32_t* out = p.pairs + k / 2 * p.pair_column + first;
    pair_up(column, k + 1 < p.k ? column + p.a_column : nullptr, last - first,
            [&](int64_t i, __m512i pairs, __mmask16 mask)
                INLINED { _mm512_mask_storeu_epi32(out + i, mask, pairs); });
  }
}

static void some_rows(const MatrixProduct& p, int64_t first, int64_t last) {
  if (first == last) return;
  if (p.a) round_rows(p, first, last);
  const int64_t k = (p.k + 1) / 2 * 2;
  for_panels(p.n, [&](auto vectors, int64_t column) INLINED {
    const uint16_t* b = static_cast<const uint16_t*>(p.b) + column * k;
    const uint16_t* next = b + k * vectors * LANES;
    for_tiles<TALLEST, vectors>(
        first, last, next, k / 2, [&](auto height, int64_t row, Ahead ahead) INLINED {
          tile<height, vectors>(p, b, row, column, ahead);
        });
  });
}

// Panels of columns from `first` to `last` of B, whose rows are dense.
static void pack_rows(const float* b, int64_t b_row, int64_t k, int64_t n, uint32_t* out,
                      int64_t first, int64_t last) {
  const int64_t pairs = (k + 1) / 2;
  for_panels(n, [&](auto vectors, int64_t column) INLINED {
    if (column < first || column >= last) return;
    for (int64_t i = 0; i < pairs; i++) {
      const float* row = b + 2 * i * b_row + column;
      uint32_t* to = out + column * pairs + i * vectors * LANES;
      pair_up(row, 2 * i + 1 < k ? row + b_row : nullptr, vectors * LANES,
              [&](int64_t j, __m512i found, __mmask16)
                  INLINED { _mm512_storeu_si512(to + j, found); });
    }
  });
}

// The same of B whose columns are dense: pairs of a column lie side by side, as those of a row of A.
static void pack_columns(const float* b, int64_t b_column, int64_t k, int64_t n, uint32_t* out,
                         int64_t first, int64_t last) {
  const int64_t pairs = (k + 1) / 2;
  for_panels(n, [&](auto vectors, int64_t column) INLINED {
    if (column < first || column >= last) return;
    uint32_t* to = out + column * pairs;
    for (int64_t i = 0; i < pairs; i += LANES)
      for (int64_t j = 0; j < vectors * LANES; j += LANES) {
        Vec block[LANES];
        for (int lane = 0; lane < LANES; lane++)
          block[lane] = (Vec)sixteen_pairs(b + (column + j + lane) * b_column + 2 * i, k - 2 * i);
        transpose(block);
        for (int64_t row = 0; row < LANES && i + row < pairs; row++)
          _mm512_storeu_ps(to + (i + row) * vectors * LANES + j, (__m512)block[row]);
      }
  });
}

}  // namespace

HIDDEN void bfloat16_rows(const MatrixProduct& p, int64_t first, int64_t last) {
  some_rows(p, first, last);
}

extern "C" {

// B [k, n] with n in whole vectors, dense rows b_row apart or (b_column given) dense columns, to
// out [k rounded up to pairs, n], in panels.
void pack_bfloat16(const float* b, int64_t b_row, int64_t b_column, int64_t k, int64_t n,
                   uint32_t* out, int threads) {
  share(n / LANES, threads, [=](int64_t first, int64_t last) {
    if (b_column == 1)
      pack_rows(b, b_row, k, n, out, first * LANES, last * LANES);
    else
      pack_columns(b, b_column, k, n, out, first * LANES, last * LANES);
  });
}
}

#else

HIDDEN void bfloat16_rows(const MatrixProduct&, int64_t, int64_t) {}

extern "C" {

void pack_bfloat16(const float*, int64_t, int64_t, int64_t, int64_t, uint32_t*, int) {}
}

#endif
