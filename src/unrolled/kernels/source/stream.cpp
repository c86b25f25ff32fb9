// One step of a whole model for one or few streams: weights laid out once, then read from end to end for each token.
//
// A layer multiplies [input, hidden layer before] by one matrix; where its inputs are one-hot it adds a row of a table.
// For a single stream the first layer's product with a token's vector is remembered, as words come again and again: then
// that part of the matrix need not be read.
#include <cmath>

#include "cells.h"

struct Layer {
    int kind, one_hot;
    int64_t inputs, hidden;
    const void* panels;   // (U, S, K / G, 16, G), K: input and hidden layer
    const float* biases;  // (U, S, 16)
    float* table;         // (inputs, U, S, 16), biases and all, where inputs are one-hot; (slots, U, S, 16) of what is remembered
    float* h;             // (B, H), read and written
    float* c;             // (B, H), an LSTM's
    int64_t* known;       // (slots) the id in each, from 1
    int64_t slots;
};

template <class T> static int64_t input_depth(const Layer& layer) { return layer.one_hot ? 0 : padded<T>(layer.inputs); }
template <class T> static int64_t depth(const Layer& layer) { return input_depth<T>(layer) + padded<T>(layer.hidden); }


constexpr int64_t AT_ONCE = 8;  // panels of the decoder
// A small decoder is read forth for one token and back for the next: what of it is still in the cache is then read first.
constexpr int64_t CACHED = 8 << 20;
static thread_local bool back = false;

template <class T, class Cell>
static void lay_out(const Layer& layer, const float* weight_ih, const float* weight_hh, const float* bias, T* panel,
                    float* biases, float* table) {
    const int64_t width = panels(layer.hidden) * Cell::SLOTS * PANEL;
    for (int64_t u = 0; u < panels(layer.hidden); ++u) {
        const int64_t at = u * Cell::SLOTS * PANEL;
        block_biases<Cell>(
            weight_ih, bias, layer.hidden, u, biases + at, table + at, layer.one_hot ? layer.inputs : 0, width);
        for (int s = 0; s < Cell::SLOTS; ++s, panel += depth<T>(layer) * PANEL) {
            if (!layer.one_hot) slot_panel(weight_ih, layer.hidden, u, Cell::FROM_INPUT[s], layer.inputs, panel);
            slot_panel(
                weight_hh, layer.hidden, u, Cell::FROM_HIDDEN[s], layer.hidden, panel + input_depth<T>(layer) * PANEL);
        }
    }
}

// This thread's units of a layer: their products, their arithmetic, their place in the row of the layer above.
template <class T, class Cell>
static void advance(
    Tiles& tiles, Member me, int64_t batch, const Layer& layer, const int64_t* ids, const T* row, float* products,
    T* above, int64_t above_ld) {
    constexpr int S = Cell::SLOTS;
    const Share own = me.share(panels(layer.hidden));
    const int64_t K = depth<T>(layer), first = own.begin * S * PANEL, width = panels(layer.hidden) * S * PANEL;
    const int64_t own_width = (own.end - own.begin) * S * PANEL;
    if (!own_width) return;
    const T* weights = static_cast<const T*>(layer.panels) + first * K;
    const bool remembers = layer.slots && batch == 1;
    const int64_t done = remembers ? input_depth<T>(layer) : 0;
    if (remembers) {
        const int64_t slot = *ids % layer.slots;
        float* remembered = layer.table + slot * width + first;
        if (layer.known[slot] != *ids + 1)
            multiply<T>(tiles, 1, own_width / PANEL, done, row, K, weights, K * PANEL, remembered, width, false);
        std::memcpy(products + first, remembered, own_width * sizeof(float));
    }
    multiply<T>(
        tiles, batch, own_width / PANEL, K - done, row + done, K, weights + done * PANEL, K * PANEL, products + first,
        width, remembers);
    for (int64_t b = 0; b < batch; ++b) {
        const float* constant = layer.one_hot ? layer.table + ids[b] * width : layer.biases;
        for (int64_t unit = own.begin * PANEL; unit < own.end * PANEL; unit += LANES) {
            const int64_t block = unit / PANEL * S * PANEL + unit % PANEL;
            Vec slot[S], added[S], c{}, h = load_part(layer.h + b * layer.hidden, unit, layer.hidden);
            for (int s = 0; s < S; ++s) {
                slot[s] = load(products + b * width + block + s * PANEL);
                added[s] = load(constant + block + s * PANEL);
            }
            if (Cell::CELL) c = load_part(layer.c + b * layer.hidden, unit, layer.hidden);
            h = Cell::forward(slot, added, h, c);
            store_part(layer.h + b * layer.hidden, unit, layer.hidden, h);
            if (Cell::CELL) store_part(layer.c + b * layer.hidden, unit, layer.hidden, c);
            if (unit + LANES <= layer.hidden) put(above + b * above_ld + unit, h);
            else for (int64_t j = unit; j < layer.hidden; ++j) put1(above + b * above_ld + j, h[j - unit]);
        }
    }
}

