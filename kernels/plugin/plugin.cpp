// The TensorRT plugin TokenReduce: shapes and types from the node's attributes, and the kernels in a row. See kernels/token_reduce.py.
#include <NvInfer.h>

#include <algorithm>
#include <cstdio>

#include "driver.hpp"
#include "reduction.hpp"

using namespace nvinfer1;

namespace tokexport {
namespace {

ILoggerFinder* g_finder = nullptr;

void complain(const std::string& text) {
    const std::string words = "tokexport TokenReduce: " + text;
    if (ILogger* logger = g_finder ? g_finder->findLogger() : nullptr)
        logger->log(ILogger::Severity::kERROR, words.c_str());
    else
        std::fprintf(stderr, "%s\n", words.c_str());
}

// The words of an exception go to TensorRT's logger; TensorRT itself wants a number.
template <typename F>
int32_t guarded(F&& body) noexcept {
    try {
        body();
        return 0;
    } catch (const std::exception& e) {
        complain(e.what());
        return 1;
    }
}

const char* type_name(DataType type) {
    return type == DataType::kHALF ? "fp16" : type == DataType::kBF16 ? "bf16" : "fp32";
}

template <size_t N>
int least(const int (&steps)[N], int64_t n) {
    for (int step : steps)
        if (n <= step) return step;
    throw std::runtime_error(std::to_string(n) + " is more than the kernels take, " + std::to_string(steps[N - 1]));
}

struct Shape {
    int64_t batch, channels, heads, head;
    int64_t width(const Reduction& op) const { return op.pairs() ? head : op.has_hosts() ? channels : 0; }
};

Shape shape_of(const Reduction& op, const Dims& x, const Dims& signal) {
    const Shape s{x.nbDims == 3 ? x.d[0] : 1, x.d[x.nbDims - 1], op.pairs() ? signal.d[1] : 1, op.pairs() ? signal.d[3] : 1};
    if (x.d[x.nbDims - 2] != op.n_in)
        throw std::runtime_error(std::to_string(x.d[x.nbDims - 2]) + " tokens came, wanted " + std::to_string(op.n_in));
    if (s.channels % kMultiple || s.width(op) % kMultiple)
        throw std::runtime_error("channels and head sizes are multiples of " + std::to_string(kMultiple));
    return s;
}

// Scratch memory: what lies between the kernels. Every part begins at a multiple of 256 bytes.
struct Workspace {
    int64_t unit = 0, value = 0, host = 0, keep = 0, src = 0, dst = 0, bytes = 0;

