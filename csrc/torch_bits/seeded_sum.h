// SPDX-License-Identifier: MIT
// Sums of torch's normal numbers from many seeds: the nodes of a Brownian tree. Each node of torchsde's tree has a
// seed, which numpy.random.SeedSequence derives from the tree's seed and the node's place, and draws by torch.randn.
#pragma once

#include "torch_normal.h"

namespace fastdiff::bindings {

// Numbers per tile: whole groups of 16 and whole states of a generator.
constexpr int64_t kSeededTile = 4 * kStateWords;

// numpy.random.SeedSequence(entropy, spawn_key=key, pool_size=pool).generate_state(1)[0], by the published algorithm
// (M. E. O'Neill's seed_seq_fe, as numpy documents it), with a multiplier per use of the hash.
class SeedSequence {
  public:
    // `words`: those of the entropy; with a key, zeros up to the pool's size and the key's words follow.
    static uint32_t first_word(const std::vector<uint32_t>& words, size_t pool_size) {
        std::vector<uint32_t> pool(pool_size);
        uint32_t multiplier = 0x43b0d7e5U;
        for (size_t i = 0; i < pool_size; ++i) pool[i] = hashed(i < words.size() ? words[i] : 0, &multiplier);
        for (size_t from = 0; from < pool_size; ++from)
            for (size_t to = 0; to < pool_size; ++to)
                if (from != to) pool[to] = mixed(pool[to], hashed(pool[from], &multiplier));
        for (size_t from = pool_size; from < words.size(); ++from)
            for (uint32_t& word : pool) word = mixed(word, hashed(words[from], &multiplier));
        constexpr uint32_t kFirst = 0x8b51f9ddU, kFactor = 0x58f38dedU;
        const uint32_t word = (pool[0] ^ kFirst) * (kFirst * kFactor);
        return word ^ (word >> 16);
    }

