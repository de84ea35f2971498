// One forward of all layers, with the branches inside: every thread of a parallel region runs one `Forward`.
//
// Approximated tokens never reach a unit's matrices: rows are picked by index where products read them, results
// are added to the residual stream where products end, so a selection costs no copy. Weights are in any of the formats
// of formats.h, sums are float32.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "selection.h"

namespace {

struct Forward : Selecting {
    using Selecting::Selecting;

    // What lies between the halves of the forecast: [approximated, rank].
    Handed forecast_inner(const Routing& r) {
        return {r.forecast_out, s.z.store.data(), (size_t)padded(r.forecast_in.n), (int)s.approximated.size()};
    }

    void forecast_in(const Routing& r) {
        if (!r.forecast_in.n) return;
        const Handed z = forecast_inner(r);
        multiply(r.forecast_in, approximated_rows(), tid, threads, [&](int i, int column, vf a, vf b) {
            if (r.forecast_silu) a = vsilu(a), b = vsilu(b);
            z.put(i, column, a);
            z.put(i, column + VL, b);
        });
    }

    void forecast_out(const Routing& r, const Tasks* plan = nullptr) {
        if (!r.forecast_in.n) return;
        add(r.forecast_out, forecast_inner(r).read(), s.approximated.data(), 1.0f, plan);
    }

    // residual[index[i]] += factor * (row i of x) W^T
    void add(const Linear& w, const Rows& x, const int32_t* index, float factor, const Tasks* plan = nullptr) {
        multiply(w, x, tid, threads, [&](int i, int column, vf a, vf b) {
            float* out = c.hidden + (size_t)index[i] * m.d + column;
            store(out, load(out) + a * factor);
            store(out + VL, load(out + VL) + b * factor);
        }, plan);
    }

    void store_to(const Linear& w, const Rows& x, float* out) {
        const size_t width = padded(w.n);
        multiply(w, x, tid, threads, [&](int i, int column, vf a, vf b) {
            store(out + i * width + column, a);
            store(out + i * width + column + VL, b);
        });
    }

    template <class T>
    void write_cache(const Layer& layer, int index) {
        const int hd = m.head_dim, kv = m.kv_heads * hd;
        const size_t width = padded(2 * kv);
        T* keys = (T*)c.keys[index];
        T* values = (T*)c.values[index];
        int low, high;
        share(rows, low, high);
        const auto row_at = [&](int i) { return s.kv.store.data() + (stacked ? s.place[i] : i) * width; };
        const bool reachable = s.kv.store.size() <= (size_t)INT32_MAX;  // by the 32-bit places that a gather takes
        for (int i = low; i < high;) {
            const int b = i / c.length, place = c.past + i % c.length;
            // Keys of a panel lie side by side: those of VL tokens are written at once.
            const int left = std::min(high - i, c.length - i % c.length);
            const int n = reachable && place % VL == 0 && left >= VL ? VL : 1;
            vi at = {};
            for (int r = 0; r < n; r++) {
                float* row = row_at(i + r);
                at[r] = (int)(row - s.kv.store.data());  // read where n = VL only
                for (int h = 0; h < m.kv_heads; h++) {
                    float* k = row + h * hd;
                    if (layer.k_norm) rms_norm(k, layer.k_norm, hd, m.qk_eps, k);
                    if (layer.rope) rotate(k, c.cos + (size_t)(i + r) * hd, c.sin + (size_t)(i + r) * hd, hd, 1.0f);
                    T* v = values + (((size_t)b * m.kv_heads + h) * c.capacity + place + r) * hd;
                    for (int e = 0; e < hd; e += VL) put(v + e, load(row + kv + h * hd + e));
                }
            }
            for (int h = 0; h < m.kv_heads; h++) {
                T* panel = keys + ((size_t)b * m.kv_heads + h) * c.capacity * hd + (size_t)(place / NR) * hd * NR;
                const float *all = s.kv.store.data() + h * hd, *k = row_at(i) + h * hd;
                for (int e = 0; e < hd; e++) {
                    T* to = panel + e * NR + place % NR;
                    if (n == VL) put(to, gather(all + e, at));
                    else put(to, k[e]);
                }
            }
            i += n;
        }
    }

