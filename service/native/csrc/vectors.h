// SIMD vectors of floats in the CPU's width, bfloat16, and functions of both.
//
// Uses the vector extensions of g++ and clang++, which work for every instruction set that the compiler knows, and intrinsics
// where g++ generates bad code.

#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
constexpr bool kManyRegisters = true;  // 32 of them
#else
constexpr int64_t kLanes = 8;
constexpr bool kManyRegisters = false;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfWords __attribute__((vector_size(2 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));

struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline Vec load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline Vec load(const bfloat16* from) {
    HalfWords words;
    std::memcpy(&words, from, sizeof words);
#if defined(__AVX512F__)  // g++ makes six instructions of the conversion below
    const IntVec bits = (IntVec)_mm512_cvtepu16_epi32((__m256i)words) << 16;
#else
    const IntVec bits = __builtin_convertvector(words, IntVec) << 16;
#endif
    return (Vec)bits;
}

// Keeps a value in a register: g++ would load it again for every product.
inline Vec held(Vec value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#endif
    return value;
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (IntVec){__VA_ARGS__})
#endif

// Of the lanes of a, then b: `add_neighbours` sums neighbouring lanes within every four, `add_neighbouring_fours` sums
// neighbouring fours; `evens` and `odds` select lanes at even and at odd indices.
#if defined(__AVX512F__)
inline Vec add_neighbours(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
        SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

inline Vec add_neighbouring_fours(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

inline Vec evens(Vec a, Vec b) { return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
inline Vec odds(Vec a, Vec b) { return SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }
#else
inline Vec add_neighbours(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

inline Vec add_neighbouring_fours(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}

inline Vec evens(Vec a, Vec b) { return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14); }
inline Vec odds(Vec a, Vec b) { return SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15); }
#endif

// Of every four lanes, the sums of a's, b's, c's and d's.
inline Vec sums_of_fours(Vec a, Vec b, Vec c, Vec d) { return add_neighbours(add_neighbours(a, b), add_neighbours(c, d)); }

// The sums of four vectors.
inline Quad sums(Vec a, Vec b, Vec c, Vec d) {
    const Vec all = sums_of_fours(a, b, c, d);
    Quad fours[kLanes / 4];
    std::memcpy(fours, &all, sizeof all);
    Quad sum = fours[0];
    for (int i = 1; i < kLanes / 4; i++) sum += fours[i];
    return sum;
}

inline float sum_of(Vec a) { return sums(a, Vec{}, Vec{}, Vec{})[0]; }

inline float largest_of(Vec a) {
    Quad fours[kLanes / 4];
    std::memcpy(fours, &a, sizeof a);
    Quad maximum = fours[0];
    for (int i = 1; i < kLanes / 4; i++) maximum = fours[i] > maximum ? fours[i] : maximum;
    return std::max(std::max(maximum[0], maximum[1]), std::max(maximum[2], maximum[3]));
}

// The sums of kLanes vectors.
inline Vec sums_of_lanes(const Vec* all) {
    Vec fours[kLanes / 4];
    for (int i = 0; i < kLanes / 4; i++) fours[i] = sums_of_fours(all[4 * i], all[4 * i + 1], all[4 * i + 2], all[4 * i + 3]);
    for (int count = kLanes / 4; count > 1; count /= 2)
        for (int i = 0; i < count / 2; i++) fours[i] = add_neighbouring_fours(fours[2 * i], fours[2 * i + 1]);
    return fours[0];
}

// out[i] = the sum of the i-th of COUNT vectors; `out` must have room for kLanes more.
template <int COUNT>
inline void sums(const Vec* vectors, float* out) {
    const auto at = [&](int number) { return vectors[std::min(number, COUNT - 1)]; };
    constexpr int kSome = COUNT > kLanes / 2 ? kLanes : 4;
    if constexpr (COUNT >= kLanes) {
        const Vec all = sums_of_lanes(vectors);
        std::memcpy(out, &all, sizeof all);
    } else if constexpr (kSome == kLanes) {
        Vec some[kLanes];
        for (int i = 0; i < kLanes; i++) some[i] = at(i);
        const Vec all = sums_of_lanes(some);
        std::memcpy(out, &all, sizeof all);
    } else {
        const Quad four = sums(at(0), at(1), at(2), at(3));
        std::memcpy(out, &four, sizeof four);
    }
    if constexpr (COUNT > kSome) sums<COUNT - kSome>(vectors + kSome, out + kSome);
}

// Zeros, unrolled: g++ would turn a loop into memset, which forces the vectors out of registers.
template <int COUNT>
inline void clear(Vec* vectors) {
#pragma GCC unroll 32
    for (int i = 0; i < COUNT; i++) vectors[i] = Vec{};
}

// Rounds to the nearest integers; for numbers below 2^22.
inline Vec rounded(Vec x) {
#if defined(__AVX512F__)
    return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds the fraction away
    return (x + round) - round;
#endif
}

// x * 2^exponent, for integers from -126 to 127.
inline Vec scaled(Vec x, Vec exponent) {
#if defined(__AVX512F__)
    return (Vec)_mm512_scalef_ps((__m512)x, (__m512)exponent);
#else
    const IntVec bits = (__builtin_convertvector(exponent, IntVec) + 127) << 23;
    return x * (Vec)bits;
#endif
}

constexpr float kLog2E = 1.44269504f;

// 2^x for x <= 0, to about 1e-7 (minimax polynomial), at least 2^-126. Cheaper than e^x.
inline Vec power_of_two(Vec x) {
    x = x < -126.0f ? Vec{} - 126.0f : x;
    const Vec whole = rounded(x), r = x - whole;
    Vec p = r * 1.5345812e-4f + 1.3399931e-3f;
    p = p * r + 9.6184891e-3f;
    p = p * r + 5.5503286e-2f;
    p = p * r + 2.4022646e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    return scaled(p, whole);
}

// e^x for x <= 0, to about 1e-7 (polynomial of the Cephes library).
inline Vec exponential(Vec x) {
    x = x < -87.0f ? Vec{} - 87.0f : x;
    const Vec whole = rounded(x * kLog2E);
    const Vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return scaled(p, whole);
}

template <typename W>
inline void prefetch(const W* numbers, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(W))) __builtin_prefetch(numbers + i);
}

}  // namespace
