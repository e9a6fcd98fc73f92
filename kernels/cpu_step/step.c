/* One step of few tokens of a transformer on AVX-512 processors: a list of instructions, run by all threads with a barrier after each.
 *
 * Activations are float32; weights are read as they lie in the engine, float32, float16, bfloat16 or int8 with one scale per row,
 * and every product is summed in float32. A weight is read once whatever the number of tokens: one of each sequence, or several
 * that follow each other in it, which is how guessed tokens are verified. What a token gives does not depend on the others.
 * Memory is the limit: rows of a weight go through four at a time, against up to four tokens in registers.
 */
#include <math.h>

#include "vectors.h"

enum { EMBEDDING, LINEAR, NORM, ATTENTION, ROTARY, ACTIVATION, MULTIPLY, ADD, SCREEN, RESCORE, PICK };

typedef struct {
    int32_t op, kind;           /* kind: activation; 0 layer norm or 1 RMS norm; embedding: 1 looks up positions */
    int32_t wtype;              /* of w; attention: of the cache */
    int32_t n, k;               /* outputs and inputs; attention: heads and kv heads */
    int32_t ldx, ld2, ld3, dim; /* floats from one token to the next in x, in w (k of attention), in v of attention; head_dim */
    int32_t offset, offset2;    /* embedding: added to token ids and to positions */
    float number;               /* eps; scale of the scores */
    const void *x, *w, *bias, *residual, *scale;
    void *y, *y2;
} Instr;

typedef struct {
    int32_t tokens, pages, page_size, max_len;
    const int32_t *token_ids, *positions, *page_table;
    const int32_t *sequence;    /* of each token, its row in page_table; null: token t is the only one of sequence t */
    float *scratch;             /* per thread and head max_len floats */
    float *best;                /* per thread and token: bound, then best logit */
    int32_t *best_id, *picked;
    int16_t *narrow;            /* per thread tokens x narrow_k: activations for int8 weights */
    int32_t narrow_k, unused;
} Step;

/* ---- products -------------------------------------------------------------------------------- */

/* the sums of four vectors' elements */
INLINE __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

enum { AHEAD = 512 }; /* bytes ahead of its loads that a row, and the one behind it in memory, is prefetched */

/* out[m][r] = row r of w . x of token m, for four rows and M tokens; rows past the last one repeat it */
INLINE void dots(const int type, const int M, const char *const rows[4], ptrdiff_t k, const float *x, ptrdiff_t ldx,
                 __m128 out[4]) {
    const ptrdiff_t size = type == F32 ? 4 : type == I8 ? 1 : 2, line = 64 / size, whole = k & ~(ptrdiff_t)15;
    __m512 acc[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) acc[r][m] = _mm512_setzero_ps();
#define PRODUCT(AT)                                                                                                    \
    do {                                                                                                               \
        __m512 row[4];                                                                                                 \
        _Pragma("GCC unroll 4") for (int r = 0; r < 4; r++) row[r] = load_all(type, rows[r], (AT));                    \
        _Pragma("GCC unroll 4") for (int m = 0; m < M; m++) {                                                          \
            __m512 v = _mm512_loadu_ps(x + m * ldx + (AT));                                                            \
            _Pragma("GCC unroll 4") for (int r = 0; r < 4; r++) acc[r][m] = _mm512_fmadd_ps(row[r], v, acc[r][m]);     \
        }                                                                                                              \
    } while (0)
    ptrdiff_t i = 0;
    for (; i + line <= whole; i += line) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) _mm_prefetch(rows[r] + i * size + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
        for (ptrdiff_t j = 0; j < line; j += 16) PRODUCT(i + j);
    }
    for (; i < whole; i += 16) PRODUCT(i);
#undef PRODUCT
    if (whole < k) {
        __mmask16 mask = first(k - whole);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            __m512 v = _mm512_maskz_loadu_ps(mask, x + m * ldx + whole);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) acc[r][m] = _mm512_fmadd_ps(load(type, rows[r], whole, mask), v, acc[r][m]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) out[m] = sums(acc[0][m], acc[1][m], acc[2][m], acc[3][m]);
}

