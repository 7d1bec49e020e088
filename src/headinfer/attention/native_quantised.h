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
    return _mm512_dpwssd_epi32(sum, numbers, row);
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
    return _mm512_dpbusd_epi32(sum, numbers, row);
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

/* Round x [n] to integers of a unit, n a multiple of 16, none of which is larger than MOST. Return what is to be added
 * for the rest: the sum of its lanes times the middle of the numbers. So errors are left of the numbers' distances from
 * their middle only. */
INLINE vf round_row(const float *x, int64_t n, float unit, rounded_t *to) {
    const float back = unit > 0 ? 1 / unit : 0, middle = ((1 << BITS) - 1) / 2.0f;
    vf rest = {0};
#if LANES == 16
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 exact = _mm512_loadu_ps(x + i);
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(exact, _mm512_set1_ps(back)));
        rest += (vf)_mm512_fnmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(unit), exact);
#if BITS == 8
        _mm256_storeu_si256((__m256i *)(to + i), _mm512_cvtepi32_epi16(whole));
#else
        _mm_storeu_si128((__m128i *)(to + i), _mm512_cvtepi32_epi8(whole));
#endif
    }
#else
    float left = 0;
    for (int64_t i = 0; i < n; i++) {
        to[i] = (rounded_t)__builtin_lrintf(x[i] * back);
        left += x[i] - (float)to[i] * unit;
    }
    rest[0] = left;
#endif
    return rest * middle;
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

INLINE void product_of(int64_t rows, const int vectors, const rounded_t *row, int64_t row_stride, const char *from,
                       int64_t stride, int64_t runs, const float *unit, const float *shift, float *to,
                       int64_t to_stride) {
    switch (rows) {
    case 1: product(1, vectors, row, row_stride, from, stride, runs, unit, shift, to, to_stride); break;
    case 2: product(2, vectors, row, row_stride, from, stride, runs, unit, shift, to, to_stride); break;
    default: product(4, vectors, row, row_stride, from, stride, runs, unit, shift, to, to_stride);
    }
}

/* row, unit and shift of the scores of a unit: q_c scale_c as integers, and q . low. */
INLINE void prepare_scores(const float *query, const float *scale, const float *low, int64_t dk, float *scaled,
                           rounded_t *row, float *unit, float *shift) {
    vf sum = {0}, most = {0};
    for (int64_t d = 0; d < dk; d += LANES) {
        const vf x = *(const vf *)(query + d), y = x * *(const vf *)(scale + d);
        sum += x * *(const vf *)(low + d);
        most = larger(larger(y, -y), most);
        *(vf *)(scaled + d) = y;
    }
    *unit = most_of(most) / MOST;
    *shift = sum_of(sum + round_row(scaled, dk, *unit, row));
}

/* Attend to one block of keys: units of UNIT tokens, one after the other. */
static void attend_in_integers(const call_t *call, int64_t rows, const char *q, const char *k, const char *v,
                               int64_t tokens, state_t state, char *work) {
    const int64_t dk = call->dk, dv = call->dv, q_row = round_up(dk, CHUNK), out_stride = round_up(dv, 32);
    const int64_t dim = q_row > UNIT ? q_row : UNIT;   /* of the buffers: elements of a key, or tokens of a unit */
    float *scale = (float *)work, *low = scale + dim, *scaled = low + dim, *score = scaled + dim;
    rounded_t *row = (rounded_t *)(score + GROUP * UNIT);
    float unit[GROUP], shift[GROUP];
    for (int64_t t = 0; t < tokens; t += UNIT) {
        const char *keys = k + t * KEY_BYTES(dk), *values = v + t * VALUE_BYTES(dv);
        from_halves(keys, dk, 1.0f / (1 << BITS), scale);
        from_halves(keys + 2 * dk, dk, 1, low);
        memset(score, 0, sizeof(float) * rows * UNIT);
        for (int64_t r = 0; r < rows; r++)
            prepare_scores((const float *)q + r * q_row, scale, low, dk, scaled, row + r * dim, unit + r, shift + r);
        for (int64_t r = 0; r < rows; r += 4)
            product_of(tile_of(rows - r), 4, row + r * dim, dim, keys + 4 * dk, 4 * VECTOR_BYTES, dk / RUN, unit + r,
                       shift + r, score + r * UNIT, UNIT);
        from_halves(values, UNIT, 1.0f / (1 << BITS), scale);
        from_halves(values + 2 * UNIT, UNIT, 1, low);
        vf widest = {0};
        for (int64_t j = 0; j < UNIT; j += LANES) widest = larger(*(vf *)(scale + j), widest);
        const float step = most_of(widest) / MOST;
        for (int64_t r = 0; r < rows; r++) {
            float *s = score + r * UNIT;
            to_scores(call, s, UNIT);
            vf top = *(vf *)s;
            for (int64_t j = LANES; j < UNIT; j += LANES) top = larger(*(vf *)(s + j), top);
            const float peak = most_of(top);   /* of this unit, so that the largest weight is 1 before it is rounded */
            vf sum = {0}, lows = {0};
            for (int64_t j = 0; j < UNIT; j += LANES) {
                const vf p = exp_nonpositive(*(vf *)(s + j) - peak);
                sum += p;
                lows += p * *(vf *)(low + j);
                *(vf *)(scaled + j) = p * *(vf *)(scale + j);
            }
            lows += round_row(scaled, UNIT, step, row + r * UNIT);
            const float now = peak > state.peak[r] ? peak : state.peak[r];
            const vf factors = exp_nonpositive((vf){peak, state.peak[r]} - now);
            if (factors[1] != 1)
                for (int64_t d = 0; d < out_stride; d += LANES) *(vf *)(state.out + r * out_stride + d) *= factors[1];
            state.mass[r] = state.mass[r] * factors[1] + sum_of(sum) * factors[0];
            state.peak[r] = now;
            unit[r] = step * factors[0];
            shift[r] = sum_of(lows) * factors[0];
        }
        const char *numbers = values + 4 * UNIT;
        const int64_t stride = out_stride * RUN * BITS / 8;
        for (int64_t r = 0; r < rows; r += 4) {
            float *out = state.out + r * out_stride;
            int64_t d = 0;
            for (; d + 64 <= out_stride; d += 64)
                product_of(tile_of(rows - r), 4, row + r * UNIT, UNIT, numbers + d * RUN * BITS / 8, stride, UNIT / RUN,
                           unit + r, shift + r, out + d, out_stride);
            if (d < out_stride)
                product_of(tile_of(rows - r), 2, row + r * UNIT, UNIT, numbers + d * RUN * BITS / 8, stride, UNIT / RUN,
                           unit + r, shift + r, out + d, out_stride);
        }
    }
}
