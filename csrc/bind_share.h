// Independent pieces of work, shared out over torch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <string>
#include <vector>

#include "bind_torch.h"

// Of MKL and OpenMP, where torch was built with them.
extern "C" {
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
__attribute__((weak)) int omp_get_max_threads();
__attribute__((weak)) void omp_set_num_threads(int threads);
}

namespace fedkd_fast::bind {

// torch's libraries use one thread in a parallel region, but plan for all: MKL, once told a number
// of threads, waits in its factorisations for the others for ever, and oneDNN adds up in another
// order.
class OneThread {
 public:
  // torch sets the number of threads of a thread that has not asked for it yet: not after us.
  OneThread()
      : torch_(torch::stable::get_num_threads()),
        mkl_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0),
        openmp_(omp_get_max_threads ? omp_get_max_threads() : 0) {
    if (omp_set_num_threads) omp_set_num_threads(1);
  }
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(mkl_);
    if (omp_set_num_threads) omp_set_num_threads(openmp_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  uint32_t torch_;
  int mkl_, openmp_;
};

// What a piece throws that is the subject of the sentence.
struct Complaint : std::exception {};

// Does the work of each index, in this order; whoever is free takes the next. With one thread each,
// whether there are more or not, so that results do not depend on how many there are. `noun` is
// what errors call a piece. Threads wait for each other by spinning: little work is for one.
template <typename Work>
void share_out(const std::vector<int64_t>& order, const char* noun, bool little, const Work& work) {
  std::vector<std::string> problems(order.size());
  std::atomic<size_t> next = 0;
  const auto take = [&](int64_t, int64_t) {
    const OneThread one_thread;
    for (size_t turn = next++; turn < order.size(); turn = next++) {
      const auto i = static_cast<size_t>(order[turn]);
      try {
        work(i);
      } catch (const Complaint& error) {
        problems[i] = std::string(" ") + error.what();
      } catch (const std::exception& error) {
        // An exception does not cross torch's C interface with its words.
        problems[i] = std::string(": ") + error.what();
      }
    }
  };
  const int64_t threads = torch::stable::get_num_threads();
  if (little || order.size() < 2 || threads < 2)
    take(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, take);
  for (size_t i = 0; i < problems.size(); ++i)
    STD_TORCH_CHECK(problems[i].empty(), noun, " ", i, problems[i]);
}

}  // namespace fedkd_fast::bind
