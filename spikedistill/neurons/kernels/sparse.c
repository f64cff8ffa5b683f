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

typedef struct {
    Conv a;
    i64 words, pad, block;
    float *packed;          /* [O / block, K across, K down, C, block] */
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
    i64 K = w->a.kernel, C = w->a.channels, n = w->block, first = chunk / K * n, col = chunk % K;
    const i64 *s = w->a.across;
    float *R to = w->packed + chunk * K * C * n;
    (void)scratch;
    for (i64 row = 0; row < K; row++)
        for (i64 c = 0; c < C; c++)
            for (i64 o = 0; o < n; o++)
                *to++ = load(w->a.weight, (first + o) * s[0] + c * s[1] + row * s[2] + col * s[3], w->a.bf16 != 0);
}

/* Some lines of pixels of one block of outputs. A line's window is K lines of x; its spikes are listed column by column,
 * so that those of a pixel are one run of the list, and `at` counts from the weights of column 0 in column 0. */
INLINE void forward(Work *w, i64 chunk, float *scratch, int vecs, int bf16, int binary)
{
    i64 H = w->a.height, W = w->a.width, C = w->a.channels, K = w->a.kernel, n = LANES * vecs, pad = w->pad;
    i64 lines = w->a.images * H, chunks = (lines + ROWS - 1) / ROWS, first = chunk / chunks * n, width = bf16 ? 2 : 4;
    const float *R weight = w->packed + chunk / chunks * K * K * C * n;
    int32_t *R at = (int32_t *)scratch, *R start = at + K * W * C;
    float *R value = scratch + K * W * C + W + 1, line[8 * LANES];
    for (i64 r = chunk % chunks * ROWS; r < least((chunk % chunks + 1) * ROWS, lines); r++) {
        i64 y = r % H, k = 0, from = most(0, pad - y), to = least(K, H + pad - y);
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
        for (i64 c = 0; c < W; c++) {
            const float *R base = weight - (c - pad) * K * C * n;
            i64 end = start[least(c + pad + 1, W)];
            vec sum[8];
            for (int q = 0; q < vecs; q++) {
                sum[q] = (vec){0};
                if (w->a.bias) sum[q] = VEC(w->a.bias + first + LANES * q);
            }
            for (i64 e = start[most(c - pad, 0)]; e < end; e++)
                for (int q = 0; q < vecs; q++) {
                    vec v = VEC(base + at[e] + LANES * q);
                    sum[q] += binary ? v : value[e] * v;
                }
            for (int q = 0; q < vecs; q++) VEC(line + LANES * q) = sum[q];
            char *R out = (char *)w->a.out + ((r * W + c) * w->a.outputs + first) * width;
            for (i64 o = 0; o < n; o++) store(out, o, line[o], bf16);
        }
    }
}

/* ---- gradient of the weight --------------------------------------------------------------------------------------- */

/* `vecs` vectors of outputs and one word of channels. The images stand one above the other, each in a frame of zeros, so
 * that pixel p of x meets the gradients at p - t for each tap t of the kernel; a strip of that is taken at a time.
 * `taps` of a row of the kernel, or of all its rows, have their sums in registers. */
