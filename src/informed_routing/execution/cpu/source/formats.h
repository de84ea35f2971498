// Formats of packed weights, one struct each. A new format is a struct here, its name in `Formats`, and a row in
// execution/formats.py.
//
// Weights lie in panels of NR outputs, [N / NR][K][NR], so that one row (decode) streams memory in order and many rows
// (prefill) reuse a panel from the cache. A format says how a panel of k inputs looks:
//
//   NAME, ID         as in Python's table
//   TILES            whether many rows may be multiplied by matrix instructions, which round inputs to bfloat16
//   PAIRS            whether a panel is what these instructions read: pairs of inputs side by side, [K / 2][NR][2];
//                    the inputs of few rows are then rounded as those of many
//   DIRECT_ROWS      most rows that a panel multiplies as it is; for more it is unpacked first
//   TILE_ROWS        rows of a tile then
//   SUMS             whether `tile` reads the sums of each row's inputs over groups
//   panel_bytes      of k inputs
//   pack, unpack     from and to float32; `unpack` gives [K][NR]
//   tile             acc += rows . panel; sums[r * groups + g] is the sum of row r over group g
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "micro.h"
#include "tiles.h"

// The weights [n, k] of NR outputs from `first` on; zero behind the last.
struct Source {
    const float* weights;
    int n, k, first;
    float operator()(int row, int col) const {
        return first + row < n ? weights[(size_t)(first + row) * k + col] : 0.0f;
    }
};

INLINE int steps_of(int k) { return (k + STEP - 1) / STEP; }

