/* Attention of steps of many tokens over the paged cache, on AVX-512 processors: sequences with any number of new tokens each.
 *
 * Keys and values of all new tokens go to the cache first. Then a thread takes up to QUERIES tokens of a sequence and one head at a
 * time, and goes through the sequence's keys in blocks of KEYS: scores of TILE tokens against a block, their softmax so far, and
 * their sums of values, all of which stay in the processor's cache. Numbers are float32 in between, whatever the cache holds.
 */
#include "vectors.h"

enum {
    KEYS = 64,    /* of a block: four vectors */
    TILE = 6,     /* tokens at a time: 24 sums, 4 vectors of keys or values and a number are 29 registers */
    QUERIES = 48,
    MAX_DIM = 256
};

typedef struct {
    int32_t type, sequences, heads, kv_heads, dim;
    int32_t page_size, pages;       /* pages: of a row of the page table */
    int32_t ldq, ldk, ldv;          /* elements from one token to the next */
    float scale;
    int32_t unused;
    const void *q, *k, *v;          /* [tokens, heads or kv_heads, dim] of `type`, as are the cache and y */
    void *keys, *values;            /* [pages, page_size, kv_heads, dim] */
    void *y;                        /* [tokens, heads, dim] */
    const int32_t *query_start, *kv_length, *page_table;
} Context;

/* A thread's own memory; width: dim, filled up to whole vectors */
typedef struct {
    float q[QUERIES * MAX_DIM], y[QUERIES * MAX_DIM];   /* [QUERIES, width] */
    float keys[MAX_DIM * KEYS], values[KEYS * MAX_DIM]; /* [width, KEYS], [KEYS, width] */
    float top[QUERIES], total[QUERIES], scores[TILE * KEYS];
} __attribute__((aligned(64))) Work;

INLINE ptrdiff_t slot(const Context *in, ptrdiff_t b, ptrdiff_t position, ptrdiff_t kv) {
    const ptrdiff_t page = in->page_table[b * in->pages + position / in->page_size];
    return ((page * in->page_size + position % in->page_size) * in->kv_heads + kv) * in->dim;
}

INLINE void append(const int type, const Context *in, ptrdiff_t b, ptrdiff_t t) {
    const ptrdiff_t position = in->kv_length[b] - in->query_start[b + 1] + t, row = (ptrdiff_t)in->kv_heads * in->dim;
    const ptrdiff_t to = slot(in, b, position, 0);
    for (ptrdiff_t i = 0; i < row; i += 16) {
        const __mmask16 mask = first(row - i);
        store(type, in->keys, to + i, mask, load(type, in->k, t * in->ldk + i, mask));
        store(type, in->values, to + i, mask, load(type, in->v, t * in->ldv + i, mask));
    }
}

/* 16 rows of 16 -> 16 columns of 16 */
INLINE void transpose(const __m512 row[16], float *out, ptrdiff_t stride) {
    __m512 a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
    }
#define PAIR(LOW, X, Y) _mm512_castpd_ps(_mm512_unpack##LOW##_pd(_mm512_castps_pd(X), _mm512_castps_pd(Y)))
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        b[i] = PAIR(lo, a[i], a[i + 2]);
        b[i + 1] = PAIR(hi, a[i], a[i + 2]);
        b[i + 2] = PAIR(lo, a[i + 1], a[i + 3]);
        b[i + 3] = PAIR(hi, a[i + 1], a[i + 3]);
    }
#undef PAIR
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* lane l of b[i], b[i + 4] ... is column 4 l + i of rows 0-3, 4-7 ... */
        __m512 low = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x44), high = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xee);
        __m512 low2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x44), high2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xee);
        _mm512_store_ps(out + i * stride, _mm512_shuffle_f32x4(low, low2, 0x88));
        _mm512_store_ps(out + (i + 4) * stride, _mm512_shuffle_f32x4(low, low2, 0xdd));
        _mm512_store_ps(out + (i + 8) * stride, _mm512_shuffle_f32x4(high, high2, 0x88));
        _mm512_store_ps(out + (i + 12) * stride, _mm512_shuffle_f32x4(high, high2, 0xdd));
    }
}

