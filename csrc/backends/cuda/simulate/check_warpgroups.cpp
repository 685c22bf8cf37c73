// Products of warpgroups: where their operands lie, and that their simulation finds what is wrong.
#include "backends/cuda/kernels/warpgroup_conv2d_block.h"
#include "backends/cuda/simulate/check.h"
#include "backends/cuda/simulate/simulated_warpgroups.h"

namespace bap_kernels {
namespace {

void descriptors() {
  for (const uint32_t start : {0u, 1024u, 16384u, 49152u, 196608u}) {
    const uint64_t d = matrix_descriptor(start);
    require((d & 0x3fff) == start / 16 && (d >> 14 & 3) == 0, "the address is not where it belongs");
    require((d >> 32 & 0x3fff) == 64 && (d >> 46 & 3) == 0, "groups of rows are not 1024 bytes apart");
    require((d >> 49 & 7) == 0 && d >> 62 == 1 && (d >> 52 & 0x3ff) == 0, "the layout is another one");
    for (int slice = 0; slice < kSlices; ++slice) {
      for (int row = 0; row < 256; ++row) {
        for (int half = 0; half < 2; ++half) {
          const uint32_t address = start + slice * kSliceBytes + row / 8 * 1024 + row % 8 * 128 + half * 16;
          require(exchanged(address) == start + by_rows(row, 2 * slice + half), "a chunk is read from another place");
        }
      }
    }
  }
#define BAP_KERNELS_CALL(name, ...)                                                                                  \
  require(WarpgroupConv2d<MathMode::kHalf, name##WarpgroupTile>::kSharedBytes <= 227 * 1024,                         \
          "more shared memory than a block of the device has");                                                      \
  require(name##WarpgroupTile::kEpilogueBytes <= WarpgroupConv2d<MathMode::kHalf, name##WarpgroupTile>::kBarriersAt, \
          "the table reaches into the barriers");
  BAP_KERNELS_WARPGROUP_TILES(BAP_KERNELS_CALL)
#undef BAP_KERNELS_CALL
}

// What a small pipeline may leave out or do wrong.
struct Faults {
  bool no_full_wait, no_empty_wait, no_fence_of_copies, no_fence_of_sums, early_arrival, early_sums, plain_rows,
      too_few_arrivals, no_barrier, too_many_registers, no_registers_given;
};

constexpr int kRows = 64, kColumns = 128, kColumnsAt = kRows * kDepthBytes;
constexpr int kFullAt = kColumnsAt + kColumns * kDepthBytes, kEmptyAt = kFullAt + 8, kBytes = kEmptyAt + 8;
struct SmallState {
  float sums[1][kColumns / 8][4];
};

float operand_value(int step, int row, int k) { return static_cast<float>((row * 7 + k * 3 + step) % 13 - 6); }

// Two steps through one stage: group 1 copies, group 0 multiplies. True where the sums are right.
bool small_pipeline(const Faults& f) {
  alignas(16) static HalfWord data[2][kRows + kColumns][64];
  for (int step = 0; step < 2; ++step) {
    for (int row = 0; row < kRows + kColumns; ++row) {
      for (int k = 0; k < 64; ++k) data[step][row][k] = from_float<HalfWord>(operand_value(step, row, k));
    }
  }
  SimulatedWarpgroups<SmallState> b(2 * kWarpgroup, kBytes, 0, 0);
  bool right = true;
  b.init_barrier(kFullAt, f.too_few_arrivals ? kWarpgroup + 1 : kWarpgroup);
  b.init_barrier(kEmptyAt, 4);
  b.sync();
  b.groups([&](int group) {
    if (group == 1) {
      if (!f.no_registers_given) b.template give_registers<152>();
      for (int step = 0; step < 2; ++step) {
        if (!f.no_empty_wait) b.wait_barrier(kEmptyAt, (step + 1) & 1);
        b.each_of_group([&](int thread, SmallState&) {
          for (int row = thread % kWarpgroup / 8; row < kRows + kColumns; row += 16) {
            const int chunk = thread % 8;
            const int at = f.plain_rows ? row * kDepthBytes + chunk * kChunkBytes : by_rows(row, chunk);
            b.copy_chunk(thread, at, &data[step][row][chunk * 8], 16);
          }
          b.arrive_copies(thread, kFullAt);
        });
      }
      return;
    }
    if (f.too_many_registers) {
      b.template take_registers<240>();
    } else {
      b.template take_registers<184>();
    }
    b.each_of_group([&](int, SmallState& s) { s = {}; });
    for (int step = 0; step < 2; ++step) {
      if (!f.no_full_wait) b.wait_barrier(kFullAt, step & 1);
      if (!f.no_fence_of_copies) b.see_copies();
      if (!f.no_fence_of_sums) b.begin_products();
      for (int slice = 0; slice < kSlices; ++slice) {
        const int columns = kColumnsAt + slice * kSliceBytes;
        b.template multiply_group<MathMode::kHalf, kColumns>(slice * kSliceBytes, columns);
      }
      b.commit_products();
      if (f.early_arrival) b.arrive(kEmptyAt);
      if (f.early_sums) b.each_of_group([&](int, SmallState&) {});
      b.template wait_products<0>();
      if (!f.early_arrival) b.arrive(kEmptyAt);
    }
    // What every warp has read is written over.
    b.template sync_groups<kWarpgroup>();
    b.each_of_group([&](int thread, SmallState& s) {
      for (int j = 0; j < kColumns / 8; ++j) {
        for (int r = 0; r < 4; ++r) {
          const int row = thread / 32 * 16 + thread % 32 / 4 + r / 2 * 8, column = j * 8 + thread % 4 * 2 + r % 2;
          float sum = 0.0f;
          for (int step = 0; step < 2; ++step) {
            for (int k = 0; k < 64; ++k) sum += operand_value(step, row, k) * operand_value(step, kRows + column, k);
          }
          right = right && s.sums[0][j][r] == sum;
        }
      }
      // From the next warp: what needs a barrier in between.
      b.template store<float>(thread, thread * 4, 1.0f);
    });
    if (!f.no_barrier) b.template sync_groups<kWarpgroup>();
    b.each_of_group([&](int thread, SmallState&) { b.template load<float>(thread, (thread + 32) % kWarpgroup * 4); });
  });
  return right;
}

void warpgroup_rules() {
  require(small_pipeline({}), "a right pipeline gives wrong sums");
  const auto caught = [](const char* what, bool Faults::* fault) {
    Faults f{};
    f.*fault = true;
    try {
      small_pipeline(f);
    } catch (const std::logic_error&) {
      return;
    }
    throw std::logic_error(std::string("was not caught: ") + what);
  };
  caught("products before the copies are there", &Faults::no_full_wait);
  caught("copies over what products may still read", &Faults::no_empty_wait);
  caught("products that do not see copies", &Faults::no_fence_of_copies);
  caught("sums without a fence", &Faults::no_fence_of_sums);
  caught("a stage that is given back while products read it", &Faults::early_arrival);
  caught("sums that are touched while products are under way", &Faults::early_sums);
  caught("a barrier that waits for more than arrive", &Faults::too_few_arrivals);
  caught("a read of another warp's write without a barrier", &Faults::no_barrier);
  caught("more registers than there are", &Faults::too_many_registers);
  caught("registers that nobody gave", &Faults::no_registers_given);
  Faults plain{};
  plain.plain_rows = true;
  require(!small_pipeline(plain), "operands that lie otherwise give the same sums");
}

}  // namespace

Checks warpgroup_checks() { return {{"descriptors", descriptors}, {"warpgroup_rules", warpgroup_rules}}; }

}  // namespace bap_kernels
