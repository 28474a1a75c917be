// A thread block on one CPU thread: every CUDA thread is a fibre that runs until it has to wait for others.
#pragma once

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int warp_size = 32;

// Says what the kernel did wrong and where, and ends the program.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void report(char const* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "emulator: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  __sanitizer_print_stack_trace();
  std::_Exit(1);
}

// The line of the kernel that a thread waits at.
struct Site {
  char const* file;
  int line;
  bool operator==(Site const& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

// A cp.async: its bytes reach shared memory when the thread waits for its group.
struct Copy {
  std::function<void()> land;
  Site site;
};

enum class State { running, at_barrier, at_collective, finished };

struct Thread {
  static constexpr std::size_t stack_bytes = 256 * 1024;  // pages that are never touched cost nothing

  int number = 0;
  dim3 index;
  State state = State::running;
  Site site{"", 0};
  unsigned mask = 0;        // of the lanes that take part in the collective
  void* operand = nullptr;  // what this lane brings to the collective and gets from it
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;

  ucontext_t context{};
  char* stack = static_cast<char*>(
      mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  void* fake_stack = nullptr;  // the address sanitizer's

  Thread() = default;
  Thread(Thread const&) = delete;
  ~Thread() { munmap(stack, stack_bytes); }

  std::string whereabouts() const {
    std::string const name = "thread " + std::to_string(number);
    return state == State::finished ? name + " has finished"
                                    : name + " waits at " + site.file + ":" + std::to_string(site.line);
  }
};

struct Block {
  std::function<void()> kernel;
  std::vector<std::unique_ptr<Thread>> threads;
  Thread* current = nullptr;
  int epoch = 0;                 // block barriers passed
  std::vector<int> warp_epochs;  // warp barriers passed
  bool vote = false;             // of __syncthreads_or

  ucontext_t scheduler{};
  void* scheduler_fake_stack = nullptr;
  void const* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;

  void run();
  void wait(State state, Site site);
  void barrier(Site site) { wait(State::at_barrier, site); }
  template <typename Operand, typename Operation>
  void collective(unsigned mask, Operand& operand, Site site, Operation operation);

 private:
  static void enter();
  void resume(Thread& thread);
  void pass_barrier();
  void check_copies() const;
};

inline Block block;

inline void Block::enter() {
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
  block.kernel();
  block.current->state = State::finished;
  __sanitizer_start_switch_fiber(nullptr, block.scheduler_stack, block.scheduler_stack_bytes);
  swapcontext(&block.current->context, &block.scheduler);
}

inline void Block::resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack, Thread::stack_bytes);
  swapcontext(&scheduler, &thread.context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

// Leaves the current thread until another has set it running again.
inline void Block::wait(State state, Site site) {
  Thread& thread = *current;
  thread.state = state;
  thread.site = site;
  __sanitizer_start_switch_fiber(&thread.fake_stack, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&thread.context, &scheduler);
  __sanitizer_finish_switch_fiber(thread.fake_stack, nullptr, nullptr);
}

// No thread can go on: right only if all wait at the same barrier.
inline void Block::pass_barrier() {
  Thread const& first = *threads.front();
  for (auto const& thread : threads) {
    if (thread->state == State::at_collective) {
      report("diverged warp: thread %d waits in a warp operation at %s:%d for lanes of mask %08x that do not come",
             thread->number, thread->site.file, thread->site.line, thread->mask);
    }
  }
  for (auto const& thread : threads) {
    if (thread->state != first.state || !(thread->site == first.site)) {
      report("divergent barrier: %s, %s", first.whereabouts().c_str(), thread->whereabouts().c_str());
    }
  }
  ++epoch;
  for (auto const& thread : threads) {
    thread->state = State::running;
  }
}

// Copies that nobody waited for would land in the shared memory of a later block.
inline void Block::check_copies() const {
  for (auto const& thread : threads) {
    thread->groups.push_back(thread->open_group);
    for (auto const& group : thread->groups) {
      for (Copy const& copy : group) {
        report("missing wait: thread %d has ended with its copy of %s:%d under way", thread->number, copy.site.file,
               copy.site.line);
      }
    }
  }
}

// Runs the kernel in every thread of a block, from the start to the end.
inline void Block::run() {
  threads.clear();
  epoch = 0;
  int const count = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  warp_epochs.assign((count + warp_size - 1) / warp_size, 0);
  for (int number = 0; number < count; ++number) {
    auto thread = std::make_unique<Thread>();
    unsigned const n = static_cast<unsigned>(number);
    thread->number = number;
    thread->index = dim3(n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y));
    getcontext(&thread->context);
    thread->context.uc_stack.ss_sp = thread->stack;
    thread->context.uc_stack.ss_size = Thread::stack_bytes;
    makecontext(&thread->context, enter, 0);
    threads.push_back(std::move(thread));
  }
  for (int finished = 0; finished < count;) {
    bool progress = false;
    for (auto const& thread : threads) {
      if (thread->state == State::running) {
        resume(*thread);
        progress = true;
        finished += thread->state == State::finished;
      }
    }
    if (!progress) {
      pass_barrier();
    }
  }
  check_copies();
}

// Meets the other lanes of the mask; the last to come runs operation(lanes) for all: the address of every lane's
// operand, null for lanes outside the mask.
template <typename Operand, typename Operation>
void Block::collective(unsigned mask, Operand& operand, Site site, Operation operation) {
  Thread& thread = *current;
  int const lane = thread.number % warp_size, first = thread.number - lane;
  if (!(mask >> lane & 1)) {
    report("thread %d calls a warp operation whose mask %08x lacks its lane %d", thread.number, mask, lane);
  }
  thread.operand = &operand;
  thread.mask = mask;
  Operand* lanes[warp_size] = {};
  for (int other = 0; other < warp_size; ++other) {
    if (other == lane || !(mask >> other & 1)) {
      continue;
    }
    bool const exists = first + other < static_cast<int>(threads.size());
    Thread const* const partner = exists ? threads[first + other].get() : nullptr;
    if (!partner || partner->state != State::at_collective) {
      wait(State::at_collective, site);
      return;
    }
    if (!(partner->site == site) || partner->mask != mask) {
      report("diverged warp: thread %d is in the warp operation at %s:%d with mask %08x, thread %d at %s:%d with %08x",
             thread.number, site.file, site.line, mask, partner->number, partner->site.file, partner->site.line,
             partner->mask);
    }
    lanes[other] = static_cast<Operand*>(partner->operand);
  }
  lanes[lane] = &operand;
  operation(lanes);
  for (int other = 0; other < warp_size; ++other) {
    if (lanes[other]) {
      threads[first + other]->state = State::running;
    }
  }
}

}  // namespace emulator
