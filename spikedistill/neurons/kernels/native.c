/* The fast neurons for processors: BatchNorm's statistics, norm + neuron forward and backward, and 2x2 pools.
 *
 * Plain C, no header of torch, no OpenMP pragma: native.py calls `spikedistill_run` with one packed `Args` and hands in
 * the GOMP_parallel of the OpenMP runtime that torch has loaded, so that there is one pool of threads, torch's.
 *
 * Memory of an activation is [T, outer, C, inner]: channels_last has inner = 1, NCHW has inner = H W, and a neuron
 * without norm is outer = C = 1. A chunk is a run of elements that one thread takes through all T, a block at a time:
 * the membranes of a block live in a small buffer and never in memory. Chunks do not depend on the number of threads and
 * their sums are added in order, so the result does not either.
 *
 * To the bit like neurons/functional.py: compile with -ffp-contract=off and without -ffast-math. Every loop is plain C
 * which the compiler vectorises, once for each of baseline, AVX2 and AVX-512; the processor chooses at run time.
 */

#include <math.h>

#include "native.h"

#ifdef __APPLE__
#include <dispatch/dispatch.h>
#endif

#ifndef BLOCK
#define BLOCK 512    /* elements that go through all T together */
#endif
#define LANES 128    /* partial sums side by side */
#ifndef CHUNK
#define CHUNK 8192   /* elements of one step that a thread takes at a time */
#endif

enum { FORWARD, BACKWARD, MOMENTS, POOL, UNPOOL };  /* Args.op */
enum { ATAN, SIGMOID, TRIANGLE, RECTANGLE };  /* Args.kind, as in neurons/surrogate.py */
enum { SOFT, HARD_ZERO, HARD };               /* reset: by subtraction, to 0, to any potential */
enum { GRAD_X = 1, GRAD_AFFINE = 2, GRAD_COEFFICIENTS = 4 };

typedef struct {  /* 8 bytes a field, in the order of native.py */
    const void *x, *grad;                     /* [steps_x, outer, C, inner], [steps, outer, C, inner] */
    void *out;                                /* spikes, or gradient of x */
    float *mean, *var;                        /* [C]; mean is null where there is no norm */
    const float *weight, *bias;               /* [C] or null */
    float *grad_weight, *grad_bias;           /* [C] or null */
    double *grad_coefficients;                /* [2]: of decay, gain */
    uint8_t *which;                           /* of a max pool: which of the four was taken, or null */
    i64 op, bf16, steps, steps_x, outer, channels, inner, threads;
    i64 hard, strict, detach, kind, training, need;
    double eps, decay, gain, offset, v_th, rest, parameter;  /* offset = (1 - decay) rest */
} Args;

typedef struct {
    Args a;
    float decay, gain, offset, v_th, fire, rest, s0, s1;  /* fires at H >= fire; s0, s1: constants of the surrogate */
    i64 size;                                             /* outer * C * inner */
    i64 reset;
    i64 rows, block, chunks;                              /* rows a chunk and elements a block where inner = 1 */
    i64 piece, split, group, pieces;                      /* otherwise: a plane is `split` pieces, `group` a chunk */
    i64 write, reduce, coefficients;                      /* what this sweep of the backward pass does */
    float *scale, *shift, *slope, *mean_du;               /* [C] */
    double *partial, *partial_coefficients;
} Job;

/* ---- threads ------------------------------------------------------------------------------------------------------ */

typedef struct { void *job; Body body; i64 count, next; size_t scratch; } Loop;
typedef void (*Parallel)(void (*)(void *), void *, unsigned threads, unsigned flags);
static Parallel parallel;
HIDDEN i64 spikedistill_level;

static void work(void *p)
{
    Loop *l = p;
    void *scratch = NULL;
    if (posix_memalign(&scratch, 64, l->scratch)) return;
    for (;;) {
        i64 i = __atomic_fetch_add(&l->next, 1, __ATOMIC_RELAXED);
        if (i >= l->count) break;
        l->body(l->job, i, scratch);
    }
    free(scratch);
}

#ifdef __APPLE__
static void work_apple(void *p, size_t i) { (void)i; work(p); }
#endif

int spikedistill_loop(void *job, Body body, i64 count, i64 threads, size_t floats)
{
    Loop l = {job, body, count, 0, floats * sizeof(float)};
    threads = least(threads, count);
    if (threads > 1 && parallel) parallel(work, &l, (unsigned)threads, 0);
#ifdef __APPLE__
    else if (threads > 1) dispatch_apply_f(threads, DISPATCH_APPLY_AUTO, &l, work_apple);
#endif
    else work(&l);
    return l.next < count;
}

static int loop(Job *job, Body body, i64 count, size_t floats)
{
    return spikedistill_loop(job, body, count, job->a.threads, floats);
}

/* ---- one element -------------------------------------------------------------------------------------------------- */

