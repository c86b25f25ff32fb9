// Products of one thread: C (M, N) = [C +] A (M, K) B (K, N), operands f32 or bf16, sums in f32.
//
// A lies in rows, k running fastest. B lies in panels of 16 columns, and within a panel k runs in groups that one
// instruction multiplies: (K / G, 16, G), G = 2 for bf16 and 1 for f32. C lies in rows. Operands in bf16 are padded
// with zeros to whole blocks of K_BLOCK; rows of A may be read, and are not used, up to ROW_SLACK beyond M.
#pragma once
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "vector.h"

constexpr int PANEL = 16;
constexpr int ROW_SLACK = 32;
template <class T> constexpr int GROUP = sizeof(T) == 2 ? 2 : 1;
template <class T> constexpr int K_BLOCK = sizeof(T) == 2 ? 32 : 1;

static INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class T> INLINE int64_t padded(int64_t k) { return round_up(k, K_BLOCK<T>); }
template <class T> INLINE int64_t panel_size(int64_t k) { return padded<T>(k) * PANEL; }
static INLINE int64_t panels(int64_t n) { return (n + PANEL - 1) / PANEL; }

// Memory that a call needs for itself; kept for the next one, for fresh pages cost more than most products.
struct Workspace {
    char* memory = nullptr;
    size_t size = 0, used = 0;
    ~Workspace() { std::free(memory); }
    void reserve(size_t bytes) {
        used = 0;
        if (bytes <= size) return;
        std::free(memory);
        size = 0;
        memory = static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64)));
        if (!memory) throw std::bad_alloc();
        size = bytes;
    }
    template <class T> T* take(int64_t count) {
        T* part = reinterpret_cast<T*>(memory + used);
        used += room<T>(count);
        return part;
    }
    template <class T> static size_t room(int64_t count) { return round_up(count * sizeof(T), 64) + 64; }
};

// Of whichever kernel runs on this thread: none calls another before it is done with it.
inline thread_local Workspace workspace;

// A part of n things for each of `threads`, in whole multiples of `grain`.
struct Share {
    int64_t begin, end;
    Share(int64_t n, int thread, int threads, int64_t grain = 1) {
        int64_t grains = (n + grain - 1) / grain;
        begin = std::min(n, grains * thread / threads * grain);
        end = std::min(n, grains * (thread + 1) / threads * grain);
    }
};

// ------------------------------------------------------------------------------------------------ laying out

// Rows as they are: source (rows, columns) -> target (rows, width), zeros from columns on.
template <class T>
static void to_rows(
    const float* source, int64_t rows, int64_t columns, int64_t ld, T* target, int64_t target_ld, int64_t width = 0) {
    if (!width) width = target_ld;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < width; j += LANES)
            put_some(target + i * target_ld + j, load_some(source + i * ld + j, columns - j), width - j);
}

// Columns made rows: source (rows, columns) -> target (columns, padded rows).
template <class T, class S>
static void to_columns(const S* source, int64_t rows, int64_t columns, int64_t ld, T* target, int64_t target_ld) {
    for (int64_t i = 0; i < target_ld; i += LANES) {
        const int64_t height = rows - i, width = std::min<int64_t>(target_ld - i, LANES);
        for (int64_t j = 0; j < columns; j += LANES) {
            const int64_t across = std::min<int64_t>(columns - j, LANES);
            Words r[LANES];
            for (int64_t k = 0; k < LANES; ++k)
                r[k] = (Words)(k < height ? get_some(source + (i + k) * ld + j, across) : Vec{});
            transpose(r);
            for (int64_t k = 0; k < across; ++k) put_some(target + (j + k) * target_ld + i, (Vec)r[k], width);
        }
    }
}

