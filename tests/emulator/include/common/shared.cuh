// Watched shared memory: stands in for csrc/common/shared.cuh.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <new>
#include <type_traits>

namespace emulator {

constexpr int nobody = -1;

// Who touched a byte of shared memory, and when. Nobody wrote it when a block starts, whatever lies there.
struct Shadow {
  int writer = nobody, write_epoch = 0, write_warp_epoch = 0;
  int reader = nobody, other_reader = nobody;  // two lanes of the warp that read last
  bool read_by_other_warps = false;
  int read_epoch = 0, read_warp_epoch = 0;
  bool in_flight = false;  // a cp.async that nobody waited for writes here
};

class Region {
 public:
  explicit Region(std::size_t bytes) : size_(bytes), memory_(new (alignment) std::byte[bytes]), shadow_(bytes) {
    regions().push_back(this);
  }
  ~Region() {
    regions().erase(std::find(regions().begin(), regions().end(), this));
    operator delete[](memory_, alignment);
  }
  Region(Region const&) = delete;

  void read(Thread const& thread, std::ptrdiff_t offset, void* values, int bytes) {
    check(thread, offset, bytes, "reads");
    for (int i = 0; i < bytes; ++i) {
      note_read(thread, offset + i);
    }
    std::memcpy(values, memory_ + offset, bytes);
  }

  void write(Thread const& thread, std::ptrdiff_t offset, void const* values, int bytes) {
    check(thread, offset, bytes, "writes");
    for (int i = 0; i < bytes; ++i) {
      note_write(thread, offset + i);
    }
    std::memcpy(memory_ + offset, values, bytes);
  }

  // From here to the landing nobody may touch these bytes.
  void start_copy(Thread const& thread, std::ptrdiff_t offset, int bytes) {
    check(thread, offset, bytes, "copies to");
    for (int i = 0; i < bytes; ++i) {
      note_write(thread, offset + i);
      shadow_[offset + i].in_flight = true;
    }
  }

  void land(Thread const& thread, std::ptrdiff_t offset, void const* values, int bytes) {
    for (int i = 0; i < bytes; ++i) {
      shadow_[offset + i].in_flight = false;
    }
    write(thread, offset, values, bytes);
  }

  static void forget_all() {
    for (Region* region : regions()) {
      std::fill(region->shadow_.begin(), region->shadow_.end(), Shadow{});
    }
  }

 private:
  static constexpr std::align_val_t alignment{128};

  static std::vector<Region*>& regions() {
    static std::vector<Region*> all;
    return all;
  }

  static int warp_epoch(int thread) { return block.warp_epochs[thread / warp_size]; }
  static bool same_warp(int a, int b) { return a / warp_size == b / warp_size; }

  void check(Thread const& thread, std::ptrdiff_t offset, int bytes, char const* does) const {
    if (offset < 0 || offset + bytes > static_cast<std::ptrdiff_t>(size_)) {
      report("out of bounds: thread %d %s %d bytes at byte %td of %zu of shared memory", thread.number, does, bytes,
             offset, size_);
    }
    if (offset % bytes != 0) {
      report("misaligned: thread %d %s %d bytes at byte %td of shared memory", thread.number, does, bytes, offset);
    }
  }

  // Whether the last write, by another thread, is not yet ordered before what the thread does now.
  static bool unordered_write(Shadow const& shadow, Thread const& thread) {
    if (shadow.writer == nobody || shadow.writer == thread.number || shadow.write_epoch != block.epoch) {
      return false;
    }
    return !same_warp(shadow.writer, thread.number) || shadow.write_warp_epoch == warp_epoch(thread.number);
  }

  // A thread other than this that read the byte and is not yet ordered before what it does now, or nobody.
  static int unordered_reader(Shadow const& shadow, Thread const& thread) {
    if (shadow.reader == nobody || shadow.read_epoch != block.epoch) {
      return nobody;
    }
    if (!same_warp(shadow.reader, thread.number) || shadow.read_by_other_warps) {
      return shadow.reader;
    }
    if (shadow.read_warp_epoch != warp_epoch(thread.number)) {
      return nobody;
    }
    return shadow.reader != thread.number ? shadow.reader : shadow.other_reader;
  }

  void note_access(Thread const& thread, std::ptrdiff_t offset, char const* does) const {
    Shadow const& shadow = shadow_[offset];
    if (shadow.in_flight) {
      report("missing wait: thread %d %s byte %td of shared memory, to which a copy of thread %d is under way",
             thread.number, does, offset, shadow.writer);
    }
    if (unordered_write(shadow, thread)) {
      report("race: thread %d %s byte %td of shared memory, which thread %d wrote with no barrier between",
             thread.number, does, offset, shadow.writer);
    }
  }