/* V after reset, H (1 - S) + V_reset S or H - V_th S: an infinite H leaves NaN, as in the reference. */
INLINE float reset(const Job *j, float h, int how)
{
    int s = h >= j->fire;
    if (how == SOFT) return h - (s ? j->v_th : 0.0f);
    float v = h * (s ? 0.0f : 1.0f);
    return how == HARD_ZERO ? v : v + (s ? j->rest : 0.0f);
}

/* decay V, rounded as decay * reset(H) is. */
INLINE float leaked(const Job *j, float h, int how, float start)
{
    int s = h >= j->fire;
    if (how == SOFT) return j->decay * (h - (s ? j->v_th : 0.0f));
    float v = h * (s ? 0.0f : j->decay);
    return how == HARD_ZERO ? v : v + (s ? start : 0.0f);
}

INLINE float exp_minus(float y)  /* exp(-y), 0 <= y, relative error 2e-7; 0 from 50 on, before denormals slow it down */
{
    float z = y > 50.0f ? -50.0f : -y;
    float t = z * 1.44269504f + 12582912.0f;  /* the nearest integer in the low bits */
    int32_t k;
    memcpy(&k, &t, 4);
    float n = t - 12582912.0f, r = (z - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t)((uint32_t)(k - 0x4b400000 + 127) << 23);
    float two;
    memcpy(&two, &bits, 4);
    return y > 50.0f ? 0.0f : p * two;
}

INLINE float surrogate(const Job *j, float z, int kind)
{
    if (kind == ATAN) return j->s1 / (j->s0 + z * z);
    if (kind == SIGMOID) { float e = exp_minus(fabsf(j->s0 * z)), d = 1.0f + e; return j->s0 * (e / (d * d)); }
    if (kind == TRIANGLE) { float d = j->s0 - fabsf(z); return (d < 0.0f ? 0.0f : d) * j->s1; }
    return (float)(fabsf(z) < j->s0) * j->s1;
}

/* ---- one step of a block ------------------------------------------------------------------------------------------ */

/* H[t] of n elements from H[t-1] (`before`; not read at the first step). Spikes too, where `spikes` is given. */
INLINE void charge(const Job *j, const void *R x, const float *R scale, const float *R shift, const float *R before,
                   float *R h, void *R spikes, i64 n, int first, int how, int norm, int bf16, int fire)
{
    float gain = j->gain, offset = j->offset, start = j->decay * j->rest;
    for (i64 i = 0; i < n; i++) {
        float u = load(x, i, bf16);
        if (norm) u = u * scale[i] + shift[i];
        float v = first ? start : leaked(j, before[i], how, start), now = v + gain * u;
        if (how == HARD) now += offset;
        h[i] = now;
        if (fire && bf16) ((uint16_t *)spikes)[i] = now >= j->fire ? 0x3f80 : 0;
        if (fire && !bf16) ((float *)spikes)[i] = now >= j->fire ? 1.0f : 0.0f;
    }
}

/* Replaces H[t] in h by the gradient of H[t]; `after` holds that of H[t+1] (not read at the last step). */
INLINE void discharge(const Job *j, const void *R grad, const float *R after, float *R h, i64 n,
                      int last, int hard, int detach, int kind, int bf16)
{
    float decay = j->decay, rest = j->rest, v_th = j->v_th, fire = j->fire;
    for (i64 i = 0; i < n; i++) {
        float now = h[i], g = surrogate(j, now - v_th, kind), d = load(grad, i, bf16) * g;
        if (!last) {
            float stay = hard ? (now >= fire ? 0.0f : decay) : decay;
            if (!detach) stay += decay * ((hard ? rest - now : -v_th) * g);
            d += after[i] * stay;
        }
        h[i] = d;
    }
}

/* a and b: sums of du and of du (x - mean), over blocks and over `count` steps. dh: gradient of H. */
INLINE void reduce(const Job *j, const char *R x, i64 next, const float *R mean, const float *R dh, i64 row,
                   float *R a, float *R b, i64 n, int count, int bf16)
{
    float gain = j->gain;
    for (i64 i = 0; i < n; i++) {
        float sa = 0, sb = 0;
        for (int k = 0; k < count; k++) {
            float du = gain * dh[k * row + i];
            sa += du;
            sb += du * (load(x + k * next, i, bf16) - mean[i]);
        }
        a[i] += sa;
        b[i] += sb;
    }
}

/* dx from the gradient of H. norm: 0 none, 1 with fixed statistics, 2 with those of the batch. */
INLINE void finish(const Job *j, const void *R x, const float *R scale, const float *R mean, const float *R mean_du,
                   const float *R slope, const float *R dh, void *R out, i64 n, int norm, int bf16)
{
    float gain = j->gain;
    for (i64 i = 0; i < n; i++) {
        float du = gain * dh[i];
        if (norm == 2) du = du - mean_du[i] - (load(x, i, bf16) - mean[i]) * slope[i];
        if (norm) du = scale[i] * du;
        store(out, i, du, bf16);
    }
}

