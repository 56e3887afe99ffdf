// The operations where a decode step spends its time, for few rows on a CPU: adapted linears, rotations, paged attention,
// norms.
//
// Written for g++ and clang++ with their vector extensions: no intrinsics, so any instruction set that the compiler
// knows. Everything is read where it lies: weights as the model stores them, keys and values through the block table.
// Storage is float or bfloat16, arithmetic is float; weights may be narrower than what they are multiplied with.
//
// The functions at the end are what torch calls: compiled steps by the names and types of AOTInductor's C interface (C
// shim), eager ones through the dispatcher. decode_kernels.py declares the operators and says what they compute.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

int threads = 1;

constexpr int64_t kLanes = 8;
constexpr int64_t kMostDims = 4;
typedef float Vec __attribute__((vector_size(32)));
typedef int32_t IntVec __attribute__((vector_size(32)));
typedef uint16_t HalfWords __attribute__((vector_size(16)));
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

inline void store(float* to, float value) { *to = value; }

inline void store(bfloat16* to, float value) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to->bits = nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Vec load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline Vec load(const bfloat16* from) {
    HalfWords words;
    std::memcpy(&words, from, sizeof words);
    const IntVec bits = __builtin_convertvector(words, IntVec) << 16;
    return (Vec)bits;
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (IntVec){__VA_ARGS__})
#endif

inline Vec add_neighbours(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

// The sums of four vectors.
inline Quad sums(Vec a, Vec b, Vec c, Vec d) {
    const Vec both = add_neighbours(add_neighbours(a, b), add_neighbours(c, d));
    Quad halves[2];
    std::memcpy(halves, &both, sizeof both);
    return halves[0] + halves[1];
}

// ---- linear: y = W x + b, and for rows from first_row on + B ((A x) * g) --------------------------------------------

constexpr int64_t kChunk = 48;  // outputs computed together: their weights stay in the nearest cache for all rows
constexpr int64_t kPairs = 2 * kLanes;

// x as weights W want it, in `copy` if not as it is. bfloat16 is widened two at a time, for which a word is shifted or
// masked: so of every kPairs numbers of a row those at even places come first, then those at odd ones.
template <typename W, typename X>
const float* operand(const X* x, int64_t rows, int64_t depth, std::vector<float>& copy) {
    if constexpr (std::is_same_v<W, float>) {
        static_assert(std::is_same_v<X, float>, "weights are no wider than what they are multiplied with");
        return x;
    } else {
        copy.resize(rows * depth);
        const int64_t paired = depth / kPairs * kPairs;
        for (int64_t row = 0; row < rows; row++) {
            const X* const from = x + row * depth;
            float* const to = copy.data() + row * depth;
            for (int64_t k = 0; k < paired; k += kPairs)
                for (int64_t i = 0; i < kLanes; i++) {
                    to[k + i] = to_float(from[k + 2 * i]);
                    to[k + kLanes + i] = to_float(from[k + 2 * i + 1]);
                }
            for (int64_t k = paired; k < depth; k++) to[k] = to_float(from[k]);
        }
        return copy.data();
    }
}

// out[m][n] = the sum of total[m][n], and x[m] . w[n] from k on.
template <int ROWS, int COLUMNS, typename W>
inline void sum_up(
    const Vec (&total)[ROWS][COLUMNS], const float* x, int64_t x_stride, const W* w, int64_t k, int64_t depth, float* out,
    int64_t out_stride
) {
    float sum[ROWS * COLUMNS + 3];
    for (int i = 0; i < ROWS * COLUMNS; i += 4) {
        const auto at = [&](int j) {
            const int number = std::min(i + j, ROWS * COLUMNS - 1);
            return total[number / COLUMNS][number % COLUMNS];
        };
        const Quad four = sums(at(0), at(1), at(2), at(3));
        std::memcpy(sum + i, &four, sizeof four);
    }
    for (int m = 0; m < ROWS; m++)
        for (int n = 0; n < COLUMNS; n++) {
            float value = sum[m * COLUMNS + n];
            for (int64_t rest = k; rest < depth; rest++) value = std::fma(x[m * x_stride + rest], to_float(w[n * depth + rest]), value);
            out[m * out_stride + n] = value;
        }
}

// out[m][n] = x[m] . w[n] for ROWS rows and COLUMNS outputs, as many accumulators as there are registers for.
template <int ROWS, int COLUMNS>
inline void dots(const float* x, int64_t x_stride, const float* w, int64_t depth, float* out, int64_t out_stride) {
    Vec total[ROWS][COLUMNS] = {};
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
        if constexpr (ROWS <= COLUMNS) {  // the fewer ones are held in registers
            Vec rows[ROWS];
            for (int m = 0; m < ROWS; m++) rows[m] = load(x + m * x_stride + k);
            for (int n = 0; n < COLUMNS; n++) {
                const Vec weight = load(w + n * depth + k);
                for (int m = 0; m < ROWS; m++) total[m][n] += rows[m] * weight;
            }
        } else {
            Vec weights[COLUMNS];
            for (int n = 0; n < COLUMNS; n++) weights[n] = load(w + n * depth + k);
            for (int m = 0; m < ROWS; m++) {
                const Vec row = load(x + m * x_stride + k);
                for (int n = 0; n < COLUMNS; n++) total[m][n] += row * weights[n];
            }
        }
    }
    sum_up(total, x, x_stride, w, k, depth, out, out_stride);
}

template <int ROWS, int COLUMNS>
inline void dots(const float* x, int64_t x_stride, const bfloat16* w, int64_t depth, float* out, int64_t out_stride) {
    Vec total[ROWS][COLUMNS] = {};
    int64_t k = 0;
    for (; k + kPairs <= depth; k += kPairs) {
        Vec even[ROWS], odd[ROWS];
        for (int m = 0; m < ROWS; m++) {
            even[m] = load(x + m * x_stride + k);
            odd[m] = load(x + m * x_stride + k + kLanes);
        }
        for (int n = 0; n < COLUMNS; n++) {
            IntVec words;
            std::memcpy(&words, w + n * depth + k, sizeof words);
            const Vec low = (Vec)(words << 16), high = (Vec)(words & int32_t(0xffff0000));
            for (int m = 0; m < ROWS; m++) total[m][n] += even[m] * low;
            for (int m = 0; m < ROWS; m++) total[m][n] += odd[m] * high;
        }
    }
    sum_up(total, x, x_stride, w, k, depth, out, out_stride);
}

