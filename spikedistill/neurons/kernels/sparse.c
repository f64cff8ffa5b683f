/* Convolutions of spikes, which add up weights where there are spikes and do nothing where there are none.
 *
 * Stride 1, odd square kernels, zero padding that keeps the size, channels last: x [N, H, W, C], out [N, H, W, O].
 * A dense product of matrices multiplies every element; with one spike among twenty this does a twentieth of the work,
 * several times more slowly. Sums are in float32. Nothing depends on the number of threads.
 *
 *   SPIKES    which elements of x are not 0, one bit each, and how many; it may stop once there are more than `allowed`
 *   FORWARD   out = the convolution: for each pixel, the rows of the weight that its window's spikes select, added up
 *   WEIGHTS   out = the gradient of the weight: for each channel, the gradients around its spikes, added up
 *
 * An element that is 0 adds nothing even where a weight or a gradient is infinite or NaN.
 */

#include "native.h"

#ifdef DOT
#include <immintrin.h>
#endif

enum { SPIKES, FORWARD, WEIGHTS };  /* Conv.op */

#define LANES 16        /* floats in a vector */
#define PIXELS 2048     /* a chunk of SPIKES */
#define ROWS 8          /* a chunk of FORWARD: lines of pixels */
#define OUTPUTS 32      /* a chunk of WEIGHTS: at most so many of O, and 64 of C */
#ifndef STRIP
#define STRIP 98304     /* bytes of gradients that stay near while it visits each channel */
#endif

typedef struct {  /* 8 bytes a field, in the order of sparse.py */
    const void *x;          /* [N, H, W, C]; only SPIKES reads it where `binary` */
    uint64_t *bits;         /* [N, H, W, words], words = ceil(C / 64); SPIKES writes them */
    const void *weight;     /* [O, C, K, K] with strides `across` */
    const float *bias;      /* [O] or null */
    const void *grad;       /* [N, H, W, O], of out */
    void *out;              /* [N, H, W, O], or the gradient of the weight, with its strides; SPIKES: i64 [2], at first 0 */
    i64 op, bf16, images, height, width, channels, outputs, kernel, binary, allowed, threads;
    i64 across[4];
} Conv;

const i64 spikedistill_conv = sizeof(Conv);

typedef struct {
    Conv a;
    i64 words, pad, block, dot;
    void *packed;           /* [O / block, K across, K down, C, block], bfloat16 for `dot`, otherwise float32 */
} Work;

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define VEC(p) (*(unaligned *)(p))

/* ---- which elements are not 0 ------------------------------------------------------------------------------------- */

/* One word of n <= 64 elements; `other` gathers whether one is neither 0 nor 1. */
INLINE uint64_t word(const void *R x, i64 n, int bf16, uint8_t *R other)
{
    uint8_t some[64] = {0}, rest = 0;
    uint64_t bits = 0;
    for (i64 i = 0; i < n; i++) {
        uint32_t v = bf16 ? (uint32_t)((const uint16_t *)x)[i] << 16 : ((const uint32_t *)x)[i];
        some[i] = (v << 1) != 0;
        rest |= (uint8_t)(some[i] & (v != 0x3f800000));
    }
    for (int k = 0; k < 8; k++) {
        uint64_t bytes = 0;
        for (int i = 0; i < 8; i++) bytes |= (uint64_t)some[8 * k + i] << 8 * i;
        bits |= (bytes * 0x0102040810204080ull >> 56) << 8 * k;
    }
    *other |= rest;
    return bits;
}

