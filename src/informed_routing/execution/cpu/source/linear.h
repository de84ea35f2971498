// Linear layers of packed weights (formats.h): rows times panels, by vectors or by matrix instructions (tiles.h).
#pragma once
#include <algorithm>
#include <vector>

#include "formats.h"

struct Linear {
    int32_t type, n, k;
    int32_t packed;     // inputs of a panel, of which the first k are read: fewer in a part of another layer
    const void* data;   // packed weights; null with n = 0 for no layer
    const float* bias;  // [n rounded up to NR] or null
};

INLINE int panels(const Linear& w) { return (w.n + NR - 1) / NR; }

INLINE const char* panel_at(const Linear& w, size_t bytes, int p) { return (const char*)w.data + p * bytes; }

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
    // Threads get alike numbers of rows times panels, although the last block may be lower than the others.
    int begin(int tid) const {
        const long whole = (long)height * columns, work = (long)rows * columns * tid / threads;
        const long block = work / whole, tall = rows - block * height < height ? rows - block * height : height;
        return tall ? (int)(block * columns + (work - block * whole) / tall) : count;
    }
    struct Task { int low, high, from, to; };  // rows and panels
    Task at(int task) const {
        const int low = task / columns * height, from = task % columns * width;
        return {low, low + height < rows ? low + height : rows, from, from + width < panels ? from + width : panels};
    }
};

// The rows of a product: row i is base + index[i] * stride (index may be null: 0, 1, 2, ...), or they all lie in stacks
// of tiles, one after the other.
struct Rows {
    const float* base;
    size_t stride;
    const int32_t* index;
    int count;
    const bf16* stacks = nullptr;
    const float* row(int i) const { return base + (size_t)(index ? index[i] : i) * stride; }
};

using Unpack = void (*)(const char* src, int k, float* out);

#if HAS_TILES
// A panel as pairs of bfloat16 [steps][16][NR].
static const uint32_t* panel_pairs(Unpack unpack, const char* panel, int k, float* plain, vi* pairs) {
    unpack(panel, k, plain);  // its inputs fill groups of 32: nothing is left over
    vi* out = pairs;
    for (int c = 0; c < k; c += 2)
        for (int r = 0; r < NR; r += VL)
            *out++ = bf16_pairs(load(plain + (size_t)c * NR + r), load(plain + (size_t)(c + 1) * NR + r));
    return (const uint32_t*)pairs;
}

// Sums of a block of rows that wait to be given out.
struct Finished {
    int low = 0, count = 0, column = 0;
    vf b0 = {}, b1 = {};
    alignas(64) float sums[32 * NR];

    // Rows from..to of the block, as far as it has them.
    template <class Out>
    __attribute__((always_inline)) void give(int from, int to, Out&& out) const {
        to = to < count ? to : count;
        for (int r = from; r < to; r++)
            out(low + r, column, load(sums + r * NR) + b0, load(sums + r * NR + VL) + b1);
    }
};

INLINE void prefetch(const char* from, const char* to) {
    for (; from < to; from += 64) __builtin_prefetch(from, 0, 2);
}

// A second product of the same rows (all in stacks) and outputs, whose sums are added to those of the first.
struct Second {
    const Linear& w;
    const bf16* stacks;
    size_t bytes;
    Unpack unpack;
};

