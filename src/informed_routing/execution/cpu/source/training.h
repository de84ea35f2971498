// What training does between its matrix products, forward and backward, each in one pass over memory: activations and
// their gradients are bfloat16, the residual stream and all sums float32. The products themselves are torch's.
#pragma once
#include <cmath>

#include "vec.h"

namespace training {

INLINE void store16(bf16* p, vf x) {
    const vi u = (vi)rounded_to_bf16(x) >> 16;
    const vh half = __builtin_convertvector(u, vh);
    std::memcpy(p, &half, sizeof half);
}
// f(vf...) over the whole vectors of a row; widths are multiples of VL.
template <class F>
INLINE void each(int64_t width, F&& f) {
    for (int64_t c = 0; c < width; c += VL) f(c);
}

// A row's derivative of x sigmoid(x) or of GELU by its tanh formula, and the function itself.
INLINE void silu_both(vf x, vf& value, vf& slope) {
    const vf s = 1.0f / (1.0f + vexp(-x));
    value = x * s;
    slope = s * (1.0f + x * (1.0f - s));
}
INLINE void gelu_both(vf x, vf& value, vf& slope) {
    const vf u2 = 1.5957691216f * (x + 0.044715f * x * x * x), s = 1.0f / (1.0f + vexp(-u2));
    value = x * s;
    slope = s + x * s * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * x * x);
}

}  // namespace training

