// See measured_case.h.
#include "dispatch/measured_case.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <sstream>

#include "dispatch/packed_cache.h"
#include "dispatch/packed_memory.h"
#include "dispatch/winograd.h"

namespace bap_kernels {
namespace {

enum class CaseOp : int { kForward, kBackward, kSwitched, kSwitchedBackward, kMixed, kBlock };

// What every case has; `v` are its numbers.
struct Conv {
  CaseOp op;
  const ConvShape<int64_t>& shape;
  const at::Tensor& input;
  c10::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

// Flags of all ops, from the first bit on, followed by the op's own.
constexpr int kOwnFlags = 9;
// How many numbers every case has in its key; a block's own follow them.
constexpr size_t kCommonNumbers = 25;

bool is_tf32(const at::Tensor& t) { return t.scalar_type() == at::kFloat && math_of(t) == FamilyMath::kTf32; }

CaseKey key_of(const Conv& c, int32_t flags, const MeasuredDevice& device, FamilySet routes) {
  const auto& s = c.shape;
  const int64_t values[] = {s.batch,
                            s.channels_in,
                            s.height,
                            s.width,
                            s.channels_out,
                            s.kernel_h,
                            s.kernel_w,
                            s.kept_in,
                            s.kept_out,
                            c.stride[0],
                            c.stride[1],
                            c.padding[0],
                            c.padding[1],
                            c.padding[2],
                            c.padding[3],
                            c.dilation[0],
                            c.dilation[1],
                            c.groups,
                            flags,
                            static_cast<int64_t>(c.input.scalar_type()),
                            device.is_gpu() ? is_tf32(c.input) : at::get_num_threads(),
                            device.id,
                            static_cast<int64_t>(c.op),
                            static_cast<int64_t>(routes),
                            static_cast<int64_t>(routes >> 32)};
  CaseKey key;
  static_assert(std::size(values) == kCommonNumbers && kCommonNumbers <= std::tuple_size_v<decltype(key.v)>);
  size_t i = 0;
  for (const int64_t v : values) key.v[i++] = static_cast<int32_t>(v);
  return key;
}

int32_t layout_flags(const at::Tensor& t) {
  const auto format = t.suggest_memory_format();
  return (format == at::MemoryFormat::ChannelsLast ? 1 : 0) | (t.is_contiguous(format) ? 2 : 0);
}

// Whether memory order is the format's own, or strided in some other way.
const char* layout_name(const at::Tensor& t) {
  const int32_t flags = layout_flags(t);
  return flags == 3 ? "nhwc" : flags == 1 ? "nhwc-strided" : flags == 2 ? "nchw" : "nchw-strided";
}

template <class Number>
std::string count_text(const OptionalTensor& index, Number kept) {
  return has_value(index) ? std::to_string(kept) : "all";
}

// The numbers between dtype and layout on one side, and what is the op's own on the other.
void put_numbers(std::ostringstream& key, const Conv& c, const std::string& kept_in, const std::string& kept_out) {
  const auto& s = c.shape;
  key << c10::toString(c.input.scalar_type()) << ' ' << layout_name(c.input) << " n" << s.batch << " c" << s.channels_in
      << ':' << kept_in << " k" << s.channels_out << ':' << kept_out << ' ' << s.height << 'x' << s.width << " f"
      << s.kernel_h << 'x' << s.kernel_w << " s" << c.stride[0] << 'x' << c.stride[1] << " p" << c.padding[0] << ','
      << c.padding[1] << ',' << c.padding[2] << ',' << c.padding[3] << " d" << c.dilation[0] << 'x' << c.dilation[1]
      << " g" << c.groups;
}

std::string with_device(std::ostringstream& key, const Conv& c, const MeasuredDevice& device, FamilySet routes) {
  if (!onednn_enabled()) key << " no-onednn";
  if (!device.is_gpu()) {
    key << " t" << at::get_num_threads();
    return key.str();
  }
  if (is_tf32(c.input)) key << " tf32";
  if ((routes & ~kUnknownFamily) != 0) {
    const char* before = " via ";
    for (const std::string& name : family_names(routes)) {
      const size_t first = name.find('/') + 1;
      key << before << name.substr(first, name.rfind('/') - first);
      before = "+";
    }
  }
  key << " on " << device.name;
  return key.str();
}

Conv conv_of(const ConvCall& c) {
  return {CaseOp::kForward, c.shape, c.input, c.stride, c.padding, c.dilation, c.groups};
}
Conv conv_of(const ConvBackwardCall& c) {
  return {CaseOp::kBackward, c.shape, c.input, c.stride, c.padding, c.dilation, c.groups};
}
Conv conv_of(const SwitchedCall& c) {
  return {CaseOp::kSwitched, c.shape, c.input, c.stride, c.padding, c.dilation, c.groups};
}
Conv conv_of(const SwitchedBackwardCall& c) {
  return {CaseOp::kSwitchedBackward, c.shape, c.input, c.stride, c.padding, c.dilation, c.groups};
}

// A mixed batch's numbers, coarse: its shape with the batch rounded up to a power of two, the longest list to a quarter
// of the channels in `kept_in`, and the number of runs to a power of two in `kept_out`.
ConvShape<int64_t> coarse_shape(const MixedCall& c) {
  ConvShape<int64_t> s = c.shape;
  const auto power = [](int64_t n) { return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n))); };
  int64_t longest = 0;
  for (const MixedRun& run : c.runs) {
    longest = std::max(longest, has_value(run.in_index) ? run.in_index->size(0) : s.channels_in);
  }
  const int64_t quarter = std::max<int64_t>(1, (s.channels_in + 3) / 4);
  s.batch = power(s.batch);
  s.kept_in = (longest + quarter - 1) / quarter * quarter;
  s.kept_out = power(static_cast<int64_t>(c.runs.size()));
  return s;
}

