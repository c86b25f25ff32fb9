// The decoder with its loss: logits = hidden W' + b, and the targets' negative log-likelihood, in blocks of the
// vocabulary. The logits are never whole: of a block they are raised to e while they are in the cache.
//
// Everything is written with the vocabulary down and the tokens (n of them) across, so that weights are rows of A as
// they are. A row's exponentials are taken relative to its target's logit: then their sum is at least one and its
// logarithm is the target's cost. Where that leaves the range of a float, all is done again relative to the largest.
//
// A vocabulary of characters is too small to be shared out among threads: there the tokens are, see the end.
#include <cmath>

#include "gemm.h"

constexpr int64_t STRIP = 64;    // rows of logits made at a time: few enough to stay in the cache
constexpr int64_t BLOCK = 256;   // rows of exponentials that one product of the backward pass takes
constexpr float TOO_LARGE = 1e30f;

struct Problem {
    int64_t tokens, hidden, vocabulary;
    int64_t across() const { return round_up(tokens, 32); }
};


// Logits of `count` words from v on, (count, across) with rows of `across`, without the bias.
template <class T>
static INLINE void logits_of(
    Tiles& tiles, const Problem& z, const float* weight, int64_t v, int64_t count, const T* tokens, T* rows,
    float* logits) {
    const int64_t ld = padded<T>(z.hidden);
    to_rows(weight + v * z.hidden, count, z.hidden, z.hidden, rows, ld);
    multiply<T>(
        tiles, count, panels(z.tokens), z.hidden, rows, ld, tokens, panel_size<T>(z.hidden), logits, z.across(), false);
}

// Panels of the hidden layer, tokens across: this thread's share.
template <class T>
static INLINE void lay_tokens(Member me, const Problem& z, const float* hidden, T* tokens) {
    rows_to_panels(hidden, z.tokens, z.hidden, me.share(panels(z.tokens)), tokens);
}

// hidden (N, H), weight (V, H), bias (V) -> nll (N), and for the backward pass shift (N), sums (N): a token's
// probabilities are exp(logit - shift) / sum. exponentials: (V, across) where they are to be kept, else null.
template <class T>
static void forward(
    int threads, Problem z, const float* hidden, const float* weight, const float* bias, const int64_t* targets,
    float* nll, float* shift, float* sums, T* exponentials) {
    const int64_t across = z.across(), ld = padded<T>(z.hidden);
    workspace.reserve(
        Workspace::room<T>(panels(z.tokens) * panel_size<T>(z.hidden)) +
        threads * (Workspace::room<T>((STRIP + ROW_SLACK) * ld) + Workspace::room<float>(STRIP * across) +
                   Workspace::room<float>(across)) +
        2 * Workspace::room<float>(across));
    T* tokens = workspace.take<T>(panels(z.tokens) * panel_size<T>(z.hidden));
    T* rows = workspace.take<T>(threads * (STRIP + ROW_SLACK) * ld);
    float* logits = workspace.take<float>(threads * STRIP * across);
    float* partial = workspace.take<float>(threads * across);
    float* offset = workspace.take<float>(across);
    float* target = workspace.take<float>(across);
    bool again = false;

    together(threads, [&](Member me) {
        Tiles tiles;
        T* my_rows = rows + me.thread * (STRIP + ROW_SLACK) * ld;
        float* my_logits = logits + me.thread * STRIP * across;
        float* my_partial = partial + me.thread * across;
        lay_tokens(me, z, hidden, tokens);
        const Share mine = me.share(z.tokens);
        for (int64_t n = mine.begin; n < mine.end; ++n) {
            const float *x = hidden + n * z.hidden, *w = weight + targets[n] * z.hidden;
            Vec total{};
            int64_t j = 0;
            for (; j < z.hidden; j += LANES)
                total = total + rounded<T>(load_some(x + j, z.hidden - j)) * rounded<T>(load_some(w + j, z.hidden - j));
            offset[n] = target[n] = sum(total) + bias[targets[n]];
        }
        if (me.thread == 0) for (int64_t n = z.tokens; n < across; ++n) offset[n] = 0;
        me.wait();

        const Share words = me.share(z.vocabulary, STRIP);
        auto sweep = [&](auto each) {
            for (int64_t v = words.begin; v < words.end; v += STRIP) {
                const int64_t count = std::min(STRIP, words.end - v);
                logits_of(tiles, z, weight, v, count, tokens, my_rows, my_logits);
                for (int64_t i = 0; i < count; ++i)
                    for (int64_t n = 0; n < z.tokens; n += LANES)
                        each(v + i, n, load(my_logits + i * across + n) + bias[v + i]);
            }
        };
        auto sum_up = [&] {
            for (int64_t n = 0; n < across; ++n) my_partial[n] = 0;
            sweep([&](int64_t v, int64_t n, Vec logit) {
                Vec e = exp(logit - load(offset + n));
                store(my_partial + n, load(my_partial + n) + e);
                if (exponentials) put(exponentials + v * across + n, e);
            });
            if (exponentials)
                for (int64_t v = words.begin; v < words.end; ++v)
                    std::memset(exponentials + v * across + z.tokens, 0, (across - z.tokens) * sizeof(T));
            me.wait();
            for (int64_t n = mine.begin; n < mine.end; ++n) {
                float total = 0;
                for (int i = 0; i < me.threads; ++i) total += partial[i * across + n];
                sums[n] = total;
                shift[n] = offset[n];
                nll[n] = std::log(total) + offset[n] - target[n];
            }
        };
        sum_up();
        me.wait();
        if (me.thread == 0)
            for (int64_t n = 0; n < z.tokens; ++n) again |= !(sums[n] > 1.0f / TOO_LARGE && sums[n] < TOO_LARGE);
        me.wait();
        if (!again) return;
        for (int64_t n = 0; n < across; ++n) my_partial[n] = -__builtin_inff();
        sweep([&](int64_t, int64_t n, Vec logit) {
            Vec most = load(my_partial + n);
            store(my_partial + n, logit > most ? logit : most);
        });
        me.wait();
        for (int64_t n = mine.begin; n < mine.end; ++n)
            for (int i = 0; i < me.threads; ++i)
                offset[n] = i == 0 ? partial[n] : std::max(offset[n], partial[i * across + n]);
        me.wait();
        sum_up();
    });
}