// Many rows by matrix instructions. Panels are pairs already where there is no `unpack`.
// While a block of sums is made, the block before it is given out and a part of the next panel is brought near.
template <class Out>
static void multiply_tiles(
    const Linear& w, const Rows& x, size_t bytes, Unpack unpack, int tid, int threads, Out&& out, const Tasks* given,
    const Second* second = nullptr
) {
    const int steps = steps_of(w.k);
    const size_t stack = (size_t)steps * 16 * STEP;
    const int more_steps = second ? steps_of(second->w.k) : 0, all_steps = steps + more_steps;
    // Rows of a block fit half of a private cache.
    const Tasks plan = given ? *given : Tasks(x.count, panels(w), threads, 640000 / (all_steps * STEP), 32);
    thread_local Aligned<float> plain;
    thread_local Aligned<bf16> rows;
    thread_local Aligned<vi> pairs, more_pairs;
    if (unpack) plain.resize((size_t)w.k * NR), pairs.resize((size_t)w.k * NR / 2 / VL);
    if (second && second->unpack) {
        plain.resize(std::max(plain.size(), (size_t)second->w.k * NR));
        more_pairs.resize((size_t)second->w.k * NR / 2 / VL);
    }
    if (!x.stacks) rows.resize((size_t)(plan.height + 15) / 16 * stack);
    Finished blocks[2];
    int packed = -1, turn = 0;
    const char* const end = panel_at(w, bytes, panels(w));
    tiles_begin();
    for (int task = plan.begin(tid); task < plan.begin(tid + 1); task++) {
        const auto [low, high, from, to] = plan.at(task);
        if (low != packed && !x.stacks) {
            for (int i = low; i < high; i++)
                pack_row(x.row(i), w.k, rows.data() + (i - low) / 16 * stack + (size_t)((i - low) % 16) * STEP);
            packed = low;
        }
        const bf16* const tiles = x.stacks ? x.stacks + low / 16 * stack : rows.data();
        const size_t ahead = (bytes * 32 / (high - low + 31) / all_steps + 63) / 64 * 64;
        for (int p = from; p < to; p++) {
            const char* src = panel_at(w, bytes, p);
            const char* next = src + bytes;
            const uint32_t* panel =
                unpack ? panel_pairs(unpack, src, w.k, plain.data(), pairs.data()) : (const uint32_t*)src;
            TileInputs more;
            if (second) {
                const char* from = panel_at(second->w, second->bytes, p);
                more = {more_steps, nullptr, (size_t)more_steps * 16 * STEP,
                        second->unpack ? panel_pairs(second->unpack, from, second->w.k, plain.data(), more_pairs.data())
                                       : (const uint32_t*)from};
            }
            for (int i = low; i < high; i += 32, turn ^= 1) {
                const Finished& last = blocks[turn ^ 1];
                Finished& block = blocks[turn];
                const int share = (last.count + all_steps - 1) / all_steps;
                auto between = [&](int s) __attribute__((always_inline)) {
                    last.give(s * share, s * share + share, out);
                    const char* until = next + ahead < end ? next + ahead : end;
                    prefetch(next, until);
                    next = until;
                };
                const bf16* a = tiles + (i - low) / 16 * stack;
                block.low = i, block.count = high - i < 32 ? high - i : 32, block.column = p * NR;
                block.b0 = block.b1 = (vf){};
                if (w.bias) block.b0 = load(w.bias + p * NR), block.b1 = load(w.bias + p * NR + VL);
                if (second) {
                    more.a = second->stacks + i / 16 * more.height;
                    if (second->w.bias)
                        block.b0 += load(second->w.bias + p * NR), block.b1 += load(second->w.bias + p * NR + VL);
                }
                const TileInputs inputs{steps, a, stack, panel};
                if (block.count > 16) tile_block<2>(inputs, block.sums, NR, between, more);
                else tile_block<1>(inputs, block.sums, NR, between, more);
            }
        }
    }
    blocks[turn ^ 1].give(0, 32, out);
    tiles_end();
}
#endif

