/* One forward of a Llama-class decoder over a few tokens, on a CPU.
 *
 * A decoding step reads every weight once and does little else, so its floor is the memory's read
 * bandwidth. What this file removes is everything that stands between a step and that floor: one
 * parallel region for the whole forward (not one a matrix), products that read each weight row
 * once for all tokens of a draft tree, and no tensor objects in between.
 *
 * Layout: activations are (tokens, features) float32; weights are (out, in), as in a checkpoint,
 * packed one after the other in the order in which they are read; the cache is
 * (2, layers, kv_heads, capacity, head_dim) float32, keys first.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define BLOCK_TOKENS 6
#define BLOCK_ROWS 4
#else
#define LANES 8
#define BLOCK_TOKENS 4
#define BLOCK_ROWS 3
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

typedef struct {
    const float *input_norm, *q, *q_bias, *k, *k_bias, *v, *v_bias, *o;
    const float *post_norm, *gate, *up, *down;
} Layer;

typedef struct {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab;
    float eps, scale;
    const float *embedding, *final_norm, *head;
    const float *cos, *sin; /* (positions, head_dim), as the rotary embedding of the model has them */
    const Layer *layer;
} Model;

/* Hold a value in a register: left alone, gcc loads the operand again for every product. */
#if defined(__AVX512F__)
#define KEEP(value) __asm__("" : "+v"(value))
#elif defined(__x86_64__)
#define KEEP(value) __asm__("" : "+x"(value))
#elif defined(__aarch64__)
#define KEEP(value) __asm__("" : "+w"(value))
#else
#define KEEP(value)
#endif

static inline float sum_lanes(vec x) {
    typedef float four __attribute__((vector_size(16), aligned(4)));
    const four *part = (const four *)&x;
    four sum = part[0] + part[1];
#if LANES == 16
    sum += part[2] + part[3];
#endif
    four swapped = __builtin_shuffle(sum, (__attribute__((vector_size(16))) int32_t){2, 3, 0, 1});
    sum += swapped;
    return sum[0] + sum[1];
}

/* exp to 2 ulp: 2^n by the exponent bits, the rest by a polynomial of degree 6. */
static inline vec exp_lanes(vec x) {
    const vec low = (vec){} - 87.0f, high = (vec){} + 88.0f;
    ivec below = x < low, above = x > high;
    x = (vec)(((ivec)low & below) | ((ivec)x & ~below)); /* NaN fails both tests and stays */
    x = (vec)(((ivec)high & above) | ((ivec)x & ~above));
    vec shifted = x * 1.44269504f + 12582912.0f;
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec exponent = ((ivec)shifted - 0x4b400000 + 127) << 23;
    return p * (vec)exponent;
}

/* acc[r][t] = weights row r . input token t, over `width` features. */
#define DOT_BLOCK(NAME, ROWS, TOKENS)                                                             \
    static inline __attribute__((always_inline)) void NAME(                                       \
        const float *w, const float *x, int64_t width, float out[ROWS][TOKENS]) {                 \
        vec acc[ROWS][TOKENS];                                                                    \
        for (int r = 0; r < ROWS; r++)                                                            \
            for (int t = 0; t < TOKENS; t++) acc[r][t] = (vec){};                                 \
        for (int64_t i = 0; i < width; i += LANES) {                                              \
            vec ws[ROWS]; /* rows and one token at a time: the accumulators fill the registers */ \
            for (int r = 0; r < ROWS; r++) {                                                      \
                ws[r] = *(const unaligned *)(w + r * width + i);                                  \
                KEEP(ws[r]);                                                                      \
            }                                                                                     \
            for (int t = 0; t < TOKENS; t++) {                                                    \
                vec xs = *(const unaligned *)(x + t * width + i);                                 \
                KEEP(xs);                                                                         \
                for (int r = 0; r < ROWS; r++) acc[r][t] += ws[r] * xs;                           \
            }                                                                                     \
        }                                                                                         \
        for (int r = 0; r < ROWS; r++)                                                            \
            for (int t = 0; t < TOKENS; t++) out[r][t] = sum_lanes(acc[r][t]);                    \
    }
