// 3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3): 36 products where a direct convolution has 144.
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), with the points 0, +-A, +-B and
// infinity, whose errors are less than half of those of 0, +-1, +-2.
//
// image [rows, height, width, in], weights [36, panels, in, PANEL] (`transform` in winograd.py), bias [out],
// result [rows, height, width, out]; in and out are multiples of 16.
#include "native.h"

constexpr int TILE = 4, WINDOW = 6, POINTS = WINDOW * WINDOW;
constexpr float A = 0.70710678f, B = 1.41421356f;
constexpr int64_t CACHE = 640 << 10;  // bytes of transformed tiles at a time, to stay in a core's second-level cache
constexpr int64_t APART = 16;         // keeps the planes of the points from falling on the same lines of that cache

namespace {

// Height and width are those of the result. `doubled`: each pixel of an image of half the height and width is repeated.
struct Shape { int64_t rows, height, width, in, out, doubled; };

// B^T of six values, `step` apart
static inline void transform_six(const Vec *v, int step, Vec *t) {
    Vec even_a = v[4 * step] - 2 * v[2 * step], odd_a = A * v[3 * step] - B * v[step];
    Vec even_b = v[4 * step] - 0.5f * v[2 * step], odd_b = B * v[3 * step] - A * v[step];
    t[0] = v[0] - 2.5f * v[2 * step] + v[4 * step];
    t[step] = even_a + odd_a;
    t[2 * step] = even_a - odd_a;
    t[3 * step] = even_b + odd_b;
    t[4 * step] = even_b - odd_b;
    t[5 * step] = v[step] - 2.5f * v[3 * step] + v[5 * step];
}

// A^T of six values, `step` apart: four, `step` apart as well
static inline void transform_four(const Vec *m, int step, Vec *o) {
    Vec sum_a = m[step] + m[2 * step], difference_a = m[step] - m[2 * step];
    Vec sum_b = m[3 * step] + m[4 * step], difference_b = m[3 * step] - m[4 * step];
    o[0] = m[0] + sum_a + sum_b;
    o[step] = A * difference_a + B * difference_b;
    o[2 * step] = 0.5f * sum_a + 2 * sum_b;
    o[3 * step] = 0.5f * A * difference_a + 2 * B * difference_b + m[5 * step];
}

// The tile's row of the batch and its upper left pixel
struct Place {
    int64_t row, y, x;
    Place(const Shape &s, int64_t tile) {
        int64_t across = ceil_div(s.width, TILE), down = ceil_div(s.height, TILE);
        row = tile / across / down, y = tile / across % down * TILE, x = tile % across * TILE;
    }
};

// Tiles first .. first + count of the image -> [POINTS, count, in], the points `plane` apart
template <typename T>
static void transform_tiles(const T *image, const T *zeros, const Shape &s, int64_t first, int64_t count, float *out,
                            int64_t plane) {
    int64_t own_height = s.height >> s.doubled, own_width = s.width >> s.doubled;  // of the image in memory
    for (int64_t i = 0; i < count; i++, out += s.in) {
        Place place(s, first + i);
        const T *pixels[POINTS];
        for (int p = 0; p < POINTS; p++) {
            int64_t y = place.y - 1 + p / WINDOW, x = place.x - 1 + p % WINDOW;
            bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
            int64_t pixel = (place.row * own_height + (y >> s.doubled)) * own_width + (x >> s.doubled);
            pixels[p] = inside ? image + pixel * s.in : zeros;
        }
        for (int64_t c = 0; c < s.in; c += LANES) {
            Vec d[POINTS], t[POINTS];
            for (int p = 0; p < POINTS; p++) d[p] = load(pixels[p] + c);
            for (int x = 0; x < WINDOW; x++) transform_six(d + x, WINDOW, t + x);
            for (int y = 0; y < WINDOW; y++) transform_six(t + y * WINDOW, 1, d + y * WINDOW);
            for (int p = 0; p < POINTS; p++) store(out + p * plane + c, d[p]);
        }
    }
}

// [POINTS, count, columns], the points `plane` apart -> tiles first .. first + count of the result
template <typename T>
static void finish_tiles(const float *products, int64_t plane, int64_t columns, const T *bias, const Shape &s,
                         int64_t first, int64_t count, T *result) {
    for (int64_t i = 0; i < count; i++, products += columns) {
        Place place(s, first + i);
        int64_t height = std::min<int64_t>(TILE, s.height - place.y);
        int64_t width = std::min<int64_t>(TILE, s.width - place.x);
        T *corner = result + ((place.row * s.height + place.y) * s.width + place.x) * s.out;
        for (int64_t c = 0; c < s.out; c += LANES) {
            Vec d[POINTS], t[TILE * WINDOW], o[TILE * WINDOW], own = bias ? load(bias + c) : Vec{};
            for (int p = 0; p < POINTS; p++) d[p] = load(products + p * plane + c);
            for (int x = 0; x < WINDOW; x++) transform_four(d + x, WINDOW, t + x);
            for (int y = 0; y < TILE; y++) transform_four(t + y * WINDOW, 1, o + y * WINDOW);
            auto put = [&](int y, int x) { store(corner + (y * s.width + x) * s.out + c, o[y * WINDOW + x] + own); };
            if (height == TILE && width == TILE) {  // loops of known length keep the pixels in registers
                for (int p = 0; p < TILE * TILE; p++) put(p / TILE, p % TILE);
            } else
                for (int y = 0; y < height; y++)
                    for (int x = 0; x < width; x++) put(y, x);
        }
    }
}

template <typename T>
static int convolve(const T *image, const float *weights, const T *bias, T *result, const Shape &s, int threads) {
    int64_t tiles = s.rows * ceil_div(s.height, TILE) * ceil_div(s.width, TILE);
    if (!tiles) return 0;
    int64_t columns = ceil_div(s.out, PANEL) * PANEL;
    int64_t fitting = std::max<int64_t>(ROWS, CACHE / (4 * POINTS * (s.in + columns)) / ROWS * ROWS);
    int64_t pieces = std::min(ceil_div(ceil_div(tiles, fitting), threads) * threads, tiles);  // as many for each thread
    int64_t piece = ceil_div(tiles, pieces), plane = piece * s.in + APART, products_plane = piece * columns + APART;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        float *planes = scratch(POINTS * (plane + products_plane) + s.in);
        failed = planes == nullptr;
        float *products = planes + POINTS * plane, *zeros = products + POINTS * products_plane;
        if (!failed) std::memset(zeros, 0, 4 * s.in);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < pieces; i++) {
            if (failed) continue;
            int64_t first = tiles * i / pieces, count = tiles * (i + 1) / pieces - first;
            transform_tiles(image, reinterpret_cast<const T *>(zeros), s, first, count, planes, plane);
            for (int p = 0; p < POINTS; p++)
                for (int64_t n = 0; n < columns; n += PANEL)
                    multiply(planes + p * plane, s.in, 1, count, weights + (p * columns + n) * s.in, s.in,
                             products + p * products_plane + n, columns);
            finish_tiles(products, products_plane, columns, bias, s, first, count, result);
        }
    }
    return failed;
}

}  // namespace

extern "C" {
int panel() { return PANEL; }
int convolve_fp32(const float *image, const float *weights, const float *bias, float *result, const Shape *shape,
                  int threads) {
    return convolve(image, weights, bias, result, *shape, threads);
}
int convolve_bf16(const BF16 *image, const float *weights, const BF16 *bias, BF16 *result, const Shape *shape,
                  int threads) {
    return convolve(image, weights, bias, result, *shape, threads);
}
}