    Workspace(const Reduction& op, const Shape& s) {
        const int64_t values = op.pairs() ? op.n_a() : op.n_folded;
        unit = take(4 * s.batch * op.n_in * s.width(op));
        value = take(4 * s.batch * values);
        host = take(op.pairs() ? 8 * s.batch * values : 0);
        keep = take(op.decisions ? 0 : 8 * s.batch * op.n_kept);
        src = take(op.decisions ? 0 : 8 * s.batch * op.n_folded);
        dst = take(op.decisions && op.kind() != Fold::kSum ? 0 : 8 * s.batch * op.n_folded);
    }
    int64_t take(int64_t n) {
        const int64_t at = bytes;
        bytes += (n + 255) / 256 * 256;
        return at;
    }
};

class TokenReduce final : public IPluginV3, public IPluginV3OneCore, public v_1_0::IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit TokenReduce(const Reduction& op) : op_(op) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        if (type == PluginCapabilityType::kBUILD) return static_cast<v_1_0::IPluginV3OneBuild*>(this);
        if (type == PluginCapabilityType::kRUNTIME) return static_cast<IPluginV3OneRuntime*>(this);
        return static_cast<IPluginV3OneCore*>(this);
    }
    IPluginV3* clone() noexcept override { return new TokenReduce(op_); }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    const char* getPluginName() const noexcept override { return kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kDomain; }
    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(op_.n_outputs()); }

    int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t n, const DynamicPluginTensorDesc*, int32_t) noexcept override {
        return guarded([&] {
            if (n != op_.n_inputs()) throw std::runtime_error("wanted " + std::to_string(op_.n_inputs()) + " inputs");
            const Shape s = shape_of(op_, in[0].max, in[1].max);
            if (s.width(op_)) least(kWidths, s.width(op_));
            least(kRanked, ranked());
        });
    }

    int32_t getOutputDataTypes(DataType* out, int32_t n, const DataType* in, int32_t) const noexcept override {
        for (int32_t i = 0; i < n; ++i) out[i] = i == 0 ? in[0] : i <= op_.sizes ? DataType::kFLOAT : DataType::kINT64;
        return 0;
    }

    int32_t getOutputShapes(const DimsExprs* in, int32_t, const DimsExprs*, int32_t, DimsExprs* out, int32_t n,
                            IExprBuilder& exprs) noexcept override {
        const int rank = in[0].nbDims;
        const auto rows = [&](int64_t count, const IDimensionExpr* last) {
            DimsExprs d;
            d.nbDims = rank;
            if (rank == 3) d.d[0] = in[0].d[0];
            d.d[rank - 2] = exprs.constant(count);
            d.d[rank - 1] = last;
            return d;
        };
        const IDimensionExpr* one = exprs.constant(1);
        out[0] = rows(op_.n_out(), in[0].d[rank - 1]);
        if (op_.sizes > 0) out[1] = rows(op_.n_out(), one);
        if (op_.sizes > 1) {
            out[2].nbDims = 4;
            out[2].d[0] = rank == 3 ? in[0].d[0] : one;
            out[2].d[1] = out[2].d[2] = one;
            out[2].d[3] = exprs.constant(op_.n_out());
        }
        for (int64_t i = 1 + op_.sizes; i < n; ++i) out[i] = rows(i == 1 + op_.sizes ? op_.n_kept : op_.n_folded, one);
        return 0;
    }

    bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* all, int32_t n_in, int32_t) noexcept override {
        const DataType type = all[pos].desc.type, tokens = all[0].desc.type;
        if (all[pos].desc.format != TensorFormat::kLINEAR) return false;
        if (pos == 0) return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
        if (pos == 1) return type == (op_.pairs() ? tokens : DataType::kFLOAT);
        if (pos < n_in) return type == DataType::kFLOAT;
        return type == (pos == n_in ? tokens : pos - n_in <= op_.sizes ? DataType::kFLOAT : DataType::kINT64);
    }

    size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t, const DynamicPluginTensorDesc*, int32_t) const noexcept override {
        size_t bytes = 0;
        guarded([&] { bytes = Workspace(op_, shape_of(op_, in[0].max, in[1].max)).bytes; });
        return bytes;
    }

    int32_t onShapeChange(const PluginTensorDesc* in, int32_t, const PluginTensorDesc*, int32_t) noexcept override {
        return guarded([&] { prepare(shape_of(op_, in[0].dims, in[1].dims), in[0].type); });
    }

    int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                    void* workspace, cudaStream_t stream) noexcept override {
        return guarded([&] {
            const Shape s = shape_of(op_, in[0].dims, in[1].dims);
            if (!apply_.function) prepare(s, in[0].type);
            run(s, inputs, outputs, static_cast<char*>(workspace), reinterpret_cast<CUstream>(stream));
        });
    }

    const PluginFieldCollection* getFieldsToSerialize() noexcept override {
        fields_.clear();
        const auto text = [&](const char* name, const std::string& v) {
            fields_.push_back({name, v.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(v.size() + 1)});
        };
        text("select", op_.select);
        text("fold", op_.fold);
        for (auto& [name, value] : op_.counts()) fields_.push_back({name, value, PluginFieldType::kINT64, 1});
        fields_.push_back({"eps", &op_.eps, PluginFieldType::kFLOAT32, 1});
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return &collection_;
    }

