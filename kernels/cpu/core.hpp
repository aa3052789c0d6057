// The node TokenReduce on a CPU, one image at a time: no library, no threads, no intrinsics. kernels/token_reduce.py is the contract.
//
// Speed comes from five habits: scores are computed in register tiles of kRows x kColumns from hosts packed column by column, the best
// host of a row is found lane by lane behind each tile, only the first R of the order are sorted, rows that receive nothing are copied
// as bytes, and outputs that are null are not computed. Vectors are those of GCC and Clang, so one source serves x86 and Arm.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "reduction.hpp"

namespace tokexport {

struct Bf16 {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float v;
        std::memcpy(&v, &wide, 4);
        return v;
    }
    Bf16() = default;
    explicit Bf16(float v) {  // to the nearest, ties to even; a NaN stays one
        uint32_t wide;
        std::memcpy(&wide, &v, 4);
        bits = v != v ? 0x7fc0 : static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
    }
};
#ifdef __FLT16_MANT_DIG__
using Half = _Float16;
#endif

template <typename T>
struct Image {  // pointers to one image's part of every tensor; outputs that nobody wants are null
    const T* x;
    const T* keys;       // [H, N, D], select "pairs"
    const float* score;  // [N], select "score"
    const float* size;   // [N], or null for ones
    T* out;
    float *new_size, *log_size;
    int64_t *keep, *src, *dst;
};

struct Shape {
    int64_t channels, heads, head;  // C, H, D
};

class Core {
public:
    template <typename T>
    void run(const Reduction& op, const Shape& s, const Image<T>& image) {
        n_folded_ = op.n_folded;
        keep_.resize(op.n_kept);
        src_.resize(op.n_folded);
        dst_.resize(op.n_folded);
        if (op.pairs()) {
            metric(image.keys, s.heads, op.n_in, s.head);
            gather(op.n_a(), s.head, [&](int64_t i) { return op.a_first() + 2 * i; }, a_);
            pack(op.n_b(), s.head, [&](int64_t j) { return op.b_first() + 2 * j; });
            match(op.n_a(), op.n_b(), s.head);
            order_pairs(op);
        } else {
            order_score(op, image.score);
            if (op.has_hosts()) {
                units(image.x, op, s.channels);
                gather(op.n_folded, s.channels, [&](int64_t i) { return src_[i]; }, a_);
                pack(op.n_kept - op.n_prefix, s.channels, [&](int64_t j) { return keep_[op.n_prefix + j]; });
                match(op.n_folded, op.n_kept - op.n_prefix, s.channels);
                for (int64_t i = 0; i < op.n_folded; ++i) dst_[i] = op.n_prefix + host_[i];
            } else if (op.kind() == Fold::kSum) {
                best_.resize(op.n_folded);
                for (int64_t i = 0; i < op.n_folded; ++i) best_[i] = image.score[src_[i]], dst_[i] = op.n_kept;
            }
        }
        apply(op, s.channels, image);
        if (image.keep) std::copy(keep_.begin(), keep_.end(), image.keep);
        if (image.src) std::copy(src_.begin(), src_.end(), image.src);
        if (image.dst) std::copy(dst_.begin(), dst_.end(), image.dst);
    }

private:
#if defined(__AVX512F__)
    static constexpr int kLanes = 16;
#elif defined(__AVX__)
    static constexpr int kLanes = 8;
#else
    static constexpr int kLanes = 4;
#endif
#if defined(__aarch64__)
    static constexpr int kVectors = 4;  // 32 registers
#else
    static constexpr int kVectors = 2;
#endif
    static constexpr int kRows = 6, kColumns = kVectors * kLanes;  // of a register tile: 12 sums of 16 registers
    typedef float Floats __attribute__((vector_size(kLanes * 4)));
    typedef float Unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
    typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

    // unit_ [N, D]: the mean over heads of every row, divided by its norm.
    template <typename T>
    void metric(const T* keys, int64_t heads, int64_t n, int64_t d) {
        unit_.resize(n * d);
        for (int64_t i = 0; i < n; ++i) {
            float* row = &unit_[i * d];
            for (int64_t k = 0; k < d; ++k) row[k] = static_cast<float>(keys[i * d + k]);
            for (int64_t h = 1; h < heads; ++h)
                for (int64_t k = 0; k < d; ++k) row[k] += static_cast<float>(keys[(h * n + i) * d + k]);
            for (int64_t k = 0; k < d; ++k) row[k] /= static_cast<float>(heads);
            normalise(row, d, 0.0f);
        }
    }

    // unit_ [N, C]: the rows that are matched, each divided by its norm + eps.
    template <typename T>
    void units(const T* x, const Reduction& op, int64_t c) {
        unit_.resize(op.n_in * c);
        const auto one = [&](int64_t row) {
            for (int64_t k = 0; k < c; ++k) unit_[row * c + k] = static_cast<float>(x[row * c + k]);
            normalise(&unit_[row * c], c, op.eps);
        };
        for (int64_t i = op.n_prefix; i < op.n_kept; ++i) one(keep_[i]);
        for (int64_t row : src_) one(row);
    }