typedef void Dots(int M, const char *const rows[4], ptrdiff_t k, const float *x, ptrdiff_t ldx, __m128 out[4]);
#define DOTS(TYPE, NAME)                                                                                               \
    ISA static void NAME(int M, const char *const rows[4], ptrdiff_t k, const float *x, ptrdiff_t ldx, __m128 out[4]) { \
        if (M == 1) dots(TYPE, 1, rows, k, x, ldx, out);                                                               \
        else if (M == 2) dots(TYPE, 2, rows, k, x, ldx, out);                                                          \
        else if (M == 3) dots(TYPE, 3, rows, k, x, ldx, out);                                                          \
        else dots(TYPE, 4, rows, k, x, ldx, out);                                                                      \
    }
DOTS(F32, dots_f32)
DOTS(BF16, dots_bf16)
DOTS(F16, dots_f16)
static Dots *const DOTS_OF[] = {dots_f32, dots_bf16, dots_f16, 0};

/* The same for int8 rows and activations in int16: integers are multiplied two at a time and summed exactly. */
INLINE void dots_narrow(const int M, const char *const rows[4], ptrdiff_t k, const int16_t *x, ptrdiff_t ldx, __m128 out[4]) {
    __m512i acc[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) acc[r][m] = _mm512_setzero_si512();
    for (ptrdiff_t i = 0; i < k; i += 32) {
        const __mmask32 mask = k - i >= 32 ? 0xffffffffu : (1u << (k - i)) - 1;
        __m512i row[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            if ((i & 32) == 0) _mm_prefetch(rows[r] + i + AHEAD, _MM_HINT_T0);
            row[r] = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, rows[r] + i));
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            __m512i v = _mm512_loadu_si512(x + m * ldx + i); /* zeros behind k */
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) acc[r][m] = _mm512_add_epi32(acc[r][m], _mm512_madd_epi16(row[r], v));
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
        out[m] = sums(_mm512_cvtepi32_ps(acc[0][m]), _mm512_cvtepi32_ps(acc[1][m]), _mm512_cvtepi32_ps(acc[2][m]),
                      _mm512_cvtepi32_ps(acc[3][m]));
}

ISA static void dots_i8(int M, const char *const rows[4], ptrdiff_t k, const int16_t *x, ptrdiff_t ldx, __m128 out[4]) {
    if (M == 1) dots_narrow(1, rows, k, x, ldx, out);
    else if (M == 2) dots_narrow(2, rows, k, x, ldx, out);
    else if (M == 3) dots_narrow(3, rows, k, x, ldx, out);
    else dots_narrow(4, rows, k, x, ldx, out);
}

/* x in steps of the result, with zeros up to a multiple of 32. A lane sums k / 16 products of at most 127 * limit, which must
   fit 31 bits. Values that are not finite make the step one that is not. */
ISA static float narrow(const float *x, ptrdiff_t k, int16_t *y) {
    const float room = 2147483647.0f / (127.0f * (float)(k / 16 + 2)), limit = room < 32767.0f ? floorf(room) : 32767.0f;
    __m512 top = _mm512_setzero_ps(), bad = _mm512_setzero_ps();
    for (ptrdiff_t i = 0; i < k; i += 16) {
        __m512 v = _mm512_maskz_loadu_ps(first(k - i), x + i);
        top = _mm512_max_ps(top, _mm512_abs_ps(v));
        bad = _mm512_fmadd_ps(v, _mm512_setzero_ps(), bad);
    }
    const float size = _mm512_reduce_max_ps(top), step = size / limit, inverse = size > 0 ? limit / size : 0.0f;
    for (ptrdiff_t i = 0; i < ((k + 31) & ~(ptrdiff_t)31); i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(i < k ? first(k - i) : 0, x + i), _mm512_set1_ps(inverse));
        _mm256_storeu_si256((void *)(y + i), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
    }
    return step + _mm512_reduce_add_ps(bad);
}

