// Paths of the CPU's kernels.
#pragma once

namespace fedkd_fast::cpu {

// The most that a call may use of this machine. All give the same bits: the choice is for tests.
enum class Instructions { kPortable, kAvx2, kAvx512 };

}  // namespace fedkd_fast::cpu