// gradient (N): of each token's nll. exponentials: those kept by the forward pass, or null: then they are made again.
template <class T>
static void backward(
    int threads, Problem z, const float* gradient, const float* hidden, const float* weight, const float* bias,
    const int64_t* targets, const float* shift, const float* sums, const T* exponentials, float* d_hidden,
    float* d_weight, float* d_bias) {
    const int64_t across = z.across(), ld = padded<T>(z.hidden), H = z.hidden;
    const int64_t wide = panels(H + 1), tall = panel_size<T>(across), upright = round_up(H, PANEL);
    workspace.reserve(
        Workspace::room<T>(exponentials ? 0 : panels(z.tokens) * panel_size<T>(H)) + Workspace::room<T>(wide * tall) +
        Workspace::room<float>(z.tokens * (H + 1)) + 2 * Workspace::room<float>(across) +
        threads * (Workspace::room<T>((STRIP + ROW_SLACK) * ld) + Workspace::room<float>(STRIP * std::max(across, wide * PANEL)) +
                   Workspace::room<T>((BLOCK + ROW_SLACK) * across) + Workspace::room<T>(BLOCK * across) +
                   Workspace::room<T>((upright + ROW_SLACK) * BLOCK) + Workspace::room<float>(upright * across)));
    T* tokens = workspace.take<T>(exponentials ? 0 : panels(z.tokens) * panel_size<T>(H));
    T* scaled_panels = workspace.take<T>(wide * tall);  // the hidden layer over the sums, and a column of 1 over the sums
    float* scaled = workspace.take<float>(z.tokens * (H + 1));
    float* offset = workspace.take<float>(across);
    float* factor = workspace.take<float>(across);
    T* rows = workspace.take<T>(threads * (STRIP + ROW_SLACK) * ld);
    float* strips = workspace.take<float>(threads * STRIP * std::max(across, wide * PANEL));
    T* blocks = workspace.take<T>(threads * (BLOCK + ROW_SLACK) * across);
    T* block_panels = workspace.take<T>(threads * BLOCK * across);
    T* columns = workspace.take<T>(threads * (upright + ROW_SLACK) * BLOCK);
    float* totals = workspace.take<float>(threads * upright * across);

    together(threads, [&](Member me) {
        Tiles tiles;
        T* my_rows = rows + me.thread * (STRIP + ROW_SLACK) * ld;
        float* strip = strips + me.thread * STRIP * std::max(across, wide * PANEL);
        T* block = blocks + me.thread * (BLOCK + ROW_SLACK) * across;
        T* panel = block_panels + me.thread * BLOCK * across;
        T* column = columns + me.thread * (upright + ROW_SLACK) * BLOCK;
        float* total = totals + me.thread * upright * across;
        std::memset(total, 0, upright * across * sizeof(float));
        if (!exponentials) lay_tokens(me, z, hidden, tokens);
        const Share mine = me.share(z.tokens);
        for (int64_t n = mine.begin; n < mine.end; ++n) {
            offset[n] = shift[n];
            factor[n] = gradient[n] / sums[n];
            for (int64_t j = 0; j < H; ++j) scaled[n * (H + 1) + j] = hidden[n * H + j] * factor[n];
            scaled[n * (H + 1) + H] = factor[n];
        }
        if (me.thread == 0) for (int64_t n = z.tokens; n < across; ++n) offset[n] = factor[n] = 0;
        me.wait();
        const Share some = me.share(wide);
        for (int64_t p = some.begin; p < some.end; ++p)
            to_panel<T>(
                [&](int64_t n) { return scaled + n * (H + 1) + p * PANEL; }, z.tokens, padded<T>(across),
                std::min<int64_t>(PANEL, H + 1 - p * PANEL), scaled_panels + p * tall);
        me.wait();

        // A token's own exponential. Its term in the products is of rounded operands; it is made exact, for where the model
        // is sure of the target it all but cancels with what is taken away.
        auto own = [&](int64_t n) {
            if constexpr (sizeof(T) == 2) return exponentials ? from_bf16(exponentials[targets[n] * across + n]) : 0.0f;
            else return 0.0f;
        };
        const Share words = me.share(z.vocabulary, STRIP);
        for (int64_t v = words.begin + round_up(words.end - words.begin, BLOCK) - BLOCK; v >= words.begin; v -= BLOCK) {
            const int64_t count = std::min(BLOCK, words.end - v);
            const T* e = exponentials ? exponentials + v * across : block;
            if (!exponentials)
                for (int64_t i = 0; i < count; i += STRIP) {
                    const int64_t part = std::min(STRIP, count - i);
                    logits_of(tiles, z, weight, v + i, part, tokens, my_rows, strip);
                    for (int64_t k = 0; k < part; ++k) {
                        T* row = block + (i + k) * across;
                        for (int64_t n = 0; n < z.tokens; n += LANES)
                            put(row + n, exp(load(strip + k * across + n) + bias[v + i + k] - load(offset + n)));
                        for (int64_t n = z.tokens; n < across; ++n) put1(row + n, 0);
                    }
                }
            for (int64_t i = 0; i < count; i += STRIP) {
                const int64_t part = std::min(STRIP, count - i), wide_ld = wide * PANEL;
                multiply<T>(tiles, part, wide, across, e + i * across, across, scaled_panels, tall, strip, wide_ld, false);
                for (int64_t k = 0; k < part; ++k) {
                    std::memcpy(d_weight + (v + i + k) * H, strip + k * wide_ld, H * sizeof(float));
                    d_bias[v + i + k] = strip[k * wide_ld + H];
                }
            }
            const int64_t depth = padded<T>(count);
            to_columns(weight + v * H, count, H, H, column, depth);
            for (int64_t p = 0; p < panels(z.tokens); ++p)
                panel_of(e + p * PANEL, count, depth, across, panel + p * depth * PANEL);
            multiply<T>(
                tiles, H, panels(z.tokens), count, column, depth, panel, depth * PANEL, total, across, true);
        }
        for (int64_t n = 0; n < z.tokens; ++n) {
            const int64_t v = targets[n];
            if (v < words.begin || v >= words.end) continue;
            const float e = own(n), *exact = scaled + n * (H + 1);
            for (int64_t j = 0; j < H; ++j)
                d_weight[v * H + j] += e * (exact[j] - rounded<T>(exact[j])) - gradient[n] * hidden[n * H + j];
            d_bias[v] += e * (exact[H] - rounded<T>(exact[H])) - gradient[n];
        }
        me.wait();
        for (int64_t n = mine.begin; n < mine.end; ++n) {
            const float e = own(n), *row = weight + targets[n] * H;
            for (int64_t j = 0; j < H; ++j) {
                float value = e * (row[j] - rounded<T>(row[j]));
                for (int i = 0; i < me.threads; ++i) value += totals[(i * upright + j) * across + n];
                d_hidden[n * H + j] = value * factor[n] - gradient[n] * row[j];
            }
        }
    });
}