/* Sums for the gradients of decay and gain: dh (V[t-1] - V_reset) and dh u. */
INLINE void coefficients(const Job *j, const void *R x, const float *R scale, const float *R shift,
                         const float *R before, const float *R dh, float *R a, float *R b, i64 n,
                         int first, int how, int norm, int bf16)
{
    for (i64 i = 0; i < n; i++) {
        float u = load(x, i, bf16);
        if (norm) u = u * scale[i] + shift[i];
        if (!first) a[i] += dh[i] * (reset(j, before[i], how) - j->rest);
        b[i] += dh[i] * u;
    }
}

/* ---- geometry ----------------------------------------------------------------------------------------------------- */

static i64 piece_start(const Job *j, i64 q) { return q / j->split * j->a.inner + q % j->split * j->piece; }
INLINE i64 piece_count(const Job *j, i64 q)
{
    return least(j->piece, j->a.inner - q % j->split * j->piece);
}

INLINE i64 channel(const Job *j, i64 q) { return q / j->split % j->a.channels; }

/* The run of elements of a chunk, within one step. */
INLINE void chunk_range(const Job *j, i64 chunk, i64 *from, i64 *to)
{
    if (j->a.inner == 1) {
        *from = chunk * j->rows * j->a.channels;
        *to = least(*from + j->rows * j->a.channels, j->size);
    } else {
        i64 q = (chunk + 1) * j->group;
        *from = piece_start(j, chunk * j->group);
        *to = q >= j->pieces ? j->size : piece_start(j, q);
    }
}

/* Where element `at` is in a run of one channel: its piece, and how many of the next n belong to it. */
INLINE i64 run(const Job *j, i64 at, i64 n, i64 *piece)
{
    i64 plane = at / j->a.inner, in = at % j->a.inner, part = in / j->piece;
    *piece = plane * j->split + part;
    return least(n, least(j->a.inner, (part + 1) * j->piece) - in);
}

/* Per-channel values at n elements from `at`. */
INLINE void spread(const Job *j, const float *R values, float *R out, i64 at, i64 n)
{
    i64 C = j->a.channels;
    if (!values) return;
    if (j->a.inner == 1) {
        for (i64 r = 0; r < n; r += C) memcpy(out + r, values, C * sizeof(float));
        return;
    }
    for (i64 i = 0, q, len; i < n; i += len) {
        len = run(j, at + i, n - i, &q);
        float v = values[channel(j, q)];
        for (i64 k = 0; k < len; k++) out[i + k] = v;
    }
}

/* Sum of lanes, which it overwrites. */
INLINE double fold(float *R lane)
{
    for (int w = LANES / 2; w > 1; w /= 2)
        for (int k = 0; k < w; k++) lane[k] += lane[k + w];
    return (double)lane[0] + lane[1];
}

INLINE double sum(const float *R a, i64 n)
{
    float lane[LANES];
    if (n < LANES) {
        double s = 0;
        for (i64 i = 0; i < n; i++) s += a[i];
        return s;
    }
    memcpy(lane, a, sizeof lane);
    for (i64 i = LANES; i < n; i += LANES)
        for (i64 k = 0, m = least(LANES, n - i); k < m; k++) lane[k] += a[i + k];
    return fold(lane);
}

static void geometry(Job *j, i64 outer)
{
    i64 C = j->a.channels, inner = j->a.inner;
    j->size = outer * C * inner;
    if (inner == 1) {
        i64 k = most(1, BLOCK / C);
        j->block = k * C;
        j->rows = most(CHUNK / C, 32);
        j->rows = (j->rows + k - 1) / k * k;
        j->chunks = (outer + j->rows - 1) / j->rows;
    } else {
        j->block = BLOCK;
        j->split = (inner + CHUNK - 1) / CHUNK;
        j->piece = ((inner + j->split - 1) / j->split + 15) / 16 * 16;
        j->split = (inner + j->piece - 1) / j->piece;
        j->group = most(1, CHUNK / most(1, least(j->piece, inner)));
        j->pieces = outer * C * j->split;
        j->chunks = (j->pieces + j->group - 1) / j->group;
    }
}

static i64 partials(const Job *j) { return 2 * (j->a.inner == 1 ? j->chunks * j->a.channels : j->pieces); }

/* Row length of the scratch buffers: odd in cache lines, so that rows do not fall into the same sets of the cache. */
static i64 stride(const Job *j) { return ((j->block + 15) / 16 | 1) * 16; }

/* ---- chunks ------------------------------------------------------------------------------------------------------- */

INLINE void step(const Job *j, const void *R x, const float *R scale, const float *R shift, const float *R before,
                 float *R h, void *R spikes, i64 n, int first, int fire)
{
    switch (j->reset << 3 | (j->a.bf16 ? 4 : 0) | (j->scale ? 2 : 0) | first) {
#define CASE(k) case k: charge(j, x, scale, shift, before, h, spikes, n, k & 1, k >> 3, k >> 1 & 1, k >> 2 & 1, fire); break;
        CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
        CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15)
        CASE(16) CASE(17) CASE(18) CASE(19) CASE(20) CASE(21) CASE(22) CASE(23)
#undef CASE
    }
}