    template <class T>
    void rotate_queries(const Layer& layer) {
        const int hd = m.head_dim, n = (int)s.executed.size();
        const size_t width = padded(m.heads * hd);
        int low, high;
        share(n, low, high);
        for (int i = low; i < high; i++) {
            const size_t at = (size_t)s.executed[i] * hd;
            for (int h = 0; h < m.heads; h++) {
                float* q = s.q.store.data() + i * width + h * hd;
                if (layer.q_norm) rms_norm(q, layer.q_norm, hd, m.qk_eps, q);
                if (layer.rope) rotate(q, c.cos + at, c.sin + at, hd, m.scale);
                else for (int e = 0; e < hd; e++) q[e] *= m.scale;
                if (rounds_attention<T>(hd))
                    for (int e = 0; e < hd; e += VL) store(q + e, rounded_to_bf16(load(q + e)));
            }
        }
    }

    template <class T>
    void attention(const Layer& layer, int index, const Handed& mixed) {
        const int hd = m.head_dim, shared = m.heads / m.kv_heads;
        const size_t width = padded(m.heads * hd);
        const int per_task = std::max(1, (rounds_attention<T>(hd) ? TILE_QUERY_ROWS : QUERY_ROWS) / shared);
        int most = 0;
        for (int b = 0; b < c.batch; b++) most = std::max(most, s.first[b + 1] - s.first[b]);
        const int blocks = (most + per_task - 1) / per_task;
        const int whole = c.batch * m.kv_heads * blocks;
        const int reach = c.past + c.length;
        // Few queries over many keys (decode): split the keys, so that every thread has work.
        int splits = 1;
        while (c.length == 1 && whole * splits < threads * 4 && reach / (splits + 1) >= 128) splits++;
        const int span = (reach + splits * KEY_BLOCK - 1) / (splits * KEY_BLOCK) * KEY_BLOCK;
        const int height = per_task * shared;
        thread_local Aligned<float> scores, local;
        const size_t room = (height + 15) / 16 * 16;  // whole tiles of rows
        scores.resize(room * KEY_BLOCK);
        local.resize(room * hd);
        std::vector<const float*> q(height);
        std::vector<int> first(height), last(height);
        std::vector<Partial> state(height);
#pragma omp for schedule(dynamic, 1)
        for (int task = 0; task < whole * splits; task++) {
            const int part = task % splits, item = whole - 1 - task / splits;  // long contexts first
            const int block = item / (c.batch * m.kv_heads), b = item / m.kv_heads % c.batch, h = item % m.kv_heads;
            const int from = s.first[b] + block * per_task, to = std::min(s.first[b + 1], from + per_task);
            int n = 0, until = 0, since = reach;
            for (int i = from; i < to; i++)
                for (int g = 0; g < shared; g++, n++) {
                    q[n] = s.q.store.data() + i * width + (size_t)(h * shared + g) * hd;
                    last[n] = c.past + s.executed[i] % c.length;
                    first[n] = c.start[b];
                    if (layer.window) first[n] = std::max(first[n], last[n] - layer.window + 1);
                    until = std::max(until, last[n] + 1), since = std::min(since, first[n]);
                }
            if (!n) continue;
            const size_t base = ((size_t)b * m.kv_heads + h) * c.capacity * hd;
            const KeyValues<T> kv{(const T*)c.keys[index] + base, (const T*)c.values[index] + base, hd};
            if (splits > 1) {
                const size_t at = (size_t)(item * splits + part) * height;
                const PlainProducts<T> products{kv, n, q.data(), scores.data(), s.partial.store.data() + at * hd};
                attend(products, first.data(), last.data(), std::max(since, part * span),
                       std::min(until, (part + 1) * span), s.states.data() + at);
                continue;
            }
            attend_to(kv, n, q.data(), first.data(), last.data(), since, until, local.data(), state.data(),
                      scores.data());
            for (int r = 0; r < n; r++) {
                const int row = from + r / shared, column = (h * shared + r % shared) * hd;
                // Padding may see no key at all; what it gets only must be a number.
                const float inverse = state[r].mass > 0 ? 1.0f / state[r].mass : 0.0f;
                for (int e = 0; e < hd; e += VL) mixed.put(row, column + e, load(local.data() + r * hd + e) * inverse);
            }
        }
        if (splits == 1) return;
#pragma omp for schedule(static)
        for (int item = 0; item < whole; item++) {
            const int b = item / m.kv_heads % c.batch, h = item % m.kv_heads;
            if (s.first[b] == s.first[b + 1]) continue;
            for (int g = 0; g < shared; g++) {
                float peak = MASKED, mass = 0;
                auto at = [&](int part) { return (size_t)(item * splits + part) * height + g; };
                for (int p = 0; p < splits; p++) peak = std::max(peak, s.states[at(p)].peak);
                float* out = mixed.rows + (size_t)s.first[b] * width + (size_t)(h * shared + g) * hd;
                std::fill(out, out + hd, 0.0f);
                for (int p = 0; p < splits; p++) {
                    const float w = vexp((vf){} + (s.states[at(p)].peak - peak))[0];
                    mass += w * s.states[at(p)].mass;
                    for (int e = 0; e < hd; e += VL)
                        store(out + e, load(out + e) + load(s.partial.store.data() + at(p) * hd + e) * w);
                }
                const float inverse = mass > 0 ? 1.0f / mass : 0.0f;
                for (int e = 0; e < hd; e += VL) store(out + e, load(out + e) * inverse);
            }
        }
    }