// Inputs with accumulators of their own in a tile of M rows.
constexpr int unrolled(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

struct Float32 {
    using Element = float;
    static constexpr const char* NAME = "float32";
    static constexpr int32_t ID = 0;
    static constexpr bool TILES = false, PAIRS = false, SUMS = false;
    static constexpr int DIRECT_ROWS = 1 << 30, TILE_ROWS = MR;

    static size_t panel_bytes(int k) { return (size_t)k * NR * 4; }

    static void pack(const Source& at, char* out) {
        for (int c = 0; c < at.k; c++)
            for (int r = 0; r < NR; r++) ((float*)out)[(size_t)c * NR + r] = at(r, c);
    }

    static void unpack(const char* src, int k, float* out) { std::memcpy(out, src, panel_bytes(k)); }

    template <int M>
    INLINE void tile(int k, const float* const* a, const float*, const char* src, vf acc[M][2]) {
        tile_plain<M, unrolled(M)>(k, a, (const float*)src, acc);
    }
};

struct Bfloat16 {
    using Element = bf16;
    static constexpr const char* NAME = "bfloat16";
    static constexpr int32_t ID = 1;
    static constexpr bool TILES = true, PAIRS = true, SUMS = false;
    static constexpr int DIRECT_ROWS = 12, TILE_ROWS = MR;

    static size_t panel_bytes(int k) { return (size_t)steps_of(k) * STEP * NR * 2; }

    static void pack(const Source& at, char* out) {
        for (int c = 0; c < steps_of(at.k) * STEP; c++)
            for (int r = 0; r < NR; r++)
                ((bf16*)out)[((size_t)(c / 2) * NR + r) * 2 + c % 2] = to_bf16(c < at.k ? at(r, c) : 0);
    }

    static void unpack(const char* src, int k, float* out) {
        for (int c = 0; c < k; c++)
            for (int r = 0; r < NR; r += VL) {
                const vi both = load_pairs((const bf16*)src + (size_t)(c / 2) * NR * 2 + 2 * r);
                store(out + (size_t)c * NR + r, c % 2 ? second(both) : first(both));
            }
    }

    template <int M>
    INLINE void tile(int k, const float* const* a, const float*, const char* src, vf acc[M][2]) {
        tile_pairs<M, unrolled(M)>(k, a, (const bf16*)src, acc);
    }
};

// Groups of 32 inputs have a half-precision scale per output; more accumulators than registers would be slower, so that
// tiles of quantised panels are lower than others.
struct Int8 {
    static constexpr const char* NAME = "int8";
    static constexpr int32_t ID = 2;
    static constexpr bool TILES = true, PAIRS = false, SUMS = false;
    static constexpr int DIRECT_ROWS = 12, TILE_ROWS = 4;

    static size_t panel_bytes(int k) { return (size_t)(k / GROUP) * NR * (2 + GROUP); }

    static void pack(const Source& at, char* out) {
        for (int first = 0; first + GROUP <= at.k; first += GROUP) {
            _Float16* scale = (_Float16*)out;
            int8_t* q = (int8_t*)(scale + NR);
            for (int r = 0; r < NR; r++) {
                float top = 0;
                for (int c = 0; c < GROUP; c++) {
                    const float x = std::fabs(at(r, first + c));
                    top = x > top ? x : top;
                }
                scale[r] = (_Float16)(top / 127.0f);
                const float s = (float)scale[r], inverse = s > 0 ? 1.0f / s : 0.0f;
                for (int c = 0; c < GROUP; c++) {
                    const int v = (int)std::lrintf(at(r, first + c) * inverse);
                    q[c * NR + r] = (int8_t)(v > 127 ? 127 : v < -127 ? -127 : v);
                }
            }
            out = (char*)(q + NR * GROUP);
        }
    }

    static void unpack(const char* src, int k, float* out) {
        for (int g = 0; g < k / GROUP; g++) {
            const _Float16* half = (const _Float16*)src;
            const vf s0 = load(half), s1 = load(half + VL);
            const int8_t* q = (const int8_t*)(half + NR);
            for (int c = 0; c < GROUP; c++, out += NR) {
                store(out, load(q + c * NR) * s0);
                store(out + VL, load(q + c * NR + VL) * s1);
            }
            src = (const char*)(q + NR * GROUP);
        }
    }

    template <int M>
    INLINE void tile(int k, const float* const* a, const float*, const char* src, vf acc[M][2]) {
        constexpr int U = M == 1 ? 2 : 1;
        for (int g = 0; g < k; g += GROUP) {
            const _Float16* half = (const _Float16*)src;
            const int8_t* q = (const int8_t*)(half + NR);
            vf part[U][M][2] = {};
            for (int c = 0; c < GROUP; c += U)
#pragma GCC unroll 2
                for (int u = 0; u < U; u++) {
                    vf b0 = load(q + (c + u) * NR), b1 = load(q + (c + u) * NR + VL);
#pragma GCC unroll 12
                    for (int r = 0; r < M; r++) {
                        float x = a[r][g + c + u];
                        part[u][r][0] += b0 * x;
                        part[u][r][1] += b1 * x;
                    }
                }
            vf s0 = load(half), s1 = load(half + VL);
            for (int r = 0; r < M; r++) {
                for (int u = 1; u < U; u++) part[0][r][0] += part[u][r][0], part[0][r][1] += part[u][r][1];
                acc[r][0] += part[0][r][0] * s0;
                acc[r][1] += part[0][r][1] * s1;
            }
            src = (const char*)(q + NR * GROUP);
        }
    }
};

// As Int8 with a minimum beside the scale. The minimum multiplies the sum of a row's inputs over the group.
struct Int4 {
    static constexpr const char* NAME = "int4";
    static constexpr int32_t ID = 3;
    static constexpr bool TILES = true, PAIRS = false, SUMS = true;
    static constexpr int DIRECT_ROWS = 9, TILE_ROWS = 3;

    static size_t panel_bytes(int k) { return (size_t)(k / GROUP) * NR * (4 + GROUP / 2); }

    static void pack(const Source& at, char* out) {
        for (int first = 0; first + GROUP <= at.k; first += GROUP) {
            _Float16 *scale = (_Float16*)out, *low = scale + NR;
            uint8_t* q = (uint8_t*)(low + NR);
            for (int r = 0; r < NR; r++) {
                float lo = at(r, first), hi = lo;
                for (int c = 0; c < GROUP; c++) {
                    const float x = at(r, first + c);
                    lo = x < lo ? x : lo, hi = x > hi ? x : hi;
                }
                scale[r] = (_Float16)((hi - lo) / 15.0f), low[r] = (_Float16)lo;
                const float s = (float)scale[r], m = (float)low[r], inverse = s > 0 ? 1.0f / s : 0.0f;
                for (int c = 0; c < GROUP; c++) {
                    int v = (int)std::lrintf((at(r, first + c) - m) * inverse);
                    v = v > 15 ? 15 : v < 0 ? 0 : v;
                    uint8_t* byte = q + (c / 2) * NR + r;
                    *byte = (c & 1) ? (uint8_t)(*byte | (v << 4)) : (uint8_t)v;
                }
            }
            out = (char*)(q + NR * GROUP / 2);
        }
    }

    static void unpack(const char* src, int k, float* out) {
        for (int g = 0; g < k / GROUP; g++) {
            const _Float16* half = (const _Float16*)src;
            const vf s0 = load(half), s1 = load(half + VL), m0 = load(half + NR), m1 = load(half + NR + VL);
            const uint8_t* q = (const uint8_t*)(half + 2 * NR);
            for (int c = 0; c < GROUP / 2; c++, out += 2 * NR) {
                vi a = widen(q + c * NR);
                vi b = widen(q + c * NR + VL);
                store(out, __builtin_convertvector(a & 15, vf) * s0 + m0);
                store(out + VL, __builtin_convertvector(b & 15, vf) * s1 + m1);
                store(out + NR, __builtin_convertvector(a >> 4, vf) * s0 + m0);
                store(out + NR + VL, __builtin_convertvector(b >> 4, vf) * s1 + m1);
            }
            src = (const char*)(q + NR * GROUP / 2);
        }
    }

    template <int M>
    INLINE void tile(int k, const float* const* a, const float* sums, const char* src, vf acc[M][2]) {
        constexpr int U = M == 1 ? 2 : 1;
        const int groups = k / GROUP;
        for (int g = 0; g < groups; g++) {
            const _Float16* half = (const _Float16*)src;
            const uint8_t* q = (const uint8_t*)(half + 2 * NR);
            vf part[U][M][2] = {};
            for (int c = 0; c < GROUP / 2; c++) {
                vi w0 = widen(q + c * NR);
                vi w1 = widen(q + c * NR + VL);
                vf e0 = __builtin_convertvector(w0 & 15, vf), e1 = __builtin_convertvector(w1 & 15, vf);
                vf o0 = __builtin_convertvector(w0 >> 4, vf), o1 = __builtin_convertvector(w1 >> 4, vf);
#pragma GCC unroll 12
                for (int r = 0; r < M; r++) {
                    float x = a[r][g * GROUP + 2 * c], y = a[r][g * GROUP + 2 * c + 1];
                    part[0][r][0] += e0 * x, part[0][r][1] += e1 * x;
                    part[U - 1][r][0] += o0 * y, part[U - 1][r][1] += o1 * y;
                }
            }
            vf s0 = load(half), s1 = load(half + VL), m0 = load(half + NR), m1 = load(half + NR + VL);
            for (int r = 0; r < M; r++) {
                float t = sums[(size_t)r * groups + g];
                for (int u = 1; u < U; u++) part[0][r][0] += part[u][r][0], part[0][r][1] += part[u][r][1];
                acc[r][0] += part[0][r][0] * s0 + m0 * t;
                acc[r][1] += part[0][r][1] * s1 + m1 * t;
            }
            src = (const char*)(q + NR * GROUP / 2);
        }
    }
};

template <class... Format>
struct Table {
    // Calls f with the format of an id; false where there is none.
    template <class F>
    static bool with(int32_t id, F&& f) {
        return ((Format::ID == id && (f(Format()), true)) || ...);
    }
    template <class F>
    static void each(F&& f) {
        (f(Format()), ...);
    }
};

using Formats = Table<Float32, Bfloat16, Int8, Int4>;
using CacheFormats = Table<Float32, Bfloat16>;  // of keys and values: those with an Element

[[noreturn]] static void unknown_format(int32_t id) {
    std::fprintf(stderr, "informed-routing: weights of an unknown format, %d\n", (int)id);
    std::abort();
}
