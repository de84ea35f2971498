// Which rows of a unit are executed and which are approximated, and the normed rows as the unit's products read them.
#pragma once
#include <omp.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "interface.h"
#include "scratch.h"

namespace {

// What each thread of a forward knows.
struct Selecting {
    const Model& m;
    const Call& c;
    Scratch& s;
    const int rows, threads;
    int tid = 0;
    double mark = 0;
    bool stacked = false;  // whether s.stacks has the unit's normed rows

    Selecting(const Model& model, const Call& call, Scratch& scratch)
        : m(model), c(call), s(scratch), rows(call.batch * call.length), threads(model.threads) {}

    void lap(int phase) {
        if (tid || !c.seconds) return;
        const double t = now();
        c.seconds[phase] += t - mark;
        mark = t;
    }

    void share(int n, int& low, int& high) const {
        low = (int)((long)n * tid / threads), high = (int)((long)n * (tid + 1) / threads);
    }

    using Readers = std::initializer_list<const Linear*>;

    // Norms, margins, gates and the two lists of rows. Afterwards the normed rows are where the unit's products read
    // them: in s.stacks if `all`, that of all rows, takes them from there, and in s.x wherever some product needs rows.
    void route(
        const float* norm, const Routing& r, const Linear& all, int unit, Readers executing, Readers approximating
    ) {
        const int d = m.d;
        const bool decides = !c.dense, deep = decides && r.router_in.n;
        stacked = reads_stacks(all, rows);
        const bool early = deep || !stacked;  // rows are needed to decide, or all there is
        int low, high;
        share(rows, low, high);
        scale_rows(norm, early);
        const float* x = s.x.store.data();
        const float* read = r.router_residual ? c.hidden : x;
        const int width = padded(r.router_in.n);
        if (deep) {
            float* inner = s.router.store.data();
#pragma omp barrier
            multiply(r.router_in, {read, (size_t)d, nullptr, rows}, tid, threads, [&](int i, int column, vf a, vf b) {
                if (r.router_relu) a = vmax(a, (vf){}), b = vmax(b, (vf){});
                store(inner + (size_t)i * width + column, a);
                store(inner + (size_t)i * width + column + VL, b);
            });
#pragma omp barrier
        }
        for (int i = low; i < high; i++) {
            uint8_t gate = 1;
            if (decides) {
                const size_t at = (size_t)i * d;
                float margin = r.router_bias;
                if (deep) margin += dot(s.router.store.data() + (size_t)i * width, r.router_out, r.router_in.n);
                else if (early || r.router_residual) margin += dot(read + at, r.router_out, d);
                else margin += normed_dot(c.hidden + at, s.scales[i], norm, r.router_out, d);
                gate = margin > c.limits[i];
                if (c.shares) s.margins[i] = margin;
                if (c.margins) c.margins[(size_t)unit * rows + i] = margin;
                if (c.forced) gate = c.forced[(size_t)unit * rows + i];
                if (c.valid && !c.valid[i]) gate = 0;
            }
            s.gate[i] = gate;
        }
#pragma omp barrier
#pragma omp single
        {
            if (decides && c.shares && !c.forced) hold(unit);
            select(unit, decides);
        }
        const int n = (int)s.executed.size();
        pack(norm, early, !early && !(all_read_stacks(executing, n) && all_read_stacks(approximating, rows - n)));
    }

    static bool all_read_stacks(Readers readers, int count) {
        return std::all_of(readers.begin(), readers.end(), [&](const Linear* w) {
            return !w->n || !count || reads_stacks(*w, count);
        });
    }

    // This thread's part of the rows: what their norm divides them by, and if `store`, themselves normed.
    void scale_rows(const float* norm, bool store) {
        const size_t d = m.d;
        int low, high;
        share(rows, low, high);
        for (int i = low; i < high; i++) {
            s.scales[i] = rms_scale(c.hidden + i * d, m.d, m.eps);
            if (store) scaled(c.hidden + i * d, s.scales[i], norm, m.d, s.x.store.data() + i * d);
        }
    }

