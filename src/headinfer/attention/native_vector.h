/* Attention of a group of query rows to a block of keys in float32, in vectors of the target's width.
 *
 * Rows are computed in tiles of 4, 2 or 1. Scores: the lanes are elements of the head dim, DOTS products at a time, and
 * their lanes are summed at the end. Values: the lanes are elements of the head dim too. K and V of half types are
 * converted when they are loaded; bfloat16 in AVX512-BF16 is multiplied as it is, which is exact for scores.
 *
 * K and V are loaded in chunks of two vectors. If PAIRED, these hold the even and the odd elements: an instruction each.
 */

#if defined(__AVX512F__)
#define LANES 16   /* floats in a vector */
#define DOTS 16    /* products whose sums are kept in registers */
#elif defined(__AVX2__)
#define LANES 8
#define DOTS 8
#elif defined(__aarch64__)
#define LANES 4
#define DOTS 16
#else
#define LANES 4
#define DOTS 8
#endif
#define CHUNK (2 * LANES)
/* With little work for each line of memory, the hardware prefetches better than instructions. */
#define PREFETCHES(rows) ((rows) > (EXACT_PRODUCTS ? 2 : 1))
#define NEAR 64   /* keys whose values fit the L1 cache */
#if DTYPE == BFLOAT16 || (DTYPE == FLOAT16 && !defined(__F16C__))
#define PAIRED 1
#else
#define PAIRED 0
#endif
#if DTYPE == BFLOAT16 && defined(__AVX512BF16__)
#define EXACT_PRODUCTS 1
#define PACKED_WIDTH 2   /* bytes of an element of packed queries */
#else
#define EXACT_PRODUCTS 0
#define PACKED_WIDTH 4
#endif

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if defined(__clang__)
#define SHUFFLE(A, B, ...) (__builtin_shufflevector(A, B, __VA_ARGS__))
#else
#define SHUFFLE(A, B, ...) (__builtin_shuffle(A, B, (vi){__VA_ARGS__}))
#endif

#if LANES == 8
#define IN_REGISTER(vector) __asm__("" : "+x"(vector))   /* else GCC would load it again for each use */
#else
#define IN_REGISTER(vector)
#endif

INLINE vf all(float x) { return (vf){0} + x; }

INLINE vf choose(vi condition, vf yes, vf no) { return (vf)(((vi)yes & condition) | ((vi)no & ~condition)); }

INLINE vf larger(vf a, vf b) {   /* b if either is NaN */
#if LANES == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

/* -- loads ----------------------------------------------------------------------------------------------------------- */

typedef struct {
    vf a, b;
} chunk_t;

/* Load n elements, which are CHUNK or at the end of a row fewer, and zeros in place of the others. */
#if DTYPE == FLOAT32
INLINE chunk_t load(const char *from, int64_t n) {
    if (n >= CHUNK) return (chunk_t){*(const vf *)from, *(const vf *)(from + 4 * LANES)};
#if LANES == 16
    const __mmask16 a = (__mmask16)((1u << least(n, LANES)) - 1), b = (__mmask16)(((1u << n) - 1) >> LANES);
    return (chunk_t){(vf)_mm512_maskz_loadu_ps(a, from), (vf)_mm512_maskz_loadu_ps(b, from + 4 * LANES)};
#else
    return (chunk_t){*(const vf *)from, {0}};   /* n is half a chunk, since head dims are multiples of 8 */
#endif
}
#else
INLINE vu load_bits(const char *from, int64_t n) {
    if (n >= CHUNK) return *(const vu *)from;
#if LANES == 16
    return (vu)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), from);
#elif LANES == 8
    return (vu)_mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)from));   /* n is half a chunk, 8 elements */
#else
    return (vu){0};   /* not reached: every head dim is a multiple of this chunk */
#endif
}