template <int ROWS, int COLUMNS, typename W>
inline void dots_of_chunk(const float* x, int64_t stride, const W* w, int64_t depth, int64_t count, float* out) {
    int64_t n = 0;
    for (; n + COLUMNS <= count; n += COLUMNS) dots<ROWS, COLUMNS>(x, stride, w + n * depth, depth, out + n, kChunk);
    for (; n < count; n++) dots<ROWS, 1>(x, stride, w + n * depth, depth, out + n, kChunk);
}

// out [rows][kChunk] = x [rows, depth], as `operand` gives it, times `count` rows of w.
template <typename W>
void multiply(const float* x, int64_t rows, int64_t depth, const W* w, int64_t count, float* out) {
    constexpr bool kPaired = !std::is_same_v<W, float>;  // needs more registers besides the accumulators
    for (int64_t first = 0; first < count; first += 12) {  // few enough to stay in the first-level cache
        const int64_t some = std::min<int64_t>(12, count - first);
        const W* const weights = w + first * depth;
        int64_t m = 0;
        for (; m + 4 <= rows; m += 4)
            dots_of_chunk<4, kPaired ? 2 : 3>(x + m * depth, depth, weights, depth, some, out + m * kChunk + first);
        const float* const rest = x + m * depth;
        float* const target = out + m * kChunk + first;
        if (rows - m == 3) dots_of_chunk<3, kPaired ? 3 : 4>(rest, depth, weights, depth, some, target);
        if (rows - m == 2) dots_of_chunk<2, kPaired ? 4 : 6>(rest, depth, weights, depth, some, target);
        if (rows - m == 1) dots_of_chunk<1, kPaired ? 6 : 12>(rest, depth, weights, depth, some, target);
    }
}

// Some ranks of the rows that experts act on: rows `stride` apart.
struct Narrow {
    const float* data;
    int64_t stride, rank;
};

// out [ROWS][VECTORS * 8] += the rows of `narrow` times columns of b [rank, stride].
template <int ROWS, int VECTORS, typename W>
inline void widen(const Narrow& narrow, const W* b, int64_t stride, float* out) {
    Vec total[ROWS][VECTORS];
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++) total[m][v] = load(out + m * kChunk + v * kLanes);
    for (int64_t r = 0; r < narrow.rank; r++)
        for (int v = 0; v < VECTORS; v++) {
            const Vec weight = load(b + r * stride + v * kLanes);
            for (int m = 0; m < ROWS; m++) total[m][v] += narrow.data[m * narrow.stride + r] * weight;
        }
    for (int m = 0; m < ROWS; m++) std::memcpy(out + m * kChunk, total[m], sizeof total[m]);
}

template <int ROWS, typename W>
void widen_chunk(const Narrow& narrow, const W* b, int64_t stride, int64_t count, float* out) {
    int64_t n = 0;
    for (; n + 6 * kLanes <= count; n += 6 * kLanes) widen<ROWS, 6>(narrow, b + n, stride, out + n);
    for (; n + kLanes <= count; n += kLanes) widen<ROWS, 1>(narrow, b + n, stride, out + n);
    for (; n < count; n++)
        for (int m = 0; m < ROWS; m++)
            for (int64_t r = 0; r < narrow.rank; r++)
                out[m * kChunk + n] =
                    std::fma(narrow.data[m * narrow.stride + r], to_float(b[r * stride + n]), out[m * kChunk + n]);
}

template <typename X, typename E>
struct Experts {
    const E* a;     // [rank, depth]
    const X* gate;  // [rows - first_row, rank], rows `gate_stride` apart
    int64_t rank, gate_stride, first_row;
};

// Outputs of one linear among several that are computed as one; the experts of each act on its own outputs only.
template <typename E>
struct Part {
    const E* b_t;  // [rank, width]
    int64_t rank, width;
};

// What one thread computes at once: `count` outputs of one part.
struct Chunk {
    int64_t part, first, count;  // of the part
    int64_t output, rank;        // where the part's outputs and ranks begin among all
};

template <typename E>
std::vector<Chunk> chunks_of(const std::vector<Part<E>>& parts) {
    std::vector<Chunk> chunks;
    int64_t output = 0, rank = 0;
    for (size_t part = 0; part < parts.size(); output += parts[part].width, rank += parts[part].rank, part++)
        for (int64_t first = 0; first < parts[part].width; first += kChunk)
            chunks.push_back({int64_t(part), first, std::min(kChunk, parts[part].width - first), output, rank});
    return chunks;
}