DOT_BLOCK(dot_full, BLOCK_ROWS, BLOCK_TOKENS)
DOT_BLOCK(dot_three, BLOCK_ROWS, 3)
DOT_BLOCK(dot_two, BLOCK_ROWS, 2)
DOT_BLOCK(dot_one, BLOCK_ROWS, 1)
DOT_BLOCK(dot_row, 1, 1)

/* out[t * stride + row] = x[t] . w[row] (+ bias) for rows in [from, to); adds when `add`. */
static void product(const float *w, const float *bias, const float *x, float *out, int64_t width,
                    int64_t stride, int64_t tokens, int64_t from, int64_t to, int add) {
#define STORE(ROWS, TOKENS, BUFFER)                                                               \
    for (int r = 0; r < ROWS; r++)                                                                \
        for (int t = 0; t < TOKENS; t++) {                                                        \
            float value = BUFFER[r][t] + (bias ? bias[row + r] : 0.0f);                           \
            float *place = out + (token + t) * stride + row + r;                                  \
            *place = add ? *place + value : value;                                                \
        }
    int64_t row = from;
    for (; row + BLOCK_ROWS <= to; row += BLOCK_ROWS) {
        const float *rows = w + row * width;
        int64_t token = 0;
        for (; token + BLOCK_TOKENS <= tokens; token += BLOCK_TOKENS) {
            float block[BLOCK_ROWS][BLOCK_TOKENS];
            dot_full(rows, x + token * width, width, block);
            STORE(BLOCK_ROWS, BLOCK_TOKENS, block)
        }
        while (token < tokens) {
            const float *from_token = x + token * width;
            if (tokens - token >= 3) {
                float block[BLOCK_ROWS][3];
                dot_three(rows, from_token, width, block);
                STORE(BLOCK_ROWS, 3, block)
                token += 3;
            } else if (tokens - token == 2) {
                float block[BLOCK_ROWS][2];
                dot_two(rows, from_token, width, block);
                STORE(BLOCK_ROWS, 2, block)
                token += 2;
            } else {
                float block[BLOCK_ROWS][1];
                dot_one(rows, from_token, width, block);
                STORE(BLOCK_ROWS, 1, block)
                token += 1;
            }
        }
    }
    for (; row < to; row++)
        for (int64_t token = 0; token < tokens; token++) {
            float block[1][1];
            dot_row(w + row * width, x + token * width, width, block);
            STORE(1, 1, block)
        }
#undef STORE
}

static void rms_norm(const float *x, const float *weight, float *out, int64_t width, int64_t tokens,
                     float eps) {
    for (int64_t t = 0; t < tokens; t++) {
        const float *in = x + t * width;
        vec squares = (vec){};
        for (int64_t i = 0; i < width; i += LANES) {
            vec v = *(const unaligned *)(in + i);
            squares += v * v;
        }
        float factor = 1.0f / sqrtf(sum_lanes(squares) / (float)width + eps);
        for (int64_t i = 0; i < width; i += LANES)
            *(unaligned *)(out + t * width + i) =
                *(const unaligned *)(in + i) * factor * *(const unaligned *)(weight + i);
    }
}

