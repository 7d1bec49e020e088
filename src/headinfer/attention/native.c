/* Partial attention of a few query rows to many keys in host memory, without copying the keys.
 *
 * For every KV head and query row (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867):
 *     s_j = scale * q . k_j      out = sum_j exp(s_j) v_j / sum_j exp(s_j)      lse = log sum_j exp(s_j)
 *
 * The keys are passed as pieces (pointers and a number of tokens). The work is divided into units of one head and one
 * block of keys. The size of a block is fixed, each unit has its own partial result, and these are merged in a fixed
 * order: the result has the same bits for any number of threads. All arithmetic is float32; bfloat16 and float16 are
 * converted when they are loaded. The vectors are extensions of GCC and Clang, so the file compiles for any CPU, and
 * -march=native selects the instructions.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define LANES 16      /* floats in a vector */
#define BLOCK 1024    /* keys of a unit of work */
#define NEAR 32       /* keys whose values fit the L1 cache */
#define AHEAD 16384   /* how many bytes ahead to prefetch */
#define ALONE (1 << 19)   /* with fewer multiply-adds, one thread is faster than several */
#define MAX_ROWS 4    /* query rows that are computed in one pass over K and V */
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(32), aligned(2), may_alias));

typedef struct {
    const void *k, *v;                         /* [heads, tokens, dim]; each head is contiguous */
    int64_t k_head_stride, v_head_stride;      /* elements between heads */
    int64_t tokens;
} piece_t;

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* Load 16 elements as float32. */
INLINE vf load(int dtype, const char *base, int64_t element) {
    if (dtype == FLOAT32) return *(const vf *)(base + 4 * element);
    const vh half = *(const vh *)(base + 2 * element);
#if defined(__AVX512F__)
    if (dtype == BFLOAT16) return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
#else
    if (dtype == BFLOAT16) return (vf)(__builtin_convertvector(half, vu) << 16);
#endif
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)half);
#else
    vf wide;
    _Float16 lane[LANES];
    memcpy(lane, &half, sizeof lane);
    for (int i = 0; i < LANES; i++) wide[i] = (float)lane[i];
    return wide;
#endif
}

/* e^x for x <= 0, to about 1 ulp (Cephes polynomial). Below -87 the result is 0. NaN gives NaN. */
INLINE vf exp_nonpositive(vf x) {
    const vi keep = ~(x <= -87.0f);
    x = (vf)((vi)x & keep);
    vf n = x * 1.44269504088896341f - 0.5f;
    vi whole = __builtin_convertvector(n, vi);   /* rounds to nearest, because n <= 0 */
    n = __builtin_convertvector(whole, vf);
    x = x - n * 0.693359375f - n * -2.12194440e-4f;
    vf y = x * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    return (vf)((vi)(y * (vf)((whole + 127) << 23)) & keep);
}

