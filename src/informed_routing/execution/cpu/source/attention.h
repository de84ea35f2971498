// Causal attention of chosen queries over a cache: scores are made a block of keys at a time and never stored.
//
// Keys lie in panels [S / NR][head_dim][NR], values in rows [S][head_dim], per sequence and key-value head; the
// query heads that share a key-value head are rows of the same tiles.
#pragma once
#include <type_traits>
#include <vector>

#include "linear.h"

constexpr int KEY_BLOCK = 64;
constexpr int QUERY_ROWS = 48;       // rows of queries that share what is read of a block of keys
constexpr int TILE_QUERY_ROWS = 96;  // where keys and values are put in order for matrix instructions first
constexpr float MASKED = -1e30f;

// A row's running softmax: `peak` and `mass` belong to the sum in `out` [head_dim], which is not divided yet.
struct Partial {
    float peak, mass;
};

template <class T>
struct KeyValues {
    const T* keys;
    const T* values;
    int head_dim;
};

// The two products of a block of KEY_BLOCK keys from `start`: scores [n][KEY_BLOCK] of n rows q [head_dim], and
// out [n][head_dim] += weights times values, where the weights [n][KEY_BLOCK] have taken the place of the scores.
template <class T>
struct PlainProducts {
    const KeyValues<T>& kv;
    const int n;
    const float* const* q;
    float *scores, *out;
#if HAS_TILES
    const bool rounds;  // weights of values to bfloat16, as matrix instructions would for more rows
#else
    static constexpr bool rounds = false;
#endif

    template <class F>
    void each_tile(F&& f) const {
        const int tiles = (n + MR - 1) / MR;
        for (int t = 0; t < tiles; t++) {
            const int i0 = n * t / tiles, i1 = n * (t + 1) / tiles;
            with_rows(i1 - i0, [&](auto rows) { f(rows, i0); });
        }
    }

    void score(int start, int columns) const {
        const int hd = kv.head_dim;
        each_tile([&](auto rows, int i0) {
            constexpr int M = decltype(rows)::value;
            for (int p = 0; p < columns; p++) {
                vf acc[M][2] = {};
                tile_plain<M, (M < 3 ? 2 : 1)>(hd, q + i0, kv.keys + (size_t)(start / NR + p) * hd * NR, acc);
                for (int r = 0; r < M; r++) {
                    store(scores + (i0 + r) * KEY_BLOCK + p * NR, acc[r][0]);
                    store(scores + (i0 + r) * KEY_BLOCK + p * NR + VL, acc[r][1]);
                }
            }
        });
    }

    void mix(int start, int used) const {
        const int hd = kv.head_dim;
        each_tile([&](auto rows, int i0) {
            constexpr int M = decltype(rows)::value;
            const float* a[M];
            for (int r = 0; r < M; r++) a[r] = scores + (i0 + r) * KEY_BLOCK;
            const T* v = kv.values + (size_t)start * hd;
            int c = 0;
            for (; c + NR <= hd; c += NR) {
                vf acc[M][2];
                for (int r = 0; r < M; r++) {
                    acc[r][0] = load(out + (i0 + r) * hd + c);
                    acc[r][1] = load(out + (i0 + r) * hd + c + VL);
                }
                tile_plain<M, (M < 3 ? 2 : 1)>(used, a, v + c, acc, hd);
                for (int r = 0; r < M; r++) {
                    store(out + (i0 + r) * hd + c, acc[r][0]);
                    store(out + (i0 + r) * hd + c + VL, acc[r][1]);
                }
            }
            if (c < hd) {
                vf acc[M];
                for (int r = 0; r < M; r++) acc[r] = load(out + (i0 + r) * hd + c);
                tile_half<M>(used, a, v + c, acc, hd);
                for (int r = 0; r < M; r++) store(out + (i0 + r) * hd + c, acc[r]);
            }
        });
    }
};

#if HAS_TILES
// The same by matrix instructions: queries and weights are rounded to bfloat16, as keys and values are.
struct TileProducts {
    static constexpr int ROWS = 128;  // most of them
    static constexpr int KEY_STEPS = KEY_BLOCK / STEP;
    const KeyValues<bf16>& kv;
    const int n, steps;
    static constexpr bool rounds = false;  // packing does
    float *scores, *out;  // with room for whole tiles of rows
    Aligned<bf16>&queries, &weights;
    Aligned<uint32_t>& pairs;

    static bool can(int n, int head_dim) { return tiles_ready() && n >= 8 && n <= ROWS && head_dim % NR == 0; }

    TileProducts(const KeyValues<bf16>& kv, int n, const float* const* q, float* scores, float* out)
        : kv(kv), n(n), steps(kv.head_dim / STEP), scores(scores), out(out), queries(kept<bf16, 0>()),
          weights(kept<bf16, 1>()), pairs(kept<uint32_t, 2>()) {
        queries.resize((size_t)ROWS * kv.head_dim), weights.resize((size_t)ROWS * KEY_BLOCK);
        pairs.resize((size_t)KEY_BLOCK / 2 * kv.head_dim);
        for (int i = 0; i < n; i++)
            pack_row(q[i], kv.head_dim, queries.data() + (size_t)(i / 16) * steps * 16 * STEP + i % 16 * STEP);
        tiles_begin();
    }
    ~TileProducts() { tiles_end(); }

    template <class E, int>
    static Aligned<E>& kept() {
        thread_local Aligned<E> memory;
        return memory;
    }