// A panel out of rows that run along n: row(i) points to up to 16 floats, i < k; laid out as (depth / G, 16, G).
template <class T, class Row>
static void to_panel(Row row, int64_t k, int64_t depth, int64_t columns, T* panel) {
    constexpr int G = GROUP<T>;
    for (int64_t i = 0; i < depth; i += G) {
        T* to = panel + i * PANEL;
#if defined(__AVX512BF16__)
        if constexpr (G == 2) {
            Vec even = i < k ? load_some(row(i), columns) : Vec{}, odd = i + 1 < k ? load_some(row(i + 1), columns) : Vec{};
            __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
            __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256((__m512i)both));
            __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64((__m512i)both, 1));
            _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            continue;
        }
#endif
        if constexpr (G == 1) {
            for (int64_t j = 0; j < PANEL; j += LANES) put(to + j, i < k ? load_some(row(i) + j, columns - j) : Vec{});
            continue;
        }
        for (int64_t g = 0; g < G; ++g) {
            const float* from = i + g < k ? row(i + g) : nullptr;
            for (int64_t j = 0; j < PANEL; ++j) put1(to + j * G + g, from && j < columns ? from[j] : 0);
        }
    }
}

// A panel out of rows that run along k: source (up to 16 columns, K) -> (K / G, 16, G).
template <class T>
static void to_panel_from_columns(const float* source, int64_t k, int64_t columns, int64_t ld, T* panel) {
    constexpr int G = GROUP<T>;
    const int64_t depth = padded<T>(k);
#if defined(__AVX512BF16__)
    if constexpr (G == 2) {
        for (int64_t i = 0; i < depth; i += 32) {
            __m512i r[16];
            for (int64_t j = 0; j < 16; ++j) {
                const float* from = source + j * ld + i;
                const int64_t left = j < columns ? k - i : 0;
                r[j] = (__m512i)_mm512_cvtne2ps_pbh((__m512)load_some(from + 16, left - 16), (__m512)load_some(from, left));
            }
            transpose(r);
            for (int64_t j = 0; j < 16; ++j) _mm512_storeu_si512(panel + (i / 2 + j) * 32, r[j]);
        }
        return;
    }
#endif
    if constexpr (G == 1) {
        for (int64_t i = 0; i < k; i += LANES)
            for (int64_t j = 0; j < PANEL; j += LANES) {
                Words r[LANES];
                for (int64_t l = 0; l < LANES; ++l)
                    r[l] = (Words)load_some(source + (j + l) * ld + i, j + l < columns ? k - i : 0);
                transpose(r);
                for (int64_t l = 0; l < std::min<int64_t>(LANES, k - i); ++l) store(panel + (i + l) * PANEL + j, (Vec)r[l]);
            }
    } else {
        for (int64_t i = 0; i < depth; i += G)
            for (int64_t j = 0; j < PANEL; ++j)
                for (int64_t g = 0; g < G; ++g)
                    put1(panel + i * PANEL + j * G + g, j < columns && i + g < k ? source[j * ld + i + g] : 0);
    }
}

// Those of some of the panels of n rows that run along k.
template <class T> static void rows_to_panels(const float* source, int64_t n, int64_t k, Share some, T* target) {
    for (int64_t p = some.begin; p < some.end; ++p)
        to_panel_from_columns<T>(
            source + p * PANEL * k, k, std::min<int64_t>(PANEL, n - p * PANEL), k, target + p * panel_size<T>(k));
}