// x [rows, depth], weight [width, depth], bias [width] or null -> y [rows, width], where all parts together are `width`.
template <typename X, typename W, typename E>
void linear(
    const X* x, const W* weight, const X* bias, const Experts<X, E>& experts, const std::vector<Part<E>>& parts,
    int64_t rows, int64_t depth, int64_t width, X* y
) {
    std::vector<float> copy, copy_for_experts;
    const float* const floats = operand<W>(x, rows, depth, copy);
    const float* for_experts = floats;
    if constexpr (!std::is_same_v<W, E>) for_experts = operand<E>(x, rows, depth, copy_for_experts);
    const int64_t gated = experts.rank ? rows - experts.first_row : 0;
    std::vector<float> narrow(gated * experts.rank);
    const int64_t rank_chunks = gated ? (experts.rank + kChunk - 1) / kChunk : 0;
    const std::vector<Chunk> chunks = chunks_of(parts);
    const bool worth_threads = rows * depth * width > (1 << 18);
#pragma omp parallel num_threads(threads) if (threads > 1 && worth_threads)
    {
        std::vector<float> block(rows * kChunk);
#pragma omp for
        for (int64_t chunk = 0; chunk < rank_chunks; chunk++) {
            const int64_t first = chunk * kChunk, count = std::min(kChunk, experts.rank - first);
            multiply(for_experts + experts.first_row * depth, gated, depth, experts.a + first * depth, count, block.data());
            for (int64_t m = 0; m < gated; m++)
                for (int64_t r = 0; r < count; r++)
                    narrow[m * experts.rank + first + r] =
                        block[m * kChunk + r] * to_float(experts.gate[m * experts.gate_stride + first + r]);
        }
#pragma omp for
        for (size_t number = 0; number < chunks.size(); number++) {
            const Chunk& chunk = chunks[number];
            const Part<E>& part = parts[chunk.part];
            const int64_t first = chunk.output + chunk.first, count = chunk.count;
            multiply(floats, rows, depth, weight + first * depth, count, block.data());
            float* const own = block.data() + experts.first_row * kChunk;
            Narrow some{narrow.data() + chunk.rank, experts.rank, part.rank};
            int64_t m = 0;
            for (; m + 2 <= gated; m += 2, some.data += 2 * experts.rank)
                widen_chunk<2>(some, part.b_t + chunk.first, part.width, count, own + m * kChunk);
            if (m < gated) widen_chunk<1>(some, part.b_t + chunk.first, part.width, count, own + m * kChunk);
            for (int64_t row = 0; row < rows; row++)
                for (int64_t n = 0; n < count; n++)
                    store(y + row * width + first + n,
                          block[row * kChunk + n] + (bias ? to_float(bias[first + n]) : 0.0f));
        }
    }
}

// ---- attention -----------------------------------------------------------------------------------------------------

// e^x for x <= 0, to about 1e-7 (polynomial of the Cephes library).
inline Vec exponential(Vec x) {
    x = x < -87.0f ? Vec{} - 87.0f : x;
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it drops the digits behind the point
    const Vec whole = (x * 1.44269504f + round) - round;
    const Vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const IntVec exponent = (__builtin_convertvector(whole, IntVec) + 127) << 23;
    return p * (Vec)exponent;
}

// The scores of `count` keys to weights: e^(score - most), where `most` is the largest ever. Returns their sum.
inline float to_weights(float* scores, int64_t count, float& most) {
    const float least = -std::numeric_limits<float>::max();
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    std::fill(scores + count, scores + padded, least);
    Vec largest = Vec{} + most, total{};
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Vec some = load(scores + i);
        largest = some > largest ? some : largest;
    }
    for (int lane = 0; lane < kLanes; lane++) most = std::max(most, largest[lane]);
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Vec some = load(scores + i), weight = some == least ? Vec{} : exponential(some - most);
        std::memcpy(scores + i, &weight, sizeof weight);
        total += weight;
    }
    const Quad sum = sums(total, Vec{}, Vec{}, Vec{});
    return sum[0];
}

template <typename W>
struct Pool {  // [blocks, block_size, kv_heads, head_dim]
    const W* keys;
    const W* values;
    int64_t block_size, kv_heads, head_dim;
};

constexpr int64_t kTokens = 256;  // looked at together: their scores stay in the nearest cache

// scores[i] = q . key[i] for `count` keys.
template <typename W>
void score(const float* q, const W* const* keys, int64_t count, int64_t head_dim, float* scores) {
    for (int64_t first = 0; first < count; first += 8) {
        const W* key[8];
        for (int i = 0; i < 8; i++) key[i] = keys[std::min(first + i, count - 1)];
        Vec total[8] = {};
        int64_t d = 0;
        for (; d + kLanes <= head_dim; d += kLanes) {
            const Vec query = load(q + d);
            for (int i = 0; i < 8; i++) total[i] += query * load(key[i] + d);
        }
        float sum[8];
        const Quad low = sums(total[0], total[1], total[2], total[3]), high = sums(total[4], total[5], total[6], total[7]);
        std::memcpy(sum, &low, sizeof low);
        std::memcpy(sum + 4, &high, sizeof high);
        for (; d < head_dim; d++)
            for (int i = 0; i < 8; i++) sum[i] += q[d] * to_float(key[i][d]);
        std::copy_n(sum, std::min<int64_t>(8, count - first), scores + first);
    }
}

// out[h][0 .. VECTORS * 8] += sum over i of weights[h][i] * value[i], for HEADS heads at once.
template <int HEADS, int VECTORS, typename W>
inline void mix(const float* weights, const W* const* values, int64_t d, int64_t count, float* out, int64_t out_stride) {
    Vec total[HEADS][VECTORS];
    for (int h = 0; h < HEADS; h++)
        for (int v = 0; v < VECTORS; v++) total[h][v] = load(out + h * out_stride + d + v * kLanes);
    for (int64_t i = 0; i < count; i++)
        for (int v = 0; v < VECTORS; v++) {
            const Vec value = load(values[i] + d + v * kLanes);
            for (int h = 0; h < HEADS; h++) total[h][v] += weights[h * kTokens + i] * value;
        }
    for (int h = 0; h < HEADS; h++) std::memcpy(out + h * out_stride + d, total[h], sizeof total[h]);
}

template <int HEADS, typename W>
void mix_heads(const float* weights, const W* const* values, int64_t count, int64_t head_dim, float* out) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes) mix<HEADS, 4>(weights, values, d, count, out, head_dim);
    for (; d + kLanes <= head_dim; d += kLanes) mix<HEADS, 1>(weights, values, d, count, out, head_dim);
    for (; d < head_dim; d++)
        for (int h = 0; h < HEADS; h++)
            for (int64_t i = 0; i < count; i++) out[h * head_dim + d] += weights[h * kTokens + i] * to_float(values[i][d]);
}

struct Scores {
    float scaling;
    int64_t window;  // 0: none
    float softcap;   // 0: none
};

