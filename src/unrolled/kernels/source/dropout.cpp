// Dropout whose mask is a function of a seed and of the place, so that the backward pass makes it again.
#include "gemm.h"

typedef uint32_t VecU __attribute__((vector_size(LANES * 4)));

// The last steps of MurmurHash3: every bit of the result depends on every bit of x.
static INLINE VecU mixed(VecU x) {
    x = x ^ (x >> 16);
    x = x * 0x85ebca6bu;
    x = x ^ (x >> 13);
    x = x * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

// y = x / (1 - p) where the hash of the place is at least `threshold` = p 2^32, else 0.
extern "C" int dropout(int threads, int64_t size, int64_t threshold, float scale, int64_t seed, const float* x, float* y) {
    const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    together(threads, [&](Member me) {
        const Share mine = me.share(size, LANES);
        VecU lane;
        for (int i = 0; i < LANES; ++i) lane[i] = i;
        for (int64_t i = mine.begin; i < mine.end; i += LANES) {
            VecU place = lane + static_cast<uint32_t>(i);
            VecU hash = mixed(mixed(place + low) ^ high ^ static_cast<uint32_t>(i >> 32));
            VecI kept = hash >= static_cast<uint32_t>(threshold);
            if (i + LANES <= size) {
                store(y + i, kept ? load(x + i) * scale : Vec{});
            } else {
                for (int64_t j = i; j < size; ++j) y[j] = kept[j - i] ? x[j] * scale : 0;
            }
        }
    });
    return 0;
}
