// What is done to every parameter at every step: the update, clipped by the gradients' global norm.
#include <cmath>
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
    int64_t j = mine.begin;
    for (; j + LANES <= mine.end; j += LANES) store(w + j, load(w + j) - rate * load(g + j));
    for (; j < mine.end; ++j) w[j] -= rate * g[j];
}

// The gradients' global norm, that of `others` too; and where it is finite, parameters -= rate * gradients, the rate times
// max_norm / norm where the norm is larger. A thread descends where it summed, from the end back: what it read last is
// still in its cache.
extern "C" int clip_and_descend(
    int threads, int count, int others, float* const* parameters, const float* const* gradients, const int64_t* sizes,
    double max_norm, double rate, double* norm) {
    threads = std::min(threads, 64);
    double parts[64] = {};
    together(threads, [&](Member me) {
        for (int i = 0; i < count + others; ++i) parts[me.thread] += squares(gradients[i], me.share(sizes[i], GRAIN));
        me.wait();
        double square = 0;
        for (int i = 0; i < me.threads; ++i) square += parts[i];
        const double whole = std::sqrt(square);
        if (me.thread == 0) *norm = whole;
        if (!std::isfinite(whole)) return;
        const float step = rate * (whole > max_norm ? max_norm / whole : 1.0);
        for (int i = count; i-- > 0;) descend(parameters[i], gradients[i], me.share(sizes[i], GRAIN), step);
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
