/* A layer of many tokens with int8 weights: y = activation(x w^T * scale + bias) + residual, on processors with AVX-512 VNNI.
 *
 * Activations become int8 too, with a step of its own for every GROUP of a token's columns, so that one large value costs
 * precision only among its neighbours. Products are summed exactly in int32 within a group, and in float32 across groups.
 * Weights are read as they lie in the engine, one row after the other: a block of ROWS rows and BLOCK columns is put in the order
 * that the instruction wants as it is met, a small share of its products with tens of tokens or more.
 */
#include "vectors.h"

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx512vnni")))

enum {
    GROUP = 64,         /* columns with one step */
    ROWS = 64,          /* outputs of a block: four vectors */
    BLOCK = 4 * GROUP,  /* columns of a block: its 16 KB stay in the first cache */
    TILE = 3,           /* tokens at a time: 12 sums in int32, 12 in float32, 4 weights and an activation are 29 registers */
    TOKENS = 384,       /* at most, from one ordering of a block to the next; their sums stay in the second cache */
};

typedef struct {
    int32_t tokens, n, k, kind; /* kind: activation */
    const float *x, *scale, *bias, *residual; /* [tokens, k], [n], [n], [tokens, n] */
    const int8_t *w;            /* [n, k] */
    float *y;                   /* [tokens, n] */
    int8_t *narrow;             /* [tokens, groups * GROUP] */
    float *steps;               /* [tokens, groups] */
    int32_t *starts;            /* [tokens, groups] */
} Layer;

/* ---- activations ------------------------------------------------------------------------------ */

/* One token in int8. starts: what a group's sum begins with, because weights are multiplied with 128 added to them. */
ISA static void narrow(const float *x, ptrdiff_t k, int8_t *y, float *steps, int32_t *starts) {
    for (ptrdiff_t g = 0; g * GROUP < k; g++) {
        __m512 v[GROUP / 16], top = _mm512_setzero_ps(), bad = _mm512_setzero_ps();
        for (ptrdiff_t i = 0; i < GROUP / 16; i++) {
            const ptrdiff_t at = g * GROUP + i * 16;
            v[i] = _mm512_maskz_loadu_ps(at < k ? first(k - at) : 0, x + at);
            top = _mm512_max_ps(top, _mm512_abs_ps(v[i]));
            bad = _mm512_fmadd_ps(v[i], _mm512_setzero_ps(), bad); /* not a number where a value is not finite */
        }
        const float size = _mm512_reduce_max_ps(top), inverse = size > 1e-30f ? 127.0f / size : 0.0f;
        __m512i sum = _mm512_setzero_si512();
        for (ptrdiff_t i = 0; i < GROUP / 16; i++) {
            __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], _mm512_set1_ps(inverse)));
            sum = _mm512_add_epi32(sum, whole);
            _mm_storeu_si128((void *)(y + g * GROUP + i * 16), _mm512_cvtsepi32_epi8(whole));
        }
        steps[g] = size / 127.0f + _mm512_reduce_add_ps(bad);
        starts[g] = -128 * _mm512_reduce_add_epi32(sum);
    }
}

/* ---- weights ---------------------------------------------------------------------------------- */

/* 16 rows of 64 columns -> for every four columns a vector of all rows, with 128 added so that none is negative */
INLINE void order16(const __m512i row[16], char *out, ptrdiff_t stride) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) { /* pairs of rows, 4 bytes each, then fours: each of the four lanes by itself */
        a[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    const __m512i sign = _mm512_set1_epi8((char)0x80);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* lane l of b[i], b[i + 4] ... is column 4 l + i of rows 0-3, 4-7 ...: lanes against rows */
        __m512i low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x44), high = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xee);
        __m512i low2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x44), high2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xee);
        _mm512_store_si512(out + i * stride, _mm512_xor_si512(sign, _mm512_shuffle_i32x4(low, low2, 0x88)));
        _mm512_store_si512(out + (i + 4) * stride, _mm512_xor_si512(sign, _mm512_shuffle_i32x4(low, low2, 0xdd)));
        _mm512_store_si512(out + (i + 8) * stride, _mm512_xor_si512(sign, _mm512_shuffle_i32x4(high, high2, 0x88)));
        _mm512_store_si512(out + (i + 12) * stride, _mm512_xor_si512(sign, _mm512_shuffle_i32x4(high, high2, 0xdd)));
    }
}

/* Rows row .. row + ROWS - 1 and columns begin .. end - 1 -> [groups, GROUP / 4, ROWS, 4], zero past the last row and column */
ISA static void order(const Layer *in, ptrdiff_t row, ptrdiff_t begin, ptrdiff_t end, char *out) {
    const ptrdiff_t k = in->k;
    for (ptrdiff_t at = begin; at < end; at += GROUP, out += GROUP * ROWS) {
        const __mmask64 mask = end - at >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (end - at)) - 1;
        for (ptrdiff_t part = 0; part < ROWS; part += 16) {
            __m512i rows[16];
#pragma GCC unroll 16
            for (ptrdiff_t r = 0; r < 16; r++) {
                const ptrdiff_t from = row + part + r;
                rows[r] = _mm512_maskz_loadu_epi8(from < in->n ? mask : 0, in->w + from * k + at);
            }
            order16(rows, out + 4 * part, 4 * ROWS);
        }
    }
}

/* ---- products --------------------------------------------------------------------------------- */