#if DTYPE == BFLOAT16
INLINE chunk_t load(const char *from, int64_t n) {
    const vu both = load_bits(from, n);
    return (chunk_t){(vf)(both << 16), (vf)(both & 0xffff0000u)};
}
#elif defined(__AVX512F__)
INLINE chunk_t load(const char *from, int64_t n) {
    const __m512i both = (__m512i)load_bits(from, n);
    return (chunk_t){(vf)_mm512_cvtph_ps(_mm512_castsi512_si256(both)),
                     (vf)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
}
#elif defined(__F16C__)
INLINE chunk_t load(const char *from, int64_t n) {
    const __m256i both = (__m256i)load_bits(from, n);
    return (chunk_t){(vf)_mm256_cvtph_ps(_mm256_castsi256_si128(both)),
                     (vf)_mm256_cvtph_ps(_mm256_extracti128_si256(both, 1))};
}
#else
/* Convert the lower 16 bits of each lane. The factor moves the exponent, also that of subnormal numbers. */
INLINE vf from_half(vu bits) {
    const vu number = (bits & 0x7fffu) << 13, top = (vu)((number & 0xf800000u) == 0xf800000u);   /* infinite or NaN */
    const vf size = (vf)number * 0x1p112f;
    return (vf)((vu)size | (top & 0x7f800000u) | (bits & 0x8000u) << 16);
}

INLINE chunk_t load(const char *from, int64_t n) {
    const vu both = load_bits(from, n);
    return (chunk_t){from_half(both & 0xffffu), from_half(both >> 16)};
}
#endif
#endif

/* Where element d of the padded state is in a row of the output. */
INLINE int64_t vector_element(int64_t d) {
    if (!PAIRED) return d;
    const int64_t at = d % CHUNK;
    return d - at + (at < LANES ? 2 * at : 2 * (at - LANES) + 1);
}

/* -- functions of vectors -------------------------------------------------------------------------------------------- */

/* e^x for x <= 0, to about 1 ulp: 2^n times a polynomial that was fitted to 2^r, |r| <= 1/2. Below -87 it is 0. */
INLINE vf exp_nonpositive(vf x) {
#if LANES == 16
    const vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), 0);
#else
    const float whole = 12582912.0f;   /* 1.5 * 2^23: adding it rounds to an integer, in the lowest bits */
    const vf shifted = x * 1.44269504088896341f + whole, n = shifted - whole;
#endif
    const vf r = x * 1.44269504088896341f - n;
    vf y = r * 1.326472727e-3f + 9.671512733e-3f;
    y = y * r + 5.550733744e-2f;
    y = y * r + 0.2402224208f;
    y = y * r + 0.6931469776f;
    y = y * r + 1.0f;
#if LANES == 16
    const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLE_UQ);
    return (vf)_mm512_maskz_scalef_ps(keep, (__m512)y, (__m512)n);
#else
    return (vf)((vi)(y * (vf)(((vi)shifted << 23) + 0x3f800000)) & ~(x <= -87.0f));
#endif
}

/* tanh x, to a few ulp: the rational approximation of Eigen (Eigen/src/Core/MathFunctionsImpl.h). */
INLINE vf tanh_each(vf x) {
    const float end = 7.90531110763549805f;   /* where it becomes 1 */
    x = choose(x > end, all(end), choose(x < -end, all(-end), x));
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
    return x * p / q;
}

/* Replace n dot products, a multiple of LANES, by their scores. */
INLINE void to_scores(const call_t *call, float *dot, int64_t n) {
    const float scale = call->scale, cap = call->soft_cap;
    for (int64_t j = 0; j < n; j += LANES) *(vf *)(dot + j) *= scale;
    if (cap == 0) return;
    for (int64_t j = 0; j < n; j += LANES) *(vf *)(dot + j) = cap * tanh_each(*(vf *)(dot + j) / cap);
}

