// 3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3): 36 products where a direct convolution has 144.
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), with the points 0, +-A, +-B and
// infinity, whose largest error is a quarter of that of 0, +-1, +-2. Images are channels_last, channels multiples of 16.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#define BLOCKS(R) R(1) R(2) R(3) R(4) R(5) R(6) R(7) R(8) R(9) R(10) R(11) R(12)
#else
constexpr int LANES = 8, ROWS = 6;
#define BLOCKS(R) R(1) R(2) R(3) R(4) R(5) R(6)
#endif
constexpr int TILE = 4, WINDOW = 6, POINTS = WINDOW * WINDOW, PANEL = 2 * LANES;
constexpr float A = 0.70710678f, B = 1.41421356f;
constexpr int64_t CACHE = 640 << 10;  // bytes of transformed tiles at a time, to stay in a core's second-level cache
constexpr int64_t APART = 16;         // keeps the planes of the points from falling on the same lines of that cache

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
struct BF16 { uint16_t bits; };

// `doubled`: the image is one of twice the height and width, each pixel of the given one repeated
struct Shape { int64_t rows, height, width, in, out, doubled; };

static inline int64_t ceil_div(int64_t number, int64_t by) { return (number + by - 1) / by; }

static inline Vec load(const float *from) { return *reinterpret_cast<const Vec *>(from); }
static inline Vec load(const BF16 *from) {
    return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const Halves *>(from), Bits) << 16);
}

static inline void store(float *to, Vec value) { *reinterpret_cast<Vec *>(to) = value; }
static inline void store(BF16 *to, Vec value) {
    Bits bits = reinterpret_cast<Bits>(value);
    Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    Bits quiet = bits >> 16 | 0x40;  // rounding could make an infinity of what is not a number
    rounded = value == value ? rounded : quiet;
    *reinterpret_cast<Halves *>(to) = __builtin_convertvector(rounded, Halves);
}

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
    int64_t height = s.height >> s.doubled, width = s.width >> s.doubled;
    for (int64_t i = 0; i < count; i++, out += s.in) {
        Place place(s, first + i);
        const T *pixels[POINTS];
        for (int p = 0; p < POINTS; p++) {
            int64_t y = place.y - 1 + p / WINDOW, x = place.x - 1 + p % WINDOW;
            bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
            int64_t pixel = (place.row * height + (y >> s.doubled)) * width + (x >> s.doubled);
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

// R rows of a by one panel of b
template <int R>
static void block(const float *a, const float *b, int64_t depth, float *c, int64_t columns) {
    Vec sum[R][2] = {};
    for (int64_t k = 0; k < depth; k++, b += PANEL) {
        Vec left = load(b), right = load(b + LANES);
        for (int r = 0; r < R; r++) {
            sum[r][0] += a[r * depth + k] * left;
            sum[r][1] += a[r * depth + k] * right;
        }
    }
    for (int r = 0; r < R; r++) {
        store(c + r * columns, sum[r][0]);
        store(c + r * columns + LANES, sum[r][1]);
    }
}

// a [count, depth] by b [columns / PANEL, depth, PANEL] -> c [count, columns]
static void multiply(const float *a, int64_t count, const float *b, int64_t depth, float *c, int64_t columns) {
    int64_t blocks = ceil_div(count, ROWS);
    for (int64_t n = 0; n < columns; n += PANEL, b += depth * PANEL)
        for (int64_t i = 0; i < blocks; i++) {
            int64_t row = count * i / blocks;
            const float *from = a + row * depth;
            float *to = c + row * columns + n;
            switch (count * (i + 1) / blocks - row) {
#define CASE(R) case R: block<R>(from, b, depth, to, columns); break;
                BLOCKS(CASE)
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

// Memory of this thread, kept for the next call
static float *scratch(int64_t size) {
    static thread_local std::unique_ptr<float, decltype(&std::free)> kept(nullptr, &std::free);
    static thread_local int64_t most = 0;
    if (size > most) {
        kept.reset(static_cast<float *>(std::aligned_alloc(64, ceil_div(4 * size, 64) * 64)));
        most = kept ? size : 0;
    }
    return kept.get();
}

template <typename T>
static int convolve(const T *image, const float *weights, const T *bias, T *result, const Shape &s, int threads) {
    int64_t tiles = s.rows * ceil_div(s.height, TILE) * ceil_div(s.width, TILE);
    int64_t columns = ceil_div(s.out, PANEL) * PANEL;
    int64_t fitting = std::max<int64_t>(ROWS, CACHE / (4 * POINTS * (s.in + columns)) / ROWS * ROWS);
    int64_t pieces = std::max(ceil_div(tiles, fitting), std::min<int64_t>(threads, tiles));
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
                multiply(planes + p * plane, count, weights + p * s.in * columns, s.in, products + p * products_plane,
                         columns);
            finish_tiles(products, products_plane, columns, bias, s, first, count, result);
        }
    }
    return failed;
}

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