    void score(int start, int columns) const {
        const int hd = kv.head_dim;
        for (int p = 0; p < columns; p++) {
            const bf16* panel = kv.keys + (size_t)(start / NR + p) * hd * NR;
            for (int e = 0; e < hd; e += 2) pair_rows(panel + e * NR, panel + (e + 1) * NR, pairs.data() + e / 2 * NR);
            tile_rows_block(n, steps, queries.data(), (size_t)steps * 16 * STEP, pairs.data(), scores + p * NR, KEY_BLOCK);
        }
    }

    void mix(int start, int used) const {
        const int hd = kv.head_dim, width = (used + NR - 1) / NR * NR;
        for (int i = 0; i < n; i++) {
            float* row = scores + i * KEY_BLOCK;
            for (int c = width; c < KEY_BLOCK; c += VL) store(row + c, (vf){});
            pack_row(row, KEY_BLOCK, weights.data() + (size_t)(i / 16) * KEY_STEPS * 16 * STEP + i % 16 * STEP);
        }
        for (int c = 0; c < hd; c += NR) {
            for (int k = 0; k < KEY_BLOCK; k += 2) {
                const bf16* v = kv.values + (size_t)(start + k) * hd + c;
                pair_rows(v, v + hd, pairs.data() + k / 2 * NR);
            }
            tile_rows_block<true>(
                n, KEY_STEPS, weights.data(), (size_t)KEY_STEPS * 16 * STEP, pairs.data(), out + c, hd
            );
        }
    }
};
#endif

// Rows see keys low[i] .. last[i]; of these the part from..to is done here. `out` [n][head_dim] and `state` [n] get the
// sums and what they have to be divided by.
template <class Products>
static void attend(
    const Products& products, const int* low, const int* last, int from, int to, Partial* state
) {
    const int n = products.n, hd = products.kv.head_dim;
    float *scores = products.scores, *out = products.out;
    int least_last = last[0], most_low = low[0];
    for (int i = 0; i < n; i++) {
        least_last = last[i] < least_last ? last[i] : least_last;
        most_low = low[i] > most_low ? low[i] : most_low;
    }
    // A row's mass is summed up at the end: until then it is a vector.
    thread_local Aligned<float> memory[3];
    memory[0].assign((size_t)n * VL, 0.0f);
    for (int k = 1; k < 3; k++) memory[k].assign((n + VL - 1) / VL * VL, MASKED);
    float *const masses = memory[0].data(), *const peaks = memory[1].data(), *const shrinks = memory[2].data();
    std::memset(out, 0, sizeof(float) * (size_t)n * hd);
    for (int start = from / KEY_BLOCK * KEY_BLOCK; start < to; start += KEY_BLOCK) {
        const int used = to - start < KEY_BLOCK ? to - start : KEY_BLOCK;
        const int columns = (used + NR - 1) / NR;
        products.score(start, columns);
        const int width = columns * NR;
        const bool partly = start + width - 1 > least_last || start < most_low || start < from || used < width;
        // First the new peaks of all rows and what the sums so far shrink by, VL rows at a time: row by row each would
        // wait for its own chain of a maximum and two exponentials, behind a branch that nobody can foresee.
        for (int i = 0; i < n; i++) {
            float* row = scores + i * KEY_BLOCK;
            if (partly) {
                const int first = (low[i] > from ? low[i] : from) - start;
                const int end = (last[i] + 1 < to ? last[i] + 1 : to) - start;
                for (int c = 0; c < first && c < width; c++) row[c] = MASKED;
                for (int c = end > 0 ? end : 0; c < width; c++) row[c] = MASKED;
            }
            vf top = load(row);
            for (int c = VL; c < width; c += VL) top = vmax(top, load(row + c));
            shrinks[i] = most(top);
        }
        for (int i = 0; i < n; i += VL) {
            const vf old = load(peaks + i), peak = vmax(load(shrinks + i), old);
            store(peaks + i, peak);
            store(shrinks + i, vexp(old - peak));
        }
        for (int i = 0; i < n; i++) {
            float* row = scores + i * KEY_BLOCK;
            const float peak = peaks[i], shrink = shrinks[i];
            if (shrink != 1.0f) {
                store(masses + i * VL, load(masses + i * VL) * shrink);
                for (int c = 0; c < hd; c += VL) store(out + i * hd + c, load(out + i * hd + c) * shrink);
            }
            vf mass = {};
            for (int c = 0; c < width; c += VL) {
                const vf e = vexp(load(row + c) - peak);
                store(row + c, products.rounds ? rounded_to_bf16(e) : e);
                mass += e;
            }
            store(masses + i * VL, load(masses + i * VL) + mass);
        }
        products.mix(start, used);
    }
    for (int i = 0; i < n; i++) state[i] = {peaks[i], sum(load(masses + i * VL))};
}

// Whether queries and weights of values are rounded to bfloat16, for any number of rows alike.
template <class T>
INLINE bool rounds_attention(int head_dim) {
    return std::is_same_v<T, bf16> && tiles_ready() && head_dim % NR == 0;
}

// All keys from..to of a row by the fastest products; `out` and `scores` have room for whole tiles of rows.
template <class T>
static void attend_to(
    const KeyValues<T>& kv, int n, const float* const* q, const int* low, const int* last, int from, int to,
    float* out, Partial* state, float* scores
) {
#if HAS_TILES
    if constexpr (std::is_same_v<T, bf16>)
        if (TileProducts::can(n, kv.head_dim))
            return attend(TileProducts(kv, n, q, scores, out), low, last, from, to, state);
#endif
#if HAS_TILES
    attend(PlainProducts<T>{kv, n, q, scores, out, rounds_attention<T>(kv.head_dim)}, low, last, from, to, state);
#else
    attend(PlainProducts<T>{kv, n, q, scores, out}, low, last, from, to, state);
#endif
}