    // Normed rows for matrix instructions, once for all products of the unit: from s.x if they are there, else made
    // here, and left in s.x, too, if `store`.
    void pack(const float* norm, bool stored, bool store) {
#if HAS_TILES
        if (!stacked) return;
        const size_t d = m.d;
        int low, high;
        share(rows, low, high);  // whoever has normed a row has it at hand
        for (int i = low; i < high; i++) {
            float* x = s.x.store.data() + i * d;
            bf16* to = in_stacks(s.stacks.data(), d, s.place[i], 0);
            if (stored) pack_row(x, m.d, to);
            else pack_normed(c.hidden + i * d, s.scales[i], norm, m.d, to);
            if (store) scaled(c.hidden + i * d, s.scales[i], norm, m.d, x);
        }
#pragma omp barrier
#endif
    }

    // Gates of a unit that is held to its share of each text: one token after the other, by what it owes.
    void hold(int unit) {
        const float share = c.shares[unit];
        for (int b = 0; b < c.batch; b++) {
            int32_t& count = c.approximated[(size_t)unit * c.batch + b];
            for (int t = 0; t < c.length; t++) {
                const int i = b * c.length + t;
                if (c.valid && !c.valid[i]) continue;
                const float before = (float)(c.past + t - c.start[b]);
                const float owed = share * before - (float)count;
                s.gate[i] = s.margins[i] > c.limits[i] + c.gain * owed / (before + c.soft);
                count += !s.gate[i];
            }
        }
    }

    void select(int unit, bool decides) {
        int n = 0, real = 0;
        for (int i = 0; i < rows; i++) n += s.gate[i], real += c.valid ? c.valid[i] : 1;
        const int kind = unit & 1, window = kind == 0 ? m.layers[unit / 2].window : 0;
        int outcome = n >= real ? ALL : n ? SOME : NONE;  // as routing/counts.py has it
        // Executing more than the router asks never harms the text; it is done where skipping saves nothing sure.
        if (decides && n < rows && rows < c.prices.limit) {
            const Prices& p = c.prices;
            if (p.execute[kind][n] + p.approximate[kind][rows - n] >= WORTH * p.execute[kind][rows]) {
                for (int i = 0; i < rows; i++) s.gate[i] = c.valid ? c.valid[i] : 1;
                outcome = ROUNDED_UP;
            }
        }
        c.calls[unit * OUTCOMES + outcome] += 1;
        s.executed.clear();
        s.approximated.clear();
        for (int b = 0; b < c.batch; b++) {
            s.first[b] = (int)s.executed.size();
            for (int t = 0; t < c.length; t++) {
                const int i = b * c.length + t;
                (s.gate[i] ? s.executed : s.approximated).push_back(i);
                if (s.gate[i] && (!c.valid || c.valid[i])) {
                    c.executed[unit] += 1;
                    const int seen = c.past + t + 1 - c.start[b];
                    c.executed_keys[unit] += window && window < seen ? window : seen;
                }
            }
        }
        s.first[c.batch] = (int)s.executed.size();
        const int n_executed = (int)s.executed.size(), behind = whole_tiles(n_executed);
        for (int j = 0; j < n_executed; j++) s.place[s.executed[j]] = j;
        for (int j = 0; j < rows - n_executed; j++) s.place[s.approximated[j]] = behind + j;
        if (c.gates) std::copy(s.gate.begin(), s.gate.begin() + rows, c.gates + (size_t)unit * rows);
    }

    // The normed rows.
    Rows executed_rows() const {
        return {s.x.store.data(), (size_t)m.d, s.executed.data(), (int)s.executed.size(),
                stacked ? s.stacks.data() : nullptr};
    }
    Rows approximated_rows() const {
        return {s.x.store.data(), (size_t)m.d, s.approximated.data(), (int)s.approximated.size(),
                stacked ? s.stacks.data() + (size_t)whole_tiles((int)s.executed.size()) * m.d : nullptr};
    }
    // All of them; in stacks they lie at s.place, with what fills up the tiles of the executed ones.
    Rows all_rows() const {
        if (!stacked) return {s.x.store.data(), (size_t)m.d, nullptr, rows};
        const int behind = whole_tiles((int)s.executed.size());
        return {nullptr, 0, nullptr, behind + (int)s.approximated.size(), s.stacks.data()};
    }
};

}  // namespace
