// A recurrent layer over the T steps of a window, forward and backward.
//
// A thread owns whole blocks of units and computes all of their slots, so that threads meet once a step only, when the
// hidden layer is whole. Where one core's cache holds all of the weights that a step reads, a thread owns streams
// instead, and in a window threads need not meet at all.
#include "cells.h"

struct Sizes {
    int64_t steps, batch, inputs, hidden;
    int64_t rows() const { return steps * batch; }
    int64_t blocks() const { return panels(hidden); }
};

// Columns j to j + 16 of a weight (gates * hidden, n) as a panel whose k runs over the slots of all units.
template <class T, class Cell>
static void columns_panel(const float* weight, const Sizes& z, const int* gates, int64_t n, int64_t j, T* panel) {
    int64_t columns = std::min<int64_t>(PANEL, n - j);
    for (int64_t u = 0; u < z.blocks(); ++u)
        for (int s = 0; s < Cell::SLOTS; ++s, panel += PANEL * PANEL) {
            const float* from = weight + (gates[s] * z.hidden + u * PANEL) * n + j;
            int64_t rows = gates[s] < 0 ? 0 : std::min<int64_t>(PANEL, z.hidden - u * PANEL);
            to_panel<T>([=](int64_t i) { return from + i * n; }, rows, PANEL, columns, panel);
        }
    const int64_t slots = z.blocks() * Cell::SLOTS * PANEL;
    std::memset(panel, 0, (padded<T>(slots) - slots) * PANEL * sizeof(T));
}


constexpr int64_t CACHED = 1 << 20;  // bytes of weights
constexpr int64_t FEW_STREAMS = 8;   // fewer make a thread's products slow

// What a thread computes in every step: blocks of units, of streams.
struct Work {
    bool apart;
    Share units, streams;
    int64_t batch() const { return streams.end - streams.begin; }
    int64_t blocks() const { return units.end - units.begin; }
};
static Work work_of(Member me, const Sizes& z, int64_t bytes) {
    const bool apart = bytes <= CACHED && z.batch >= FEW_STREAMS * me.threads && z.steps > FEW_ROWS;
    return {apart, apart ? Share(z.blocks(), 0, 1) : me.share(z.blocks()), apart ? me.share(z.batch) : Share(z.batch, 0, 1)};
}

// ------------------------------------------------------------------------------------------------ forward

