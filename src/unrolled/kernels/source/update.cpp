// What is done to every parameter at every step: the update, clipped by the gradients' global norm.
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

// The gradients' global norm; and where it is finite, parameters -= rate * gradients, the rate times max_norm / norm where
// the norm is larger. A thread descends where it summed, from the end back: what it read last is still in its cache.
// One more parameter is a table (height, width) of whose rows few have a gradient: `row_count` of them, by ids, several of
// which may be the same; `apart`: the norm is that of the rows before those of one id are added up.
extern "C" int clip_and_descend(
    int threads, int count, float* const* parameters, const float* const* gradients, const int64_t* sizes,
    int64_t row_count, int64_t width, int64_t height, float* table, const int64_t* ids, float* row_gradients, int apart,
    double max_norm, double rate, double* norm) {
    if (!within(ids, row_count, height)) return NO_SUCH_ID;
    static thread_local Workspace workspace;
    try {
        workspace.reserve(Workspace::room<int64_t>(row_count));
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
    int64_t* in_order = workspace.take<int64_t>(row_count);
    std::iota(in_order, in_order + row_count, 0);
    std::sort(in_order, in_order + row_count, [=](int64_t a, int64_t b) { return ids[a] != ids[b] ? ids[a] < ids[b] : a < b; });
    const Rows rows{row_count, width, ids, row_gradients, in_order};
    threads = std::min(threads, 64);
    double parts[64] = {};
    together(threads, [&](Member me) {
        const Share columns = me.share(width, LANES);
        if (!apart) rows.add_up(columns);
        parts[me.thread] = rows.squares_of(columns);
        for (int i = 0; i < count; ++i) parts[me.thread] += squares(gradients[i], me.share(sizes[i], GRAIN));
        me.wait();
        double square = 0;
        for (int i = 0; i < me.threads; ++i) square += parts[i];
        const double whole = std::sqrt(square);
        if (me.thread == 0) *norm = whole;
        if (!std::isfinite(whole)) return;
        const float step = rate * (whole > max_norm ? max_norm / whole : 1.0);
        for (int i = count; i-- > 0;) descend(parameters[i], gradients[i], me.share(sizes[i], GRAIN), step);
        rows.descend_in(table, columns, step);
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
