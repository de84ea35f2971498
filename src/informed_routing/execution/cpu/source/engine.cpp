// What Python calls: packing, products alone, checksums, and a routed decoder's forward in one call (forward.h).
#include <omp.h>

#include <algorithm>
#include <string>
#include <vector>

#include "forward.h"
#include "training.h"

extern "C" {

int32_t ir_panel() { return NR; }
int32_t ir_tiles() { return tiles_ready(); }  // whether many rows meet weights below float32 in bfloat16
// What Python's side of the interface has to agree with, "name value" a line.
const char* ir_abi() {
    static const std::string text = [] {
        std::string lines;
        auto add = [&](const char* name, size_t value) {
            lines += std::string(name) + " " + std::to_string(value) + "\n";
        };
        add("ABI", ABI);
        add("Linear", sizeof(Linear)), add("Routing", sizeof(Routing)), add("Layer", sizeof(Layer));
        add("Model", sizeof(Model)), add("Prices", sizeof(Prices)), add("Call", sizeof(Call));
        add("OUTCOMES", OUTCOMES), add("PHASES", PHASES), add("KEY_BLOCK", KEY_BLOCK), add("GROUP", GROUP);
        Formats::each([&](auto format) { add(format.NAME, format.ID); });
        return lines;
    }();
    return text.c_str();
}
// -1 for a format that is not known.
int64_t ir_packed_bytes(int32_t type, int32_t n, int32_t k) {
    int64_t bytes = -1;
    Formats::with(type, [&](auto format) { bytes = (int64_t)((n + NR - 1) / NR) * (int64_t)format.panel_bytes(k); });
    return bytes;
}
void ir_pack(int32_t type, const float* src, int32_t n, int32_t k, void* out, int32_t threads) {
    const bool known = Formats::with(type, [&](auto format) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int p = 0; p < (n + NR - 1) / NR; p++)
            format.pack({src, n, k, p * NR}, (char*)out + p * format.panel_bytes(k));
    });
    if (!known) unknown_format(type);
}
// The weights that a packed format really stands for, float32 [n, k].
void ir_unpack(int32_t type, const void* data, int32_t n, int32_t k, float* out) {
    std::vector<float> panel((size_t)k * NR);
    const bool known = Formats::with(type, [&](auto format) {
        for (int p = 0; p < (n + NR - 1) / NR; p++) {
            format.unpack((const char*)data + p * format.panel_bytes(k), k, panel.data());
            for (int r = 0; r < NR && p * NR + r < n; r++)
                for (int c = 0; c < k; c++) out[(size_t)(p * NR + r) * k + c] = panel[(size_t)c * NR + r];
        }
    });
    if (!known) unknown_format(type);
}
// A checksum of n blocks of memory, or of every `step`-th line of 64 bytes of them, the same for any number of threads.
// Sums and sums of sums: order counts, and memory is the limit.
uint64_t ir_checksum(const void* const* data, const int64_t* bytes, int32_t n, int32_t step, int32_t threads) {
    constexpr int64_t LINE = 64, CHUNK = 4096;  // lines of a task
    typedef uint64_t words __attribute__((vector_size(LINE)));
    std::vector<int64_t> first(n + 1, 0);
    for (int t = 0; t < n; t++) first[t + 1] = first[t] + (bytes[t] + LINE * CHUNK - 1) / (LINE * CHUNK);
    uint64_t all = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : all)
    for (int64_t task = 0; task < first[n]; task++) {
        const int t = (int)(std::upper_bound(first.begin(), first.end(), task) - first.begin()) - 1;
        const char* base = (const char*)data[t];
        const int64_t from = (task - first[t]) * CHUNK * LINE, to = std::min(bytes[t], from + CHUNK * LINE);
        words sum = {}, sums = {}, line;
        int64_t at = from;
        for (; at + LINE <= to; at += LINE * step) {
            std::memcpy(&line, base + at, LINE);
            sum += line, sums += sum;
        }
        if (to % LINE && step == 1) {
            line = (words){};
            std::memcpy(&line, base + to / LINE * LINE, to % LINE);
            sum += line, sums += sum;
        }
        uint64_t mixed = (uint64_t)(task + 1) * 0x9e3779b97f4a7c15u;
        for (int r = 0; r < 8; r++)
            for (uint64_t part : {sum[r], sums[r]}) mixed = (mixed ^ part) * 0x2545f4914f6cdd1du, mixed ^= mixed >> 29;
        all += mixed;
    }
    return all;
}
// y [rows, n] = x [rows, k] W^T + bias: one layer alone, for heads, price tables and tests.
void ir_linear(const Linear* w, const float* x, int32_t rows, float* y, int32_t threads) {
    const Rows in{x, (size_t)w->k, nullptr, rows};
#pragma omp parallel num_threads(threads)
    multiply(*w, in, omp_get_thread_num(), threads, [&](int i, int column, vf a, vf b) {
        store_part(y + (size_t)i * w->n + column, w->n - column, a, b);
    });
}
// losses [rows]: minus the log probability of targets [rows] by logits x W^T + bias, which are never stored.
// Targets outside the vocabulary lose nothing.
void ir_loss(const Linear* w, const float* x, int32_t rows, const int64_t* targets, float* losses, int32_t threads) {
    const Rows in{x, (size_t)w->k, nullptr, rows};
    // Of each thread and row: VL running maxima, and the sums of exp(logit - maximum) that belong to them.
    std::vector<vf> peaks((size_t)threads * rows, (vf){} + MASKED), masses((size_t)threads * rows, (vf){});
    std::vector<float> chosen(rows, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        const int tid = omp_get_thread_num();
        vf* peak = peaks.data() + (size_t)tid * rows;
        vf* mass = masses.data() + (size_t)tid * rows;
        multiply(*w, in, tid, threads, [&](int i, int column, vf a, vf b) {
            for (int r = w->n - column; r < NR; r++) (r < VL ? a[r] : b[r - VL]) = MASKED;
            const int64_t place = targets[i] - column;
            if (place >= 0 && place < NR) chosen[i] = place < VL ? a[place] : b[place - VL];
            const vf top = vmax(peak[i], vmax(a, b));
            mass[i] = mass[i] * vexp(peak[i] - top) + vexp(a - top) + vexp(b - top);
            peak[i] = top;
        });
    }
    for (int i = 0; i < rows; i++) {
        losses[i] = 0;
        if (targets[i] < 0 || targets[i] >= w->n) continue;
        vf top = {}, sum_of = {};
        top += MASKED;
        for (int t = 0; t < threads; t++) top = vmax(top, peaks[(size_t)t * rows + i]);
        float most = top[0];
        for (int r = 1; r < VL; r++) most = std::max(most, top[r]);
        for (int t = 0; t < threads; t++)
            sum_of += masses[(size_t)t * rows + i] * vexp(peaks[(size_t)t * rows + i] - most);
        losses[i] = std::log(sum(sum_of)) + most - chosen[i];
    }
}
void* ir_scratch() { return new Scratch; }
void ir_free(void* scratch) { delete (Scratch*)scratch; }
void ir_forward(const Model* m, const Call* c, void* scratch) {
    Scratch& s = *(Scratch*)scratch;
    reserve(*m, *c, s);
#pragma omp parallel num_threads(m->threads)
    Forward(*m, *c, s).run();
}
}
