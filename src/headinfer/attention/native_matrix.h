/* Attention of a group of up to 16 query rows to a block of bfloat16 keys, with products of bfloat16.
 *
 * Both matrix products sum in float32. The products of scores are exact; weights are rounded to bfloat16, as on GPUs,
 * and their sum is not. The lanes of scores and weights are the query rows, so that no lanes have to be summed, and K is
 * used as it is stored. Weights are packed in pairs of keys, and so is V when it is loaded: the even lanes of a vector
 * hold one key, the odd lanes the next.
 *
 * Two primitives multiply: multiply_keys() and multiply_values(). They exist for AVX512-BF16 and, if TILES is defined,
 * for the tiles of AMX (native_tiles.h).
 */

/* Where element d of the padded state is in a row of the output: unpacking pairs changes the order within 128 bits. */
INLINE int64_t matrix_element(int64_t d) {
    const int64_t at = d % 32, lane = at % 16;
    return d - at + 8 * (lane / 4) + lane % 4 + (at < 16 ? 0 : 4);
}

/* Pack the queries of a group as [dk / 2, GROUP] pairs of elements, with zeros for missing rows. */
static void pack_for_matrix(const call_t *call, int64_t rows, const char *q, char *packed) {
    const int64_t pairs = call->dk / 2;
    memset(packed, 0, 4 * GROUP * round_up(pairs, 16));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t p = 0; p < pairs; p++) memcpy(packed + 4 * (GROUP * p + r), q + 4 * (r * pairs + p), 4);
}

/* Load 32 elements of two keys of V as pairs, or zeros where the masks are 0. */
INLINE void load_pairs(const char *v, int64_t dv, __mmask32 first, __mmask32 second, __m512i *low, __m512i *high) {
    const __m512i a = _mm512_maskz_loadu_epi16(first, v), b = _mm512_maskz_loadu_epi16(second, v + 2 * dv);
    *low = _mm512_unpacklo_epi16(a, b);
    *high = _mm512_unpackhi_epi16(a, b);
}

/* The mask of the elements of V that are left in a row: n, or 32. */
INLINE __mmask32 mask_of(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

#if defined(TILES)
#include "native_tiles.h"
#else
/* score[j * GROUP + r] = q_r . k_j for the SPAN keys of k. */
INLINE void multiply_keys(const char *q, const char *k, const int64_t dk, float *score) {
    __m512 sum[SPAN];
    for (int j = 0; j < SPAN; j++) sum[j] = _mm512_setzero_ps();
    for (int64_t p = 0; p < dk / 2; p++) {
        const __m512bh rows = (__m512bh)_mm512_loadu_si512(q + 4 * GROUP * p);
        soon(k + 64 * p, 64);
        for (int j = 0; j < SPAN; j++) {
            int32_t pair;
            memcpy(&pair, k + 2 * j * dk + 4 * p, 4);
            sum[j] = _mm512_dpbf16_ps(sum[j], rows, (__m512bh)_mm512_set1_epi32(pair));
        }
    }
    for (int j = 0; j < SPAN; j++) _mm512_storeu_ps(score + GROUP * j, sum[j]);
}

/* sum[r] += weight_jr v_j for 8 rows and two keys; see load_pairs(). */
INLINE void multiply_pair(const int32_t *weight, const char *v, int64_t dv, __mmask32 first, __mmask32 second,
                          __m512 sum[8][2]) {
    __m512i low, high;
    load_pairs(v, dv, first, second, &low, &high);
    for (int r = 0; r < 8; r++) {
        const __m512bh w = (__m512bh)_mm512_set1_epi32(weight[r]);
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], (__m512bh)low, w);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], (__m512bh)high, w);
    }
}