    static void normalise(float* row, int64_t d, float eps) {
        Floats sums = {};
        int64_t k = 0;
        for (; k + kLanes <= d; k += kLanes) {
            const Floats v = *reinterpret_cast<const Unaligned*>(row + k);
            sums += v * v;
        }
        float sum = 0;
        for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
        for (; k < d; ++k) sum += row[k] * row[k];
        const float norm = std::sqrt(sum) + eps;
        if (norm > 0)
            for (k = 0; k < d; ++k) row[k] /= norm;
    }

    // Rows of unit_, one behind the other; the last tile is filled up.
    template <typename Row>
    void gather(int64_t n, int64_t d, Row row, std::vector<float>& out) {
        out.assign((n + kRows - 1) / kRows * kRows * d, 0.0f);
        for (int64_t i = 0; i < n; ++i) std::copy_n(&unit_[row(i) * d], d, &out[i * d]);
    }

    // b_ [tiles][D][kColumns]: hosts as columns.
    template <typename Row>
    void pack(int64_t n, int64_t d, Row row) {
        b_.assign((n + kColumns - 1) / kColumns * kColumns * d, 0.0f);
        for (int64_t j = 0; j < n; ++j) {
            float* to = &b_[j / kColumns * kColumns * d + j % kColumns];
            const float* from = &unit_[row(j) * d];
            for (int64_t k = 0; k < d; ++k) to[k * kColumns] = from[k];
        }
    }

    // best_ [A] and host_ [A]: the largest product of every row of a_ with a column of b_, the first of equals.
    void match(int64_t n_a, int64_t n_b, int64_t d) {
        const int64_t n_tiles = (n_b + kColumns - 1) / kColumns;
        best_.resize((n_a + kRows - 1) / kRows * kRows);
        host_.resize(best_.size());
        for (int64_t i = 0; i < n_a; i += kRows) {
            Floats top[kRows][kVectors];
            Ints tile_of[kRows][kVectors] = {};
            for (auto& row : top)
                for (auto& v : row) v = Floats{} - std::numeric_limits<float>::infinity();
            for (int64_t t = 0; t < n_tiles; ++t) {
                Floats scores[kRows][kVectors];
                tile(&a_[i * d], &b_[t * kColumns * d], d, scores);
                if (t == n_tiles - 1) bar(scores, n_b - t * kColumns);
                const Ints here = Ints{} + static_cast<int32_t>(t);
                for (int r = 0; r < kRows; ++r)
                    for (int v = 0; v < kVectors; ++v) {
                        const Ints higher = scores[r][v] > top[r][v];
                        top[r][v] = higher ? scores[r][v] : top[r][v];
                        tile_of[r][v] = higher ? here : tile_of[r][v];
                    }
            }
            for (int r = 0; r < kRows; ++r) across(top[r], tile_of[r], n_b, i + r);
        }
    }