INLINE void spikes(Work *w, i64 chunk, int bf16)
{
    i64 C = w->a.channels, pixels = w->a.images * w->a.height * w->a.width, width = bf16 ? 2 : 4, count = 0;
    uint8_t other = 0;
    if (__atomic_load_n((i64 *)w->a.out, __ATOMIC_RELAXED) > w->a.allowed) return;
    for (i64 p = chunk * PIXELS; p < least((chunk + 1) * PIXELS, pixels); p++)
        for (i64 q = 0; q < w->words; q++) {
            const char *x = (const char *)w->a.x + (p * C + 64 * q) * width;
            uint64_t b = C - 64 * q >= 64 ? word(x, 64, bf16, &other) : word(x, C - 64 * q, bf16, &other);
            w->a.bits[p * w->words + q] = b;
            count += __builtin_popcountll(b);
        }
    __atomic_fetch_add((i64 *)w->a.out, count, __ATOMIC_RELAXED);
    if (other) __atomic_store_n((i64 *)w->a.out + 1, 1, __ATOMIC_RELAXED);
}

/* ---- forward ------------------------------------------------------------------------------------------------------ */

/* The weight of one block of outputs and one column of the kernel, in the order in which `forward` reads it. */
static void pack(void *job, i64 chunk, float *scratch)
{
    Work *w = job;
    i64 K = w->a.kernel, C = w->a.channels, n = w->block, first = chunk / K * n, col = chunk % K, at = chunk * K * C * n;
    const i64 *s = w->a.across;
    (void)scratch;
    for (i64 row = 0; row < K; row++)
        for (i64 c = 0; c < C; c++)
            for (i64 o = 0; o < n; o++, at++) {
                i64 from = (first + o) * s[0] + c * s[1] + row * s[2] + col * s[3];
                if (w->dot) ((uint16_t *)w->packed)[at] = ((const uint16_t *)w->a.weight)[from];
                else ((float *)w->packed)[at] = load(w->a.weight, from, w->a.bf16 != 0);
            }
}

/* Some lines of pixels of one block of outputs. A line's window is K lines of x; its spikes are listed column by column,
 * so that those of a pixel are one run of the list, and `at` counts from the weights of column 0 in column 0. */
typedef struct { i64 first, line, end; const void *weight; int32_t *at, *start; float *value; } Lines;

INLINE Lines lines(const Work *w, i64 chunk, float *scratch)
{
    i64 K = w->a.kernel, W = w->a.width, C = w->a.channels, all = w->a.images * w->a.height;
    i64 chunks = (all + ROWS - 1) / ROWS, block = chunk / chunks, line = chunk % chunks * ROWS;
    int32_t *at = (int32_t *)scratch;
    const char *weight = (const char *)w->packed + block * K * K * C * w->block * (w->dot ? 2 : 4);
    return (Lines){block * w->block, line, least(line + ROWS, all), weight, at, at + K * W * C,
                   scratch + K * W * C + W + 1};
}

INLINE void list(const Work *w, const Lines *l, i64 r, int bf16, int binary)
{
    i64 H = w->a.height, W = w->a.width, C = w->a.channels, K = w->a.kernel, n = w->block, pad = w->pad;
    i64 y = r % H, k = 0, from = most(0, pad - y), to = least(K, H + pad - y);
    int32_t *R at = l->at, *R start = l->start;
    float *R value = l->value;
    for (i64 c = 0; c < W; c++) {
        start[c] = (int32_t)k;
        for (i64 row = from; row < to; row++) {
            i64 pixel = (r + row - pad) * W + c;
            for (i64 q = 0; q < w->words; q++) {
                int32_t base = (int32_t)(((c * K + row) * C + 64 * q) * n);
                for (uint64_t m = w->a.bits[pixel * w->words + q]; m; m &= m - 1) {
                    int i = __builtin_ctzll(m);
                    if (!binary) value[k] = load(w->a.x, pixel * C + 64 * q + i, bf16);
                    at[k++] = base + i * (int32_t)n;
                }
            }
        }
    }
    start[W] = (int32_t)k;
}

