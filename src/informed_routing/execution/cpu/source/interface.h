// What Python passes: the same fields in the same order are in interface.py, which compares `ir_abi` with its own.
#pragma once
#include "linear.h"

// Counts the meanings of what is below: raise it, here and there, when a field means something else.
constexpr int32_t ABI = 4;

struct Routing {
    Linear router_in;         // hidden layer of an mlp or low-rank router; n = 0 for a linear one
    const float* router_out;  // [d or width]: row "execute" minus row "approximate"
    float router_bias;
    int32_t router_relu, router_residual;
    Linear forecast_in, forecast_out;  // n = 0: approximated tokens get nothing
    int32_t forecast_silu;
    int32_t pad;
};

struct Layer {
    const float *attention_norm, *ffn_norm, *q_norm, *k_norm;
    Linear q, kv, o, gate_up, down;
    // The first panels of gate_up and the first inputs of down, where the packed neurons begin with those that
    // approximated tokens get too: parts of the same weights. n = 0: they get none.
    Linear gate_up_slice, down_slice;
    Routing attention, ffn;
    float residual;
    int32_t window, rope, gelu;
    int32_t is_static;  // one forecast of the whole layer for all rows, by that of its ffn
    int32_t pad;
};

struct Model {
    const Layer* layers;
    const float* final_norm;
    Linear head;
    int32_t n_layers, d, heads, kv_heads, head_dim, ff, threads, kv_type;
    float eps, scale, qk_eps;
};

// What executing or approximating n rows costs, in seconds, n = 0 .. limit - 1: see price_table.py.
struct Prices {
    const float* execute[2];
    const float* approximate[2];
    int32_t limit;
};

struct Call {
    float* hidden;           // [B N, d]: embeddings in, last hidden states out (before the final norm)
    const float *cos, *sin;  // [B N, head_dim]
    const uint8_t* valid;    // [B N] or null
    const int32_t* start;    // [B]: first key that is no padding
    void** keys;             // per layer, null where it is static: [B, kv_heads, capacity / NR, head_dim, NR]
    void** values;           // per layer: [B, kv_heads, capacity, head_dim]
    const uint8_t* forced;   // [units, B N] gates to use whatever the routers say, or null
    const float* limits;     // [B N]: the margin above which a row executes; null where all do
    const float* shares;     // [units]: what each is held to approximate of every text, or null
    int32_t* approximated;   // [units, B]: how many tokens before these it has; these are added. With `shares` only
    uint8_t* gates;          // [units, B N] or null
    float* margins;          // [units, B N] or null
    double* executed;        // [units]: counts are added
    double* executed_keys;   // [units]
    double* calls;           // [units, 4]: calls by outcome, see enum Outcome
    float* normed;           // [B N, d] or null: the final norm of all rows
    float* logits;           // [B keep, vocabulary] or null
    double* seconds;         // [PHASES] or null
    Prices prices;
    int32_t batch, length, past, capacity, keep;
    int32_t dense;  // 1: all that is routed executes; 2: static layers, too
    float gain, soft;  // of `shares`: see routing/rules/held.py
};

// Prices are good to a few percent: a smaller saving may be none, and the text is better without it.
constexpr float WORTH = 0.95f;

// What became of a unit in one call: all rows executed, some, none, or all because skipping would cost more.
enum Outcome { ALL, SOME, NONE, ROUNDED_UP, OUTCOMES };
enum Phase { ROUTE, PROJECT, CACHE, ATTEND, OUT, GATE_UP, DOWN, HEAD, PHASES };
