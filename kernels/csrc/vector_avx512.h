/* Sixteen floats as AVX-512 has them. */
#define TARGET __attribute__((target("avx512f")))
#define NAME(x) x##_avx512
#define vec vec_avx512
#define INLINE TARGET static inline __attribute__((always_inline))

typedef __m512 vec;

INLINE vec NAME(zero)(void) { return _mm512_setzero_ps(); }
INLINE vec NAME(all)(float f) { return _mm512_set1_ps(f); }
INLINE vec NAME(load)(const float *p) { return _mm512_loadu_ps(p); }
INLINE void NAME(store)(float *p, vec v) { _mm512_storeu_ps(p, v); }
INLINE vec NAME(widen)(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vec NAME(add)(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec NAME(sub)(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec NAME(mul)(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec NAME(quotient)(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec NAME(least)(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec NAME(most)(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec NAME(fma)(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE __m256 NAME(lower)(vec v) { return _mm512_castps512_ps256(v); }
INLINE __m256 NAME(upper)(vec v) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)); }
INLINE vec NAME(nearest)(vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }

/* 2^n of whole numbers from -126 to 127 */
INLINE vec NAME(power_of_two)(vec n)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}

/* v, but 0 where a < b */
INLINE vec NAME(unless_less)(vec a, vec b, vec v)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), v);
}

#define TILES TILE(1, 4) TILE(2, 4) TILE(3, 4) TILE(4, 4) TILE(5, 4) TILE(6, 4)