private:
    int64_t ranked() const { return op_.pairs() ? std::max({op_.n_a(), op_.n_b(), op_.n_prefix}) : op_.n_in; }

    // Load the kernels; again when the width, the type or the context is another.
    void prepare(const Shape& s, DataType type) {
        Driver& driver = Driver::get();
        const std::string typed = std::string("_") + type_name(type);
        if (s.width(op_)) {
            unit_block_ = least(kWidths, s.width(op_));
            unit_ = driver.load("unit_" + std::to_string(unit_block_) + typed);
            match_ = driver.load(op_.pairs() ? "match_pairs" : "match_index");
        }
        rank_ = driver.load(std::string("rank_") + (op_.pairs() ? "pairs_" : "score_") + std::to_string(least(kRanked, ranked())));
        apply_ = driver.load("apply_rows" + typed);
    }

    // As kernels/triton/launch.py; what a kernel does not read is null.
    void run(const Shape& s, const void* const* in, void* const* out, char* scratch, CUstream stream) {
        Driver& driver = Driver::get();
        const Workspace w(op_, s);
        const auto i32 = [](int64_t v) { return static_cast<int32_t>(v); };
        void* none = nullptr;
        void* const* decided = out + 1 + op_.sizes;
        void* keep = op_.decisions ? decided[0] : scratch + w.keep;
        void* src = op_.decisions && op_.n_folded ? decided[1] : scratch + w.src;
        void* dst = op_.decisions && op_.n_folded && op_.kind() != Fold::kSum ? decided[2] : scratch + w.dst;
        const void* signal = in[1];
        const void* value = op_.kind() == Fold::kSum ? signal : scratch + w.value;
        void *unit = scratch + w.unit, *host = scratch + w.host, *best = scratch + w.value;
        const int32_t n = i32(op_.n_in), kept = i32(op_.n_kept), folded = i32(op_.n_folded), prefix = i32(op_.n_prefix);
        const int32_t n_a = i32(op_.n_a()), n_b = i32(op_.n_b()), a = i32(op_.a_first()), b = i32(op_.b_first());
        const int32_t by_score = i32(op_.by_score), width = i32(s.width(op_)), zero = 0;
        const auto make_unit = [&](const void* rows, int32_t heads, float eps) {
            const int64_t rows_a_block = std::max(1, kUnitValues / unit_block_);
            driver.launch(unit_, stream, (n + rows_a_block - 1) / rows_a_block, s.batch, 1, rows, unit, heads, n, width, eps);
        };
        const auto tiles = [](int64_t count) { return (count + kMatchA - 1) / kMatchA; };
        if (op_.pairs()) {
            make_unit(signal, i32(s.heads), 0.0f);
            driver.launch(match_, stream, tiles(n_a), s.batch, 1, unit, none, none, best, host, n, width, n_a, n_b, kept, a, b, zero);
            driver.launch(rank_, stream, s.batch, 1, 1, best, host, keep, src, dst, n_a, kept, folded, prefix, a, b, n_b, by_score);
        } else {
            driver.launch(rank_, stream, s.batch, 1, 1, signal, none, keep, src, dst, n, kept, folded, prefix, a, b, zero, by_score);
            if (op_.has_hosts()) {
                make_unit(in[0], 1, op_.eps);
                driver.launch(match_, stream, tiles(folded), s.batch, 1, unit, src, keep, best, dst, n, width, folded, kept - prefix,
                              kept, zero, prefix, prefix);
            }
        }
        const void* size = op_.has_size() ? in[2] : none;
        void* new_size = op_.sizes > 0 ? out[1] : none;
        void* log_size = op_.sizes > 1 ? out[2] : none;
        const int64_t chunks = (s.channels + kApplyColumns - 1) / kApplyColumns;
        driver.launch(apply_, stream, op_.n_out(), s.batch, chunks, in[0], keep, src, dst, value, size, out[0], new_size, log_size, n,
                      i32(s.channels), kept, folded, i32(op_.first_host()), static_cast<int32_t>(op_.kind()), i32(op_.sizes));
    }

    Reduction op_;
    Loaded unit_{}, match_{}, rank_{}, apply_{};
    int unit_block_ = 64;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};
};

class Creator final : public IPluginCreatorV3One {
public:
    Creator() {
        for (const char* name : {"select", "fold"}) fields_.push_back({name, nullptr, PluginFieldType::kCHAR, 1});
        for (auto& [name, value] : Reduction().counts()) fields_.push_back({name, nullptr, PluginFieldType::kINT64, 1});
        fields_.push_back({"eps", nullptr, PluginFieldType::kFLOAT32, 1});
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }
    const char* getPluginName() const noexcept override { return kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kDomain; }
    const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

    IPluginV3* createPlugin(const char*, const PluginFieldCollection* given, TensorRTPhase) noexcept override {
        try {
            Reduction op;
            for (int32_t i = 0; i < given->nbFields; ++i) read(op, given->fields[i]);
            const std::string problem = op.problem();
            if (!problem.empty()) throw std::runtime_error(problem);
            return new TokenReduce(op);
        } catch (const std::exception& e) {
            complain(e.what());
            return nullptr;
        }
    }

private:
    static void read(Reduction& op, const PluginField& f) {
        const std::string name = f.name;
        if (f.type == PluginFieldType::kCHAR) {
            std::string text(static_cast<const char*>(f.data), f.length);
            text = text.c_str();  // with or without a zero at the end
            if (name == "select") op.select = text;
            if (name == "fold") op.fold = text;
        } else if (f.type == PluginFieldType::kFLOAT32 && name == "eps") {
            op.eps = *static_cast<const float*>(f.data);
        } else if (f.type == PluginFieldType::kINT64 || f.type == PluginFieldType::kINT32) {
            const int64_t v = f.type == PluginFieldType::kINT64 ? *static_cast<const int64_t*>(f.data) : *static_cast<const int32_t*>(f.data);
            for (auto& [known, at] : op.counts())
                if (name == known) *at = v;
        }
    }
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};
};

}  // namespace
}  // namespace tokexport

extern "C" __attribute__((visibility("default"))) IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static tokexport::Creator creator;
    static IPluginCreatorInterface* const all[] = {&creator};
    count = 1;
    return all;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder* finder) { tokexport::g_finder = finder; }
