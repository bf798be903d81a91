// CUDA's execution model on a CPU, for tests: every CUDA thread of a block is a thread of our own
// (fiber.h), and the engine decides who goes on.
//
// Blocks run one after another; a cooperative launch keeps all of its blocks (at most four) alive
// at once. Threads meet at teams: warp, block, grid. What CUDA leaves undefined is reported here,
// with kernel, block and thread, and ends the launch: a barrier or shuffle that part of a team does
// not reach, two barriers that parts of a team wait at, threads that wait for each other for ever.
// ThreadSanitizer sees a missing barrier as a data race, AddressSanitizer an access out of range,
// and both name the line. Not seen: races between blocks, which are never alive together unless the
// launch is cooperative, and static shared memory that is read before it is written, because it
// keeps what the block before has left there. A thread that waits for another in a loop, without a
// barrier, waits for ever. One launch at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <source_location>
#include <span>
#include <string>
#include <vector>

#include "fiber.h"  // of tests/native, as nothing else runs this

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

struct Stopped {};  // thrown to unwind the threads of a launch that has been reported
// Threads that meet at a barrier.
struct Team {
  unsigned begin, size;  // by their index in the launch
  unsigned met = 0;
  char order[2] = {};  // stand for the barrier where ThreadSanitizer is told of it
  // What lanes hand to each other; two sides, because a fast lane writes while a slow one reads.
  alignas(kSlotBytes) unsigned char slots[2][kWarp][kSlotBytes] = {};
};

struct Context {
  Extent thread, block, block_size, grid_size;
  unsigned index, lane;
  Team *warp_team, *block_team, *grid_team;
  unsigned char* shared;
  class Launch* launch;
  unsigned side = 0;  // of the slots
  // Whom it waits for, where, and what is wrong with that; nobody if it may go on.
  Team* waits = nullptr;
  std::source_location where = {};
  const char* refusal = nullptr;

  bool same_place(const Context& other) const {
    return where.line() == other.where.line() &&
           std::strcmp(where.file_name(), other.where.file_name()) == 0;
  }
  std::string at() const {
    return "waits at " + std::string(where.file_name()) + ":" + std::to_string(where.line());
  }
};
inline thread_local Context* self = nullptr;
inline std::string last_report;   // of the last launch that failed
inline std::deque<Fiber> fibers;  // by the index of threads, for all launches

class Launch {
 public:
  Launch(std::string kernel, Extent grid, Extent block, std::size_t shared_bytes, bool cooperative)
      : kernel_(std::move(kernel)),
        grid_(grid),
        block_(block),
        shared_bytes_(shared_bytes),
        alive_(cooperative ? static_cast<unsigned>(grid.count()) : 1) {}

  // False where the launch was reported.
  bool run(const std::function<void()>& body) {
    const std::function<void()> live = [&body] {
      try {
        body();
      } catch (const Stopped&) {
      }
    };
    for (; !failed_ && first_block_ < grid_.count(); first_block_ += alive_) {
      prepare();
      while (fibers.size() < contexts_.size()) fibers.emplace_back();
      for (const Context& one : contexts_) fibers[one.index].begin(live);
      while (turn()) meet();
      for (const Context& one : contexts_) fibers[one.index].join();
    }
    self = nullptr;
    return !failed_;
  }

  // `refusal`, where there is one, is what the thread does wrong by coming here.
  void arrive(Team& team, const std::source_location& where, const char* refusal = nullptr) {
    // Two places, in turn: a fast thread comes to the next barrier before a slow one has left this.
    char* const place = order_of(team);
    __tsan_release(place);
    wait(team, where, refusal);
    __tsan_acquire(place);
  }

  std::string here(const Context& one) const {
    return "simt: " + kernel_ + ", block " + one.block.text() + ", thread " + one.thread.text();
  }