static void rotate(float *head, const float *cos, const float *sin, int64_t head_dim) {
    int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* One query head of one token against the cached keys and its own ancestors among the new ones.
 * The scores before the softmax go to `raw` unless it is null. */
static void attend(const float *query, const float *keys, const float *values, float *scores,
                   float *out, int64_t length, int64_t nodes, const uint8_t *ancestors,
                   int64_t head_dim, float scale, float *raw) {
    float highest = -INFINITY;
    int64_t total = length + nodes;
    for (int64_t j = 0; j < total; j++) {
        if (j >= length && !ancestors[j - length]) {
            scores[j] = -INFINITY;
            continue;
        }
        vec dot = (vec){};
        for (int64_t i = 0; i < head_dim; i += LANES)
            dot += *(const unaligned *)(query + i) * *(const unaligned *)(keys + j * head_dim + i);
        scores[j] = sum_lanes(dot) * scale;
        if (scores[j] > highest) highest = scores[j];
    }
    if (raw) memcpy(raw, scores, (size_t)total * sizeof(float));
    vec sums = (vec){};
    int64_t padded = (total + LANES - 1) / LANES * LANES;
    for (int64_t j = total; j < padded; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < padded; j += LANES) {
        vec s = *(unaligned *)(scores + j);
        vec e = exp_lanes(s - highest);
        ivec masked = s == -INFINITY; /* exp_lanes clamps, so a masked score would leak 1e-38 */
        e = (vec)((ivec)e & ~masked);
        sums += e;
        *(unaligned *)(scores + j) = e;
    }
    float inverse = 1.0f / sum_lanes(sums);
    memset(out, 0, (size_t)head_dim * sizeof(float));
    for (int64_t j = 0; j < total; j++) {
        if (j >= length && !ancestors[j - length]) continue;
        float weight = scores[j] * inverse;
        for (int64_t i = 0; i < head_dim; i += LANES)
            *(unaligned *)(out + i) += weight * *(const unaligned *)(values + j * head_dim + i);
    }
}

/* The same against chosen rows, none of which lies behind the query. No other row is touched. */
static void attend_chosen(const float *query, const float *keys, const float *values,
                          const int64_t *rows, int64_t chosen, float *scores, float *out,
                          int64_t head_dim, float scale) {
    float highest = -INFINITY;
    for (int64_t j = 0; j < chosen; j++) {
        const float *key = keys + rows[j] * head_dim;
        vec dot = (vec){};
        for (int64_t i = 0; i < head_dim; i += LANES)
            dot += *(const unaligned *)(query + i) * *(const unaligned *)(key + i);
        scores[j] = sum_lanes(dot) * scale;
        if (scores[j] > highest) highest = scores[j];
    }
    vec sums = (vec){};
    int64_t padded = (chosen + LANES - 1) / LANES * LANES;
    for (int64_t j = chosen; j < padded; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < padded; j += LANES) {
        vec s = *(unaligned *)(scores + j);
        vec e = exp_lanes(s - highest);
        ivec masked = s == -INFINITY;
        e = (vec)((ivec)e & ~masked);
        sums += e;
        *(unaligned *)(scores + j) = e;
    }
    float inverse = 1.0f / sum_lanes(sums);
    memset(out, 0, (size_t)head_dim * sizeof(float));
    for (int64_t j = 0; j < chosen; j++) {
        float weight = scores[j] * inverse;
        const float *value = values + rows[j] * head_dim;
        for (int64_t i = 0; i < head_dim; i += LANES)
            *(unaligned *)(out + i) += weight * *(const unaligned *)(value + i);
    }
}

/* Shares are whole blocks, so that only the last thread meets a remainder. */
#define FROM(rows) ((rows) / BLOCK_ROWS * me / all * BLOCK_ROWS)
#define TO(rows) (me + 1 == all ? (rows) : (rows) / BLOCK_ROWS * (me + 1) / all * BLOCK_ROWS)

/* What stands before a layer's attention: norm, projections, rotary embedding, and the new rows of
 * the cache, from `row` on. Run by all threads of a parallel region; `normed` is the thread's own.
 * Node t stands at `position` + `depths[t]`, or + t without depths; without `cos` nothing is
 * rotated. */
static inline void before_attention(const Model *m, int64_t l, const float *x, float *normed,
                                    float *q, float *k, float *v, int64_t nodes, int64_t position,
                                    const int64_t *depths, int64_t row, int64_t capacity,
                                    const float *cos, const float *sin, float *cache, int64_t me,
                                    int64_t all) {
    const Layer *layer = m->layer + l;
    const int64_t hidden = m->hidden, head_dim = m->head_dim;
    const int64_t q_width = m->heads * head_dim, kv_width = m->kv_heads * head_dim;
    float *keys = cache + l * m->kv_heads * capacity * head_dim;
    float *values = keys + m->layers * m->kv_heads * capacity * head_dim;
    rms_norm(x, layer->input_norm, normed, hidden, nodes, m->eps);
    product(layer->q, layer->q_bias, normed, q, hidden, q_width, nodes, FROM(q_width), TO(q_width),
            0);
    product(layer->k, layer->k_bias, normed, k, hidden, kv_width, nodes, FROM(kv_width),
            TO(kv_width), 0);
    product(layer->v, layer->v_bias, normed, v, hidden, kv_width, nodes, FROM(kv_width),
            TO(kv_width), 0);
#pragma omp barrier
#pragma omp for schedule(static) collapse(2)
    for (int64_t t = 0; t < nodes; t++)
        for (int64_t h = 0; h < m->heads + m->kv_heads; h++) {
            int64_t place = (position + (depths ? depths[t] : t)) * head_dim;
            if (h < m->heads) {
                if (cos) rotate(q + t * q_width + h * head_dim, cos + place, sin + place, head_dim);
                continue;
            }
            int64_t g = h - m->heads, own = (g * capacity + row + t) * head_dim;
            float *head = k + t * kv_width + g * head_dim;
            if (cos) rotate(head, cos + place, sin + place, head_dim);
            memcpy(keys + own, head, (size_t)head_dim * sizeof(float));
            memcpy(values + own, v + t * kv_width + g * head_dim,
                   (size_t)head_dim * sizeof(float));
        }
}

/* What stands behind it: output projection and feed-forward part, added to x. As above. */
static inline void after_attention(const Model *m, int64_t l, const float *mixed, float *x,
                                   float *normed, float *gate, float *up, float *act, int64_t nodes,
                                   int64_t me, int64_t all) {
    const Layer *layer = m->layer + l;
    const int64_t hidden = m->hidden, inner = m->intermediate;
    const int64_t from = FROM(inner), to = TO(inner);
    product(layer->o, 0, mixed, x, m->heads * m->head_dim, hidden, nodes, FROM(hidden), TO(hidden),
            1);
#pragma omp barrier
    rms_norm(x, layer->post_norm, normed, hidden, nodes, m->eps);
    product(layer->gate, 0, normed, gate, hidden, inner, nodes, from, to, 0);
    product(layer->up, 0, normed, up, hidden, inner, nodes, from, to, 0);
    for (int64_t t = 0; t < nodes; t++) {
        float *g = gate + t * inner, *u = up + t * inner, *a = act + t * inner;
        int64_t i = from;
        for (; i + LANES <= to; i += LANES) {
            vec gs = *(unaligned *)(g + i);
            *(unaligned *)(a + i) = gs / (1.0f + exp_lanes(-gs)) * *(unaligned *)(u + i);
        }
        for (; i < to; i++) a[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
    }
#pragma omp barrier
    product(layer->down, 0, act, x, inner, hidden, nodes, FROM(hidden), TO(hidden), 1);
#pragma omp barrier
}

/* Floats of scratch that `forward` needs for `nodes` tokens and a cache of `capacity` tokens. */
int64_t scratch_floats(const Model *m, int64_t nodes, int64_t capacity, int64_t threads) {
    int64_t per_token = m->hidden + (m->heads + 2 * m->kv_heads) * m->head_dim +
                        m->heads * m->head_dim + m->intermediate;
    int64_t per_thread = nodes * m->hidden + 2 * nodes * m->intermediate + capacity + 2 * LANES;
    return nodes * per_token + threads * per_thread + 64;
}

/* Floats that one vector holds: hidden, head_dim and intermediate must be multiples of it. */
int64_t lanes(void) { return LANES; }

/* Run `nodes` tokens behind `length` cached ones. Logits are those of the nodes from `first_logit`
 * on, (nodes - first_logit, vocab). Returns the number of threads that took part. */
int64_t forward(const Model *m, int64_t nodes, int64_t length, int64_t capacity, int64_t threads,
                int64_t first_logit, const int64_t *tokens, const int64_t *depths,
                const uint8_t *ancestors, float *cache, float *scratch, float *logits) {
    const int64_t hidden = m->hidden, head_dim = m->head_dim;
    const int64_t q_width = m->heads * head_dim, kv_width = m->kv_heads * head_dim;
    const int64_t inner = m->intermediate, group = m->heads / m->kv_heads;
    float *x = scratch;
    float *q = x + nodes * hidden;
    float *k = q + nodes * q_width;
    float *v = k + nodes * kv_width;
    float *mixed = v + nodes * kv_width;
    float *act = mixed + nodes * q_width;
    float *own = act + nodes * inner;
    const int64_t per_thread = nodes * hidden + 2 * nodes * inner + capacity + 2 * LANES;
    int64_t used = 1;

#pragma omp parallel num_threads((int)threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        float *normed = own + me * per_thread;
        float *gate = normed + nodes * hidden, *up = gate + nodes * inner;
        float *scores = up + nodes * inner;
        if (me == 0) {
            used = all;
            for (int64_t t = 0; t < nodes; t++)
                memcpy(x + t * hidden, m->embedding + tokens[t] * hidden,
                       (size_t)hidden * sizeof(float));
        }
#pragma omp barrier
        for (int64_t l = 0; l < m->layers; l++) {
            float *keys = cache + l * m->kv_heads * capacity * head_dim;
            float *values = keys + m->layers * m->kv_heads * capacity * head_dim;
            before_attention(m, l, x, normed, q, k, v, nodes, length, depths, length, capacity,
                             m->cos, m->sin, cache, me, all);
#pragma omp for schedule(static) collapse(2)
            for (int64_t t = 0; t < nodes; t++)
                for (int64_t h = 0; h < m->heads; h++) {
                    int64_t offset = h / group * capacity * head_dim;
                    attend(q + t * q_width + h * head_dim, keys + offset, values + offset, scores,
                           mixed + t * q_width + h * head_dim, length, nodes, ancestors + t * nodes,
                           head_dim, m->scale, 0);
                }
            after_attention(m, l, mixed, x, normed, gate, up, act, nodes, me, all);
        }
        const int64_t asked = nodes - first_logit;
        rms_norm(x + first_logit * hidden, m->final_norm, normed, hidden, asked, m->eps);
        product(m->head, 0, normed, logits, hidden, m->vocab, asked, FROM(m->vocab), TO(m->vocab),
                0);
    }
    return used;
}

/* --- the same forward in pieces, its attention left to the caller -------------------------------
 *
 * `advance` runs from one attention to the next, `attend_all`, `attend_sets` and `score_all` are
 * attentions to choose from. They call what `forward` calls, so that with `attend_all` in every
 * layer the logits are the same to the bit. */

/* Tokens that matrices are run over at once: wide enough that weights are reused, small enough for
 * the processor's cache, as prompts are read by `forward`. */
#define PIECE 96

/* Floats of scratch that `advance` needs for `nodes` tokens. */
int64_t advance_floats(const Model *m, int64_t nodes, int64_t threads) {
    int64_t piece = nodes < PIECE ? nodes : PIECE;
    int64_t shared = 2 * m->kv_heads * m->head_dim + m->intermediate;
    int64_t per_thread = m->hidden + 2 * m->intermediate;
    return nodes * m->hidden + piece * (shared + threads * per_thread) + 64;
}

/* Finish layer `layer` - 1 with its attention `mixed`, (nodes, heads, head_dim), and begin `layer`:
 * its queries are written, its keys and values appended from `row` on. Layer 0 begins with the
 * embedding of `tokens`; behind the last layer come the logits from `first_logit` on, none where it
 * is negative. The states between calls are in `scratch`. */
void advance(const Model *m, int64_t layer, int64_t nodes, int64_t position, int64_t row,
             int64_t capacity, int64_t threads, int64_t first_logit, const int64_t *tokens,
             const float *mixed, float *queries, const float *cos, const float *sin, float *cache,
             float *scratch, float *logits) {
    const int64_t hidden = m->hidden, inner = m->intermediate;
    const int64_t q_width = m->heads * m->head_dim, kv_width = m->kv_heads * m->head_dim;
    const int64_t piece = nodes < PIECE ? nodes : PIECE;
    float *k = scratch + nodes * hidden;
    float *v = k + piece * kv_width;
    float *act = v + piece * kv_width;
    float *own = act + piece * inner;

#pragma omp parallel num_threads((int)threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        float *normed = own + me * piece * (hidden + 2 * inner);
        float *gate = normed + piece * hidden, *up = gate + piece * inner;
        for (int64_t start = 0; start < nodes; start += piece) {
            const int64_t width = nodes - start < piece ? nodes - start : piece;
            float *x = scratch + start * hidden;
            if (layer == 0) {
                if (me == 0)
                    for (int64_t t = 0; t < width; t++)
                        memcpy(x + t * hidden, m->embedding + tokens[start + t] * hidden,
                               (size_t)hidden * sizeof(float));
#pragma omp barrier
            } else {
                after_attention(m, layer - 1, mixed + start * q_width, x, normed, gate, up, act,
                                width, me, all);
            }
            if (layer < m->layers) {
                before_attention(m, layer, x, normed, queries + start * q_width, k, v, width,
                                 position + start, 0, row + start, capacity, cos, sin, cache, me,
                                 all);
            } else if (first_logit >= 0 && first_logit < start + width) {
                const int64_t skipped = first_logit > start ? first_logit - start : 0;
                const int64_t asked = width - skipped;
                rms_norm(x + skipped * hidden, m->final_norm, normed, hidden, asked, m->eps);
                product(m->head, 0, normed, logits + (start + skipped - first_logit) * m->vocab,
                        hidden, m->vocab, asked, FROM(m->vocab), TO(m->vocab), 0);
            }
        }
    }
}

