// The cells: a step's arithmetic on vectors of units, and how their weights are laid out for the products.
//
// Units stand in blocks of 16. Of each block every step computes S slots: the gates, and what the backward pass wants
// of them. So a row of products is (U, S, 16), U blocks, and panels are laid out alike: one for each slot.
#pragma once
#include "gemm.h"

enum Kind { LSTM = 0, GRU = 1, TANH = 2, RELU = 3 };

// Each cell says which gate's rows of weight_ih and weight_hh each slot takes (-1: none), and does a step's arithmetic on
// vectors of units. `forward` finds in slot[s] the products of the step, to which the biases (and a one-hot input's weights)
// are to be added, and leaves there what `backward` will read, where anything is KEPT; else the output tells it all. DIRECT:
// something of a step's gradient reaches the hidden layer before by no product.

struct Lstm {
    static constexpr int SLOTS = 4;
    static constexpr bool CELL = true, KEPT = true, DIRECT = false;
    static constexpr int FROM_INPUT[] = {0, 1, 2, 3}, FROM_HIDDEN[] = {0, 1, 2, 3};  // i, f, g, o

    static INLINE Vec forward(Vec* slot, const Vec* added, Vec, Vec& c) {
        slot[0] = sigmoid(slot[0] + added[0]);
        slot[1] = sigmoid(slot[1] + added[1]);
        slot[2] = tanh(slot[2] + added[2]);
        slot[3] = sigmoid(slot[3] + added[3]);
        c = slot[1] * c + slot[0] * slot[2];
        return slot[3] * tanh(c);
    }
    // gradient: of the slots, out. direct: of the hidden layer before, that no product carries.
    static INLINE void backward(
        const Vec* slot, Vec c, Vec c_before, Vec, Vec dh, Vec& dc, Vec* gradient, Vec& direct) {
        Vec i = slot[0], f = slot[1], g = slot[2], o = slot[3], squashed = tanh(c);
        Vec whole = dc + dh * o * (1.0f - squashed * squashed);
        gradient[0] = whole * g * i * (1.0f - i);
        gradient[1] = whole * c_before * f * (1.0f - f);
        gradient[2] = whole * i * (1.0f - g * g);
        gradient[3] = dh * squashed * o * (1.0f - o);
        dc = whole * f;
        direct = Vec{};
    }
};

struct Gru {
    static constexpr int SLOTS = 4;
    static constexpr bool CELL = false, KEPT = true, DIRECT = true;
    static constexpr int FROM_INPUT[] = {0, 1, 2, -1}, FROM_HIDDEN[] = {0, 1, -1, 2};  // r, z, n by input, by hidden

    static INLINE Vec forward(Vec* slot, const Vec* added, Vec h, Vec&) {
        slot[0] = sigmoid(slot[0] + added[0]);
        slot[1] = sigmoid(slot[1] + added[1]);
        slot[2] = tanh(slot[2] + added[2] + slot[0] * slot[3]);
        return (1.0f - slot[1]) * slot[2] + slot[1] * h;
    }
    static INLINE void backward(const Vec* slot, Vec, Vec, Vec h, Vec dh, Vec&, Vec* gradient, Vec& direct) {
        Vec r = slot[0], z = slot[1], n = slot[2], from_hidden = slot[3];
        gradient[2] = dh * (1.0f - z) * (1.0f - n * n);
        gradient[0] = gradient[2] * from_hidden * r * (1.0f - r);
        gradient[1] = dh * (h - n) * z * (1.0f - z);
        gradient[3] = gradient[2] * r;
        direct = dh * z;
    }
};

template <bool RECTIFIED> struct Elman {
    static constexpr int SLOTS = 1;
    static constexpr bool CELL = false, KEPT = false, DIRECT = false;
    static constexpr int FROM_INPUT[] = {0}, FROM_HIDDEN[] = {0};

    static INLINE Vec forward(Vec* slot, const Vec* added, Vec, Vec&) {
        Vec x = slot[0] + added[0];
        slot[0] = RECTIFIED ? (x > Vec{} || x != x ? x : Vec{}) : tanh(x);
        return slot[0];
    }
    static INLINE void backward(const Vec* slot, Vec, Vec, Vec, Vec dh, Vec&, Vec* gradient, Vec& direct) {
        gradient[0] = RECTIFIED ? (slot[0] <= Vec{} ? Vec{} : dh) : dh * (1.0f - slot[0] * slot[0]);
        direct = Vec{};
    }
};

// ------------------------------------------------------------------------------------------------ weights

// The panel of slot s of block u, whose columns are 16 rows of a weight (gates * hidden, k).
template <class T>
inline void slot_panel(const float* weight, int64_t hidden, int64_t u, int gate, int64_t k, T* panel) {
    int64_t first = u * PANEL, columns = std::min<int64_t>(PANEL, hidden - first);
    if (gate < 0) std::memset(panel, 0, panel_size<T>(k) * sizeof(T));
    else to_panel_from_columns<T>(weight + (gate * hidden + first) * k, k, columns, k, panel);
}

// The biases (S, 16) of block u; and for each of so many ids the same with what its one-hot input adds, in rows of `width`.
template <class Cell>
inline void block_biases(
    const float* weight_ih, const float* bias, int64_t hidden, int64_t u, float* biases, float* table, int64_t ids,
    int64_t width) {
    for (int s = 0; s < Cell::SLOTS; ++s)
        for (int64_t j = 0; j < PANEL; ++j) {
            const int64_t unit = u * PANEL + j, at = s * PANEL + j, row = Cell::FROM_INPUT[s] * hidden + unit;
            const bool real = Cell::FROM_INPUT[s] >= 0 && unit < hidden;
            biases[at] = real ? bias[row] : 0;
            for (int64_t id = 0; id < ids; ++id) table[id * width + at] = real ? bias[row] + weight_ih[row * ids + id] : 0;
        }
}

// The units from `from` on of a row of `size`.
static INLINE Vec load_part(const float* row, int64_t from, int64_t size) { return load_some(row + from, size - from); }
static INLINE void store_part(float* row, int64_t from, int64_t size, Vec v) { store_some(row + from, v, size - from); }

// Calls work(cell) with the type that `kind` stands for.
template <class Work> inline void with_cell(int kind, Work work) {
    if (kind == LSTM) work(Lstm());
    else if (kind == GRU) work(Gru());
    else if (kind == TANH) work(Elman<false>());
    else work(Elman<true>());
}

// Calls work(cell, operand).
template <class Work> inline int with_cell_and_operand(int kind, int narrow, Work work) {
    return with_operand(narrow, [&](auto operand) { with_cell(kind, [&](auto cell) { work(cell, operand); }); });
}
