// Products of many rows by matrix instructions (AMX): 16 x 16 sums of 32 bfloat16 inputs in 16 cycles.
//
// Inputs are rounded to bfloat16 for it, as weights below float32 are; sums are float32. Float32 weights never come
// here. With INFORMED_ROUTING_TILES plain code stands in for the instructions, so that any machine can test the rest.
#pragma once
#include "vec.h"

#if defined(INFORMED_ROUTING_TILES)
#define HAS_TILES 1
#define PLAIN_TILES 1
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#define PLAIN_TILES 0
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_TILES 0
#endif

constexpr int STEP = 32;  // inputs that one instruction sums; bfloat16 panels are filled up to it

// Two rows of inputs for 16 outputs as the instructions read them: pairs of bfloat16, the first one in the low half.
INLINE vi bf16_pairs(vf even, vf odd) {
    vi a = (vi)even, b = (vi)odd;
    a += 0x7fff + ((a >> 16) & 1), b += 0x7fff + ((b >> 16) & 1);
    return ((a >> 16) & 0xffff) | (b & (int32_t)0xffff0000);
}

INLINE int whole_tiles(int rows) { return (rows + 15) / 16 * 16; }

// Where a row's column lies in stacks of tiles of `width` columns, a multiple of STEP.
INLINE bf16* in_stacks(bf16* stacks, size_t width, int row, int column) {
    return stacks + row / 16 * 16 * width + (column / STEP * 16 + row % 16) * STEP + column % STEP;
}

#if HAS_TILES
static_assert(VL == 16, "tiles are 16 outputs wide: compile with INFORMED_ROUTING_WIDE");

#if PLAIN_TILES
struct PlainTile { uint32_t at[16][16]; };
static thread_local PlainTile plain_tiles[8];

static __attribute__((noinline)) void plain_load(int t, const void* p, size_t stride) {
    for (int r = 0; r < 16; r++) std::memcpy(plain_tiles[t].at[r], (const char*)p + r * stride, 64);
}
static __attribute__((noinline)) void plain_store(int t, void* p, size_t stride) {
    for (int r = 0; r < 16; r++) std::memcpy((char*)p + r * stride, plain_tiles[t].at[r], 64);
}
static __attribute__((noinline)) void plain_product(int c, int a, int b) {
    auto low = [](uint32_t v) {
        const bf16 half{(uint16_t)v};
        return get(&half);
    };
    for (int r = 0; r < 16; r++)
        for (int n = 0; n < 16; n++) {
            float s;
            std::memcpy(&s, &plain_tiles[c].at[r][n], 4);
            for (int p = 0; p < 16; p++) {
                const uint32_t x = plain_tiles[a].at[r][p], w = plain_tiles[b].at[p][n];
                s += low(x) * low(w) + low(x >> 16) * low(w >> 16);
            }
            std::memcpy(&plain_tiles[c].at[r][n], &s, 4);
        }
}
#define TILE_ZERO(t) std::memset(&plain_tiles[t], 0, sizeof(PlainTile))
#define TILE_LOAD(t, p, stride) plain_load(t, p, stride)
#define TILE_STORE(t, p, stride) plain_store(t, p, stride)
#define TILE_PRODUCT(c, a, b) plain_product(c, a, b)

INLINE bool tiles_ready() { return true; }
INLINE void tiles_begin() {}
INLINE void tiles_end() {}
#else
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_PRODUCT(c, a, b) _tile_dpbf16ps(c, a, b)

// The kernel grants the large registers to a process that asks for them.
static bool tiles_ready() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
}
INLINE void tiles_begin() {
    alignas(64) uint8_t config[64] = {1};  // palette 1: eight tiles of 16 rows of 64 bytes
    for (int t = 0; t < 8; t++) config[16 + 2 * t] = 64, config[48 + t] = 16;
    _tile_loadconfig(config);
}
INLINE void tiles_end() { _tile_release(); }
#endif

// Intrinsics do not tell compilers what memory they touch.
INLINE void memory_fence() { __asm__ volatile("" ::: "memory"); }

// One row of k inputs as bfloat16 into a stack of tiles of 16 rows, [steps][16][STEP]; what fills it up is zero.
INLINE void pack_row(const float* x, int k, bf16* out) {
    constexpr size_t next = 16 * STEP;
    for (; k >= STEP; k -= STEP, x += STEP, out += next) {
#if PLAIN_TILES
        for (int c = 0; c < STEP; c++) out[c] = to_bf16(x[c]);
#else
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
        std::memcpy(out, &both, sizeof both);
#endif
    }
    if (!k) return;
    for (int c = 0; c < STEP; c++) out[c] = c < k ? to_bf16(x[c]) : bf16{0};
}