// ids (B) -> logits (B, panels of V), and the logarithm of the sum of their exponentials (B).
template <class T>
static void step(
    int threads, int64_t batch, int64_t count, const Layer* layers, const int64_t* ids, const float* embedding,
    int64_t vocabulary, const T* decoder, const float* decoder_bias, float* logits, float* normaliser) {
    const int64_t top = layers[count - 1].hidden, top_depth = padded<T>(top), across = panels(vocabulary) * PANEL;
    size_t room = Workspace::room<T>((batch + ROW_SLACK) * top_depth) + 2 * Workspace::room<float>(threads * batch);
    for (int64_t l = 0; l < count; ++l)
        room += Workspace::room<T>((batch + ROW_SLACK) * depth<T>(layers[l])) +
                Workspace::room<float>(batch * panels(layers[l].hidden) * 4 * PANEL);
    workspace.reserve(room);
    T* rows[65];
    float* products[64];
    for (int64_t l = 0; l < count; ++l) {
        rows[l] = workspace.take<T>((batch + ROW_SLACK) * depth<T>(layers[l]));
        products[l] = workspace.take<float>(batch * panels(layers[l].hidden) * 4 * PANEL);
    }
    T* hidden = rows[count] = workspace.take<T>((batch + ROW_SLACK) * top_depth);
    float* most = workspace.take<float>(threads * batch);
    float* sums = workspace.take<float>(threads * batch);

    const int64_t weights = across * top_depth * static_cast<int64_t>(sizeof(T));
    back = !back && weights < CACHED;
    together(threads, [&, reversed = back](Member me) {
        Tiles tiles;
        const Share mine = me.share(count);
        for (int64_t l = mine.begin; l < mine.end; ++l) {
            const Layer& layer = layers[l];
            const int64_t K = depth<T>(layer), from = input_depth<T>(layer);
            to_rows(layer.h, batch, layer.hidden, layer.hidden, rows[l] + from, K, K - from);
            for (int64_t b = 0; b < batch && !layer.one_hot; ++b)
                for (int64_t j = layer.inputs; j < from; ++j) put1(rows[l] + b * K + j, 0);
            for (int64_t b = 0; b < batch && l == 0 && !layer.one_hot; ++b)
                to_rows(embedding + ids[b] * layer.inputs, 1, layer.inputs, layer.inputs, rows[0] + b * K, K, from);
        }
        if (me.thread == 0)
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t j = top; j < top_depth; ++j) put1(hidden + b * top_depth + j, 0);
        me.wait();
        for (int64_t l = 0; l < count; ++l) {
            const int64_t above = l + 1 < count ? depth<T>(layers[l + 1]) : top_depth;
            with_cell(layers[l].kind, [&](auto cell) {
                advance<T, decltype(cell)>(
                    tiles, me, batch, layers[l], ids, rows[l], products[l], rows[l + 1], above);
            });
            me.wait();
            if (l == 0 && layers[l].slots && batch == 1 && me.thread == 0) layers[l].known[*ids % layers[l].slots] = *ids + 1;
        }
        const Share words = me.share(panels(vocabulary));
        const int64_t first = words.begin * PANEL, last = std::min(words.end * PANEL, vocabulary);
        for (int64_t p = words.begin; p < words.end; p += AT_ONCE) {
            const int64_t count = std::min(AT_ONCE, words.end - p), from = reversed ? words.begin + words.end - p - count : p;
            multiply<T>(
                tiles, batch, count, top, hidden, top_depth, decoder + from * top_depth * PANEL, top_depth * PANEL,
                logits + from * PANEL, across, false);
        }
        for (int64_t b = 0; b < batch; ++b) {
            float* row = logits + b * across;
            Vec high = splat(-__builtin_inff());
            for (int64_t v = first; v < words.end * PANEL; v += LANES) {
                Vec logit = load(row + v) + load_part(decoder_bias, v, vocabulary);
                for (int64_t j = vocabulary; j < v + LANES; ++j) if (j >= v) logit[j - v] = -__builtin_inff();
                store(row + v, logit);
                high = logit > high ? logit : high;
            }
            const float peak = largest(high), base = peak == -__builtin_inff() ? 0 : peak;  // of words that cannot be, or none
            Vec total{};
            for (int64_t v = first; v < words.end * PANEL; v += LANES) total = total + exp(load(row + v) - base);
            most[me.thread * batch + b] = peak;
            sums[me.thread * batch + b] = first < last ? sum(total) : 0;
        }
        me.wait();
        if (me.thread == 0)
            for (int64_t b = 0; b < batch; ++b) {
                float peak = most[b], total = 0;
                for (int i = 1; i < me.threads; ++i) peak = std::max(peak, most[i * batch + b]);
                for (int i = 0; i < me.threads; ++i)
                    if (sums[i * batch + b] != 0) total += sums[i * batch + b] * std::exp(most[i * batch + b] - peak);
                normaliser[b] = peak + std::log(total);
            }
    });
}

