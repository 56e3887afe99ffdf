// The operators of the native step: whole decoder layers with the experts of their linears, single linears and norms, the
// gate, the draft head and the draft layer.
//
// Tensors are read in place: weights as the model stores them, keys and values through the block table. Arithmetic is float;
// weights may be bfloat16.
//
// torch calls them through its dispatcher; ../operators.py declares and documents them. They check their arguments: tensors
// that do not fit raise an error, and are never read out of bounds.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "elementwise.h"
#include "gate.h"
#include "helpers.h"
#include "layer.h"
#include "tensors.h"

namespace {

using Given = torch::stable::Tensor;
using Maybe = std::optional<Given>;

void require(bool fits) {
    if (!fits) throw std::runtime_error("wanted are dense tensors of floats (weights: or bfloat16) of fitting shapes");
}

Tensor tensor_of(const Given& given) { return Tensor(given.get()); }
Tensor tensor_of(const Maybe& given) { return Tensor(given ? given->get() : nullptr); }

// In a list, an empty tensor stands for a missing one.
Tensor or_none(const Given& given) { return Tensor(tensor_of(given).numel() ? given.get() : nullptr); }

Given new_floats(const std::vector<int64_t>& sizes) {
    AtenTensorHandle result = nullptr;
    if (new_tensor(int64_t(sizes.size()), sizes.data(), &result) != AOTI_TORCH_SUCCESS)
        throw std::runtime_error("no memory for a tensor");
    return Given(result);
}

float* floats_of(const Given& given) { return tensor_of(given).data<float>(); }

Given op_linear(Given x_, Given weight, Maybe bias, Maybe a, Maybe b_t, Maybe gate, int64_t first_row) {
    const Tensor x = tensor_of(x_);
    const Linear own{tensor_of(weight), tensor_of(bias), tensor_of(a), tensor_of(b_t), tensor_of(gate), first_row};
    require(is_dense_floats(x, 2) && own.is_sound() && x.size(1) == own.depth() && own.takes(x.size(0)));
    const Given y = new_floats({x.size(0), own.width()});
    own.run(x.data<float>(), x.size(0), floats_of(y));
    return y;
}

Given op_norm(Given x_, Given weight_, double eps) {
    const Tensor x = tensor_of(x_), weight = tensor_of(weight_);
    require(is_dense_floats(x, 2) && is_dense_floats(weight, 1) && x.size(1) == weight.numel());
    const Given y = new_floats({x.size(0), x.size(1)});
    norm(x.data<float>(), weight.data<float>(), eps, x.size(0), x.size(1), floats_of(y));
    return y;
}

constexpr size_t kPerLinear = 4;  // weight, bias, a, b_t
constexpr size_t kPerLayer = Layer::kNorms + kPerLinear * Layer::kLinears;

// `own` are kPerLayer tensors: the norms, then those of every linear. Without a gate there are no experts.
Layer layer_of(const Given* own, const Tensor& gate, const int64_t* gate_offsets, int64_t first_row, double eps) {
    Layer layer{{}, {}, eps};
    for (; layer.norms.size() < Layer::kNorms; own++) layer.norms.push_back(or_none(*own));
    for (; layer.linears.size() < Layer::kLinears; own += kPerLinear) {
        const Tensor a = gate ? or_none(own[2]) : Tensor(nullptr);
        layer.linears.push_back({or_none(own[0]), or_none(own[1]), a, or_none(own[3]), gate, first_row, *gate_offsets++});
    }
    return layer;
}

bool is_pool(const Tensor& pool, const Tensor& like) {
    if (!is_dense_floats(pool, 4)) return false;
    for (int64_t dim = 0; dim < 4; dim++)
        if (pool.size(dim) != like.size(dim)) return false;
    return true;
}

// Whether the groups' tables are valid, and the groups have `rows` rows in all.
bool are_groups_of(const std::vector<Group>& groups, int64_t rows) {
    for (const Group& group : groups) {
        if (!group.table.is_int64() || group.table.dims() != 2 || !group.table.is_dense(2) || group.rows_each < 1) return false;
        rows -= group.table.size(0) * group.rows_each;
    }
    return rows == 0;
}

// Runs x [rows, hidden] through all layers.
Given op_layers(
    Given x_, std::vector<Given> tensors, Maybe gate, std::vector<int64_t> gate_offsets, int64_t first_row, Given cos_, Given sin_,
    std::vector<Given> keys, std::vector<Given> values, Given slots_, Given positions_, std::vector<Given> tables,
    std::vector<int64_t> rows_each, double eps, double scaling, std::vector<int64_t> windows
) {
    const Tensor x = tensor_of(x_), cos = tensor_of(cos_), sin = tensor_of(sin_), slots = tensor_of(slots_);
    const Tensor positions = tensor_of(positions_);
    const size_t count = windows.size();
    require(
        count && is_dense_floats(x, 2) && tensors.size() == count * kPerLayer && keys.size() == count && values.size() == count &&
        gate_offsets.size() == count * Layer::kLinears && tables.size() == rows_each.size());
    const int64_t rows = x.size(0), hidden = x.size(1);
    std::vector<Group> groups;
    for (size_t i = 0; i < tables.size(); i++) groups.push_back({tensor_of(tables[i]), rows_each[i]});
    const Tensor pool = tensor_of(keys[0]);
    require(
        pool.dims() == 4 && is_dense_floats(cos, 2) && is_dense_floats(sin, 2) && cos.size(0) == rows && sin.size(0) == rows &&
        cos.size(1) == pool.size(3) && sin.size(1) == pool.size(3) && is_index(slots) && slots.numel() == rows &&
        is_index(positions) && positions.numel() == rows && are_groups_of(groups, rows));
    std::vector<Layer> all;
    for (size_t i = 0; i < count; i++) {
        all.push_back(layer_of(&tensors[i * kPerLayer], tensor_of(gate), &gate_offsets[i * Layer::kLinears], first_row, eps));
        require(is_pool(tensor_of(keys[i]), pool) && is_pool(tensor_of(values[i]), pool) && all.back().is_sound(rows, hidden, pool));
    }
    const Given y = new_floats({rows, hidden});
    std::copy_n(x.data<float>(), rows * hidden, floats_of(y));
    const auto spans = std::make_shared<std::vector<Span>>(spans_of(groups, positions.data<int64_t>()));
    const Step step{rows, cos.data<float>(), sin.data<float>(), slots.data<int64_t>(), spans};
    const auto keep = [&] {
        Owners owners;
        for (const Group& group : groups) owners.push_back(group.table.owner());
        return owners;
    };
    for (size_t i = 0; i < count; i++) {
        const Scores how{float(scaling), windows[i]};
        all[i].run(floats_of(y), hidden, step, tensor_of(keys[i]), tensor_of(values[i]), how, keep);
    }
    return y;
}

Given op_spread(Given gate_rows_, Given slots_, Given rank_index_, int64_t first_row, double weight) {
    const Tensor gate_rows = tensor_of(gate_rows_), slots = tensor_of(slots_), rank_index = tensor_of(rank_index_);
    require(is_store(gate_rows) && is_index(slots) && is_index(rank_index) && first_row >= 0 && first_row <= slots.numel());
    const Given weights = new_floats({slots.numel() - first_row, rank_index.numel()});
    spread(gate_rows, slots, rank_index, first_row, float(weight), floats_of(weights));
    return weights;
}

// The first `rows` of hidden [.., H] -> logits and scalings [rows, sites, experts]; scalings are stored in `slots` of gate_rows.
// `layers` are weight and bias of each linear.
std::tuple<Given, Given> op_scalings(
    Given hidden_, std::vector<Given> layers, bool relu, std::optional<double> temperature, Given gate_rows_, Given slots_,
    int64_t rows
) {
    const Tensor hidden = tensor_of(hidden_), gate_rows = tensor_of(gate_rows_), slots = tensor_of(slots_), none(nullptr);
    Classifier classifier{{}, relu};
    for (size_t i = 0; i + 1 < layers.size(); i += 2)
        classifier.linears.push_back({tensor_of(layers[i]), or_none(layers[i + 1]), none, none, none});
    require(
        is_dense_floats(hidden, 2) && is_store(gate_rows) && is_index(slots) && rows >= 0 && rows <= slots.numel() &&
        rows <= hidden.size(0) && classifier.is_sound(hidden.size(1), gate_rows.size(1) * gate_rows.size(2)));
    const Given logits = new_floats({rows, gate_rows.size(1), gate_rows.size(2)});
    const Given scalings = new_floats({rows, gate_rows.size(1), gate_rows.size(2)});
    classifier.run(hidden.data<float>(), rows, floats_of(logits));
    store_scalings(floats_of(logits), rows, temperature, floats_of(scalings), gate_rows, slots.data<int64_t>());
    return {logits, scalings};
}

// rows [L] of hidden [T, H] -> [L, H]; rows below `scaling_rows` pass the draft head, whose tensors are U [R, H], b [R], D [H, R]
Given op_drafting(Given hidden_, Given rows_, int64_t scaling_rows, std::vector<Given> tensors) {
    const Tensor hidden = tensor_of(hidden_), rows = tensor_of(rows_), none(nullptr);
    require(is_dense_floats(hidden, 2) && is_index(rows) && tensors.size() == 3);
    const Linear up{tensor_of(tensors[0]), tensor_of(tensors[1]), none, none, none};
    const Linear down{tensor_of(tensors[2]), none, none, none, none};
    const int64_t width = hidden.size(1), count = rows.numel();
    require(up.is_sound() && down.is_sound() && up.depth() == width && down.width() == width && up.width() == down.depth());
    const int64_t* const row = rows.data<int64_t>();
    std::vector<int64_t> drafting;
    for (int64_t i = 0; i < count; i++) {
        require(row[i] >= 0 && row[i] < hidden.size(0));
        if (row[i] < scaling_rows) drafting.push_back(i);
    }
    const Given seen_ = new_floats({count, width});
    float* const seen = floats_of(seen_);
    for (int64_t i = 0; i < count; i++) std::copy_n(hidden.data<float>() + row[i] * width, width, seen + i * width);
    if (drafting.empty()) return seen_;
    const Floats drafts(int64_t(drafting.size()) * width);
    for (size_t i = 0; i < drafting.size(); i++) std::copy_n(seen + drafting[i] * width, width, drafts.data() + i * width);
    draft(up, down, int64_t(drafting.size()), drafts.data());
    for (size_t i = 0; i < drafting.size(); i++) std::copy_n(drafts.data() + i * width, width, seen + drafting[i] * width);
    return seen_;
}

// The draft layer: state and embedded [n, H] -> the next state [n, H], which attends over keys and values up to `positions` [n] of the
// streams with `table` [n, blocks]. `tensors` are mix [H, 2H] and its bias, the norm's weight, query, output, U, b and D.
Given op_draft_state(
    Given state_, Given embedded_, std::vector<Given> tensors, Maybe cos_, Maybe sin_, Given keys_, Given values_, Given positions_,
    Given table_, double eps
) {
    const Tensor state = tensor_of(state_), embedded = tensor_of(embedded_), keys = tensor_of(keys_), values = tensor_of(values_);
    const Tensor positions = tensor_of(positions_), none(nullptr), cos = tensor_of(cos_), sin = tensor_of(sin_);
    require(is_dense_floats(state, 2) && is_dense_floats(embedded, 2) && tensors.size() == 8 && is_pool(keys, keys) && is_pool(values, keys));
    const int64_t rows = state.size(0), hidden = state.size(1), head_dim = keys.size(3);
    const Linear mix{tensor_of(tensors[0]), tensor_of(tensors[1]), none, none, none};
    const Tensor norm_weight = tensor_of(tensors[2]);
    const Linear query{tensor_of(tensors[3]), none, none, none, none}, output{tensor_of(tensors[4]), none, none, none, none};
    const Linear up{tensor_of(tensors[5]), tensor_of(tensors[6]), none, none, none}, down{tensor_of(tensors[7]), none, none, none, none};
    require(mix.is_sound() && query.is_sound() && output.is_sound() && up.is_sound() && down.is_sound());
    const int64_t across = query.width(), kv_across = keys.size(2) * head_dim;
    const std::vector<Group> groups{{tensor_of(table_), 1}};
    require(
        embedded.size(0) == rows && embedded.size(1) == hidden && mix.depth() == 2 * hidden && mix.width() == hidden &&
        is_dense_floats(norm_weight, 1) && norm_weight.numel() == hidden && query.depth() == hidden && across && kv_across &&
        across % kv_across == 0 && output.depth() == across && output.width() == hidden && up.depth() == hidden &&
        down.depth() == up.width() && down.width() == hidden && is_index(positions) && positions.numel() == rows &&
        are_groups_of(groups, rows));
    for (const Tensor& turn : {cos, sin})
        require(!turn || (is_dense_floats(turn, 2) && turn.size(0) == rows && turn.size(1) == head_dim));
    const Given next_ = new_floats({rows, hidden});
    float* const next = floats_of(next_);
    const Floats floats(rows * (2 * hidden + 2 * across));
    float* const both = floats.data();  // [state ; embedded], then the normed rows, then attention's output
    float* const asked = both + rows * 2 * hidden;
    float* const attended = asked + rows * across;
    for (int64_t row = 0; row < rows; row++) {
        std::copy_n(state.data<float>() + row * hidden, hidden, both + row * 2 * hidden);
        std::copy_n(embedded.data<float>() + row * hidden, hidden, both + row * 2 * hidden + hidden);
    }
    mix.run(both, rows, next);
    norm(next, norm_weight.data<float>(), eps, rows, hidden, both);
    query.run(both, rows, asked);
    for (int64_t row = 0; cos && row < rows; row++)
        for (int64_t at = 0; at < across; at += head_dim)
            rotate(asked + row * across + at, cos.data<float>() + row * head_dim, sin.data<float>() + row * head_dim, head_dim);
    const auto spans = std::make_shared<std::vector<Span>>(spans_of(groups, positions.data<int64_t>()));
    const Step step{rows, nullptr, nullptr, nullptr, spans};
    const Scores how{1.0f / std::sqrt(float(head_dim)), 0};
    attend(asked, across / head_dim, step, keys, values, how, [&] { return Owners{groups[0].table.owner()}; }, attended);
    output.run(attended, rows, both);
    for (int64_t i = 0; i < rows * hidden; i++) next[i] += both[i];
    draft(up, down, rows, next);
    return next_;
}

// Standard Gumbel noise of a key and a vocabulary id, as engine/noise.py has it.
double gumbel(uint64_t key, int64_t id) {
    uint64_t bits = key + uint64_t(id + 1) * 0x9E3779B97F4A7C15u;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    bits ^= bits >> 31;
    return -std::log(-std::log((double(bits >> 11) + 0.5) * 0x1p-53));
}

// The largest of `count` logits, with the noise of `key` where the temperature is more than 0.
int64_t chosen(const float* logits, int64_t count, float temperature, uint64_t key) {
    if (!(temperature > 0)) return std::max_element(logits, logits + count) - logits;
    int64_t best = 0;
    float most = -std::numeric_limits<float>::infinity();
    for (int64_t id = 0; id < count; id++) {
        const float own = logits[id] / temperature + float(gumbel(key, id));
        if (own > most) most = own, best = id;
    }
    return best;
}

// The drafts behind `state` [n, H] and `tokens` [n]: [depth - 1, n]. `embedding` [V, H], `depths` [depth - 1 or more, H], `cos` and
// `sin` of all positions; `tensors` as of op_draft_state, whose bias is that of each depth. With `temperature` [n] and `keys`
// [n, depth - 1] drafts are drawn, else chosen greedily.
Given op_drafts(
    Given state, Given tokens_, Given embedding_, std::vector<Given> tensors, Given depths_, Given cos_, Given sin_, Given keys,
    Given values, Given positions_, Given table, Given head_, Maybe head_bias, Maybe temperature_, Maybe keys_of_noise, double eps,
    int64_t depth
) {
    const Tensor temperature = tensor_of(temperature_), noise = tensor_of(keys_of_noise);
    const Tensor tokens = tensor_of(tokens_), embedding = tensor_of(embedding_), depths = tensor_of(depths_), none(nullptr);
    const Tensor cos = tensor_of(cos_), sin = tensor_of(sin_), positions = tensor_of(positions_), given = tensor_of(state);
    const Linear head{tensor_of(head_), tensor_of(head_bias), none, none, none};
    require(
        is_dense_floats(given, 2) && is_index(tokens) && is_index(positions) && is_dense_floats(embedding, 2) &&
        is_dense_floats(depths, 2) && is_dense_floats(cos, 2) && is_dense_floats(sin, 2) && tensors.size() == 8 && head.is_sound());
    const int64_t rows = given.size(0), hidden = given.size(1), head_dim = cos.size(1), vocabulary = head.width();
    require(
        tokens.numel() == rows && positions.numel() == rows && embedding.size(1) == hidden && depths.size(1) == hidden &&
        (!temperature || (is_dense_floats(temperature, 1) && temperature.numel() == rows && noise && noise.is_int64() && noise.dims() == 2 &&
                          noise.is_dense(2) && noise.size(0) == rows && noise.size(1) == depth - 1)) &&
        depth >= 2 && depths.size(0) >= depth - 1 && sin.size(0) == cos.size(0) && sin.size(1) == head_dim && head.depth() == hidden);
    const Given ids_ = new_floats({depth - 1, rows});
    float* ids = floats_of(ids_);
    std::vector<int64_t> drafted(tokens.data<int64_t>(), tokens.data<int64_t>() + rows);
    const Floats logits(rows * vocabulary);
    for (int64_t number = 1; number < depth; number++, ids += rows) {
        const Given embedded = new_floats({rows, hidden}), cos_now = new_floats({rows, head_dim}), sin_now = new_floats({rows, head_dim});
        for (int64_t row = 0; row < rows; row++) {
            const int64_t token = drafted[row], at = positions.data<int64_t>()[row] + number;
            require(token >= 0 && token < embedding.size(0) && at >= 0 && at < cos.size(0));
            std::copy_n(embedding.data<float>() + token * hidden, hidden, floats_of(embedded) + row * hidden);
            std::copy_n(cos.data<float>() + at * head_dim, head_dim, floats_of(cos_now) + row * head_dim);
            std::copy_n(sin.data<float>() + at * head_dim, head_dim, floats_of(sin_now) + row * head_dim);
        }
        tensors[1] = new_floats({hidden});
        std::copy_n(depths.data<float>() + (number - 1) * hidden, hidden, floats_of(tensors[1]));
        state = op_draft_state(state, embedded, tensors, cos_now, sin_now, keys, values, positions_, table, eps);
        head.run(floats_of(state), rows, logits.data());
        for (int64_t row = 0; row < rows; row++) {
            const float* const own = logits.data() + row * vocabulary;
            const uint64_t key = temperature ? uint64_t(noise.data<int64_t>()[row * (depth - 1) + number - 1]) : 0;
            drafted[row] = chosen(own, vocabulary, temperature ? temperature.data<float>()[row] : 0.0f, key);
            ids[row] = float(drafted[row]);
        }
    }
    return ids_;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(xlora, CPU, library) {
    library.impl("linear", TORCH_BOX(&op_linear));
    library.impl("norm", TORCH_BOX(&op_norm));
    library.impl("layers", TORCH_BOX(&op_layers));
    library.impl("spread", TORCH_BOX(&op_spread));
    library.impl("scalings", TORCH_BOX(&op_scalings));
    library.impl("drafting", TORCH_BOX(&op_drafting));
    library.impl("draft_state", TORCH_BOX(&op_draft_state));
    library.impl("drafts", TORCH_BOX(&op_drafts));
}

extern "C" {

void xlora_set_helpers(int count, int idle_priority) { Helpers::the().set(count, idle_priority); }

int64_t xlora_repeated_chunks() { return Helpers::the().repeated(); }

}  // extern "C"
