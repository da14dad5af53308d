/* Sixteen floats as AVX2 has them: two registers. */
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define NAME(x) x##_avx2
#define vec vec_avx2
#define INLINE TARGET static inline __attribute__((always_inline))

typedef struct {
    __m256 lo, hi;
} vec;

INLINE vec NAME(all)(float f) { return (vec){_mm256_set1_ps(f), _mm256_set1_ps(f)}; }
INLINE vec NAME(zero)(void) { return (vec){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE vec NAME(load)(const float *p) { return (vec){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void NAME(store)(float *p, vec v) { _mm256_storeu_ps(p, v.lo), _mm256_storeu_ps(p + 8, v.hi); }
INLINE vec NAME(widen)(const uint16_t *p)
{
    return (vec){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                 _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
INLINE vec NAME(add)(vec a, vec b) { return (vec){_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
INLINE vec NAME(sub)(vec a, vec b) { return (vec){_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
INLINE vec NAME(mul)(vec a, vec b) { return (vec){_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
INLINE vec NAME(quotient)(vec a, vec b) { return (vec){_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
INLINE vec NAME(least)(vec a, vec b) { return (vec){_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
INLINE vec NAME(most)(vec a, vec b) { return (vec){_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
INLINE vec NAME(fma)(vec a, vec b, vec c)
{
    return (vec){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
INLINE __m256 NAME(lower)(vec v) { return v.lo; }
INLINE __m256 NAME(upper)(vec v) { return v.hi; }
INLINE __m256 NAME(nearest_of)(__m256 v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec NAME(nearest)(vec v) { return (vec){NAME(nearest_of)(v.lo), NAME(nearest_of)(v.hi)}; }

INLINE __m256 NAME(power_of_two_of)(__m256 n)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

/* 2^n of whole numbers from -126 to 127 */
INLINE vec NAME(power_of_two)(vec n) { return (vec){NAME(power_of_two_of)(n.lo), NAME(power_of_two_of)(n.hi)}; }

/* v, but 0 where a < b */
INLINE vec NAME(unless_less)(vec a, vec b, vec v)
{
    return (vec){_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ), v.lo),
                 _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ), v.hi)};
}

#define TILES TILE(1, 4) TILE(2, 2) TILE(3, 2) TILE(4, 1) TILE(5, 1) TILE(6, 1)
