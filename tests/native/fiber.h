// Functions that take turns on one CPU thread, each on a stack of its own.
//
// ThreadSanitizer takes them for threads: `begin` and `join` order memory as starting and joining a
// thread does, and turns order nothing. AddressSanitizer is told which stack is in use.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <functional>
#include <new>

// Of functions that ThreadSanitizer does not watch.
#define SIMT_UNSEEN __attribute__((noinline, no_sanitize("thread")))
#ifndef __x86_64__
#error "simt: fibers are written for x86-64"
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#else
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#endif

// Leaves on a stack what functions must preserve, and takes it from another.
extern "C" void fedkd_fast_simt_switch(void** from, void* to);
asm(R"(.pushsection .text
fedkd_fast_simt_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi); mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.popsection)");

namespace simt {

class Fiber {
 public:
  Fiber() {
    void* const room = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // A stack that overflows meets pages that nobody may touch.
    if (room == MAP_FAILED || mprotect(room, kGuardBytes, PROT_NONE)) throw std::bad_alloc();
    // Six registers, where `live` begins, and the place of its own return address, at odd eights.
    void** const end = reinterpret_cast<void**>(static_cast<char*>(room) + kStackBytes);
    end[-2] = reinterpret_cast<void*>(live);
    own_ = {end - 8, room, kStackBytes, __tsan_create_fiber(0)};
  }
  Fiber(const Fiber&) = delete;  // its stack knows its address, and lasts as long as the process

  // Lets `body` run from the next `resume` on.
  void begin(const std::function<void()>& body) {
    body_ = &body;
    ended_ = false;
    __tsan_release(this);
  }
  void resume() {
    running = this;
    outer.thread = __tsan_get_current_fiber();
    change(outer, own_);
  }
  // Lets `resume` return, until the next one.
  void pause() { change(own_, outer); }
  void join() { __tsan_acquire(&ended_); }
  bool ended() const { return ended_; }

 private:
  // CUDA allows 512 KiB; what nobody touches takes no memory.
  static constexpr std::size_t kStackBytes = 1 << 20, kGuardBytes = 1 << 17;
  struct Place {
    void* top;
    const void* stack;
    std::size_t bytes;
    void* thread;
  };

  // Half of it runs as one thread and half as another.
  SIMT_UNSEEN static void change(Place& from, Place& to) {
    void* frames = nullptr;
    constexpr unsigned kOrdersNothing = 1;
    __sanitizer_start_switch_fiber(&frames, to.stack, to.bytes);
    __tsan_switch_to_fiber(to.thread, kOrdersNothing);
    fedkd_fast_simt_switch(&from.top, to.top);
    __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
  }
  [[noreturn]] SIMT_UNSEEN static void live() {
    __sanitizer_finish_switch_fiber(nullptr, &outer.stack, &outer.bytes);
    for (Fiber& me = *running;; me.pause()) {
      __tsan_acquire(&me);
      (*me.body_)();
      __tsan_release(&me.ended_);
      me.ended_ = true;
    }
  }

  Place own_{};
  const std::function<void()>* body_ = nullptr;
  bool ended_ = true;
  inline static Place outer{};  // whoever resumed the one that runs
  inline static Fiber* running = nullptr;
};

}  // namespace simt