INLINE void step_back(const Job *j, const void *R grad, const float *R after, float *R h, i64 n, int last)
{
    switch (j->a.kind << 4 | (j->a.bf16 ? 8 : 0) | (j->a.detach ? 4 : 0) | (j->a.hard ? 2 : 0) | last) {
#define CASE(k) case k: discharge(j, grad, after, h, n, (k) & 1, (k) >> 1 & 1, (k) >> 2 & 1, (k) >> 4, (k) >> 3 & 1); break;
#define CASE16(k) CASE(k) CASE(k + 1) CASE(k + 2) CASE(k + 3) CASE(k + 4) CASE(k + 5) CASE(k + 6) CASE(k + 7) \
    CASE(k + 8) CASE(k + 9) CASE(k + 10) CASE(k + 11) CASE(k + 12) CASE(k + 13) CASE(k + 14) CASE(k + 15)
        CASE16(0) CASE16(16) CASE16(32) CASE16(48)
#undef CASE16
#undef CASE
    }
}

/* Asks for memory that is needed soon: the steps of a block lie far apart, where the processor does not look ahead. */
INLINE void fetch(const char *p, i64 bytes)
{
    for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

INLINE void forward_chunk(Job *j, i64 chunk, float *scratch)
{
    i64 from, to, row = stride(j), width = j->a.bf16 ? 2 : 4, rows = j->a.inner == 1;
    float *h = scratch, *scale = scratch + 2 * row, *shift = scale + row;
    chunk_range(j, chunk, &from, &to);
    if (rows) {
        spread(j, j->scale, scale, from, least(j->block, to - from));
        spread(j, j->shift, shift, from, least(j->block, to - from));
    }
    for (i64 at = from; at < to; at += j->block) {
        i64 n = least(j->block, to - at);
        if (!rows) {
            spread(j, j->scale, scale, at, n);
            spread(j, j->shift, shift, at, n);
        }
        for (i64 t = 0; t < j->a.steps; t++) {
            const char *x = (const char *)j->a.x + (at + (j->a.steps_x > 1 ? t : 0) * j->size) * width;
            char *spikes = (char *)j->a.out + (at + t * j->size) * width;
            step(j, x, scale, shift, h + (~t & 1) * row, h + (t & 1) * row, spikes, n, t == 0, 1);
        }
    }
}

INLINE void backward_chunk(Job *j, i64 chunk, float *scratch)
{
    i64 from, to, row = stride(j), width = j->a.bf16 ? 2 : 4, rows = j->a.inner == 1, C = j->a.channels;
    i64 T = j->a.steps, steps_x = j->a.steps_x;
    int bf16 = j->a.bf16 != 0, how = (int)j->reset, norm = j->scale != 0;
    float *scale = scratch, *shift = scale + row, *mean = shift + row, *slope = mean + row, *mean_du = slope + row;
    float *a = mean_du + row, *b = a + row, *c = b + row, *d = c + row, *h = d + row;
    chunk_range(j, chunk, &from, &to);
    for (i64 at = from; at < to; at += j->block) {
        i64 n = least(j->block, to - at);
        if (!rows || at == from) {
            spread(j, j->scale, scale, at, n);
            spread(j, j->shift, shift, at, n);
            spread(j, j->scale ? j->a.mean : NULL, mean, at, n);
            spread(j, j->slope, slope, at, n);
            spread(j, j->mean_du, mean_du, at, n);
            memset(a, 0, 2 * row * sizeof(float));
        }
        if (at == from) memset(c, 0, 2 * row * sizeof(float));
        const char *x = (const char *)j->a.x + at * width, *grad = (const char *)j->a.grad + at * width;
        char *out = (char *)j->a.out + at * width;
        i64 next = steps_x > 1 ? j->size * width : 0;
        for (i64 t = 0; t < T; t++) {
            fetch(grad + t * j->size * width, n * width);
            step(j, x + t * next, scale, shift, h + (t - 1) * row, h + t * row, NULL, n, t == 0, 0);
        }
        for (i64 t = T - 1; t >= 0; t--) {
            if (at + n < to && t < steps_x) fetch(x + t * next + n * width, n * width);
            step_back(j, grad + t * j->size * width, h + (t + 1) * row, h + t * row, n, t == T - 1);
            if (j->coefficients)
                coefficients(j, x + t * next, scale, shift, h + (t - 1) * row, h + t * row, c, d, n, t == 0, how, norm, bf16);
        }
        if (steps_x == 1)
            for (i64 t = 1; t < T; t++)
                for (i64 i = 0; i < n; i++) h[i] += h[t * row + i];
        for (i64 t = 0, four; j->reduce && t < steps_x; t += four ? 4 : 1) {
            four = t + 4 <= steps_x;
            switch (bf16 << 1 | (int)four) {
            case 0: reduce(j, x + t * next, next, mean, h + t * row, row, a, b, n, 1, 0); break;
            case 1: reduce(j, x + t * next, next, mean, h + t * row, row, a, b, n, 4, 0); break;
            case 2: reduce(j, x + t * next, next, mean, h + t * row, row, a, b, n, 1, 1); break;
            case 3: reduce(j, x + t * next, next, mean, h + t * row, row, a, b, n, 4, 1); break;
            }
        }
        for (i64 t = 0; j->write && t < steps_x; t++) {
            const void *xt = x + t * next;
            void *to_ = out + t * next;
            const float *dh = h + t * row;
            switch (bf16 << 2 | (norm ? (j->slope ? 2 : 1) : 0)) {
#define CASE(k) case k: finish(j, xt, scale, mean, mean_du, slope, dh, to_, n, k & 3, k >> 2); break;
                CASE(0) CASE(1) CASE(2) CASE(4) CASE(5) CASE(6)
#undef CASE
            }
        }
        if (j->reduce && !rows)
            for (i64 i = 0, q, len; i < n; i += len) {
                len = run(j, at + i, n - i, &q);
                j->partial[2 * q] += sum(a + i, len);
                j->partial[2 * q + 1] += sum(b + i, len);
            }
    }
    if (j->reduce && rows) {
        double *p = j->partial + 2 * chunk * C;
        i64 n = least(j->block, to - from);
        for (i64 i = 0; i < C; i++) {
            double sa = 0, sb = 0;
            for (i64 r = i; r < n; r += C) { sa += a[r]; sb += b[r]; }
            p[i] = sa;
            p[C + i] = sb;
        }
    }
    if (j->coefficients) {
        i64 n = least(j->block, to - from);
        j->partial_coefficients[2 * chunk] = sum(c, n);
        j->partial_coefficients[2 * chunk + 1] = sum(d, n);
    }
}

/* s1 += x - m and, where given, s2 += (x - m)^2, for n elements of each of `count` blocks that follow each other. */
INLINE void deviations(const char *R x, i64 next, const float *R m, float *R s1, float *R s2, i64 n, int count, int squares,
                       int bf16)
{
    for (i64 i = 0; i < n; i++) {
        float a = 0, b = 0;
        for (int k = 0; k < count; k++) {
            float e = load(x + k * next, i, bf16);
            if (squares) e -= m[i];
            a += e;
            b += e * e;
        }
        s1[i] += a;
        if (squares) s2[i] += b;
    }
}

/* The same over n elements in blocks of `block`. */
INLINE void all_deviations(const char *R x, const float *R m, float *R s1, float *R s2, i64 n, i64 block, int squares, int bf16)
{
    i64 width = bf16 ? 2 : 4, at = 0;
    for (; at + 4 * block <= n; at += 4 * block)
        deviations(x + at * width, block * width, m, s1, s2, block, 4, squares, bf16);
    for (; at < n; at += block) deviations(x + at * width, 0, m, s1, s2, least(block, n - at), 1, squares, bf16);
}

/* Mean and sum of squared deviations of one chunk, in two passes over data that stay in the cache. */
INLINE void moments_chunk_as(Job *j, i64 chunk, float *scratch, int bf16)
{
    i64 from, to, C = j->a.channels, width = bf16 ? 2 : 4, row = stride(j);
    float *R m = scratch, *R s1 = scratch + row, *R s2 = scratch + 2 * row;
    chunk_range(j, chunk, &from, &to);
    const char *x = (const char *)j->a.x + from * width;
    if (j->a.inner > 1) {
        for (i64 q = chunk * j->group; q < least((chunk + 1) * j->group, j->pieces); q++) {
            i64 at = piece_start(j, q), n = piece_count(j, q);
            const char *R p = (const char *)j->a.x + at * width;
            memset(s1, 0, LANES * sizeof(float));
            all_deviations(p, m, s1, s2, n, LANES, 0, bf16);
            float mean = (float)(fold(s1) / n);
            for (i64 k = 0; k < LANES; k++) m[k] = mean, s1[k] = s2[k] = 0;
            all_deviations(p, m, s1, s2, n, LANES, 1, bf16);
            double a = fold(s1);
            j->partial[2 * q] = mean + a / n;
            j->partial[2 * q + 1] = fold(s2) - a * a / n;
        }
        return;
    }
    i64 n = to - from, whole = least(j->block, n);
    double *p = j->partial + 2 * chunk * C, count = (double)(n / C);
    memset(s1, 0, row * sizeof(float));
    all_deviations(x, m, s1, s2, n, j->block, 0, bf16);
    for (i64 c = 0; c < C; c++) {
        double s = 0;
        for (i64 r = c; r < whole; r += C) s += s1[r];
        m[c] = (float)(s / count);
    }
    for (i64 r = C; r < whole; r += C) memcpy(m + r, m, C * sizeof(float));
    memset(s1, 0, 2 * row * sizeof(float));
    all_deviations(x, m, s1, s2, n, j->block, 1, bf16);
    for (i64 c = 0; c < C; c++) {
        double a = 0, b = 0;
        for (i64 r = c; r < whole; r += C) { a += s1[r]; b += s2[r]; }
        p[c] = m[c] + a / count;
        p[C + c] = b - a * a / count;
    }
}

INLINE void moments_chunk(Job *j, i64 chunk, float *scratch)
{
    if (j->a.bf16) moments_chunk_as(j, chunk, scratch, 1);
    else moments_chunk_as(j, chunk, scratch, 0);
}

/* ---- 2x2 pools: maps are [outer, H = steps, W = inner, C = channels], where NCHW has C = 1 ---------------------------- */

/* n outputs from their four inputs, each `stride`th element of a, b, c, d. The largest is the first of equals, or the last
 * NaN, as torch chooses it. */
INLINE void pool(const void *R a, const void *R b, const void *R c, const void *R d, void *R out, int32_t *R which, i64 n,
                 i64 stride, int mean, int keep, int bf16)
{
    for (i64 i = 0; i < n; i++) {
        float m = load(a, i * stride, bf16), v1 = load(b, i * stride, bf16);
        float v2 = load(c, i * stride, bf16), v3 = load(d, i * stride, bf16);
        int32_t k = 0;
        if (mean) m = (0.0f + m + v1 + v2 + v3) * 0.25f;
#define LARGER(v, number) { int more = (v > m) | (v != v); m = more ? v : m; k = more ? number : k; }
        else { LARGER(v1, 1) LARGER(v2, 2) LARGER(v3, 3) }
#undef LARGER
        store(out, i, m, bf16);
        if (keep) which[i] = k;
    }
}

/* The gradient of the four from that of n outputs. Zeros are positive, as in torch, which adds to zero. */
INLINE void unpool(const void *R grad, const int32_t *R which, void *R a, void *R b, void *R c, void *R d, i64 n,
                   i64 stride, int mean, int bf16)
{
    for (i64 i = 0; i < n; i++) {
        float g = load(grad, i, bf16) * (mean ? 0.25f : 1.0f) + 0.0f;
        int32_t k = mean ? 0 : which[i];
        store(a, i * stride, mean || k == 0 ? g : 0.0f, bf16);
        store(b, i * stride, mean || k == 1 ? g : 0.0f, bf16);
        store(c, i * stride, mean || k == 2 ? g : 0.0f, bf16);
        store(d, i * stride, mean || k == 3 ? g : 0.0f, bf16);
    }
}

/* Some lines of the small maps. Nothing is read from an odd last row or column, and nothing written to it. What was taken
 * is a byte in memory and 4 in `which`, one line: bytes among floats would need 64 channels to fill the processor's vectors. */
INLINE void pool_chunk(Job *j, i64 chunk, float *scratch, int back, int mean, int keep, int bf16)
{
    i64 H = j->a.steps / 2, W = j->a.inner / 2, C = j->a.channels, width = bf16 ? 2 : 4, next = C * width;
    i64 line = j->a.inner * next, runs = C == 1 ? 1 : W, to = least((chunk + 1) * j->rows, j->a.outer * H);
    const char *large = back ? j->a.out : j->a.x, *small = back ? j->a.grad : j->a.out;
    int32_t *which = (int32_t *)scratch;
    for (i64 r = chunk * j->rows; r < to; r++) {
        uint8_t *R bytes = keep ? j->a.which + r * W * C : NULL;
        for (i64 i = 0; back && keep && i < W * C; i++) which[i] = bytes[i];
        for (i64 w = 0; w < runs; w++) {
            char *a = (char *)large + (r / H * j->a.steps + r % H * 2) * line + 2 * w * next, *b = a + next;
            char *c = a + line, *d = c + next, *s = (char *)small + (r * W + w) * next;
            int32_t *k = which + w * C;
            if (!back && C == 1) pool(a, b, c, d, s, k, W, 2, mean, keep, bf16);
            else if (!back) pool(a, b, c, d, s, k, C, 1, mean, keep, bf16);
            else if (C == 1) unpool(s, k, a, b, c, d, W, 2, mean, bf16);
            else unpool(s, k, a, b, c, d, C, 1, mean, bf16);
        }
        for (i64 i = 0; !back && keep && i < W * C; i++) bytes[i] = (uint8_t)which[i];
    }
}

INLINE void pool_forward(Job *j, i64 chunk, float *scratch)
{
    switch ((j->a.kind ? 4 : 0) | (j->a.which ? 2 : 0) | (j->a.bf16 ? 1 : 0)) {
#define CASE(k) case k: pool_chunk(j, chunk, scratch, 0, k >> 2, k >> 1 & 1, k & 1); break;
        CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
#undef CASE
    }
}

INLINE void pool_backward(Job *j, i64 chunk, float *scratch)
{
    switch ((j->a.kind ? 2 : 0) | (j->a.bf16 ? 1 : 0)) {
#define CASE(k) case k: pool_chunk(j, chunk, scratch, 1, k >> 1, !(k >> 1), k & 1); break;
        CASE(0) CASE(1) CASE(2) CASE(3)
#undef CASE
    }
}

/* ---- one copy for each kind of processor -------------------------------------------------------------------------- */

#define VERSION(suffix, attribute) \
    attribute static void forward##suffix(void *j, i64 c, float *s) { forward_chunk(j, c, s); } \
    attribute static void backward##suffix(void *j, i64 c, float *s) { backward_chunk(j, c, s); } \
    attribute static void moments##suffix(void *j, i64 c, float *s) { moments_chunk(j, c, s); } \
    attribute static void pool##suffix(void *j, i64 c, float *s) { pool_forward(j, c, s); } \
    attribute static void unpool##suffix(void *j, i64 c, float *s) { pool_backward(j, c, s); } \
    static const Body bodies##suffix[] = {forward##suffix, backward##suffix, moments##suffix, pool##suffix, unpool##suffix};

VERSION(_any, )
static const Body *bodies = bodies_any;

#ifdef X86
VERSION(_avx2, AVX2)
VERSION(_avx512, AVX512)
#endif

/* gomp: address of GOMP_parallel or null. level: at most baseline (0), AVX2 (1), AVX-512 (2), its bfloat16 (3).
 * size, conv: of the caller's Args and Conv. Returns the level taken, or -1 where the caller was made for another version of this file. */
EXPORT i64 spikedistill_init(void *gomp, i64 level, i64 size, i64 conv)
{
    if (size != (i64)sizeof(Args) || conv != spikedistill_conv) return -1;
    memcpy(&parallel, &gomp, sizeof gomp);
    bodies = bodies_any, spikedistill_level = 0;
#ifdef X86
    __builtin_cpu_init();
    if (level >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        bodies = bodies_avx512, spikedistill_level = 2;
#ifdef DOT
        if (level >= 3 && __builtin_cpu_supports("avx512bf16")) spikedistill_level = 3;
#endif
        return spikedistill_level;
    }
    if (level >= 1 && __builtin_cpu_supports("avx2")) {
        bodies = bodies_avx2, spikedistill_level = 1;
        return 1;
    }
#endif
    (void)level;
    return 0;
}

/* ---- operations --------------------------------------------------------------------------------------------------- */

/* Sum of the partial results of channel c. */
static double total(const Job *j, i64 c, int which)
{
    double s = 0;
    i64 C = j->a.channels;
    if (j->a.inner == 1)
        for (i64 k = 0; k < j->chunks; k++) s += j->partial[(2 * k + which) * C + c];
    else
        for (i64 p = c; p < j->a.outer * C; p += C)
            for (i64 q = p * j->split; q < (p + 1) * j->split; q++) s += j->partial[2 * q + which];
    return s;
}

static i64 chunk_count(const Job *j, i64 k)
{
    return least(j->rows, j->a.outer - k * j->rows);
}

static int run_moments(Job *j)
{
    i64 C = j->a.channels;
    j->a.outer *= j->a.steps_x;
    geometry(j, j->a.outer);
    double n = (double)(j->a.outer * j->a.inner);
    j->partial = malloc((partials(j) + 1) * sizeof(double));
    if (!j->partial || loop(j, bodies[MOMENTS], j->chunks, 3 * stride(j))) return 1;
    for (i64 c = 0; c < C; c++) {
        double mean = 0, m2 = 0;
        if (j->a.inner == 1) {
            for (i64 k = 0; k < j->chunks; k++) mean += j->partial[2 * k * C + c] * chunk_count(j, k);
            mean /= n;
            for (i64 k = 0; k < j->chunks; k++) {
                double e = j->partial[2 * k * C + c] - mean;
                m2 += j->partial[(2 * k + 1) * C + c] + e * e * chunk_count(j, k);
            }
        } else {
            for (i64 p = c; p < j->a.outer * C; p += C)
                for (i64 q = p * j->split; q < (p + 1) * j->split; q++) mean += j->partial[2 * q] * piece_count(j, q);
            mean /= n;
            for (i64 p = c; p < j->a.outer * C; p += C)
                for (i64 q = p * j->split; q < (p + 1) * j->split; q++) {
                    double e = j->partial[2 * q] - mean;
                    m2 += j->partial[2 * q + 1] + e * e * piece_count(j, q);
                }
        }
        j->a.mean[c] = (float)mean;
        j->a.var[c] = (float)(m2 / n);
    }
    return 0;
}

static int run_backward(Job *j)
{
    i64 C = j->a.channels, need = j->a.need;
    int norm = j->scale != NULL, batch = norm && j->a.training;
    size_t scratch = (size_t)(9 + j->a.steps) * stride(j);
    double n = (double)(j->a.steps_x * j->a.outer * j->a.inner);
    j->coefficients = (need & GRAD_COEFFICIENTS) != 0;
    j->reduce = norm && ((need & GRAD_AFFINE) || (batch && (need & GRAD_X)));
    j->write = (need & GRAD_X) && !batch;
    if (j->coefficients && !(j->partial_coefficients = malloc((2 * j->chunks + 1) * sizeof(double)))) return 1;
    if (j->reduce && !(j->partial = calloc(partials(j) + 1, sizeof(double)))) return 1;
    if (j->reduce || j->write || j->coefficients)
        if (loop(j, bodies[BACKWARD], j->chunks, scratch)) return 1;
    if (j->coefficients) {
        j->a.grad_coefficients[0] = j->a.grad_coefficients[1] = 0;
        for (i64 k = 0; k < 2 * j->chunks; k++) j->a.grad_coefficients[k & 1] += j->partial_coefficients[k];
        j->coefficients = 0;
    }
    if (!j->reduce) return 0;
    float *slope = malloc(2 * C * sizeof(float) + 1), *mean_du = slope + C;
    if (!slope) return 1;
    for (i64 c = 0; c < C; c++) {
        double sum_du = total(j, c, 0), invstd = 1.0f / sqrtf(j->a.var[c] + (float)j->a.eps);
        double sum_dx = total(j, c, 1) * invstd;
        if (j->a.grad_bias) j->a.grad_bias[c] = (float)sum_du;
        if (j->a.grad_weight) j->a.grad_weight[c] = (float)sum_dx;
        mean_du[c] = (float)(sum_du / n);
        slope[c] = (float)(sum_dx * invstd / n);
    }
    int failed = 0;
    if (batch && (need & GRAD_X)) {
        j->slope = slope, j->mean_du = mean_du, j->write = 1, j->reduce = 0;
        failed = loop(j, bodies[BACKWARD], j->chunks, scratch);
    }
    free(slope);
    return failed;
}

static int run_pool(Job *j)
{
    i64 lines = j->a.outer * (j->a.steps / 2);
    j->rows = most(1, CHUNK / most(1, j->a.inner * j->a.channels));
    return loop(j, bodies[j->a.op], (lines + j->rows - 1) / j->rows, (j->a.inner / 2) * j->a.channels);
}

/* Does what `args` says. Returns 0, or 1 where memory ran out. */
EXPORT i64 spikedistill_run(const Args *args)
{
    Job job, *j = &job;
    memset(j, 0, sizeof job);
    memcpy(&j->a, args, sizeof *args);
    int failed = 0;
    if (j->a.op == MOMENTS) {
        failed = run_moments(j);
        free(j->partial);
        return failed;
    }
    if (j->a.op == POOL || j->a.op == UNPOOL) return run_pool(j);
    i64 C = j->a.channels;
    double p = j->a.parameter, c;
    j->decay = (float)j->a.decay, j->gain = (float)j->a.gain, j->offset = (float)j->a.offset;
    j->v_th = (float)j->a.v_th, j->rest = (float)j->a.rest;
    j->fire = j->a.strict ? nextafterf(j->v_th, INFINITY) : j->v_th;
    switch (j->a.kind) {
    case ATAN:  /* (p/2) / (1 + (c z)^2) = (p / 2 c^2) / (1 / c^2 + z^2) */
        c = 3.14159265358979323846 * p / 2;
        j->s0 = (float)(1 / (c * c)), j->s1 = (float)(p / 2 / (c * c));
        break;
    case SIGMOID: j->s0 = (float)p; break;
    case TRIANGLE: j->s0 = (float)p, j->s1 = (float)(1 / (p * p)); break;
    default: j->s0 = (float)p, j->s1 = (float)(1 / (2 * p));
    }
    j->reset = !j->a.hard ? SOFT : j->rest == 0.0f ? HARD_ZERO : HARD;
    geometry(j, j->a.outer);
    if (j->a.mean) {
        if (!(j->scale = malloc(2 * C * sizeof(float) + 1))) return 1;
        j->shift = j->scale + C;
        for (i64 c = 0; c < C; c++) {
            float invstd = 1.0f / sqrtf(j->a.var[c] + (float)j->a.eps);
            j->scale[c] = j->a.weight ? j->a.weight[c] * invstd : invstd;
            float product = j->a.mean[c] * j->scale[c];
            j->shift[c] = j->a.bias ? j->a.bias[c] - product : -product;
        }
    }
    if (j->a.op == FORWARD) failed = loop(j, bodies[FORWARD], j->chunks, 4 * stride(j));
    else failed = run_backward(j);
    free(j->scale);
    free(j->partial);
    free(j->partial_coefficients);
    return failed;
}
