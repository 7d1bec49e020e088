/* Partial attention of a few query rows to many keys in host memory, without copying the keys.
 *
 * For every KV head and query row (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867):
 *     s_j = scale * q . k_j      out = sum_j exp(s_j) v_j / sum_j exp(s_j)      lse = log sum_j exp(s_j)
 *
 * The keys are passed as pieces (pointers and a number of tokens), which are divided into blocks. The blocks of a head
 * are divided into strands, by the number of blocks only. A strand is attended to in order, by one thread, and has its
 * own partial result; these are merged in a fixed order. So the result has the same bits for any number of threads, and
 * the scratch memory does not grow with the number of keys.
 *
 * The file is compiled for one target and one dtype of K and V (native_build.py). Two headers attend to a block:
 *     native_vector.h   in float32, on any target
 *     native_matrix.h   with products of bfloat16, in AVX512-BF16 or AMX, for more than VECTOR_ROWS query rows
 * If K and V are quantised, a third does:
 *     native_quantised.h   with products of integers, on any target
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define BLOCK 512         /* keys whose scores are computed before their weights */
#define STRANDS 64        /* partial results of a head, at most */
#define SPAN 16           /* keys that are multiplied at a time; BLOCK is a multiple */
#define GROUP 16          /* query rows that share a pass over a block, at most */
#define VECTOR_ROWS 4     /* up to so many rows, memory bounds the speed in float32 too, which is more precise */
#define AHEAD (BITS ? 8192 : 16384)   /* how many bytes ahead to prefetch */
#define ALONE (1 << 19)   /* with fewer multiply-adds, one thread is faster than several */
#define INLINE static inline __attribute__((always_inline))

#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2
#if DTYPE == 3   /* K and V are quantised, and q is float32 */
#define BITS 8
#elif DTYPE == 4
#define BITS 4
#else
#define BITS 0
#endif
#if BITS
#undef DTYPE
#define DTYPE FLOAT32
#endif
#define WIDTH (DTYPE == FLOAT32 ? 4 : 2)   /* bytes of an element of q, and of K and V if they are not quantised */

typedef struct {
    const void *k, *v;                         /* [heads, tokens, dim]; each head is contiguous */
    int64_t k_head_stride, v_head_stride;      /* elements between heads; bytes if they are quantised */
    int64_t tokens;
} piece_t;

/* The call. q [heads, rows, dk] is of DTYPE; out [heads, rows, dv] and lse [heads, rows] are float32. All are contiguous.
 * dk and dv are multiples of 8. */
typedef struct {
    const piece_t *pieces;
    int64_t n_pieces;
    const void *q;
    int64_t heads, rows, dk, dv, threads;
    float scale, soft_cap;   /* soft_cap is 0 if the scores are not capped */
    void *scratch;           /* headinfer_scratch() bytes */
    float *out, *lse;
} call_t;

/* The state of a group of query rows after some keys: out [GROUP, dv_padded], not normalised, peak [GROUP] = max s and
 * mass [GROUP] = sum exp(s - peak). */
typedef struct {
    float *out, *peak, *mass;
} state_t;

INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Prefetch into the L2 cache what is AHEAD bytes behind a range. These requests are spread evenly over the work: a core
 * can have only a few of them open. */
INLINE void soon(const char *from, const int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + AHEAD + at, 0, 2);
}

/* Return SPAN rows of `row` bytes: those at k, or if there are only n of them, a copy with zeros behind it. */
INLINE const char *whole_span(const char *k, int64_t n, int64_t row, char *copy) {
    if (n >= SPAN) return k;
    memcpy(copy, k, n * row);
    memset(copy + n * row, 0, (SPAN - n) * row);
    return copy;
}

#include "native_vector.h"
#if BITS
#include "native_quantised.h"
#define KEY_STRIDE(call) KEY_BYTES((call)->dk)       /* bytes between tokens of a head */
#define VALUE_STRIDE(call) VALUE_BYTES((call)->dv)
#define ELEMENT_BYTES 1
#define attend_in_vectors attend_in_integers
#else
#define KEY_STRIDE(call) (WIDTH * (call)->dk)
#define VALUE_STRIDE(call) (WIDTH * (call)->dv)
#define ELEMENT_BYTES WIDTH
#endif
#if DTYPE == BFLOAT16 && (defined(__AVX512BF16__) || defined(TILES))
#include "native_matrix.h"
#define IN_MATRIX(call) ((call)->rows > VECTOR_ROWS)
#else   /* these are not called */
#define IN_MATRIX(call) 0
#define pack_for_matrix pack_for_vectors
#define attend_in_matrix attend_in_vectors
#define matrix_element vector_element
#endif