/* Sum the lanes of LANES vectors: lane j of the result is the sum of a[j]. */
INLINE vf sum_each(vf *a) {
#if LANES == 16
    for (int i = 0; i < 8; i++)
        a[i] = SHUFFLE(a[i], a[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SHUFFLE(a[i], a[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        a[i] = SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        a[i] = SHUFFLE(a[i], a[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLE(a[i], a[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLE(a[0], a[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLE(a[0], a[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#elif LANES == 8
    for (int i = 0; i < 4; i++)
        a[i] = SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 2; i++)
        a[i] = SHUFFLE(a[i], a[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a[i], a[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(a[0], a[1], 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a[0], a[1], 1, 9, 3, 11, 5, 13, 7, 15);
#else
    for (int i = 0; i < 2; i++) a[i] = SHUFFLE(a[i], a[i + 2], 0, 1, 4, 5) + SHUFFLE(a[i], a[i + 2], 2, 3, 6, 7);
    return SHUFFLE(a[0], a[1], 0, 4, 2, 6) + SHUFFLE(a[0], a[1], 1, 5, 3, 7);
#endif
}

/* -- a block --------------------------------------------------------------------------------------------------------- */

/* Pack the queries of a group, with rows of zeros up to a multiple of 4: chunks as load() returns them, or bfloat16 if
 * products of it are exact. */
static void pack_for_vectors(const call_t *call, int64_t rows, const char *q, char *packed) {
    const int64_t dk = round_up(call->dk, CHUNK);
    memset(packed, 0, GROUP * dk * 4);
    for (int64_t r = 0; r < rows; r++) {
#if EXACT_PRODUCTS
        memcpy(packed + r * dk * 2, q + r * call->dk * 2, call->dk * 2);
#else
        for (int64_t d = 0; d < call->dk; d += CHUNK)
            *(chunk_t *)(packed + 4 * (r * dk + d)) = load(q + WIDTH * (r * call->dk + d), call->dk - d);
#endif
    }
}

/* dot[r * DOTS / rows + i] += q_r . k_i for `keys` keys and a chunk, of which n elements are left in a row. */
INLINE void add_products(const int rows, const int keys, const char *q, const int64_t q_row, const char *k,
                         const int64_t row, const int64_t n, vf *dot) {
    const int next = DOTS / rows;
#if EXACT_PRODUCTS
    __m512bh key[4];
    for (int i = 0; i < keys; i++) key[i] = (__m512bh)load_bits(k + i * row, n);
    for (int r = 0; r < rows; r++) {
        const __m512bh part = (__m512bh)_mm512_loadu_si512(q + r * q_row);
        for (int i = 0; i < keys; i++)
            dot[r * next + i] = (vf)_mm512_dpbf16_ps((__m512)dot[r * next + i], part, key[i]);
    }
#else
    chunk_t key[4];
    for (int i = 0; i < keys; i++) key[i] = load(k + i * row, n);
    for (int r = 0; r < rows; r++) {
        vf a = *(const vf *)(q + r * q_row), b = *(const vf *)(q + r * q_row + 4 * LANES);
        IN_REGISTER(a);
        IN_REGISTER(b);
        for (int i = 0; i < keys; i++) dot[r * next + i] += a * key[i].a;
        for (int i = 0; i < keys; i++) dot[r * next + i] += b * key[i].b;
    }
#endif
}

/* score[r * BLOCK + j] = q_r . k_j for `rows` rows of packed queries and the SPAN keys of k. */
INLINE void dots(const int rows, const int64_t dk, const char *q, const char *k, float *score) {
    const int64_t row = WIDTH * dk, q_row = PACKED_WIDTH * round_up(dk, CHUNK);
    const int keys = DOTS / rows, few = rows < 4 || EXACT_PRODUCTS ? 2 : keys;
    for (int64_t j = 0; j < SPAN; j += keys) {
        vf dot[DOTS];
        for (int i = 0; i < DOTS; i++) dot[i] = (vf){0};
#pragma GCC unroll 8
        for (int i = 0; i < keys; i += few) {   /* nearly in the order of memory */
            const char *from = k + (j + i) * row;
            int64_t d = 0;
            for (; d + CHUNK <= dk; d += CHUNK) {
                if (PREFETCHES(rows)) soon(from + few * WIDTH * d, few * WIDTH * CHUNK);
                add_products(rows, few, q + PACKED_WIDTH * d, q_row, from + WIDTH * d, row, CHUNK, dot + i);
            }
            if (d < dk) add_products(rows, few, q + PACKED_WIDTH * d, q_row, from + WIDTH * d, row, dk - d, dot + i);
        }
        float sums[DOTS];
        for (int i = 0; i < DOTS; i += LANES) *(vf *)(sums + i) = sum_each(dot + i);
        for (int r = 0; r < rows; r++) memcpy(score + r * BLOCK + j, sums + r * keys, sizeof(float) * keys);
    }
}

/* out[r] += sum_j weight[r * BLOCK + j] v_j for `rows` rows, n keys and `count` chunks from v on. If there is one chunk,
 * `end` elements are left in a row. */
INLINE void weigh(const int rows, const int count, const int64_t dv, const int64_t end, const float *weight,
                  const char *v, const int64_t n, float *out, const int64_t out_stride) {
    vf sum[4][DOTS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2 * count; c++) sum[r][c] = *(const vf *)(out + r * out_stride + c * LANES);
    for (int64_t j = 0; j < n; j++) {
        chunk_t value[DOTS / 2];
        if (PREFETCHES(rows)) soon(v + WIDTH * j * dv, count * WIDTH * CHUNK);
        for (int c = 0; c < count; c++) value[c] = load(v + WIDTH * (j * dv + c * CHUNK), count == 1 ? end : CHUNK);
        for (int r = 0; r < rows; r++) {
            const float w = weight[r * BLOCK + j];
            for (int c = 0; c < count; c++) {
                sum[r][2 * c] += w * value[c].a;
                sum[r][2 * c + 1] += w * value[c].b;
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2 * count; c++) *(vf *)(out + r * out_stride + c * LANES) = sum[r][c];
}

INLINE void weigh_all(const int rows, const int64_t dv, const float *weight, const char *v, const int64_t n, float *out,
                      const int64_t out_stride) {
    const int count = (int)least(DOTS / 2 / rows, 4);
    int64_t d = 0;
    for (; d + count * CHUNK <= dv; d += count * CHUNK)
        weigh(rows, count, dv, CHUNK, weight, v + WIDTH * d, n, out + d, out_stride);
    for (; d + CHUNK <= dv && count > 1; d += CHUNK)
        weigh(rows, 1, dv, CHUNK, weight, v + WIDTH * d, n, out + d, out_stride);
    if (d < dv) weigh(rows, 1, dv, dv - d, weight, v + WIDTH * d, n, out + d, out_stride);
}

INLINE int64_t tile_of(int64_t rows) { return rows >= 3 ? 4 : rows; }

/* Replace the dot products s of row r and some keys by their weights exp(score - peak), and update the row's state. V,
 * which is read next, is prefetched. */
INLINE void to_weights(const call_t *call, float *s, int64_t tokens, const char *v, int64_t r, int64_t out_stride,
                       state_t state) {
    vf top = all(state.peak[r]);
    to_scores(call, s, round_up(tokens, LANES));
    for (int64_t j = tokens; j % LANES; j++) s[j] = -INFINITY;
    for (int64_t j = 0; j < tokens; j += LANES) top = larger(*(vf *)(s + j), top);
    float peak = top[0];
    for (int i = 1; i < LANES; i++) peak = top[i] > peak ? top[i] : peak;
    vf sum = {0};
    for (int64_t j = 0; j < tokens; j += LANES) {
        soon(v + 64 * (r * BLOCK + j) / LANES, 64);
        const vf p = exp_nonpositive(*(vf *)(s + j) - peak);
        *(vf *)(s + j) = p;
        sum += p;
    }
    const float keep = exp_nonpositive(all(state.peak[r] - peak))[0];
    if (keep != 1)
        for (int64_t d = 0; d < out_stride; d += LANES) *(vf *)(state.out + r * out_stride + d) *= keep;
    state.mass[r] *= keep;
    for (int i = 0; i < LANES; i++) state.mass[r] += sum[i];
    state.peak[r] = peak;
}

#if !BITS
/* Attend to one block of keys. It reads all of K, computes the softmax, then reads all of V: the hardware prefetches two
 * long sequential streams better than short alternating ones. */
static void attend_in_vectors(const call_t *call, int64_t rows, const char *q, const char *k, const char *v,
                              int64_t tokens, state_t state, char *work) {
    const int64_t dk = call->dk, dv = call->dv, out_stride = round_up(dv, 32);
    const int64_t q_row = PACKED_WIDTH * round_up(dk, CHUNK);
    float *score = (float *)work;
    char *span = work + sizeof(float) * GROUP * BLOCK;
    for (int64_t j = 0; j < tokens; j += SPAN) {
        const char *keys = whole_span(k + WIDTH * j * dk, tokens - j, WIDTH * dk, span);
        for (int64_t r = 0; r < rows; r += 4) {
            switch (tile_of(rows - r)) {   /* the number of rows decides what is in registers */
            case 1: dots(1, dk, q + r * q_row, keys, score + r * BLOCK + j); break;
            case 2: dots(2, dk, q + r * q_row, keys, score + r * BLOCK + j); break;
            default: dots(4, dk, q + r * q_row, keys, score + r * BLOCK + j);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) to_weights(call, score + r * BLOCK, tokens, v, r, out_stride, state);
    for (int64_t j = 0; j < tokens; j += NEAR) {   /* so that all but the first pass read V from the L1 cache */
        const int64_t n = least(tokens - j, NEAR);
        for (int64_t r = 0; r < rows; r += 4) {
            float *out = state.out + r * out_stride;
            const float *weight = score + r * BLOCK + j;
            switch (tile_of(rows - r)) {
            case 1: weigh_all(1, dv, weight, v + WIDTH * j * dv, n, out, out_stride); break;
            case 2: weigh_all(2, dv, weight, v + WIDTH * j * dv, n, out, out_stride); break;
            default: weigh_all(4, dv, weight, v + WIDTH * j * dv, n, out, out_stride);
            }
        }
    }
}
#endif
