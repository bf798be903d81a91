// CUDA's execution model on CPU threads, for tests: every CUDA thread of a block is a real thread.
//
// Blocks run one after another; a cooperative launch keeps all of its blocks (at most four) alive
// at once. Threads meet at teams: warp, block, grid. What CUDA leaves undefined is reported here,
// with kernel, block and thread, and ends the launch: a barrier or shuffle that part of a team does
// not reach, two barriers that parts of a team wait at, threads that wait for each other for ever.
// ThreadSanitizer sees a missing barrier as a data race, AddressSanitizer an access out of range,
// and both name the line. Not seen: races between blocks, which are never alive together unless the
// launch is cooperative, and static shared memory that is read before it is written, because it
// keeps what the block before has left there. One launch at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <source_location>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace simt {

struct Extent {
  unsigned x, y, z;
  constexpr Extent(unsigned width = 1, unsigned height = 1, unsigned depth = 1)
      : x(width), y(height), z(depth) {}
  constexpr std::uint64_t count() const { return std::uint64_t{x} * y * z; }
  std::string text() const {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  }
};

constexpr unsigned kWarp = 32, kMostThreads = 1024, kMostGridYZ = 65535, kMostCooperativeBlocks = 4;
constexpr std::size_t kMostSharedBytes = 227 * 1024;  // of one block on sm_90
constexpr unsigned char kPoison = 0xff;               // NaN in every floating format
constexpr std::size_t kSlotBytes = 16;

// The engine's mutex orders threads that on a GPU nothing orders. While an Unseen lives,
// ThreadSanitizer does not learn of it, only of what a barrier promises: release, then acquire.
#ifdef __SANITIZE_THREAD__
extern "C" void AnnotateIgnoreSyncBegin(const char*, int), AnnotateIgnoreSyncEnd(const char*, int),
    AnnotateIgnoreReadsBegin(const char*, int), AnnotateIgnoreReadsEnd(const char*, int),
    AnnotateIgnoreWritesBegin(const char*, int), AnnotateIgnoreWritesEnd(const char*, int),
    __tsan_release(void*), __tsan_acquire(void*);
struct Unseen {
  Unseen() {
    for (const auto begin :
         {AnnotateIgnoreSyncBegin, AnnotateIgnoreReadsBegin, AnnotateIgnoreWritesBegin})
      begin(__FILE__, __LINE__);
  }
  ~Unseen() {
    for (const auto end : {AnnotateIgnoreWritesEnd, AnnotateIgnoreReadsEnd, AnnotateIgnoreSyncEnd})
      end(__FILE__, __LINE__);
  }
};
#else
struct [[maybe_unused]] Unseen {};
inline void __tsan_release(void*) {}
inline void __tsan_acquire(void*) {}
#endif

struct Stopped {};  // thrown to unwind the threads of a launch that has been reported
// Threads that meet at a barrier.
struct Team {
  unsigned size = 0, arrived = 0, gone = 0;
  std::atomic<std::uint64_t> generation = 0;
  std::source_location place;    // of the barrier that the first arrival waits at
  std::string first, last_gone;  // threads, for reports
  std::condition_variable passed;
  char order[2] = {};  // stand for the barrier where ThreadSanitizer is told of it
  // What lanes hand to each other; two sides, because a fast lane writes while a slow one reads.
  alignas(kSlotBytes) unsigned char slots[2][kWarp][kSlotBytes] = {};
};

struct Context {
  Extent thread, block, block_size, grid_size;
  unsigned lane;
  Team *warp_team, *block_team, *grid_team;
  unsigned char* shared;
  class Launch* launch;
  unsigned side = 0;  // of the slots
};
inline thread_local Context* self = nullptr;
inline std::string last_report;  // of the last launch that failed

class Launch {
 public:
  Launch(std::string kernel, Extent grid, Extent block, std::size_t shared_bytes, bool cooperative)
      : kernel_(std::move(kernel)),
        grid_(grid),
        block_(block),
        shared_bytes_(shared_bytes),
        alive_(cooperative ? static_cast<unsigned>(grid.count()) : 1) {
    prepare();
  }

  // False where the launch was reported.
  bool run(const std::function<void()>& body) {
    const unsigned total = alive_ * threads_;
    const auto next = [this]() noexcept {
      first_block_ += alive_;
      ended_ = failed_ || first_block_ >= grid_.count();
      prepare();
    };
    std::barrier rendezvous(static_cast<std::ptrdiff_t>(total), next);
    std::vector<std::jthread> pool;
    const auto live = [&](unsigned index) {
      do {
        Context context = place(index);
        self = &context;
        try {
          body();
          leave();
        } catch (const Stopped&) {
        }
        rendezvous.arrive_and_wait();  // all threads have ended these blocks
      } while (!ended_);
    };
    try {
      for (unsigned index = 0; index < total; ++index) pool.emplace_back(live, index);
    } catch (const std::system_error& error) {  // too many threads for this machine
      const std::lock_guard lock(mutex_);
      fail("simt: " + kernel_ + ": " + error.what());
      for (auto missing = pool.size(); missing < total; ++missing) rendezvous.arrive_and_drop();
    }
    pool.clear();
    return !failed_;
  }

