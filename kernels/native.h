// Vectors as wide as the processor's, and the product of a few rows with a panel of columns, in registers.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

// LANES: fp32 numbers of a vector. ROWS: the most rows of a block, whose sums, two vectors a row, fill the registers.
// PANEL: columns of a block. BLOCKS: does something for each number of rows.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#define BLOCKS(R) R(1) R(2) R(3) R(4) R(5) R(6) R(7) R(8) R(9) R(10) R(11) R(12)
#else
constexpr int LANES = 8, ROWS = 6;
#define BLOCKS(R) R(1) R(2) R(3) R(4) R(5) R(6)
#endif
constexpr int PANEL = 2 * LANES;

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
struct BF16 { uint16_t bits; };

static inline int64_t ceil_div(int64_t number, int64_t by) { return (number + by - 1) / by; }

static inline Vec load(const float *from) { return *reinterpret_cast<const Vec *>(from); }
static inline Vec load(const BF16 *from) {
    return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const Halves *>(from), Bits) << 16);
}

static inline float to_float(float value) { return value; }
static inline float to_float(BF16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}

static inline void store(float *to, Vec value) { *reinterpret_cast<Vec *>(to) = value; }
static inline void store(BF16 *to, Vec value) {
    Bits bits = reinterpret_cast<Bits>(value);
    Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    Bits quiet = bits >> 16 | 0x40;  // rounding could make an infinity of what is not a number
    rounded = value == value ? rounded : quiet;
    *reinterpret_cast<Halves *>(to) = __builtin_convertvector(rounded, Halves);
}

template <typename T> static inline T from_float(float value);
template <> inline float from_float<float>(float value) { return value; }
template <> inline BF16 from_float<BF16>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
    return {uint16_t(rounded)};
}

// R rows of a by a panel of b -> c; a's elements are `row` apart in a row's direction, `step` in that of the depth
template <int R>
static void block(const float *a, int64_t row, int64_t step, const float *b, int64_t depth, float *c, int64_t columns) {
    Vec sum[R][2] = {};
    for (int64_t k = 0; k < depth; k++, a += step, b += PANEL) {
        Vec left = load(b), right = load(b + LANES);
        for (int r = 0; r < R; r++) {
            sum[r][0] += a[r * row] * left;
            sum[r][1] += a[r * row] * right;
        }
    }
    for (int r = 0; r < R; r++) {
        store(c + r * columns, sum[r][0]);
        store(c + r * columns + LANES, sum[r][1]);
    }
}

// a [count, depth] by b [depth, PANEL] -> c, whose rows are `columns` apart
static inline void multiply(const float *a, int64_t row, int64_t step, int64_t count, const float *b, int64_t depth,
                            float *c, int64_t columns) {
    int64_t blocks = ceil_div(count, ROWS);
    for (int64_t i = 0; i < blocks; i++) {
        int64_t first = count * i / blocks;
        const float *from = a + first * row;
        float *to = c + first * columns;
        switch (count * (i + 1) / blocks - first) {
#define CASE(R) case R: block<R>(from, row, step, b, depth, to, columns); break;
            BLOCKS(CASE)
#undef CASE
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
