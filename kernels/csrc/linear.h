/* Products of fp32 rows with packed weights, fp16 or fp32; compiled once for each instruction set.
 *
 * Each output is one lane's sum over k upwards by fused multiply-add, so that its bits depend on nothing else.
 * TILES lists TILE(rows, vectors): a tile has so many rows, and goes over the panel's columns by so many vectors.
 */
#define TILE_OF(KIND, TYPE, WEIGHT, R, C)                                                                              \
    TARGET static void NAME(KIND##_tile_##R)(const void *panel, Py_ssize_t k, const float *x, Py_ssize_t x_stride,     \
                                             float *out, Py_ssize_t out_stride)                                        \
    {                                                                                                                  \
        for (int column = 0; column < PANEL; column += (C) * LANES) {                                                  \
            vec sum[R][C];                                                                                             \
            for (int r = 0; r < (R); r++)                                                                              \
                for (int c = 0; c < (C); c++)                                                                          \
                    sum[r][c] = NAME(zero)();                                                                          \
            const TYPE *w = (const TYPE *)panel + column;                                                              \
            for (Py_ssize_t i = 0; i < k; i++, w += PANEL) {                                                           \
                for (int c = 0; c < (C) * LANES; c += LINE / sizeof(TYPE))                                             \
                    __builtin_prefetch(w + AHEAD / sizeof(TYPE) + c);                                                  \
                vec weight[C];                                                                                         \
                for (int c = 0; c < (C); c++)                                                                          \
                    weight[c] = NAME(WEIGHT)(w + c * LANES);                                                           \
                for (int r = 0; r < (R); r++) {                                                                        \
                    vec value = NAME(all)(x[r * x_stride + i]);                                                        \
                    for (int c = 0; c < (C); c++)                                                                      \
                        sum[r][c] = NAME(fma)(value, weight[c], sum[r][c]);                                            \
                }                                                                                                      \
            }                                                                                                          \
            for (int r = 0; r < (R); r++)                                                                              \
                for (int c = 0; c < (C); c++)                                                                          \
                    NAME(store)(out + r * out_stride + column + c * LANES, sum[r][c]);                                 \
        }                                                                                                              \
    }
#define TILE(R, C) TILE_OF(fp16, uint16_t, widen, R, C) TILE_OF(fp32, float, load, R, C)
TILES
#undef TILE
#undef TILE_OF

#define TILE(R, C) [R] = {NAME(fp16_tile_##R), NAME(fp32_tile_##R)},
static const tile_function NAME(tiles)[TALLEST + 1][2] = {TILES};
#undef TILE

/* The first `columns` outputs of panel p for all rows, in tiles of about the same height. */
TARGET static void NAME(panel_product)(struct weight w, Py_ssize_t p, Py_ssize_t columns, const float *x,
                                       Py_ssize_t x_stride, Py_ssize_t rows, float *out, Py_ssize_t out_stride)
{
    const char *panel = (const char *)w.panels + p * w.k * PANEL * (w.fp32 ? sizeof(float) : sizeof(uint16_t));
    float whole[TALLEST * PANEL];
    out += p * PANEL;
    while (rows > 0) {
        Py_ssize_t tiles_left = (rows + TALLEST - 1) / TALLEST, height = (rows + tiles_left - 1) / tiles_left;
        tile_function tile = NAME(tiles)[height][w.fp32];
        if (columns == PANEL)
            tile(panel, w.k, x, x_stride, out, out_stride);
        else {
            tile(panel, w.k, x, x_stride, whole, PANEL);
            for (Py_ssize_t r = 0; r < height; r++)
                memcpy(out + r * out_stride, whole + r * PANEL, columns * sizeof(float));
        }
        x += height * x_stride;
        out += height * out_stride;
        rows -= height;
    }
}

/* out [rows, w.n] = x [rows, w.k] times the weight transposed. */
TARGET static void NAME(linear)(struct weight w, const float *x, Py_ssize_t x_stride, Py_ssize_t rows, float *out,
                                Py_ssize_t out_stride, int threads)
{
    Py_ssize_t panels = (w.n + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) if (threads > 1 && panels > 1)
    for (Py_ssize_t p = 0; p < panels; p++) {
        Py_ssize_t columns = w.n - p * PANEL < PANEL ? w.n - p * PANEL : PANEL;
        NAME(panel_product)(w, p, columns, x, x_stride, rows, out, out_stride);
    }
}