/* out[r] += sum_j weight_jr v_j for 8 rows and n <= NEAR keys; the weights are [NEAR / 2, GROUP] pairs. */
INLINE void multiply_values_of_8(const int32_t *weight, const char *v, int64_t n, int64_t dv, float *out,
                                 int64_t out_stride) {
    for (int64_t d = 0; d < dv; d += 32) {
        const __mmask32 mask = mask_of(dv - d);
        __m512 sum[8][2];
        for (int r = 0; r < 8; r++)
            for (int c = 0; c < 2; c++) sum[r][c] = _mm512_loadu_ps(out + r * out_stride + d + 16 * c);
        int64_t j = 0;
        for (; j + 2 <= n; j += 2) {
            soon(v + 2 * (j * dv + d), 64);
            soon(v + 2 * ((j + 1) * dv + d), 64);
            multiply_pair(weight + GROUP * (j / 2), v + 2 * (j * dv + d), dv, mask, mask, sum);
        }
        if (j < n) multiply_pair(weight + GROUP * (j / 2), v + 2 * (j * dv + d), dv, mask, 0, sum);
        for (int r = 0; r < 8; r++)
            for (int c = 0; c < 2; c++) _mm512_storeu_ps(out + r * out_stride + d + 16 * c, sum[r][c]);
    }
}

INLINE void multiply_values(int64_t rows, const int32_t *weight, const char *v, int64_t n, int64_t dv, float *out,
                            int64_t out_stride, char *work) {
    (void)work;
    for (int64_t r = 0; r < rows; r += 8) multiply_values_of_8(weight + r, v, n, dv, out + r * out_stride, out_stride);
}

INLINE void begin_tiles(int64_t dk) { (void)dk; }
INLINE void end_tiles(void) {}
#endif

/* Attend to one block of keys; see attend_in_vectors(). */
static void attend_in_matrix(const call_t *call, int64_t rows, const char *q, const char *k, const char *v,
                             int64_t tokens, state_t state, char *work) {
    const int64_t dk = call->dk, dv = call->dv, out_stride = round_up(dv, 32);
    float *score = (float *)work;
    int32_t *weight = (int32_t *)(score + GROUP * BLOCK);
    char *span = (char *)(weight + GROUP * BLOCK / 2);
    begin_tiles(dk);
    for (int64_t j = 0; j < tokens; j += SPAN) {
        const char *keys = whole_span(k + 2 * j * dk, tokens - j, 2 * dk, span);
        multiply_keys(q, keys, dk, score + GROUP * j);
    }
    /* 16 bits of the first half of a vector and of the second, in turns: element 2i is i, element 2i + 1 is 16 + i. */
    const vi half = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i in_turns = (__m512i)(half | (half + 16) << 16);
    const vf before = *(vf *)state.peak;
    vf peak = before, mass = {0};
    to_scores(call, score, GROUP * tokens);
    for (int64_t j = 0; j < tokens; j++) peak = larger(*(vf *)(score + GROUP * j), peak);
    const int64_t end = round_up(tokens, NEAR);
    for (int64_t j = tokens; j < end; j++) *(vf *)(score + GROUP * j) = all(-INFINITY);
    for (int64_t j = 0; j < end; j += 2) {
        const vf even = exp_nonpositive(*(vf *)(score + GROUP * j) - peak);
        const vf odd = exp_nonpositive(*(vf *)(score + GROUP * (j + 1)) - peak);
        mass += even + odd;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);   /* the even key, then the odd */
        _mm512_storeu_si512(weight + GROUP * (j / 2), _mm512_permutexvar_epi16(in_turns, both));
        soon(v + 32 * j, 64);
    }
    const vf keep = exp_nonpositive(before - peak);
    for (int64_t r = 0; r < rows; r++)
        if (keep[r] != 1)
            for (int64_t d = 0; d < out_stride; d += LANES) *(vf *)(state.out + r * out_stride + d) *= keep[r];
    *(vf *)state.mass = *(vf *)state.mass * keep + mass;
    *(vf *)state.peak = peak;
    for (int64_t j = 0; j < tokens; j += NEAR) {
        const int64_t n = least(tokens - j, NEAR);
        multiply_values(rows, weight + GROUP * (j / 2), v + 2 * j * dv, n, dv, state.out, out_stride, span);
    }
    end_tiles();
}
