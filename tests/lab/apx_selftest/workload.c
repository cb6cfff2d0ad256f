/*
 * A program that keeps many registers busy, for two compilations: workload() by the compiler at hand, workload_apx()
 * in workload_apx.S. Both must come to the same number.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef NAME
#define NAME workload
#endif
#define LANES 25
#define WORDS 1024

static uint64_t rotate(uint64_t x, unsigned count)
{
    return x << (count & 63) | x >> (-count & 63);
}

/* One round in the manner of Keccak: columns, rotated permutation, rows. */
static void mix(uint64_t lane[LANES], uint64_t constant)
{
    uint64_t column[5], moved[LANES];

    for (int x = 0; x < 5; x++)
        column[x] = lane[x] ^ lane[x + 5] ^ lane[x + 10] ^ lane[x + 15] ^ lane[x + 20];
    for (int i = 0; i < LANES; i++)
        lane[i] ^= column[(i + 4) % 5] ^ rotate(column[(i + 1) % 5], 1);
    for (int i = 0; i < LANES; i++)
        moved[i * 7 % LANES] = rotate(lane[i], (unsigned)(i * (i + 1) / 2));
    for (int y = 0; y < LANES; y += 5)
        for (int x = 0; x < 5; x++)
            lane[y + x] = moved[y + x] ^ (~moved[y + (x + 1) % 5] & moved[y + (x + 2) % 5]);
    lane[0] ^= constant;
}

static void sort(uint32_t *v, int low, int high)
{
    while (low < high) {
        uint32_t pivot = v[(low + high) / 2];
        int i = low, j = high;

        while (i <= j) {
            while (v[i] < pivot)
                i++;
            while (v[j] > pivot)
                j--;
            if (i <= j) {
                uint32_t t = v[i];

                v[i++] = v[j];
                v[j--] = t;
            }
        }
        sort(v, low, j);
        low = i;
    }
}

static uint64_t multiply(const uint32_t *a, const uint32_t *b)
{
    uint64_t sums[8] = {0}, result = 0;

    for (int i = 0; i < 8; i++) {
        for (int j = 0; j < 8; j++) {
            sums[(i + j) & 7] += (uint64_t)a[i] * b[j];
            sums[(i ^ j) & 7] ^= ((uint64_t)a[i] << (j * 3)) / (b[j] | 1);
        }
    }
    for (int i = 0; i < 8; i++)
        result = result * 31 + sums[i];
    return result;
}

static uint32_t crc(const uint32_t *words, size_t count)
{
    uint32_t c = ~0u;

    for (size_t i = 0; i < count; i++) {
        c ^= words[i];
        for (int k = 0; k < 32; k++)
            c = c >> 1 ^ (c & 1 ? 0xedb88320 : 0);
    }
    return ~c;
}

static uint64_t conditions(uint64_t h, const uint32_t *words)
{
    for (int i = 0; i < 300; i++) {
        int64_t x = (int64_t)(h >> 3) - i, y = (int32_t)(h >> 40) | 1;

        h += (uint64_t)(x / y + (x % y) * 3);
        h ^= h >> ((h & 15) + 5);
        if ((h & 3) == 1 && x > y && (int16_t)h < 700)
            h += words[h % WORDS];
        else if ((int64_t)h < 0 || (uint8_t)x == (uint8_t)y)
            h -= (uint64_t)(int8_t)h;
    }
    return h;
}

uint64_t NAME(void)
{
    static uint32_t words[WORDS];
    uint64_t lanes[LANES] = {0}, h = 0x9e3779b97f4a7c15ul;

    for (int i = 0; i < WORDS; i++) {
        mix(lanes, h);
        words[i] = (uint32_t)lanes[i % LANES];
        h = h * 6364136223846793005ul + lanes[0];
    }
    sort(words, 0, WORDS - 1);
    for (int i = 1; i < WORDS; i++)
        h = h * 31 + words[i] + (words[i - 1] > words[i]);
    for (int i = 0; i + 16 <= WORDS; i += 16)
        h ^= multiply(words + i, words + i + 8) + (h >> 7);
    h ^= crc(words, WORDS);
    return conditions(h, words);
}