/* Full attention of nodes in a row: node t sees the rows up to `offset` + t. Head h reads keys and
 * values of head h / `group`, heads lying `key_stride` and `value_stride` floats apart. `raw` is
 * (heads, nodes, offset + nodes) or null; `scratch` holds offset + nodes + 2 vectors a thread. */
void attend_all(const float *queries, const float *keys, const float *values, float *out, float *raw,
                float *scratch, int64_t heads, int64_t group, int64_t nodes, int64_t offset,
                int64_t key_stride, int64_t value_stride, int64_t head_dim, float scale,
                int64_t threads) {
    const int64_t length = offset + nodes;
    const uint8_t itself = 1;
#pragma omp parallel for schedule(static) collapse(2) num_threads((int)threads)
    for (int64_t t = 0; t < nodes; t++)
        for (int64_t h = 0; h < heads; h++) {
            float *scores = scratch + omp_get_thread_num() * (length + 2 * LANES);
            float *kept = raw ? raw + (h * nodes + t) * length : 0;
            int64_t at = (t * heads + h) * head_dim, owner = h / group;
            attend(queries + at, keys + owner * key_stride, values + owner * value_stride, scores,
                   out + at, offset + t, 1, &itself, head_dim, scale, kept);
            if (kept)
                for (int64_t j = offset + t + 1; j < length; j++) kept[j] = -INFINITY;
        }
}

