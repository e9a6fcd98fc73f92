/* Vectors of 16 floats: what the files of this folder share. */
#ifndef TRTC_VECTORS_H
#define TRTC_VECTORS_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define ISA __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define INLINE ISA static inline __attribute__((always_inline))

enum { F32, BF16, F16, I8 }; /* what numbers are in memory */
static const ptrdiff_t SIZE_OF[] = {4, 2, 2, 1};

enum { NONE, RELU, SILU, GELU_TANH, GELU };

INLINE __mmask16 first(ptrdiff_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

INLINE __m512 load(int type, const void *base, ptrdiff_t at, __mmask16 m) {
    if (type == F32) return _mm512_maskz_loadu_ps(m, (const float *)base + at);
    if (type == I8)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, (const int8_t *)base + at)));
    __m256i half = _mm256_maskz_loadu_epi16(m, (const uint16_t *)base + at);
    if (type == F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __m512 load_all(int type, const void *base, ptrdiff_t at) {
    if (type == F32) return _mm512_loadu_ps((const float *)base + at);
    if (type == I8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)((const int8_t *)base + at))));
    __m256i half = _mm256_loadu_si256((const void *)((const uint16_t *)base + at));
    if (type == F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void store(int type, void *base, ptrdiff_t at, __mmask16 m, __m512 v) {
    if (type == F32) { _mm512_mask_storeu_ps((float *)base + at, m, v); return; }
    __m256i half;
    if (type == F16) half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    else { /* round to nearest even; NaN stays NaN */
        __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
    _mm256_mask_storeu_epi16((uint16_t *)base + at, m, half);
}

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

/* The share of a normal distribution below x, to about 1e-7: above |x| lies e^(-x^2/2) t P(t), t = 1 / (1 + 0.35 |x|), with P fitted
   to the smallest largest relative error, 3.2e-8. */
INLINE __m512 normal_share(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), size = _mm512_abs_ps(x);
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(size, _mm512_set1_ps(0.35f), one));
    __m512 p = _mm512_set1_ps(-0.029144152f);
    const float c[] = {0.143962886f, -0.255695683f, 0.159152483f, -0.0230945564f, 0.105501368f, 0.119834596f, 0.139861624f, 0.139621419f};
    for (int j = 0; j < 8; j++) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(c[j]));
    const __m512 e = exp16(_mm512_mul_ps(_mm512_mul_ps(size, size), _mm512_set1_ps(-0.5f)));
    const __m512 above = _mm512_mul_ps(e, _mm512_mul_ps(p, t));
    return _mm512_mask_sub_ps(above, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), one, above);
}

INLINE __m512 activate(int kind, __m512 x) {
    if (kind == RELU) return _mm512_max_ps(_mm512_setzero_ps(), x); /* this order keeps a NaN of x */
    if (kind == SILU) return _mm512_mul_ps(x, sigmoid(x));
    if (kind == GELU) return _mm512_mul_ps(x, normal_share(x));
    if (kind == GELU_TANH) { /* x/2 (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3) */
        __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        __m512 u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
        return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(u, _mm512_set1_ps(1.59576912f))));
    }
    return x;
}

#endif