// A row, normed as rms_norm does, as pack_row packs it; k is a multiple of STEP.
INLINE void pack_normed(const float* x, float scale, const float* weight, int k, bf16* out) {
    constexpr size_t next = 16 * STEP;
    for (int c = 0; c < k; c += STEP, out += next) {
        const vf a = load(x + c) * scale * load(weight + c), b = load(x + c + VL) * scale * load(weight + c + VL);
#if PLAIN_TILES
        for (int e = 0; e < VL; e++) out[e] = to_bf16(a[e]), out[e + VL] = to_bf16(b[e]);
#else
        const __m512bh both = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
        std::memcpy(out, &both, sizeof both);
#endif
    }
}

// A vector as pack_row rounds it.
INLINE void store_packed(bf16* out, vf x) {
#if PLAIN_TILES
    for (int c = 0; c < VL; c++) out[c] = to_bf16(x[c]);
#else
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(out, &half, sizeof half);
#endif
}

// What is multiplied: stacks of tiles, `height` apart, and a panel of pairs [steps][16][NR].
struct TileInputs {
    int steps = 0;
    const bf16* a = nullptr;
    size_t height = 0;
    const uint32_t* panel = nullptr;
};

// sums [16 TALL][stride] = (or with ADD, +=) the product of TALL stacks with a panel, and that of `more`.
// between(s) is done while step s is under way: matrix instructions leave the vector units idle.
template <int TALL, bool ADD = false, class Between>
INLINE void tile_block(
    const TileInputs& inputs, float* sums, size_t stride, Between&& between, const TileInputs& more = {}
) {
    memory_fence();
    float* lower = sums + 16 * stride;
    if (ADD) {
        TILE_LOAD(0, sums, stride * 4);
        TILE_LOAD(1, sums + 16, stride * 4);
        if (TALL == 2) {
            TILE_LOAD(2, lower, stride * 4);
            TILE_LOAD(3, lower + 16, stride * 4);
        }
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        if (TALL == 2) {
            TILE_ZERO(2);
            TILE_ZERO(3);
        }
    }
    int done = 0;
    auto sum = [&](const TileInputs& from) __attribute__((always_inline)) {
        const bf16* a = from.a;
        const uint32_t* panel = from.panel;
        for (int s = 0; s < from.steps; s++, a += 16 * STEP, panel += 16 * NR) {
            TILE_LOAD(4, panel, NR * 4);
            TILE_LOAD(5, panel + 16, NR * 4);
            TILE_LOAD(6, a, STEP * 2);
            TILE_PRODUCT(0, 6, 4);
            TILE_PRODUCT(1, 6, 5);
            if (TALL == 2) {
                TILE_LOAD(7, a + from.height, STEP * 2);
                TILE_PRODUCT(2, 7, 4);
                TILE_PRODUCT(3, 7, 5);
            }
            between(done++);
        }
    };
    sum(inputs);
    sum(more);
    TILE_STORE(0, sums, stride * 4);
    TILE_STORE(1, sums + 16, stride * 4);
    if (TALL == 2) {
        TILE_STORE(2, lower, stride * 4);
        TILE_STORE(3, lower + 16, stride * 4);
    }
    memory_fence();
}

// As above for any number of rows; `sums` has room for whole tiles.
template <bool ADD = false>
INLINE void tile_rows_block(
    int rows, int steps, const bf16* a, size_t height, const uint32_t* panel, float* sums, size_t stride
) {
    for (int i = 0; i < rows; i += 32, a += 2 * height, sums += 32 * stride) {
        if (rows - i > 16) tile_block<2, ADD>({steps, a, height, panel}, sums, stride, [](int) {});
        else tile_block<1, ADD>({steps, a, height, panel}, sums, stride, [](int) {});
    }
}

// NR pairs of two rows.
INLINE void pair_rows(const bf16* even, const bf16* odd, uint32_t* out) {
    for (int r = 0; r < NR; r += VL) {
        const vi both = widen(even + r) | (widen(odd + r) << 16);
        std::memcpy(out + r, &both, sizeof both);
    }
}
#else
INLINE bool tiles_ready() { return false; }
#endif
