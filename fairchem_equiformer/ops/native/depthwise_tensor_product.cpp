// Depth-wise tensor product: each channel of an edge's features times one small matrix and one weight
// for each path. ops/depthwise_tensor_product.py says what; irreps have components first here.

#include <algorithm>

#include "simd.h"

namespace {

constexpr int MAX_SIZE = 13;        // components of degree 6
constexpr int MAX_FEATURES = 4096;  // numbers of an edge's features, summed on the stack
// Edges whose parts of the gradient of shared weights are added up in one row: rows of threads would
// round otherwise with another number of threads.
constexpr int64_t BLOCK = 32;

struct Product {
  // Of each path. Components of the features start at `feature` and lie `channels` apart, those of
  // the result start at `out` and lie `out_channels` apart; matrices are [out_size, size].
  const int64_t *feature, *size, *channels, *out, *out_size, *out_channels, *weight, *matrix;
  int64_t paths, features, outs, weights, entries;
};

// An edge's features: rows of one tensor, or the sum of rows of two; those of the edge's own number
// where there is no index.
struct Features {
  const float* tensor[2];
  const int64_t* index[2];
  int64_t count;
};

// Where they are; a sum is written to `sum`.
INLINE const float* features_of(const Features& x, int64_t edge, int64_t width, float* sum) {
  const float* rows[2];
  for (int i = 0; i < x.count; i++)
    rows[i] = x.tensor[i] + (x.index[i] ? x.index[i][edge] : edge) * width;
  if (x.count == 1) return rows[0];
  for_vectors<1>(0, width, [&](auto, int64_t c) INLINED {
    Vec one, other;
    load(rows[0] + c, one);
    load(rows[1] + c, other);
    store(one + other, sum + c);
  });
  return sum;
}

template <int SIZE>
INLINE void path_product(const Product& product, int64_t p, const float* x, const float* matrix,
                         const float* weights, float* out) {
  const int64_t channels = product.channels[p];
  for (int64_t c = 0; c < channels; c += LANES) {
    Vec in[SIZE], weight;
    for (int j = 0; j < SIZE; j++) load(x + j * channels + c, in[j]);
    load(weights + c, weight);
    for (int64_t k = 0; k < product.out_size[p]; k++) {
      Vec sum = matrix[k * SIZE] * in[0];
      for (int j = 1; j < SIZE; j++) sum += matrix[k * SIZE + j] * in[j];
      store(sum * weight, out + k * product.out_channels[p] + c);
    }
  }
}

INLINE float sum_of(const Vec& vector) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += vector[i];
  return sum;
}

// Adds to x_grad and weights_grad; writes matrix_grad where wanted.
template <int SIZE, bool OF_MATRIX>
INLINE void path_gradient(const Product& product, int64_t p, const float* x, const float* matrix,
                          const float* weights, const float* grad, float* x_grad,
                          float* matrix_grad, float* weights_grad) {
  const int64_t channels = product.channels[p], out_size = product.out_size[p];
  Vec of_matrix[OF_MATRIX ? MAX_SIZE * SIZE : 1];
  if (OF_MATRIX)
    for (int64_t i = 0; i < out_size * SIZE; i++) of_matrix[i] = Vec{};
  for (int64_t c = 0; c < channels; c += LANES) {
    Vec in[SIZE], in_grad[SIZE], weight, weight_grad;
    for (int j = 0; j < SIZE; j++) {
      load(x + j * channels + c, in[j]);
      load(x_grad + j * channels + c, in_grad[j]);
    }
    load(weights + c, weight);
    load(weights_grad + c, weight_grad);
    for (int64_t k = 0; k < out_size; k++) {
      Vec flow;
      load(grad + k * product.out_channels[p] + c, flow);
      Vec sum = matrix[k * SIZE] * in[0];
      for (int j = 1; j < SIZE; j++) sum += matrix[k * SIZE + j] * in[j];
      weight_grad += flow * sum;
      flow *= weight;
      for (int j = 0; j < SIZE; j++) in_grad[j] += matrix[k * SIZE + j] * flow;
      if (OF_MATRIX)
        for (int j = 0; j < SIZE; j++) of_matrix[k * SIZE + j] += flow * in[j];
    }
    store(weight_grad, weights_grad + c);
    for (int j = 0; j < SIZE; j++) store(in_grad[j], x_grad + j * channels + c);
  }
  if (OF_MATRIX)
    for (int64_t i = 0; i < out_size * SIZE; i++) matrix_grad[i] = sum_of(of_matrix[i]);
}

// Calls work(2l + 1 as a type) for the degree that a path reads.
template <typename Work>
INLINE void for_size(int64_t size, const Work& work) {
  switch (size) {
    case 1: return work(std::integral_constant<int, 1>{});
    case 3: return work(std::integral_constant<int, 3>{});
    case 5: return work(std::integral_constant<int, 5>{});
    case 7: return work(std::integral_constant<int, 7>{});
    case 9: return work(std::integral_constant<int, 9>{});
    case 11: return work(std::integral_constant<int, 11>{});
    default: return work(std::integral_constant<int, 13>{});
  }
}