// ------------------------------------------------------------------------------------------------ few words

constexpr int64_t FEW_WORDS = 256;

// Tokens down, words across: logits (count, width) of the tokens from n on, -inf beyond the vocabulary.
template <class T>
static INLINE void logits_of_tokens(
    Tiles& tiles, const Problem& z, const float* hidden, const float* bias, int64_t n, int64_t count, const T* words,
    T* rows, float* logits) {
    const int64_t ld = padded<T>(z.hidden), width = panels(z.vocabulary) * PANEL;
    to_rows(hidden + n * z.hidden, count, z.hidden, z.hidden, rows, ld);
    multiply<T>(
        tiles, count, panels(z.vocabulary), z.hidden, rows, ld, words, panel_size<T>(z.hidden), logits, width, false);
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t v = 0; v < z.vocabulary; ++v) logits[i * width + v] += bias[v];
        for (int64_t v = z.vocabulary; v < width; ++v) logits[i * width + v] = -__builtin_inff();
    }
}

// Panels of the words, k over the hidden layer: this thread's share.
template <class T> static INLINE void lay_words(Member me, const Problem& z, const float* weight, T* words) {
    rows_to_panels(weight, z.vocabulary, z.hidden, me.share(panels(z.vocabulary)), words);
}

// As `forward`, shift being the largest logit.
template <class T>
static void forward_few(
    int threads, Problem z, const float* hidden, const float* weight, const float* bias, const int64_t* targets,
    float* nll, float* shift, float* sums) {
    const int64_t ld = padded<T>(z.hidden), width = panels(z.vocabulary) * PANEL;
    workspace.reserve(
        Workspace::room<T>(width * ld) + Workspace::room<T>(threads * (STRIP + ROW_SLACK) * ld) +
        Workspace::room<float>(threads * STRIP * width));
    T* words = workspace.take<T>(width * ld);
    T* rows = workspace.take<T>(threads * (STRIP + ROW_SLACK) * ld);
    float* strips = workspace.take<float>(threads * STRIP * width);
    together(threads, [&](Member me) {
        Tiles tiles;
        T* my_rows = rows + me.thread * (STRIP + ROW_SLACK) * ld;
        float* logits = strips + me.thread * STRIP * width;
        lay_words(me, z, weight, words);
        me.wait();
        const Share mine = me.share(z.tokens);
        for (int64_t begin = mine.begin; begin < mine.end; begin += STRIP) {
            const int64_t count = std::min(STRIP, mine.end - begin);
            logits_of_tokens(tiles, z, hidden, bias, begin, count, words, my_rows, logits);
            for (int64_t i = 0; i < count; ++i) {
                const float* row = logits + i * width;
                Vec high = load(row), total{};
                for (int64_t v = LANES; v < width; v += LANES) high = load(row + v) > high ? load(row + v) : high;
                const int64_t n = begin + i;
                shift[n] = largest(high);
                for (int64_t v = 0; v < width; v += LANES) total = total + exp(load(row + v) - shift[n]);
                sums[n] = sum(total);
                nll[n] = std::log(sums[n]) + shift[n] - row[targets[n]];
            }
        }
    });
}

