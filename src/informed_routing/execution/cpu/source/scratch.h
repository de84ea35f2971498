// The memory that a forward works in, and what it does to single rows.
#pragma once
#include <time.h>

#include <cmath>
#include <vector>

#include "attention.h"

namespace {

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int padded(int n) { return (n + NR - 1) / NR * NR; }

struct Buffer {
    Aligned<float> store;
    float* get(size_t n) {
        if (store.size() < n) store.resize(n);
        return store.data();
    }
};

// Working memory of a process, kept between calls.
struct Scratch {
    Buffer x, q, kv, mixed, h, z, router, partial;
    Aligned<bf16> stacks;  // executed rows, filled up to whole tiles, then approximated ones
    std::vector<float> scales, margins;
    std::vector<uint8_t> gate;
    std::vector<int32_t> executed, approximated, first, place;
    std::vector<Partial> states;
};

float rms_scale(const float* x, int d, float eps) {
    vf s = {};
    for (int c = 0; c < d; c += VL) s += load(x + c) * load(x + c);
    return 1.0f / std::sqrt(sum(s) / (float)d + eps);
}

void scaled(const float* x, float s, const float* w, int d, float* out) {
    for (int c = 0; c < d; c += VL) store(out + c, load(x + c) * s * load(w + c));
}

void rms_norm(const float* x, const float* w, int d, float eps, float* out) {
    scaled(x, rms_scale(x, d, eps), w, d, out);
}

float dot(const float* a, const float* b, int n) {
    vf s0 = {}, s1 = {};
    int c = 0;
    for (; c + 2 * VL <= n; c += 2 * VL) {
        s0 += load(a + c) * load(b + c);
        s1 += load(a + c + VL) * load(b + c + VL);
    }
    float s = sum(s0 + s1);
    for (; c < n; c++) s += a[c] * b[c];
    return s;
}

// dot(scaled(x), a), the same to the last bit; n is a multiple of 2 VL.
float normed_dot(const float* x, float s, const float* w, const float* a, int n) {
    vf s0 = {}, s1 = {};
    for (int c = 0; c < n; c += 2 * VL) {
        s0 += load(x + c) * s * load(w + c) * load(a + c);
        s1 += load(x + c + VL) * s * load(w + c + VL) * load(a + c + VL);
    }
    return sum(s0 + s1);
}

// Not inlined: beside the exponentials compilers keep fewer sums of the product in registers.
__attribute__((noinline)) vf gated(bool gelu, vf gate, vf up) {
    return (gelu ? vgelu_tanh(gate) : vsilu(gate)) * up;
}

// The halves of a head are rotated against each other; `factor` scales the result.
void rotate(float* x, const float* cos, const float* sin, int hd, float factor) {
    const int half = hd / 2;
    int c = 0;
    for (; c + VL <= half; c += VL) {
        const vf a = load(x + c), b = load(x + c + half);
        store(x + c, (a * load(cos + c) - b * load(sin + c)) * factor);
        store(x + c + half, (b * load(cos + c + half) + a * load(sin + c + half)) * factor);
    }
    for (; c < half; c++) {
        const float a = x[c], b = x[c + half];
        x[c] = (a * cos[c] - b * sin[c]) * factor;
        x[c + half] = (b * cos[c + half] + a * sin[c + half]) * factor;
    }
}

}  // namespace
