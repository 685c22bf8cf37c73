// What the checks of check_*.cpp share. Each check is a function that throws where something is wrong.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "backends/cuda/kernels/conv_geometry.h"
#include "backends/cuda/kernels/instances.h"

namespace bap_kernels {

using Checks = std::map<std::string, std::function<void()>>;
Checks geometry_checks();
Checks tile_checks();
Checks halo_checks();
Checks descriptor_checks();

inline void require(bool holds, const std::string& what) {
  if (!holds) throw std::logic_error(what);
}

template <class Body>
void for_axes(Body body) {
  for (int kernel = 1; kernel <= 5; ++kernel) {
    for (int stride = 1; stride <= 4; ++stride) {
      for (int before = 0; before <= 3; ++before) {
        for (int dilation = 1; dilation <= 4; ++dilation) {
          for (int input = 1; input <= 13; ++input) {
            const int output = (input + before + 1 - dilation * (kernel - 1) - 1) / stride + 1;
            if (output > 0 && input + before + 1 > dilation * (kernel - 1)) {
              body(ConvAxis{input, output, kernel, stride, before, dilation});
            }
          }
        }
      }
    }
  }
}

template <class Body>
void for_tiles(Body body) {
  body("large", LargeTile{});
  body("small", SmallTile{});
  body("thin", ThinTile{});
}

// How often the busiest of 32 banks of 4 bytes is hit by one group of accesses to different words.
inline int busiest_bank(const std::vector<int>& offsets, int bytes) {
  std::map<int, std::set<int>> banks;
  for (const int at : offsets) {
    for (int word = at / 4; word < (at + bytes + 3) / 4; ++word) banks[word % 32].insert(word);
  }
  size_t most = 0;
  for (const auto& [bank, words] : banks) most = std::max(most, words.size());
  return static_cast<int>(most);
}

}  // namespace bap_kernels
