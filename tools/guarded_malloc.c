// Allocator to preload for tools/search_convolution_faults.py. New memory is filled with NaN; with BAP_SEARCH_GUARD set,
// blocks of tensors and of oneDNN end at a page that is readable but not writable.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
enum { kPage = 4096, kSlots = 4096 };
static const size_t kSlot = 8u << 20;
static char* arena;
static char used[kSlots];
static size_t guard_at[kSlots];
static int lock, next_slot;
static void* next_of(const char* name) { return dlsym(RTLD_NEXT, name); }
static int claim(void) {
  int found = -1;
  while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE)) {}
  if (!arena) {
    arena = mmap(0, kSlots * kSlot, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) abort();
  }
  for (int i = 0; i < kSlots && found < 0; ++i) {
    const int slot = (next_slot + i) % kSlots;
    if (!used[slot]) found = slot;
  }
  if (found >= 0) used[found] = 1, next_slot = found + 1;
  __atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
  return found;
}
int posix_memalign(void** p, size_t alignment, size_t size) {
  static int (*next)(void**, size_t, size_t);
  if (!next) next = (int (*)(void**, size_t, size_t))next_of("posix_memalign");
  const size_t whole = (size + alignment - 1) / alignment * alignment, pages = (whole + kPage - 1) / kPage * kPage;
  const int slot = size > 0 && pages + kPage <= kSlot && alignment <= kPage && getenv("BAP_SEARCH_GUARD") ? claim() : -1;
  if (slot < 0) {
    const int rc = next(p, alignment, size);
    if (rc == 0) memset(*p, 0xff, size);
    return rc;
  }
  char* base = arena + slot * kSlot;
  memset(base, 0xff, pages + kPage);
  mprotect(base + pages, kPage, PROT_READ);
  guard_at[slot] = pages;
  *p = base + pages - whole;
  return 0;
}
void free(void* p) {
  static void (*next)(void*);
  if (arena && (char*)p >= arena && (char*)p < arena + kSlots * kSlot) {
    const int slot = (int)(((char*)p - arena) / kSlot);
    char* base = arena + slot * kSlot;
    mprotect(base + guard_at[slot], kPage, PROT_READ | PROT_WRITE);
    madvise(base, guard_at[slot] + kPage, MADV_DONTNEED);
    __atomic_store_n(&used[slot], 0, __ATOMIC_RELEASE);
    return;
  }
  if (!next) next = (void (*)(void*))next_of("free");
  next(p);
}
void* malloc(size_t size) {
  static void* (*next)(size_t);
  if (!next) next = (void* (*)(size_t))next_of("malloc");
  void* p = next(size);
  if (p) memset(p, 0xff, size);
  return p;
}
