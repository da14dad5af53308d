/* Experts, attention and gate on an x86-64 CPU: the module kernels._native. What it promises is in _native.pyi.
 *
 * A row's bits depend on nothing but the row (and, in attention, its sequence): no sum is split by the number of rows,
 * of threads, or the processor. Compiled without contraction, so that each fused multiply-add is one that is written.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16         /* floats of a vec */
#define PANEL 64         /* weights lie in panels of so many outputs: [panel][k][PANEL] */
#define LINE 64          /* bytes of a cache line */
#define AHEAD 4096       /* bytes between a weight's load and its prefetch; from 2 to 8 KiB all do as well */
#define TALLEST 6        /* rows of a tile */
#define BLOCK 512        /* keys of a block of the KV cache */
#define MAX_DIM 256      /* of a head */
#define MAX_QUERIES 32   /* heads of the rows that attend together */

/* The addresses that Python fills in; see kernels/native_decoder.py. */
struct weight {
    const void *panels;
    int64_t n, k, fp32; /* else fp16 */
};

struct model {
    int64_t hidden, heads, kv_heads, dim, experts, top_k, over_chosen;
    const float *cosines, *sines; /* [positions, dim / 2] */
    double eps;
};

struct layer {
    const float *attention_norm, *experts_norm, *query_norm, *key_norm; /* the last two NULL: none */
    struct weight qkv, o_proj, gate;
    float *cache; /* [slots, 2, kv_heads, dim] */
};

struct batch {
    int64_t rows, groups;
    const int64_t *positions, *tables; /* [rows]; tables: the address of its sequence's blocks, int64 each */
    const int64_t *group_starts;       /* [groups + 1]: rows of one sequence that attend together */
    float *residual, *expert_input;    /* [rows, hidden] */
    int64_t *topk_ids;                 /* [rows, top_k] */
    float *topk_weights;               /* [rows, top_k] */
    float *qkv, *mixed, *scores;       /* room: [rows, max(all heads * dim, hidden)], [rows, heads * dim], [rows, experts] */
};

#define STRUCT_BYTES (sizeof(struct weight) + sizeof(struct model) + sizeof(struct layer) + sizeof(struct batch))

typedef void (*tile_function)(const void *panel, Py_ssize_t k, const float *x, Py_ssize_t x_stride, float *out,
                              Py_ssize_t out_stride);

struct functions {
    void (*linear)(struct weight, const float *, Py_ssize_t, Py_ssize_t, float *, Py_ssize_t, int);
    void (*rms_norm)(const float *, const float *, float, Py_ssize_t, float *);
    void (*until_experts)(const struct model *, const struct layer *, const struct batch *, int);
    void (*after_experts)(const struct model *, const struct batch *, const float *);
    void (*expert_ffn)(struct weight, struct weight, const float *, Py_ssize_t, float *, float *, int);
};

#include "vector_avx512.h"
#include "elementwise.h"
#include "linear.h"
#include "attention.h"
#include "segment.h"
#undef TARGET
#undef NAME
#undef vec
#undef INLINE
#undef TILES
#include "vector_avx2.h"
#include "elementwise.h"
#include "linear.h"
#include "attention.h"
#include "segment.h"

static const struct functions *here; /* those of the instruction set in use */

/* Not all compilers' __builtin_cpu_supports know it. */
static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

