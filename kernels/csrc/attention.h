/* Paged attention; compiled once for each instruction set.
 *
 * A row walks its keys in blocks of BLOCK from the first on and rescales what it has when a block brings a new maximum
 * (flash attention's online softmax). What it computes depends on its own query and keys alone. Rows of one sequence go
 * together only to read and transpose keys once for all of them.
 */

/* LANES keys of `dim` floats, `stride` apart, as [dim][LANES]. */
TARGET static void NAME(transpose_keys)(const float *keys, Py_ssize_t stride, Py_ssize_t dim, float *transposed)
{
    for (Py_ssize_t d = 0; d < dim; d++)
        for (int key = 0; key < LANES; key++)
            transposed[d * LANES + key] = keys[key * stride + d];
}

/* Scores of LANES keys for H queries. */
#define SCORE(H)                                                                                                       \
    TARGET static void NAME(score_##H)(const float *queries, const float *transposed, Py_ssize_t dim, float *scores)   \
    {                                                                                                                  \
        vec sum[H];                                                                                                    \
        for (int h = 0; h < (H); h++)                                                                                  \
            sum[h] = NAME(zero)();                                                                                     \
        for (Py_ssize_t d = 0; d < dim; d++) {                                                                         \
            vec key = NAME(load)(transposed + d * LANES);                                                              \
            for (int h = 0; h < (H); h++)                                                                              \
                sum[h] = NAME(fma)(NAME(all)(queries[h * dim + d]), key, sum[h]);                                      \
        }                                                                                                              \
        for (int h = 0; h < (H); h++)                                                                                  \
            NAME(store)(scores + h * BLOCK, sum[h]);                                                                   \
    }
SCORE(1) SCORE(2) SCORE(4)
#undef SCORE

/* sums[h] += the values of `count` keys by their shares, C vectors of H heads. */
#define WEIGH(H, C)                                                                                                    \
    TARGET static void NAME(weigh_##H##_##C)(const float *shares, const float *values, Py_ssize_t stride,              \
                                             Py_ssize_t count, float *sums, Py_ssize_t dim)                            \
    {                                                                                                                  \
        vec sum[H][C];                                                                                                 \
        for (int h = 0; h < (H); h++)                                                                                  \
            for (int c = 0; c < (C); c++)                                                                              \
                sum[h][c] = NAME(load)(sums + h * dim + c * LANES);                                                    \
        for (Py_ssize_t key = 0; key < count; key++)                                                                   \
            for (int c = 0; c < (C); c++) {                                                                            \
                vec value = NAME(load)(values + key * stride + c * LANES);                                             \
                for (int h = 0; h < (H); h++)                                                                          \
                    sum[h][c] = NAME(fma)(NAME(all)(shares[h * BLOCK + key]), value, sum[h][c]);                       \
            }                                                                                                          \
        for (int h = 0; h < (H); h++)                                                                                  \
            for (int c = 0; c < (C); c++)                                                                              \
                NAME(store)(sums + h * dim + c * LANES, sum[h][c]);                                                    \
    }
WEIGH(1, 1) WEIGH(2, 1) WEIGH(1, 4) WEIGH(2, 4)
#undef WEIGH

/* The block's scores of one head become shares: updates the row's maximum and total; what its sums are to be multiplied
 * with. Only the first `count` keys are the row's. */
TARGET static float NAME(share)(float *scores, Py_ssize_t count, float *highest, float *total)
{
    Py_ssize_t padded = (count + LANES - 1) / LANES * LANES;
    for (Py_ssize_t key = count; key < padded; key++)
        scores[key] = -INFINITY;
    vec most = NAME(load)(scores);
    for (Py_ssize_t key = LANES; key < padded; key += LANES)
        most = NAME(most)(most, NAME(load)(scores + key));
    float before = *highest, now = NAME(most_of)(most);
    now = before > now ? before : now;
    vec sum = NAME(zero)();
    for (Py_ssize_t key = 0; key < padded; key += LANES) {
        vec e = NAME(exponential)(NAME(sub)(NAME(load)(scores + key), NAME(all)(now)));
        NAME(store)(scores + key, e);
        sum = NAME(add)(sum, e);
    }
    float lanes[LANES];
    NAME(store)(lanes, NAME(exponential)(NAME(all)(before - now)));
    *highest = now;
    *total = *total * lanes[0] + NAME(sum_of)(sum);
    return lanes[0];
}

/* Rows [first, last) of one sequence, at consecutive positions, for one head of keys: see attend. */
TARGET static void NAME(attend_group)(const struct model *m, const struct batch *b, const float *cache, Py_ssize_t first,
                                      Py_ssize_t last, Py_ssize_t kv_head)
{
    Py_ssize_t dim = m->dim, group = m->heads / m->kv_heads, heads = (last - first) * group;
    Py_ssize_t stride = 2 * m->kv_heads * dim, width = (m->heads + 2 * m->kv_heads) * dim;
    const int64_t *table = (const int64_t *)b->tables[first];
    float queries[MAX_QUERIES * MAX_DIM], sums[MAX_QUERIES * MAX_DIM], transposed[LANES * MAX_DIM];
    float scores[MAX_QUERIES * BLOCK], highest[MAX_QUERIES], total[MAX_QUERIES];
    float scale = 1.0f / sqrtf((float)dim);
    for (Py_ssize_t q = 0; q < heads; q++) {
        const float *query = b->qkv + (first + q / group) * width + (kv_head * group + q % group) * dim;
        for (Py_ssize_t d = 0; d < dim; d++)
            queries[q * dim + d] = query[d] * scale, sums[q * dim + d] = 0.0f;
        highest[q] = -INFINITY, total[q] = 0.0f;
    }
    for (Py_ssize_t start = 0; start <= b->positions[last - 1]; start += BLOCK, table++) {
        const float *keys = cache + *table * BLOCK * stride + kv_head * dim, *values = keys + m->kv_heads * dim;
        Py_ssize_t seen = b->positions[last - 1] + 1 - start; /* by the last row */
        seen = seen < BLOCK ? seen : BLOCK;
        for (Py_ssize_t key = 0; key < seen; key += LANES) {
            NAME(transpose_keys)(keys + key * stride, stride, dim, transposed);
            Py_ssize_t q = 0;
            for (; q + 4 <= heads; q += 4)
                NAME(score_4)(queries + q * dim, transposed, dim, scores + q * BLOCK + key);
            for (; q + 2 <= heads; q += 2)
                NAME(score_2)(queries + q * dim, transposed, dim, scores + q * BLOCK + key);
            if (q < heads)
                NAME(score_1)(queries + q * dim, transposed, dim, scores + q * BLOCK + key);
        }
        for (Py_ssize_t q = 0; q < heads; q++) {
            Py_ssize_t count = b->positions[first + q / group] + 1 - start;
            count = count < BLOCK ? count : BLOCK;
            if (count <= 0)
                continue;
            float factor = NAME(share)(scores + q * BLOCK, count, highest + q, total + q);
            for (Py_ssize_t d = 0; d < dim; d++)
                sums[q * dim + d] *= factor;
        }
        for (Py_ssize_t row = first; row < last; row++) {
            Py_ssize_t count = b->positions[row] + 1 - start, q = (row - first) * group, end = q + group;
            count = count < BLOCK ? count : BLOCK;
            for (; q < end; q += 2)
                for (Py_ssize_t d = 0; d < dim;) {
                    int wide = dim - d >= 4 * LANES;
                    float *into = sums + q * dim + d;
                    if (wide && q + 1 < end)
                        NAME(weigh_2_4)(scores + q * BLOCK, values + d, stride, count, into, dim);
                    else if (wide)
                        NAME(weigh_1_4)(scores + q * BLOCK, values + d, stride, count, into, dim);
                    else if (q + 1 < end)
                        NAME(weigh_2_1)(scores + q * BLOCK, values + d, stride, count, into, dim);
                    else
                        NAME(weigh_1_1)(scores + q * BLOCK, values + d, stride, count, into, dim);
                    d += wide ? 4 * LANES : LANES;
                }
        }
    }
    for (Py_ssize_t q = 0; q < heads; q++) {
        float *out = b->mixed + (first + q / group) * m->heads * dim + (kv_head * group + q % group) * dim;
        for (Py_ssize_t d = 0; d < dim; d++)
            out[d] = sums[q * dim + d] / total[q];
    }
}

/* Every row's attention over its keys: from b->qkv to b->mixed. */
TARGET static void NAME(attend)(const struct model *m, const struct batch *b, const float *cache, int threads)
{
    Py_ssize_t parts = b->groups * m->kv_heads;
#pragma omp parallel for num_threads(threads) if (threads > 1 && parts > 1) schedule(dynamic)
    for (Py_ssize_t part = 0; part < parts; part++) {
        Py_ssize_t group = part / m->kv_heads;
        NAME(attend_group)(m, b, cache, b->group_starts[group], b->group_starts[group + 1], part % m->kv_heads);
    }
}
