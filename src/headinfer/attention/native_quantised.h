/* Attention of a group of up to 16 query rows to a block of quantised keys, with products of integers.
 *
 * quantised.py describes the format. A key is k_c = low_c + scale_c u_c, so q . k = q . low + sum_c (q_c scale_c) u_c: a
 * number that all tokens of a unit share, and a product with the row q_c scale_c, which is rounded to integers for each
 * unit. A value is v_tc = low_t + scale_t u_tc, so sum_t w_t v_tc = sum_t w_t low_t + sum_t (w_t scale_t) u_tc: a number
 * that all elements share, and a product with weights that are rounded to integers for each unit. All integer sums are
 * exact. Rounded rows have 15 bits (BITS 8) or 8 bits (BITS 4).
 *
 * K is stored as [dk / RUN][UNIT][RUN], so the lanes of a sum are tokens. V is stored as [UNIT / RUN][dv][RUN], so the
 * lanes are elements of the head dim. No lanes have to be summed. With 4 bits, two vectors share the bytes of one: the
 * lower and the upper halves of the bytes.
 */

#define UNIT 64                                  /* tokens with common scales; BLOCK is a multiple */
#define RUN (BITS == 8 ? 2 : 4)                  /* products that a lane adds at a time */
#define MOST (BITS == 8 ? 16383.0f : 127.0f)     /* the largest integer of a rounded row: no sum overflows */
#define VECTOR_BYTES (16 * RUN * BITS / 8)       /* of 16 lanes */
#define KEY_BYTES(dk) ((dk) * BITS / 8 + (dk) / 16)
#define VALUE_BYTES(dv) (round_up(dv, 32) * BITS / 8 + 4)

#if BITS == 8
typedef int16_t rounded_t;
#else
typedef int8_t rounded_t;
#endif

/* -- 16 lanes of RUN integers, and of sums ---------------------------------------------------------------------------- */

#if LANES == 16
typedef __m512i lanes_t;
INLINE lanes_t no_lanes(void) { return _mm512_setzero_si512(); }
INLINE lanes_t all_lanes(const rounded_t *run) {
    int32_t bits;
    memcpy(&bits, run, 4);
    return _mm512_set1_epi32(bits);
}
INLINE void add_scaled(float *to, lanes_t sum, float unit, float shift) {
    const __m512 x = _mm512_cvtepi32_ps(sum);
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_fmadd_ps(x, _mm512_set1_ps(unit), _mm512_set1_ps(shift))));
}
#if BITS == 8
INLINE void load_two(const char *from, lanes_t *a, lanes_t *b) {
    *a = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)from));
    *b = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(from + 32)));
}
INLINE lanes_t multiply(lanes_t sum, lanes_t numbers, lanes_t row) {
#if defined(__AVX512VNNI__)
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(numbers), "v"(row));
    return sum;
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(numbers, row));
#endif
}
#else
INLINE void load_two(const char *from, lanes_t *a, lanes_t *b) {
    const __m512i both = _mm512_loadu_si512(from), low = _mm512_set1_epi8(15);
    *a = _mm512_and_si512(both, low);
    *b = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
}
INLINE lanes_t multiply(lanes_t sum, lanes_t numbers, lanes_t row) {
#if defined(__AVX512VNNI__)
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(numbers), "v"(row));
    return sum;
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(numbers, row), _mm512_set1_epi16(1)));
#endif
}
#endif
#else
#pragma GCC diagnostic ignored "-Wpsabi"   /* all functions of such vectors are inlined */
typedef int32_t lanes_t __attribute__((vector_size(64)));
typedef uint8_t bytes_t __attribute__((vector_size(64)));
INLINE lanes_t no_lanes(void) { return (lanes_t){0}; }
INLINE lanes_t all_lanes(const rounded_t *run) {
    int32_t bits;
    memcpy(&bits, run, 4);
    return (lanes_t){0} + bits;
}
INLINE void add_scaled(float *to, lanes_t sum, float unit, float shift) {
    for (int i = 0; i < 16; i++) to[i] += (float)sum[i] * unit + shift;
}
#if BITS == 8
INLINE void load_two(const char *from, lanes_t *a, lanes_t *b) {
    uint16_t wide[64];
    for (int i = 0; i < 64; i++) wide[i] = (uint8_t)from[i];
    memcpy(a, wide, 64);
    memcpy(b, wide + 32, 64);
}
INLINE lanes_t multiply(lanes_t sum, lanes_t numbers, lanes_t row) {
    return sum + (numbers & 0xffff) * (row << 16 >> 16) + (numbers >> 16) * (row >> 16);
}
#else
INLINE void load_two(const char *from, lanes_t *a, lanes_t *b) {
    bytes_t both;
    memcpy(&both, from, 64);
    *a = (lanes_t)(both & 15);
    *b = (lanes_t)(both >> 4);
}
INLINE lanes_t multiply(lanes_t sum, lanes_t numbers, lanes_t row) {
    for (int shift = 0; shift < 32; shift += 8) sum += (numbers >> shift & 15) * (row << (24 - shift) >> 24);
    return sum;
}
#endif
#endif

