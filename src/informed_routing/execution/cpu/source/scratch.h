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
    std::vector<uint8_t> gate;
    std::vector<int32_t> executed, approximated, first, place;
    std::vector<Partial> states;
};

float rms_scale(const float* x, int d, float eps) {
    vf s = {};
    for (int c = 0; c < d; c += VL) s += load(x + c) * load(x + c);
    return 1.0f / std::sqrt(sum(s) / (float)d + eps);
}

void rms_norm(const float* x, const float* w, int d, float eps, float* out) {
    const float s = rms_scale(x, d, eps);
    for (int c = 0; c < d; c += VL) store(out + c, load(x + c) * s * load(w + c));
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

// Not inlined: beside the exponentials compilers keep fewer sums of the product in registers.
__attribute__((noinline)) vf gated(bool gelu, vf gate, vf up) {
    return (gelu ? vgelu_tanh(gate) : vsilu(gate)) * up;
}

// The halves of a head are rotated against each other; `factor` scales the result.
void rotate(float* x, const float* cos, const float* sin, int hd, float factor) {
    const int half = hd / 2;
    for (int c = 0; c < half; c++) {
        const float a = x[c], b = x[c + half];
        x[c] = (a * cos[c] - b * sin[c]) * factor;
        x[c + half] = (b * cos[c + half] + a * sin[c + half]) * factor;
    }
}

}  // namespace
