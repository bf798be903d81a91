// What the cases of every op share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

namespace simt_cases {

inline int failures = 0;

inline void report(const std::string& name, bool right) {
  std::printf("%s %s\n", right ? "ok  " : "FAIL", name.c_str());
  std::fflush(stdout);
  failures += right ? 0 : 1;
}

inline std::string text(std::initializer_list<int64_t> sizes) {
  std::string joined;
  for (const int64_t size : sizes) joined += (joined.empty() ? "" : "x") + std::to_string(size);
  return joined;
}

inline std::vector<float> normal(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = distribution(generator);
  return values;
}

void rans_cases();
void truncated_svd_cases();

}  // namespace simt_cases