 private:
  // What threads share with the engine is not instrumented: nothing else orders them.
  SIMT_UNSEEN static char* order_of(Team& team) { return team.order + team.met % 2; }
  SIMT_UNSEEN void wait(Team& team, const std::source_location& where, const char* refusal) {
    self->waits = &team;
    self->where = where;
    self->refusal = refusal;
    fibers[self->index].pause();
    if (failed_) throw Stopped{};
  }
  SIMT_UNSEEN void go_on(Context& one) {
    self = &one;
    fibers[one.index].resume();
  }
  // Lets all go on that may, every other time from the last; false where none is left.
  bool turn() {
    bool left = false;
    turned_ = !turned_;
    for (std::size_t i = 0; i < contexts_.size(); ++i) {
      Context& one = contexts_[turned_ ? i : contexts_.size() - 1 - i];
      if (!one.waits && !fibers[one.index].ended()) go_on(one);
      left = left || one.waits;
    }
    return left;
  }
  // Opens the barriers that all of a team have come to; there must be one.
  void meet() {
    bool opened = false;
    for (Team& team : teams_) {
      const Context& first = contexts_[team.begin];
      const auto has_come = [&](const Context& one) {
        return one.waits == &team && one.same_place(first) && !one.refusal;
      };
      const std::span<Context> members = of(team);
      if (!std::all_of(members.begin(), members.end(), has_come)) continue;
      for (Context& one : members) one.waits = nullptr;
      ++team.met;
      opened = true;
    }
    if (!opened) report();
  }
  // Ends the launch: threads wait for others that do not come. All go on, only to unwind.
  void report() {
    last_report = problem();
    std::fprintf(stderr, "%s\n", last_report.c_str());
    failed_ = true;
    for (Context& one : contexts_) one.waits = nullptr;
  }
  std::string problem() {
    std::string found;
    for (const Context& one : contexts_) {
      if (!one.waits) continue;
      const std::string me = here(one) + " ";
      if (one.refusal) return me + one.refusal + ", " + one.at();
      for (const Context& other : of(*one.waits)) {
        const std::string but = ", but thread " + other.thread.text() + " ";
        if (fibers[other.index].ended()) return me + one.at() + but + "has returned";
        if (other.waits == one.waits && !other.same_place(one))
          return me + "divergent barrier: " + one.at() + but + other.at();
      }
      found = me + "deadlock: " + one.at() + ", and no thread is left to come";
    }
    return found;
  }
  std::span<Context> of(const Team& team) {
    return std::span(contexts_).subspan(team.begin, team.size);
  }
  static Extent at_index(std::uint64_t index, const Extent& extent) {
    return {static_cast<unsigned>(index % extent.x),
            static_cast<unsigned>(index / extent.x % extent.y),
            static_cast<unsigned>(index / extent.x / extent.y)};
  }
  // Fresh teams and threads for the next blocks, and dynamic shared memory that is poisoned.
  void prepare() {
    teams_.clear();
    contexts_.clear();
    Team& grid_team = teams_.emplace_back(0u, alive_ * threads_);
    for (unsigned local = 0; local < alive_; ++local) {
      // Exactly as long as asked for, so that AddressSanitizer's red zone begins at its end.
      shared_[local].assign(shared_bytes_, kPoison);
      Team& block_team = teams_.emplace_back(local * threads_, threads_);
      for (unsigned thread = 0; thread < threads_; ++thread) {
        const unsigned index = local * threads_ + thread, lane = thread % kWarp;
        if (lane == 0) teams_.emplace_back(index, std::min(kWarp, threads_ - thread));
        contexts_.push_back({.thread = at_index(thread, block_),
                             .block = at_index(first_block_ + local, grid_),
                             .block_size = block_,
                             .grid_size = grid_,
                             .index = index,
                             .lane = lane,
                             .warp_team = &teams_.back(),
                             .block_team = &block_team,
                             .grid_team = &grid_team,
                             .shared = shared_[local].data(),
                             .launch = this});
      }
    }
  }

  const std::string kernel_;
  const Extent grid_, block_;
  const std::size_t shared_bytes_;
  const unsigned alive_, threads_ = static_cast<unsigned>(block_.count());
  std::vector<std::vector<unsigned char>> shared_ = decltype(shared_)(alive_);
  std::deque<Team> teams_;         // outer ones first
  std::vector<Context> contexts_;  // by index
  std::uint64_t first_block_ = 0;
  bool failed_ = false, turned_ = false;
};

}  // namespace simt
#ifdef __SANITIZE_ADDRESS__  // called by the sanitizers with a report
extern "C" __attribute__((weak)) void __asan_on_error() {
  if (simt::self) std::fprintf(stderr, "%s\n", simt::self->launch->here(*simt::self).c_str());
}
extern "C" __attribute__((weak)) void __ubsan_on_report() { __asan_on_error(); }
#endif