// A panel out of operand rows that run along n: source (k, 16) -> (depth / G, 16, G).
static INLINE void panel_of(const float* source, int64_t k, int64_t depth, int64_t ld, float* panel) {
    for (int64_t i = 0; i < depth; ++i)
        for (int64_t j = 0; j < PANEL; ++j) panel[i * PANEL + j] = i < k ? source[i * ld + j] : 0;
}
static INLINE void panel_of(const bf16* source, int64_t k, int64_t depth, int64_t ld, bf16* panel) {
    for (int64_t i = 0; i < depth; i += 2) {
        const bf16 *low = source + i * ld, *high = source + (i + 1) * ld;
#if defined(__AVX512F__)
        const __m256i none = _mm256_setzero_si256();
        __m512i even = _mm512_cvtepu16_epi32(i < k ? _mm256_loadu_si256((const __m256i*)low) : none);
        __m512i odd = _mm512_cvtepu16_epi32(i + 1 < k ? _mm256_loadu_si256((const __m256i*)high) : none);
        _mm512_storeu_si512(panel + i * PANEL, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
#else
        for (int64_t j = 0; j < PANEL; ++j) {
            panel[i * PANEL + 2 * j] = i < k ? low[j] : 0;
            panel[i * PANEL + 2 * j + 1] = i + 1 < k ? high[j] : 0;
        }
#endif
    }
}

// ------------------------------------------------------------------------------------------------ multiplying

template <class T> struct Pair;  // one group of A against LANES groups of B
template <> struct Pair<float> {
    static INLINE Vec multiply(Vec sum, const float* a, const float* b) { return sum + splat(*a) * load(b); }
};
template <> struct Pair<bf16> {
    static INLINE Vec multiply(Vec sum, const bf16* a, const bf16* b) {
        uint32_t two;
        std::memcpy(&two, a, 4);
#if defined(__AVX512BF16__)
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(two), (__m512bh)_mm512_loadu_si512(b));
#else
        typedef uint32_t VecU __attribute__((vector_size(LANES * 4)));
        VecU bits, low, high;
        std::memcpy(&bits, b, sizeof bits);
        low = bits << 16;
        high = bits & 0xffff0000u;
        Vec first, second;
        std::memcpy(&first, &low, sizeof first);
        std::memcpy(&second, &high, sizeof second);
        return sum + first * from_bf16(bf16(two)) + second * from_bf16(bf16(two >> 16));
#endif
    }
};

constexpr int PARTS = PANEL / LANES;                                 // vectors across a panel
constexpr int TILE_ROWS = LANES == 16 ? 8 : LANES == 8 ? 6 : 4;      // what the registers hold
constexpr int TILE_PANELS = LANES == 16 ? 3 : 1;
constexpr int LONG_ROW = LANES == 16 ? 6 : LANES == 8 ? 4 : 2;  // panels of a single row, whose weights come from memory
constexpr int FEW_ROWS = 4;                    // too few for the matrix unit

template <class T, int ROWS, int WIDTH>
static void multiply_tile(int64_t k, const T* a, int64_t lda, const T* b, int64_t panel, float* c, int64_t ldc, bool add) {
    constexpr int G = GROUP<T>;
    Vec sums[ROWS][WIDTH * PARTS];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < WIDTH * PARTS; ++j) sums[i][j] = add ? load(c + i * ldc + j * LANES) : Vec{};
    for (int64_t l = 0; l < k; l += G) {
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
            for (int j = 0; j < WIDTH * PARTS; ++j)
                sums[i][j] = Pair<T>::multiply(
                    sums[i][j], a + i * lda + l, b + (j / PARTS) * panel + (l * PARTS + j % PARTS * G) * LANES);
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < WIDTH * PARTS; ++j) store(c + i * ldc + j * LANES, sums[i][j]);
}

template <class T, int ROWS, int WIDTH>
static INLINE void multiply_rows(
    int64_t rows, int64_t k, const T* a, int64_t lda, const T* b, int64_t panel, float* c, int64_t ldc, bool add) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) multiply_tile<T, ROWS, WIDTH>(k, a, lda, b, panel, c, ldc, add);
        else multiply_rows<T, ROWS - 1, WIDTH>(rows, k, a, lda, b, panel, c, ldc, add);
    }
}

template <class T, int WIDTH>
static void multiply_column(
    int64_t m, int64_t k, const T* a, int64_t lda, const T* b, int64_t panel, float* c, int64_t ldc, bool add) {
    for (int64_t i = 0; i < m; i += TILE_ROWS)
        multiply_rows<T, TILE_ROWS, WIDTH>(
            std::min<int64_t>(m - i, TILE_ROWS), k, a + i * lda, lda, b, panel, c + i * ldc, ldc, add);
}

#if defined(__AMX_BF16__)
struct TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t width[16] = {};
    uint8_t rows[16] = {};
};

// The rows of a tile of C and A: the fewest that cover m in as many tiles as there must be.
static INLINE int64_t tile_rows(int64_t m) { return (m + panels(m) - 1) / panels(m); }

