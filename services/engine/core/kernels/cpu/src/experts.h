// Mixtures of experts: which of many feed-forward layers each row of a step goes through, and in
// which order its rows lie so that those of one expert lie together (Shazeer et al.,
// arXiv:1701.06538).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace meshserve {

struct ExpertsShape {
  int32_t count;       // of a layer
  int32_t per_token;   // that a row goes through
  int32_t normalizes;  // whether a row's shares are made to sum up to 1
};

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

// The experts of a row, the largest logit first and the lower number first among equals, and their
// shares: softmax(logits), computed over all experts. ids, shares: [per_token].
void route_row(const float* logits, const ExpertsShape& shape, int32_t* ids, float* shares);

// The rows of a step by expert. A row has a slot for each of its experts; those of an expert are
// consecutive, in the order of the rows.
class ExpertOrder {
 public:
  // For up to `most_rows` rows.
  ExpertOrder(const ExpertsShape& largest, int32_t most_rows);

  // ids: [rows, per_token]
  void sort(const int32_t* ids, int32_t rows, const ExpertsShape& shape);

  // The slot of a row's expert number `place`.
  int32_t slot(int32_t row, int32_t place) const {
    return slots_[static_cast<size_t>(row * per_token_ + place)];
  }
  // The experts that have rows, ascending.
  const std::vector<int32_t>& active() const { return active_; }
  int32_t first_slot(int32_t expert) const { return starts_[static_cast<size_t>(expert)]; }
  int32_t rows(int32_t expert) const { return first_slot(expert + 1) - first_slot(expert); }

 private:
  int32_t per_token_ = 0;
  std::vector<int32_t> slots_, starts_, active_;
};

}  // namespace meshserve::MESHSERVE_ISA
