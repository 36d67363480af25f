// SPDX-License-Identifier: MIT
// Layout of a table row, for host and device: the only C++ copy of fastdiff/row_layout.py's constants.
// tests/solvers/test_affine_table.py compares the two.
#pragma once

namespace fastdiff {

// Offsets of a row's scalars and of its three affine maps.
enum RowLayout : int {
    kPredictionSample = 0,
    kPredictionOutput = 1,
    kClip = 2,
    kVarianceOffset = 3,
    kVarianceSlope = 4,
    kModelInputScale = 5,
    kStore0 = 6,  // history slot of keep_0 where each sample has its own row; negative for none
    kStore1 = 7,
    kPrevSample = 8,
    kKeep0 = 16,
    kKeep1 = 24,
    kRowWidth = 32,
};

// Columns of one affine map.
enum Column : int { kSample, kModelOutput, kPrediction, kHistory0, kNoise = kHistory0 + 4, kColumns };

constexpr int kRegisters = 4;   // history slots
constexpr int kMaxOutputs = 3;  // prev_sample, keep_0, keep_1
constexpr int kOutputMaps[kMaxOutputs] = {kPrevSample, kKeep0, kKeep1};

static_assert(int{kKeep0} == int{kPrevSample} + int{kColumns} && int{kKeep1} == int{kKeep0} + int{kColumns} &&
                  int{kRowWidth} == int{kKeep1} + int{kColumns},
              "the maps of a row follow one another and end it");

// How the noise coefficient is scaled element by element.
enum class Variance : int { kFixed = 0, kLearnedRange = 1, kLearned = 2 };

}  // namespace fastdiff