// One row's query heads of one KV head, `head_stride` apart, over the keys begin .. position: softmax as it goes (online),
// so that any context is read once and needs no memory.
template <typename W>
void attend(
    const W* query, int64_t head_stride, const Pool<W>& pool, const int64_t* table, int64_t position, int64_t kv_head,
    int64_t heads, const Scores& how, W* result
) {
    const int64_t head_dim = pool.head_dim, begin = how.window ? std::max<int64_t>(0, position - how.window + 1) : 0;
    std::vector<float> floats(2 * heads * head_dim + heads * kTokens + 2 * heads);
    float* const q = floats.data();
    float* const out = q + heads * head_dim;
    float* const weights = out + heads * head_dim;
    float* const largest = weights + heads * kTokens;
    float* const total = largest + heads;
    std::fill_n(largest, heads, -std::numeric_limits<float>::max());
    for (int64_t h = 0; h < heads; h++)
        for (int64_t d = 0; d < head_dim; d++) q[h * head_dim + d] = to_float(query[h * head_stride + d]) * how.scaling;
    const W *keys[kTokens], *values[kTokens];
    for (int64_t start = begin; start <= position; start += kTokens) {
        const int64_t count = std::min(kTokens, position + 1 - start);
        for (int64_t i = 0; i < count; i++) {
            const int64_t slot = table[(start + i) / pool.block_size] * pool.block_size + (start + i) % pool.block_size;
            keys[i] = pool.keys + (slot * pool.kv_heads + kv_head) * head_dim;
            values[i] = pool.values + (slot * pool.kv_heads + kv_head) * head_dim;
        }
        for (int64_t h = 0; h < heads; h++) {
            float* const own = weights + h * kTokens;
            score(q + h * head_dim, keys, count, head_dim, own);
            if (how.softcap > 0)
                for (int64_t i = 0; i < count; i++) own[i] = how.softcap * std::tanh(own[i] / how.softcap);
            const float before = largest[h], sum = to_weights(own, count, largest[h]);
            const float shrink = exponential(Vec{} + (before - largest[h]))[0];
            total[h] = total[h] * shrink + sum;
            for (int64_t d = 0; d < head_dim; d++) out[h * head_dim + d] *= shrink;
        }
        int64_t h = 0;
        for (; h + 3 <= heads && heads - h != 4; h += 3)
            mix_heads<3>(weights + h * kTokens, values, count, head_dim, out + h * head_dim);
        for (; h + 2 <= heads; h += 2)
            mix_heads<2>(weights + h * kTokens, values, count, head_dim, out + h * head_dim);
        if (h < heads) mix_heads<1>(weights + h * kTokens, values, count, head_dim, out + h * head_dim);
    }
    for (int64_t h = 0; h < heads; h++)
        for (int64_t d = 0; d < head_dim; d++)
            store(result + h * head_dim + d, out[h * head_dim + d] / total[h]);
}

// ---- norm: y = x / sqrt(mean(x^2) + eps) * weight ------------------------------------------------------------------

template <typename W>
void norm(const W* x, const W* weight, double eps, int64_t rows, int64_t depth, W* y) {
    for (int64_t row = 0; row < rows; row++, x += depth, y += depth) {
        Vec total{};
        int64_t k = 0;
        for (; k + kLanes <= depth; k += kLanes) {
            const Vec some = load(x + k);
            total += some * some;
        }
        float sum = sums(total, Vec{}, Vec{}, Vec{})[0];
        for (; k < depth; k++) sum += to_float(x[k]) * to_float(x[k]);
        const float scale = 1.0f / std::sqrt(sum / depth + float(eps));
        for (k = 0; k < depth; k++) store(y + k, to_float(x[k]) * scale * to_float(weight[k]));
    }
}

// ---- rotation: RoPE of pairs half a head apart ----------------------------------------------------------------------

inline float rounded(float value, float*) { return value; }

inline float rounded(float value, bfloat16* as) {
    store(as, value);
    return to_float(*as);
}

// One head: x, cos and sin [depth] -> y [depth]. Rounds where the formula in torch does: after every product.
template <typename W>
void rotate(const W* x, const W* cos, const W* sin, int64_t depth, W* y) {
    const int64_t half = depth / 2;
    W spare;
    for (int64_t i = 0; i < half; i++) {
        const float low = to_float(x[i]), high = to_float(x[half + i]);
        store(y + i, rounded(low * to_float(cos[i]), &spare) - rounded(high * to_float(sin[i]), &spare));
        store(y + half + i, rounded(high * to_float(cos[half + i]), &spare) + rounded(low * to_float(sin[half + i]), &spare));
    }
}

// ---- SwiGLU's product: y = g / (1 + e^-g) * u ------------------------------------------------------------------------

inline Vec silu(Vec x) {
    const Vec small = exponential(x < 0.0f ? x : -x);  // of -|x|: it cannot overflow
    return x * (x < 0.0f ? small : Vec{} + 1.0f) / (small + 1.0f);
}

// In place of g [count].
inline void gated_product(float* g, const float* u, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Vec value = silu(load(g + i)) * load(u + i);
        std::memcpy(g + i, &value, sizeof value);
    }
    for (; i < count; i++) g[i] = silu(Vec{} + g[i])[0] * u[i];
}

// ---- what AOTInductor calls ----------------------------------------------------------------------------------------

// A tensor that somebody else owns; none where there is no handle.
class Tensor {
public:
    explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
    explicit Tensor(const AtenTensorHandle* handle) : handle_(handle ? *handle : nullptr) {}

    explicit operator bool() const { return handle_ != nullptr; }

    template <typename T>
    T* data() const {
        void* pointer = nullptr;
        if (handle_) aoti_torch_get_data_ptr(handle_, &pointer);
        return static_cast<T*>(pointer);
    }

    int64_t dims() const {
        int64_t dims = 0;
        aoti_torch_get_dim(handle_, &dims);
        return dims;
    }

    int64_t size(int64_t dim) const {
        int64_t size = 0;
        aoti_torch_get_size(handle_, dim, &size);
        return size;
    }

    int64_t stride(int64_t dim) const {
        int64_t stride = 0;
        aoti_torch_get_stride(handle_, dim, &stride);
        return stride;
    }

    bool has(int32_t dtype) const {
        int32_t own = -1;
        aoti_torch_get_dtype(handle_, &own);
        return own == dtype;
    }

    int64_t numel() const {
        int64_t numel = 0;
        aoti_torch_get_numel(handle_, &numel);
        return numel;
    }