INLINE void forward(Work *w, i64 chunk, float *scratch, int vecs, int bf16, int binary)
{
    i64 W = w->a.width, n = LANES * vecs, pad = w->pad, width = bf16 ? 2 : 4;
    Lines l = lines(w, chunk, scratch);
    const int32_t *R at = l.at, *R start = l.start;
    const float *R value = l.value;
    float line[8 * LANES];
    for (i64 r = l.line; r < l.end; r++) {
        list(w, &l, r, bf16, binary);
        for (i64 c = 0; c < W; c++) {
            const float *R base = (const float *)l.weight - (c - pad) * w->a.kernel * w->a.channels * n;
            i64 end = start[least(c + pad + 1, W)];
            vec sum[8];
            for (int q = 0; q < vecs; q++) {
                sum[q] = (vec){0};
                if (w->a.bias) sum[q] = VEC(w->a.bias + l.first + LANES * q);
            }
            for (i64 e = start[most(c - pad, 0)]; e < end; e++)
                for (int q = 0; q < vecs; q++) {
                    vec v = VEC(base + at[e] + LANES * q);
                    sum[q] += binary ? v : value[e] * v;
                }
            for (int q = 0; q < vecs; q++) VEC(line + LANES * q) = sum[q];
            char *R out = (char *)w->a.out + ((r * W + c) * w->a.outputs + l.first) * width;
            for (i64 o = 0; o < n; o++) store(out, o, line[o], bf16);
        }
    }
}

/* ---- gradient of the weight --------------------------------------------------------------------------------------- */

/* A chunk is some outputs and one word of channels. The images stand one above the other, each in a frame of zeros, so
 * that pixel p of x meets the gradients at p - t for each tap t of the kernel; a strip of that is taken at a time. */
typedef struct { i64 n, P, all, rows, cap, word, first, many; void *grad; float *sums, *value; int32_t *list; } Strip;

static i64 strip_rows(const Work *w) { return most(1, STRIP / ((w->a.width + 2) * w->block * (w->dot ? 2 : 4)) - 2); }

static size_t strip_floats(const Work *w)
{
    i64 rows = strip_rows(w), K = w->a.kernel;
    return (rows + 2) * (w->a.width + 2) * w->block + 64 * K * K * w->block + 2 * 64 * rows * w->a.width;
}

INLINE Strip strip(const Work *w, i64 chunk, float *scratch)
{
    i64 K = w->a.kernel, P = w->a.width + 2, rows = strip_rows(w), cap = rows * w->a.width, word = chunk % w->words;
    float *sums = scratch + (rows + 2) * P * w->block, *value = sums + 64 * K * K * w->block;
    memset(sums, 0, 64 * K * K * w->block * sizeof *sums);
    return (Strip){w->block, P, w->a.images * (w->a.height + 2), rows, cap, word, chunk / w->words * w->block,
                   least(64, w->a.channels - 64 * word), scratch, sums, value, (int32_t *)(value + 64 * cap)};
}

/* The gradients of the strip from line `top` on, with a line before and after, and where in it each channel has spikes. */
INLINE void gather(const Work *w, const Strip *t, i64 top, i64 *R count, int dot, int bf16, int binary)
{
    i64 H = w->a.height, W = w->a.width, O = w->a.outputs, n = t->n, P = t->P, bottom = least(top + t->rows, t->all - 1);
    i64 size = dot ? 2 : 4, width = bf16 ? 2 : 4;
    memset(count, 0, 64 * sizeof *count);
    memset(t->grad, 0, (bottom + 2 - top) * P * n * size);
    for (i64 r = top - 1; r <= bottom; r++) {
        i64 y = r % (H + 2) - 1, line = r / (H + 2) * H + y;
        if (y < 0 || y >= H) continue;
        const char *R from = (const char *)w->a.grad + (line * W * O + t->first) * width;
        char *R to = (char *)t->grad + ((r - top + 1) * P + 1) * n * size;
        for (i64 c = 0; c < W; c++)
            for (i64 o = 0; o < n; o++) {
                if (dot) ((uint16_t *)to)[c * n + o] = ((const uint16_t *)from)[c * O + o];
                else ((float *)to)[c * n + o] = load(from, c * O + o, bf16);
            }
        if (r < top || r == bottom) continue;
        for (i64 c = 0; c < W; c++)
            for (uint64_t m = w->a.bits[(line * W + c) * w->words + t->word]; m; m &= m - 1) {
                int i = __builtin_ctzll(m);
                i64 k = i * t->cap + count[i]++;
                if (!binary) t->value[k] = load(w->a.x, (line * W + c) * w->a.channels + 64 * t->word + i, bf16);
                t->list[k] = (int32_t)(((r - top + 1) * P + c + 1) * n);
            }
    }
}

