// The attributes of a node tokexport::TokenReduce, version 1; kernels/token_reduce.py is the contract.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace tokexport {

constexpr const char* kName = "TokenReduce";
constexpr const char* kDomain = "tokexport";
constexpr const char* kVersion = "1";
constexpr float kSmallestSize = 7.888609052210118e-31f;  // 2^-100

enum class Fold : int32_t { kSizeMean = 0, kMean = 1, kSqueeze = 2, kSum = 3, kDrop = 4 };

struct Reduction {
    std::string select, fold;
    int64_t n_in = 0, n_kept = 0, n_folded = 0, n_prefix = 0, by_score = 0, sizes = 0, decisions = 0;
    float eps = 0;

    bool pairs() const { return select == "pairs"; }
    Fold kind() const {
        return fold == "size_mean" ? Fold::kSizeMean : fold == "mean" ? Fold::kMean
             : fold == "squeeze" ? Fold::kSqueeze : fold == "sum" ? Fold::kSum : Fold::kDrop;
    }
    bool has_hosts() const { return kind() == Fold::kMean || kind() == Fold::kSqueeze; }
    bool has_size() const { return sizes > 0 || kind() == Fold::kSizeMean; }
    int64_t n_out() const { return n_kept + (kind() == Fold::kSum); }
    int64_t n_inputs() const { return 2 + has_size(); }
    int64_t n_outputs() const {
        const int64_t rows = kind() == Fold::kDrop ? 1 : kind() == Fold::kSum ? 2 : 3;
        return 1 + sizes + (decisions ? rows : 0);
    }
    // Positions of A and B under select "pairs": the first of each, and how many.
    int64_t a_first() const { return n_prefix + n_prefix % 2; }
    int64_t b_first() const { return n_prefix + 1 - n_prefix % 2; }
    int64_t n_a() const { return n_in > a_first() ? (n_in - a_first() + 1) / 2 : 0; }
    int64_t n_b() const { return n_in > b_first() ? (n_in - b_first() + 1) / 2 : 0; }
    int64_t first_host() const { return pairs() ? n_kept - n_b() : 0; }  // output row of the host that dst calls 0

    // The attributes that are numbers, by name.
    std::vector<std::pair<const char*, int64_t*>> counts() {
        return {{"n_in", &n_in}, {"n_kept", &n_kept}, {"n_folded", &n_folded}, {"n_prefix", &n_prefix},
                {"by_score", &by_score}, {"sizes", &sizes}, {"decisions", &decisions}};
    }

    // What is wrong with the attributes, in words; empty for nothing. Every count that code indexes by is bounded here.
    std::string problem() const {
        const bool known = fold == "size_mean" || fold == "mean" || fold == "squeeze" || fold == "sum" || fold == "drop";
        if ((select != "pairs" && select != "score") || !known) return "select " + select + " or fold " + fold + " is unknown";
        if (n_in > (int64_t{1} << 24) || n_prefix < 0 || n_prefix > n_kept || n_kept >= n_in)
            return "wanted 0 <= n_prefix <= n_kept < n_in <= 2^24";
        if (sizes < 0 || sizes > 2 || (sizes && (kind() == Fold::kSqueeze || kind() == Fold::kSum)) || !(eps >= 0) ||
            by_score < 0 || by_score > 1 || decisions < 0 || decisions > 1)
            return "sizes, eps, by_score or decisions is out of range";
        if (pairs()) {
            if ((kind() != Fold::kSizeMean && kind() != Fold::kDrop) || n_in - n_kept > (n_b() ? n_a() : 0) ||
                n_folded != (kind() == Fold::kDrop ? 0 : n_in - n_kept))
                return "select pairs cannot fold these counts";
        } else if (by_score || kind() == Fold::kSizeMean ||
                   (kind() == Fold::kDrop ? n_folded != 0 : n_folded < 1 || n_folded > n_in - n_kept) ||
                   (has_hosts() && n_kept == n_prefix)) {
            return "select score cannot fold these counts";
        }
        return "";
    }
};

}  // namespace tokexport
