/* What lies between two layers' experts, and one expert; compiled once for each instruction set. */

/* Attention and gate of a layer: fills b->expert_input, b->topk_ids and b->topk_weights. */
TARGET static void NAME(until_experts)(const struct model *m, const struct layer *l, const struct batch *b, int threads)
{
    Py_ssize_t hidden = m->hidden, dim = m->dim, keys_from = m->heads * dim, turned = m->heads + m->kv_heads;
    Py_ssize_t stride = 2 * m->kv_heads * dim, width = keys_from + stride;
    for (Py_ssize_t r = 0; r < b->rows; r++)
        NAME(rms_norm)(b->residual + r * hidden, l->attention_norm, m->eps, hidden, b->expert_input + r * hidden);
    NAME(linear)(l->qkv, b->expert_input, hidden, b->rows, b->qkv, width, threads);
    for (Py_ssize_t r = 0; r < b->rows; r++) {
        float *row = b->qkv + r * width;
        int64_t position = b->positions[r];
        const float *cosines = m->cosines + position * (dim / 2), *sines = m->sines + position * (dim / 2);
        for (Py_ssize_t h = 0; h < turned; h++) {
            if (l->query_norm) {
                const float *weight = h < m->heads ? l->query_norm : l->key_norm;
                NAME(rms_norm)(row + h * dim, weight, m->eps, dim, row + h * dim);
            }
            NAME(rotate)(row + h * dim, cosines, sines, dim);
        }
        int64_t slot = ((const int64_t *)b->tables[r])[position / BLOCK] * BLOCK + position % BLOCK;
        memcpy(l->cache + slot * stride, row + keys_from, stride * sizeof(float));
    }
    NAME(attend)(m, b, l->cache, threads);
    float *gained = b->qkv; /* no longer needed, and wide enough */
    NAME(linear)(l->o_proj, b->mixed, keys_from, b->rows, gained, hidden, threads);
    for (Py_ssize_t r = 0; r < b->rows; r++) {
        float *residual = b->residual + r * hidden;
        for (Py_ssize_t i = 0; i < hidden; i++)
            residual[i] += gained[r * hidden + i];
        NAME(rms_norm)(residual, l->experts_norm, m->eps, hidden, b->expert_input + r * hidden);
    }
    NAME(linear)(l->gate, b->expert_input, hidden, b->rows, b->scores, m->experts, threads);
    for (Py_ssize_t r = 0; r < b->rows; r++)
        NAME(choose)(b->scores + r * m->experts, m->experts, m->top_k, m->over_chosen, b->topk_ids + r * m->top_k,
                     b->topk_weights + r * m->top_k);
}

/* The experts' outputs [rows, k, hidden], weighted, onto the residual. */
TARGET static void NAME(after_experts)(const struct model *m, const struct batch *b, const float *outputs)
{
    for (Py_ssize_t r = 0; r < b->rows; r++)
        NAME(combine)(b->residual + r * m->hidden, outputs + r * m->top_k * m->hidden, b->topk_weights + r * m->top_k,
                      m->top_k, m->hidden);
}

/* down(silu(gate(x)) * up(x)); `both` is room for [rows, 2 * inter]. */
TARGET static void NAME(expert_ffn)(struct weight gate_up, struct weight down, const float *x, Py_ssize_t rows,
                                    float *both, float *out, int threads)
{
    Py_ssize_t inter = down.k, hidden = down.n;
    NAME(linear)(gate_up, x, hidden, rows, both, 2 * inter, threads);
    for (Py_ssize_t r = 0; r < rows; r++)
        NAME(swiglu)(both + r * 2 * inter, both + r * 2 * inter + inter, inter);
    NAME(linear)(down, both, 2 * inter, rows, out, hidden, threads);
}

static const struct functions NAME(functions) = {
    NAME(linear), NAME(rms_norm), NAME(until_experts), NAME(after_experts), NAME(expert_ffn),
};
