// Vectors of LANES floats: arithmetic by the compiler's own vector types, so that one source serves every processor.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t VecI __attribute__((vector_size(LANES * 4)));
typedef uint16_t bf16;

#define INLINE inline __attribute__((always_inline))

static INLINE Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
static INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static INLINE Vec splat(float x) { return x - Vec{}; }
static INLINE float sum(Vec v) { float s = 0; for (int i = 0; i < LANES; ++i) s += v[i]; return s; }
static INLINE float largest(Vec v) { float s = v[0]; for (int i = 1; i < LANES; ++i) s = v[i] > s ? v[i] : s; return s; }

static INLINE Vec root(Vec v) {
#if defined(__AVX512F__)
    return (Vec)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
    return (Vec)_mm256_sqrt_ps((__m256)v);
#else
    for (int i = 0; i < LANES; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
#endif
}

// e to the x: 2^n * p(r), x = n ln 2 + r, p the polynomial of Cephes' expf; within 2 units of the last place (but for the
// last third of a unit before infinity, on processors without AVX-512), 0 and infinity beyond the range and for the
// infinities, NaN for NaN.
static INLINE Vec exp(Vec x) {
#if defined(__AVX512F__)
    x = (Vec)_mm512_max_ps(_mm512_set1_ps(-110.0f), _mm512_min_ps(_mm512_set1_ps(110.0f), (__m512)x));  // NaN stays
    Vec n = (Vec)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Vec low = splat(-87.33654f), high = splat(88.72283f);
    const Vec whole = x, highest = splat(88.3762626f), magic = splat(12582912.0f);
    x = x < low ? low : x;
    x = x > highest ? highest : x;
    Vec n = (x * 1.44269504088896341f + magic) - magic;
#endif
    Vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    VecI exponent = (__builtin_convertvector(n, VecI) + 127) << 23;
    Vec scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    Vec value = p * scale;
    value = whole < low ? Vec{} : value;
    value = whole > high ? splat(__builtin_inff()) : value;
    return whole == whole ? value : whole;
#endif
}

// 1 / x, x between 1 and 1e37.
static INLINE Vec inverse(Vec x) {
#if defined(__AVX512F__)
    Vec y = (Vec)_mm512_rcp14_ps((__m512)x);
    return y * (2.0f - x * y);  // one step of Newton's: 28 bits
#else
    return 1.0f / x;
#endif
}

static INLINE Vec sigmoid(Vec x) {
    const Vec least = splat(-80.0f);
    return inverse(1.0f + exp(-(x < least ? least : x)));
}

// By e to the -2 x; near 0, where 1 less that would lose its digits, the polynomial of Cephes' tanhf.
static INLINE Vec tanh(Vec x) {
    Vec size = x < Vec{} ? -x : x;
    Vec e = exp(-2.0f * size);
    Vec value = (1.0f - e) * inverse(1.0f + e);
    value = x < Vec{} ? -value : value;
    Vec square = x * x;
    Vec p = splat(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    return size < 0.625f ? p * square * x + x : value;
}

// ------------------------------------------------------------------------------------------------ bfloat16

static INLINE bf16 to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16(bits >> 16 | 0x40);
    return bf16((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
static INLINE float from_bf16(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// LANES floats as operands of a product.
static INLINE void put(float* p, Vec v) { store(p, v); }
static INLINE void put(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
    __m256bh packed = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &packed, 32);
#else
    for (int i = 0; i < LANES; ++i) p[i] = to_bf16(v[i]);
#endif
}

// The first `count` floats (none to LANES), zeros in place of the others; and so written.
static INLINE Vec load_some(const float* p, int64_t count) {
    if (count >= LANES) return load(p);
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_loadu_ps(count > 0 ? (1u << count) - 1 : 0, p);
#else
    Vec v{};
    for (int64_t i = 0; i < count; ++i) v[i] = p[i];
    return v;
#endif
}
static INLINE void store_some(float* p, Vec v, int64_t count) {
    if (count >= LANES) return store(p, v);
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}
static INLINE void put_some(float* p, Vec v, int64_t count) { store_some(p, v, count); }
static INLINE void put_some(bf16* p, Vec v, int64_t count) {
    if (count >= LANES) return put(p, v);
    for (int64_t i = 0; i < count; ++i) p[i] = to_bf16(v[i]);
}
static INLINE void put1(float* p, float x) { *p = x; }
static INLINE void put1(bf16* p, float x) { *p = to_bf16(x); }
static INLINE Vec get(const float* p) { return load(p); }
static INLINE Vec get(const bf16* p) {
#if defined(__AVX512F__)
    __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
    return (Vec)_mm512_castsi512_ps(bits);
#else
    Vec v;
    for (int i = 0; i < LANES; ++i) v[i] = from_bf16(p[i]);
    return v;
#endif
}
static INLINE Vec get_some(const float* p, int64_t count) { return load_some(p, count); }
static INLINE Vec get_some(const bf16* p, int64_t count) {
    if (count >= LANES) return get(p);
    Vec v{};
    for (int64_t i = 0; i < count; ++i) v[i] = from_bf16(p[i]);
    return v;
}

// As an operand of type T has it.
template <class T> static INLINE Vec rounded(Vec v) {
    T parts[LANES];
    put(parts, v);
    return get(parts);
}
template <class T> static INLINE float rounded(float x) {
    if constexpr (sizeof(T) == 2) return from_bf16(to_bf16(x));
    else return x;
}

// LANES vectors of LANES 32-bit words, rows made columns.
#if defined(__AVX512F__)
typedef __m512i Words;
static INLINE void transpose(Words r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
#else
typedef VecI Words;
static INLINE void transpose(Words r[LANES]) {
    Words t[LANES];
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < LANES; ++j) t[i][j] = r[j][i];
    for (int i = 0; i < LANES; ++i) r[i] = t[i];
}
#endif
