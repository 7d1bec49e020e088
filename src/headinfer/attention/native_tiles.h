/* multiply_keys() and multiply_values() with the tiles of AMX: 16 rows of 64 bytes each.
 *
 * With EMULATED_TILES the instructions are emulated in C, so that the tests can run the same algorithm on any CPU with
 * AVX512-BF16. It has been compiled for AMX, but never been run on a CPU that has AMX.
 *
 * A tile of K, 16 keys by 32 elements as they are stored, times a tile of packed queries, 16 pairs of elements by 16
 * rows, gives scores [16 keys, 16 rows]. A tile of weights, 16 rows by 16 pairs of keys, times a tile of V, 16 pairs of
 * keys by 16 elements, gives outputs [16 rows, 16 elements].
 */

/* The tiles, by number. The last elements of a key, if dk is not a multiple of 32, have tiles of their own shape. */
#define SUM 0
#define LEFT 1
#define RIGHT 2
#define LAST_LEFT 3
#define LAST_RIGHT 4

typedef struct {   /* the operand of LDTILECFG */
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) tile_config_t;

#if defined(EMULATED_TILES)
typedef struct {
    uint8_t row[16][64];
} tile_t;

static _Thread_local tile_t tiles[8];
static _Thread_local tile_config_t config;

#define LOAD_CONFIG(from) (config = *(from))
#define RELEASE() (memset(&config, 0, sizeof config), memset(tiles, 0, sizeof tiles))
#define LOAD_TILE(tile, from, stride) emulate_load(tile, (const char *)(from), stride)
#define STORE_TILE(tile, to, stride) emulate_store(tile, (char *)(to), stride)
#define ZERO_TILE(tile) memset(&tiles[tile], 0, sizeof(tile_t))
#define MULTIPLY_TILES(sum, left, right) emulate_multiply(sum, left, right)

static void emulate_load(int tile, const char *from, int64_t stride) {   /* TILELOADD */
    memset(&tiles[tile], 0, sizeof(tile_t));
    for (int r = 0; r < config.rows[tile]; r++) memcpy(tiles[tile].row[r], from + r * stride, config.row_bytes[tile]);
}

static void emulate_store(int tile, char *to, int64_t stride) {   /* TILESTORED */
    for (int r = 0; r < config.rows[tile]; r++) memcpy(to + r * stride, tiles[tile].row[r], config.row_bytes[tile]);
}

static float emulated_element(const uint8_t *pair, int which) {
    uint32_t bits = 0;
    memcpy((char *)&bits + 2, pair + 2 * which, 2);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void emulate_multiply(int sum, int left, int right) {   /* TDPBF16PS */
    for (int m = 0; m < config.rows[sum]; m++)
        for (int k = 0; k < config.row_bytes[left] / 4; k++)
            for (int n = 0; n < config.row_bytes[sum] / 4; n++)
                for (int which = 0; which < 2; which++)
                    ((float *)tiles[sum].row[m])[n] += emulated_element(tiles[left].row[m] + 4 * k, which) *
                                                       emulated_element(tiles[right].row[k] + 4 * n, which);
}
#else
#define LOAD_CONFIG(from) _tile_loadconfig(from)
#define RELEASE() _tile_release()
#define LOAD_TILE(tile, from, stride) _tile_loadd(tile, from, stride)
#define STORE_TILE(tile, to, stride) _tile_stored(tile, to, stride)
#define ZERO_TILE(tile) _tile_zero(tile)
#define MULTIPLY_TILES(sum, left, right) _tile_dpbf16ps(sum, left, right)
#endif

/* Configure the tiles of this thread. */
INLINE void begin_tiles(int64_t dk) {
    tile_config_t config_of_dk = {.palette = 1};
    const int64_t last = dk % 32;
    for (int tile = SUM; tile <= LAST_RIGHT; tile++) {
        config_of_dk.rows[tile] = tile == LAST_RIGHT && last ? last / 2 : 16;
        config_of_dk.row_bytes[tile] = tile == LAST_LEFT && last ? 2 * last : 64;
    }
    LOAD_CONFIG(&config_of_dk);
}

INLINE void end_tiles(void) { RELEASE(); }

/* score[j * GROUP + r] = q_r . k_j for the SPAN keys of k. */
INLINE void multiply_keys(const char *q, const char *k, const int64_t dk, float *score) {
    ZERO_TILE(SUM);
    int64_t d = 0;
    for (; d + 32 <= dk; d += 32) {
        soon(k + 2 * SPAN * d, 2 * SPAN * 32);
        LOAD_TILE(LEFT, k + 2 * d, 2 * dk);
        LOAD_TILE(RIGHT, q + 2 * GROUP * d, 4 * GROUP);
        MULTIPLY_TILES(SUM, LEFT, RIGHT);
    }
    if (d < dk) {
        LOAD_TILE(LAST_LEFT, k + 2 * d, 2 * dk);
        LOAD_TILE(LAST_RIGHT, q + 2 * GROUP * d, 4 * GROUP);
        MULTIPLY_TILES(SUM, LAST_LEFT, LAST_RIGHT);
    }
    STORE_TILE(SUM, score, 4 * GROUP);
}

/* out[r] += sum_j weight_jr v_j for n <= NEAR keys; the weights are [NEAR / 2, GROUP] pairs. */
INLINE void multiply_values(int64_t rows, const int32_t *weight, const char *v, int64_t n, int64_t dv, float *out,
                            int64_t out_stride, char *work) {
    (void)rows;
    for (int64_t first = 0; first < n; first += 32) {
        int32_t by_row[GROUP][16];
        for (int p = 0; p < 16; p++)
            for (int r = 0; r < GROUP; r++) by_row[r][p] = weight[(first / 2 + p) * GROUP + r];
        LOAD_TILE(LEFT, by_row, sizeof by_row[0]);
        for (int64_t d = 0; d < dv; d += 32) {
            const __mmask32 mask = mask_of(dv - d);
            for (int64_t j = 0; j < 32; j += 2) {
                const int64_t left = n - first - j;
                const char *from = v + 2 * ((first + j) * dv + d);
                __m512i low, high;
                load_pairs(from, dv, left > 0 ? mask : 0, left > 1 ? mask : 0, &low, &high);
                soon(from, 64);
                soon(from + 2 * dv, 64);
                _mm512_storeu_si512(work + 32 * j, low);
                _mm512_storeu_si512(work + 32 * j + 1024, high);
            }
            for (int half = 0; half < 2; half++) {
                LOAD_TILE(SUM, out + d + 16 * half, 4 * out_stride);
                LOAD_TILE(RIGHT, work + 1024 * half, 64);
                MULTIPLY_TILES(SUM, LEFT, RIGHT);
                STORE_TILE(SUM, out + d + 16 * half, 4 * out_stride);
            }
        }
    }
}
