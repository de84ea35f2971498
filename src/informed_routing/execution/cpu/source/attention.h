// Causal attention of chosen queries over a cache: scores are made a block of keys at a time and never stored.
//
// Keys lie in panels [S / NR][head_dim][NR], values in rows [S][head_dim], per sequence and key-value head; the
// query heads that share a key-value head are rows of the same tiles.
#pragma once
#include <vector>

#include "linear.h"

constexpr int KEY_BLOCK = 64;
constexpr int QUERY_ROWS = 48;
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

// Rows q[i] [head_dim] (rotated and scaled) see keys low[i] .. last[i]; of these the part from..to is done here.
template <class T>
static void attend(
    const KeyValues<T>& kv, int n, const float* const* q, const int* low, const int* last, int from, int to,
    float* out, Partial* state, float* scores
) {
    const int hd = kv.head_dim;
    int least_last = last[0], most_low = low[0];
    for (int i = 0; i < n; i++) {
        least_last = last[i] < least_last ? last[i] : least_last;
        most_low = low[i] > most_low ? low[i] : most_low;
        state[i] = {MASKED, 0.0f};
    }
    std::memset(out, 0, sizeof(float) * (size_t)n * hd);
    const int tiles = (n + MR - 1) / MR;
    for (int start = from / KEY_BLOCK * KEY_BLOCK; start < to; start += KEY_BLOCK) {
        const int used = to - start < KEY_BLOCK ? to - start : KEY_BLOCK;
        const int columns = (used + NR - 1) / NR;
        for (int t = 0; t < tiles; t++) {
            const int i0 = n * t / tiles, i1 = n * (t + 1) / tiles;
            with_rows(i1 - i0, [&](auto constant) {
                constexpr int M = decltype(constant)::value;
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
        const int width = columns * NR;
        const bool partly = start + width - 1 > least_last || start < most_low || start < from || used < width;
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
            float peak = state[i].peak;
            for (int c = 0; c < VL; c++) peak = top[c] > peak ? top[c] : peak;
            if (peak > state[i].peak) {
                const float shrink = vexp((vf){} + (state[i].peak - peak))[0];
                state[i].mass *= shrink;
                for (int c = 0; c < hd; c += VL) store(out + i * hd + c, load(out + i * hd + c) * shrink);
                state[i].peak = peak;
            }
            vf mass = {};
            for (int c = 0; c < width; c += VL) {
                const vf e = vexp(load(row + c) - peak);
                store(row + c, e);
                mass += e;
            }
            state[i].mass += sum(mass);
        }
        for (int t = 0; t < tiles; t++) {
            const int i0 = n * t / tiles, i1 = n * (t + 1) / tiles;
            with_rows(i1 - i0, [&](auto constant) {
                constexpr int M = decltype(constant)::value;
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
    }
}