/* Attention to chosen rows: `rows` is (sets, chosen), ascending; head h reads set
 * h / (heads / sets). Returns 0, or 1 if rows do not ascend from 0 to below offset + nodes, or 2 if
 * a query is left without any. `scratch` holds chosen + 2 vectors a thread. */
int64_t attend_sets(const float *queries, const float *keys, const float *values, float *out,
                    const int64_t *rows, float *scratch, int64_t heads, int64_t group,
                    int64_t sets, int64_t chosen, int64_t nodes, int64_t offset, int64_t stride,
                    int64_t head_dim, float scale, int64_t threads, int64_t *pairs) {
    *pairs = 0;
    for (int64_t s = 0; s < sets; s++) {
        const int64_t *set = rows + s * chosen;
        if (set[0] < 0 || set[chosen - 1] >= offset + nodes) return 1;
        for (int64_t j = 1; j < chosen; j++)
            if (set[j] <= set[j - 1]) return 1;
        if (set[0] > offset) return 2;
        for (int64_t t = 0, seen = 0; t < nodes; t++) {
            while (seen < chosen && set[seen] <= offset + t) seen++;
            *pairs += seen;
        }
    }
#pragma omp parallel for schedule(static) collapse(2) num_threads((int)threads)
    for (int64_t t = 0; t < nodes; t++)
        for (int64_t h = 0; h < heads; h++) {
            float *scores = scratch + omp_get_thread_num() * (chosen + 2 * LANES);
            const int64_t *set = rows + h / (heads / sets) * chosen;
            int64_t from = h / group * stride, at = (t * heads + h) * head_dim;
            int64_t seen = chosen;
            while (set[seen - 1] > offset + t) seen--;
            attend_chosen(queries + at, keys + from, values + from, set, seen, scores, out + at,
                          head_dim, scale);
        }
    return 0;
}