    // Whether it is there and has the other's dtype, or is not there.
    bool is_like(const Tensor& other) const {
        int32_t dtype = -1;
        aoti_torch_get_dtype(other.handle_, &dtype);
        return !handle_ || has(dtype);
    }

    // The same, or it is there and narrower.
    bool is_no_wider_than(const Tensor& other) const {
        return is_like(other) || (has(aoti_torch_dtype_bfloat16()) && other.has(aoti_torch_dtype_float32()));
    }

    // Whether the dimensions from `first` on lie without gaps, last one fastest.
    bool is_dense(int64_t dims, int64_t first = 0) const {
        int64_t expected = 1;
        for (int64_t dim = dims - 1; dim >= first; dim--) {
            if (size(dim) > 1 && stride(dim) != expected) return false;
            expected *= size(dim);
        }
        return true;
    }

private:
    AtenTensorHandle handle_;
};

// What an adapted linear is made of; without experts a and gate are missing.
struct Linear {
    Tensor weight, bias, a, gate;
    std::vector<Tensor> b_t;  // of each part
    int64_t first_row;
    int64_t gate_offset = 0;  // where its ranks begin in the rows of the gate

    int64_t depth() const { return weight.size(1); }
    int64_t width() const { return weight.size(0); }
};

template <typename X, typename W, typename E>
void linear_with(const X* x, int64_t rows, const Linear& own, X* y) {
    Experts<X, E> experts{};
    std::vector<Part<E>> parts;
    if (own.a) {
        const X* const gate = own.gate.data<X>() + own.gate_offset;
        experts = {own.a.data<E>(), gate, own.a.size(0), own.gate.stride(0), own.first_row};
        for (const Tensor& b_t : own.b_t) parts.push_back({b_t.data<E>(), b_t.size(0), b_t.size(1)});
    } else {
        parts.push_back({nullptr, 0, own.width()});
    }
    linear(x, own.weight.data<W>(), own.bias.data<X>(), experts, parts, rows, own.depth(), own.width(), y);
}

template <typename X>
void linear_of(const X* x, int64_t rows, const Linear& own, X* y) {
    if constexpr (std::is_same_v<X, float>) {
        const bool narrow_experts = own.a && own.a.has(aoti_torch_dtype_bfloat16());
        if (own.weight.has(aoti_torch_dtype_bfloat16())) {
            (narrow_experts ? linear_with<X, bfloat16, bfloat16> : linear_with<X, bfloat16, float>)(x, rows, own, y);
        } else {
            (narrow_experts ? linear_with<X, float, bfloat16> : linear_with<X, float, float>)(x, rows, own, y);
        }
    } else {
        linear_with<X, X, X>(x, rows, own, y);
    }
}

// Rows of heads, wherever they lie: row r's head h begins at data + r * row_stride + h * head_stride.
template <typename W>
struct Heads {
    W* data;
    int64_t rows, heads, row_stride, head_stride;

    W* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

template <typename W>
void attention_of(
    const Heads<W>& query, const Tensor& keys, const Tensor& values, const Tensor& table, const Tensor& positions,
    const Scores& how, const Heads<W>& result
) {
    const Pool<W> pool{keys.data<W>(), values.data<W>(), keys.size(1), keys.size(2), keys.size(3)};
    const int64_t group = query.heads / pool.kv_heads, width = table.size(1), stride = positions.stride(0);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < query.rows; row++)
        for (int64_t kv_head = 0; kv_head < pool.kv_heads; kv_head++) {
            attend<W>(
                query.at(row, kv_head * group), query.head_stride, pool, table.data<int64_t>() + row * width,
                positions.data<int64_t>()[row * stride], kv_head, group, how, result.at(row, kv_head * group));
        }
}

bool is_known(const Tensor& tensor) {
    return tensor.has(aoti_torch_dtype_float32()) || tensor.has(aoti_torch_dtype_bfloat16());
}

// A new tensor of the dtype of `like`; `order` names its dimensions from the slowest to the fastest, if not the first to the
// last.
AOTITorchError new_tensor(
    const Tensor& like, int64_t dims, const int64_t* sizes, AtenTensorHandle* result, const int64_t* order = nullptr
) {
    int64_t strides[kMostDims];
    for (int64_t i = dims - 1, stride = 1; i >= 0; i--) {
        const int64_t dim = order ? order[i] : i;
        strides[dim] = stride;
        stride *= sizes[dim];
    }
    const int32_t dtype = like.has(aoti_torch_dtype_float32()) ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
    return aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, result);
}

// Whether its tensors are of one piece and fit together, and what is added or multiplied with them is of the dtype of x.
bool is_sound(const Linear& own, const Tensor& x) {
    if (!own.bias.is_like(x) || !own.gate.is_like(x) || !own.weight.is_no_wider_than(x) || !own.a.is_no_wider_than(x))
        return false;
    if (!own.weight || !own.weight.is_dense(2) || (own.bias && own.bias.numel() != own.width())) return false;
    if (!own.a) return true;
    int64_t rank = 0, width = 0;
    for (const Tensor& b_t : own.b_t) {
        if (!b_t.is_like(own.a) || !b_t.is_dense(2)) return false;
        rank += b_t.size(0);
        width += b_t.size(1);
    }
    return own.a.is_dense(2) && own.a.size(1) == own.depth() && own.gate && own.gate.is_dense(2, 1) &&
        rank == own.a.size(0) && own.gate_offset + rank <= own.gate.size(1) && width == own.width();
}

// Whether it can be computed for that many rows of x.
bool takes(const Linear& own, int64_t rows) {
    return !own.a || (own.first_row >= 0 && own.gate.size(0) == rows - own.first_row);
}

bool fits(const Tensor& x, const Linear& own) {
    const int64_t dims = x.dims();
    return dims <= kMostDims && is_known(x) && x.is_dense(dims) && is_sound(own, x) &&
        x.size(dims - 1) == own.depth() && takes(own, x.numel() / own.depth());
}