template <size_t kCount>
int32_t mask_bits(const std::array<bool, kCount>& mask) {
  int32_t bits = 0;
  for (size_t i = 0; i < kCount; ++i) bits |= static_cast<int32_t>(mask[i]) << i;
  return bits;
}

template <size_t kCount>
std::string mask_text(const std::array<bool, kCount>& mask) {
  std::string text = " grads ";
  for (size_t i = 0; i < kCount; ++i) {
    if (mask[i]) text += "iwbs"[i];
  }
  return text;
}

// Where it matters: to the CPU's ways of a call that lists input channels only.
PackedMemory memory_of(const ConvCall& c) {
  const bool matters = c.input.is_cpu() && has_value(c.weight_list()) && !has_value(c.out_index);
  return matters ? packed_memory() : PackedMemory::kAuto;
}

int32_t flags_of(const ConvCall& c) {
  return layout_flags(c.input) | (has_value(c.in_index) ? 4 : 0) | (has_value(c.out_index) ? 8 : 0) |
         (has_value(c.bias) ? 16 : 0) | (c.fusion.has_prologue() ? 32 : 0) | (c.fusion.has_epilogue() ? 64 : 0) |
         (PackedCache::keeps(c) ? 128 : 0) | (onednn_enabled() ? 256 : 0) |
         (weighs_winograd(c) && !get_winograd() ? 1 << kOwnFlags : 0) |
         static_cast<int>(memory_of(c)) << (kOwnFlags + 1);
}

void put_call(std::ostringstream& key, const ConvCall& c, const MeasuredDevice& device) {
  put_numbers(key, conv_of(c), count_text(c.in_index, c.shape.kept_in), count_text(c.out_index, c.shape.kept_out));
  key << (has_value(c.bias) ? " bias" : "") << (c.fusion.has_prologue() ? " pre" : "")
      << (c.fusion.has_epilogue() ? " post" : "") << (PackedCache::keeps(c) ? " cached" : "")
      << (device.name.empty() && weighs_winograd(c) && !get_winograd() ? " no-winograd" : "");
  const PackedMemory memory = memory_of(c);
  if (memory != PackedMemory::kAuto) key << (memory == PackedMemory::kFast ? " own-weights" : " one-weight");
}

}  // namespace

CaseKey case_key(const ConvCall& c, const MeasuredDevice& device, FamilySet routes) {
  return key_of(conv_of(c), flags_of(c), device, routes);
}

std::string case_text(const ConvCall& c, const MeasuredDevice& device, FamilySet routes) {
  std::ostringstream key;
  put_call(key, c, device);
  return with_device(key, conv_of(c), device, routes);
}