extern "C" {

// y = x / rms(x) * weight, bfloat16 [n, d] of float32 [n, d]; `inverse` [n] is 1 / rms(x).
void ir_norm(const float* x, const float* weight, int64_t n, int64_t d, float eps, bf16* y, float* inverse, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float* row = x + i * d;
        vf squares = {};
        training::each(d, [&](int64_t c) { squares += load(row + c) * load(row + c); });
        const float scale = inverse[i] = 1.0f / std::sqrt(sum(squares) / d + eps);
        training::each(d, [&](int64_t c) { training::store16(y + i * d + c, load(row + c) * scale * load(weight + c)); });
    }
}
// dx float32 [n, d] of the above from dy bfloat16 [n, d].
void ir_norm_back(
    const bf16* dy, const float* x, const float* weight, const float* inverse, int64_t n, int64_t d, float* dx, int threads
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float *row = x + i * d, scale = inverse[i];
        const bf16* grad = dy + i * d;
        vf dots = {};
        training::each(d, [&](int64_t c) { dots += load(grad + c) * load(weight + c) * load(row + c); });
        const float part = sum(dots) / d * scale * scale * scale;
        training::each(d, [&](int64_t c) {
            store(dx + i * d + c, load(grad + c) * load(weight + c) * scale - load(row + c) * part);
        });
    }
}
// h = act(gate) * up, bfloat16 [count].
void ir_gated(const bf16* gate, const bf16* up, int64_t count, int gelu, bf16* h, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < count; c += VL) {
        const vf g = load(gate + c);
        training::store16(h + c, (gelu ? vgelu_tanh(g) : vsilu(g)) * load(up + c));
    }
}
// Gradients of gate and up from that of h.
void ir_gated_back(
    const bf16* dh, const bf16* gate, const bf16* up, int64_t count, int gelu, bf16* dgate, bf16* dup, int threads
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < count; c += VL) {
        const vf grad = load(dh + c);
        vf value, slope;
        if (gelu) training::gelu_both(load(gate + c), value, slope);
        else training::silu_both(load(gate + c), value, slope);
        training::store16(dup + c, grad * value);
        training::store16(dgate + c, grad * load(up + c) * slope);
    }
}
// after = hidden + gate * executed + (1 - gate) * approximated: float32 [n, d] of a float32 stream, bfloat16 updates and
// a float32 gate [n].
void ir_mix(
    const float* hidden, const float* gate, const bf16* executed, const bf16* approximated, int64_t n, int64_t d,
    float* after, int threads
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float g = gate[i];
        for (int64_t c = i * d; c < (i + 1) * d; c += VL)
            store(after + c, load(hidden + c) + g * load(executed + c) + (1 - g) * load(approximated + c));
    }
}
// Gradients of all but the stream (whose is `dafter` itself): float32 [n] of the gate, bfloat16 [n, d] of the updates.
void ir_mix_back(
    const float* dafter, const float* gate, const bf16* executed, const bf16* approximated, int64_t n, int64_t d,
    float* dgate, bf16* dexecuted, bf16* dapproximated, int threads
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float g = gate[i];
        vf dots = {};
        for (int64_t c = i * d; c < (i + 1) * d; c += VL) {
            const vf grad = load(dafter + c);
            dots += grad * (load(executed + c) - load(approximated + c));
            training::store16(dexecuted + c, g * grad);
            training::store16(dapproximated + c, (1 - g) * grad);
        }
        dgate[i] = sum(dots);
    }
}
// Causal softmax of scaled scores in place, bfloat16 [rows, length] where row r belongs to the query r % length: keys
// behind it get 0.
void ir_softmax(bf16* scores, int64_t rows, int64_t length, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 16)
    for (int64_t r = 0; r < rows; r++) {
        bf16* row = scores + r * length;
        const int64_t end = r % length + 1, last = (end + VL - 1) / VL * VL;
        for (int64_t c = end; c < last; c++) put(row + c, -1e30f);
        vf most = (vf){} - 3e38f, mass = {};
        for (int64_t c = 0; c < last; c += VL) most = vmax(most, load(row + c));
        float top = most[0];
        for (int k = 1; k < VL; k++) top = most[k] > top ? most[k] : top;
        for (int64_t c = 0; c < last; c += VL) {
            const vf e = vexp((load(row + c) - top) * scale);
            mass += e;
            training::store16(row + c, e);
        }
        const float inverse = 1.0f / sum(mass);
        for (int64_t c = 0; c < last; c += VL) training::store16(row + c, load(row + c) * inverse);
        std::memset((void*)(row + end), 0, (length - end) * sizeof(bf16));
    }
}
// Gradient of the scores in place of `dp`, that of the probabilities.
void ir_softmax_back(bf16* dp, const bf16* p, int64_t rows, int64_t length, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 16)
    for (int64_t r = 0; r < rows; r++) {
        bf16* grad = dp + r * length;
        const bf16* row = p + r * length;
        const int64_t last = (r % length + VL) / VL * VL;
        vf dots = {};
        for (int64_t c = 0; c < last; c += VL) dots += load(grad + c) * load(row + c);
        const float dot = sum(dots);
        for (int64_t c = 0; c < last; c += VL)
            training::store16(grad + c, load(row + c) * (load(grad + c) - dot) * scale);
        std::memset((void*)(grad + last), 0, (length - last) * sizeof(bf16));
    }
}
// y = x rotated by cos and sin of its position (halves of a head are its pairs), sign -1 for the way back: bfloat16
// [B, N, heads, size] with float32 tables [B or 1, N, size].
void ir_rotate(
    const bf16* x, const float* cos, const float* sin, int64_t batch, int64_t length, int64_t heads, int64_t size,
    int shared, float sign, bf16* y, int threads
) {
    const int64_t half = size / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < batch * length; i++) {
        const int64_t at = (shared ? i % length : i) * size;
        for (int64_t h = 0; h < heads; h++) {
            const bf16* from = x + (i * heads + h) * size;
            bf16* to = y + (i * heads + h) * size;
            training::each(half, [&](int64_t c) {
                const vf a = load(from + c), b = load(from + half + c);
                const vf s0 = load(sin + at + c) * sign, s1 = load(sin + at + half + c) * sign;
                training::store16(to + c, a * load(cos + at + c) - b * s0);
                training::store16(to + half + c, b * load(cos + at + half + c) + a * s1);
            });
        }
    }
}
// Losses float32 [n] of logits bfloat16 [n, v] against the text and, where there is a teacher, its logits:
// (1 - weight) * cross-entropy + weight * KL(teacher || logits). The logits become the gradient. A negative target has
// no loss at all.
void ir_token_losses(
    bf16* logits, const bf16* teacher, const int64_t* targets, int64_t n, int64_t v, float weight, float* losses,
    int threads
) {
    const int64_t whole = v / VL * VL;
    auto parts = [&](const bf16* row, float& top, float& mass) {
        vf most = (vf){} - 3e38f;
        for (int64_t c = 0; c < whole; c += VL) most = vmax(most, load(row + c));
        top = most[0];
        for (int k = 1; k < VL; k++) top = most[k] > top ? most[k] : top;
        for (int64_t c = whole; c < v; c++) top = get(row + c) > top ? get(row + c) : top;
        vf sums = {};
        for (int64_t c = 0; c < whole; c += VL) sums += vexp(load(row + c) - top);
        mass = sum(sums);
        for (int64_t c = whole; c < v; c++) mass += std::exp(get(row + c) - top);
    };
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t i = 0; i < n; i++) {
        bf16* row = logits + i * v;
        losses[i] = 0;
        if (targets[i] < 0) {
            std::memset((void*)row, 0, v * sizeof(bf16));
            continue;
        }
        float top, mass;
        parts(row, top, mass);
        const float log_mass = std::log(mass) + top, inverse = 1.0f / mass;
        float loss = (1 - weight) * (log_mass - get(row + targets[i]));
        const float chosen = std::exp(get(row + targets[i]) - top) * inverse;
        if (!teacher) {
            for (int64_t c = 0; c < whole; c += VL) training::store16(row + c, vexp(load(row + c) - top) * inverse);
            for (int64_t c = whole; c < v; c++) put(row + c, std::exp(get(row + c) - top) * inverse);
            put(row + targets[i], chosen - 1);
        } else {
            const bf16* wanted = teacher + i * v;
            float peak, sums;
            parts(wanted, peak, sums);
            const float log_sums = std::log(sums) + peak, scale = 1.0f / sums;
            const float own = std::exp(get(wanted + targets[i]) - peak) * scale;
            vf divergence = {};
            float rest = 0;
            for (int64_t c = 0; c < whole; c += VL) {
                const vf t = load(wanted + c), s = load(row + c), q = vexp(t - peak) * scale;
                divergence += q * ((t - log_sums) - (s - log_mass));
                training::store16(row + c, vexp(s - top) * inverse - weight * q);
            }
            for (int64_t c = whole; c < v; c++) {
                const float t = get(wanted + c), s = get(row + c), q = std::exp(t - peak) * scale;
                rest += q * ((t - log_sums) - (s - log_mass));
                put(row + c, std::exp(s - top) * inverse - weight * q);
            }
            loss += weight * (sum(divergence) + rest);
            put(row + targets[i], chosen - weight * own - (1 - weight));
        }
        losses[i] = loss;
    }
}
}
