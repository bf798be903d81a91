// For sources that compute with vectors of the compiler.
#pragma once

// Into each FEDKD_CLONES function, with its instructions.
#if defined(__GNUC__)
#define FEDKD_INLINE inline __attribute__((always_inline))
#else
#define FEDKD_INLINE inline
#endif