/* Keys and values `begin` .. of a sequence and a head; zero from `length` on, where the cache may hold anything */
INLINE void gather(const int type, const Context *in, ptrdiff_t b, ptrdiff_t kv, ptrdiff_t begin, ptrdiff_t length, ptrdiff_t width,
                   Work *work) {
    ptrdiff_t slots[KEYS];
    const ptrdiff_t count = length - begin < KEYS ? length - begin : KEYS;
    for (ptrdiff_t j = 0; j < count; j++) slots[j] = slot(in, b, begin + j, kv);
    for (ptrdiff_t i = 0; i < width; i += 16) {
        const __mmask16 mask = first(in->dim - i);
        for (ptrdiff_t part = 0; part < KEYS; part += 16) {
            __m512 rows[16];
#pragma GCC unroll 16
            for (ptrdiff_t j = 0; j < 16; j++)
                rows[j] = part + j < count ? load(type, in->keys, slots[part + j] + i, mask) : _mm512_setzero_ps();
            transpose(rows, work->keys + i * KEYS + part, KEYS);
        }
        for (ptrdiff_t j = 0; j < KEYS; j++)
            _mm512_store_ps(work->values + j * width + i,
                            j < count ? load(type, in->values, slots[j] + i, mask) : _mm512_setzero_ps());
    }
}

