/* The epilogue of one tile of the gaussian mixture, in one visit of the tile while it is in cache.
 *
 * Compiled at first use by the system's C compiler (native.py); plain torch does the same without it, slower. Every
 * loop is branch free and vectorises. NaN passes through: comparisons are written so that they keep it.
 */
#include <stdint.h>
#include <string.h>

#define STRIP 512
#define FLUSH 32

typedef struct {
    int64_t rows, columns, stride;
    int32_t levels, chain, mode, hollow; /* mode 0: sum only, 1: slopes into the tile, 2: values into the tile */
    const double *row, *column;          /* squared norms */
    const double *row_weight, *column_weight; /* NULL for 1 */
    const double *table;                 /* rate, origin, value, slope: 4 x levels; slopes carry their factor */
    double total;
    double *row_sum, *column_sum;        /* mode 1: added to; NULL if not wanted */
} prefgen_tile;

static inline float expm1_one(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    float n = __builtin_rintf(x * 1.44269504088896341f);
    float r = __builtin_fmaf(n, -0.693145751953125f, x);
    r = __builtin_fmaf(n, -1.42860682030941723212e-6f, r);
    float p = 1.0f / 5040.0f;
    p = __builtin_fmaf(p, r, 1.0f / 720.0f);
    p = __builtin_fmaf(p, r, 1.0f / 120.0f);
    p = __builtin_fmaf(p, r, 1.0f / 24.0f);
    p = __builtin_fmaf(p, r, 1.0f / 6.0f);
    p = __builtin_fmaf(p, r, 0.5f);
    p = __builtin_fmaf(p * r, r, r);
    int32_t bits = ((int32_t)n + 127) << 23;
    float s;
    memcpy(&s, &bits, sizeof s);
    return __builtin_fmaf(s, p, s - 1.0f);
}

static void strip(const prefgen_tile *t, float *x, const float *shift, int64_t count, float row_shift,
                  const float *rate, const float *level_shift, const float *value, const float *slope, float *k,
                  float *g) {
    float u[STRIP];
    for (int32_t level = 0; level < t->levels; ++level) {
        const float a = value[level], b = slope[level];
        if (level && t->chain) {
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) u[j] = __builtin_fmaf(u[j], u[j], 2.0f * u[j]);
        } else {
            const float twice = 2.0f * rate[level], shift_row = row_shift * rate[level] + level_shift[level];
            const float scale = rate[level];
#pragma omp simd
            for (int64_t j = 0; j < count; ++j)
                u[j] = expm1_one(__builtin_fmaf(twice, x[j], __builtin_fmaf(scale, shift[j], shift_row)));
        }
        if (level == 0) {
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) { k[j] = a * u[j]; g[j] = b * u[j]; }
        } else if (t->mode == 1) {
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) {
                k[j] = __builtin_fmaf(a, u[j], k[j]);
                g[j] = __builtin_fmaf(b, u[j], g[j]);
            }
        } else {
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) k[j] = __builtin_fmaf(a, u[j], k[j]);
        }
    }
}

/* Shifts are taken around the origin of the first level, halved between row and column: small numbers, each added in
 * double and rounded once. Other origins (levels that are no chain) come back through level_shift. */
void prefgen_mmd_tile(prefgen_tile *t, float *tile) {
    float rate[64], level_shift[64], value[64], slope[64];
    float k[STRIP], g[STRIP], shift[STRIP], weight[STRIP], below[STRIP];
    const int32_t levels = t->levels;
    const double origin = t->table[levels];
    for (int32_t level = 0; level < levels; ++level) {
        rate[level] = (float)t->table[level];
        level_shift[level] = (float)(t->table[level] * (t->table[levels + level] - origin));
        value[level] = (float)t->table[2 * levels + level];
        slope[level] = (float)t->table[3 * levels + level];
    }
    t->total = 0.0;
    for (int64_t first = 0; first < t->columns; first += STRIP) {
        const int64_t count = t->columns - first < STRIP ? t->columns - first : STRIP;
        for (int64_t j = 0; j < count; ++j) {
            shift[j] = (float)(0.5 * origin - t->column[first + j]);
            weight[j] = t->column_weight ? (float)t->column_weight[first + j] : 1.0f;
            below[j] = 0.0f;
        }
        for (int64_t i = 0; i < t->rows; ++i) {
            float *x = tile + i * t->stride + first;
            const float own = t->row_weight ? (float)t->row_weight[i] : 1.0f;
            strip(t, x, shift, count, (float)(0.5 * origin - t->row[i]), rate, level_shift, value, slope, k, g);
            if (t->hollow && i >= first && i < first + count) k[i - first] = g[i - first] = 0.0f;
            float sum = 0.0f, along = 0.0f;
            if (t->column_weight || t->row_weight) {
#pragma omp simd
                for (int64_t j = 0; j < count; ++j) { k[j] *= weight[j] * own; g[j] *= weight[j] * own; }
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < count; ++j) sum += k[j];
            t->total += sum;
            if (t->mode == 1) {
#pragma omp simd reduction(+ : along)
                for (int64_t j = 0; j < count; ++j) {
                    x[j] = g[j];
                    along += g[j];
                    below[j] += g[j];
                }
                if (t->row_sum) t->row_sum[i] += along;
                if (t->column_sum && ((i + 1) % FLUSH == 0 || i + 1 == t->rows)) {
                    for (int64_t j = 0; j < count; ++j) { t->column_sum[first + j] += below[j]; below[j] = 0.0f; }
                }
            } else if (t->mode == 2) {
                memcpy(x, k, (size_t)count * sizeof(float));
            }
        }
    }
}