/* `rows` of the kernel, as many as there are registers for, have their sums in registers. */
INLINE void weights(Work *w, i64 chunk, float *scratch, int vecs, int rows, int bf16, int binary)
{
    enum { K = 3 };
    Strip t = strip(w, chunk, scratch);
    i64 n = LANES * vecs, size = K * K * n, count[64];
    for (i64 top = 1; top < t.all - 1; top += t.rows) {
        gather(w, &t, top, count, 0, bf16, binary);
        for (i64 i = 0; i < t.many; i++)
            for (int group = 0; group < K && count[i]; group += rows) {
                vec sum[K][K][2];
                float *R own = t.sums + i * size + group * K * n;
                for (int a = 0; a < rows; a++)
                    for (int b = 0; b < K; b++)
                        for (int v = 0; v < vecs; v++) sum[a][b][v] = VEC(own + (a * K + b) * n + LANES * v);
                for (i64 k = i * t.cap; k < i * t.cap + count[i]; k++) {
                    const float *R near = (float *)t.grad + t.list[k] - ((group - 1) * t.P - 1) * n;
                    float by = binary ? 1.0f : t.value[k];
#pragma GCC unroll 3
                    for (int a = 0; a < rows; a++)
#pragma GCC unroll 3
                        for (int b = 0; b < K; b++)
#pragma GCC unroll 2
                            for (int v = 0; v < vecs; v++) {
                                vec g = VEC(near - (a * t.P + b) * n + LANES * v);
                                sum[a][b][v] += binary ? g : by * g;
                            }
                }
                for (int a = 0; a < rows; a++)
                    for (int b = 0; b < K; b++)
                        for (int v = 0; v < vecs; v++) VEC(own + (a * K + b) * n + LANES * v) = sum[a][b][v];
            }
    }
    const i64 *s = w->a.across;
    for (i64 i = 0; i < t.many; i++)
        for (i64 k = 0; k < K * K; k++)
            for (i64 o = 0; o < n; o++)
                store(w->a.out, (t.first + o) * s[0] + (64 * t.word + i) * s[1] + k / K * s[2] + k % K * s[3],
                      t.sums[i * size + k * n + o], bf16);
}

/* ---- the same with products of two bfloat16 pairs ----------------------------------------------------------------- */

/* VDPBF16PS adds a0 b0 + a1 b1 to a float. Against (v, 0) it adds v times the even elements of a vector of 32, against
 * (0, v) the odd ones: no widening, and half the memory to read. Sums of even and odd outputs are in vectors of their own. */
#ifdef DOT
#define EVEN(v) ((__m512bh)_mm512_set1_epi32((int)((v) >> 16)))
#define ODD(v) ((__m512bh)_mm512_set1_epi32((int)((v) & 0xffff0000u)))

DOT INLINE uint32_t bits_of(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

DOT INLINE void forward_dot(Work *w, i64 chunk, float *scratch, int pairs, int binary)
{
    i64 W = w->a.width, n = 32 * pairs, pad = w->pad;
    Lines l = lines(w, chunk, scratch);
    const int32_t *R at = l.at, *R start = l.start;
    float bias[2][4 * LANES];
    for (i64 o = 0; o < n; o++) bias[o & 1][o / 2] = w->a.bias ? w->a.bias[l.first + o] : 0.0f;
    for (i64 r = l.line; r < l.end; r++) {
        list(w, &l, r, 1, binary);
        for (i64 c = 0; c < W; c++) {
            const uint16_t *R base = (const uint16_t *)l.weight - (c - pad) * w->a.kernel * w->a.channels * n;
            i64 end = start[least(c + pad + 1, W)];
            __m512 even[4], odd[4];
            for (int q = 0; q < pairs; q++) {
                even[q] = _mm512_loadu_ps(bias[0] + LANES * q);
                odd[q] = _mm512_loadu_ps(bias[1] + LANES * q);
            }
            for (i64 e = start[most(c - pad, 0)]; e < end; e++) {
                uint32_t v = binary ? 0x3f800000 : bits_of(l.value[e]);
                __m512bh a = EVEN(v), b = ODD(v);
                for (int q = 0; q < pairs; q++) {
                    __m512bh u = (__m512bh)_mm512_loadu_si512(base + at[e] + 32 * q);
                    even[q] = _mm512_dpbf16_ps(even[q], u, a);
                    odd[q] = _mm512_dpbf16_ps(odd[q], u, b);
                }
            }
            uint16_t *R out = (uint16_t *)w->a.out + (r * W + c) * w->a.outputs + l.first;
            for (int q = 0; q < pairs; q++) {
                __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even[q]));
                __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd[q]));
                _mm512_storeu_si512(out + 32 * q, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
    }
}

