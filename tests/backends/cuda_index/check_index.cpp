// Checks of the kernels' index arithmetic against plain loops, compiled with the check_*.cpp beside it. `check_index
// NAME` runs one and says what is wrong; without a name it lists them.
#include <cstdio>

#include "check.h"

int main(int count, char** arguments) {
  using namespace bap_kernels;
  Checks checks;
  for (Checks part : {geometry_checks(), tile_checks(), halo_checks(), descriptor_checks()}) checks.merge(part);
  if (count != 2 || checks.count(arguments[1]) == 0) {
    for (const auto& [name, check] : checks) std::printf("%s\n", name.c_str());
    return 2;
  }
  try {
    checks.at(arguments[1])();
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", arguments[1], error.what());
    return 1;
  }
  return 0;
}