// inputs (T, B, E) or ids (T, B); h (B, H), c (B, H); outputs (T, B, H), c_last (B, H),
// gates (T, B, U, S, 16) where the cell keeps them, cells (T, B, U, 16).
template <class T, class Cell>
static void forward(
    int threads, Sizes z, const float* inputs, const int64_t* ids, const float* h, const float* c, const float* weight_ih,
    const float* weight_hh, const float* bias, float* outputs, float* c_last, float* gates, float* cells) {
    constexpr int S = Cell::SLOTS;
    const int64_t U = z.blocks(), W = U * S * PANEL, width = round_up(z.hidden, 32), rows = z.rows();
    const int64_t from_input = ids ? 0 : panel_size<T>(z.inputs), from_hidden = panel_size<T>(z.hidden);
    const int64_t input_ld = padded<T>(z.inputs), input_room = ids ? 0 : (rows + ROW_SLACK * z.batch) * input_ld;
    const bool one_step = ids && !Cell::KEPT;  // of products at a time
    workspace.reserve(
        Workspace::room<T>(from_input * U * S) + Workspace::room<T>(from_hidden * U * S) +
        2 * Workspace::room<T>((z.batch + ROW_SLACK) * width) + Workspace::room<T>(input_room) +
        Workspace::room<float>(ids ? z.inputs * W : 0) +
        Workspace::room<float>(W) + Workspace::room<float>(Cell::KEPT ? 0 : (one_step ? z.batch : rows) * W));
    T* input_panels = workspace.take<T>(from_input * U * S);
    T* hidden_panels = workspace.take<T>(from_hidden * U * S);
    T* hidden[2] = {workspace.take<T>((z.batch + ROW_SLACK) * width), workspace.take<T>((z.batch + ROW_SLACK) * width)};
    T* input_rows = workspace.take<T>(input_room);
    float* table = workspace.take<float>(ids ? z.inputs * W : 0);
    float* biases = workspace.take<float>(W);
    if (!Cell::KEPT) gates = workspace.take<float>((one_step ? z.batch : rows) * W);

    together(threads, [&](Member me) {
        Tiles tiles;
        const Share own = me.share(U);
        for (int64_t u = own.begin; u < own.end; ++u) {
            const int64_t at = u * S * PANEL;
            block_biases<Cell>(weight_ih, bias, z.hidden, u, biases + at, table + at, ids ? z.inputs : 0, W);
            for (int s = 0; s < S; ++s) {
                const int64_t slot = u * S + s;
                if (!ids)
                    slot_panel(
                        weight_ih, z.hidden, u, Cell::FROM_INPUT[s], z.inputs, input_panels + slot * from_input);
                slot_panel(
                    weight_hh, z.hidden, u, Cell::FROM_HIDDEN[s], z.hidden, hidden_panels + slot * from_hidden);
            }
        }
        const Share part = me.share(rows);
        if (!ids)
            to_rows(
                inputs + part.begin * z.inputs, part.end - part.begin, z.inputs, z.inputs,
                input_rows + part.begin * input_ld, input_ld);
        if (me.thread == 0) {
            to_rows(h, z.batch, z.hidden, z.hidden, hidden[0], width);
            std::memset(hidden[1], 0, z.batch * width * sizeof(T));
        }
        me.wait();

        const Work mine = work_of(me, z, from_hidden * U * S * sizeof(T));
        const int64_t first = mine.units.begin * S * PANEL, own_panels = mine.blocks() * S;
        const T* own_input_panels = input_panels + mine.units.begin * S * from_input;
        if (!ids && mine.apart)
            for (int64_t b = mine.streams.begin; b < mine.streams.end; ++b)
                multiply<T>(
                    tiles, z.steps, own_panels, z.inputs, input_rows + b * input_ld, z.batch * input_ld,
                    own_input_panels, from_input, gates + b * W, z.batch * W, false);
        else if (!ids && own_panels)
            multiply<T>(
                tiles, rows, own_panels, z.inputs, input_rows, input_ld, own_input_panels, from_input, gates + first, W,
                false);
        for (int64_t t = 0; t < z.steps; ++t) {
            float* step = gates + (one_step ? 0 : t * z.batch * W);
            if (own_panels)
                multiply<T>(
                    tiles, mine.batch(), own_panels, z.hidden, hidden[t & 1] + mine.streams.begin * width, width,
                    hidden_panels + mine.units.begin * S * from_hidden, from_hidden,
                    step + mine.streams.begin * W + first, W, !ids);
            for (int64_t b = mine.streams.begin; b < mine.streams.end; ++b) {
                const float* constant = ids ? table + ids[t * z.batch + b] * W : biases;
                for (int64_t unit = mine.units.begin * PANEL; unit < mine.units.end * PANEL; unit += LANES) {
                    const int64_t block = unit / PANEL * S * PANEL + unit % PANEL, row = t * z.batch + b;
                    Vec slot[S], added[S], h_before{}, c_now{};
                    for (int s = 0; s < S; ++s) {
                        slot[s] = load(step + b * W + block + s * PANEL);
                        added[s] = load(constant + block + s * PANEL);
                    }
                    if (Cell::CELL)
                        c_now = t ? load(cells + ((row - z.batch) * U * PANEL) + unit)
                                  : load_part(c + b * z.hidden, unit, z.hidden);
                    else
                        h_before = t ? load_part(outputs + (row - z.batch) * z.hidden, unit, z.hidden)
                                     : load_part(h + b * z.hidden, unit, z.hidden);
                    Vec output = Cell::forward(slot, added, h_before, c_now);
                    for (int s = 0; s < S && Cell::KEPT; ++s) store(step + b * W + block + s * PANEL, slot[s]);
                    if (Cell::CELL) store(cells + row * U * PANEL + unit, c_now);
                    put(hidden[(t + 1) & 1] + b * width + unit, output);
                    store_part(outputs + row * z.hidden, unit, z.hidden, output);
                    if (Cell::CELL && t + 1 == z.steps) store_part(c_last + b * z.hidden, unit, z.hidden, c_now);
                }
            }
            if (!mine.apart) me.wait();
        }
    });
}