struct Tiles {  // a thread's matrix registers, set for products of m rows
    int64_t rows = 0;
    void set(int64_t m) {
        if (rows == tile_rows(m)) return;
        rows = tile_rows(m);
        TileConfig config;
        for (int i = 0; i < 8; ++i) {
            config.width[i] = 64;
            config.rows[i] = i < 6 ? rows : 16;
        }
        __asm__ volatile("ldtilecfg %0" ::"m"(config));  // GCC 11 to 13's own reads 8 of its 64 bytes, as they tell the optimiser
    }
    ~Tiles() { if (rows) _tile_release(); }
};

// Sums stand in tiles 0 to 3, two of A in 4 and 5, two of B in 6 and 7.
template <int HEIGHT, int WIDTH>
static INLINE void multiply_tiles(
    int64_t k, const bf16* a, int64_t lda, const bf16* b, int64_t panel, float* c, int64_t ldc, bool add, int64_t rows) {
    __asm__ volatile("" ::: "memory");  // GCC's loads of tiles do not say that they read memory
    float* below = c + rows * ldc;
    int64_t stride = ldc * 4;
    if (add) {
        _tile_loadd(0, c, stride);
        if (WIDTH == 2) _tile_loadd(1, c + 16, stride);
        if (HEIGHT == 2) _tile_loadd(2, below, stride);
        if (HEIGHT == 2 && WIDTH == 2) _tile_loadd(3, below + 16, stride);
    } else {
        _tile_zero(0);
        if (WIDTH == 2) _tile_zero(1);
        if (HEIGHT == 2) _tile_zero(2);
        if (HEIGHT == 2 && WIDTH == 2) _tile_zero(3);
    }
    for (int64_t l = 0; l < k; l += 32) {
        _tile_loadd(4, a + l, lda * 2);
        _tile_loadd(6, b + l * PANEL, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (WIDTH == 2) {
            _tile_loadd(7, b + panel + l * PANEL, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (HEIGHT == 2) {
            _tile_loadd(5, a + rows * lda + l, lda * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (WIDTH == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, stride);
    if (WIDTH == 2) _tile_stored(1, c + 16, stride);
    if (HEIGHT == 2) _tile_stored(2, below, stride);
    if (HEIGHT == 2 && WIDTH == 2) _tile_stored(3, below + 16, stride);
}

// Rows that fill no tile: the sums go through a scratch of whole tiles.
template <int WIDTH>
static void multiply_last_rows(
    int64_t m, int64_t k, const bf16* a, int64_t lda, const bf16* b, int64_t panel, float* c, int64_t ldc, bool add,
    int64_t rows) {
    alignas(64) float scratch[16 * 32];
    if (add)
        for (int64_t i = 0; i < m; ++i) std::memcpy(scratch + i * 32, c + i * ldc, WIDTH * PANEL * 4);
    multiply_tiles<1, WIDTH>(k, a, lda, b, panel, scratch, 32, add, rows);
    for (int64_t i = 0; i < m; ++i) std::memcpy(c + i * ldc, scratch + i * 32, WIDTH * PANEL * 4);
}

template <int WIDTH>
static void multiply_column_of_tiles(
    int64_t m, int64_t k, const bf16* a, int64_t lda, const bf16* b, int64_t panel, float* c, int64_t ldc, bool add,
    int64_t rows) {
    int64_t i = 0;
    for (; i + 2 * rows <= m; i += 2 * rows)
        multiply_tiles<2, WIDTH>(k, a + i * lda, lda, b, panel, c + i * ldc, ldc, add, rows);
    for (; i + rows <= m; i += rows)
        multiply_tiles<1, WIDTH>(k, a + i * lda, lda, b, panel, c + i * ldc, ldc, add, rows);
    if (i < m) multiply_last_rows<WIDTH>(m - i, k, a + i * lda, lda, b, panel, c + i * ldc, ldc, add, rows);
}
#else
struct Tiles {
    void set(int64_t) {}
};
#endif

// C (m, n panels) = [C +] A B. C is written in whole panels. `tiles` is the calling thread's.
template <class T>
static void multiply(
    Tiles& tiles, int64_t m, int64_t n_panels, int64_t k, const T* a, int64_t lda, const T* b, int64_t panel, float* c,
    int64_t ldc, bool add) {
    int64_t depth = round_up(k, GROUP<T>), j = 0;
#if defined(__AMX_BF16__)
    if constexpr (GROUP<T> == 2) if (m > FEW_ROWS) {
        depth = padded<T>(k);
        tiles.set(m);
        for (; j + 2 <= n_panels; j += 2)
            multiply_column_of_tiles<2>(m, depth, a, lda, b + j * panel, panel, c + j * PANEL, ldc, add, tiles.rows);
        if (j < n_panels)
            multiply_column_of_tiles<1>(m, depth, a, lda, b + j * panel, panel, c + j * PANEL, ldc, add, tiles.rows);
        return;
    }
#endif
    if (m == 1)
        for (; j + LONG_ROW <= n_panels; j += LONG_ROW)
            multiply_tile<T, 1, LONG_ROW>(depth, a, lda, b + j * panel, panel, c + j * PANEL, ldc, add);
    for (; j + TILE_PANELS <= n_panels; j += TILE_PANELS)
        multiply_column<T, TILE_PANELS>(m, depth, a, lda, b + j * panel, panel, c + j * PANEL, ldc, add);
    for (; j < n_panels; ++j)
        multiply_column<T, 1>(m, depth, a, lda, b + j * panel, panel, c + j * PANEL, ldc, add);
}

// The same where C has n columns and no room for whole panels; `scratch` takes (m, 16).
template <class T>
static void multiply_exactly(
    Tiles& tiles, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t panel, float* c,
    int64_t ldc, float* scratch) {
    int64_t whole = n / PANEL, rest = n % PANEL;
    multiply<T>(tiles, m, whole, k, a, lda, b, panel, c, ldc, false);
    if (!rest) return;
    multiply<T>(tiles, m, 1, k, a, lda, b + whole * panel, panel, scratch, PANEL, false);
    for (int64_t i = 0; i < m; ++i) std::memcpy(c + i * ldc + whole * PANEL, scratch + i * PANEL, rest * 4);
}

// ------------------------------------------------------------------------------------------------ threads

// Where threads wait for each other, many times within a window: they spin, and give the processor away only when
// the others take long.
class Barrier {
    alignas(64) std::atomic<int> waiting{0};
    alignas(64) std::atomic<int> passed{0};

public:
    void wait(int threads) {
        if (threads == 1) return;
        int before = passed.load(std::memory_order_relaxed);
        if (waiting.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            waiting.store(0, std::memory_order_relaxed);
            passed.store(before + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; passed.load(std::memory_order_acquire) == before; ++spins) {
            if (spins > 4000) sched_yield();
#if defined(__x86_64__)
            else _mm_pause();
#endif
        }
    }
};

// Who one is in a team of threads, and where the team meets.
struct Member {
    int thread, threads;
    Barrier* barrier;
    void wait() const { barrier->wait(threads); }
    Share share(int64_t n, int64_t grain = 1) const { return Share(n, thread, threads, grain); }
};

template <class Work> static void together(int threads, Work work) {
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    work(Member{omp_get_thread_num(), omp_get_num_threads(), &barrier});
}

// Whether all of n ids are below `limit`.
static inline bool within(const int64_t* ids, int64_t n, int64_t limit) {
    return std::all_of(ids, ids + n, [=](int64_t id) { return id >= 0 && id < limit; });
}

enum Failure { NO_MEMORY = 1, NO_SUCH_ID = 2, NO_SUCH_STATE = 3, NO_SUCH_COUNT = 4, NO_SUCH_MODEL = 5 };

// Calls work(operand) with the type of operands: bf16 where they are to be narrow, else f32.
template <class Work> inline int with_operand(int narrow, Work work) {
    try {
        narrow ? work(bf16()) : work(float());
        return 0;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}