/* -- numbers of a unit -------------------------------------------------------------------------------------------------- */

/* Convert n float16 numbers, a multiple of 16, and multiply them by a factor. */
INLINE void from_halves(const char *from, int64_t n, float factor, float *to) {
#if LANES == 16
    for (int64_t i = 0; i < n; i += 16)
        *(vf *)(to + i) = factor * (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + 2 * i)));
#else
    for (int64_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, from + 2 * i, 2);
        const uint32_t number = (half & 0x7fffu) << 13;
        float size;
        memcpy(&size, &number, 4);
        size = number >= 0xf800000u ? size * 0x1p112f * 0x1p16f : size * 0x1p112f;   /* infinite or NaN, or a number */
        to[i] = factor * (half & 0x8000u ? -size : size);
    }
#endif
}

INLINE float sum_of(vf x) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

INLINE float most_of(vf x) {
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

/* The larger of the sizes |a| and |b| of each lane. */
INLINE vf larger_size(vf a, vf b) {
#if LANES == 16
    return (vf)_mm512_range_ps((__m512)a, (__m512)b, 11);
#else
    return larger(larger(a, -a), b);
#endif
}

/* Round lanes to integers of a unit, none of which is larger than MOST. Return what is left of them. */
INLINE vf round_lanes(vf exact, float back, float unit, rounded_t *to) {
#if LANES == 16
    const __m512i whole = _mm512_cvtps_epi32((__m512)(exact * back));
#if BITS == 8
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(whole));
#else
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(whole));
#endif
    return exact - (vf)_mm512_cvtepi32_ps(whole) * unit;
#else
    for (int i = 0; i < LANES; i++) {
        to[i] = (rounded_t)__builtin_lrintf(exact[i] * back);
        exact[i] -= (float)to[i] * unit;
    }
    return exact;
#endif
}

/* -- a block ---------------------------------------------------------------------------------------------------------- */