/* sums[m][ROWS] of M tokens += their products with a block of `groups` groups; fresh: sums begin here */
VNNI static inline __attribute__((always_inline)) void multiply(
    const int M, const char *w, ptrdiff_t groups, const int8_t *x, ptrdiff_t ldx, const float *steps, const int32_t *starts,
    ptrdiff_t ldg, float *sums, int fresh) {
    __m512 total[TILE][4];
#pragma GCC unroll 3
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) total[m][v] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(sums + m * ROWS + v * 16);
    for (ptrdiff_t g = 0; g < groups; g++) {
        __m512i acc[TILE][4];
#pragma GCC unroll 3
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) acc[m][v] = _mm512_set1_epi32(starts[m * ldg + g]);
#pragma GCC unroll 4
        for (int j = 0; j < GROUP / 4; j++, w += 4 * ROWS) {
            __m512i row[4];
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) row[v] = _mm512_load_si512(w + 64 * v);
#pragma GCC unroll 3
            for (int m = 0; m < M; m++) {
                const __m512i four = _mm512_set1_epi32(*(const int32_t *)(x + m * ldx + g * GROUP + 4 * j));
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) acc[m][v] = _mm512_dpbusd_epi32(acc[m][v], row[v], four);
            }
        }
#pragma GCC unroll 3
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                total[m][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[m][v]), _mm512_set1_ps(steps[m * ldg + g]), total[m][v]);
    }
#pragma GCC unroll 3
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) _mm512_store_ps(sums + m * ROWS + v * 16, total[m][v]);
}

/* The block that comes next is prefetched while this one is multiplied, two rows of it with every tile. */
INLINE void prefetch(const Layer *in, ptrdiff_t row, ptrdiff_t at, ptrdiff_t tile) {
    for (ptrdiff_t r = row + 2 * tile; r < row + 2 * tile + 2 && 2 * tile < ROWS && r < in->n; r++)
        for (ptrdiff_t i = 0; i < BLOCK; i += 64) _mm_prefetch(in->w + r * in->k + at + i, _MM_HINT_T1);
}

/* Rows row .. row + ROWS - 1 of tokens begin .. end - 1. later: the row that this thread will most likely go on with; w and
   sums: memory for a block and for ROWS sums a token */
VNNI static void panel(const Layer *in, ptrdiff_t row, ptrdiff_t later, ptrdiff_t begin, ptrdiff_t end, char *w, float *sums) {
    const ptrdiff_t k = in->k, groups = (k + GROUP - 1) / GROUP, ldx = groups * GROUP;
    for (ptrdiff_t at = 0; at < k; at += BLOCK) {
        const ptrdiff_t stop = k - at < BLOCK ? k : at + BLOCK, count = (stop - at + GROUP - 1) / GROUP;
        const ptrdiff_t next_row = stop < k ? row : later, next_at = stop < k ? stop : 0;
        order(in, row, at, stop, w);
        for (ptrdiff_t t = begin; t < end; t += TILE) {
            const int8_t *x = in->narrow + t * ldx + at;
            const float *steps = in->steps + t * groups + at / GROUP;
            const int32_t *starts = in->starts + t * groups + at / GROUP;
            float *out = sums + (t - begin) * ROWS;
            prefetch(in, next_row, next_at, (t - begin) / TILE);
            if (end - t >= 3) multiply(3, w, count, x, ldx, steps, starts, groups, out, at == 0);
            else if (end - t == 2) multiply(2, w, count, x, ldx, steps, starts, groups, out, at == 0);
            else multiply(1, w, count, x, ldx, steps, starts, groups, out, at == 0);
        }
    }
    for (ptrdiff_t t = begin; t < end; t++)
        for (ptrdiff_t i = row; i < in->n && i < row + ROWS; i += 16) {
            const __mmask16 mask = first(in->n - i);
            __m512 v = _mm512_load_ps(sums + (t - begin) * ROWS + i - row);
            v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, in->scale + i));
            if (in->bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, in->bias + i));
            v = activate(in->kind, v);
            if (in->residual) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, in->residual + t * in->n + i));
            _mm512_mask_storeu_ps(in->y + t * in->n + i, mask, v);
        }
}

int trtc_int8_supported(void) { return __builtin_cpu_supports("avx512vnni"); }

void trtc_int8_layer(const Layer *in, int threads) {
    const ptrdiff_t tokens = in->tokens, k = in->k, groups = (k + GROUP - 1) / GROUP, panels = (in->n + ROWS - 1) / ROWS;
    ptrdiff_t share = TOKENS; /* tokens of an item of work: fewer where there would be too few items for the threads */
    while (share > 16 * TILE && panels * ((tokens + share - 1) / share) < 4 * threads) share /= 2;
    const ptrdiff_t items = panels * ((tokens + share - 1) / share);
#pragma omp parallel num_threads(threads)
    {
        char w[BLOCK * ROWS] __attribute__((aligned(64)));
        float sums[TOKENS * ROWS] __attribute__((aligned(64)));
#pragma omp for
        for (ptrdiff_t t = 0; t < tokens; t++)
            narrow(in->x + t * k, k, in->narrow + t * groups * GROUP, in->steps + t * groups, in->starts + t * groups);
#pragma omp for schedule(dynamic)
        for (ptrdiff_t item = 0; item < items; item++) {
            const ptrdiff_t begin = item / panels * share, end = begin + share < tokens ? begin + share : tokens;
            panel(in, item % panels * ROWS, (item + threads) % panels * ROWS, begin, end, w, sums);
        }
    }
}
