// Products of a few rows with a panel of weights, keys or values in registers: acc[M][2] += rows[M][K] . panel[K][NR].
#pragma once
#include <type_traits>

#include "vec.h"

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

// Calls f with the number of rows, at most MOST, as a compile-time constant, so that accumulators are registers.
template <int MOST = MR, int M = 1, class F>
INLINE void with_rows(int m, F&& f) {
    if constexpr (M < MOST)
        if (m > M) return with_rows<MOST, M + 1>(m, f);
    f(std::integral_constant<int, M>());
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