static void products(const Product& product, const Features& x, const float* matrices,
                     const float* weights, int64_t weights_apart, float* out, int64_t first,
                     int64_t last) {
  float sum[MAX_FEATURES];
  for (int64_t e = first; e < last; e++) {
    const float* features = features_of(x, e, product.features, sum);
    for (int64_t p = 0; p < product.paths; p++)
      for_size(product.size[p], [&](auto size) INLINED {
        path_product<size>(product, p, features + product.feature[p],
                           matrices + e * product.entries + product.matrix[p],
                           weights + e * weights_apart + product.weight[p],
                           out + e * product.outs + product.out[p]);
      });
  }
}

template <bool OF_MATRICES>
INLINE void gradients(const Product& product, const Features& x, const float* matrices,
                      const float* weights, int64_t weights_apart, const float* grad, float* x_grad,
                      float* matrices_grad, float* weights_grad, int64_t first, int64_t last) {
  float sum[MAX_FEATURES];
  for (int64_t e = first; e < last; e++) {
    const float* features = features_of(x, e, product.features, sum);
    for (int64_t p = 0; p < product.paths; p++)
      for_size(product.size[p], [&](auto size) INLINED {
        const int64_t entry = e * product.entries + product.matrix[p];
        const int64_t weight = e * weights_apart + product.weight[p];
        path_gradient<size, OF_MATRICES>(
            product, p, features + product.feature[p], matrices + entry, weights + weight,
            grad + e * product.outs + product.out[p],
            x_grad + e * product.features + product.feature[p], matrices_grad + entry,
            weights_grad + weight);
      });
  }
}

static void all_gradients(const Product& product, const Features& x, const float* matrices,
                          const float* weights, int64_t weights_apart, const float* grad,
                          float* x_grad, float* matrices_grad, float* weights_grad,
                          int64_t first, int64_t last) {
  gradients<true>(product, x, matrices, weights, weights_apart, grad, x_grad, matrices_grad,
                  weights_grad, first, last);
}

static void gradients_of_channels(const Product& product, const Features& x,
                                  const float* matrices, const float* weights,
                                  int64_t weights_apart, const float* grad, float* x_grad,
                                  float* weights_grad, int64_t first, int64_t last) {
  gradients<false>(product, x, matrices, weights, weights_apart, grad, x_grad, nullptr, weights_grad,
                   first, last);
}

}  // namespace

extern "C" {

int64_t sizeof_Product() { return sizeof(Product); }
int64_t sizeof_Features() { return sizeof(Features); }

// Null where such sizes fit, or else what does not.
const char* depthwise_misfit(const Product* product) {
  if (product->features > MAX_FEATURES) return "an edge has more than 4096 features";
  for (int64_t p = 0; p < product->paths; p++) {
    if (product->size[p] > MAX_SIZE || product->out_size[p] > MAX_SIZE)
      return "there are degrees above 6";
    if (const char* misfit = misfit_of_width(product->channels[p])) return misfit;
  }
  return nullptr;
}

// Features of each edge [features], matrices [edges, entries] and weights, `weights_apart` from edge
// to edge (0 for the same ones), to out [edges, outs].
void depthwise_product(const Product* product, const Features* x, const float* matrices,
                       const float* weights, int64_t weights_apart, float* out, int64_t edges,
                       int threads) {
  share(edges, threads, [=, product = *product, x = *x](int64_t first, int64_t last) {
    products(product, x, matrices, weights, weights_apart, out, first, last);
  });
}

int64_t depthwise_block() { return BLOCK; }

// Adds to x_grad [edges, features] and to weights_grad, as far apart as the weights, or a row for each
// depthwise_block() of edges where they are shared; writes matrices_grad unless it is null.
void depthwise_product_backward(const Product* product, const Features* x, const float* matrices,
                                const float* weights, int64_t weights_apart, const float* grad,
                                float* x_grad, float* matrices_grad, float* weights_grad,
                                int64_t edges, int threads) {
  const auto differentiate = [=, product = *product, x = *x](int64_t first, int64_t last,
                                                             float* own) {
    if (matrices_grad)
      all_gradients(product, x, matrices, weights, weights_apart, grad, x_grad, matrices_grad, own,
                    first, last);
    else
      gradients_of_channels(product, x, matrices, weights, weights_apart, grad, x_grad, own, first,
                            last);
  };
  if (weights_apart) {
    share(edges, threads,
          [=](int64_t first, int64_t last) { differentiate(first, last, weights_grad); });
    return;
  }
  const int64_t size = product->weights;
  share((edges + BLOCK - 1) / BLOCK, threads, [=](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++)
      differentiate(b * BLOCK, std::min((b + 1) * BLOCK, edges),
                    weights_grad + b * size);
  });
}
}
