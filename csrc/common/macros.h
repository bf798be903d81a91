// Marks shared by CPU and CUDA sources. No other header of the project is needed to read these.
#pragma once

#if defined(__CUDACC__)
#define FEDKD_HD __host__ __device__
#else
#define FEDKD_HD
#endif

// A formula, which takes on the instruction set of the kernel that uses it.
#if defined(__GNUC__)
#define FEDKD_FORMULA FEDKD_HD inline __attribute__((always_inline))
#else
#define FEDKD_FORMULA FEDKD_HD inline
#endif

// One function, several instruction sets, chosen when the library is loaded: wheels run on any
// x86-64 and still use AVX-512 and FMA where they are. Other machines compile the plain function.
// ThreadSanitizer is not ready yet when the choice is made.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define FEDKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FEDKD_CLONES
#endif