#define FOLD(A, B, ...) (__builtin_shuffle(A, B, (vi){__VA_ARGS__}))
/* Sum the lanes of 16 vectors: lane j of the result is the sum of a[j]. This takes 15 additions of vectors. */
INLINE vf sum_each(vf *a) {
    for (int i = 0; i < 8; i++)
        a[i] = FOLD(a[i], a[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               FOLD(a[i], a[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        a[i] = FOLD(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               FOLD(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        a[i] = FOLD(a[i], a[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               FOLD(a[i], a[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return FOLD(a[0], a[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           FOLD(a[0], a[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/* tanh(x), to a few ulp: the rational approximation of Eigen (Eigen/src/Core/MathFunctionsImpl.h). NaN gives NaN. */
INLINE vf tanh_each(vf x) {
    const vi low = x < -7.9f, high = x > 7.9f;
    x = (vf)((vi)x & ~(low | high));
    const vf y = x * x;
    vf p = y * -2.76076847742355e-16f + 2.00018790482477e-13f;
    p = p * y + -8.60467152213735e-11f;
    p = p * y + 5.12229709037114e-08f;
    p = p * y + 1.48572235717979e-05f;
    p = p * y + 6.37261928875436e-04f;
    p = p * y + 4.89352455891786e-03f;
    vf q = y * 1.19825839466702e-06f + 1.18534705686654e-04f;
    q = q * y + 2.26843463243900e-03f;
    q = q * y + 4.89352518554385e-03f;
    const vf one = (vf){0} + 1.0f;
    return (vf)(((vi)(x * p / q) & ~(low | high)) | ((vi)one & high) | ((vi)-one & low));
}

INLINE float max_lane(vf a) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)a);
#else
    float best = a[0];
    for (int i = 1; i < LANES; i++) best = a[i] > best ? a[i] : best;
    return best;
#endif
}

INLINE float sum_lanes(vf a) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += a[i];
    return total;
}

/* Prefetch what the same loop reads AHEAD bytes later into the L2 cache. */
#define SOON(address) __builtin_prefetch((address) + AHEAD, 0, 2)

/* Dot products of `rows` query rows with the first n <= LANES / rows keys of k [n, dk]. Each key is read once for all
 * rows. Lane r * (LANES / rows) + j of the result is q_r . k_j, or -inf if j >= n.
 * q [rows, dk] is float32. If K is bfloat16, q_half holds the same numbers as bfloat16. */
INLINE vf dots(const int dtype, const int rows, const int64_t dk, const float *q, const uint16_t *q_half,
               const char *k, const int64_t n) {
    const int64_t width = dtype == FLOAT32 ? 4 : 2;
    const int keys = LANES / rows;
    vf dot[LANES];
    for (int i = 0; i < LANES; i++) dot[i] = (vf){0};
#if defined(__AVX512BF16__)
    if (dtype == BFLOAT16 && n == keys && dk % 32 == 0) {   /* exact: products of bfloat16 fit float32 */
        for (int64_t d = 0; d < dk; d += 32) {
            __m512bh part[MAX_ROWS];
            for (int r = 0; r < rows; r++) part[r] = (__m512bh)_mm512_loadu_si512(q_half + r * dk + d);
            for (int j = 0; j < keys; j++) {
                SOON(k + 2 * (j * dk + d));
                const __m512bh key = (__m512bh)_mm512_loadu_si512(k + 2 * (j * dk + d));
                for (int r = 0; r < rows; r++)
                    dot[r * keys + j] = (vf)_mm512_dpbf16_ps((__m512)dot[r * keys + j], part[r], key);
            }
        }
        return sum_each(dot);
    }
#endif
    if (n == keys) {
        for (int64_t d = 0; d < dk; d += LANES) {
            vf part[MAX_ROWS];
            for (int r = 0; r < rows; r++) part[r] = *(const vf *)(q + r * dk + d);
            for (int j = 0; j < keys; j++) {
                SOON(k + width * (j * dk + d));
                const vf key = load(dtype, k, j * dk + d);
                for (int r = 0; r < rows; r++) dot[r * keys + j] += part[r] * key;
            }
        }
    } else {
        for (int64_t j = 0; j < n; j++)
            for (int64_t d = 0; d < dk; d += LANES)
                for (int r = 0; r < rows; r++)
                    dot[r * keys + j] += *(const vf *)(q + r * dk + d) * load(dtype, k, j * dk + d);
    }
    vf s = sum_each(dot);
    for (int r = 0; r < rows; r++)
        for (int64_t j = n; j < keys; j++) s[r * keys + j] = -INFINITY;
    return s;
}

/* Load 32 bfloat16 as two vectors, of the even and of the odd elements. Each takes one instruction. */
INLINE void load_pairs(const char *base, int64_t element, vf *even, vf *odd) {
    const vu both = *(const vu *)(base + 2 * element);
    *even = (vf)(both << 16);
    *odd = (vf)(both & 0xffff0000u);
}

/* out[r] += sum_j weight[r][j] v_j for `rows` rows, `keys` keys and `count` vectors of v, from element d on.
 * If paired, each two vectors of out hold the even and the odd elements of 32. */
INLINE void weigh(const int dtype, const int paired, const int rows, const int count, const int64_t dv, const int64_t d,
                  const float *weight, const char *v, const int64_t keys, float *out) {
    const int64_t width = dtype == FLOAT32 ? 4 : 2;
    vf sum[MAX_ROWS][4], value[4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < count; c++) sum[r][c] = *(vf *)(out + r * dv + d + c * LANES);
    for (int64_t j = 0; j < keys; j++) {
        for (int c = 0; c < count; c += 2) {
            SOON(v + width * (j * dv + d + c * LANES));
            if (paired)
                load_pairs(v, j * dv + d + c * LANES, value + c, value + c + 1);
            else
                for (int i = c; i < c + 2 && i < count; i++) value[i] = load(dtype, v, j * dv + d + i * LANES);
        }
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < count; c++) sum[r][c] += weight[r * BLOCK + j] * value[c];
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < count; c++) *(vf *)(out + r * dv + d + c * LANES) = sum[r][c];
}

/* Compute one unit: the attention of `rows` query rows of one head to `tokens` <= BLOCK keys.
 * It reads all of K, computes the softmax, then reads all of V: the hardware prefetches two long sequential streams
 * better than short alternating ones.
 * q is [rows, dk]. Results: out [rows, dv], not normalised, peak [rows] = max s and mass [rows] = sum exp(s - peak). */
INLINE void unit(const int dtype, const int rows, const int64_t dk, const int64_t dv, const float scale,
                 const float soft_cap, const float *q, const uint16_t *q_half, const char *k, const char *v, const int64_t tokens,
                 float *out, float *peak, float *mass) {
    const int64_t width = dtype == FLOAT32 ? 4 : 2;
    const int keys = LANES / rows, paired = dtype == BFLOAT16 && dv % 32 == 0;
    float score[MAX_ROWS * BLOCK] __attribute__((aligned(64)));
    for (int64_t j = 0; j < tokens; j += keys) {
        const int64_t n = tokens - j < keys ? tokens - j : keys;
        vf s = scale * dots(dtype, rows, dk, q, q_half, k + width * j * dk, n);
        if (soft_cap != 0) {
            s = soft_cap * tanh_each(s / soft_cap);
            for (int64_t past = n; past < keys; past++)
                for (int r = 0; r < rows; r++) s[r * keys + past] = -INFINITY;
        }
        for (int r = 0; r < rows; r++) memcpy(score + r * BLOCK + j, (const float *)&s + r * keys, keys * sizeof(float));
    }
    const int64_t end = (tokens + keys - 1) / keys * keys;   /* fill the rest of the vector with -inf */
    for (int r = 0; r < rows; r++) {
        float *s = score + r * BLOCK, top = -INFINITY;
        vf total = {0};
        for (int64_t j = end; j % LANES; j++) s[j] = -INFINITY;
        for (int64_t j = 0; j < tokens; j += LANES) top = fmaxf(top, max_lane(*(vf *)(s + j)));
        for (int64_t j = 0; j < tokens; j += LANES) {
            const vf p = exp_nonpositive(*(vf *)(s + j) - top);
            *(vf *)(s + j) = p;
            total += p;
        }
        peak[r] = top;
        mass[r] = sum_lanes(total);
    }
    memset(out, 0, sizeof(float) * rows * dv);
    for (int64_t j = 0; j < tokens; j += NEAR) {   /* so that all but the first pass read V from the L1 cache */
        const int64_t near = tokens - j < NEAR ? tokens - j : NEAR;
        int64_t d = 0;
        for (; d + 4 * LANES <= dv; d += 4 * LANES)
            weigh(dtype, paired, rows, 4, dv, d, score + j, v + width * j * dv, near, out);
        for (; paired && d < dv; d += 2 * LANES)
            weigh(dtype, paired, rows, 2, dv, d, score + j, v + width * j * dv, near, out);
        for (; d < dv; d += LANES)
            weigh(dtype, 0, rows, 1, dv, d, score + j, v + width * j * dv, near, out);
    }
    for (int64_t at = 0; paired && at < rows * dv; at += 2 * LANES) {
        const vf even = *(vf *)(out + at), odd = *(vf *)(out + at + LANES);
        *(vf *)(out + at) = FOLD(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        *(vf *)(out + at + LANES) = FOLD(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
}

/* Copies of unit() for common shapes, whose constant arguments let the compiler unroll the loops over the head dim. */
#define SPECIAL(DTYPE, ROWS, DIM)                                                       \
    if (dtype == DTYPE && rows == ROWS && dk == DIM && dv == DIM) {                     \
        unit(DTYPE, ROWS, DIM, DIM, scale, soft_cap, q, q_half, k, v, tokens, out, peak, mass);   \
        return;                                                                         \
    }
#define SPECIAL_ROWS(DTYPE, DIM) SPECIAL(DTYPE, 1, DIM) SPECIAL(DTYPE, 2, DIM) SPECIAL(DTYPE, 4, DIM)
#define SPECIAL_DIMS(DTYPE) SPECIAL_ROWS(DTYPE, 64) SPECIAL_ROWS(DTYPE, 128)

static void run_unit(int dtype, int rows, int64_t dk, int64_t dv, float scale, float soft_cap,
                     const float *q, const uint16_t *q_half, const char *k, const char *v, int64_t tokens, float *out, float *peak,
                     float *mass) {
    SPECIAL_DIMS(BFLOAT16)
    SPECIAL_DIMS(FLOAT16)
    SPECIAL_DIMS(FLOAT32)
    switch (rows) {   /* the number of rows decides the layout of vectors, so it is a constant in each copy */
    case 1: unit(dtype, 1, dk, dv, scale, soft_cap, q, q_half, k, v, tokens, out, peak, mass); break;
    case 2: unit(dtype, 2, dk, dv, scale, soft_cap, q, q_half, k, v, tokens, out, peak, mass); break;
    default: unit(dtype, 4, dk, dv, scale, soft_cap, q, q_half, k, v, tokens, out, peak, mass);
    }
}

/* How many floats headinfer_attend() needs for partial results. */
int64_t headinfer_scratch(const piece_t *pieces, int64_t n_pieces, int64_t heads, int64_t rows, int64_t dv) {
    int64_t units = 0;
    for (int64_t p = 0; p < n_pieces; p++) units += (pieces[p].tokens + BLOCK - 1) / BLOCK;
    return heads * units * rows * (dv + 2) + 1;
}

/* Attention of q [heads, rows, dk] to the keys of all pieces: out [heads, rows, dv] and lse [heads, rows].
 * q, out and lse are float32 and contiguous, the pieces are of `dtype`. dk and dv must be multiples of 16. If dtype is
 * BFLOAT16, q_half holds q as bfloat16; otherwise it is not read. soft_cap is 0 if the scores are not capped. scratch holds
 * headinfer_scratch() floats.
 * Returns 0, or 1 if memory for the partial results cannot be allocated. */
int headinfer_attend(const piece_t *pieces, int64_t n_pieces, const float *q, const uint16_t *q_half,
                     int64_t heads, int64_t rows, int64_t dk, int64_t dv, float scale, float soft_cap, int dtype, int threads,
                     float *scratch, float *out, float *lse) {
    int64_t *first = malloc(sizeof(int64_t) * (n_pieces + 1));
    if (!first) return 1;
    first[0] = 0;
    for (int64_t p = 0; p < n_pieces; p++)
        first[p + 1] = first[p] + (pieces[p].tokens + BLOCK - 1) / BLOCK;
    const int64_t units = first[n_pieces], cell = rows * (dv + 2), width = dtype == FLOAT32 ? 4 : 2;
    int64_t keys = 0;
    for (int64_t p = 0; p < n_pieces; p++) keys += pieces[p].tokens;
    const int attend_alone = heads * rows * keys * (dk + dv) < ALONE, merge_alone = heads * rows * units * dv < ALONE;
    /* A thread gets neighbouring units, because what it prefetches past the end of a unit is the start of the next. */
    int64_t stretch = heads * units / (8 * threads);
    stretch = stretch < 1 ? 1 : stretch > 16 ? 16 : stretch;
#pragma omp parallel for num_threads(threads) schedule(dynamic, stretch) if (!attend_alone)
    for (int64_t index = 0; index < heads * units; index++) {
        const int64_t head = index / units, u = index % units;
        int64_t low = 0, high = n_pieces - 1;
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (first[middle] <= u) low = middle; else high = middle - 1;
        }
        const piece_t *piece = pieces + low;
        const int64_t start = (u - first[low]) * BLOCK;
        const int64_t left = piece->tokens - start, tokens = left < BLOCK ? left : BLOCK;
        const char *k = (const char *)piece->k + width * (head * piece->k_head_stride + start * dk);
        const char *v = (const char *)piece->v + width * (head * piece->v_head_stride + start * dv);
        float *o = scratch + index * cell, *peak = o + rows * dv, *mass = peak + rows;
        for (int64_t r = 0; r < rows;) {
            const int step = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
            const int64_t at = (head * rows + r) * dk;
            run_unit(dtype, step, dk, dv, scale, soft_cap, q + at, q_half + at, k, v, tokens, o + r * dv, peak + r, mass + r);
            r += step;
        }
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (!merge_alone)
    for (int64_t hr = 0; hr < heads * rows; hr++) {
        const int64_t head = hr / rows, r = hr % rows;
        const float *base = scratch + head * units * cell;
        float top = -INFINITY, total = 0.0f, *o = out + hr * dv;
        memset(o, 0, sizeof(float) * dv);
        for (int64_t u = 0; u < units; u++) {
            const float peak = base[u * cell + rows * dv + r];
            top = peak > top ? peak : top;
        }
        for (int64_t u = 0; u < units; u++) {   /* a NaN in any unit makes total NaN, and so the whole row */
            const float *from = base + u * cell;
            const float weight = expf(from[rows * dv + r] - top);
            total += weight * from[rows * dv + rows + r];
            for (int64_t d = 0; d < dv; d++) o[d] += weight * from[r * dv + d];
        }
        for (int64_t d = 0; d < dv && units; d++) o[d] /= total;
        lse[hr] = units ? top + logf(total) : -INFINITY;
    }
    free(first);
    return 0;
}