/* outputs [begin, end) of token t: y = activation(y * scale + bias) + residual */
ISA static void finish(const Instr *in, ptrdiff_t t, ptrdiff_t begin, ptrdiff_t end) {
    float *y = (float *)in->y + t * in->n;
    for (ptrdiff_t i = begin; i < end; i += 16) {
        const __mmask16 mask = first(end - i);
        __m512 v = _mm512_maskz_loadu_ps(mask, y + i);
        if (in->scale) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, (const float *)in->scale + i));
        if (in->bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, (const float *)in->bias + i));
        v = activate(in->kind, v);
        if (in->residual) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, (const float *)in->residual + t * in->n + i));
        _mm512_mask_storeu_ps(y + i, mask, v);
    }
}

/* y = activation(x w^T * scale + bias) + residual, rows [begin, end) of w. The four rows that go through together are one of
   each quarter: four long streams keep the memory far busier than one, or than four that end with their rows. */
ISA static void linear(const Instr *in, const Step *step, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const float *x = in->x;
    const ptrdiff_t bytes = in->k * SIZE_OF[in->wtype], width = step->narrow_k, quarter = (end - begin + 3) / 4;
    int16_t *small = step->narrow + (ptrdiff_t)thread * step->tokens * width;
    float steps[step->tokens];
    if (in->wtype == I8 && begin < end)
        for (int t = 0; t < step->tokens; t++) steps[t] = narrow(x + (ptrdiff_t)t * in->ldx, in->k, small + t * width);
    for (ptrdiff_t i = 0; i < quarter; i++) {
        ptrdiff_t row[4];
        const char *rows[4];
        for (int r = 0; r < 4; r++) {
            row[r] = begin + r * quarter + i < end ? begin + r * quarter + i : end - 1;
            rows[r] = (const char *)in->w + row[r] * bytes;
        }
        for (int t = 0; t < step->tokens; t += 4) {
            const int M = step->tokens - t < 4 ? step->tokens - t : 4;
            __m128 out[4];
            if (in->wtype == I8) {
                dots_i8(M, rows, in->k, small + t * width, width, out);
                for (int m = 0; m < M; m++) out[m] = _mm_mul_ps(out[m], _mm_set1_ps(steps[t + m]));
            } else DOTS_OF[in->wtype](M, rows, in->k, x + (ptrdiff_t)t * in->ldx, in->ldx, out);
            for (int m = 0; m < M; m++) {
                float *y = (float *)in->y + (ptrdiff_t)(t + m) * in->n, four[4];
                _mm_storeu_ps(four, out[m]);
                for (int r = 0; r < 4; r++) y[row[r]] = four[r];
            }
        }
    }
    if (in->scale || in->bias || in->kind || in->residual)
        for (int t = 0; t < step->tokens; t++) finish(in, t, begin, end);
}

/* ---- the next token without all of the head --------------------------------------------------- */

