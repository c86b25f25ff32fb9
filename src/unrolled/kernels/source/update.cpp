// What is done to every parameter at every step: the update, clipped by the gradients' global norm, by SGD or AdamW.
#include <cmath>
#include <numeric>
#if defined(__GLIBC__)
#include <malloc.h>
#include <sys/mman.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "gemm.h"

constexpr int64_t GRAIN = 4096;

// The sum of squares of a stretch; blocks in f32, their sums in f64.
static double squares(const float* x, Share mine) {
    double whole = 0;
    for (int64_t from = mine.begin; from < mine.end; from += 256) {
        const int64_t to = std::min(mine.end, from + 256);
        Vec block{};
        int64_t j = from;
        for (; j + LANES <= to; j += LANES) block = block + load(x + j) * load(x + j);
        float rest = sum(block);
        for (; j < to; ++j) rest += x[j] * x[j];
        whole += rest;
    }
    return whole;
}

// w -= rate * g
static void descend(float* w, const float* g, Share mine, float rate) {
    int64_t j = mine.end;
    for (; j - LANES >= mine.begin; j -= LANES) store(w + j - LANES, load(w + j - LANES) - rate * load(g + j - LANES));
    for (; j-- > mine.begin;) w[j] -= rate * g[j];
}

// A step of AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2; the bias of the moments' first steps is in
// `rate` and `scale`.
struct Adam {
    float shrink, kept_mean, new_mean, kept_square, new_square, epsilon;

    void step(float* w, const float* g, float* means, float* squares, Share mine, float factor, float rate, float scale) const {
        for (int64_t j = mine.begin; j < mine.end; j += LANES) {
            const int64_t count = mine.end - j;
            const Vec gradient = factor * load_some(g + j, count);
            const Vec mean = kept_mean * load_some(means + j, count) + new_mean * gradient;
            const Vec square = kept_square * load_some(squares + j, count) + new_square * gradient * gradient;
            store_some(means + j, mean, count);
            store_some(squares + j, square, count);
            store_some(w + j, shrink * load_some(w + j, count) - rate * mean / (root(square) * scale + epsilon), count);
        }
    }
};

// Rows (n, width) of a table's gradient, each with the id of its row of the table.
struct Rows {
    int64_t count, width;
    const int64_t* ids;
    float* gradients;
    const int64_t* in_order;  // their numbers, those of one id one after the other

    // Of these columns: the gradients of one id are added to its first, and zero beyond.
    void add_up(Share mine) const {
        for (int64_t i = 0, first = 0; i < count; ++i) {
            if (ids[in_order[i]] != ids[in_order[first]]) first = i;
            if (i == first) continue;
            float *total = gradients + in_order[first] * width, *more = gradients + in_order[i] * width;
            for (int64_t j = mine.begin; j < mine.end; ++j) total[j] += more[j], more[j] = 0;
        }
    }

    double squares_of(Share mine) const {
        double whole = 0;
        for (int64_t i = 0; i < count; ++i) whole += squares(gradients + i * width, mine);
        return whole;
    }

    void descend_in(float* table, Share mine, float rate) const {
        for (int64_t i = 0; i < count; ++i) descend(table + ids[i] * width, gradients + i * width, mine, rate);
    }
};

// The global norm of gradients, of whose squares each thread sums its part; then, where the norm is finite, a thread's part
// of the step, by the gradients times `factor`: max_norm / norm where the norm is larger.
template <class Squares, class Step>
static void clipped(int threads, double max_norm, double* norm, Squares squares_of, Step step) {
    double parts[64] = {};
    together(std::min(threads, 64), [&](Member me) {
        parts[me.thread] = squares_of(me);
        me.wait();
        double square = 0;
        for (int i = 0; i < me.threads; ++i) square += parts[i];
        const double whole = std::sqrt(square);
        if (me.thread == 0) *norm = whole;
        if (std::isfinite(whole)) step(me, whole > max_norm ? max_norm / whole : 1.0);
    });
}