  void note_write(Thread const& thread, std::ptrdiff_t offset) {
    note_access(thread, offset, "writes");
    Shadow& shadow = shadow_[offset];
    if (int const reader = unordered_reader(shadow, thread); reader != nobody) {
      report("race: thread %d writes byte %td of shared memory, which thread %d read with no barrier between",
             thread.number, offset, reader);
    }
    shadow.writer = thread.number;
    shadow.write_epoch = block.epoch;
    shadow.write_warp_epoch = warp_epoch(thread.number);
  }

  void note_read(Thread const& thread, std::ptrdiff_t offset) {
    note_access(thread, offset, "reads");
    Shadow& shadow = shadow_[offset];
    if (shadow.writer == nobody) {
      report("uninitialised: thread %d reads byte %td of shared memory, which its block has not written", thread.number,
             offset);
    }
    bool const first = shadow.reader == nobody || shadow.read_epoch != block.epoch;
    bool const another_warp = !first && !same_warp(shadow.reader, thread.number);
    bool const after_warp_barrier = shadow.read_warp_epoch != warp_epoch(thread.number);
    if (first || another_warp || after_warp_barrier) {
      shadow.read_by_other_warps = !first && (another_warp || shadow.read_by_other_warps);
      shadow.other_reader = nobody;
    } else if (shadow.reader != thread.number) {
      shadow.other_reader = shadow.reader;
    }
    shadow.reader = thread.number;
    shadow.read_epoch = block.epoch;
    shadow.read_warp_epoch = warp_epoch(thread.number);
  }

  std::size_t size_;
  std::byte* memory_;
  std::vector<Shadow> shadow_;
};

// The dynamic shared memory of the launch under way.
inline Region* dynamic_region = nullptr;

// An element of shared memory: reading and writing it is watched.
template <typename T>
class Element {
 public:
  Element(Region* region, std::ptrdiff_t offset) : region_(region), offset_(offset) {}

  operator T() const {
    std::remove_const_t<T> value;
    region_->read(*block.current, offset_, &value, sizeof value);
    return value;
  }
  Element const& operator=(T const& value) const {
    region_->write(*block.current, offset_, &value, sizeof value);
    return *this;
  }
  Element const& operator=(Element const& other) const { return *this = static_cast<T>(other); }
  Element const& operator+=(T const& value) const { return *this = static_cast<T>(*this) + value; }

 private:
  Region* region_;
  std::ptrdiff_t offset_;
};

template <typename T>
class Pointer {
 public:
  Pointer(Region* region, std::ptrdiff_t offset) : region_(region), offset_(offset) {}

  Element<T> operator*() const { return {region_, offset_}; }
  Element<T> operator[](std::ptrdiff_t i) const { return *(*this + i); }
  Pointer operator+(std::ptrdiff_t count) const { return {region_, offset_ + count * std::ptrdiff_t{sizeof(T)}}; }
  Pointer operator-(std::ptrdiff_t count) const { return *this + -count; }
  Pointer& operator+=(std::ptrdiff_t count) { return *this = *this + count; }
  Pointer& operator-=(std::ptrdiff_t count) { return *this = *this - count; }

  Region* region() const { return region_; }
  std::ptrdiff_t offset() const { return offset_; }  // in bytes

 private:
  Region* region_;
  std::ptrdiff_t offset_;
};

template <typename T, int count>
class Array {
 public:
  operator Pointer<T>() { return {&region_, 0}; }
  Element<T> operator[](std::ptrdiff_t i) { return Pointer<T>(*this)[i]; }
  Pointer<T> operator+(std::ptrdiff_t i) { return Pointer<T>(*this) + i; }

 private:
  Region region_{count * sizeof(T)};
};

}  // namespace emulator

namespace convnext_kernels {

template <typename T>
using SharedPointer = emulator::Pointer<T>;

template <typename T, int count>
using SharedArray = emulator::Array<T, count>;

template <typename T>
SharedPointer<T> dynamic_shared() {
  return {emulator::dynamic_region, 0};
}

template <typename To, typename From>
SharedPointer<To> reinterpret_shared(SharedPointer<From> pointer) {
  return {pointer.region(), pointer.offset()};
}

}  // namespace convnext_kernels