AOTITorchError run(const Tensor& x, const Linear& own, AtenTensorHandle* result) {
    if (!fits(x, own)) return AOTI_TORCH_FAILURE;
    const int64_t dims = x.dims();
    int64_t sizes[kMostDims];
    for (int64_t dim = 0; dim < dims; dim++) sizes[dim] = dim == dims - 1 ? own.weight.size(0) : x.size(dim);
    if (new_tensor(x, dims, sizes, result) != AOTI_TORCH_SUCCESS) return AOTI_TORCH_FAILURE;
    const int64_t rows = x.numel() / own.depth();
    if (x.has(aoti_torch_dtype_float32())) {
        linear_of(x.data<float>(), rows, own, Tensor(*result).data<float>());
    } else {
        linear_of(x.data<bfloat16>(), rows, own, Tensor(*result).data<bfloat16>());
    }
    return AOTI_TORCH_SUCCESS;
}

// [..., rows, heads, head_dim]
template <typename W>
Heads<W> rows_first(const Tensor& tensor) {
    const int64_t rows = tensor.dims() - 3, heads = rows + 1;
    return {tensor.data<W>(), tensor.size(rows), tensor.size(heads), tensor.stride(rows), tensor.stride(heads)};
}

// [1, heads, rows, head_dim]
template <typename W>
Heads<W> heads_first(const Tensor& tensor) {
    return {tensor.data<W>(), tensor.size(2), tensor.size(1), tensor.stride(2), tensor.stride(1)};
}

bool is_pool(const Tensor& keys, const Tensor& values, const Tensor& table) {
    return keys.dims() == 4 && keys.is_dense(4) && values.dims() == 4 && values.is_dense(4) && table.dims() == 2 &&
        table.is_dense(2) && table.has(aoti_torch_dtype_int64());
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_decode_linear(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, AtenTensorHandle* a, AtenTensorHandle* b_t,
    AtenTensorHandle* gate, int64_t first_row, AtenTensorHandle* result
) {
    return run(Tensor(x), {Tensor(weight), Tensor(bias), Tensor(a), Tensor(gate), {Tensor(b_t)}, first_row}, result);
}

AOTITorchError aoti_torch_cpu_decode_attention(
    AtenTensorHandle query_, AtenTensorHandle keys_, AtenTensorHandle values_, AtenTensorHandle table_,
    AtenTensorHandle positions_, double scaling, int64_t window, double softcap, AtenTensorHandle* result
) {
    const Tensor query(query_), keys(keys_), values(values_), table(table_), positions(positions_);
    if (!is_known(query) || !keys.is_like(query) || !values.is_like(query)) return AOTI_TORCH_FAILURE;
    if (!query.is_dense(3) || !is_pool(keys, values, table)) return AOTI_TORCH_FAILURE;
    const int64_t sizes[] = {query.size(0), query.size(1), query.size(2)};
    if (new_tensor(query, 3, sizes, result) != AOTI_TORCH_SUCCESS) return AOTI_TORCH_FAILURE;
    const Tensor attended(*result);
    const Scores how{float(scaling), window, float(softcap)};
    if (query.has(aoti_torch_dtype_float32())) {
        attention_of<float>(rows_first<float>(query), keys, values, table, positions, how, rows_first<float>(attended));
    } else {
        attention_of<bfloat16>(
            rows_first<bfloat16>(query), keys, values, table, positions, how, rows_first<bfloat16>(attended));
    }
    return AOTI_TORCH_SUCCESS;
}

}  // extern "C"

// ---- what eager steps call, through torch's dispatcher ---------------------------------------------------------------