// Sums of float32: blocks of `height` rows meet what panel(p) gives in tiles of at most MOST rows, each made by
// tile(rows, first row, pointers to the rows, panel, acc).
template <int MOST, class Panel, class Tile, class Out>
INLINE void multiply_blocks(
    const Linear& w, const Rows& x, int height, int tid, int threads, Panel&& panel, Tile&& tile, Out&& out,
    const Tasks* given
) {
    const Tasks plan = given ? *given : Tasks(x.count, panels(w), threads, height, MR);
    for (int task = plan.begin(tid); task < plan.begin(tid + 1); task++) {
        const auto [low, high, from, to] = plan.at(task);
        for (int p = from; p < to; p++) {
            const auto* src = panel(p);
            vf b0 = {}, b1 = {};
            if (w.bias) b0 = load(w.bias + p * NR), b1 = load(w.bias + p * NR + VL);
            const int tiles = (high - low + MOST - 1) / MOST;
            for (int t = 0; t < tiles; t++) {
                const int i0 = low + (high - low) * t / tiles, i1 = low + (high - low) * (t + 1) / tiles;
                with_rows<MOST>(i1 - i0, [&](auto rows) {
                    constexpr int M = decltype(rows)::value;
                    const float* a[M];
                    vf acc[M][2];
                    for (int r = 0; r < M; r++) a[r] = x.row(i0 + r), acc[r][0] = b0, acc[r][1] = b1;
                    tile(rows, i0, a, src, acc);
                    for (int r = 0; r < M; r++) out(i0 + r, p * NR, acc[r][0], acc[r][1]);
                });
            }
        }
    }
}

// The sum of each row's inputs over each group of them: [rows][k / GROUP], until the thread's next call.
static const float* group_sums(const Rows& x, int k) {
    thread_local Aligned<float> sums;
    const int groups = k / GROUP;
    sums.resize((size_t)x.count * groups);
    for (int i = 0; i < x.count; i++)
        for (int g = 0; g < groups; g++) {
            const float* p = x.row(i) + g * GROUP;
            vf s = load(p);
            for (int c = VL; c < GROUP; c += VL) s += load(p + c);
            sums[(size_t)i * groups + g] = sum(s);
        }
    return sums.data();
}

// Rows of a block fit half of a private cache, so that each panel finds them there.
INLINE int block_height(int k) { return 65536 / k; }

// Few rows, by panels as they are.
template <class Format, class Out>
static void multiply_direct(const Linear& w, const Rows& x, int tid, int threads, Out&& out, const Tasks* given) {
    const int k = w.k, groups = k / GROUP;
    const size_t bytes = Format::panel_bytes(w.packed);
    const float* sums = Format::SUMS ? group_sums(x, k) : nullptr;
    multiply_blocks<Format::TILE_ROWS>(
        w, x, block_height(k), tid, threads, [&](int p) { return panel_at(w, bytes, p); },
        [&](auto rows, int i0, const float* const* a, const char* src, auto acc) __attribute__((always_inline)) {
            constexpr int M = decltype(rows)::value;
            Format::template tile<M>(k, a, Format::SUMS ? sums + (size_t)i0 * groups : nullptr, src, acc);
        },
        out, given
    );
}

// Many rows: a panel is unpacked once for all of a block.
template <class Out>
static void multiply_unpacked(
    const Linear& w, const Rows& x, size_t bytes, Unpack unpack, int tid, int threads, Out&& out, const Tasks* given
) {
    thread_local Aligned<float> unpacked;
    const int k = w.k;
    unpacked.resize((size_t)k * NR + VL);
    multiply_blocks<MR>(
        w, x, block_height(k) * 2, tid, threads,
        [&](int p) {
            unpack(panel_at(w, bytes, p), k, unpacked.data());
            return (const char*)unpacked.data();
        },
        [&](auto rows, int, const float* const* a, const char* src, auto acc) __attribute__((always_inline)) {
            Float32::tile<decltype(rows)::value>(k, a, nullptr, src, acc);
        },
        out, given
    );
}

#if HAS_TILES
// The rows as matrix instructions round them, until the thread's next call.
static Rows rounded_rows(const Rows& x, int k) {
    thread_local Aligned<float> rounded;
    rounded.resize((size_t)x.count * k + VL);
    for (int i = 0; i < x.count; i++)
        for (int c = 0; c < k; c++) {
            const bf16 half = to_bf16(x.row(i)[c]);
            rounded[(size_t)i * k + c] = get(&half);
        }
    return {rounded.data(), (size_t)k, nullptr, x.count};
}
#endif

