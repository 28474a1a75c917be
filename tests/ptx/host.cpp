// What the launchers, compiled for the host with the emulator's headers, need beside these: no block of theirs is run, so no
// fibre is switched to.
#include <cstddef>

extern "C" {
void __sanitizer_start_switch_fiber(void**, void const*, std::size_t) {}
void __sanitizer_print_stack_trace() {}
void __sanitizer_finish_switch_fiber(void*, void const**, std::size_t*) {}
}
