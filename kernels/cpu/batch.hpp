// A batch of images through the core, one after the other or side by side.
#pragma once
#include <stdexcept>

#include "core.hpp"

namespace tokexport {

struct Tensors {
    const void* const* in;  // x, signal, [size]
    void* const* out;       // as the node lists them; a null is not computed
    std::vector<int64_t> x, signal;  // shapes
};

// each(n, image): calls image(i) for 0 <= i < n, in any order and any thread.
template <typename T, typename Each>
void run_batch(const Reduction& op, const Tensors& t, const Each& each) {
    const size_t rank = t.x.size();
    const int64_t batch = rank == 3 ? t.x[0] : 1, n = op.n_in, c = t.x[rank - 1];
    const bool keyed = op.pairs() && t.signal.size() == 4;
    const Shape shape{c, keyed ? t.signal[1] : 1, keyed ? t.signal[3] : 1};
    int64_t signals = 1;
    for (int64_t d : t.signal) signals *= d;
    if (t.x[rank - 2] != n || (op.pairs() && !keyed) || signals != batch * n * shape.heads * shape.head)
        throw std::runtime_error("TokenReduce: shapes of x and signal do not fit " + std::to_string(n) + " tokens");
    const auto output = [&](int64_t i, bool there, auto* null) { return there ? static_cast<decltype(null)>(t.out[i]) : nullptr; };
    const int64_t first = 1 + op.sizes;
    const auto size = op.has_size() ? static_cast<const float*>(t.in[2]) : nullptr;
    auto* const out = static_cast<T*>(t.out[0]);
    auto* const new_size = output(1, op.sizes > 0, static_cast<float*>(nullptr));
    auto* const log_size = output(2, op.sizes > 1, static_cast<float*>(nullptr));
    auto* const keep = output(first, op.decisions, static_cast<int64_t*>(nullptr));
    auto* const src = output(first + 1, op.decisions && op.kind() != Fold::kDrop, static_cast<int64_t*>(nullptr));
    auto* const dst = output(first + 2, op.decisions && op.kind() < Fold::kSum, static_cast<int64_t*>(nullptr));
    const auto at = [](auto* p, int64_t offset) { return p ? p + offset : p; };
    each(batch, [&](int64_t b) {
        thread_local Core core;
        const int64_t sizes = b * op.n_out(), folded = b * op.n_folded;
        const Image<T> image{static_cast<const T*>(t.in[0]) + b * n * c,
                             op.pairs() ? static_cast<const T*>(t.in[1]) + b * shape.heads * n * shape.head : nullptr,
                             op.pairs() ? nullptr : static_cast<const float*>(t.in[1]) + b * n,
                             at(size, b * n), out + sizes * c, at(new_size, sizes), at(log_size, sizes),
                             at(keep, b * op.n_kept), at(src, folded), at(dst, folded)};
        core.run(op, shape, image);
    });
}

}  // namespace tokexport