// ------------------------------------------------------------------------------------------------ C

// How many operands the panels of a layer take.
extern "C" int layer_size(int kind, int narrow, int one_hot, int64_t inputs, int64_t hidden, int64_t* size) {
    Layer layer{kind, one_hot, inputs, hidden};
    const int64_t K = narrow ? depth<bf16>(layer) : depth<float>(layer);
    *size = panels(hidden) * (kind <= GRU ? 4 : 1) * PANEL * K;
    return 0;
}

extern "C" int lay_out_layer(
    int kind, int narrow, int one_hot, int64_t inputs, int64_t hidden, const float* weight_ih, const float* weight_hh,
    const float* bias, void* panels, float* biases, float* table) {
    Layer layer{kind, one_hot, inputs, hidden};
    return with_cell_and_operand(kind, narrow, [&](auto cell, auto operand) {
        lay_out<decltype(operand), decltype(cell)>(
            layer, weight_ih, weight_hh, bias, static_cast<decltype(operand)*>(panels), biases, table);
    });
}

extern "C" int lay_out_decoder(int narrow, int64_t hidden, int64_t vocabulary, const float* weight, void* target) {
    return with_operand(narrow, [&](auto operand) {
        using T = decltype(operand);
        rows_to_panels(weight, vocabulary, hidden, Share(panels(vocabulary), 0, 1), static_cast<T*>(target));
    });
}

// A packed model begins with this; places are in bytes from its beginning.
struct Header {
    int64_t size, narrow, count, vocabulary, embedding, decoder, decoder_bias, known, slots;
    struct {
        int64_t kind, one_hot, inputs, hidden, panels, biases, table;
    } layers[64];
};

static bool is_packed(const char* packed, int64_t size) {
    return size > static_cast<int64_t>(sizeof(Header)) && reinterpret_cast<const Header*>(packed)->size == size;
}

