// Follows the kernels: runs one launch of a kernel that takes `Arguments`.
namespace gpu {

typedef void (*Kernel)(const Arguments);
static thread_local Kernel kernel;
static thread_local const Arguments* arguments;

static void enter() {
  kernel(*arguments);
  self->ended = true;
  _longjmp(scheduler, 1);
}

static void resume(Fiber& fiber) {
  self = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.where, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

struct SharedMemory {  // ends at a page that may not be touched
  size_t size, pages;
  unsigned char* base;
  explicit SharedMemory(size_t bytes) : size((bytes + 15) / 16 * 16), pages((size + 4095) / 4096 * 4096) {
    base = (unsigned char*)mmap(nullptr, pages + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(base + pages, 4096, PROT_NONE);
    std::memset(base, 0xff, pages);
  }
  unsigned char* start() { return base + pages - size; }
  ~SharedMemory() { munmap(base, pages + 4096); }
};

// Run blocks first .. first + count - 1 together. Returns whether all threads came to the end.
static bool run_blocks(unsigned first, unsigned count, unsigned threads, unsigned cluster, unsigned shared_bytes, bool descending) {
  std::vector<Block> blocks(count);
  std::vector<std::unique_ptr<SharedMemory>> memory;
  std::vector<Barrier> clusters(count / cluster);
  std::vector<Fiber> fibers(count * threads);
  for (unsigned b = 0; b < count; ++b) {
    Block& block = blocks[b];
    block.index.x = first + b;
    memory.push_back(std::make_unique<SharedMemory>(shared_bytes));
    block.shared = memory.back()->start();
    block.barrier.size = threads;
    block.warps.resize(threads / 32);
    for (Warp& warp : block.warps) warp.barrier.size = 32;
    clusters[b / cluster].size = cluster * threads;
    block.cluster_barrier = &clusters[b / cluster];
    for (unsigned i = 0; i < cluster; ++i) block.cluster.push_back(&blocks[b / cluster * cluster + i]);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[b * threads + t];
      fiber.thread.x = t;
      fiber.block = &block;
      fiber.stack.reset(new char[STACK]);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = STACK;
      makecontext(&fiber.start, enter, 0);
    }
  }
  size_t left = fibers.size();
  while (left) {
    bool ran = false;
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[descending ? fibers.size() - 1 - i : i];
      if (fiber.ended || (fiber.waits_at && *fiber.waits_at == fiber.generation)) continue;
      fiber.waits_at = nullptr;
      ran = true;
      resume(fiber);
      left -= fiber.ended;
    }
    if (!ran && !nothing_comes) {
      nothing_comes = true;
      ++progress;
      continue;
    }
    if (!ran) {
      std::fprintf(stderr, "%zu threads wait at a barrier that the others do not reach\n", left);
      return false;
    }
  }
  return true;
}

}  // namespace gpu

unsigned argument_bytes = sizeof(Arguments);

extern "C" int launch(gpu::Kernel kernel, unsigned grid, unsigned threads, unsigned shared_bytes, int resident, int descending,
                      const Arguments* arguments) {
  gpu::kernel = kernel;
  gpu::arguments = arguments;
  gpu::grid_size.x = grid;
  gpu::nothing_comes = false;
  const unsigned together = resident ? grid : CLUSTER, groups = grid / together;
  for (unsigned i = 0; i < groups; ++i)
    if (!gpu::run_blocks((descending ? groups - 1 - i : i) * together, together, threads, CLUSTER, shared_bytes, descending)) return 1;
  return 0;
}