ISA static float length(const float *x, ptrdiff_t k) {
    __m512 sum = _mm512_setzero_ps();
    for (ptrdiff_t i = 0; i < k; i += 16) {
        __m512 v = _mm512_maskz_loadu_ps(first(k - i), x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return sqrtf(_mm512_reduce_add_ps(sum)) * 1.00001f;
}

/* After `linear` over the int8 head: the largest lower bound of a logit among this thread's rows. */
ISA static void screen(const Instr *in, const Step *step, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const float *error = in->bias;
    for (int t = 0; t < step->tokens; t++) {
        const float *approx = (const float *)in->y + (ptrdiff_t)t * in->n;
        const __m512 size = _mm512_set1_ps(length((const float *)in->x + (ptrdiff_t)t * in->ldx, in->k));
        __m512 best = _mm512_set1_ps(-INFINITY);
        for (ptrdiff_t i = begin; i < end; i += 16) {
            __mmask16 mask = first(end - i);
            __m512 low = _mm512_fnmadd_ps(_mm512_maskz_loadu_ps(mask, error + i), size, _mm512_maskz_loadu_ps(mask, approx + i));
            best = _mm512_mask_max_ps(best, mask, best, low);
        }
        step->best[thread * step->tokens + t] = _mm512_reduce_max_ps(best);
    }
}

/* The logits that can be the largest, exactly. */
ISA static void rescore(const Instr *in, const Step *step, int thread, int threads, ptrdiff_t begin, ptrdiff_t end) {
    const float *error = in->bias;
    float *exact = step->best + threads * step->tokens;
    for (int t = 0; t < step->tokens; t++) {
        const float *approx = (const float *)in->y + (ptrdiff_t)t * in->n, *x = (const float *)in->x + (ptrdiff_t)t * in->ldx;
        const __m512 size = _mm512_set1_ps(length(x, in->k));
        float low = -INFINITY, best = -INFINITY;
        int32_t id = -1;
        for (int i = 0; i < threads; i++) low = fmaxf(low, step->best[i * step->tokens + t]);
        for (ptrdiff_t i = begin; i < end; i += 16) {
            __mmask16 mask = first(end - i);
            __m512 high = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, error + i), size, _mm512_maskz_loadu_ps(mask, approx + i));
            /* not "less than": a NaN is a candidate, so that it is found */
            uint32_t left = _mm512_mask_cmp_ps_mask(mask, high, _mm512_set1_ps(low), _CMP_NLT_UQ);
            for (; left; left &= left - 1) {
                ptrdiff_t row = i + __builtin_ctz(left);
                const char *w = (const char *)in->w + row * in->k * SIZE_OF[in->wtype], *rows[4] = {w, w, w, w};
                __m128 out[4];
                DOTS_OF[in->wtype](1, rows, in->k, x, in->ldx, out);
                float logit = _mm_cvtss_f32(out[0]);
                if (in->residual) logit += ((const float *)in->residual)[row];
                if (!(logit <= best)) { best = logit; id = (int32_t)row; }
                if (logit != logit) { best = INFINITY; id = -1; }
            }
        }
        exact[thread * step->tokens + t] = best;
        step->best_id[thread * step->tokens + t] = id;
    }
}

/* -1 where no logit is finite or one is not a number */
static void pick(const Step *step, int threads) {
    const float *exact = step->best + threads * step->tokens;
    for (int t = 0; t < step->tokens; t++) {
        float best = -INFINITY;
        int32_t id = -1;
        for (int i = 0; i < threads; i++)
            if (exact[i * step->tokens + t] > best) {
                best = exact[i * step->tokens + t];
                id = step->best_id[i * step->tokens + t];
            }
        step->picked[t] = isfinite(best) ? id : -1;
    }
}

/* ---- the rest --------------------------------------------------------------------------------- */

ISA static void embedding(const Instr *in, const Step *step, int thread, int threads) {
    for (int t = thread; t < step->tokens; t += threads) {
        ptrdiff_t row = (ptrdiff_t)((in->kind ? step->positions : step->token_ids)[t] + in->offset) * in->n;
        ptrdiff_t at = (ptrdiff_t)(step->positions[t] + in->offset2) * in->n;
        for (ptrdiff_t i = 0; i < in->n; i += 16) {
            __mmask16 mask = first(in->n - i);
            __m512 v = load(in->wtype, in->w, row + i, mask);
            if (in->residual) v = _mm512_add_ps(v, load(in->wtype, in->residual, at + i, mask));
            _mm512_mask_storeu_ps((float *)in->y + (ptrdiff_t)t * in->n + i, mask, v);
        }
    }
}

/* y2 = x + residual where there is one; y = its norm */
ISA static void norm(const Instr *in, const Step *step, int thread, int threads) {
    const float *scale = in->scale, *shift = in->bias;
    const ptrdiff_t n = in->n;
    for (int t = thread; t < step->tokens; t += threads) {
        const float *x = (const float *)in->x + t * n;
        float *y = (float *)in->y + t * n;
        if (in->residual) {
            float *sum = (float *)in->y2 + t * n;
            for (ptrdiff_t i = 0; i < n; i++) sum[i] = x[i] + ((const float *)in->residual)[t * n + i];
            x = sum;
        }
        __m512 total = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (ptrdiff_t i = 0; i < n; i += 16) total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(first(n - i), x + i));
        const float mean = in->kind == 0 ? _mm512_reduce_add_ps(total) / n : 0.0f;
        for (ptrdiff_t i = 0; i < n; i += 16) {
            __mmask16 mask = first(n - i);
            __m512 d = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + i), _mm512_set1_ps(mean));
            squares = _mm512_fmadd_ps(d, d, squares);
        }
        const float factor = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / n + in->number);
        for (ptrdiff_t i = 0; i < n; i++) {
            float v = (x[i] - mean) * factor;
            if (scale) v *= scale[i];
            y[i] = shift ? v + shift[i] : v;
        }
    }
}