// ------------------------------------------------------------------------------------------------ backward

// gradient of outputs (T, B, H) and of c_last (B, H) or none -> of inputs (T, B, E) where wanted, of h and c (B, H),
// of weight_ih (GH, E), weight_hh (GH, H), bias (GH).
template <class T, class Cell>
static void backward(
    int threads, Sizes z, const float* d_outputs, const float* d_c_last, const float* inputs, const int64_t* ids,
    const float* h, const float* c, const float* weight_ih, const float* weight_hh, const float* outputs,
    const float* gates, const float* cells, float* d_inputs, float* d_h, float* d_c, float* d_weight_ih,
    float* d_weight_hh, float* d_bias) {
    constexpr int S = Cell::SLOTS;
    const int64_t U = z.blocks(), W = U * S * PANEL, rows = z.rows(), ld = U * PANEL;
    const int64_t depth = panel_size<T>(W), long_depth = panel_size<T>(rows), long_ld = padded<T>(rows);
    const int64_t hidden_panels = panels(z.hidden), input_panels = panels(z.inputs);
    const int64_t slot_ld = padded<T>(W);
    const bool wanted = d_inputs && !ids;
    workspace.reserve(
        Workspace::room<T>(hidden_panels * depth) + Workspace::room<T>(wanted ? input_panels * depth : 0) +
        Workspace::room<T>((rows + ROW_SLACK) * slot_ld) + Workspace::room<T>((W + ROW_SLACK) * long_ld) +
        Workspace::room<T>(hidden_panels * long_depth) + Workspace::room<T>(ids ? 0 : input_panels * long_depth) +
        2 * Workspace::room<float>(z.batch * ld) + Workspace::room<float>(threads * W) +
        Workspace::room<float>(ids ? z.inputs * W : 0) + Workspace::room<float>(threads * std::max(rows, W) * PANEL));
    T* hidden_columns = workspace.take<T>(hidden_panels * depth);                   // weight_hh, k over slots
    T* input_columns = workspace.take<T>(wanted ? input_panels * depth : 0);        // weight_ih, k over slots
    T* d_slots = workspace.take<T>((rows + ROW_SLACK) * slot_ld);                   // (T, B, U, S, 16)
    T* d_slots_columns = workspace.take<T>((W + ROW_SLACK) * long_ld);              // of each thread (S, its U, 16, TB)
    T* hidden_rows = workspace.take<T>(hidden_panels * long_depth);                 // the hidden layer before, k over T B
    T* input_rows = workspace.take<T>(ids ? 0 : input_panels * long_depth);
    float* dh = workspace.take<float>(z.batch * ld);
    float* dc = workspace.take<float>(z.batch * ld);
    float* d_biases = workspace.take<float>(threads * W);
    float* table = workspace.take<float>(ids ? z.inputs * W : 0);
    float* scratches = workspace.take<float>(threads * std::max(rows, W) * PANEL);

    together(threads, [&](Member me) {
        Tiles tiles;
        float* scratch = scratches + me.thread * std::max(rows, W) * PANEL;
        const Share own = me.share(U);
        for (int64_t u = own.begin; u < own.end; ++u)
            columns_panel<T, Cell>(
                weight_hh, z, Cell::FROM_HIDDEN, z.hidden, u * PANEL, hidden_columns + u * depth);
        const Work mine = work_of(me, z, hidden_panels * depth * sizeof(T));
        for (int64_t b = mine.streams.begin; b < mine.streams.end; ++b)
            for (int64_t unit = mine.units.begin * PANEL; unit < mine.units.end * PANEL; unit += LANES) {
                store(dh + b * ld + unit, Vec{});
                if (Cell::CELL)
                    store(dc + b * ld + unit, d_c_last ? load_part(d_c_last + b * z.hidden, unit, z.hidden) : Vec{});
            }
        float* my_biases = d_biases + me.thread * W;
        std::memset(my_biases, 0, W * sizeof(float));
        if (slot_ld > W && me.thread == 0)
            for (int64_t row = 0; row < rows; ++row)
                std::memset(d_slots + row * slot_ld + W, 0, (slot_ld - W) * sizeof(T));
        if (mine.apart) me.wait();

        for (int64_t t = z.steps - 1; t >= 0; --t) {
            for (int64_t b = mine.streams.begin; b < mine.streams.end; ++b)
                for (int64_t unit = mine.units.begin * PANEL; unit < mine.units.end * PANEL; unit += LANES) {
                    const int64_t block = unit / PANEL * S * PANEL + unit % PANEL, row = t * z.batch + b;
                    Vec slot[S], gradient[S], c_now{}, c_before{}, h_before{}, direct;
                    for (int s = 0; s < S; ++s)
                        slot[s] = Cell::KEPT ? load(gates + row * W + block + s * PANEL)
                                             : load_part(outputs + row * z.hidden, unit, z.hidden);
                    if (Cell::CELL) {
                        c_now = load(cells + row * ld + unit);
                        c_before = t ? load(cells + (row - z.batch) * ld + unit)
                                     : load_part(c + b * z.hidden, unit, z.hidden);
                    } else {
                        h_before = t ? load_part(outputs + (row - z.batch) * z.hidden, unit, z.hidden)
                                     : load_part(h + b * z.hidden, unit, z.hidden);
                    }
                    Vec d_hidden = load(dh + b * ld + unit) + load_part(d_outputs + row * z.hidden, unit, z.hidden);
                    Vec d_cell = Cell::CELL ? load(dc + b * ld + unit) : Vec{};
                    Cell::backward(slot, c_now, c_before, h_before, d_hidden, d_cell, gradient, direct);
                    if (Cell::CELL) store(dc + b * ld + unit, d_cell);
                    if (Cell::DIRECT) store(dh + b * ld + unit, direct);
                    for (int s = 0; s < S; ++s) {
                        put(d_slots + row * slot_ld + block + s * PANEL, gradient[s]);
                        float* total = my_biases + block + s * PANEL;
                        store(total, load(total) + gradient[s]);
                    }
                }
            if (!mine.apart) me.wait();
            if (mine.blocks())
                multiply<T>(
                    tiles, mine.batch(), mine.blocks(), W, d_slots + (t * z.batch + mine.streams.begin) * slot_ld, slot_ld,
                    hidden_columns + mine.units.begin * depth, depth,
                    dh + mine.streams.begin * ld + mine.units.begin * PANEL, ld, Cell::DIRECT);
        }
        for (int64_t b = mine.streams.begin; b < mine.streams.end; ++b)
            for (int64_t unit = mine.units.begin * PANEL; unit < mine.units.end * PANEL; unit += LANES) {
                store_part(d_h + b * z.hidden, unit, z.hidden, load(dh + b * ld + unit));
                if (Cell::CELL) store_part(d_c + b * z.hidden, unit, z.hidden, load(dc + b * ld + unit));
            }

        // Gradients of the weights: one product over all steps for each.
        if (mine.apart) me.wait();
        const int64_t own_units = (own.end - own.begin) * PANEL, column = own.begin * S * PANEL;
        for (int64_t u = own.begin; u < own.end; ++u)
            for (int s = 0; s < S; ++s)
                to_columns(
                    d_slots + (u * S + s) * PANEL, rows, PANEL, slot_ld,
                    d_slots_columns + (column + s * own_units + (u - own.begin) * PANEL) * long_ld, long_ld);
        auto before = [&](int64_t i) { return i < z.batch ? h + i * z.hidden : outputs + (i - z.batch) * z.hidden; };
        for (int64_t p = own.begin; p < own.end; ++p)
            to_panel<T>(
                [&](int64_t i) { return before(i) + p * PANEL; }, rows, long_ld,
                std::min<int64_t>(PANEL, z.hidden - p * PANEL), hidden_rows + p * long_depth);
        const Share some = me.share(input_panels);
        if (!ids)
            for (int64_t p = some.begin; p < some.end; ++p) {
                to_panel<T>(
                    [&](int64_t i) { return inputs + i * z.inputs + p * PANEL; }, rows, long_ld,
                    std::min<int64_t>(PANEL, z.inputs - p * PANEL), input_rows + p * long_depth);
                if (wanted)
                    columns_panel<T, Cell>(
                        weight_ih, z, Cell::FROM_INPUT, z.inputs, p * PANEL, input_columns + p * depth);
            }
        if (ids) {
            const int64_t slots = own_units * S;
            for (int64_t id = 0; id < z.inputs; ++id) std::memset(table + id * W + column, 0, slots * sizeof(float));
            for (int64_t row = 0; row < rows; ++row) {
                float* total = table + ids[row] * W + column;
                const T* from = d_slots + row * slot_ld + column;
                for (int64_t j = 0; j < slots; j += LANES) store(total + j, load(total + j) + get(from + j));
            }
        }
        me.wait();

        const int64_t real = std::min(z.hidden, own.end * PANEL) - own.begin * PANEL;
        for (int s = 0; s < S; ++s) {
            const T* d_slot = d_slots_columns + (column + s * own_units) * long_ld;
            const int64_t of_hidden = Cell::FROM_HIDDEN[s] * z.hidden + own.begin * PANEL;
            const int64_t of_input = Cell::FROM_INPUT[s] * z.hidden + own.begin * PANEL;
            if (real > 0 && Cell::FROM_HIDDEN[s] >= 0)
                multiply_exactly<T>(
                    tiles, real, z.hidden, rows, d_slot, long_ld, hidden_rows, long_depth,
                    d_weight_hh + of_hidden * z.hidden, z.hidden, scratch);
            if (real > 0 && Cell::FROM_INPUT[s] >= 0) {
                if (!ids)
                    multiply_exactly<T>(
                        tiles, real, z.inputs, rows, d_slot, long_ld, input_rows, long_depth,
                        d_weight_ih + of_input * z.inputs, z.inputs, scratch);
                for (int64_t unit = 0; unit < real; ++unit) {
                    const int64_t at = (own.begin + unit / PANEL) * S * PANEL + s * PANEL + unit % PANEL;
                    d_bias[of_input + unit] = 0;
                    for (int i = 0; i < me.threads; ++i) d_bias[of_input + unit] += d_biases[i * W + at];
                    if (ids)
                        for (int64_t id = 0; id < z.inputs; ++id)
                            d_weight_ih[(of_input + unit) * z.inputs + id] = table[id * W + at];
                }
            }
        }
        const Share part = me.share(rows, PANEL);
        if (wanted && part.end > part.begin)
            multiply_exactly<T>(
                tiles, part.end - part.begin, z.inputs, W, d_slots + part.begin * slot_ld, slot_ld, input_columns, depth,
                d_inputs + part.begin * z.inputs, z.inputs, scratch);
    });
}