    // Calls f with an element of the cache.
    template <class F>
    void with_elements(F&& f) const {
        const bool known = CacheFormats::with(m.kv_type, [&](auto format) { f(typename decltype(format)::Element()); });
        if (!known) unknown_format(m.kv_type);
    }

    void attention_unit(const Layer& layer, int index) {
        route(layer.attention_norm, layer.attention, layer.kv, 2 * index, {&layer.q}, {&layer.attention.forecast_in});
        lap(ROUTE);
        const int n = (int)s.executed.size();
        store_to(layer.kv, all_rows(), s.kv.store.data());
        store_to(layer.q, executed_rows(), s.q.store.data());
        forecast_in(layer.attention);
#pragma omp barrier
        lap(PROJECT);
        with_elements([&](auto element) {
            write_cache<decltype(element)>(layer, index);
            rotate_queries<decltype(element)>(layer);
        });
        forecast_out(layer.attention);
#pragma omp barrier
        lap(CACHE);
        if (!n) return;
        const size_t width = padded(m.heads * m.head_dim);
        // Split keys are summed up in rows.
        const Handed mixed(layer.o, s.mixed.store.data(), width, n, c.length > 1);
        with_elements([&](auto element) { attention<decltype(element)>(layer, index, mixed); });
        lap(ATTEND);
        add(layer.o, mixed.read(), s.executed.data(), layer.residual);
#pragma omp barrier
        lap(OUT);
    }

    // Activations of the neurons of some rows.
    // A panel of gate_up is VL gates beside the same VL ups, so that their product is made in registers.
    void neurons(const Layer& layer, const Linear& gate_up, const Rows& x, const Handed& h) {
        multiply(gate_up, x, tid, threads, [&](int i, int column, vf gate, vf up) {
            h.put(i, column / 2, gated(layer.gelu, gate, up));
        });
    }

    // What approximated rows get, of whose slice `h` has the activations.
    void approximate(const Layer& layer, const Handed& h) {
        const int n = (int)s.approximated.size(), k = layer.down_slice.k;
        if (!n || !layer.down_slice.n) return forecast_out(layer.ffn);
        const Routing& r = layer.ffn;
        if (layer.residual == 1.0f && r.forecast_in.n) {
            auto add_sum = [&](int i, int column, vf a, vf b) {
                float* out = c.hidden + (size_t)s.approximated[i] * m.d + column;
                store(out, load(out) + a);
                store(out + VL, load(out + VL) + b);
            };
            const Rows z = forecast_inner(r).read();
            if (multiply_both(layer.down_slice, h.read(), r.forecast_out, z, tid, threads, add_sum)) return;
        }
        // Slice and forecast add to the same elements: by one plan the same thread does, one after the other.
        const int most = 2 * block_height(std::max(k, layer.ffn.forecast_in.n));
        const Tasks plan(n, panels(layer.down_slice), threads, most, STEP);
        add(layer.down_slice, h.read(), s.approximated.data(), layer.residual, &plan);
        forecast_out(layer.ffn, &plan);
    }

    void ffn_unit(const Layer& layer, int index) {
        route(layer.ffn_norm, layer.ffn, layer.gate_up, 2 * index + 1, {&layer.gate_up},
              {&layer.gate_up_slice, &layer.ffn.forecast_in});
        lap(ROUTE);
        const size_t width = padded(m.ff);
        const int n = (int)s.executed.size(), rest = (int)s.approximated.size();
        const Handed h(layer.down, s.h.store.data(), width, n);
        const Handed slice(layer.down_slice, h.rows + n * width, layer.down_slice.k, rest);
        neurons(layer, layer.gate_up, executed_rows(), h);
        neurons(layer, layer.gate_up_slice, approximated_rows(), slice);
        forecast_in(layer.ffn);
#pragma omp barrier
        lap(GATE_UP);
        add(layer.down, h.read(), s.executed.data(), layer.residual);
        approximate(layer, slice);
#pragma omp barrier
        lap(DOWN);
    }