/* to[r][lane] += shift[r] + unit[r] sum_p row[r][p] numbers[p][lane] for 64 or 32 lanes. */
INLINE void product(const int rows, const int vectors, const rounded_t *row, const int64_t row_stride, const char *from,
                    const int64_t stride, const int64_t runs, const float *unit, const float *shift, float *to,
                    const int64_t to_stride) {
    lanes_t sum[4][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++) sum[r][c] = no_lanes();
    for (int64_t p = 0; p < runs; p++) {
        lanes_t numbers[4];
        soon(from + p * stride, vectors * VECTOR_BYTES);
        for (int c = 0; c < vectors; c += 2) load_two(from + p * stride + c * VECTOR_BYTES, numbers + c, numbers + c + 1);
        for (int r = 0; r < rows; r++) {
            const lanes_t weight = all_lanes(row + r * row_stride + p * RUN);
            for (int c = 0; c < vectors; c++) sum[r][c] = multiply(sum[r][c], numbers[c], weight);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++) add_scaled(to + r * to_stride + 16 * c, sum[r][c], unit[r], shift[r]);
}

/* The row, unit and shift with which product() multiplies sum_p x[r][p] (low[p] + scale[p] u[p]), for n numbers p.
 *
 * shift[r] has the offsets, and what is left of the rounded numbers times the middle of u. So the errors of rounding are
 * multiplied by the distances of u from its middle only. */
INLINE void round_rows(const int rows, const float *x, const int64_t x_stride, const float *scale, const float *low,
                       const int64_t n, rounded_t *row, const int64_t row_stride, float *unit, float *shift) {
    const float middle = ((1 << BITS) - 1) / 2.0f;
    vf sum[4] = {{0}}, most[4] = {{0}};
    float back[4];
    for (int64_t p = 0; p < n; p += LANES) {
        const vf factor = *(const vf *)(scale + p), offset = *(const vf *)(low + p);
        for (int r = 0; r < rows; r++) {
            const vf exact = *(const vf *)(x + r * x_stride + p), scaled = exact * factor;
            sum[r] += exact * offset;
            most[r] = larger_size(scaled, most[r]);
        }
    }
    for (int r = 0; r < rows; r++) {
        unit[r] = most_of(most[r]) / MOST;
        back[r] = unit[r] > 0 ? 1 / unit[r] : 0;
    }
    for (int64_t p = 0; p < n; p += LANES) {
        const vf factor = *(const vf *)(scale + p);
        for (int r = 0; r < rows; r++) {
            const vf exact = *(const vf *)(x + r * x_stride + p) * factor;
            sum[r] += round_lanes(exact, back[r], unit[r], row + r * row_stride + p) * middle;
        }
    }
    for (int r = 0; r < rows; r++) shift[r] = sum_of(sum[r]);
}

/* score[r * BLOCK + j] = q_r . k_j for `rows` rows and the keys of a unit. */
INLINE void dots_of_unit(const int rows, const float *q, const int64_t q_row, const float *scale, const float *low,
                         const char *numbers, const int64_t dk, rounded_t *row, float *score) {
    float unit[4], shift[4];
    round_rows(rows, q, q_row, scale, low, dk, row, dk, unit, shift);
    product(rows, 4, row, dk, numbers, 4 * VECTOR_BYTES, dk / RUN, unit, shift, score, BLOCK);
}

/* out[r] += sum_j weight[r * BLOCK + j] v_j for `rows` rows and the values of a unit. */
INLINE void weigh_unit(const int rows, const float *weight, const float *scale, const float *low, const char *numbers,
                       const int64_t dv, rounded_t *row, float *out) {
    float unit[4], shift[4];
    const int64_t stride = dv * RUN * BITS / 8;
    round_rows(rows, weight, BLOCK, scale, low, UNIT, row, UNIT, unit, shift);
    int64_t d = 0;
    for (; d + 64 <= dv; d += 64)
        product(rows, 4, row, UNIT, numbers + d * RUN * BITS / 8, stride, UNIT / RUN, unit, shift, out + d, dv);
    if (d < dv) product(rows, 2, row, UNIT, numbers + d * RUN * BITS / 8, stride, UNIT / RUN, unit, shift, out + d, dv);
}

/* Attend to one block of keys: the scores of all units, the softmax, then the values of all units. */
static void attend_in_integers(const call_t *call, int64_t rows, const char *q, const char *k, const char *v,
                               int64_t tokens, state_t state, char *work) {
    const int64_t dk = call->dk, q_row = round_up(dk, CHUNK), dv = round_up(call->dv, 32);   /* dv as it is stored */
    const int64_t dim = q_row > UNIT ? q_row : UNIT;   /* of the buffers: elements of a key, or tokens of a unit */
    float *score = (float *)work, *scale = score + GROUP * BLOCK, *low = scale + dim;
    rounded_t *row = (rounded_t *)(low + dim);
    memset(score, 0, sizeof(float) * BLOCK * round_up(rows, 4));
    for (int64_t t = 0; t < tokens; t += UNIT) {
        const char *keys = k + t * KEY_BYTES(dk), *numbers = keys + 4 * dk;
        from_halves(keys, dk, 1.0f / (1 << BITS), scale);
        from_halves(keys + 2 * dk, dk, 1, low);
        for (int64_t r = 0; r < rows; r += 4) {
            const float *query = (const float *)q + r * q_row;
            float *to = score + r * BLOCK + t;
            switch (tile_of(rows - r)) {   /* the number of rows decides what is in registers */
            case 1: dots_of_unit(1, query, q_row, scale, low, numbers, dk, row, to); break;
            case 2: dots_of_unit(2, query, q_row, scale, low, numbers, dk, row, to); break;
            default: dots_of_unit(4, query, q_row, scale, low, numbers, dk, row, to);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) to_weights(call, score + r * BLOCK, tokens, v, r, dv, state);
    for (int64_t t = 0; t < tokens; t += UNIT) {
        const char *values = v + t * VALUE_BYTES(call->dv), *numbers = values + 4 * UNIT;
        from_halves(values, UNIT, 1.0f / (1 << BITS), scale);
        from_halves(values + 2 * UNIT, UNIT, 1, low);
        for (int64_t r = 0; r < rows; r += 4) {
            const float *weight = score + r * BLOCK + t;
            float *out = state.out + r * dv;
            switch (tile_of(rows - r)) {
            case 1: weigh_unit(1, weight, scale, low, numbers, dv, row, out); break;
            case 2: weigh_unit(2, weight, scale, low, numbers, dv, row, out); break;
            default: weigh_unit(4, weight, scale, low, numbers, dv, row, out);
            }
        }
    }
}