/* Small problems in three calls, so that a loss of 16 rows does not cost a hundred tensor operations. The sets are
 * stacked: z is (n + m, d), and `work` holds 5 d + 4 (n + m) doubles: means of x and y, what rounding the means left
 * over (two of d), the gap, then squared norms, cross norms, own and cross sums of slopes (four of n + m). */
static void centre(const float *x, int64_t n, int64_t d, double *mean, double *rest, double *norm, float *out) {
    for (int64_t c = 0; c < d; ++c) mean[c] = rest[c] = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        const float *row = x + i * d;
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) mean[c] += row[c];
    }
    for (int64_t c = 0; c < d; ++c) mean[c] = (float)(mean[c] / (double)n);
    for (int64_t i = 0; i < n; ++i) {
        const float *row = x + i * d;
        float *to = out + i * d;
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < d; ++c) {
            to[c] = row[c] - (float)mean[c];
            rest[c] += to[c];
            sum += (double)to[c] * to[c];
        }
        norm[i] = sum;
    }
    for (int64_t c = 0; c < d; ++c) rest[c] /= (double)n;
}

double prefgen_mmd_prepare(const float *x, int64_t n, const float *y, int64_t m, int64_t d, float *z, double *work) {
    double *gap = work + 4 * d, *norm = gap + d, *cross = norm + n + m;
    double far = 0.0, spread_x = 0.0, spread_y = 0.0;
    centre(x, n, d, work, work + 2 * d, norm, z);
    centre(y, m, d, work + d, work + 3 * d, norm + n, z + n * d);
    for (int64_t c = 0; c < d; ++c) {
        gap[c] = work[c] - work[d + c];
        far += gap[c] * gap[c];
    }
    for (int64_t i = 0; i < n + m; ++i) {
        const float *row = z + i * d;
        double along = 0.0;
#pragma omp simd reduction(+ : along)
        for (int64_t c = 0; c < d; ++c) along += row[c] * gap[c];
        cross[i] = i < n ? norm[i] + 2.0 * along + far : norm[i] - 2.0 * along;
        if (i < n) spread_x += norm[i]; else spread_y += norm[i];
    }
    for (int64_t i = 0; i < 2 * (n + m); ++i) cross[n + m + i] = 0.0;
    return spread_x / (double)n + spread_y / (double)m + 0.5 * far;
}

/* dots (n + m, n + m) becomes the signed slopes; tables: 3 x 4 x levels for xx, yy, xy; totals: 3. */
void prefgen_mmd_small(float *dots, int64_t n, int64_t m, int64_t d, double *work, const double *tables, int32_t levels,
                       int32_t chain, int32_t slopes, double *totals) {
    const int64_t all = n + m;
    double *norm = work + 5 * d, *cross = norm + all, *own_sum = cross + all, *cross_sum = own_sum + all;
    prefgen_tile t = {n, n, all, levels, chain, slopes, 1, norm, norm, 0, 0, tables, 0.0, own_sum, 0};
    prefgen_mmd_tile(&t, dots);
    totals[0] = t.total;
    prefgen_tile u = {m, m, all, levels, chain, slopes, 1, norm + n, norm + n, 0, 0, tables + 4 * levels, 0.0,
                      own_sum + n, 0};
    prefgen_mmd_tile(&u, dots + n * all + n);
    totals[1] = u.total;
    prefgen_tile v = {n, m, all, levels, chain, slopes, 0, cross, cross + n, 0, 0, tables + 8 * levels, 0.0,
                      cross_sum, cross_sum + n};
    prefgen_mmd_tile(&v, dots + n);
    totals[2] = v.total;
    if (slopes)
        for (int64_t j = 0; j < m; ++j)
            for (int64_t i = 0; i < n; ++i) dots[(n + j) * all + i] = dots[i * all + n + j];
}

/* total holds slopes @ z (own slopes negative, cross positive) and becomes the gradient of the stacked rows.
 * constants: slope / n, slope / m, then scales of xx, yy, xy. */
void prefgen_mmd_finish(float *total, const float *z, int64_t n, int64_t m, int64_t d, const double *work,
                        const double *constants, int32_t both) {
    const double *rest_x = work + 2 * d, *rest_y = work + 3 * d, *gap = work + 4 * d;
    const double *own = gap + d + 2 * (n + m), *cross = own + n + m;
    for (int64_t i = 0; i < (both ? n + m : n); ++i) {
        const int first = i < n;
        const double even = constants[first ? 0 : 1], scale = constants[first ? 2 : 3], mixed = constants[4];
        const float along = (float)(-own[i] - cross[i] + even * (scale - mixed));
        const double toward = first ? -mixed * even - cross[i] : mixed * even + cross[i];
        const double mine = -scale * even, other = mixed * even;
        const double *rest_own = first ? rest_x : rest_y, *rest_other = first ? rest_y : rest_x;
        float *to = total + i * d;
        const float *row = z + i * d;
#pragma omp simd
        for (int64_t c = 0; c < d; ++c)
            to[c] += along * row[c] + (float)(toward * gap[c] + mine * rest_own[c] + other * rest_other[c]);
    }
}
