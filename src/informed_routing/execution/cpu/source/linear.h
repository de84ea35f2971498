// Linear layers with weights packed in panels of NR outputs: [N / NR][K][NR], so that one row (decode) streams
// memory in order and many rows (prefill) reuse a panel from the cache. Panels of bfloat16 hold pairs of inputs side by
// side, [K / 2][NR][2], as matrix instructions read them (tiles.h). Quantised panels hold groups of 32 inputs with a
// half-precision scale (int8) or scale and minimum (int4) per output.
#pragma once
#include <cmath>
#include <vector>

#include "tiles.h"

enum Type : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

struct Linear {
    int32_t type, n, k, pad;
    const void* data;   // packed weights
    const float* bias;  // [n rounded up to NR] or null
};

INLINE int panels(const Linear& w) { return (w.n + NR - 1) / NR; }

INLINE int steps_of(int k) { return (k + STEP - 1) / STEP; }

INLINE size_t panel_bytes(int type, int k) {
    size_t groups = k / GROUP;
    switch (type) {
        case F32: return (size_t)k * NR * 4;
        case BF16: return (size_t)steps_of(k) * STEP * NR * 2;
        case INT8: return groups * NR * (2 + GROUP);
        default: return groups * NR * (4 + GROUP / 2);
    }
}

// ---- packing ----------------------------------------------------------------------------------------------

static void pack_panel(int type, const float* src, int n, int k, int first, char* out) {
    auto at = [&](int row, int col) { return first + row < n ? src[(size_t)(first + row) * k + col] : 0.0f; };
    if (type == F32) {
        for (int c = 0; c < k; c++)
            for (int r = 0; r < NR; r++) ((float*)out)[(size_t)c * NR + r] = at(r, c);
        return;
    }
    if (type == BF16) {
        for (int c = 0; c < steps_of(k) * STEP; c++)
            for (int r = 0; r < NR; r++)
                ((bf16*)out)[((size_t)(c / 2) * NR + r) * 2 + c % 2] = to_bf16(c < k ? at(r, c) : 0);
        return;
    }
    for (int g = 0; g < k / GROUP; g++) {
        _Float16* scale = (_Float16*)out;
        _Float16* low = scale + NR;
        char* q = out + NR * (type == INT8 ? 2 : 4);
        for (int r = 0; r < NR; r++) {
            float lo = at(r, g * GROUP), hi = lo, top = 0;
            for (int c = 0; c < GROUP; c++) {
                float x = at(r, g * GROUP + c);
                lo = x < lo ? x : lo, hi = x > hi ? x : hi, top = std::fabs(x) > top ? std::fabs(x) : top;
            }
            if (type == INT8) {
                scale[r] = (_Float16)(top / 127.0f);
                float s = (float)scale[r], inverse = s > 0 ? 1.0f / s : 0.0f;
                for (int c = 0; c < GROUP; c++) {
                    int v = (int)std::lrintf(at(r, g * GROUP + c) * inverse);
                    ((int8_t*)q)[c * NR + r] = (int8_t)(v > 127 ? 127 : v < -127 ? -127 : v);
                }
            } else {
                scale[r] = (_Float16)((hi - lo) / 15.0f), low[r] = (_Float16)lo;
                float s = (float)scale[r], m = (float)low[r], inverse = s > 0 ? 1.0f / s : 0.0f;
                for (int c = 0; c < GROUP; c++) {
                    int v = (int)std::lrintf((at(r, g * GROUP + c) - m) * inverse);
                    v = v > 15 ? 15 : v < 0 ? 0 : v;
                    uint8_t* byte = (uint8_t*)q + (c / 2) * NR + r;
                    *byte = (c & 1) ? (uint8_t)(*byte | (v << 4)) : (uint8_t)v;
                }
            }
        }
        out = q + NR * (type == INT8 ? GROUP : GROUP / 2);
    }
}

