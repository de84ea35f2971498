// Vectors of the machine's width by compiler extensions: the same source is AVX2, AVX-512 or NEON code.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) || defined(INFORMED_ROUTING_WIDE)  // the latter: test the wide layout on any machine
constexpr int VL = 16;  // floats in a vector
#else
constexpr int VL = 8;
#endif
constexpr int NR = 2 * VL;                    // output features (or keys) in a panel: two vectors
constexpr int MR = (VL == 16) ? 12 : 6;       // rows of a micro tile: 2 MR accumulators stay in registers
constexpr int GROUP = 32;                     // inputs that share a scale in the quantised formats

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef float vf_u __attribute__((vector_size(VL * 4), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2), aligned(2)));
typedef int8_t vb __attribute__((vector_size(VL), aligned(1)));
typedef uint8_t vub __attribute__((vector_size(VL), aligned(1)));
typedef _Float16 vhf __attribute__((vector_size(VL * 2), aligned(2)));

struct bf16 { uint16_t bits; };

// Memory that begins with a cache line, so that no vector or tile in it lies across two of them.
template <class T>
struct Lines {
    using value_type = T;
    Lines() = default;
    template <class U>
    Lines(const Lines<U>&) {}
    T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const Lines&) const { return true; }
    bool operator!=(const Lines&) const { return false; }
};
template <class T>
using Aligned = std::vector<T, Lines<T>>;

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float* p) { return *(const vf_u*)p; }
INLINE void store(float* p, vf v) { *(vf_u*)p = v; }
// Compilers make poor code of widening short vectors; x86 has instructions for it.
#if defined(__AVX512F__)
INLINE vi widen(const int8_t* p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE vi widen(const uint8_t* p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE vi widen(const bf16* p) { return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
INLINE vf load(const _Float16* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__) && defined(__F16C__) && !defined(INFORMED_ROUTING_WIDE)
INLINE vi widen(const int8_t* p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE vi widen(const uint8_t* p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE vi widen(const bf16* p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE vf load(const _Float16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
#else
INLINE vi widen(const int8_t* p) { return __builtin_convertvector(*(const vb*)p, vi); }
INLINE vi widen(const uint8_t* p) { return __builtin_convertvector(*(const vub*)p, vi); }
INLINE vi widen(const bf16* p) { return __builtin_convertvector(*(const vh*)p, vi); }
INLINE vf load(const _Float16* p) { return __builtin_convertvector(*(const vhf*)p, vf); }
#endif
INLINE vf load(const bf16* p) { return (vf)(widen(p) << 16); }
INLINE vf load(const int8_t* p) { return __builtin_convertvector(widen(p), vf); }

// VL pairs of bfloat16, and the first and second ones of them.
INLINE vi load_pairs(const bf16* p) {
    vi both;
    std::memcpy(&both, p, sizeof both);
    return both;
}
INLINE vf first(vi pairs) { return (vf)(pairs << 16); }
INLINE vf second(vi pairs) { return (vf)(pairs & (int32_t)0xffff0000); }

INLINE bf16 to_bf16(float x) {  // round to nearest even
    uint32_t u;
    std::memcpy(&u, &x, 4);
    u += 0x7fff + ((u >> 16) & 1);
    return {(uint16_t)(u >> 16)};
}
INLINE vf rounded_to_bf16(vf x) {
    vi u = (vi)x;
    u += 0x7fff + ((u >> 16) & 1);
    return (vf)(u & (int32_t)0xffff0000);
}
// base[at[0]], base[at[1]], ...
INLINE vf gather(const float* base, vi at) {
#if defined(__AVX512F__)
    return (vf)_mm512_i32gather_ps((__m512i)at, base, 4);
#else
    vf x;
    for (int i = 0; i < VL; i++) x[i] = base[at[i]];
    return x;
#endif
}
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bf16* p, float x) { *p = to_bf16(x); }
INLINE void put(float* p, vf x) { store(p, x); }
INLINE void put(bf16* p, vf x) {
    vi u = (vi)x;
    u += 0x7fff + ((u >> 16) & 1);
    *(vh*)p = __builtin_convertvector((u >> 16) & 0xffff, vh);
}
INLINE float get(const float* p) { return *p; }
INLINE float get(const bf16* p) {
    uint32_t u = (uint32_t)p->bits << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

INLINE float sum(vf v) {
    float s = 0;
    for (int i = 0; i < VL; i++) s += v[i];
    return s;
}
INLINE float most(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float m = v[0];
    for (int i = 1; i < VL; i++) m = v[i] > m ? v[i] : m;
    return m;
#endif
}
#if defined(__AVX512F__)  // of the choices below compilers make two instructions
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
#endif

// exp to about one unit in the last place of float, for x in [-87, 88].
INLINE vf vexp(vf x) {
    x = vmax(vmin(x, (vf){} + 88.0f), (vf){} - 87.0f);
    const vf magic = (vf){} + 12582912.0f;
    vf n = (x * 1.44269504f + magic) - magic;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = (vf){} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vi e = (__builtin_convertvector(n, vi) + 127) << 23;
    return p * (vf)e;
#endif
}
INLINE vf vsilu(vf x) { return x / (1.0f + vexp(-x)); }
// GELU by the tanh formula: 0.5 x (1 + tanh(u)) = x sigmoid(2u).
INLINE vf vgelu_tanh(vf x) {
    vf u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1.0f + vexp(-2.0f * u));
}
