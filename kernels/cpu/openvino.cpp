// TokenReduce as an OpenVINO operator and its conversion from ONNX: core.add_extension("libtokexport_openvino.so").
#include <openvino/core/core.hpp>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/op.hpp>
#include <tbb/parallel_for.h>

#include "batch.hpp"

namespace tokexport {

class TokenReduce final : public ov::op::Op {
public:
    OPENVINO_OP("TokenReduce", "tokexport");
    TokenReduce() = default;
    TokenReduce(const ov::OutputVector& inputs, const Reduction& op) : Op(inputs), op_(op) { constructor_validate_and_infer_types(); }

    void validate_and_infer_types() override {
        const std::string problem = op_.problem();
        NODE_VALIDATION_CHECK(this, problem.empty(), problem);
        NODE_VALIDATION_CHECK(this, get_input_size() == static_cast<size_t>(op_.n_inputs()), "wanted ", op_.n_inputs(), " inputs");
        const auto type = get_input_element_type(0);
        const auto x = get_input_partial_shape(0);
        NODE_VALIDATION_CHECK(this, x.rank().is_static() && (x.size() == 2 || x.size() == 3), "x is [B, N, C] or [N, C]");
        NODE_VALIDATION_CHECK(this, type == ov::element::f32 || type == ov::element::bf16 || type == ov::element::f16, "x is f32, bf16 or f16");
        NODE_VALIDATION_CHECK(this, get_input_element_type(1) == (op_.pairs() ? type : ov::element::f32), "signal is of another type");
        const auto rows = [&](int64_t n, const ov::Dimension& last) {
            return x.size() == 3 ? ov::PartialShape{x[0], n, last} : ov::PartialShape{n, last};
        };
        set_output_size(op_.n_outputs());
        size_t i = 0;
        set_output_type(i++, type, rows(op_.n_out(), x[x.size() - 1]));
        if (op_.sizes > 0) set_output_type(i++, ov::element::f32, rows(op_.n_out(), 1));
        const ov::Dimension batch = x.size() == 3 ? x[0] : ov::Dimension(1);
        if (op_.sizes > 1) set_output_type(i++, ov::element::f32, ov::PartialShape{batch, 1, 1, op_.n_out()});
        for (bool first = true; i < static_cast<size_t>(op_.n_outputs()); first = false)
            set_output_type(i++, ov::element::i64, rows(first ? op_.n_kept : op_.n_folded, 1));
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<TokenReduce>(inputs, op_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("select", op_.select);
        visitor.on_attribute("fold", op_.fold);
        for (auto& [name, value] : op_.counts()) visitor.on_attribute(name, *value);
        visitor.on_attribute("eps", op_.eps);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& out, const ov::TensorVector& in) const override {
        const ov::Shape x = in[0].get_shape(), signal = in[1].get_shape();
        for (size_t i = 0; i < out.size(); ++i) {  // with a batch that was free when the model was compiled
            ov::Shape s = get_output_partial_shape(i).get_max_shape();
            for (size_t d = 0; d < s.size(); ++d) {
                const auto dim = get_output_partial_shape(i)[d];
                s[d] = dim.is_static() ? dim.get_length() : d == s.size() - 1 ? x.back() : x[0];
            }
            out[i].set_shape(s);
        }
        std::vector<const void*> inputs;
        std::vector<void*> outputs;
        for (const auto& t : in) inputs.push_back(t.data());
        for (auto& t : out) outputs.push_back(t.data());
        const auto each = [](int64_t n, const auto& image) {
            if (n == 1) image(0);
            else tbb::parallel_for(int64_t{0}, n, image);
        };
        const Tensors t{inputs.data(), outputs.data(), {x.begin(), x.end()}, {signal.begin(), signal.end()}};
        const auto type = in[0].get_element_type();
        if (type == ov::element::f32) run_batch<float>(op_, t, each);
        else if (type == ov::element::bf16) run_batch<Bf16>(op_, t, each);
#ifdef __FLT16_MANT_DIG__
        else if (type == ov::element::f16) run_batch<Half>(op_, t, each);
#endif
        else return false;
        return true;
    }

private:
    Reduction op_;
};

}  // namespace tokexport

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<tokexport::TokenReduce>>(),
    // with its domain: the converter of no domain is not found for a node of one
    std::make_shared<ov::frontend::onnx::OpExtension<tokexport::TokenReduce>>("TokenReduce", "tokexport"),
}));
