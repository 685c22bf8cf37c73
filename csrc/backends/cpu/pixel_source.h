// Where the tiles of conv_nhwc find the channels of an output pixel's taps.
#pragma once

#include <functional>
#include <vector>

#include "backends/cpu/isa.h"
#include "backends/cpu/native_call.h"

namespace bap_kernels {

// How the reduction of one pixel is laid out: `runs` pointers, `steps` consecutive channel units behind each.
//   direct   the pointers lead into x and the list gives the offsets: nothing is copied. One run for each tap.
//   packed   a thread first copies the listed channels of the image rows that its block needs, padded with columns of
//            zeros. Neighbouring taps of an image row are then one run, which makes few, long loops of many short ones.
// Packing serves convolutions of several taps, and whatever the kernel cannot read in place: listed channels of
// bfloat16, a fused prologue, strided channels.
struct PixelAccess {
  bool direct, merged;
  bool gapless;  // all channels of float pixels that follow one another: a run of pixels is copied as it is
  int64_t runs, steps;
  int64_t pixel_floats;        // from one packed pixel to the next
  ChannelGatherKernel gather;  // empty where plain loops copy the channels
  std::vector<micro::GatherStep> gather_steps;

  explicit PixelAccess(const NativeCall& n);
};

// The steps of a kernel's gather of `count` listed channels of `size` bytes from pixels of `channels`; none where it
// does not serve, or plain loops are faster.
std::vector<micro::GatherStep> plan_gather(const std::function<int64_t(int64_t)>& listed, int64_t count,
                                           int64_t channels, const ChannelGatherKernel& kernel, int64_t size);

class PixelSource {
 public:
  PixelSource(const NativeCall& n, const PixelAccess& access);

  // Offsets of the channel units from a pointer.
  const int32_t* offsets() const;

  // Prepares the output pixels [begin, end) and fills table[tile][run][row].
  void pointers(int64_t begin, int64_t end, int64_t rows, const float** table);

  // Bytes from the input pixel of an output pixel to that of the next one, where a single tap reads all of them and
  // they lie at one distance through the whole batch; else 0.
  int64_t stream_step() const { return stream_step_; }

  // The input pixel of an output pixel; null without such a distance.
  const char* stream(int64_t pixel) const { return stream_step_ ? n_.x + pixel * stream_step_ : nullptr; }

  // Cache lines to ask for ahead of a tile; none where several taps share them or a thread packs them first.
  int64_t lines(int64_t rows) const { return access_.direct && n_.taps == 1 ? rows * (n_.channels_in / 16 + 1) : 0; }

  // Asks for the channels of the tile's pixels [first, last).
  void prefetch(const float* const* tile, int64_t first, int64_t last) const;

 private:
  struct Rows {  // the input rows of one image that a block reads, and where they lie in the panel
    int64_t first, count, offset;
  };

  const float* run_pointer(int64_t image, int64_t oh, int64_t ow, int64_t local, int64_t run) const;
  void pack_pixels(int64_t begin, int64_t end);
  void pack_rows(int64_t begin, int64_t end);
  // `count` pixels of a row, `apart` columns from each to the next.
  void pack_run(const char* pixel, int64_t apart, int64_t count, float* dst) const;
  template <class scalar_t>
  void pack_channels(const scalar_t* pixel, float* dst) const;

  const NativeCall& n_;
  const PixelAccess& access_;
  const float* zeros_ = nullptr;
  float* panel_ = nullptr;
  int64_t first_image_ = 0, columns_ = 0, stream_step_ = 0;
  std::vector<Rows> rows_;
};

}  // namespace bap_kernels