static const int32_t *pages_of(const Step *step, int t) {
    return step->page_table + (ptrdiff_t)(step->sequence ? step->sequence[t] : t) * step->pages;
}

/* k and v of one token and one kv head go to their place in the cache. */
ISA static void append(const Instr *in, const Step *step, int t, int kv) {
    const ptrdiff_t dim = in->dim, last = step->positions[t], page = pages_of(step, t)[last / step->page_size];
    const ptrdiff_t slot = ((page * step->page_size + last % step->page_size) * in->k + kv) * dim;
    const float *k = (const float *)in->w + t * in->ld2 + kv * dim, *v = (const float *)in->bias + t * in->ld3 + kv * dim;
    for (ptrdiff_t i = 0; i < dim; i += 16) {
        __mmask16 mask = first(dim - i);
        store(in->wtype, (void *)in->scale, slot + i, mask, _mm512_maskz_loadu_ps(mask, k + i));
        store(in->wtype, (void *)in->residual, slot + i, mask, _mm512_maskz_loadu_ps(mask, v + i));
    }
}

/* Where the keys and values begin of the page that token `begin` of a sequence is on, in elements, and how many are on it. */
static ptrdiff_t page_at(const Instr *in, const Step *step, const int32_t *pages, ptrdiff_t begin, ptrdiff_t length, ptrdiff_t *count) {
    *count = length - begin < step->page_size ? length - begin : step->page_size;
    return (ptrdiff_t)pages[begin / step->page_size] * step->page_size * in->k * in->dim;
}

enum { MAX_VECTORS = 16 }; /* of a head: more than 256 columns are not compiled */

/* V vectors of a head; whole: none of them is cut short by the head's end */
INLINE __m512 part(const int type, const int whole, const void *base, ptrdiff_t at, ptrdiff_t left) {
    return whole ? load_all(type, base, at) : load(type, base, at, first(left));
}

/* scores[4] of q with the keys at `at`, of which the first `count` are there */
INLINE __m128 score(const int type, const int V, const int whole, const float *q, const char *keys, ptrdiff_t at, ptrdiff_t token,
                    ptrdiff_t dim, ptrdiff_t count) {
    __m512 sum[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const ptrdiff_t key = at + (j < count ? j : count - 1) * token;
        sum[j] = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            if (v * 16 % (64 / SIZE_OF[type]) == 0) _mm_prefetch(keys + (key + 8 * token + v * 16) * SIZE_OF[type], _MM_HINT_T0);
            sum[j] = _mm512_fmadd_ps(part(F32, whole, q, v * 16, dim - v * 16), part(type, whole, keys, key + v * 16, dim - v * 16), sum[j]);
        }
    }
    return sums(sum[0], sum[1], sum[2], sum[3]);
}