// As `backward`; the probabilities are made again.
template <class T>
static void backward_few(
    int threads, Problem z, const float* gradient, const float* hidden, const float* weight, const float* bias,
    const int64_t* targets, const float* shift, const float* sums, float* d_hidden, float* d_weight, float* d_bias) {
    const int64_t ld = padded<T>(z.hidden), H = z.hidden, V = z.vocabulary, width = panels(V) * PANEL;
    const int64_t across = panels(H) * PANEL, depth = padded<T>(width);
    workspace.reserve(
        Workspace::room<T>(width * ld) + Workspace::room<T>(across * depth) +
        threads * (Workspace::room<T>((BLOCK + ROW_SLACK) * ld) + Workspace::room<T>(BLOCK * across) +
                   Workspace::room<T>((BLOCK + ROW_SLACK) * depth) + Workspace::room<T>((depth + ROW_SLACK) * BLOCK) +
                   Workspace::room<float>(BLOCK * width) + Workspace::room<float>(BLOCK * PANEL) +
                   Workspace::room<float>(width * (across + 1))));
    T* words = workspace.take<T>(width * ld);
    T* words_across = workspace.take<T>(across * depth);  // panels of the hidden layer, k over the words
    T* rows = workspace.take<T>(threads * (BLOCK + ROW_SLACK) * ld);
    T* token_panels = workspace.take<T>(threads * BLOCK * across);
    T* d_rows = workspace.take<T>(threads * (BLOCK + ROW_SLACK) * depth);
    T* d_columns = workspace.take<T>(threads * (depth + ROW_SLACK) * BLOCK);
    float* strips = workspace.take<float>(threads * BLOCK * width);
    float* scratches = workspace.take<float>(threads * BLOCK * PANEL);
    float* totals = workspace.take<float>(threads * width * (across + 1));  // of the weights, then of the biases

    together(threads, [&](Member me) {
        Tiles tiles;
        T* my_rows = rows + me.thread * (BLOCK + ROW_SLACK) * ld;
        T* panel = token_panels + me.thread * BLOCK * across;
        T* d_row = d_rows + me.thread * (BLOCK + ROW_SLACK) * depth;
        T* d_column = d_columns + me.thread * (depth + ROW_SLACK) * BLOCK;
        float* strip = strips + me.thread * BLOCK * width;
        float* total = totals + me.thread * width * (across + 1);
        float* total_bias = total + width * across;
        std::memset(total, 0, width * (across + 1) * sizeof(float));
        lay_words(me, z, weight, words);
        const Share some = me.share(panels(H));
        for (int64_t p = some.begin; p < some.end; ++p)
            to_panel<T>(
                [&](int64_t v) { return weight + v * H + p * PANEL; }, V, depth, std::min<int64_t>(PANEL, H - p * PANEL),
                words_across + p * depth * PANEL);
        me.wait();
        const Share mine = me.share(z.tokens);
        for (int64_t begin = mine.begin; begin < mine.end; begin += BLOCK) {
            const int64_t count = std::min(BLOCK, mine.end - begin), long_ld = padded<T>(count);
            logits_of_tokens(tiles, z, hidden, bias, begin, count, words, my_rows, strip);
            for (int64_t i = 0; i < count; ++i) {
                float* row = strip + i * width;
                const int64_t n = begin + i;
                const float factor = gradient[n] / sums[n];
                for (int64_t v = 0; v < width; v += LANES) store(row + v, exp(load(row + v) - shift[n]) * factor);
                row[targets[n]] -= gradient[n];
                for (int64_t v = 0; v < width; v += LANES) store(total_bias + v, load(total_bias + v) + load(row + v));
            }
            to_rows(strip, count, width, width, d_row, depth);
            multiply_exactly<T>(
                tiles, count, H, V, d_row, depth, words_across, depth * PANEL, d_hidden + begin * H, H,
                scratches + me.thread * BLOCK * PANEL);
            to_columns(strip, count, width, width, d_column, long_ld);
            for (int64_t p = 0; p < panels(H); ++p)
                to_panel<T>(
                    [&](int64_t i) { return hidden + (begin + i) * H + p * PANEL; }, count, long_ld,
                    std::min<int64_t>(PANEL, H - p * PANEL), panel + p * long_ld * PANEL);
            multiply<T>(
                tiles, V, panels(H), count, d_column, long_ld, panel, long_ld * PANEL, total, across, true);
        }
        me.wait();
        const Share own = me.share(V);
        for (int64_t v = own.begin; v < own.end; ++v) {
            d_bias[v] = 0;
            std::memset(d_weight + v * H, 0, H * sizeof(float));
            for (int i = 0; i < me.threads; ++i) {
                const float* part = totals + i * width * (across + 1);
                d_bias[v] += part[width * across + v];
                for (int64_t j = 0; j < H; ++j) d_weight[v * H + j] += part[v * across + j];
            }
        }
    });
}