// A panel as float32 [K][NR]: worth its cost once several tiles of rows use it.
static void unpack_panel(int type, const char* src, int k, float* out) {
    if (type == BF16) {
        for (int c = 0; c < k; c++)
            for (int r = 0; r < NR; r += VL) {
                const vi both = load_pairs((const bf16*)src + (size_t)(c / 2) * NR * 2 + 2 * r);
                store(out + (size_t)c * NR + r, c % 2 ? second(both) : first(both));
            }
        return;
    }
    for (int g = 0; g < k / GROUP; g++) {
        const _Float16* half = (const _Float16*)src;
        vf s0 = load(half), s1 = load(half + VL);
        if (type == INT8) {
            const int8_t* q = (const int8_t*)(half + NR);
            for (int c = 0; c < GROUP; c++, out += NR) {
                store(out, load(q + c * NR) * s0);
                store(out + VL, load(q + c * NR + VL) * s1);
            }
            src = (const char*)(q + NR * GROUP);
        } else {
            vf m0 = load(half + NR), m1 = load(half + NR + VL);
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
}

// ---- micro tiles: acc[M][2] += rows[M][K] . panel[K][NR] ----------------------------------------------------

// KU inputs at a time go to accumulators of their own: with few rows the chains of additions would be the limit.
// `ld` is the distance between the rows of b.
template <int M, int KU, class T>
INLINE void tile_plain(int k, const float* const* a, const T* b, vf acc[M][2], size_t ld = NR) {
    vf part[KU][M][2] = {};
    int c = 0;
    for (; c + KU <= k; c += KU) {
#pragma GCC unroll 4
        for (int u = 0; u < KU; u++) {
            vf b0 = load(b + (c + u) * ld), b1 = load(b + (c + u) * ld + VL);
#pragma GCC unroll 12
            for (int r = 0; r < M; r++) {
                float x = a[r][c + u];
                part[u][r][0] += b0 * x;
                part[u][r][1] += b1 * x;
            }
        }
    }
    for (; c < k; c++) {
        vf b0 = load(b + c * ld), b1 = load(b + c * ld + VL);
        for (int r = 0; r < M; r++) {
            part[0][r][0] += b0 * a[r][c];
            part[0][r][1] += b1 * a[r][c];
        }
    }
#pragma GCC unroll 4
    for (int u = 0; u < KU; u++)
#pragma GCC unroll 12
        for (int r = 0; r < M; r++) acc[r][0] += part[u][r][0], acc[r][1] += part[u][r][1];
}

// As above for a panel of pairs.
template <int M, int KU>
INLINE void tile_pairs(int k, const float* const* a, const bf16* b, vf acc[M][2]) {
    vf part[KU][M][2] = {};
    constexpr int PAIRS = KU < 4 ? 1 : KU / 2;
    auto step = [&](int c, int to, bool whole) __attribute__((always_inline)) {
        const vi w0 = load_pairs(b + (size_t)c * NR), w1 = load_pairs(b + (size_t)c * NR + 2 * VL);
        const vf e0 = first(w0), e1 = first(w1);
#pragma GCC unroll 12
        for (int r = 0; r < M; r++) part[to][r][0] += e0 * a[r][c], part[to][r][1] += e1 * a[r][c];
        if (!whole) return;
        to += KU > 1;
        const vf o0 = second(w0), o1 = second(w1);
#pragma GCC unroll 12
        for (int r = 0; r < M; r++) part[to][r][0] += o0 * a[r][c + 1], part[to][r][1] += o1 * a[r][c + 1];
    };
    int c = 0;
    for (; c + 2 * PAIRS <= k; c += 2 * PAIRS)
#pragma GCC unroll 2
        for (int u = 0; u < PAIRS; u++) step(c + 2 * u, 2 * u, true);
    for (; c < k; c += 2) step(c, 0, c + 1 < k);
#pragma GCC unroll 4
    for (int u = 0; u < KU; u++)
#pragma GCC unroll 12
        for (int r = 0; r < M; r++) acc[r][0] += part[u][r][0], acc[r][1] += part[u][r][1];
}

// As tile_plain for the last VL columns of a b whose width is no multiple of NR.
template <int M, class T>
INLINE void tile_half(int k, const float* const* a, const T* b, vf acc[M], size_t ld) {
    for (int c = 0; c < k; c++) {
        vf b0 = load(b + c * ld);
#pragma GCC unroll 12
        for (int r = 0; r < M; r++) acc[r] += b0 * a[r][c];
    }
}

template <int M>
INLINE void tile_int8(int k, const float* const* a, const char* src, vf acc[M][2]) {
    constexpr int U = M == 1 ? 2 : 1;  // more accumulators than registers would be slower
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

// sums[r][g]: the sum of a row's inputs over group g, which the minimum of a group multiplies.
template <int M>
INLINE void tile_int4(int k, const float* const* a, const float* const* sums, const char* src, vf acc[M][2]) {
    constexpr int U = M == 1 ? 2 : 1;
    for (int g = 0; g < k / GROUP; g++) {
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
            float t = sums[r][g];
            for (int u = 1; u < U; u++) part[0][r][0] += part[u][r][0], part[0][r][1] += part[u][r][1];
            acc[r][0] += part[0][r][0] * s0 + m0 * t;
            acc[r][1] += part[0][r][1] * s1 + m1 * t;
        }
        src = (const char*)(q + NR * GROUP / 2);
    }
}

// The first n of two vectors.
INLINE void store_part(float* out, int n, vf a, vf b) {
    if (n >= NR) {
        store(out, a);
        store(out + VL, b);
    } else {
        for (int r = 0; r < n; r++) out[r] = r < VL ? a[r] : b[r - VL];
    }
}

// Calls f with M as a compile-time constant, so that accumulators are registers.
template <class F>
INLINE void with_rows(int m, F&& f) {
    switch (m) {
        case 1: f(std::integral_constant<int, 1>()); break;
        case 2: f(std::integral_constant<int, 2>()); break;
        case 3: f(std::integral_constant<int, 3>()); break;
        case 4: f(std::integral_constant<int, 4>()); break;
        case 5: f(std::integral_constant<int, 5>()); break;
        case 6: f(std::integral_constant<int, 6>()); break;
        default:
            if constexpr (MR > 6) {
                switch (m) {
                    case 7: f(std::integral_constant<int, 7>()); break;
                    case 8: f(std::integral_constant<int, 8>()); break;
                    case 9: f(std::integral_constant<int, 9>()); break;
                    case 10: f(std::integral_constant<int, 10>()); break;
                    case 11: f(std::integral_constant<int, 11>()); break;
                    default: f(std::integral_constant<int, 12>()); break;
                }
            }
    }
}

// ---- driver -------------------------------------------------------------------------------------------------

// Blocks of rows times groups of panels, divided among threads; a thread's tasks share rows as far as can be.
struct Tasks {
    int rows, panels, threads, height, width, columns, count;
    // Blocks have `most` rows or somewhat fewer, so that they are alike; all but the last are whole tiles.
    Tasks(int rows, int panels, int threads, int most, int tile) : rows(rows), panels(panels), threads(threads) {
        most = most < tile ? tile : most / tile * tile;
        int blocks = (rows + most - 1) / most;
        height = ((rows + blocks - 1) / blocks + tile - 1) / tile * tile;
        blocks = (rows + height - 1) / height;
        // Enough panels to a task that threads seldom meet, few enough that they end together.
        width = (int)((long)panels * blocks / (threads * 8));
        width = width < 1 ? 1 : width > 8 ? 8 : width;
        columns = (panels + width - 1) / width;
        count = columns * blocks;
    }
    int begin(int tid) const { return (int)((long)count * tid / threads); }
    struct Task { int low, high, from, to; };  // rows and panels
    Task at(int task) const {
        const int low = task / columns * height, from = task % columns * width;
        return {low, low + height < rows ? low + height : rows, from, from + width < panels ? from + width : panels};
    }
};

// The rows of a product: row i is base + index[i] * stride (index may be null: 0, 1, 2, ...).
struct Rows {
    const float* base;
    size_t stride;
    const int32_t* index;
    int count;
    const float* row(int i) const { return base + (size_t)(index ? index[i] : i) * stride; }
};

// Most rows that a quantised or half-precision panel multiplies without being unpacked first, and rows of a tile then.
INLINE int direct_rows(int type) { return type == F32 ? 1 << 30 : type == INT4 ? 9 : 12; }
INLINE int tile_rows(int type, bool direct) {
    return !direct || type == F32 || type == BF16 ? MR : type == INT8 ? 4 : 3;
}

#if HAS_TILES
// A panel of any format as pairs of bfloat16 [steps][16][NR].
static const uint32_t* panel_pairs(const Linear& w, const char* panel, std::vector<float>& plain, std::vector<vi>& pairs) {
    if (w.type == BF16) return (const uint32_t*)panel;
    unpack_panel(w.type, panel, w.k, plain.data());  // its inputs fill groups of 32: nothing is left over
    vi* out = pairs.data();
    for (int c = 0; c < w.k; c += 2)
        for (int r = 0; r < NR; r += VL)
            *out++ = bf16_pairs(load(plain.data() + (size_t)c * NR + r), load(plain.data() + (size_t)(c + 1) * NR + r));
    return (const uint32_t*)pairs.data();
}

// `multiply` of many rows, none of them by float32 weights.
template <class Out>
static void multiply_tiles(const Linear& w, const Rows& x, int tid, int threads, Out&& out) {
    const int steps = steps_of(w.k);
    const size_t bytes = panel_bytes(w.type, w.k), stack = (size_t)steps * 16 * STEP;
    // Rows of a block fit a quarter of a private cache.
    const Tasks plan(x.count, panels(w), threads, 262144 / (steps * STEP), 32);
    thread_local std::vector<float> plain;
    thread_local std::vector<bf16> rows;
    thread_local std::vector<vi> pairs;
    if (w.type != BF16) plain.resize((size_t)w.k * NR), pairs.resize((size_t)w.k * NR / 2 / VL);
    rows.resize((size_t)(plan.height + 15) / 16 * stack);
    alignas(64) float sums[32 * NR];
    int packed = -1;
    tiles_begin();
    for (int task = plan.begin(tid); task < plan.begin(tid + 1); task++) {
        const auto [low, high, from, to] = plan.at(task);
        if (low != packed) {
            for (int i = low; i < high; i++)
                pack_row(x.row(i), w.k, rows.data() + (i - low) / 16 * stack + (size_t)((i - low) % 16) * STEP);
            packed = low;
        }
        for (int p = from; p < to; p++) {
            const uint32_t* panel = panel_pairs(w, (const char*)w.data + p * bytes, plain, pairs);
            vf b0 = {}, b1 = {};
            if (w.bias) b0 = load(w.bias + p * NR), b1 = load(w.bias + p * NR + VL);
            for (int i = low; i < high; i += 32) {
                const int tall = high - i < 32 ? high - i : 32;
                tile_rows_block(tall, steps, rows.data() + (i - low) / 16 * stack, stack, panel, sums, NR);
                for (int r = 0; r < tall; r++)
                    out(i + r, p * NR, load(sums + r * NR) + b0, load(sums + r * NR + VL) + b1);
            }
        }
    }
    tiles_end();
}
#endif

// `multiply` by sums of float32.
template <class Out>
static void multiply_plain(const Linear& w, const Rows& x, int tid, int threads, Out&& out) {
    const int p_count = panels(w), k = w.k;
    const size_t bytes = panel_bytes(w.type, k);
    const bool direct = x.count <= direct_rows(w.type);
    // Rows of a block fit half of a private cache, so that each panel finds them there.
    const Tasks plan(x.count, p_count, threads, 65536 / k * (direct || w.type == F32 ? 1 : 2), MR);
    thread_local std::vector<float> unpacked, group_sums;
    if (!direct && w.type != F32) unpacked.resize((size_t)k * NR + VL);
    if (direct && w.type == INT4) {
        const int groups = k / GROUP;
        group_sums.resize((size_t)x.count * groups);
        for (int i = 0; i < x.count; i++)
            for (int g = 0; g < groups; g++) {
                const float* p = x.row(i) + g * GROUP;
                vf s = load(p);
                for (int c = VL; c < GROUP; c += VL) s += load(p + c);
                group_sums[(size_t)i * groups + g] = sum(s);
            }
    }
    for (int task = plan.begin(tid); task < plan.begin(tid + 1); task++) {
        const auto [low, high, from, to] = plan.at(task);
        for (int p = from; p < to; p++) {
            const char* panel = (const char*)w.data + p * bytes;
            const float* plain = (const float*)panel;
            if (!direct && w.type != F32) {
                unpack_panel(w.type, panel, k, unpacked.data());
                plain = unpacked.data();
            }
            vf b0 = {}, b1 = {};
            if (w.bias) b0 = load(w.bias + p * NR), b1 = load(w.bias + p * NR + VL);
            const int most = tile_rows(w.type, direct), tiles = (high - low + most - 1) / most;
            for (int t = 0; t < tiles; t++) {
                const int i0 = low + (high - low) * t / tiles, i1 = low + (high - low) * (t + 1) / tiles;
                with_rows(i1 - i0, [&](auto constant) {
                    constexpr int M = decltype(constant)::value;
                    const float* a[M];
                    vf acc[M][2];
                    for (int r = 0; r < M; r++) a[r] = x.row(i0 + r), acc[r][0] = b0, acc[r][1] = b1;
                    constexpr int KU = M == 1 ? 4 : M == 2 ? 2 : 1;
                    if (w.type == F32 || !direct) tile_plain<M, KU>(k, a, plain, acc);
                    else if (w.type == BF16) tile_pairs<M, KU>(k, a, (const bf16*)panel, acc);
                    else if (w.type == INT8) tile_int8<M>(k, a, panel, acc);
                    else {
                        const float* sums[M];
                        for (int r = 0; r < M; r++) sums[r] = group_sums.data() + (size_t)(i0 + r) * (k / GROUP);
                        tile_int4<M>(k, a, sums, panel, acc);
                    }
                    for (int r = 0; r < M; r++) out(i0 + r, p * NR, acc[r][0], acc[r][1]);
                });
            }
        }
    }
}

// out(i, column, v0, v1) gets the product of row i with the outputs column .. column + NR.
// Called by every thread of a parallel region; no barrier at its end.
template <class Out>
static void multiply(const Linear& w, const Rows& x, int tid, int threads, Out&& out) {
    if (!x.count) return;
#if HAS_TILES
    if (w.type != F32 && tiles_ready()) {
        if (x.count > direct_rows(w.type)) return multiply_tiles(w, x, tid, threads, out);
        if (w.type == BF16) {
            // Matrix instructions round inputs to bfloat16: so do few rows, that a row's result does not depend on how
            // many there are.
            thread_local std::vector<float> rounded;
            rounded.resize((size_t)x.count * w.k + VL);
            for (int i = 0; i < x.count; i++)
                for (int c = 0; c < w.k; c++) {
                    const bf16 half = to_bf16(x.row(i)[c]);
                    rounded[(size_t)i * w.k + c] = get(&half);
                }
            return multiply_plain(w, {rounded.data(), (size_t)w.k, nullptr, x.count}, tid, threads, out);
        }
    }
#endif
    multiply_plain(w, x, tid, threads, out);
}
