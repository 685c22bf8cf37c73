// Runs the packing of a panel's row against a plain loop: masks, steps and prologues at random, planes that end, or
// begin, at a page that may not be touched. Whatever no mask names is NaN. Exit status: 0 if all agree, else 1.
#include <cmath>
#include <cstdio>
#include <vector>

#include "backends/cpu/microkernels/pack_row.h"
#include "guarded.h"

namespace {

using namespace bap_kernels::micro;

enum class Kind { kFloat, kHalf, kPairs };

uint16_t half_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return static_cast<uint16_t>(bits >> 16);
}

float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// Nearest of the two halves around v, ties to the even one.
uint16_t nearest_half(float v) {
  const uint16_t low = half_of(v), high = low + 1;
  const double below = std::fabs(double(v) - widened(low)), above = std::fabs(widened(high) - double(v));
  return below < above || (below == above && low % 2 == 0) ? low : high;
}

float applied(const RowPrologue* f, float v) {
  if (!f) return v;
  const float shifted = std::fma(v, f->scale, f->shift);
  return f->relu && shifted < 0 ? 0 : shifted;
}

struct Group {
  int owner[kRowLanes];  // which of the two parts sets the lane; -1: none
  int64_t source[2];
};

bool run(Random& random, Kind kind) {
  constexpr int64_t kSteps[] = {1, 2, 3, 5};
  const int64_t step = kSteps[random.below(4)], groups = 1 + random.below(5);
  const int64_t span = 7 * step + 1, elements = span + random.below(120), size = kind == Kind::kFloat ? 4 : 2;
  const bool at_end = random.below(2), prologue = random.below(2), second = random.below(3) > 0;
  RowPrologue prologues[2];
  for (RowPrologue& f : prologues) {
    const bool ties = random.below(2);  // half of the products then lie between two halves
    f = {ties ? 1 + 1 / 256.f : random.real() * 3, ties ? 0 : random.real(), random.below(2) == 1};
  }
  const RowPrologue* given = prologue ? prologues : nullptr;

  std::vector<Group> wanted;
  std::vector<RowPart> parts;
  std::vector<bool> used(elements);
  for (int64_t g = 0; g < groups; ++g) {
    Group group;
    int32_t masks[2] = {0, 0};
    // A part may begin before the plane or end after it: only its mask has to lie inside.
    for (int64_t& source : group.source) source = random.below(static_cast<int>(elements + span)) - span;
    const bool whole = random.below(3) == 0;
    if (whole) {
      const int64_t next = parts.empty() || parts.back().mask != kAllLanes
                               ? elements
                               : parts.back().source + parts.back().groups * kRowLanes * step;
      group.source[0] = next + span <= elements ? next : random.below(static_cast<int>(elements - span + 1));
    }
    for (int lane = 0; lane < kRowLanes; ++lane) {
      const int owner = whole ? 0 : random.below(4) == 0 ? -1 : random.below(2);
      const int64_t at = owner < 0 ? -1 : group.source[owner] + lane * step;
      group.owner[lane] = at >= 0 && at < elements ? owner : -1;
      if (group.owner[lane] < 0) continue;
      masks[owner] |= 1 << lane;
      used[at] = true;
    }
    const bool both = masks[1] != 0;
    // A group that goes on where a whole one ended belongs to its part.
    RowPart* before = parts.empty() ? nullptr : &parts.back();
    if (whole && before && before->mask == kAllLanes && before->groups > 0 &&
        group.source[0] == before->source + before->groups * kRowLanes * step) {
      ++before->groups;
    } else {
      parts.push_back({group.source[0], masks[0], !both});
      if (both) parts.push_back({group.source[1], masks[1], 1});
    }
    wanted.push_back(group);
  }

  Guarded planes[2] = {Guarded(4096), Guarded(4096)}, out(4096);
  char* plane[2];
  for (int i = 0; i < 2; ++i) {
    plane[i] = planes[i].place(elements * size, at_end);
    for (int64_t e = 0; e < elements; ++e) {
      if (!used[e]) continue;
      const float v = random.real();
      const uint16_t half = half_of(v);
      std::memcpy(plane[i] + e * size, kind == Kind::kFloat ? static_cast<const void*>(&v) : &half, size);
    }
  }
  char* row = out.place(groups * kRowLanes * 4, at_end);
  const std::vector<char> before = out.copy();
  auto* lanes = reinterpret_cast<float*>(row);
  const auto count = static_cast<int64_t>(parts.size());
  const auto* first = reinterpret_cast<const uint16_t*>(plane[0]);
  const auto* other = second ? reinterpret_cast<const uint16_t*>(plane[1]) : nullptr;
  if (kind == Kind::kFloat) {
    pack_row(parts.data(), count, reinterpret_cast<const float*>(plane[0]), step, given, lanes);
  } else if (kind == Kind::kHalf) {
    pack_row(parts.data(), count, first, step, given, lanes);
  } else {
    pack_pairs(parts.data(), count, first, other, step, given, lanes);
  }

  const auto element = [&](int i, int64_t e) {
    if (kind != Kind::kFloat) return widened(reinterpret_cast<const uint16_t*>(plane[i])[e]);
    float v;
    std::memcpy(&v, plane[i] + e * 4, 4);
    return v;
  };
  for (int64_t g = 0; g < groups; ++g) {
    for (int lane = 0; lane < kRowLanes; ++lane) {
      const int owner = wanted[g].owner[lane];
      const int64_t at = owner < 0 ? 0 : wanted[g].source[owner] + lane * step;
      uint32_t expected = 0, found;
      std::memcpy(&found, row + (g * kRowLanes + lane) * 4, 4);
      if (owner >= 0 && kind != Kind::kPairs) {
        const float v = applied(given, element(0, at));
        std::memcpy(&expected, &v, 4);
      } else if (owner >= 0) {
        for (int i = 0; i < (second ? 2 : 1); ++i) {
          const RowPrologue* f = prologue ? prologues + i : nullptr;
          const float v = applied(f, element(i, at));
          expected |= static_cast<uint32_t>(f ? nearest_half(v) : half_of(v)) << 16 * i;
        }
      }
      // Zeros have no sign here.
      if (found != expected && (found | expected) << 1 != 0) {
        std::printf("kind %d step %d group %d lane %d: expected %08x, got %08x\n", static_cast<int>(kind),
                    static_cast<int>(step), static_cast<int>(g), lane, expected, found);
        return false;
      }
    }
  }
  const std::vector<char> after = out.copy();
  for (size_t i = 0; i < after.size(); ++i) {
    const char* at = out.data() + i;
    if ((at < row || at >= row + groups * kRowLanes * 4) && after[i] != before[i]) {
      std::printf("wrote beside the row\n");
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  Random random(7);
  int calls = 0;
  for (; calls < 6000; ++calls) {
    if (!run(random, static_cast<Kind>(calls % 3))) return 1;
  }
  std::printf("%d calls: ok\n", calls);
  return 0;
}
