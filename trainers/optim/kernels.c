// LAMB and LARS on the CPU: two passes over each tensor, so that the second reads from the cache.
// Norms are summed in blocks of a fixed size, so that they don't depend on the number of threads.
// The formulas are in lamb.py and lars.py, which do the same with torch's operations.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { BLOCK = 4096, SERIAL = 16 };  // floats per block; up to SERIAL blocks, one thread is faster

static int64_t blocks_of(int64_t numel) { return (numel + BLOCK - 1) / BLOCK; }

static int64_t end_of(int64_t block, int64_t numel) { return (block + 1) * BLOCK < numel ? (block + 1) * BLOCK : numel; }

static double *room_for_sums(int64_t count, const int64_t *numel) {
    int64_t most = 0;
    for (int64_t k = 0; k < count; k++) most = numel[k] > most ? numel[k] : most;
    return malloc((2 * blocks_of(most) + 1) * sizeof(double));
}

static double norm(const double *squares, int64_t count) {
    double sum = 0;
    for (int64_t k = 0; k < count; k++) sum += squares[k];
    return sqrt(sum);
}

static double clamped(double value, double least, double most) { return fmin(fmax(value, least), most); }

// correction: 0 none, 1 in u, 2 after the ratio. Returns 0 if out of memory.
int lamb(int64_t count, const int64_t *numel, float **w_of, float **g_of, float **m_of, float **v_of, float **step_of,
         double lr, double beta1, double beta2, double eps, double decay, int correction, int adapt, int maximize,
         double norm_least, double norm_most, double trust_least, double trust_most) {
    double *sums = room_for_sums(count, numel);
    if (!sums) return 0;
    const float sign = maximize ? -1 : 1, lambda = decay, e = eps;
    const float keep1 = beta1, take1 = 1 - beta1, keep2 = beta2, take2 = 1 - beta2;
    for (int64_t k = 0; k < count; k++) {
        float *restrict w = w_of[k], *restrict m = m_of[k], *restrict v = v_of[k];
        const float *restrict g = g_of[k];
        const int64_t n = numel[k], blocks = blocks_of(n);
        const double bias1 = 1 - pow(beta1, *step_of[k]), root2 = sqrt(1 - pow(beta2, *step_of[k]));
        const float scale1 = correction == 1 ? 1 / bias1 : 1, scale2 = correction == 1 ? 1 / root2 : 1;
#pragma omp parallel for if (blocks > SERIAL)
        for (int64_t b = 0; b < blocks; b++) {
            float weights = 0, updates = 0;
#pragma omp simd reduction(+ : weights, updates)
            for (int64_t i = b * BLOCK; i < end_of(b, n); i++) {
                const float gradient = sign * g[i];
                m[i] = keep1 * m[i] + take1 * gradient;
                v[i] = keep2 * v[i] + take2 * gradient * gradient;
                const float u = m[i] * scale1 / (sqrtf(v[i]) * scale2 + e) + lambda * w[i];
                weights += w[i] * w[i];
                updates += u * u;
            }
            sums[b] = weights;
            sums[blocks + b] = updates;
        }
        const double weight = norm(sums, blocks), update = norm(sums + blocks, blocks);
        const double phi = clamped(weight, norm_least, norm_most);
        const double ratio = adapt && weight > 0 && update > 0 ? clamped(phi / update, trust_least, trust_most) : 1;
        const float rate = lr * ratio * (correction == 2 ? root2 / bias1 : 1);
#pragma omp parallel for if (blocks > SERIAL)
        for (int64_t b = 0; b < blocks; b++) {
#pragma omp simd
            for (int64_t i = b * BLOCK; i < end_of(b, n); i++)
                w[i] -= rate * (m[i] * scale1 / (sqrtf(v[i]) * scale2 + e) + lambda * w[i]);
        }
    }
    free(sums);
    return 1;
}

// inner scales the input of the momentum, outer the step of the weights. Returns 0 if out of memory.
int lars(int64_t count, const int64_t *numel, float **w_of, float **g_of, float **buffer_of, double inner, double outer,
         double momentum, double decay, double trust, double eps, double most, int adapt, int nesterov, int maximize) {
    double *sums = room_for_sums(count, numel);
    if (!sums) return 0;
    const float sign = maximize ? -1 : 1, lambda = decay, keep = momentum, out = outer;
    for (int64_t k = 0; k < count; k++) {
        float *restrict w = w_of[k], *restrict buffer = buffer_of[k];
        const float *restrict g = g_of[k];
        const int64_t n = numel[k], blocks = blocks_of(n);
#pragma omp parallel for if (adapt && blocks > SERIAL)
        for (int64_t b = 0; b < blocks; b++) {
            float weights = 0, gradients = 0;
#pragma omp simd reduction(+ : weights, gradients)
            for (int64_t i = adapt ? b * BLOCK : n; i < end_of(b, n); i++) {
                weights += w[i] * w[i];
                gradients += g[i] * g[i];
            }
            sums[b] = weights;
            sums[blocks + b] = gradients;
        }
        const double weight = norm(sums, blocks), gradient = norm(sums + blocks, blocks);
        const double local = fmin(trust * weight / (gradient + decay * weight + eps), most);
        const float rate = inner * (adapt && weight > 0 && gradient > 0 ? local : 1);
#pragma omp parallel for if (blocks > SERIAL)
        for (int64_t b = 0; b < blocks; b++) {
#pragma omp simd
            for (int64_t i = b * BLOCK; i < end_of(b, n); i++) {
                const float d = rate * (sign * g[i] + lambda * w[i]);
                buffer[i] = keep * buffer[i] + d;
                w[i] -= out * (nesterov ? d + keep * buffer[i] : buffer[i]);
            }
        }
    }
    free(sums);
    return 1;
}