/* out[TILE][16 V] = out * factor + a [TILE, depth] b [depth, 16 V]; no factor: out begins here */
INLINE void product(const int V, const float *a, ptrdiff_t lda, const float *b, ptrdiff_t ldb, ptrdiff_t depth, const float *factor,
                    float *out, ptrdiff_t ldo) {
    __m512 sum[TILE][4];
#pragma GCC unroll 6
    for (int m = 0; m < TILE; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            sum[m][v] = factor ? _mm512_mul_ps(_mm512_set1_ps(factor[m]), _mm512_load_ps(out + m * ldo + 16 * v)) : _mm512_setzero_ps();
    for (ptrdiff_t i = 0; i < depth; i++) {
        __m512 row[4];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) row[v] = _mm512_load_ps(b + i * ldb + 16 * v);
#pragma GCC unroll 6
        for (int m = 0; m < TILE; m++) {
            const __m512 number = _mm512_set1_ps(a[m * lda + i]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[m][v] = _mm512_fmadd_ps(number, row[v], sum[m][v]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < TILE; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) _mm512_store_ps(out + m * ldo + 16 * v, sum[m][v]);
}

ISA static void product4(const float *a, ptrdiff_t lda, const float *b, ptrdiff_t ldb, ptrdiff_t depth, const float *factor, float *out,
                         ptrdiff_t ldo) {
    product(4, a, lda, b, ldb, depth, factor, out, ldo);
}

ISA static void product1(const float *a, ptrdiff_t lda, const float *b, ptrdiff_t ldb, ptrdiff_t depth, const float *factor, float *out,
                         ptrdiff_t ldo) {
    product(1, a, lda, b, ldb, depth, factor, out, ldo);
}

/* TILE tokens from row `row` on, of which the first sees `sees` keys of this block and each next one more */
ISA static void tile(Work *work, ptrdiff_t row, ptrdiff_t sees, ptrdiff_t width) {
    const ptrdiff_t most = sees + TILE - 1 < KEYS ? sees + TILE - 1 : KEYS;
    const float *q = work->q + row * width;
    float factor[TILE];
    if (most <= 16) product1(q, width, work->keys, KEYS, width, 0, work->scores, KEYS);
    else product4(q, width, work->keys, KEYS, width, 0, work->scores, KEYS);
    for (ptrdiff_t m = 0; m < TILE; m++) {
        float *scores = work->scores + m * KEYS;
        const ptrdiff_t seen = sees + m < 0 ? 0 : sees + m < KEYS ? sees + m : KEYS;
        __m512 top = _mm512_set1_ps(work->top[row + m]), total = _mm512_setzero_ps();
        for (ptrdiff_t i = 0; i < seen; i += 16)
            top = _mm512_mask_max_ps(top, first(seen - i), top, _mm512_load_ps(scores + i));
        const float now = _mm512_reduce_max_ps(top);
        for (ptrdiff_t i = 0; i < most; i += 16) {
            const __mmask16 mask = i < seen ? first(seen - i) : 0;
            __m512 e = _mm512_maskz_mov_ps(mask, exp16(_mm512_sub_ps(_mm512_load_ps(scores + i), _mm512_set1_ps(now))));
            _mm512_store_ps(scores + i, e);
            total = _mm512_add_ps(total, e);
        }
        factor[m] = _mm512_cvtss_f32(exp16(_mm512_set1_ps(work->top[row + m] - now)));
        work->total[row + m] = work->total[row + m] * factor[m] + _mm512_reduce_add_ps(total);
        work->top[row + m] = now;
    }
    float *y = work->y + row * width;
    ptrdiff_t i = 0;
    for (; i + 64 <= width; i += 64) product4(work->scores, KEYS, work->values + i, width, most, factor, y + i, width);
    for (; i < width; i += 16) product1(work->scores, KEYS, work->values + i, width, most, factor, y + i, width);
}

/* Tokens [begin, end) of sequence b, at most QUERIES, and one head */
INLINE void attend(const int type, const Context *in, ptrdiff_t b, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t head, Work *work) {
    const ptrdiff_t dim = in->dim, width = (dim + 15) & ~(ptrdiff_t)15, count = end - begin, kv = head / (in->heads / in->kv_heads);
    const ptrdiff_t before = in->kv_length[b] - in->query_start[b + 1] + begin, rows = (count + TILE - 1) / TILE * TILE;
    for (ptrdiff_t m = 0; m < rows; m++) {
        work->top[m] = -1e30f;
        work->total[m] = 0.0f;
        for (ptrdiff_t i = 0; i < width; i += 16) {
            const __mmask16 mask = m < count ? first(dim - i) : 0;
            __m512 q = load(type, in->q, (begin + m) * in->ldq + head * dim + i, mask);
            _mm512_store_ps(work->q + m * width + i, _mm512_mul_ps(q, _mm512_set1_ps(in->scale)));
            _mm512_store_ps(work->y + m * width + i, _mm512_setzero_ps());
        }
    }
    for (ptrdiff_t at = 0; at < before + count; at += KEYS) {
        gather(type, in, b, kv, at, before + count, width, work);
        for (ptrdiff_t m = 0; m < rows; m += TILE)
            if (before + m + TILE > at) tile(work, m, before + m + 1 - at, width);
    }
    for (ptrdiff_t m = 0; m < count; m++)
        for (ptrdiff_t i = 0; i < width; i += 16)
            store(type, in->y, ((begin + m) * in->heads + head) * dim + i, first(dim - i),
                  _mm512_div_ps(_mm512_load_ps(work->y + m * width + i), _mm512_set1_ps(work->total[m])));
}

#define BY_TYPE(CALL)                                                                                                  \
    do {                                                                                                               \
        if (in->type == F32) { const int type = F32; CALL; }                                                           \
        else if (in->type == BF16) { const int type = BF16; CALL; }                                                    \
        else { const int type = F16; CALL; }                                                                           \
    } while (0)

typedef struct { ptrdiff_t b, begin, end; } Block;

ISA static void append_tokens(const Context *in, Block own) {
    for (ptrdiff_t t = own.begin; t < own.end; t++) BY_TYPE(append(type, in, own.b, t));
}

ISA static void attend_block(const Context *in, Block own, ptrdiff_t head, Work *work) {
    BY_TYPE(attend(type, in, own.b, own.begin, own.end, head, work));
}

/* Block `index` of those of QUERIES tokens that the sequences consist of */
static Block block_at(const Context *in, ptrdiff_t index) {
    for (ptrdiff_t b = 0;; b++) {
        const ptrdiff_t begin = in->query_start[b] + index * QUERIES, end = in->query_start[b + 1];
        if (begin < end) return (Block){b, begin, end - begin < QUERIES ? end : begin + QUERIES};
        index -= (end - in->query_start[b] + QUERIES - 1) / QUERIES;
    }
}

void trtc_context_attention(const Context *in, int threads) {
    ptrdiff_t blocks = 0;
    for (ptrdiff_t b = 0; b < in->sequences; b++) blocks += (in->query_start[b + 1] - in->query_start[b] + QUERIES - 1) / QUERIES;
#pragma omp parallel num_threads(threads)
    {
        Work work;
#pragma omp for
        for (ptrdiff_t i = 0; i < blocks; i++) append_tokens(in, block_at(in, i));
#pragma omp for schedule(dynamic)
        for (ptrdiff_t i = 0; i < blocks * in->heads; i++) attend_block(in, block_at(in, i / in->heads), i % in->heads, &work);
    }
}