  // `refusal`, where there is one, is what the thread does wrong by coming here.
  void arrive(Team& team, const std::source_location& where, const char* refusal = nullptr) {
    // Two places, in turn: a fast thread comes to the next barrier before a slow one has left this.
    char* const place = team.order + team.generation.load(std::memory_order_relaxed) % 2;
    __tsan_release(place);
    meet(team, where, refusal);
    __tsan_acquire(place);
  }

  std::string here() const {
    return "simt: " + kernel_ + ", block " + self->block.text() + ", thread " + self->thread.text();
  }

 private:
  void meet(Team& team, const std::source_location& where, const char* refusal) {
    const Unseen unseen;
    std::unique_lock lock(mutex_);
    if (failed_) throw Stopped{};
    if (refusal) stop(refusal + std::string(", ") + at(where));
    if (team.gone) stop(at(where) + ", but thread " + team.last_gone + " has returned");
    if (team.arrived++ == 0) {
      team.place = where;
      team.first = self->thread.text();
    } else if (where.line() != team.place.line() ||
               std::strcmp(where.file_name(), team.place.file_name()) != 0) {
      stop("divergent barrier: " + at(where) + ", but thread " + team.first + " " + at(team.place));
    }
    if (team.arrived == team.size) {
      team.arrived = 0;
      ++team.generation;
      waiting_ -= team.size - 1;
      team.passed.notify_all();
      return;
    }
    if (++waiting_ == living_) stop("deadlock: " + at(where) + ", and no thread is left to come");
    const std::uint64_t now = team.generation;
    team.passed.wait(lock, [&] { return failed_ || team.generation != now; });
    if (team.generation == now) throw Stopped{};
  }
  [[noreturn]] void stop(const std::string& what) {
    fail(here() + " " + what);
    throw Stopped{};
  }
  // Under the mutex, or where no thread can be inside.
  void fail(std::string report) {
    last_report = std::move(report);
    std::fprintf(stderr, "%s\n", last_report.c_str());
    failed_ = true;
    for (auto* teams : {&warp_teams_, &block_teams_})
      for (Team& team : *teams) team.passed.notify_all();
    grid_team_.passed.notify_all();
  }
  static std::string at(const std::source_location& where) {
    return "waits at " + std::string(where.file_name()) + ":" + std::to_string(where.line());
  }
  void leave() {
    const Unseen unseen;
    const std::lock_guard lock(mutex_);
    if (failed_) return;
    --living_;
    for (Team* team : {self->warp_team, self->block_team, self->grid_team}) {
      ++team->gone;
      team->last_gone = self->thread.text();
      if (team->arrived) stop("returned, but thread " + team->first + " " + at(team->place));
    }
    if (living_ && waiting_ == living_) stop("returned, and all that are left wait");
  }
  static Extent at_index(std::uint64_t index, const Extent& extent) {
    return {static_cast<unsigned>(index % extent.x),
            static_cast<unsigned>(index / extent.x % extent.y),
            static_cast<unsigned>(index / extent.x / extent.y)};
  }
  Context place(unsigned index) {
    const unsigned local = index / threads_, thread = index % threads_;
    return {.thread = at_index(thread, block_),
            .block = at_index(first_block_ + local, grid_),
            .block_size = block_,
            .grid_size = grid_,
            .lane = thread % kWarp,
            .warp_team = &warp_teams_[std::size_t{local} * warps_ + thread / kWarp],
            .block_team = &block_teams_[local],
            .grid_team = &grid_team_,
            .shared = shared_[local].data(),
            .launch = this};
  }
  // Fresh teams and poisoned dynamic shared memory for the next blocks; no thread is inside one.
  void prepare() {
    waiting_ = 0;
    living_ = alive_ * threads_;
    const auto reset = [](Team& team, unsigned size) {
      team.size = size;
      team.arrived = team.gone = 0;
    };
    for (unsigned warp = 0; warp < alive_ * warps_; ++warp)
      reset(warp_teams_[warp], std::min(kWarp, threads_ - warp % warps_ * kWarp));
    for (Team& team : block_teams_) reset(team, threads_);
    reset(grid_team_, alive_ * threads_);
    // Exactly as long as asked for, so that AddressSanitizer's red zone begins at its end.
    for (auto& memory : shared_) memory.assign(shared_bytes_, kPoison);
  }

  const std::string kernel_;
  const Extent grid_, block_;
  const std::size_t shared_bytes_;
  const unsigned alive_, threads_ = static_cast<unsigned>(block_.count());
  const unsigned warps_ = (threads_ + kWarp - 1) / kWarp;
  std::vector<std::vector<unsigned char>> shared_ = decltype(shared_)(alive_);
  std::deque<Team> warp_teams_ = std::deque<Team>(alive_ * warps_);
  std::deque<Team> block_teams_ = std::deque<Team>(alive_);
  Team grid_team_;
  std::mutex mutex_;
  std::uint64_t first_block_ = 0;
  unsigned waiting_ = 0, living_ = 0;
  std::atomic<bool> failed_ = false, ended_ = false;
};

}  // namespace simt
#ifdef __SANITIZE_ADDRESS__  // called by the sanitizers with a report
extern "C" __attribute__((weak)) void __asan_on_error() {
  if (simt::self) std::fprintf(stderr, "%s\n", simt::self->launch->here().c_str());
}
extern "C" __attribute__((weak)) void __ubsan_on_report() { __asan_on_error(); }
#endif