/* Take the instruction set of that name; 0 where the processor does not have it. */
static int use(const char *name)
{
    if (!strcmp(name, "avx512") && __builtin_cpu_supports("avx512f"))
        here = &functions_avx512;
    else if (!strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
        here = &functions_avx2;
    else
        return 0;
    return 1;
}

#define PACK(NAME, TYPE)                                                                                               \
    static void NAME(const TYPE *weight, Py_ssize_t n, Py_ssize_t k, TYPE *packed)                                     \
    {                                                                                                                  \
        for (Py_ssize_t first = 0; first < n; first += PANEL, packed += k * PANEL) {                                   \
            Py_ssize_t columns = n - first < PANEL ? n - first : PANEL;                                                \
            const TYPE *rows = weight + first * k;                                                                     \
            for (Py_ssize_t i = 0; i < k; i++)                                                                         \
                for (Py_ssize_t c = 0; c < PANEL; c++)                                                                 \
                    packed[i * PANEL + c] = c < columns ? rows[c * k + i] : 0;                                         \
        }                                                                                                              \
    }
PACK(pack_fp16, uint16_t)
PACK(pack_fp32, float)

/* --- Python --- */

#define MOST_ARGUMENTS 7

/* The integers of a call; -1 with an exception set when there are not `count`. */
static int integers(PyObject *const *arguments, Py_ssize_t given, Py_ssize_t count, Py_ssize_t *values)
{
    if (given != count) {
        PyErr_Format(PyExc_TypeError, "%zd arguments instead of %zd", given, count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        values[i] = PyLong_AsSsize_t(arguments[i]);
        if (values[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

/* A function of `count` integers a[0], a[1], ...; other threads may run meanwhile. */
#define FUNCTION(name, count, call)                                                                                    \
    static PyObject *py_##name(PyObject *module, PyObject *const *arguments, Py_ssize_t given)                         \
    {                                                                                                                  \
        Py_ssize_t a[MOST_ARGUMENTS];                                                                                  \
        (void)module;                                                                                                  \
        if (integers(arguments, given, count, a) < 0)                                                                  \
            return NULL;                                                                                               \
        Py_BEGIN_ALLOW_THREADS;                                                                                        \
        call;                                                                                                          \
        Py_END_ALLOW_THREADS;                                                                                          \
        Py_RETURN_NONE;                                                                                                \
    }

FUNCTION(pack_fp16, 4, pack_fp16((const uint16_t *)a[0], a[1], a[2], (uint16_t *)a[3]))
FUNCTION(pack_fp32, 4, pack_fp32((const float *)a[0], a[1], a[2], (float *)a[3]))
FUNCTION(linear, 7, here->linear(*(const struct weight *)a[0], (const float *)a[1], a[2], a[3], (float *)a[4], a[5],
                                 (int)a[6]))
FUNCTION(expert_ffn, 7, here->expert_ffn(*(const struct weight *)a[0], *(const struct weight *)a[1], (const float *)a[2],
                                         a[3], (float *)a[4], (float *)a[5], (int)a[6]))
FUNCTION(until_experts, 4, here->until_experts((const struct model *)a[0], (const struct layer *)a[1],
                                               (const struct batch *)a[2], (int)a[3]))
FUNCTION(after_experts, 3, here->after_experts((const struct model *)a[0], (const struct batch *)a[1],
                                               (const float *)a[2]))

static PyObject *py_rms_norm(PyObject *module, PyObject *arguments)
{
    Py_ssize_t x, weight, rows, n, out;
    float eps;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "nnfnnn", &x, &weight, &eps, &rows, &n, &out))
        return NULL;
    for (Py_ssize_t r = 0; r < rows; r++)
        here->rms_norm((const float *)x + r * n, (const float *)weight, eps, n, (float *)out + r * n);
    Py_RETURN_NONE;
}

static PyObject *py_use(PyObject *module, PyObject *name)
{
    (void)module;
    const char *text = PyUnicode_AsUTF8(name);
    return text ? PyBool_FromLong(use(text)) : NULL;
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    METHOD(pack_fp16), METHOD(pack_fp32), METHOD(linear), METHOD(expert_ffn), METHOD(until_experts), METHOD(after_experts),
    {"rms_norm", py_rms_norm, METH_VARARGS, NULL}, {"use", py_use, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "kernels._native", "See _native.pyi.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
    __builtin_cpu_init();
    if (!use("avx512") && !use("avx2")) {
        PyErr_SetString(PyExc_ImportError, "this processor has no AVX2 with FMA and F16C");
        return NULL;
    }
    PyObject *module = PyModule_Create(&definition);
    if (module && (PyModule_AddIntConstant(module, "PANEL", PANEL) < 0 ||
                   PyModule_AddIntConstant(module, "BLOCK", BLOCK) < 0 ||
                   PyModule_AddIntConstant(module, "MAX_DIM", MAX_DIM) < 0 ||
                   PyModule_AddIntConstant(module, "MAX_QUERIES", MAX_QUERIES) < 0 ||
                   PyModule_AddIntConstant(module, "STRUCT_BYTES", STRUCT_BYTES) < 0))
        Py_CLEAR(module);
    return module;
}
