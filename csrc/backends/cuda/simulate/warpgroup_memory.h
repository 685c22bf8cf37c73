// Shared memory of a simulated block whose warps meet at barriers in it: each word knows when it was written and read,
// each warp how far it has seen the others come. What was not seen at a barrier may be neither read nor overwritten.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace bap_kernels {

constexpr int kMostWarps = 16;
// For each warp, how many of its steps are known. A step ends where the warp tells others of it.
using Seen = std::array<int32_t, kMostWarps>;

inline void merge(Seen& into, const Seen& from) {
  for (int w = 0; w < kMostWarps; ++w) into[w] = std::max(into[w], from[w]);
}

class WarpgroupMemory {
 public:
  explicit WarpgroupMemory(int bytes) : bytes_(bytes, 0xff), words_((bytes + 3) / 4) {}

  // `seen`: what the warp knows, with its own present step.
  void write(int warp, const Seen& seen, int at, const void* from, int count) {
    check_place(at, count, count);
    for_words(at, count, [&](Word& word, int w) {
      claim(warp, seen, word, w);
      word.writer = warp, word.written = seen[warp];
    });
    std::memcpy(&bytes_[at], from, count);
  }
  void read(int warp, const Seen& seen, int at, void* to, int count) {
    check_place(at, count, count);
    for_words(at, count, [&](Word& word, int w) {
      check_written(warp, seen, word, w);
      word.read[warp] = seen[warp];
    });
    std::memcpy(to, &bytes_[at], count);
  }

  void begin_copy(int warp, const Seen& seen, int at, int count) {
    check_place(at, count, count);
    for_words(at, count, [&](Word& word, int w) {
      claim(warp, seen, word, w);
      ++word.under_way;
    });
  }
  // `step`: of the warp that started it.
  void end_copy(int warp, int32_t step, int at, const unsigned char* from, int count) {
    for_words(at, count, [&](Word& word, int) {
      --word.under_way;
      word.writer = warp, word.written = step;
    });
    std::memcpy(&bytes_[at], from, count);
  }

  // A read that goes on behind the warp's back until end_reads; `visible` is what it may see.
  const unsigned char* begin_read(int warp, const Seen& visible, int at, int count) {
    check_place(at, count, 1);
    for_words(at, count, [&](Word& word, int w) {
      check_written(warp, visible, word, w);
      ++word.reads_under_way;
    });
    return &bytes_[at];
  }
  void end_read(int warp, int32_t step, int at, int count) {
    for_words(at, count, [&](Word& word, int) {
      --word.reads_under_way;
      word.read[warp] = step;
    });
  }

  // Bytes that belong to a barrier from now on.
  void reserve(int at, int count) {
    check_place(at, count, count);
    for_words(at, count, [&](Word& word, int w) {
      require(!word.reserved, "makes a second barrier of", 0, w);
      word.reserved = true;
    });
  }

 private:
  static constexpr int kNobody = -1;
  struct Word {
    int writer = kNobody, under_way = 0, reads_under_way = 0;
    int32_t written = 0;
    bool reserved = false;
    Seen read{};
  };

  template <class Body>
  void for_words(int at, int count, Body body) {
    for (int w = at / 4; w < (at + count + 3) / 4; ++w) body(words_[w], w);
  }
  void require(bool holds, const char* what, int warp, int w) const {
    if (holds) return;
    std::ostringstream text;
    text << "simulated warpgroups: warp " << warp << " " << what << " word " << w << " (last written by warp "
         << words_[w].writer << ")";
    throw std::logic_error(text.str());
  }
  void check_place(int at, int count, int alignment) const {
    if (at >= 0 && at % alignment == 0 && at + count <= static_cast<int>(bytes_.size())) return;
    throw std::logic_error("simulated warpgroups: " + std::to_string(count) + " bytes at " + std::to_string(at) +
                           " of " + std::to_string(bytes_.size()) + " are not aligned or not within shared memory");
  }
  void check_written(int warp, const Seen& seen, const Word& word, int w) const {
    require(!word.reserved, "reads a barrier's", warp, w);
    require(word.under_way == 0, "reads before its copy is there", warp, w);
    require(word.writer != kNobody, "reads, never written,", warp, w);
    require(word.writer == warp || word.written < seen[word.writer], "reads without having seen the write of", warp, w);
  }
  void claim(int warp, const Seen& seen, const Word& word, int w) const {
    require(!word.reserved, "overwrites a barrier's", warp, w);
    require(word.under_way == 0, "overwrites a copy under way to", warp, w);
    require(word.reads_under_way == 0, "overwrites, while products read it,", warp, w);
    require(word.writer == kNobody || word.writer == warp || word.written < seen[word.writer],
            "overwrites without having seen the write of", warp, w);
    for (int other = 0; other < kMostWarps; ++other) {
      require(other == warp || word.read[other] < seen[other] || word.read[other] == 0,
              "overwrites without having seen the read of", warp, w);
    }
  }

  std::vector<unsigned char> bytes_;
  std::vector<Word> words_;
};

}  // namespace bap_kernels