template <class Format, class Out>
static void multiply_as(const Linear& w, const Rows& x, int tid, int threads, Out&& out, const Tasks* given) {
    const bool direct = x.count <= Format::DIRECT_ROWS;
    const size_t bytes = Format::panel_bytes(w.packed);
#if HAS_TILES
    if (Format::TILES && tiles_ready()) {
        const Unpack unpack = Format::PAIRS ? nullptr : Format::unpack;
        if (!direct) return multiply_tiles(w, x, bytes, unpack, tid, threads, out, given);
        // So that a row's result does not depend on how many there are.
        if (Format::PAIRS) return multiply_direct<Format>(w, rounded_rows(x, w.k), tid, threads, out, given);
    }
#endif
    if (direct) return multiply_direct<Format>(w, x, tid, threads, out, given);
    multiply_unpacked(w, x, bytes, Format::unpack, tid, threads, out, given);
}

// out(i, column, v0, v1) gets the product of row i with the outputs column .. column + NR.
// Called by every thread of a parallel region; no barrier at its end. A plan that is `given` divides the work instead of
// the product's own, so that threads do the same rows and outputs of several products.
template <class Out>
static void multiply(const Linear& w, const Rows& x, int tid, int threads, Out&& out, const Tasks* given = nullptr) {
    if (!x.count || !w.n) return;
    const bool known = Formats::with(w.type, [&](auto format) {
        multiply_as<decltype(format)>(w, x, tid, threads, out, given);
    });
    if (!known) unknown_format(w.type);
}

// Whether a product of so many rows may find them in stacks of tiles.
INLINE bool reads_stacks(const Linear& w, int rows) {
    bool can = false;
#if HAS_TILES
    Formats::with(w.type, [&](auto format) {
        can = format.TILES && rows > format.DIRECT_ROWS && w.k % STEP == 0 && tiles_ready();
    });
#endif
    return can;
}

// out(i, column, v0, v1) gets the sum of two products of the same rows and outputs; false, and nothing done, where that
// is no less work than both alone.
template <class Out>
static bool multiply_both(
    const Linear& w, const Rows& x, const Linear& other, const Rows& y, int tid, int threads, Out&& out
) {
#if HAS_TILES
    if (!x.stacks || !y.stacks || w.n != other.n) return false;
    size_t bytes = 0;
    Unpack unpack = nullptr;
    Formats::with(other.type, [&](auto format) {
        bytes = format.panel_bytes(other.packed), unpack = format.PAIRS ? nullptr : format.unpack;
    });
    const Second second{other, y.stacks, bytes, unpack};
    return Formats::with(w.type, [&](auto format) {
        const Unpack first = format.PAIRS ? nullptr : format.unpack;
        multiply_tiles(w, x, format.panel_bytes(w.packed), first, tid, threads, out, nullptr, &second);
    });
#else
    return false;
#endif
}

// What one product writes and another reads: rows of float32, or stacks of tiles where the reader takes them. Stacks
// need no more memory than rows: whole tiles of bfloat16 are less than the rows that make products of few rows.
struct Handed {
    float* rows;
    size_t stride;
    int count;
    bool stacked;

    Handed(const Linear& reader, float* rows, size_t stride, int count, bool may = true)
        : rows(rows), stride(stride), count(count), stacked(may && reads_stacks(reader, count)) {}

    __attribute__((always_inline)) void put(int i, int column, vf v) const {
#if HAS_TILES
        if (stacked) {
            return store_packed(in_stacks((bf16*)rows, stride, i, column), v);
        }
#endif
        store(rows + (size_t)i * stride + column, v);
    }
    Rows read() const { return {rows, stride, nullptr, count, stacked ? (const bf16*)rows : nullptr}; }
};