DOT INLINE void weights_dot(Work *w, i64 chunk, float *scratch, int binary)
{
    enum { K = 3 };
    Strip t = strip(w, chunk, scratch);
    i64 n = 32, size = K * K * n, count[64];
    for (i64 top = 1; top < t.all - 1; top += t.rows) {
        gather(w, &t, top, count, 1, 1, binary);
        for (i64 i = 0; i < t.many; i++) {
            if (!count[i]) continue;
            __m512 sum[K][K][2];
            float *R own = t.sums + i * size;
            for (int a = 0; a < K; a++)
                for (int b = 0; b < K; b++)
                    for (int v = 0; v < 2; v++) sum[a][b][v] = _mm512_loadu_ps(own + (a * K + b) * n + LANES * v);
            for (i64 k = i * t.cap; k < i * t.cap + count[i]; k++) {
                const uint16_t *R near = (uint16_t *)t.grad + t.list[k] + (t.P + 1) * n;
                uint32_t value = binary ? 0x3f800000 : bits_of(t.value[k]);
                __m512bh even = EVEN(value), odd = ODD(value);
#pragma GCC unroll 3
                for (int a = 0; a < K; a++)
#pragma GCC unroll 3
                    for (int b = 0; b < K; b++) {
                        __m512bh g = (__m512bh)_mm512_loadu_si512(near - (a * t.P + b) * n);
                        sum[a][b][0] = _mm512_dpbf16_ps(sum[a][b][0], g, even);
                        sum[a][b][1] = _mm512_dpbf16_ps(sum[a][b][1], g, odd);
                    }
            }
            for (int a = 0; a < K; a++)
                for (int b = 0; b < K; b++)
                    for (int v = 0; v < 2; v++) _mm512_storeu_ps(own + (a * K + b) * n + LANES * v, sum[a][b][v]);
        }
    }
    const i64 *s = w->a.across;
    for (i64 i = 0; i < t.many; i++)
        for (i64 k = 0; k < K * K; k++)
            for (i64 o = 0; o < n; o++)
                store(w->a.out, (t.first + o) * s[0] + (64 * t.word + i) * s[1] + k / K * s[2] + k % K * s[3],
                      t.sums[i * size + k * n + (o & 1) * LANES + o / 2], 1);
}

DOT static void forward_pairs(void *job, i64 chunk, float *scratch)
{
    Work *w = job;
    switch (w->block / 32 << 1 | (w->a.binary ? 1 : 0)) {
#define CASE(k) case k: forward_dot(w, chunk, scratch, k >> 1, k & 1); break;
        CASE(2) CASE(3) CASE(4) CASE(5) CASE(8) CASE(9)
#undef CASE
    }
}

DOT static void weights_pairs(void *job, i64 chunk, float *scratch)
{
    if (((Work *)job)->a.binary) weights_dot(job, chunk, scratch, 1);
    else weights_dot(job, chunk, scratch, 0);
}
#endif

/* ---- one copy for each kind of processor -------------------------------------------------------------------------- */

