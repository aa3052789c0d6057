// TokenReduce as a custom operator of ONNX Runtime: SessionOptions.register_custom_ops_library("libtokexport_ort.so").
// Nothing is linked: ONNX Runtime hands its functions over when it loads the library.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <array>

#include "batch.hpp"

namespace tokexport {

class Kernel {
public:
    Kernel(const OrtApi&, const OrtKernelInfo* raw) {
        Ort::ConstKernelInfo info(raw);
        op_.select = info.GetAttribute<std::string>("select");
        op_.fold = info.GetAttribute<std::string>("fold");
        for (auto& [name, value] : op_.counts()) *value = info.GetAttribute<int64_t>(name);
        op_.eps = info.GetAttribute<float>("eps");
        const std::string problem = op_.problem();
        if (!problem.empty()) ORT_CXX_API_THROW("TokenReduce: " + problem, ORT_INVALID_ARGUMENT);
        if (info.GetInputCount() != static_cast<size_t>(op_.n_inputs()) || info.GetOutputCount() != static_cast<size_t>(op_.n_outputs()))
            ORT_CXX_API_THROW("TokenReduce: wanted " + std::to_string(op_.n_inputs()) + " inputs and " +
                              std::to_string(op_.n_outputs()) + " outputs", ORT_INVALID_GRAPH);
    }

    void Compute(OrtKernelContext* raw) {
        Ort::KernelContext context(raw);
        std::array<const void*, 3> in{};
        for (int64_t i = 0; i < op_.n_inputs(); ++i) in[i] = context.GetInput(i).GetTensorRawData();
        const auto x = context.GetInput(0).GetTensorTypeAndShapeInfo();
        const auto signal = context.GetInput(1).GetTensorTypeAndShapeInfo();
        const auto type = x.GetElementType();
        if (signal.GetElementType() != (op_.pairs() ? type : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT))
            ORT_CXX_API_THROW("TokenReduce: signal is of another type than it should be", ORT_INVALID_ARGUMENT);
        Tensors t{in.data(), nullptr, x.GetShape(), signal.GetShape()};
        if (t.x.size() != 2 && t.x.size() != 3) ORT_CXX_API_THROW("TokenReduce: x is [B, N, C] or [N, C]", ORT_INVALID_ARGUMENT);
        std::array<void*, 6> out{};
        for (int64_t i = 0; i < op_.n_outputs(); ++i) out[i] = output(context, i, t.x);
        t.out = out.data();
        const auto each = [&](int64_t n, const auto& image) {
            using F = std::remove_reference_t<decltype(image)>;
            if (n == 1) return image(0);
            context.ParallelFor([](void* f, size_t i) { (*static_cast<F*>(f))(static_cast<int64_t>(i)); }, n, 0, const_cast<std::remove_const_t<F>*>(&image));
        };
        if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) run_batch<float>(op_, t, each);
        else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16) run_batch<Bf16>(op_, t, each);
#ifdef __FLT16_MANT_DIG__
        else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) run_batch<Half>(op_, t, each);
#endif
        else ORT_CXX_API_THROW("TokenReduce: x is float32, float16 or bfloat16", ORT_INVALID_ARGUMENT);
    }

private:
    void* output(Ort::KernelContext& context, int64_t i, const std::vector<int64_t>& x) const {
        const bool batched = x.size() == 3;
        std::vector<int64_t> shape{op_.n_out(), i == 0 ? x.back() : 1};
        if (i > op_.sizes) shape[0] = i == op_.sizes + 1 ? op_.n_kept : op_.n_folded;
        if (batched) shape.insert(shape.begin(), x[0]);
        if (i == 2 && op_.sizes == 2) shape = {batched ? x[0] : 1, 1, 1, op_.n_out()};
        return context.GetOutput(i, shape).GetTensorMutableRawData();
    }

    Reduction op_;
};

struct Operator : Ort::CustomOpBase<Operator, Kernel> {
    void* CreateKernel(const OrtApi& api, const OrtKernelInfo* info) const { return new Kernel(api, info); }
    const char* GetName() const { return kName; }
    const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
    // Types and counts of inputs and outputs hang on the attributes: any here, and checked by the kernel.
    size_t GetInputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t) const { return INPUT_OUTPUT_VARIADIC; }
    int GetVariadicInputMinArity() const { return 2; }
    bool GetVariadicInputHomogeneity() const { return false; }
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }
    OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t) const { return INPUT_OUTPUT_VARIADIC; }
    int GetVariadicOutputMinArity() const { return 1; }
    bool GetVariadicOutputHomogeneity() const { return false; }
};

}  // namespace tokexport

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(ORT_API_VERSION);
    if (!api) return base->GetApi(1)->CreateStatus(ORT_FAIL, "this ONNX Runtime is older than the headers of the library");
    Ort::InitApi(api);
    try {
        static const tokexport::Operator op;
        static Ort::CustomOpDomain domain(tokexport::kDomain);
        static const bool added = (domain.Add(&op), true);
        (void)added;
        Ort::UnownedSessionOptions(options).Add(domain);
        return nullptr;
    } catch (const std::exception& e) {
        return api->CreateStatus(ORT_FAIL, e.what());
    }
}
