// What is done to every parameter at every step: the gradients' norm, the clipped update; and dropout.
#include <cmath>
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "gemm.h"

constexpr int64_t GRAIN = 4096;

// The square of the global norm, over gradients[i] of sizes[i]; stretches in f32, their sums in f64.
static double square(int threads, int count, const float* const* gradients, const int64_t* sizes) {
    double parts[64] = {};
    together(std::min(threads, 64), [&](Member me) {
        double whole = 0;
        for (int i = 0; i < count; ++i) {
            const Share mine = me.share(sizes[i], GRAIN);
            for (int64_t from = mine.begin; from < mine.end; from += 256) {
                const int64_t to = std::min(mine.end, from + 256);
                Vec stretch{};
                int64_t j = from;
                for (; j + LANES <= to; j += LANES) {
                    Vec x = load(gradients[i] + j);
                    stretch = stretch + x * x;
                }
                float rest = sum(stretch);
                for (; j < to; ++j) rest += gradients[i][j] * gradients[i][j];
                whole += rest;
            }
        }
        parts[me.thread] = whole;
    });
    double whole = 0;
    for (double part : parts) whole += part;
    return whole;
}

extern "C" int square_of_norm(
    int threads, int count, const float* const* gradients, const int64_t* sizes, double* result) {
    *result = square(threads, count, gradients, sizes);
    return 0;
}

// Asks the system for the processor's matrix unit, where there is one and the kernels use it; and has the C library keep
// memory that is given back, for a training asks for the same sizes at every step, and fresh pages cost a third of it.
extern "C" int prepare() {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
#if defined(__AMX_BF16__)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 ? 0 : 1;
#else
    return 0;
#endif
}

// parameters -= rate * gradients
extern "C" int descend(
    int threads, int count, float* const* parameters, const float* const* gradients, const int64_t* sizes, float rate) {
    together(threads, [&](Member me) {
        for (int i = 0; i < count; ++i) {
            const Share mine = me.share(sizes[i], GRAIN);
            int64_t j = mine.begin;
            float* w = parameters[i];
            const float* g = gradients[i];
            for (; j + LANES <= mine.end; j += LANES) store(w + j, load(w + j) - rate * load(g + j));
            for (; j < mine.end; ++j) w[j] -= rate * g[j];
        }
    });
    return 0;
}