/* y[dim] += shares . the values at `at`, of `count` tokens */
INLINE void blend(const int type, const int V, const int whole, const float *shares, const char *values, ptrdiff_t at, ptrdiff_t token,
                  ptrdiff_t dim, ptrdiff_t count, float *y) {
    __m512 sum[MAX_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[v] = part(F32, whole, y, v * 16, dim - v * 16);
    for (ptrdiff_t j = 0; j < count; j++) {
        const __m512 share = _mm512_set1_ps(shares[j]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            const ptrdiff_t value = at + j * token + v * 16;
            if (v * 16 % (64 / SIZE_OF[type]) == 0) _mm_prefetch(values + (value + 8 * token) * SIZE_OF[type], _MM_HINT_T0);
            sum[v] = _mm512_fmadd_ps(share, part(type, whole, values, value, dim - v * 16), sum[v]);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) _mm512_mask_storeu_ps(y + v * 16, first(dim - v * 16), sum[v]);
}

/* One token of one sequence and kv heads [begin_kv, end_kv), over the pages of its cache up to its own place. Keys, then values, of
   all these heads are read as they lie in the cache. */
INLINE void attend_to(const int type, const int V, const int whole, const Instr *in, const Step *step, int t, int begin_kv, int end_kv,
                      float *scores) {
    const ptrdiff_t dim = in->dim, token = in->k * dim, group = in->n / in->k, length = step->positions[t] + 1;
    const ptrdiff_t begin_head = begin_kv * group, end_head = end_kv * group;
    const int32_t *pages = pages_of(step, t);
    const float *q = (const float *)in->x + t * in->ldx;
    float *y = (float *)in->y + (ptrdiff_t)t * in->n * dim;
    ptrdiff_t count;
    scores -= begin_head * step->max_len;
    for (ptrdiff_t begin = 0; begin < length; begin += step->page_size) {
        const ptrdiff_t base = page_at(in, step, pages, begin, length, &count);
        for (ptrdiff_t j = 0; j < count; j += 4)
            for (ptrdiff_t head = begin_head; head < end_head; head++) {
                const ptrdiff_t left = count - j < 4 ? count - j : 4, at = base + j * token + head / group * dim;
                __m128 four = score(type, V, whole, q + head * dim, in->scale, at, token, dim, left);
                four = _mm_mul_ps(four, _mm_set1_ps(in->number));
                _mm_mask_storeu_ps(scores + head * step->max_len + begin + j, (__mmask8)((1 << left) - 1), four);
            }
    }
    for (ptrdiff_t head = begin_head; head < end_head; head++) {
        float *own = scores + head * step->max_len;
        __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
        for (ptrdiff_t i = 0; i < length; i += 16)
            top = _mm512_mask_max_ps(top, first(length - i), top, _mm512_maskz_loadu_ps(first(length - i), own + i));
        top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
        for (ptrdiff_t i = 0; i < length; i += 16) {
            __mmask16 mask = first(length - i);
            __m512 e = exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, own + i), top));
            _mm512_mask_storeu_ps(own + i, mask, e);
            total = _mm512_mask_add_ps(total, mask, total, e);
        }
        const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
        for (ptrdiff_t i = 0; i < length; i += 16) {
            __mmask16 mask = first(length - i);
            _mm512_mask_storeu_ps(own + i, mask, _mm512_mul_ps(share, _mm512_maskz_loadu_ps(mask, own + i)));
        }
        for (ptrdiff_t i = 0; i < dim; i += 16) _mm512_mask_storeu_ps(y + head * dim + i, first(dim - i), _mm512_setzero_ps());
    }
    for (ptrdiff_t begin = 0; begin < length; begin += step->page_size) {
        const ptrdiff_t base = page_at(in, step, pages, begin, length, &count);
        for (ptrdiff_t j = 0; j < count; j += 8)
            for (ptrdiff_t head = begin_head; head < end_head; head++)
                blend(type, V, whole, scores + head * step->max_len + begin + j, in->residual, base + j * token + head / group * dim,
                      token, dim, count - j < 8 ? count - j : 8, y + head * dim);
    }
}

typedef void Attend(const Instr *in, const Step *step, int t, int begin_kv, int end_kv, float *scores);
#define ATTEND(TYPE, NAME)                                                                                             \
    ISA static void NAME(const Instr *in, const Step *step, int t, int begin_kv, int end_kv, float *scores) {          \
        if (in->dim == 64) attend_to(TYPE, 4, 1, in, step, t, begin_kv, end_kv, scores);                               \
        else if (in->dim == 128) attend_to(TYPE, 8, 1, in, step, t, begin_kv, end_kv, scores);                         \
        else attend_to(TYPE, (in->dim + 15) / 16, 0, in, step, t, begin_kv, end_kv, scores);                           \
    }
ATTEND(F32, attend_f32)
ATTEND(BF16, attend_bf16)
ATTEND(F16, attend_f16)
static Attend *const ATTEND_OF[] = {attend_f32, attend_bf16, attend_f16, 0};

/* A thread's share of tokens and kv heads. Tokens of several sequences: one after the other, with all heads of the share. Where tokens
   belong to one sequence, they follow each other head by head, so that they find its keys and values in the processor's cache;
   they see each other, so that all are in the cache first. */
