// SkipRMSNorm and SkipLayerNorm: adds the residual, normalises over the last axis, and rounds to 8 bits for the product
// that follows, in one walk over the row.
//
//   SkipRMSNorm(x, skip?, weight, skip_bias?)          -> (y?, sum?, codes?, steps?)
//   SkipLayerNorm(x, skip?, weight, beta?, skip_bias?) -> (y?, sum?, codes?, steps?)
//
//   x, skip       float (..., C), of rank 1 to 4
//   weight, beta, skip_bias   float (C)
//   sum           x + skip + skip_bias, float (..., C)
//   y             sum / sqrt(mean(sum^2) + epsilon) * weight, or
//                 (sum - mean(sum)) / sqrt(variance(sum) + epsilon) * weight + beta; float (..., C)
//   codes, steps  y rounded block by block (round_activations.h): int8 (..., blocks * block_size) and
//                 float (..., blocks); the last block is filled up with zeros
//   epsilon       1e-5 by default
//   block_size    32, 64, 128 or 256; needed where codes are wanted
//   isa           see isa.h
//
// Sums over a row are made in float, 64 of them side by side: a mean is off by at most (C / 64 + 10) * 2^-24 of the
// mean of the magnitudes.
#pragma once

#include "isa.h"
#include "op.h"

namespace ryzen {

// One row's operands; what is absent is null.
struct NormRow {
  const float *x, *skip, *skip_bias, *weight, *beta;
  float *y, *sum;
  int8_t* codes;
  float* steps;
  int C, block;
  float epsilon;
};

class SkipNorm {
 protected:
  using Kernel = void (*)(const NormRow&);
  struct Operands {
    Tensor x, skip, weight, beta, skip_bias;
  };

  explicit SkipNorm(const Info& info);
  void compute(const Context& context, const Operands& operands, Kernel row) const;

  Isa isa_;
  float epsilon_;
  int block_;
};

class SkipRMSNorm : SkipNorm {
 public:
  static constexpr const char* NAME = "SkipRMSNorm";
  static constexpr Port INPUTS[] = {
      {ORT_FLOAT}, {ORT_FLOAT, ORT_OPTIONAL}, {ORT_FLOAT}, {ORT_FLOAT, ORT_OPTIONAL}};
  static constexpr Port OUTPUTS[] = {
      {ORT_FLOAT, ORT_OPTIONAL}, {ORT_FLOAT, ORT_OPTIONAL}, {ORT_INT8, ORT_OPTIONAL}, {ORT_FLOAT, ORT_OPTIONAL}};

  explicit SkipRMSNorm(const Info& info) : SkipNorm(info) {}
  void compute(Context& context) const;
};

class SkipLayerNorm : SkipNorm {
 public:
  static constexpr const char* NAME = "SkipLayerNorm";
  static constexpr Port INPUTS[] = {{ORT_FLOAT},
                                    {ORT_FLOAT, ORT_OPTIONAL},
                                    {ORT_FLOAT},
                                    {ORT_FLOAT, ORT_OPTIONAL},
                                    {ORT_FLOAT, ORT_OPTIONAL}};
  static constexpr Port OUTPUTS[] = {
      {ORT_FLOAT, ORT_OPTIONAL}, {ORT_FLOAT, ORT_OPTIONAL}, {ORT_INT8, ORT_OPTIONAL}, {ORT_FLOAT, ORT_OPTIONAL}};

  explicit SkipLayerNorm(const Info& info) : SkipNorm(info) {}
  void compute(Context& context) const;
};

}  // namespace ryzen