/* Products of queries and keys times `scale`, (heads, nodes, offset + nodes); rows behind a query
 * get -inf. */
void score_all(const float *queries, const float *keys, float *out, int64_t heads, int64_t group,
               int64_t nodes, int64_t offset, int64_t stride, int64_t head_dim, float scale,
               int64_t threads) {
    const int64_t length = offset + nodes;
#pragma omp parallel for schedule(static) collapse(2) num_threads((int)threads)
    for (int64_t t = 0; t < nodes; t++)
        for (int64_t h = 0; h < heads; h++) {
            const float *query = queries + (t * heads + h) * head_dim;
            const float *head = keys + h / group * stride;
            float *scores = out + (h * nodes + t) * length;
            for (int64_t j = 0; j <= offset + t; j++) {
                vec dot = (vec){};
                for (int64_t i = 0; i < head_dim; i += LANES)
                    dot += *(const unaligned *)(query + i) *
                           *(const unaligned *)(head + j * head_dim + i);
                scores[j] = sum_lanes(dot) * scale;
            }
            for (int64_t j = offset + t + 1; j < length; j++) scores[j] = -INFINITY;
        }
}

/* Move chosen rows of each head to its front, in place. `rows` is (sets, chosen), ascending, one
 * set for all heads or one for each; heads lie `stride` floats apart. */
void compact(float *states, const int64_t *rows, int64_t sets, int64_t kv_heads, int64_t chosen,
             int64_t stride, int64_t head_dim) {
    for (int64_t g = 0; g < kv_heads; g++) {
        const int64_t *set = rows + (sets == 1 ? 0 : g * chosen);
        float *head = states + g * stride;
        for (int64_t j = 0, run; j < chosen; j += run) {
            for (run = 1; j + run < chosen && set[j + run] == set[j] + run; run++) continue;
            if (set[j] != j)
                memmove(head + j * head_dim, head + set[j] * head_dim,
                        (size_t)(run * head_dim) * sizeof(float));
        }
    }
}