INLINE void weights(Work *w, i64 chunk, float *scratch, int vecs, int rows, int bf16, int binary)
{
    enum { K = 3 };
    i64 H = w->a.height, W = w->a.width, C = w->a.channels, O = w->a.outputs, n = LANES * vecs, width = bf16 ? 2 : 4;
    i64 P = W + 2, high = H + 2, all = w->a.images * high, strip = most(1, STRIP / (P * n * 4) - 2), cap = strip * W;
    i64 q = chunk % w->words, first = chunk / w->words * n, many = least(64, C - 64 * q), size = K * K * n;
    float *R grad = scratch, *R sums = grad + (strip + 2) * P * n, *R value = sums + 64 * size;
    int32_t *R list = (int32_t *)(value + 64 * cap);
    i64 count[64];
    memset(sums, 0, 64 * size * sizeof *sums);
    for (i64 top = 1; top < all - 1; top += strip) {
        i64 bottom = least(top + strip, all - 1);
        memset(count, 0, sizeof count);
        memset(grad, 0, (bottom + 2 - top) * P * n * sizeof *grad);
        for (i64 r = top - 1; r <= bottom; r++) {
            i64 y = r % high - 1, line = r / high * H + y;
            if (y < 0 || y >= H) continue;
            const char *from = (const char *)w->a.grad + (line * W * O + first) * width;
            float *R to = grad + ((r - top + 1) * P + 1) * n;
            for (i64 c = 0; c < W; c++)
                for (i64 o = 0; o < n; o++) to[c * n + o] = load(from, c * O + o, bf16);
            if (r < top || r == bottom) continue;
            for (i64 c = 0; c < W; c++)
                for (uint64_t m = w->a.bits[(line * W + c) * w->words + q]; m; m &= m - 1) {
                    int i = __builtin_ctzll(m);
                    i64 k = i * cap + count[i]++;
                    if (!binary) value[k] = load(w->a.x, (line * W + c) * C + 64 * q + i, bf16);
                    list[k] = (int32_t)(((r - top + 1) * P + c + 1) * n);
                }
        }
        for (i64 i = 0; i < many; i++) {
            if (!count[i]) continue;
            for (int group = 0; group < K; group += rows) {
                vec sum[K][K][2];
                float *R own = sums + i * size + group * K * n;
                for (int a = 0; a < rows; a++)
                    for (int b = 0; b < K; b++)
                        for (int v = 0; v < vecs; v++) sum[a][b][v] = VEC(own + (a * K + b) * n + LANES * v);
                for (i64 k = i * cap; k < i * cap + count[i]; k++) {
                    const float *R near = grad + list[k] - ((group - 1) * P - 1) * n;
                    float by = binary ? 1.0f : value[k];
#pragma GCC unroll 3
                    for (int a = 0; a < rows; a++)
#pragma GCC unroll 3
                        for (int b = 0; b < K; b++)
#pragma GCC unroll 2
                            for (int v = 0; v < vecs; v++) {
                                vec g = VEC(near - (a * P + b) * n + LANES * v);
                                sum[a][b][v] += binary ? g : by * g;
                            }
                }
                for (int a = 0; a < rows; a++)
                    for (int b = 0; b < K; b++)
                        for (int v = 0; v < vecs; v++) VEC(own + (a * K + b) * n + LANES * v) = sum[a][b][v];
            }
        }
    }
    const i64 *s = w->a.across;
    for (i64 i = 0; i < many; i++)
        for (i64 t = 0; t < K * K; t++)
            for (i64 o = 0; o < n; o++)
                store(w->a.out, (first + o) * s[0] + (64 * q + i) * s[1] + t / K * s[2] + t % K * s[3],
                      sums[i * size + t * n + o], bf16);
}

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

static const Body *versions(void)
{
#ifdef X86
    if (spikedistill_level == 2) return bodies_avx512;
    if (spikedistill_level == 1) return bodies_avx2;
#endif
    return bodies_any;
}

/* Does what `args` says. O is a multiple of LANES; WEIGHTS takes K = 3. Returns 0, or 1 where memory ran out. */
EXPORT i64 spikedistill_convolve(const Conv *args)
{
    Work work = {.a = *args}, *w = &work;
    Body body = versions()[w->a.op];
    i64 pixels = w->a.images * w->a.height * w->a.width, K = w->a.kernel, C = w->a.channels, O = w->a.outputs;
    w->words = (C + 63) / 64;
    w->pad = K / 2;
    if (w->a.op == SPIKES) return spikedistill_loop(w, body, (pixels + PIXELS - 1) / PIXELS, w->a.threads, 1);
    if (w->a.op == WEIGHTS) {
        w->block = O % OUTPUTS ? LANES : OUTPUTS;
        i64 P = w->a.width + 2, strip = most(1, STRIP / (P * w->block * 4) - 2);
        size_t scratch = (strip + 2) * P * w->block + 64 * K * K * w->block + 2 * 64 * strip * w->a.width;
        return spikedistill_loop(w, body, O / w->block * w->words, w->a.threads, scratch);
    }
    i64 widest = spikedistill_level == 2 ? 8 : 4, vecs = 1;
    while (vecs < widest && O % (2 * vecs * LANES) == 0) vecs *= 2;
    w->block = vecs * LANES;
    if (!(w->packed = malloc(O * C * K * K * sizeof(float)))) return 1;
    i64 chunks = (w->a.images * w->a.height + ROWS - 1) / ROWS;
    size_t scratch = 2 * K * w->a.width * C + w->a.width + 1;
    int failed = spikedistill_loop(w, pack, O / w->block * K, w->a.threads, 1) ||
                 spikedistill_loop(w, body, O / w->block * chunks, w->a.threads, scratch);
    free(w->packed);
    return failed;
}
