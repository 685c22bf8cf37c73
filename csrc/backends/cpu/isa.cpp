// Choice of the instruction set at run time.
#include "backends/cpu/isa.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <fstream>

#include "backends/cpu/cpu_features.h"

namespace bap_kernels {
namespace {

bool usable(const std::string& isa) {
#if defined(BAP_KERNELS_HAVE_AVX512)
  if (isa == "avx512") return cpu_has("avx512");
#endif
#if defined(BAP_KERNELS_HAVE_AVX2)
  if (isa == "avx2" || isa == "avx512_emulated" || isa == "neon_emulated") return cpu_has("avx2");
#endif
#if defined(BAP_KERNELS_HAVE_NEON)
  if (isa == "neon") return cpu_has("neon");
#endif
  return isa == "none";
}

std::string& chosen() {
  static std::string name = isa_available().front();
  return name;
}

}  // namespace

std::vector<std::string> isa_available() {
  std::vector<std::string> names;
  for (const char* name : {"avx512", "avx2", "neon", "none"}) {
    if (usable(name)) names.emplace_back(name);
  }
  return names;
}

void set_isa(const std::string& name) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      usable(name),
      "bap_kernels: expected `BAP_KERNELS_ISA` to name instructions that this CPU and this build have, got ", name,
      ". Hint: available here: ", c10::Join(", ", isa_available()), ".");
  chosen() = name;
}

const std::string& isa() { return chosen(); }

bool isa_has_bfloat16_pairs() { return isa_tiles(/*pairs=*/true) != nullptr; }

const micro::KernelTable* isa_tiles(bool pairs) {
#if defined(BAP_KERNELS_HAVE_AVX512)
  if (isa() == "avx512") {
    if (!pairs) return micro::table_avx512();
#if defined(BAP_KERNELS_HAVE_AVX512BF16)
    return cpu_has("avx512bf16") ? micro::table_avx512_pairs() : nullptr;
#else
    return nullptr;
#endif
  }
#endif
#if defined(BAP_KERNELS_HAVE_AVX2)
  if (isa() == "avx512_emulated") return pairs ? micro::table_avx512_emulated_pairs() : micro::table_avx512_emulated();
  if (isa() == "neon_emulated") return pairs ? nullptr : micro::table_neon_emulated();
  if (isa() == "avx2") return pairs ? nullptr : micro::table_avx2();
#endif
#if defined(BAP_KERNELS_HAVE_NEON)
  if (isa() == "neon") return pairs ? nullptr : micro::table_neon();
#endif
  return nullptr;
}

ChannelGatherKernel isa_gather(bool pairs) {
#if defined(BAP_KERNELS_HAVE_AVX512)
  if (isa() == "avx512") {
    if (!pairs) return {micro::gather_floats_avx512, 16};
#if defined(BAP_KERNELS_HAVE_AVX512BF16)
    if (cpu_has("avx512bf16")) return {micro::gather_pairs_avx512bf16, 32};
#endif
  }
#endif
#if defined(BAP_KERNELS_HAVE_AVX2)
  if (isa() == "avx2" && !pairs) return {micro::gather_floats_avx2, 8, /*whole_loads=*/true};
#endif
  (void)pairs;
  return {};
}

const micro::WinogradTable* isa_winograd() {
#if defined(BAP_KERNELS_HAVE_AVX512)
  if (isa() == "avx512") return micro::winograd_avx512();
#endif
#if defined(BAP_KERNELS_HAVE_AVX2)
  if (isa() == "avx512_emulated") return micro::winograd_emulated();
  if (isa() == "neon_emulated") return micro::winograd_neon_emulated();
  if (isa() == "avx2") return micro::winograd_avx2();
#endif
#if defined(BAP_KERNELS_HAVE_NEON)
  if (isa() == "neon") return micro::winograd_neon();
#endif
  return nullptr;
}

const micro::DepthwiseTable* isa_depthwise() {
#if defined(BAP_KERNELS_HAVE_AVX512)
  if (isa() == "avx512") return micro::depthwise_avx512();
#endif
#if defined(BAP_KERNELS_HAVE_AVX2)
  if (isa() == "avx512_emulated") return micro::depthwise_emulated();
  if (isa() == "neon_emulated") return micro::depthwise_neon_emulated();
  if (isa() == "avx2") return micro::depthwise_avx2();
#endif
#if defined(BAP_KERNELS_HAVE_NEON)
  if (isa() == "neon") return micro::depthwise_neon();
#endif
  return nullptr;
}

std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) {
      std::string name = line.substr(std::min(line.size(), line.find(':') + 2));
      std::replace(name.begin(), name.end(), '\t', ' ');
      return name;
    }
  }
  return "unknown CPU";
}

}  // namespace bap_kernels
