// A block of the CUDA kernels on the host: the same text as on the device, thread by thread, for tests without a GPU.
//
// What the device guarantees is checked or withheld:
//  - a copy arrives when its thread waits for its group, not before; reading what is still under way is an error;
//  - shared memory that another thread wrote, or read before it is overwritten, needs a barrier in between: each word
//    knows who wrote and read it since when;
//  - words that were never written, addresses that are not aligned, and places outside shared memory are errors.
// Matrix loads and products follow the tables of the PTX manual (ldmatrix, mma.m16n8k16 and m16n8k8), written out here
// and not taken from tile_layout.h, which they check.
#pragma once

#include <cstring>
#include <deque>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "backends/cuda/kernels/block_parts.h"

namespace bap_kernels {

class SimulatedMemory {
 public:
  explicit SimulatedMemory(int bytes) : bytes_(bytes, 0xff), words_(bytes / 4) {}

  void write(int thread, int at, const void* from, int count) {
    check_place(at, count);
    for (int w = at / 4; w < (at + count + 3) / 4; ++w) {
      claim(thread, w);
      words_[w].writer = thread, words_[w].written = epoch_;
    }
    std::memcpy(&bytes_[at], from, count);
  }

  void read(int thread, int at, void* to, int count) {
    check_place(at, count);
    for (int w = at / 4; w < (at + count + 3) / 4; ++w) {
      Word& word = words_[w];
      require(word.under_way == 0, "reads a copy that is under way", thread, w);
      require(word.writer != kNobody, "reads what was never written", thread, w);
      require(word.writer == thread || word.written < epoch_, "reads before a barrier what was written by", thread, w);
      word.reader = word.read < epoch_ || word.reader == thread ? thread : kSeveral;
      word.read = epoch_;
    }
    std::memcpy(to, &bytes_[at], count);
  }

  void begin_copy(int thread, int at, int count = kChunkBytes) {
    check_place(at, count);
    for (int w = at / 4; w < (at + count) / 4; ++w) {
      claim(thread, w);
      ++words_[w].under_way;
    }
  }
  void end_copy(int thread, int at, const unsigned char* from, int count = kChunkBytes) {
    for (int w = at / 4; w < (at + count) / 4; ++w) {
      --words_[w].under_way;
      words_[w].writer = thread, words_[w].written = epoch_;
    }
    std::memcpy(&bytes_[at], from, count);
  }

  void barrier() { ++epoch_; }

 private:
  static constexpr int kNobody = -1, kSeveral = -2;
  struct Word {
    int writer = kNobody, reader = kNobody, under_way = 0;
    int64_t written = -1, read = -1;
  };

  void require(bool holds, const char* what, int thread, int w) const {
    if (holds) return;
    std::ostringstream text;
    text << "simulated block: thread " << thread << " " << what << " (word " << w << ", last written by thread "
         << words_[w].writer << ", read by thread " << words_[w].reader << ")";
    throw std::logic_error(text.str());
  }
  void check_place(int at, int count) const {
    if (at >= 0 && at % count == 0 && at + count <= static_cast<int>(bytes_.size())) return;
    throw std::logic_error("simulated block: " + std::to_string(count) + " bytes at " + std::to_string(at) + " of " +
                           std::to_string(bytes_.size()) + " are not aligned or not within shared memory");
  }
  // Before a thread overwrites a word.
  void claim(int thread, int w) const {
    const Word& word = words_[w];
    require(word.under_way == 0, "overwrites a copy that is under way", thread, w);
    require(word.written < epoch_ || word.writer == thread, "overwrites before a barrier what was written by", thread,
            w);
    require(word.read < epoch_ || word.reader == thread, "overwrites before a barrier what was read by", thread, w);
  }

  std::vector<unsigned char> bytes_;
  std::vector<Word> words_;
  int64_t epoch_ = 0;
};

template <class State>
class SimulatedBlock {
 public:
  SimulatedBlock(int threads, int shared_bytes, int block_x, int block_y)
      : memory_(shared_bytes),
        states_(threads),
        open_(threads),
        groups_(threads),
        block_x_(block_x),
        block_y_(block_y) {}

  int block_x() const { return block_x_; }
  int block_y() const { return block_y_; }

  template <class Function>
  void each(Function&& function) {
    for (size_t thread = 0; thread < states_.size(); ++thread) function(static_cast<int>(thread), states_[thread]);
  }
  void sync() { memory_.barrier(); }

