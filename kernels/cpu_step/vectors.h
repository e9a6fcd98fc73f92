/* Vectors of 16 floats: what the files of this folder share. */
#ifndef TRTC_VECTORS_H
#define TRTC_VECTORS_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define ISA __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define INLINE ISA static inline __attribute__((always_inline))

enum { NONE, RELU, SILU, GELU_TANH };

INLINE __mmask16 first(ptrdiff_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

/* e^x to about 1e-7, 0 below -87: 2^i times a polynomial on [-ln2/2, ln2/2] */
INLINE __m512 exp16(__m512 x) {
    __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), x);
    __m512 i = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(i, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(i, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    const float c[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int j = 0; j < 7; j++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c[j]));
    return _mm512_maskz_scalef_ps((__mmask16)~tiny, p, i);
}

INLINE __m512 sigmoid(__m512 x) {
    __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

INLINE __m512 activate(int kind, __m512 x) {
    if (kind == RELU) return _mm512_max_ps(_mm512_setzero_ps(), x); /* this order keeps a NaN of x */
    if (kind == SILU) return _mm512_mul_ps(x, sigmoid(x));
    if (kind == GELU_TANH) { /* x/2 (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3) */
        __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        __m512 u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
        return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(u, _mm512_set1_ps(1.59576912f))));
    }
    return x;
}

#endif