/* -- scratch memory: the packed queries, partial results of strands, and what each thread works on ------------------ */

typedef struct {
    int64_t groups, blocks, strands;
    int64_t packed_bytes;                /* of the queries of a group */
    int64_t dv_padded, state_floats;     /* of a group */
    int64_t work_bytes;                  /* of a thread */
} layout_t;

static layout_t layout_of(const call_t *call) {
    layout_t l = {0};
    for (int64_t p = 0; p < call->n_pieces; p++) l.blocks += (call->pieces[p].tokens + BLOCK - 1) / BLOCK;
    l.groups = (call->rows + GROUP - 1) / GROUP;
    l.strands = least(l.blocks, STRANDS);
    const int64_t dk = round_up(call->dk, 32);
    l.dv_padded = round_up(call->dv, 32);
    l.packed_bytes = GROUP * dk * 4;
    l.state_floats = GROUP * (l.dv_padded + 2);
    /* scores and weights; a span of K, or tiles of V; a row of the output */
    l.work_bytes = GROUP * BLOCK * 8 + SPAN * dk * WIDTH + 4096 + 4 * l.dv_padded;
    return l;
}

/* The bytes of scratch memory of a call. They depend on the number of keys up to STRANDS blocks only. */
int64_t headinfer_scratch(const call_t *call) {
    const layout_t l = layout_of(call);
    return 64 + call->heads * l.groups * (l.packed_bytes + l.strands * l.state_floats * 4) + call->threads * l.work_bytes;
}

INLINE state_t state_at(float *states, int64_t dv_padded) {
    return (state_t){states, states + GROUP * dv_padded, states + GROUP * (dv_padded + 1)};
}

/* -- the call -------------------------------------------------------------------------------------------------------- */

/* Attend to the blocks from `first` up to `end` of one head, with all groups of its queries. */
static void attend_strand(const call_t *call, const layout_t *l, int64_t head, int64_t first, int64_t end,
                          const char *packed, float *states, char *work) {
    for (int64_t g = 0; g < l->groups; g++) {
        const state_t state = state_at(states + g * l->state_floats, l->dv_padded);
        memset(state.out, 0, sizeof(float) * GROUP * l->dv_padded);
        memset(state.mass, 0, sizeof(float) * GROUP);
        for (int64_t r = 0; r < GROUP; r++) state.peak[r] = -INFINITY;
    }
    int64_t number = 0;   /* of the piece's first block */
    for (const piece_t *piece = call->pieces; number < end; piece++) {
        const int64_t blocks = (piece->tokens + BLOCK - 1) / BLOCK;
        const char *keys = (const char *)piece->k + ELEMENT_BYTES * head * piece->k_head_stride;
        const char *values = (const char *)piece->v + ELEMENT_BYTES * head * piece->v_head_stride;
        for (int64_t b = first > number ? first - number : 0; b < least(blocks, end - number); b++) {
            const int64_t tokens = least(piece->tokens - b * BLOCK, BLOCK);
            const char *k = keys + b * BLOCK * KEY_STRIDE(call), *v = values + b * BLOCK * VALUE_STRIDE(call);
            for (int64_t g = 0; g < l->groups; g++) {
                const int64_t rows = least(call->rows - g * GROUP, GROUP);
                const state_t state = state_at(states + g * l->state_floats, l->dv_padded);
                const char *q = packed + g * l->packed_bytes;
                if (IN_MATRIX(call))
                    attend_in_matrix(call, rows, q, k, v, tokens, state, work);
                else
                    attend_in_vectors(call, rows, q, k, v, tokens, state, work);
            }
        }
        number += blocks;
    }
}