CaseKey case_key(const BlockCalls& calls, const MeasuredDevice& device) {
  const auto& [first, depthwise, last] = calls;
  Conv middle = conv_of(depthwise);
  middle.op = CaseOp::kBlock;
  // In the place of the families, which are GPUs'.
  const auto others = static_cast<FamilySet>(flags_of(first)) | static_cast<FamilySet>(flags_of(last)) << 32;
  CaseKey key = key_of(middle, flags_of(depthwise), device, others);
  size_t i = kCommonNumbers;
  for (const int64_t v : {first.shape.channels_in, first.shape.kept_in, last.shape.kept_out}) {
    key.v[i++] = static_cast<int32_t>(v);
  }
  return key;
}

std::string case_text(const BlockCalls& calls, const MeasuredDevice& device) {
  std::ostringstream key;
  key << "block ";
  put_call(key, calls.first, device);
  key << ", ";
  put_call(key, calls.depthwise, device);
  key << ", ";
  put_call(key, calls.last, device);
  return with_device(key, conv_of(calls.last), device, 0);
}

CaseKey case_key(const ConvBackwardCall& c, const MeasuredDevice& device, FamilySet routes) {
  const int32_t flags = layout_flags(c.input) | (has_value(c.in_index) ? 4 : 0) | (has_value(c.out_index) ? 8 : 0) |
                        (onednn_enabled() ? 256 : 0) | layout_flags(c.grad_output) << kOwnFlags |
                        mask_bits(c.mask) << (kOwnFlags + 2);
  return key_of(conv_of(c), flags, device, routes);
}

std::string case_text(const ConvBackwardCall& c, const MeasuredDevice& device, FamilySet routes) {
  std::ostringstream key;
  key << "backward ";
  put_numbers(key, conv_of(c), count_text(c.in_index, c.shape.kept_in), count_text(c.out_index, c.shape.kept_out));
  key << mask_text(c.mask) << " from " << layout_name(c.grad_output);
  return with_device(key, conv_of(c), device, routes);
}

CaseKey case_key(const SwitchedCall& c, const MeasuredDevice& device, FamilySet routes) {
  const int32_t flags = layout_flags(c.input) | (has_value(c.bias) ? 16 : 0) | (onednn_enabled() ? 256 : 0);
  return key_of(conv_of(c), flags, device, routes);
}

std::string case_text(const SwitchedCall& c, const MeasuredDevice& device, FamilySet routes) {
  std::ostringstream key;
  key << "switched ";
  put_numbers(key, conv_of(c), "all", "all");
  key << (has_value(c.bias) ? " bias" : "");
  return with_device(key, conv_of(c), device, routes);
}

CaseKey case_key(const SwitchedBackwardCall& c, const MeasuredDevice& device, FamilySet routes) {
  const int32_t flags = layout_flags(c.input) | (onednn_enabled() ? 256 : 0) |
                        layout_flags(c.grad_output) << kOwnFlags | mask_bits(c.mask) << (kOwnFlags + 2) |
                        (c.off_gradient ? 1 << (kOwnFlags + 6) : 0);
  return key_of(conv_of(c), flags, device, routes);
}

std::string case_text(const SwitchedBackwardCall& c, const MeasuredDevice& device, FamilySet routes) {
  std::ostringstream key;
  key << "switched backward ";
  put_numbers(key, conv_of(c), "all", "all");
  key << mask_text(c.mask) << (c.off_gradient ? " off" : "") << " from " << layout_name(c.grad_output);
  return with_device(key, conv_of(c), device, routes);
}

CaseKey case_key(const MixedCall& c, const MeasuredDevice& device, FamilySet routes) {
  const ConvShape<int64_t> shape = coarse_shape(c);
  const Conv conv{CaseOp::kMixed, shape, c.input, c.stride, c.padding, c.dilation, 1};
  const int32_t flags =
      layout_flags(c.input) | (has_value(c.bias) ? 16 : 0) | (onednn_enabled() ? 256 : 0) | (c.cache_packed ? 128 : 0);
  return key_of(conv, flags, device, routes);
}

std::string case_text(const MixedCall& c, const MeasuredDevice& device, FamilySet routes) {
  const ConvShape<int64_t> shape = coarse_shape(c);
  const Conv conv{CaseOp::kMixed, shape, c.input, c.stride, c.padding, c.dilation, 1};
  std::ostringstream key;
  key << "mixed ";
  put_numbers(key, conv, std::to_string(shape.kept_in), "all");
  key << " runs" << shape.kept_out << (has_value(c.bias) ? " bias" : "") << (c.cache_packed ? " cached" : "");
  return with_device(key, conv, device, routes);
}

}  // namespace bap_kernels