    void static_layer(const Layer& layer, int index) {
        const bool slim = layer.down_slice.n > 0;
        stacked = reads_stacks(slim ? layer.gate_up_slice : layer.ffn.forecast_in, rows);
        scale_rows(layer.ffn_norm, !stacked);
#pragma omp single
        {
            std::fill(s.gate.begin(), s.gate.begin() + rows, 0);
            for (int unit = 2 * index; unit < 2 * index + 2; unit++) select(unit, false);
        }
        pack(layer.ffn_norm, false, !all_read_stacks({&layer.ffn.forecast_in}, rows));
        lap(ROUTE);
        const Handed slice(layer.down_slice, s.h.store.data(), layer.down_slice.k, rows);
        neurons(layer, layer.gate_up_slice, approximated_rows(), slice);
        forecast_in(layer.ffn);
#pragma omp barrier
        lap(GATE_UP);
        approximate(layer, slice);
#pragma omp barrier
        lap(DOWN);
    }

    void finish() {
        const int d = m.d;
        int low, high;
        if (c.normed) {
            share(rows, low, high);
            for (int i = low; i < high; i++)
                rms_norm(c.hidden + (size_t)i * d, m.final_norm, d, m.eps, c.normed + (size_t)i * d);
        }
        if (!c.logits) return;
        float* x = s.x.store.data();
        const int kept = c.batch * c.keep;
        share(kept, low, high);
        for (int i = low; i < high; i++) {
            const int row = i / c.keep * c.length + c.length - c.keep + i % c.keep;
            rms_norm(c.hidden + (size_t)row * d, m.final_norm, d, m.eps, x + (size_t)i * d);
        }
#pragma omp barrier
        multiply(m.head, {x, (size_t)d, nullptr, kept}, tid, threads, [&](int i, int column, vf a, vf b) {
            store_part(c.logits + (size_t)i * m.head.n + column, m.head.n - column, a, b);
        });
#pragma omp barrier
        lap(HEAD);
    }

    void run() {
        tid = omp_get_thread_num();
        mark = now();
        for (int i = 0; i < m.n_layers; i++) {
            if (m.layers[i].is_static && c.dense < 2) {
                static_layer(m.layers[i], i);
                continue;
            }
            attention_unit(m.layers[i], i);
            ffn_unit(m.layers[i], i);
        }
        finish();
    }
};

void reserve(const Model& m, const Call& c, Scratch& s) {
    const size_t rows = (size_t)c.batch * c.length, hd = m.head_dim;
    size_t rank = 0, router = 0;
    for (int i = 0; i < m.n_layers; i++)
        for (const Routing* r : {&m.layers[i].attention, &m.layers[i].ffn}) {
            rank = std::max(rank, (size_t)padded(r->forecast_in.n));
            router = std::max(router, (size_t)padded(r->router_in.n));
        }
    const int shared = m.heads / m.kv_heads, height = std::max(1, TILE_QUERY_ROWS / shared) * shared;
    s.x.get(rows * m.d);
    if (s.stacks.size() < (rows + 32) * m.d) s.stacks.resize((rows + 32) * m.d);
    s.q.get(rows * padded(m.heads * m.head_dim));
    s.mixed.get(rows * padded(m.heads * m.head_dim));
    s.kv.get((rows + 16) * padded(2 * m.kv_heads * m.head_dim));
    s.h.get(rows * padded(m.ff));
    s.z.get(rows * rank);
    s.router.get(rows * router);
    if (c.length == 1) {
        const size_t parts = (size_t)c.batch * m.kv_heads + (size_t)m.threads * 8 + 8;
        s.partial.get(parts * 4 * height * hd);
        s.states.resize(parts * 4 * height);
    }
    s.gate.resize(rows);
    s.scales.resize(rows), s.margins.resize(rows);
    s.place.resize(rows);
    s.executed.reserve(rows), s.approximated.reserve(rows);
    s.first.resize(c.batch + 1);
}

}  // namespace
