// Matrix products; matrix_products.cpp says how.
#pragma once

#include <cstdint>

#include "norm.h"

extern "C" {

// Row i of A begins at a + i * a_row, and its k-th number is a_column further each time.
struct MatrixProduct {
  const float* a;     // null where an earlier product left it in `pairs`
  const float* plus;  // null, or added to A; both with dense rows, which lie alike
  const Norm* norm;   // null, or A, [rows, k] dense, goes through this layer norm and SiLU
  float* sum;         // [rows, k], where A + plus or SiLU(norm(A)) goes
  uint32_t* pairs;    // null, or where A goes in bfloat16, which B, packed, then is too
  const void* b;      // packed, or [k, n] of floats at rows b_row apart
  const float* bias;  // [n], or null
  float* c;           // [rows, n] at rows c_row apart
  float* also;        // null, or gets (or is added) the same as c; rows c_row apart
  int64_t rows, n, k, a_row, a_column;
  int64_t pair_row, pair_column;  // how far apart rows, and next pairs of a row, are
  int64_t b_row;                  // 0 where B is packed
  int64_t c_row;
  int64_t accumulate;  // whether C is added to
  float sign;
};

}

// SiLU of the layer norm of x [., channels], rows from `first` to `last`.
HIDDEN void norm_silu_rows(const Norm& norm, int64_t channels, const float* x, float* out,
                           int64_t first, int64_t last);

// The same where `pairs` are given.
HIDDEN void bfloat16_rows(const MatrixProduct& product, int64_t first, int64_t last);

// Rows of C from `first` to `last`.
HIDDEN void product_rows(const MatrixProduct& product, int64_t first, int64_t last);
