#pragma once

// What the C++ tests count as failed.

#include <cstdio>

static int n_failed = 0;

#define CHECK(x)                                                                                                                           \
    do {                                                                                                                                   \
        if (!(x)) {                                                                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x);                                                                        \
            n_failed++;                                                                                                                    \
        }                                                                                                                                  \
    } while (0)

#define CHECK_THROWS(x)                                                                                                                    \
    do {                                                                                                                                   \
        bool thrown = false;                                                                                                               \
        try {                                                                                                                              \
            x;                                                                                                                             \
        } catch (const elastic::error &) {                                                                                                 \
            thrown = true;                                                                                                                 \
        }                                                                                                                                  \
        CHECK(thrown && #x);                                                                                                               \
    } while (0)
