// What a thread of a block runs on: a stack of its own, left and gone back to in the middle of
// anything. swapcontext() would ask the kernel for the signal mask every time; a jump does not.

#pragma once

#include <ucontext.h>

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_host {

class Fiber {
 public:
  // The first go_to() this fiber calls body(), which never returns. Without prepare() it is what
  // runs already.
  void prepare(char* stack, size_t bytes, void (*body)()) {
    body_ = body;
    stack_ = stack;
    stack_bytes_ = bytes;
    started_ = false;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, bytes);  // by whom it had before, and left it for good
#endif
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, &Fiber::enter, 0);
  }

  // Leaves this fiber, which runs now, for the other; returns when somebody goes back to it.
  __attribute__((noinline, no_sanitize_address)) void go_to(Fiber& other) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, other.stack_, other.stack_bytes_);
#endif
    left_ = this;
    if (__builtin_setjmp(jump_) == 0) other.go_on();
    arrived(fake_stack_);
  }

 private:
  [[noreturn]] __attribute__((noinline, no_sanitize_address)) void go_on() {
    if (started_) __builtin_longjmp(jump_, 1);
    started_ = true;
    entering_ = this;
    setcontext(&context_);
    __builtin_unreachable();
  }

  static void enter() {
    arrived(nullptr);
    entering_->body_();
  }

  static void arrived([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &left_->stack_, &left_->stack_bytes_);
#endif
  }

  inline static Fiber* left_ = nullptr;
  inline static Fiber* entering_ = nullptr;

  void* jump_[5];
  ucontext_t context_;
  void (*body_)() = nullptr;
  bool started_ = true;
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace cuda_on_host