// packed: written where it remembers. state: for each layer h (B, H), and for an LSTM c (B, H), one after the other; read and written.
extern "C" int step_of_model(
    char* packed, int64_t packed_size, int threads, int64_t batch, const int64_t* ids, float* state, int64_t state_size, int64_t vocabulary,
    float* logits, float* normaliser) {
    const Header& header = *reinterpret_cast<const Header*>(packed);
    if (!is_packed(packed, packed_size)) return NO_SUCH_MODEL;
    if (vocabulary != header.vocabulary) return NO_SUCH_STATE;
    if (!within(ids, batch, header.vocabulary)) return NO_SUCH_ID;
    Layer layers[64];
    for (int64_t l = 0; l < header.count; ++l) {
        const auto& from = header.layers[l];
        const int64_t size = batch * from.hidden;
        layers[l] = {
            static_cast<int>(from.kind), static_cast<int>(from.one_hot), from.inputs, from.hidden, packed + from.panels,
            reinterpret_cast<const float*>(packed + from.biases), reinterpret_cast<float*>(packed + from.table), state,
            state + size, reinterpret_cast<int64_t*>(packed + header.known), l == 0 ? header.slots : 0};
        state += from.kind == LSTM ? 2 * size : size;
        state_size -= from.kind == LSTM ? 2 * size : size;
    }
    if (state_size != 0) return NO_SUCH_STATE;
    return with_operand(header.narrow, [&](auto operand) {
        using T = decltype(operand);
        step<T>(
            threads, batch, header.count, layers, ids, reinterpret_cast<const float*>(packed + header.embedding),
            header.vocabulary, reinterpret_cast<const T*>(packed + header.decoder),
            reinterpret_cast<const float*>(packed + header.decoder_bias), logits, normaliser);
    });
}

// The k largest of n values, falling, those of equal size by rising place; places from 0.
static void find_largest(int64_t n, int64_t k, const float* values, int64_t* places, float* found) {
    int64_t held = 0;
    auto insert = [&](int64_t place) {
        int64_t i = held < k ? held++ : k - 1;
        for (; i > 0 && found[i - 1] < values[place]; --i) {
            found[i] = found[i - 1];
            places[i] = places[i - 1];
        }
        found[i] = values[place];
        places[i] = place;
    };
    int64_t i = 0;
    for (; i < n && held < k; ++i) insert(i);
    for (; i + LANES <= n; i += LANES) {
        VecI above = load(values + i) > splat(found[k - 1]);
        int any = 0;
        for (int j = 0; j < LANES; ++j) any |= above[j];
        if (any)
            for (int64_t j = i; j < i + LANES; ++j)
                if (values[j] > found[k - 1]) insert(j);
    }
    for (; i < n; ++i)
        if (values[i] > found[k - 1]) insert(i);
}

// One token of one stream -> the k likeliest to follow, and the natural logarithms of their probabilities.
extern "C" int likeliest_of_model(
    char* packed, int64_t packed_size, int threads, const int64_t* id, float* state, int64_t state_size, int64_t k, int64_t* places,
    float* log_probs) {
    static thread_local Workspace answer;
    if (!is_packed(packed, packed_size)) return NO_SUCH_MODEL;
    const int64_t vocabulary = reinterpret_cast<const Header*>(packed)->vocabulary;
    if (k < 1 || k > vocabulary) return NO_SUCH_COUNT;
    try {
        answer.reserve(Workspace::room<float>(panels(vocabulary) * PANEL));
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
    float normaliser, *logits = answer.take<float>(panels(vocabulary) * PANEL);
    if (int failure = step_of_model(packed, packed_size, threads, 1, id, state, state_size, vocabulary, logits, &normaliser)) return failure;
    find_largest(vocabulary, k, logits, places, log_probs);
    for (int64_t i = 0; i < k; ++i) log_probs[i] -= normaliser;
    return 0;
}
