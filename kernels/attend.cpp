// Attention whose columns' part is made from the same probabilities. A head's scores exist for one panel of queries at
// a time, keys down and queries across, so that the softmax over the keys is a matter of whole vectors.
//
// q, out [rows, queries, heads * dim], k, v [rows, keys, heads * dim], columns [conditional, keys, columns],
// maps [conditional, columns, queries], to which the mean over heads is added; they belong to the rows from `first` on.
#include "native.h"

constexpr float LOG2E = 1.44269504f;

namespace {

struct Shape { int64_t rows, queries, keys, heads, dim, columns, first, conditional; };

static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// 2^x for x <= 0, no less than 2^-126; Taylor's polynomial of 2^f for |f| <= 1/2 is right to 1e-7
static inline Vec power_of_two(Vec x) {
    Vec bounded = larger(x, Vec{} - 126.0f);
    const float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, in its lowest bits
    Vec shifted = bounded + magic, f = bounded - (shifted - magic);
    Vec y = 1.5403530e-4f * f + 1.3333558e-3f;
    y = y * f + 9.6181291e-3f;
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.0f;
    Bits exponent = reinterpret_cast<Bits>(shifted) << 23;
    Vec power = reinterpret_cast<Vec>(reinterpret_cast<Bits>(y) + exponent);
    return x == x ? power : x;
}

// scores [keys, PANEL] -> 2^(scores - their largest); returns by `sum` the sum over the keys
static inline void softmax(float *scores, int64_t keys, Vec sum[2]) {
    for (int half = 0; half < 2; half++) {
        float *column = scores + half * LANES;
        Vec most = load(column), total = {};
        for (int64_t k = 1; k < keys; k++) most = larger(load(column + k * PANEL), most);
        for (int64_t k = 0; k < keys; k++) {
            Vec power = power_of_two(load(column + k * PANEL) - most);
            store(column + k * PANEL, power);
            total += power;
        }
        sum[half] = total;
    }
}

// [count, dim], rows `apart` -> the same in fp32, without gaps
template <typename T>
static void gather(const T *from, int64_t apart, int64_t count, int64_t dim, float *to) {
    for (int64_t i = 0; i < count; i++, from += apart, to += dim)
        for (int64_t d = 0; d < dim; d++) to[d] = to_float(from[d]);
}

// Queries begin .. begin + count of one row of the batch, all heads; columns and maps are null where it owns none.
// memory: keys and values [keys, dim] of a head, scores [keys, PANEL], queries and result [dim (+ columns), PANEL]
template <typename T>
static void attend_piece(const T *q, const T *k, const T *v, const float *columns, T *out, float *maps, const Shape &s,
                         float scale, int64_t begin, int64_t count, float *memory) {
    int64_t width = s.heads * s.dim, num_columns = columns ? s.columns : 0;
    float *keys = memory, *values = keys + s.keys * s.dim, *scores = values + s.keys * s.dim;
    float *queries = scores + s.keys * PANEL, *result = queries + s.dim * PANEL;
    for (int64_t h = 0; h < s.heads; h++) {
        gather(k + h * s.dim, width, s.keys, s.dim, keys);
        gather(v + h * s.dim, width, s.keys, s.dim, values);
        for (int64_t i = begin; i < begin + count; i += PANEL) {
            int64_t num = std::min<int64_t>(PANEL, begin + count - i);
            const T *from = q + i * width + h * s.dim;
            for (int64_t j = 0; j < PANEL; j++)
                for (int64_t d = 0; d < s.dim; d++)
                    queries[d * PANEL + j] = j < num ? scale * LOG2E * to_float(from[j * width + d]) : 0;
            multiply(keys, s.dim, 1, s.keys, queries, s.dim, scores, PANEL);
            Vec sum[2];
            softmax(scores, s.keys, sum);
            multiply(values, 1, s.dim, s.dim, scores, s.keys, result, PANEL);
            multiply(columns, 1, s.columns, num_columns, scores, s.keys, result + s.dim * PANEL, PANEL);
            float inverse[PANEL];
            store(inverse, 1 / sum[0]), store(inverse + LANES, 1 / sum[1]);
            T *to = out + i * width + h * s.dim;
            for (int64_t j = 0; j < num; j++)
                for (int64_t d = 0; d < s.dim; d++)
                    to[j * width + d] = from_float<T>(result[d * PANEL + j] * inverse[j]);
            for (int64_t n = 0; n < num_columns; n++)
                for (int64_t j = 0; j < num; j++)
                    maps[n * s.queries + i + j] += result[(s.dim + n) * PANEL + j] * inverse[j] / s.heads;
        }
    }
}

template <typename T>
static int attend(const T *q, const T *k, const T *v, const float *columns, T *out, float *maps, const Shape &s,
                  float scale, int threads) {
    int64_t parts = std::min(ceil_div(threads, s.rows), ceil_div(s.queries, PANEL));  // of a row
    int64_t part = ceil_div(ceil_div(s.queries, parts), PANEL) * PANEL, width = s.heads * s.dim;
    int64_t size = 2 * s.keys * s.dim + (s.keys + 2 * s.dim + s.columns) * PANEL;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        float *memory = scratch(size);
        failed = memory == nullptr;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.rows * parts; i++) {
            int64_t row = i / parts, begin = i % parts * part, own = row - s.first;
            if (failed || begin >= s.queries) continue;
            bool conditional = own >= 0 && own < s.conditional;
            const float *its_columns = conditional ? columns + own * s.keys * s.columns : nullptr;
            float *its_maps = conditional ? maps + own * s.columns * s.queries : nullptr;
            attend_piece(q + row * s.queries * width, k + row * s.keys * width, v + row * s.keys * width, its_columns,
                         out + row * s.queries * width, its_maps, s, scale, begin, std::min(part, s.queries - begin),
                         memory);
        }
    }
    return failed;
}

}  // namespace

extern "C" {
int attend_fp32(const float *q, const float *k, const float *v, const float *columns, float *out, float *maps,
                const Shape *shape, float scale, int threads) {
    return attend(q, k, v, columns, out, maps, *shape, scale, threads);
}
int attend_bf16(const BF16 *q, const BF16 *k, const BF16 *v, const float *columns, BF16 *out, float *maps,
                const Shape *shape, float scale, int threads) {
    return attend(q, k, v, columns, out, maps, *shape, scale, threads);
}
}