static double squares_of_all(int count, const float* const* gradients, const int64_t* sizes, Member me) {
    double whole = 0;
    for (int i = 0; i < count; ++i) whole += squares(gradients[i], me.share(sizes[i], GRAIN));
    return whole;
}

// parameters -= rate * gradients, clipped. A thread descends where it summed, from the end back: what it read last is
// still in its cache. One more parameter is a table (height, width) of whose rows few have a gradient: `row_count` of
// them, by ids, several of which may be the same; `apart`: the norm is that of the rows before those of one id are added up.
extern "C" int clip_and_descend(
    int threads, int count, float* const* parameters, const float* const* gradients, const int64_t* sizes,
    int64_t row_count, int64_t width, int64_t height, float* table, const int64_t* ids, float* row_gradients, int apart,
    double max_norm, double rate, double* norm) {
    if (!within(ids, row_count, height)) return NO_SUCH_ID;
    try {
        workspace.reserve(Workspace::room<int64_t>(row_count));
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
    int64_t* in_order = workspace.take<int64_t>(row_count);
    std::iota(in_order, in_order + row_count, 0);
    std::sort(in_order, in_order + row_count, [=](int64_t a, int64_t b) { return ids[a] != ids[b] ? ids[a] < ids[b] : a < b; });
    const Rows rows{row_count, width, ids, row_gradients, in_order};
    const auto squares_of = [&](Member me) {
        const Share columns = me.share(width, LANES);
        if (!apart) rows.add_up(columns);
        return rows.squares_of(columns) + squares_of_all(count, gradients, sizes, me);
    };
    clipped(threads, max_norm, norm, squares_of, [&](Member me, double factor) {
        const float step = rate * factor;
        for (int i = count; i-- > 0;) descend(parameters[i], gradients[i], me.share(sizes[i], GRAIN), step);
        rows.descend_in(table, me.share(width, LANES), step);
    });
    return 0;
}

// A step of AdamW by the clipped gradients; of each parameter its rate and the scale of its root, for those that have
// taken other numbers of steps have other ones.
extern "C" int clip_and_adapt(
    int threads, int count, float* const* parameters, const float* const* gradients, float* const* means,
    float* const* mean_squares, const int64_t* sizes, const double* rates, const double* scales, double max_norm,
    double shrink, double beta1, double beta2, double epsilon, double* norm) {
    const Adam adam{float(shrink), float(beta1), float(1 - beta1), float(beta2), float(1 - beta2), float(epsilon)};
    const auto squares_of = [&](Member me) { return squares_of_all(count, gradients, sizes, me); };
    clipped(threads, max_norm, norm, squares_of, [&](Member me, double factor) {
        for (int i = count; i-- > 0;)
            adam.step(
                parameters[i], gradients[i], means[i], mean_squares[i], me.share(sizes[i], GRAIN), factor, rates[i], scales[i]);
    });
    return 0;
}

// Has the C library keep memory that is given back, for a training asks for the same sizes at every step, and fresh pages
// cost a third of it; and take it in large pages, for in small ones the weights cost more to find than to read.
static void prepare_memory() {
#if defined(__GLIBC__)
    constexpr size_t KEPT = 1 << 30, LARGE_PAGE = 2 << 20;
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_TRIM_THRESHOLD, KEPT);
    if (char* heap = static_cast<char*>(std::malloc(KEPT - (64 << 20)))) {  // addresses, no memory yet
        const size_t begin = round_up(reinterpret_cast<size_t>(heap), LARGE_PAGE);
        madvise(reinterpret_cast<void*>(begin), KEPT - (128 << 20), MADV_HUGEPAGE);
        std::free(heap);
    }
#endif
}

// Asks the system for the processor's matrix unit, where there is one and the kernels use it.
extern "C" int prepare() {
    prepare_memory();
#if defined(__AMX_BF16__)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 ? 0 : 1;
#else
    return 0;
#endif
}
