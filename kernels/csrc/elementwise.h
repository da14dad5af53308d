/* What is done to one row by itself; compiled once for each instruction set. */

/* The sum of all lanes, halves onto halves; the same order for each instruction set. */
INLINE float NAME(sum_of)(vec v)
{
    __m256 eight = _mm256_add_ps(NAME(lower)(v), NAME(upper)(v));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE float NAME(most_of)(vec v)
{
    float lanes[LANES], most;
    NAME(store)(lanes, v);
    most = lanes[0];
    for (int i = 1; i < LANES; i++)
        most = lanes[i] > most ? lanes[i] : most;
    return most;
}

/* The first `count` floats at p, and zeros. */
INLINE vec NAME(load_some)(const float *p, Py_ssize_t count)
{
    float lanes[LANES] = {0};
    memcpy(lanes, p, count * sizeof(float));
    return NAME(load)(lanes);
}

INLINE void NAME(store_some)(float *p, vec v, Py_ssize_t count)
{
    float lanes[LANES];
    NAME(store)(lanes, v);
    memcpy(p, lanes, count * sizeof(float));
}

/* e^v to 2 units in the last place; 0 below -87, infinity from 88 on, NaN of NaN: min and max return their second operand
 * then. The polynomial is that of Cephes' expf. */
INLINE vec NAME(exponential)(vec v)
{
    vec x = NAME(least)(NAME(all)(88.0f), NAME(most)(NAME(all)(-87.0f), v));
    vec n = NAME(nearest)(NAME(mul)(x, NAME(all)(1.44269504088896341f)));
    vec r = NAME(fma)(n, NAME(all)(-0.693359375f), x);
    r = NAME(fma)(n, NAME(all)(2.12194440e-4f), r);
    vec p = NAME(all)(1.9875691500e-4f);
    p = NAME(fma)(p, r, NAME(all)(1.3981999507e-3f));
    p = NAME(fma)(p, r, NAME(all)(8.3334519073e-3f));
    p = NAME(fma)(p, r, NAME(all)(4.1665795894e-2f));
    p = NAME(fma)(p, r, NAME(all)(1.6666665459e-1f));
    p = NAME(fma)(p, r, NAME(all)(5.0000001201e-1f));
    p = NAME(fma)(p, NAME(mul)(r, r), NAME(add)(r, NAME(all)(1.0f)));
    vec finite = NAME(unless_less)(v, NAME(all)(-87.0f), NAME(mul)(p, NAME(power_of_two)(n)));
    return NAME(add)(finite, NAME(unless_less)(v, NAME(all)(88.0f), NAME(all)(INFINITY)));
}

/* out = x / sqrt(mean(x^2) + eps) * weight; out may be x */
TARGET static void NAME(rms_norm)(const float *x, const float *weight, float eps, Py_ssize_t n, float *out)
{
    vec squares = NAME(zero)();
    Py_ssize_t whole = n - n % LANES, rest = n - whole;
    for (Py_ssize_t i = 0; i < whole; i += LANES) {
        vec v = NAME(load)(x + i);
        squares = NAME(fma)(v, v, squares);
    }
    if (rest) {
        vec v = NAME(load_some)(x + whole, rest);
        squares = NAME(fma)(v, v, squares);
    }
    float scale = 1.0f / sqrtf(NAME(sum_of)(squares) / (float)n + eps);
    for (Py_ssize_t i = 0; i < n; i++)
        out[i] = x[i] * scale * weight[i];
}

/* gate = gate / (1 + e^-gate) * up */
TARGET static void NAME(swiglu)(float *gate, const float *up, Py_ssize_t n)
{
    for (Py_ssize_t i = 0; i < n; i += LANES) {
        Py_ssize_t count = n - i < LANES ? n - i : LANES;
        vec g = count == LANES ? NAME(load)(gate + i) : NAME(load_some)(gate + i, count);
        vec u = count == LANES ? NAME(load)(up + i) : NAME(load_some)(up + i, count);
        vec denominator = NAME(add)(NAME(all)(1.0f), NAME(exponential)(NAME(sub)(NAME(zero)(), g)));
        vec result = NAME(mul)(NAME(quotient)(g, denominator), u);
        if (count == LANES)
            NAME(store)(gate + i, result);
        else
            NAME(store_some)(gate + i, result, count);
    }
}

/* The rotary embedding: turn each pair (i, i + dim / 2) of a head. */
TARGET static void NAME(rotate)(float *head, const float *cosines, const float *sines, Py_ssize_t dim)
{
    Py_ssize_t half = dim / 2;
    for (Py_ssize_t i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = __builtin_fmaf(-b, sines[i], a * cosines[i]);
        head[i + half] = __builtin_fmaf(a, sines[i], b * cosines[i]);
    }
}

/* into += weights[j] * outputs[j], j upwards */
TARGET static void NAME(combine)(float *into, const float *outputs, const float *weights, Py_ssize_t k, Py_ssize_t n)
{
    for (Py_ssize_t j = 0; j < k; j++)
        for (Py_ssize_t i = 0; i < n; i++)
            into[i] = into[i] + weights[j] * outputs[j * n + i];
}

/* The k highest of n scores, the lower index first among equals, and their weights: a softmax over the chosen, or the
 * chosen of a softmax over all. Overwrites the scores. */
TARGET static void NAME(choose)(float *scores, Py_ssize_t n, Py_ssize_t k, int over_chosen, int64_t *ids, float *weights)
{
    float total = 0.0f, highest = 0.0f;
    for (Py_ssize_t j = 0; j < k; j++) {
        Py_ssize_t best = -1;
        for (Py_ssize_t i = 0; i < n; i++)
            if (scores[i] > (best < 0 ? -INFINITY : scores[best]))
                best = i;
        for (Py_ssize_t i = 0; best < 0; i++) { /* only NaN and -inf are left: the first that is not chosen */
            best = i;
            for (Py_ssize_t before = 0; before < j; before++)
                if (ids[before] == i)
                    best = -1;
        }
        ids[j] = best;
        weights[j] = scores[best];
        if (j == 0)
            highest = scores[best];
        scores[best] = -INFINITY;
    }
    if (!over_chosen) /* those not chosen count as well */
        for (Py_ssize_t i = 0; i < n; i += LANES) {
            vec v = n - i < LANES ? NAME(load_some)(scores + i, n - i) : NAME(load)(scores + i);
            vec e = NAME(exponential)(NAME(sub)(v, NAME(all)(highest)));
            float lanes[LANES];
            NAME(store)(lanes, e);
            for (Py_ssize_t l = 0; l < LANES && i + l < n; l++)
                total += lanes[l];
        }
    for (Py_ssize_t j = 0; j < k; j += LANES) {
        Py_ssize_t count = k - j < LANES ? k - j : LANES;
        vec e = NAME(exponential)(NAME(sub)(NAME(load_some)(weights + j, count), NAME(all)(highest)));
        NAME(store_some)(weights + j, e, count);
    }
    for (Py_ssize_t j = 0; j < k; j++)
        total += weights[j];
    for (Py_ssize_t j = 0; j < k; j++)
        weights[j] /= total;
}