    // Products of kRows rows with the kColumns columns of one tile; the sums stay in registers.
    static void tile(const float* a, const float* b, int64_t d, Floats (&scores)[kRows][kVectors]) {
        Floats acc[kRows][kVectors] = {};
        for (int64_t k = 0; k < d; ++k) {
            const Unaligned* column = reinterpret_cast<const Unaligned*>(b + k * kColumns);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) acc[r][v] += a[r * d + k] * Floats(column[v]);
        }
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v) scores[r][v] = acc[r][v];
    }

    // Columns from `width` on are none.
    static void bar(Floats (&scores)[kRows][kVectors], int64_t width) {
        for (auto& row : scores)
            for (int64_t j = width; j < kColumns; ++j) row[j / kLanes][j % kLanes] = -std::numeric_limits<float>::infinity();
    }

    // The best of the lanes; of equals the lowest host.
    void across(const Floats* top, const Ints* tile_of, int64_t n_b, int64_t i) {
        float value = -std::numeric_limits<float>::infinity();
        int64_t host = n_b;
        for (int j = 0; j < kColumns; ++j) {
            const float v = top[j / kLanes][j % kLanes];
            const int64_t at = static_cast<int64_t>(tile_of[j / kLanes][j % kLanes]) * kColumns + j;
            if (at < n_b && (v > value || (v == value && at < host))) value = v, host = at;
        }
        best_[i] = value;
        host_[i] = host;
    }

    // Keys whose descending order is: value descending, index ascending; -0 as +0, what is no number last.
    void pack_keys(const float* value, int64_t n) {
        keys_.resize(n);
        for (int64_t i = 0; i < n; ++i) {
            const float v = value[i] == value[i] ? value[i] + 0.0f : -std::numeric_limits<float>::infinity();
            int32_t bits;
            std::memcpy(&bits, &v, 4);
            const uint32_t ordered = static_cast<uint32_t>(bits) ^ (bits < 0 ? 0xffffffffu : 0x80000000u);
            keys_[i] = (static_cast<uint64_t>(ordered) << 32) | (0xffffffffu - static_cast<uint32_t>(i));
        }
    }

    // The first `sorted` of n indices in order, the rest behind them in none.
    void first(int64_t n, int64_t sorted) {
        const auto down = [](uint64_t a, uint64_t b) { return a > b; };
        if (sorted < n) std::nth_element(keys_.begin(), keys_.begin() + sorted, keys_.end(), down);
        std::sort(keys_.begin(), keys_.begin() + sorted, down);
    }
    int64_t index(int64_t place) const { return 0xffffffffu - static_cast<uint32_t>(keys_[place]); }

    void order_pairs(const Reduction& op) {
        const int64_t n_a = op.n_a(), n_merged = op.n_in - op.n_kept;
        pack_keys(best_.data(), n_a);
        first(n_a, op.by_score ? n_a : n_merged);
        merged_.assign(n_a, 0);
        for (int64_t p = 0; p < n_merged; ++p) merged_[index(p)] = 1;
        int64_t at = 0;
        for (; at < op.n_prefix; ++at) keep_[at] = at;
        if (op.by_score)
            for (int64_t p = n_merged; p < n_a; ++p) keep_[at++] = op.a_first() + 2 * index(p);
        else
            for (int64_t i = 0; i < n_a; ++i)
                if (!merged_[i]) keep_[at++] = op.a_first() + 2 * i;
        for (int64_t j = 0; j < op.n_b(); ++j) keep_[at++] = op.b_first() + 2 * j;
        for (int64_t p = 0; p < op.n_folded; ++p) {
            src_[p] = op.a_first() + 2 * index(p);
            dst_[p] = host_[index(p)];
        }
    }

    void order_score(const Reduction& op, const float* score) {
        pack_keys(score, op.n_in);
        first(op.n_in, op.n_kept + op.n_folded);
        for (int64_t p = 0; p < op.n_kept; ++p) keep_[p] = index(p);
        for (int64_t p = 0; p < op.n_folded; ++p) src_[p] = index(op.n_kept + p);
    }

    // Output rows: copied, or the weighted mean of a row and of what it receives, in the order of src.
    template <typename T>
    void apply(const Reduction& op, int64_t c, const Image<T>& image) {
        const Fold fold = op.kind();
        const int64_t n_out = op.n_out();
        total_.assign(n_out, 0.0f);
        size_.resize(n_out);
        slot_.assign(n_out, -1);
        const auto size_of = [&](int64_t row) { return image.size ? image.size[row] : 1.0f; };
        for (int64_t j = 0; j < op.n_kept; ++j) size_[j] = op.has_size() ? size_of(keep_[j]) : 1.0f;
        sums_.clear();
        for (int64_t i = 0; i < n_folded_; ++i) {
            const int64_t j = op.first_host() + dst_[i], row = src_[i];
            const float size = fold == Fold::kSizeMean || fold == Fold::kMean ? size_of(row) : 1.0f;
            const float w = fold == Fold::kSizeMean ? size : fold == Fold::kMean ? 1.0f
                          : fold == Fold::kSqueeze ? std::exp(best_[i] - 1.0f) : best_[i];
            if (slot_[j] < 0) {
                slot_[j] = static_cast<int64_t>(sums_.size());
                sums_.resize(sums_.size() + c, 0.0f);
                if (j < op.n_kept) {
                    total_[j] = fold == Fold::kSizeMean ? size_[j] : 1.0f;
                    add(&sums_[slot_[j]], image.x + keep_[j] * c, total_[j], c);
                }
            }
            add(&sums_[slot_[j]], image.x + row * c, w, c);
            total_[j] += w;
            size_[j] += fold == Fold::kMean ? size * best_[i] : size;
        }
        for (int64_t j = 0; j < n_out; ++j) {
            T* out = image.out + j * c;
            if (slot_[j] < 0) {
                if (j < op.n_kept) std::memcpy(out, image.x + keep_[j] * c, c * sizeof(T));
                continue;
            }
            const float* sum = &sums_[slot_[j]];
            const float total = j < op.n_kept ? total_[j] : 1.0f;
            for (int64_t k = 0; k < c; ++k) out[k] = static_cast<T>(sum[k] / total);
        }
        for (int64_t j = 0; j < n_out; ++j) size_[j] = std::max(size_[j], kSmallestSize);
        if (image.new_size) std::copy(size_.begin(), size_.end(), image.new_size);
        if (image.log_size)
            for (int64_t j = 0; j < n_out; ++j) image.log_size[j] = std::log(size_[j]);
    }

    template <typename T>
    static void add(float* sum, const T* row, float w, int64_t c) {
        for (int64_t k = 0; k < c; ++k) sum[k] += static_cast<float>(row[k]) * w;
    }

    int64_t n_folded_ = 0;
    std::vector<float> unit_, a_, b_, best_, total_, size_, sums_;
    std::vector<int64_t> host_, keep_, src_, dst_, slot_;
    std::vector<uint64_t> keys_;
    std::vector<char> merged_;
};

}  // namespace tokexport