/* Merge the strands of one query row, in order, into out [dv] and lse. A NaN in any strand makes the whole row NaN. */
static void merge_row(const call_t *call, const layout_t *l, const float *states, int64_t r, float *sum, float *out,
                      float *lse) {
    const int64_t stride = l->groups * l->state_floats, dv = l->dv_padded;
    float top = -INFINITY, total = 0;
    for (int64_t s = 0; s < l->strands; s++) {
        const float peak = states[s * stride + GROUP * dv + r];
        top = peak > top ? peak : top;
    }
    memset(sum, 0, sizeof(float) * dv);
    for (int64_t s = 0; s < l->strands; s++) {
        const float *from = states + s * stride;
        const float weight = expf(from[GROUP * dv + r] - top);
        total += weight * from[GROUP * (dv + 1) + r];
        for (int64_t d = 0; d < dv; d++) sum[d] += weight * from[r * dv + d];
    }
    for (int64_t d = 0; d < dv; d++) {
        const int64_t element = IN_MATRIX(call) ? matrix_element(d) : vector_element(d);
        if (element < call->dv) out[element] = l->strands ? sum[d] / total : 0;
    }
    *lse = l->strands ? top + logf(total) : -INFINITY;
}

/* Compute attention of all query rows to the keys of all pieces, without a mask. */
void headinfer_attend(const call_t *call) {
    const layout_t l = layout_of(call);
    const int64_t heads = call->heads, rows = call->rows;
    char *packed = (char *)round_up((int64_t)call->scratch, 64);
    float *states = (float *)(packed + heads * l.groups * l.packed_bytes);
    char *works = (char *)(states + heads * l.groups * l.strands * l.state_floats);
    int64_t keys = 0;
    for (int64_t p = 0; p < call->n_pieces; p++) keys += call->pieces[p].tokens;
    for (int64_t hg = 0; hg < heads * l.groups; hg++) {
        const int64_t head = hg / l.groups, row = hg % l.groups * GROUP;
        const char *q = (const char *)call->q + WIDTH * (head * rows + row) * call->dk;
        if (IN_MATRIX(call))
            pack_for_matrix(call, least(rows - row, GROUP), q, packed + hg * l.packed_bytes);
        else
            pack_for_vectors(call, least(rows - row, GROUP), q, packed + hg * l.packed_bytes);
    }
    const int64_t products = rows * heads * (call->dk + call->dv);
    const int threads = (int)call->threads;
#pragma omp parallel num_threads(threads) if (products * keys >= ALONE)
    {
#if defined(_OPENMP)
        char *work = works + omp_get_thread_num() * l.work_bytes;
#else
        char *work = works;
#endif
#pragma omp for schedule(dynamic, 1)
        for (int64_t index = 0; index < heads * l.strands; index++) {
            const int64_t head = index / l.strands, s = index % l.strands;
            attend_strand(call, &l, head, s * l.blocks / l.strands, (s + 1) * l.blocks / l.strands,
                          packed + head * l.groups * l.packed_bytes, states + index * l.groups * l.state_floats, work);
        }
#pragma omp for schedule(static)
        for (int64_t hr = 0; hr < heads * rows; hr++) {
            const int64_t head = hr / rows, r = hr % rows;
            const float *from = states + (head * l.strands * l.groups + r / GROUP) * l.state_floats;
            merge_row(call, &l, from, r % GROUP, (float *)work, call->out + hr * call->dv, call->lse + hr);
        }
    }
}

/* Read memory as fast as this target's vectors can: the bound of what attention can reach. Returns a checksum. */
int64_t headinfer_read(const char *from, int64_t bytes, int64_t threads) {
    int64_t sum = 0;
    const int count = (int)threads;
#pragma omp parallel for num_threads(count) schedule(dynamic, 1) reduction(+ : sum)
    for (int64_t part = 0; part < bytes; part += 1 << 20) {
        const char *end = from + least(part + (1 << 20), bytes) - 4 * sizeof(vi);
        vi a[4] = {{0}};
        for (const char *at = from + part; at <= end; at += 4 * sizeof(vi)) {
            for (int64_t line = 0; line < (int64_t)(4 * sizeof(vi)); line += 64) __builtin_prefetch(at + 4096 + line, 0, 2);
            for (int i = 0; i < 4; i++) a[i] ^= *(const vi *)(at + i * sizeof(vi));
        }
        const vi all = a[0] ^ a[1] ^ a[2] ^ a[3];
        for (int i = 0; i < LANES; i++) sum += all[i];
    }
    return sum;
}