  private:
    static uint32_t hashed(uint32_t value, uint32_t* multiplier) {
        value ^= *multiplier;
        *multiplier *= 0x931e8875U;
        value *= *multiplier;
        return value ^ (value >> 16);
    }
    static uint32_t mixed(uint32_t x, uint32_t y) {
        const uint32_t result = 0xca01f9ddU * x - 0x4973f715U * y;
        return result ^ (result >> 16);
    }
};

// Append the 32-bit words of a number, the low one first; at least one.
inline void append_words(uint64_t number, std::vector<uint32_t>* words) {
    do words->push_back(static_cast<uint32_t>(number));
    while ((number >>= 32) != 0);
}

inline std::vector<uint32_t> spawned_seeds(uint64_t entropy, const std::vector<std::pair<uint64_t, uint64_t>>& keys,
                                           size_t pool_size) {
    TORCH_CHECK_VALUE(pool_size >= 4, "spawned_seeds: pool_size is ", pool_size,
                      ", expected 4 or more as numpy has it");
    std::vector<uint32_t> seeds, words;
    for (const auto& [first, second] : keys) {
        words.clear();
        append_words(entropy, &words);
        if (words.size() < pool_size) words.resize(pool_size);
        append_words(first, &words);
        append_words(second, &words);
        seeds.push_back(SeedSequence::first_word(words, pool_size));
    }
    return seeds;
}

// A fresh mt19937, and the weight of its numbers.
struct Seeded {
    StateWords state;
    uint32_t next = kStateWords;
    float weight;
};

// Seed generators like at::mt19937. Each word depends on the previous one: several seeds at once hide the latency.
inline std::vector<Seeded> seeded(const std::vector<uint32_t>& seeds, const std::vector<double>& weights) {
    constexpr size_t kTogether = 8;
    std::vector<Seeded> made(seeds.size());
    for (size_t first = 0; first < seeds.size(); first += kTogether) {
        const size_t count = std::min(kTogether, seeds.size() - first);
        std::array<uint32_t, kTogether> words{};
        for (size_t k = 0; k < count; ++k) words[k] = seeds[first + k];
        for (uint32_t i = 0; i < kStateWords; ++i) {
            for (size_t k = 0; k < count; ++k) made[first + k].state[i] = words[k];
            for (uint32_t& word : words) word = 1812433253U * (word ^ (word >> 30)) + i + 1;
        }
    }
    for (size_t n = 0; n < made.size(); ++n) made[n].weight = static_cast<float>(weights[n]);
    return made;
}

// Elements [at, at + count) of what torch.randn draws from these; they are the last ones of the tensor where it ends
// with them, and then torch draws the last 16 anew unless all groups are whole. `numbers` has room for 32 more.
inline void draw_next(Seeded* from, float* numbers, int64_t count) {
    const int64_t rest = count % kGroup, whole = count - rest;
    take_words(&from->state, &from->next, numbers, whole);
    cpu_build.words_to_normals(numbers, whole / kGroup);
    if (rest == 0) return;
    take_words(&from->state, &from->next, numbers + whole, rest);
    take_words(&from->state, &from->next, numbers + count - kGroup, kGroup);
    cpu_build.words_to_normals(numbers + count - kGroup, 1);
}

// out = Σ base_weights·bases + Σ weights·torch.randn from each seed, in this order. Return false, with nothing done,
// unless the tensors are float32 on the CPU, contiguous, of one size and at least 16 elements.
inline bool seeded_sum(const at::Tensor& out, const std::vector<at::Tensor>& bases,
                       const std::vector<double>& base_weights, const std::vector<uint32_t>& seeds,
                       const std::vector<double>& weights) {
    TORCH_CHECK_VALUE(bases.size() == base_weights.size() && seeds.size() == weights.size(), "seeded_sum: got ",
                      base_weights.size(), " and ", weights.size(), " weights, expected ", bases.size(), " and ",
                      seeds.size(), ", one for each base and seed");
    const int64_t total = out.numel();
    const auto plain = [total](const at::Tensor& tensor) {
        return tensor.is_cpu() && tensor.scalar_type() == at::kFloat && is_plain_eager(tensor) &&
               tensor.is_contiguous() && tensor.numel() == total && storage_covers(tensor, total);
    };
    if (cpu_build.twist == nullptr || !called_plainly() || total < kGroup || !plain(out)) return false;
    for (const at::Tensor& base : bases)
        if (!plain(base) || base.is_alias_of(out)) return false;
    auto* sum = static_cast<float*>(out.data_ptr());
    std::optional<py::gil_scoped_release> release;
    if (total > kDrawGrain) release.emplace();
    std::vector<Seeded> generators = seeded(seeds, weights);
    alignas(64) std::array<float, kSeededTile + 2 * kGroup> numbers;
    for (int64_t at = 0; at < total;) {
        // The last tile includes a remainder too small for a tile of its own.
        const int64_t left = total - at, count = left < kSeededTile + 2 * kGroup ? left : kSeededTile;
        std::memset(sum + at, 0, count * sizeof(float));
        for (size_t j = 0; j < bases.size(); ++j)
            cpu_build.add_scaled(sum + at, static_cast<const float*>(bases[j].const_data_ptr()) + at,
                                 static_cast<float>(base_weights[j]), count);
        for (Seeded& generator : generators) {
            draw_next(&generator, numbers.data(), count);
            cpu_build.add_scaled(sum + at, numbers.data(), generator.weight, count);
        }
        at += count;
    }
    release.reset();
    bump_version(out);
    return true;
}

inline void define_seeded_sum(py::module_& m) {
    m.def("spawned_seeds", torch::wrap_pybind_function(spawned_seeds), py::arg("entropy"), py::arg("keys"),
          py::arg("pool_size"),
          "The first word of numpy's SeedSequence(entropy, spawn_key=key, pool_size=pool_size) for each key, a pair.");
    m.def("seeded_sum", torch::wrap_pybind_function(seeded_sum), py::arg("out"), py::arg("bases"),
          py::arg("base_weights"), py::arg("seeds"), py::arg("weights"),
          "Fills out with the weighted sum of bases and of torch.randn from each seed; False where it is not plain.");
}

}  // namespace fastdiff::bindings