static void attention(const Instr *in, const Step *step, int thread, int threads) {
    const int heads = in->k, tokens = step->tokens, count = tokens * heads, share = (count + threads - 1) / threads;
    const int begin = thread * share, end = begin + share < count ? begin + share : count;
    float *scores = step->scratch + (ptrdiff_t)thread * in->n * step->max_len;
    Attend *attend = ATTEND_OF[in->wtype];
    if (step->sequence) {
        for (int item = begin; item < end; item++) append(in, step, item % tokens, item / tokens);
#pragma omp barrier
        for (int item = begin; item < end; item++) attend(in, step, item % tokens, item / tokens, item / tokens + 1, scores);
        return;
    }
    for (int item = begin; item < end; item++) append(in, step, item / heads, item % heads);
    for (int item = begin; item < end; item += heads - item % heads) {
        const int kv = item % heads;
        attend(in, step, item / heads, kv, kv + end - item < heads ? kv + end - item : heads, scores);
    }
}

/* Halves of each head rotated against each other; w: the frequencies of a half. */
static void rotary(const Instr *in, const Step *step, int thread, int threads) {
    const int half = in->dim / 2, heads = in->n / in->dim;
    for (int t = thread; t < step->tokens; t += threads)
        for (int i = 0; i < half; i++) {
            const float angle = (float)step->positions[t] * ((const float *)in->w)[i], c = cosf(angle), s = sinf(angle);
            for (int head = 0; head < heads; head++) {
                const float *x = (const float *)in->x + (ptrdiff_t)t * in->ldx + head * in->dim + i;
                float *y = (float *)in->y + (ptrdiff_t)t * in->n + head * in->dim + i;
                y[0] = x[0] * c - x[half] * s;
                y[half] = x[half] * c + x[0] * s;
            }
        }
}

/* columns [begin, end) of every token */
ISA static void elementwise(const Instr *in, const Step *step, ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t t = 0; t < step->tokens; t++)
        for (ptrdiff_t i = begin; i < end; i += 16) {
            __mmask16 mask = first(end - i);
            __m512 v = _mm512_maskz_loadu_ps(mask, (const float *)in->x + t * in->ldx + i);
            if (in->op == ACTIVATION) v = activate(in->kind, v);
            else {
                __m512 other = _mm512_maskz_loadu_ps(mask, (const float *)in->w + t * in->ld2 + i);
                v = in->op == ADD ? _mm512_add_ps(v, other) : _mm512_mul_ps(v, other);
            }
            _mm512_mask_storeu_ps((float *)in->y + t * in->n + i, mask, v);
        }
}

static void run_one(const Instr *in, const Step *step, int thread, int threads) {
    const ptrdiff_t share = ((in->n + threads - 1) / threads + 15) & ~(ptrdiff_t)15;
    ptrdiff_t begin = thread * share, end = begin + share;
    begin = begin < in->n ? begin : in->n;
    end = end < in->n ? end : in->n;
    switch (in->op) {
    case EMBEDDING: embedding(in, step, thread, threads); break;
    case LINEAR: linear(in, step, thread, begin, end); break;
    case NORM: norm(in, step, thread, threads); break;
    case ATTENTION: attention(in, step, thread, threads); break;
    case ROTARY: rotary(in, step, thread, threads); break;
    case ACTIVATION: case MULTIPLY: case ADD: elementwise(in, step, begin, end); break;
    case SCREEN: screen(in, step, thread, begin, end); break;
    case RESCORE: rescore(in, step, thread, threads, begin, end); break;
    case PICK: if (thread == 0) pick(step, threads); break;
    }
}

/* INTERFACE of __init__.py: what the structures and numbers mean that come from there */
int trtc_interface(void) { return 1; }

int trtc_step_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

void trtc_run_step(const Instr *program, int count, const Step *step, int threads) {
#pragma omp parallel num_threads(threads)
    {
        int thread = 0, team = 1;
#ifdef _OPENMP
        extern int omp_get_thread_num(void), omp_get_num_threads(void);
        thread = omp_get_thread_num();
        team = omp_get_num_threads();
#endif
        for (int i = 0; i < count; i++) {
            run_one(program + i, step, thread, team);
#pragma omp barrier
        }
    }
}