  void copy_chunk(int thread, int to, const void* from, int bytes) { copy_part<kChunkBytes>(thread, to, from, bytes); }
  template <int kBytes>
  void copy_part(int thread, int to, const void* from, int bytes) {
    if (bytes < 0 || bytes > kBytes || reinterpret_cast<uintptr_t>(from) % kBytes != 0) {
      throw std::logic_error("simulated block: a copy of " + std::to_string(bytes) + " bytes is not aligned");
    }
    memory_.begin_copy(thread, to, kBytes);
    Copy copy{to, kBytes, {}};
    std::memcpy(copy.data, from, bytes);
    open_[thread].push_back(copy);
  }
  void commit(int thread) {
    groups_[thread].push_back(std::move(open_[thread]));
    open_[thread].clear();
  }
  template <int kLeft>
  void wait(int thread) {
    while (groups_[thread].size() > kLeft) {
      for (const Copy& copy : groups_[thread].front()) memory_.end_copy(thread, copy.to, copy.data, copy.count);
      groups_[thread].pop_front();
    }
  }

  template <typename value_t>
  void store(int thread, int at, value_t value) {
    memory_.write(thread, at, &value, sizeof(value));
  }
  template <typename value_t>
  value_t load(int thread, int at) {
    value_t value;
    memory_.read(thread, at, &value, sizeof(value));
    return value;
  }
  template <typename scalar_t>
  void store_chunk(int thread, int at, const Chunk<scalar_t>& chunk) {
    store(thread, at, chunk);
  }
  uint32_t load_word(int thread, int at) { return load<uint32_t>(thread, at); }

  // Lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i; register i of lane l is word l % 4 of row l / 4.
  template <class Offset>
  void load_matrices(int thread, uint32_t (&r)[4], Offset&& offset) {
    const int lane = thread % kWarp;
    for (int i = 0; i < 4; ++i) {
      const int row = offset(8 * i + lane / 4);
      check_row(row);
      r[i] = load<uint32_t>(thread, row + lane % 4 * 4);
    }
  }
  // Transposed: elements l / 4 of rows 2 (l % 4) and 2 (l % 4) + 1.
  template <class Offset>
  void load_matrices_transposed(int thread, uint32_t (&r)[4], Offset&& offset) {
    const int lane = thread % kWarp;
    for (int i = 0; i < 4; ++i) {
      r[i] = 0;
      for (int half = 0; half < 2; ++half) {
        const int row = offset(8 * i + 2 * (lane % 4) + half);
        check_row(row);
        r[i] |= static_cast<uint32_t>(load<uint16_t>(thread, row + lane / 4 * 2)) << (16 * half);
      }
    }
  }

  template <MathMode kMode, class Tile>
  void multiply() {
    for (size_t first = 0; first < states_.size(); first += kWarp) {
      for (int i = 0; i < Tile::kMmasM; ++i) {
        for (int j = 0; j < Tile::kMmasN; ++j) mma<kMode>(static_cast<int>(first), i, j);
      }
    }
  }

 private:
  struct Copy {
    int to, count;
    unsigned char data[kChunkBytes];
  };

  static void check_row(int at) {
    if (at % kChunkBytes != 0) throw std::logic_error("simulated block: a matrix row is not aligned to 16 bytes");
  }

  template <MathMode kMode>
  static float element(uint32_t bits, int half) {
    const auto word = static_cast<uint16_t>(bits >> (16 * half));
    if constexpr (kMode == MathMode::kBFloat16) return to_float(BFloat16Word{word});
    return to_float(HalfWord{word});
  }

  template <MathMode kMode>
  void mma(int first, int i, int j) {
    constexpr bool kWords = kMode == MathMode::kTf32;
    constexpr int kDepth = kWords ? 8 : 16;
    float a[16][kDepth], b[kDepth][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const State& s = states_[first + lane];
      const int group = lane / 4, place = lane % 4;
      for (int e = 0; e < (kWords ? 4 : 8); ++e) {
        if constexpr (kWords) {
          const int row = e % 2 == 0 ? group : group + 8, column = e < 2 ? place : place + 4;
          a[row][column] = float_of(to_tf32(s.a[i][e]));
        } else {
          const int row = e < 2 || (e >= 4 && e < 6) ? group : group + 8;
          const int column = place * 2 + e % 2 + (e < 4 ? 0 : 8);
          a[row][column] = element<kMode>(s.a[i][e / 2], e % 2);
        }
      }
      for (int e = 0; e < (kWords ? 2 : 4); ++e) {
        if constexpr (kWords) {
          const int row = e == 0 ? place : place + 4;
          b[row][group] = float_of(to_tf32(s.b[j][e]));
        } else {
          const int row = place * 2 + e % 2 + (e < 2 ? 0 : 8);
          b[row][group] = element<kMode>(s.b[j][e / 2], e % 2);
        }
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int e = 0; e < 4; ++e) {
        const int row = e < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + e % 2;
        float sum = 0.0f;
        for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
        states_[first + lane].sums[i][j][e] += sum;
      }
    }
  }

  SimulatedMemory memory_;
  std::vector<State> states_;
  std::vector<std::vector<Copy>> open_;
  std::vector<std::deque<std::vector<Copy>>> groups_;
  int block_x_, block_y_;
};

}  // namespace bap_kernels