// ------------------------------------------------------------------------------------------------ C

extern "C" int recurrent_forward(
    int kind, int narrow, int threads, int64_t steps, int64_t batch, int64_t inputs_size, int64_t hidden_size,
    const float* inputs, const int64_t* ids, const float* h, const float* c, const float* weight_ih,
    const float* weight_hh, const float* bias, float* outputs, float* c_last, float* gates, float* cells) {
    if (ids && !within(ids, steps * batch, inputs_size)) return NO_SUCH_ID;
    return with_cell_and_operand(kind, narrow, [&](auto cell, auto operand) {
        forward<decltype(operand), decltype(cell)>(
            threads, Sizes{steps, batch, inputs_size, hidden_size}, inputs, ids, h, c, weight_ih, weight_hh, bias,
            outputs, c_last, gates, cells);
    });
}

extern "C" int recurrent_backward(
    int kind, int narrow, int threads, int64_t steps, int64_t batch, int64_t inputs_size, int64_t hidden_size,
    const float* d_outputs, const float* d_c_last, const float* inputs, const int64_t* ids, const float* h,
    const float* c, const float* weight_ih, const float* weight_hh, const float* outputs, const float* gates,
    const float* cells, float* d_inputs, float* d_h, float* d_c, float* d_weight_ih, float* d_weight_hh, float* d_bias) {
    if (ids && !within(ids, steps * batch, inputs_size)) return NO_SUCH_ID;
    return with_cell_and_operand(kind, narrow, [&](auto cell, auto operand) {
        backward<decltype(operand), decltype(cell)>(
            threads, Sizes{steps, batch, inputs_size, hidden_size}, d_outputs, d_c_last, inputs, ids, h, c, weight_ih,
            weight_hh, outputs, gates, cells, d_inputs, d_h, d_c, d_weight_ih, d_weight_hh, d_bias);
    });
}