/* `vecs`: of outputs side by side, as many as there are registers for; `rows`: of the kernel, likewise. */
INLINE void any_forward(Work *w, i64 chunk, float *s)
{
    switch ((w->block / LANES) << 2 | (w->a.bf16 ? 2 : 0) | (w->a.binary ? 1 : 0)) {
#define CASE(v, k) case v << 2 | k: forward(w, chunk, s, v, k >> 1, k & 1); break;
#define CASES(v) CASE(v, 0) CASE(v, 1) CASE(v, 2) CASE(v, 3)
        CASES(1) CASES(2) CASES(4) CASES(8)
#undef CASES
#undef CASE
    }
}

INLINE void any_weights(Work *w, i64 chunk, float *s, int rows)
{
    switch ((w->block == LANES ? 0 : 4) | (w->a.bf16 ? 2 : 0) | (w->a.binary ? 1 : 0)) {
#define CASE(k) case k: weights(w, chunk, s, 1 + (k >> 2), rows, k >> 1 & 1, k & 1); break;
        CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
#undef CASE
    }
}

INLINE void any_spikes(Work *w, i64 chunk)
{
    if (w->a.bf16) spikes(w, chunk, 1);
    else spikes(w, chunk, 0);
}

#define VERSION(suffix, attribute, rows) \
    attribute static void spikes##suffix(void *w, i64 c, float *s) { (void)s; any_spikes(w, c); } \
    attribute static void forward##suffix(void *w, i64 c, float *s) { any_forward(w, c, s); } \
    attribute static void weights##suffix(void *w, i64 c, float *s) { any_weights(w, c, s, rows); } \
    static const Body bodies##suffix[] = {spikes##suffix, forward##suffix, weights##suffix};

VERSION(_any, , 1)
#ifdef X86
VERSION(_avx2, AVX2, 1)
VERSION(_avx512, AVX512, 3)
#endif

/* The body of an operation. Sets `dot` where it is of the second kind. */
static Body choose(Work *w)
{
#ifdef DOT
    if (spikedistill_level > 2 && w->a.bf16 && w->a.op != SPIKES && w->a.outputs % 32 == 0) {
        w->dot = 1;
        return w->a.op == FORWARD ? forward_pairs : weights_pairs;
    }
#endif
#ifdef X86
    if (spikedistill_level > 1) return bodies_avx512[w->a.op];
    if (spikedistill_level == 1) return bodies_avx2[w->a.op];
#endif
    return bodies_any[w->a.op];
}

/* Does what `args` says. O is a multiple of LANES; WEIGHTS takes K = 3. Returns 0, or 1 where memory ran out. */
EXPORT i64 spikedistill_convolve(const Conv *args)
{
    Work work = {.a = *args}, *w = &work;
    Body body = choose(w);
    i64 pixels = w->a.images * w->a.height * w->a.width, K = w->a.kernel, C = w->a.channels, O = w->a.outputs;
    w->words = (C + 63) / 64;
    w->pad = K / 2;
    if (w->a.op == SPIKES) return spikedistill_loop(w, body, (pixels + PIXELS - 1) / PIXELS, w->a.threads, 1);
    if (w->a.op == WEIGHTS) {
        w->block = O % OUTPUTS ? LANES : OUTPUTS;
        return spikedistill_loop(w, body, O / w->block * w->words, w->a.threads, strip_floats(w));
    }
    i64 widest = spikedistill_level > 1 ? 8 : 4, vecs = 1;
    while (vecs < widest && O % (2 * vecs * LANES) == 0) vecs *= 2;
    w->block = vecs * LANES;
    if (!(w->packed = malloc(O * C * K * K * (w->dot ? 2 : 4)))) return 1;
    i64 chunks = (w->a.images * w->a.height + ROWS - 1) / ROWS;
    size_t scratch = 2 * K * w->a.width * C + w->a.width + 1;
    int failed = spikedistill_loop(w, pack, O / w->block * K, w->a.threads, 1) ||
                 spikedistill_loop(w, body, O / w->block * chunks, w->a.threads, scratch);
    free(w->packed);
    return failed;
}