namespace {

using Given = torch::stable::Tensor;
using Maybe = std::optional<Given>;

constexpr int64_t kRowsFirst[] = {0, 2, 1, 3};  // in memory, of [1, heads, rows, head_dim]

AtenTensorHandle handle(const Maybe& tensor) { return tensor ? tensor->get() : nullptr; }

Given checked(AOTITorchError error, AtenTensorHandle result) {
    if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("wanted are dense float or bfloat16 tensors of fitting shapes");
    return Given(result);
}

Given decode_linear(Given x, Given weight, Maybe bias, Maybe a, Maybe b_t, Maybe gate, int64_t first_row) {
    AtenTensorHandle result = nullptr, handles[] = {handle(bias), handle(a), handle(b_t), handle(gate)};
    const AOTITorchError error = aoti_torch_cpu_decode_linear(
        x.get(), weight.get(), &handles[0], &handles[1], &handles[2], &handles[3], first_row, &result);
    return checked(error, result);
}

Given decode_siblings(Given x, Given weight, Maybe bias, Given a, std::vector<Given> b_t, Given gate, int64_t first_row) {
    Linear own{Tensor(weight.get()), Tensor(handle(bias)), Tensor(a.get()), Tensor(gate.get()), {}, first_row};
    for (const Given& one : b_t) own.b_t.emplace_back(one.get());
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = run(Tensor(x.get()), own, &result);
    return checked(error, result);
}

// One of the rows [1, heads, rows, head_dim] that a step brings.
bool is_row_of(const Tensor& tensor, const Tensor& query, int64_t heads) {
    return tensor.is_like(query) && tensor.dims() == 4 && tensor.size(0) == 1 && tensor.size(1) == heads &&
        tensor.size(2) == query.size(2) && tensor.size(3) == query.size(3) && tensor.is_dense(4, 3);
}

template <typename W>
void write(const Heads<W>& from, const int64_t* slots, const Tensor& pool) {
    const int64_t depth = pool.size(3);
    for (int64_t row = 0; row < from.rows; row++)
        for (int64_t head = 0; head < from.heads; head++)
            std::copy_n(from.at(row, head), depth, pool.data<W>() + (slots[row] * from.heads + head) * depth);
}

template <typename W>
void self_attention_of(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
    const int64_t* slots, const Tensor& table, const Tensor& positions, const Scores& how, const Tensor& result
) {
    write(heads_first<W>(key), slots, keys);
    write(heads_first<W>(value), slots, values);
    attention_of<W>(heads_first<W>(query), keys, values, table, positions, how, rows_first<W>(result));
}

Given decode_self_attention(
    Given query_, Given key_, Given value_, Given keys_, Given values_, Given slots_, Given table_, Given positions_,
    double scaling, int64_t window, double softcap
) {
    const Tensor query(query_.get()), key(key_.get()), value(value_.get()), keys(keys_.get()), values(values_.get());
    const Tensor slots(slots_.get()), table(table_.get()), positions(positions_.get());
    const bool known = is_known(query) && keys.is_like(query) && values.is_like(query) && is_pool(keys, values, table);
    if (!known || query.dims() != 4 || !is_row_of(query, query, query.size(1)) || !is_row_of(key, query, keys.size(2)) ||
        !is_row_of(value, query, keys.size(2)) || !slots.is_dense(1) || slots.size(0) != query.size(2))
        return checked(AOTI_TORCH_FAILURE, nullptr);
    const int64_t sizes[] = {1, query.size(2), query.size(1), query.size(3)};
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(query, 4, sizes, &result);
    if (error == AOTI_TORCH_SUCCESS) {
        const Tensor attended(result);
        const int64_t* const at = slots.data<int64_t>();
        const Scores how{float(scaling), window, float(softcap)};
        if (query.has(aoti_torch_dtype_float32())) {
            self_attention_of<float>(query, key, value, keys, values, at, table, positions, how, attended);
        } else {
            self_attention_of<bfloat16>(query, key, value, keys, values, at, table, positions, how, attended);
        }
    }
    return checked(error, result);
}

template <typename W>
void rotation_of(const Heads<W>& x, const Tensor& cos, const Tensor& sin, const Heads<W>& y) {
    const int64_t depth = cos.size(2);
    for (int64_t row = 0; row < x.rows; row++)
        for (int64_t head = 0; head < x.heads; head++)
            rotate<W>(x.at(row, head), cos.data<W>() + row * depth, sin.data<W>() + row * depth, depth, y.at(row, head));
}

Given decode_rotate(Given given, Given cos_, Given sin_) {
    const Tensor x(given.get()), cos(cos_.get()), sin(sin_.get());
    const bool like = x.dims() == 4 && is_known(x) && is_row_of(x, x, x.size(1)) && cos.is_like(x) && sin.is_like(x);
    if (!like || !cos.is_dense(3) || !sin.is_dense(3) || cos.size(1) != x.size(2) || cos.size(2) != x.size(3))
        return checked(AOTI_TORCH_FAILURE, nullptr);
    const int64_t sizes[] = {1, x.size(1), x.size(2), x.size(3)};
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(x, 4, sizes, &result, kRowsFirst);
    if (error == AOTI_TORCH_SUCCESS) {
        const Tensor y(result);
        if (x.has(aoti_torch_dtype_float32())) {
            rotation_of(heads_first<float>(x), cos, sin, heads_first<float>(y));
        } else {
            rotation_of(heads_first<bfloat16>(x), cos, sin, heads_first<bfloat16>(y));
        }
    }
    return checked(error, result);
}

Given decode_norm(Given given, Given weight_, double eps) {
    const Tensor x(given.get()), weight(weight_.get());
    const int64_t dims = x.dims(), depth = weight.size(0);
    if (dims > kMostDims || !is_known(x) || !weight.is_like(x) || !x.is_dense(dims) || x.size(dims - 1) != depth)
        return checked(AOTI_TORCH_FAILURE, nullptr);
    int64_t sizes[kMostDims];
    for (int64_t dim = 0; dim < dims; dim++) sizes[dim] = x.size(dim);
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(x, dims, sizes, &result);
    if (error == AOTI_TORCH_SUCCESS) {
        const Tensor y(result);
        if (x.has(aoti_torch_dtype_float32())) {
            norm(x.data<float>(), weight.data<float>(), eps, x.numel() / depth, depth, y.data<float>());
        } else {
            norm(x.data<bfloat16>(), weight.data<bfloat16>(), eps, x.numel() / depth, depth, y.data<bfloat16>());
        }
    }
    return checked(error, result);
}

// ---- a decoder layer: h = x + O attention(rotated Q n, rotated K n, V n), y = h + D (silu(G m) * U m), n and m normed

// In the order in which decode_kernels.py gives them; what is missing is empty there.
enum { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kLinears };
enum { kInputNorm, kInnerNorm, kQueryNorm, kKeyNorm, kNorms };
constexpr int64_t kPerLinear = 4;  // weight, bias, a, b_t

struct Layer {
    std::vector<Tensor> norms;
    std::vector<Linear> linears;
    double eps;
};

Tensor or_none(const Given& tensor) {
    const Tensor given(tensor.get());
    return given.numel() ? given : Tensor(static_cast<AtenTensorHandle>(nullptr));
}

Layer layer_of(
    const std::vector<Given>& tensors, const Maybe& gate, const std::vector<int64_t>& gate_offsets, int64_t first_row,
    double eps
) {
    Layer layer{{}, {}, eps};
    for (int number = 0; number < kNorms; number++) layer.norms.push_back(or_none(tensors[number]));
    const Tensor none(static_cast<AtenTensorHandle>(nullptr));
    for (int number = 0; number < kLinears; number++) {
        const Given* const own = tensors.data() + kNorms + kPerLinear * number;
        const Tensor a = gate ? or_none(own[2]) : none, open = a ? Tensor(gate->get()) : none;
        layer.linears.push_back(
            {or_none(own[0]), or_none(own[1]), a, open, {Tensor(own[3].get())}, first_row, gate_offsets[number]});
    }
    return layer;
}

bool is_norm_of(const Tensor& weight, int64_t depth) {
    return weight && weight.has(aoti_torch_dtype_float32()) && weight.is_dense(1) && weight.numel() == depth;
}

// Whether layer, rows and pool go together, all of them float.
bool fits(const Layer& layer, const Tensor& x, const Tensor& cos, const Tensor& keys) {
    for (const Linear& own : layer.linears)
        if (!is_sound(own, x)) return false;
    const int64_t dims = x.dims(), hidden = x.size(dims - 1), rows = x.numel() / hidden, head_dim = keys.size(3);
    const int64_t across = layer.linears[kQuery].width(), inner = layer.linears[kGate].width();
    const int64_t kv_across = keys.size(2) * head_dim;
    const int64_t depths[] = {hidden, hidden, hidden, across, hidden, hidden, inner};
    const int64_t widths[] = {across, kv_across, kv_across, hidden, inner, inner, hidden};
    if (!x.has(aoti_torch_dtype_float32()) || dims > kMostDims || !x.is_dense(dims) || across % kv_across) return false;
    for (int number = 0; number < kLinears; number++) {
        const Linear& own = layer.linears[number];
        if (own.depth() != depths[number] || own.width() != widths[number]) return false;
        if (!takes(own, rows)) return false;
    }
    for (int number = kQueryNorm; number < kNorms; number++)
        if (layer.norms[number] && !is_norm_of(layer.norms[number], head_dim)) return false;
    return is_norm_of(layer.norms[kInputNorm], hidden) && is_norm_of(layer.norms[kInnerNorm], hidden) &&
        cos.numel() == rows * head_dim;
}

// x [rows, hidden] -> y [rows, hidden]
void run_layer(
    const Layer& layer, const float* x, int64_t rows, int64_t hidden, const Tensor& cos, const Tensor& sin,
    const Tensor& keys, const Tensor& values, const int64_t* slots, const Tensor& table, const Tensor& positions,
    const Scores& how, float* y
) {
    const int64_t head_dim = keys.size(3), kv_heads = keys.size(2), heads = layer.linears[kQuery].width() / head_dim;
    const int64_t across = heads * head_dim, kv_across = kv_heads * head_dim, inner = layer.linears[kGate].width();
    std::vector<float> floats(rows * (hidden + 2 * across + 2 * kv_across + 2 * inner));
    float* const normed = floats.data();  // and what a linear gives back to the stream
    float* const query = normed + rows * hidden;
    float* const attended = query + rows * across;
    float* const key = attended + rows * across;
    float* const value = key + rows * kv_across;
    float* const gate = value + rows * kv_across;
    float* const up = gate + rows * inner;
    const auto run = [&](int number, const float* from, float* to) { linear_of(from, rows, layer.linears[number], to); };
    norm(x, layer.norms[kInputNorm].data<float>(), layer.eps, rows, hidden, normed);
    run(kQuery, normed, query);
    run(kKey, normed, key);
    run(kValue, normed, value);
    const auto rotate = [&](float* rotated, int64_t own_heads, const Tensor& weight) {
        if (weight) norm(rotated, weight.data<float>(), layer.eps, rows * own_heads, head_dim, rotated);
        const Heads<float> all{rotated, rows, own_heads, own_heads * head_dim, head_dim};
        rotation_of(all, cos, sin, all);
        return all;
    };
    const Heads<float> queries = rotate(query, heads, layer.norms[kQueryNorm]);
    write(rotate(key, kv_heads, layer.norms[kKeyNorm]), slots, keys);
    write(Heads<float>{value, rows, kv_heads, kv_across, head_dim}, slots, values);
    attention_of(queries, keys, values, table, positions, how, Heads<float>{attended, rows, heads, across, head_dim});
    run(kOutput, attended, normed);
    for (int64_t i = 0; i < rows * hidden; i++) y[i] = x[i] + normed[i];
    norm(y, layer.norms[kInnerNorm].data<float>(), layer.eps, rows, hidden, normed);
    run(kGate, normed, gate);
    run(kUp, normed, up);
    gated_product(gate, up, rows * inner);
    run(kDown, gate, normed);
    for (int64_t i = 0; i < rows * hidden; i++) y[i] += normed[i];
}

Given decode_layer(
    Given x_, std::vector<Given> tensors, Maybe gate, std::vector<int64_t> gate_offsets, int64_t first_row, Given cos_,
    Given sin_, Given keys_, Given values_, Given slots_, Given table_, Given positions_, double eps, double scaling,
    int64_t window
) {
    const Tensor x(x_.get()), cos(cos_.get()), sin(sin_.get()), keys(keys_.get()), values(values_.get());
    const Tensor slots(slots_.get()), table(table_.get()), positions(positions_.get());
    if (tensors.size() != kNorms + kPerLinear * kLinears || gate_offsets.size() != kLinears)
        return checked(AOTI_TORCH_FAILURE, nullptr);
    const Layer layer = layer_of(tensors, gate, gate_offsets, first_row, eps);
    const int64_t dims = x.dims(), hidden = x.size(dims - 1), rows = x.numel() / hidden;
    if (!is_pool(keys, values, table) || !fits(layer, x, cos, keys) || !keys.is_like(x) || !values.is_like(x) ||
        !cos.is_like(x) || !sin.is_like(x) || !cos.is_dense(3) || !sin.is_dense(3) || sin.numel() != cos.numel() ||
        !slots.is_dense(1) || !slots.has(aoti_torch_dtype_int64()) || slots.size(0) != rows || table.size(0) != rows ||
        !positions.has(aoti_torch_dtype_int64()) || positions.size(0) != rows)
        return checked(AOTI_TORCH_FAILURE, nullptr);
    int64_t sizes[kMostDims];
    for (int64_t dim = 0; dim < dims; dim++) sizes[dim] = x.size(dim);
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(x, dims, sizes, &result);
    if (error == AOTI_TORCH_SUCCESS)
        run_layer(
            layer, x.data<float>(), rows, hidden, cos, sin, keys, values, slots.data<int64_t>(), table, positions,
            {float(scaling), window, 0.0f}, Tensor(result).data<float>());
    return checked(error, result);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(xlora, CPU, library) {
    library.impl("decode_layer", TORCH_BOX(&decode_layer));
    library.impl("decode_linear", TORCH_BOX(&decode_linear));
    library.impl("decode_siblings", TORCH_BOX(&decode_siblings));
    library.impl("decode_self_attention", TORCH_BOX(&decode_self_attention));
    library.impl("decode_rotate", TORCH_BOX(&decode_rotate));
    library.impl("decode_norm", TORCH_BOX(&decode_norm));
}

extern "C" void xlora_set_threads(int count) { threads = count; }