// ------------------------------------------------------------------------------------------------ C

extern "C" int decoder_forward(
    int narrow, int threads, int64_t tokens, int64_t hidden_size, int64_t vocabulary, const float* hidden,
    const float* weight, const float* bias, const int64_t* targets, float* nll, float* shift, float* sums,
    void* exponentials) {
    Problem z{tokens, hidden_size, vocabulary};
    if (!within(targets, tokens, vocabulary)) return NO_SUCH_ID;
    return with_operand(narrow, [&](auto operand) {
        using T = decltype(operand);
        if (vocabulary <= FEW_WORDS) forward_few<T>(threads, z, hidden, weight, bias, targets, nll, shift, sums);
        else forward(threads, z, hidden, weight, bias, targets, nll, shift, sums, static_cast<T*>(exponentials));
    });
}

extern "C" int decoder_backward(
    int narrow, int threads, int64_t tokens, int64_t hidden_size, int64_t vocabulary, const float* gradient,
    const float* hidden, const float* weight, const float* bias, const int64_t* targets, const float* shift, const float* sums,
    const void* exponentials, float* d_hidden, float* d_weight, float* d_bias) {
    if (!within(targets, tokens, vocabulary)) return NO_SUCH_ID;
    Problem z{tokens, hidden_size, vocabulary};
    return with_operand(narrow, [&](auto operand) {
        using T = decltype(operand);
        if (vocabulary <= FEW_WORDS)
            backward_few<T>(
                threads, z, gradient, hidden, weight, bias, targets, shift, sums, d_hidden, d_weight, d_bias);
        else
            backward(
                threads, z, gradient, hidden, weight, bias, targets, shift, sums, static_cast<const T*>(exponentials),
                d_hidden, d_weight, d_bias);
    });
}
