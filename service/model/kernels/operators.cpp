// The operations where a step spends its time on a CPU, for rows that attend one by one: adapted linears, rotations, paged attention,
// norms, layers made of these, gate and classifier.
//
// Everything is read where it lies: weights as the model stores them, keys and values through the block table. Storage is
// float or bfloat16, arithmetic is float; weights may be narrower than what they are multiplied with.
//
// torch calls these through its dispatcher. decode_kernels.py declares the operators and says what they compute.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "floats.h"
#include "helpers.h"
#include "linear.h"
#include "tensors.h"
#include "vectors.h"

namespace {

using Given = torch::stable::Tensor;
using Maybe = std::optional<Given>;

constexpr int64_t kRowsFirst[] = {0, 2, 1, 3};  // in memory, of [1, heads, rows, head_dim]

Tensor or_none(const Maybe& tensor) { return Tensor(tensor ? tensor->get() : nullptr); }

Given checked(AOTITorchError error, AtenTensorHandle result) {
    if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("wanted are dense float or bfloat16 tensors of fitting shapes");
    return Given(result);
}

Given decode_linear(Given x, Given weight, Maybe bias, Maybe a, Maybe b_t, Maybe gate, int64_t first_row) {
    AtenTensorHandle result = nullptr;
    const Linear own{Tensor(weight.get()), or_none(bias), or_none(a), or_none(gate), {or_none(b_t)}, first_row};
    const AOTITorchError error = run(Tensor(x.get()), own, &result);
    return checked(error, result);
}

Given decode_siblings(Given x, Given weight, Maybe bias, Given a, std::vector<Given> b_t, Given gate, int64_t first_row) {
    Linear own{Tensor(weight.get()), or_none(bias), Tensor(a.get()), Tensor(gate.get()), {}, first_row};
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
    attention_of<W>(heads_first<W>(query), query, keys, values, table, positions, how, rows_first<W>(result));
}

Given decode_self_attention(
    Given query_, Given key_, Given value_, Given keys_, Given values_, Given slots_, Given table_, Given positions_,
    double scaling, int64_t window, double softcap
) {
    const Tensor query(query_.get()), key(key_.get()), value(value_.get()), keys(keys_.get()), values(values_.get());
    const Tensor slots(slots_.get()), table(table_.get()), positions(positions_.get());
    const bool known = is_known(query) && keys.is_like(query) && values.is_like(query) && query.dims() == 4 &&
        is_pool_of(keys, values, table, positions, query.size(2), query.size(1), query.size(3));
    if (!known || !is_row_of(query, query, query.size(1)) || !is_row_of(key, query, keys.size(2)) ||
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

Tensor or_none(const Given& tensor) {
    const Tensor given(tensor.get());
    return given.numel() ? given : Tensor(nullptr);
}

// ---- the gate: from stored scalings to the weights of ranks, from hidden states to stored scalings ---------------------

// Rows of scalings, wherever they are stored: [slots, sites, experts]
bool is_store(const Tensor& gate_rows) {
    return gate_rows.dims() == 3 && gate_rows.has(aoti_torch_dtype_float32()) && gate_rows.is_dense(3);
}

bool is_index(const Tensor& tensor) {
    return tensor.dims() == 1 && tensor.has(aoti_torch_dtype_int64()) && tensor.is_dense(1);
}

Given decode_spread(Given gate_rows_, Given slots_, Given rank_index_, int64_t first_row, double weight) {
    const Tensor gate_rows(gate_rows_.get()), slots(slots_.get()), rank_index(rank_index_.get());
    if (!is_store(gate_rows) || !is_index(slots) || !is_index(rank_index) || first_row < 0 ||
        first_row > slots.numel())
        return checked(AOTI_TORCH_FAILURE, nullptr);
    const int64_t rows = slots.numel() - first_row, ranks = rank_index.numel(), width = gate_rows.size(1) * gate_rows.size(2);
    const int64_t sizes[] = {rows, ranks};
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(gate_rows, 2, sizes, &result);
    if (error == AOTI_TORCH_SUCCESS) {
        const int64_t *const slot = slots.data<int64_t>() + first_row, *const index = rank_index.data<int64_t>();
        float* const spread = Tensor(result).data<float>();
        for (int64_t row = 0; row < rows; row++) {
            const float* const stored = gate_rows.data<float>() + slot[row] * width;
            for (int64_t r = 0; r < ranks; r++) spread[row * ranks + r] = stored[index[r]] * float(weight);
        }
    }
    return checked(error, result);
}

// Softmax of `sites` times `experts` logits at this temperature.
void softmax(const float* logits, int64_t sites, int64_t experts, float temperature, float* result) {
    const int64_t count = sites * experts;
    const Floats floats(count + kLanes);
    float* const powers = floats.data();
    for (int64_t site = 0; site < sites; site++) {
        const float* const own = logits + site * experts;
        const float most = *std::max_element(own, own + experts);
        for (int64_t e = 0; e < experts; e++) powers[site * experts + e] = (own[e] - most) / temperature;
    }
    std::fill_n(powers + count, kLanes, 0.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Vec some = exponential(load(powers + i));
        std::memcpy(powers + i, &some, sizeof some);
    }
    for (int64_t first = 0; first < count; first += experts) {
        float total = 0;
        for (int64_t e = 0; e < experts; e++) total += powers[first + e];
        for (int64_t e = 0; e < experts; e++) result[first + e] = powers[first + e] / total;
    }
}

// The first rows of hidden [.., H] through linears with biases, or without where these are empty -> logits
// [rows, sites, experts]; their scalings go to `slots` of gate_rows.
Given decode_scalings(
    Given hidden_, std::vector<Given> layers, bool relu, std::optional<double> temperature, Given gate_rows_, Given slots_,
    int64_t rows
) {
    const Tensor hidden(hidden_.get()), gate_rows(gate_rows_.get()), slots(slots_.get());
    const int64_t count = int64_t(layers.size()) / 2;
    bool known = hidden.dims() == 2 && hidden.has(aoti_torch_dtype_float32()) && hidden.is_dense(2) && is_store(gate_rows) &&
        is_index(slots) && rows <= slots.numel() && rows <= hidden.size(0) && count > 0;
    int64_t width = known ? hidden.size(1) : 0, widest = 0;
    std::vector<Linear> linears;
    for (int64_t number = 0; known && number < count; number++) {
        const Tensor none(nullptr);
        const Linear& own = linears.emplace_back(
            Linear{Tensor(layers[2 * number].get()), or_none(layers[2 * number + 1]), none, none, {}, 0});
        known = own.weight.dims() == 2 && is_sound(own, hidden) && own.depth() == width;
        width = known ? own.width() : 0;
        widest = std::max(widest, width);
    }
    if (!known || width != gate_rows.size(1) * gate_rows.size(2)) return checked(AOTI_TORCH_FAILURE, nullptr);
    const int64_t sizes[] = {rows, gate_rows.size(1), gate_rows.size(2)};
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(hidden, 3, sizes, &result);
    if (error != AOTI_TORCH_SUCCESS) return checked(error, result);
    float* const logits = Tensor(result).data<float>();
    const Floats between(2 * rows * widest);
    const float* x = hidden.data<float>();
    for (int64_t number = 0; number < count; number++) {
        const bool last = number + 1 == count;
        float* const y = last ? logits : between.data() + number % 2 * rows * widest;
        linear_of(x, rows, linears[number], y);
        if (relu && !last)
            for (int64_t i = 0; i < rows * linears[number].width(); i++) y[i] = std::max(y[i], 0.0f);
        x = y;
    }
    for (int64_t row = 0; row < rows; row++) {
        float* const stored = gate_rows.data<float>() + slots.data<int64_t>()[row] * width;
        const float* const own = logits + row * width;
        if (temperature) {
            softmax(own, sizes[1], sizes[2], float(*temperature), stored);
        } else {
            std::copy_n(own, width, stored);
        }
    }
    return checked(error, result);
}

// ---- the draft head: h + D silu(U h + b) of scaling rows ---------------------------------------------------------------

// rows [L] of hidden [T, H], the first `scaling_rows` of which draft; tensors U [R, H], b [R], D [H, R] -> [L, H]
Given decode_drafting(Given hidden_, Given rows_, int64_t scaling_rows, std::vector<Given> tensors) {
    const Tensor hidden(hidden_.get()), rows(rows_.get()), none(nullptr);
    if (hidden.dims() != 2 || !hidden.has(aoti_torch_dtype_float32()) || !hidden.is_dense(2) || !is_index(rows) ||
        tensors.size() != 3)
        return checked(AOTI_TORCH_FAILURE, nullptr);
    const Linear up{Tensor(tensors[0].get()), Tensor(tensors[1].get()), none, none, {}, 0};
    const Linear down{Tensor(tensors[2].get()), none, none, none, {}, 0};
    const int64_t width = hidden.size(1);
    if (up.weight.dims() != 2 || down.weight.dims() != 2 || !is_sound(up, hidden) || !is_sound(down, hidden) ||
        up.depth() != width || down.width() != width || up.width() != down.depth())
        return checked(AOTI_TORCH_FAILURE, nullptr);
    const int64_t count = rows.numel(), sizes[] = {count, width};
    for (int64_t i = 0; i < count; i++)
        if (rows.data<int64_t>()[i] < 0 || rows.data<int64_t>()[i] >= hidden.size(0))
            return checked(AOTI_TORCH_FAILURE, nullptr);
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(hidden, 2, sizes, &result);
    if (error != AOTI_TORCH_SUCCESS) return checked(error, result);
    float* const seen = Tensor(result).data<float>();
    const Floats floats(count * (2 * width + up.width()));
    float* const drafts = floats.data();
    float* const changes = drafts + count * width;
    float* const between = changes + count * width;
    int64_t drafting = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = rows.data<int64_t>()[i];
        std::copy_n(hidden.data<float>() + row * width, width, seen + i * width);
        if (row < scaling_rows) std::copy_n(seen + i * width, width, drafts + drafting++ * width);
    }
    if (!drafting) return checked(error, result);
    linear_of(drafts, drafting, up, between);
    silu(between, drafting * up.width());
    linear_of(between, drafting, down, changes);
    const float* change = changes;
    for (int64_t i = 0; i < count; i++) {
        if (rows.data<int64_t>()[i] >= scaling_rows) continue;
        for (int64_t k = 0; k < width; k++) seen[i * width + k] += change[k];
        change += width;
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

Layer layer_of(
    const std::vector<Given>& tensors, const Maybe& gate, const std::vector<int64_t>& gate_offsets, int64_t first_row,
    double eps
) {
    Layer layer{{}, {}, eps};
    for (int number = 0; number < kNorms; number++) layer.norms.push_back(or_none(tensors[number]));
    const Tensor none(nullptr);
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
    const Floats floats(rows * (hidden + 2 * across + 2 * kv_across + 2 * inner));
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
    const Tensor none(nullptr);
    attention_of(queries, none, keys, values, table, positions, how, Heads<float>{attended, rows, heads, across, head_dim});
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
    if (keys.dims() != 4 || !fits(layer, x, cos, keys) || !keys.is_like(x) || !values.is_like(x) || !cos.is_like(x) ||
        !sin.is_like(x) || !cos.is_dense(3) || !sin.is_dense(3) || sin.numel() != cos.numel() || !is_index(slots) ||
        slots.numel() != rows ||
        !is_pool_of(keys, values, table, positions, rows, layer.linears[kQuery].width() / keys.size(3), keys.size(3)))
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
    library.impl("decode_drafting", TORCH_BOX(&decode_drafting));
    library.impl("decode_layer", TORCH_BOX(&decode_layer));
    library.impl("decode_scalings", TORCH_BOX(&decode_scalings));
    library.impl("decode_spread", TORCH_BOX(&decode_spread));
    library.impl("decode_linear", TORCH_BOX(&decode_linear));
    library.impl("decode_siblings", TORCH_BOX(&decode_siblings));
    library.impl("decode_self_attention", TORCH_BOX(&decode_self_attention));
    library.impl("decode_rotate", TORCH_BOX(&decode_rotate));
    library.impl("decode_norm", TORCH_BOX(&decode_norm));
}

extern "C" {

void xlora_set_helpers(int count, int guests) { Helpers::the().set(count, guests); }

int64_t xlora_repeated_chunks() { return Helpers::the().repeated(); }

}  // extern "C"
