/* What the native kernels share: types, one element, the loop over chunks and the choice of instructions. */

#ifndef SPIKEDISTILL_NATIVE_H
#define SPIKEDISTILL_NATIVE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define HIDDEN __attribute__((visibility("hidden")))
#define R restrict

#if defined(__x86_64__) && defined(__GNUC__)
#define X86
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#if defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10
#define DOT __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")))
#endif
#endif

typedef void (*Body)(void *job, i64 chunk, float *scratch);

/* Runs body for chunks 0 ... count - 1 in the threads of torch. Returns 0, or 1 where no thread found memory. */
HIDDEN int spikedistill_loop(void *job, Body body, i64 count, i64 threads, size_t floats);

/* The instructions taken: baseline (0), AVX2 (1), AVX-512 (2), its bfloat16 (3). */
HIDDEN extern i64 spikedistill_level;

/* Bytes of the arguments of spikedistill_convolve. */
HIDDEN extern const i64 spikedistill_conv;

INLINE float load(const void *p, i64 i, int bf16)
{
    if (!bf16) return ((const float *)p)[i];
    uint32_t u = (uint32_t)((const uint16_t *)p)[i] << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

INLINE void store(void *p, i64 i, float f, int bf16)  /* nearest even, NaN stays NaN */
{
    if (!bf16) { ((float *)p)[i] = f; return; }
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    ((uint16_t *)p)[i] = (uint16_t)(f != f ? 0x7fc0 : r);
}

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }

#endif
