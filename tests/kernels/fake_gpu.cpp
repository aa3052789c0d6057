// A CUDA driver without a GPU, and TensorRT's side of a plugin without TensorRT: as libcuda.so.1 it hands every launch to a function, and
// run_node() leads the plugin through build and run as TensorRT does. Memory is the CPU's.
#include <NvInfer.h>
#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <string>
#include <vector>

using namespace nvinfer1;

typedef void (*Launch)(const char* code, const char* symbol, const int* grid, int threads, int shared, void** parameters);
static Launch g_launch = nullptr;
static int g_chip = 80;

struct Function {
    const char *code, *symbol;
};

extern "C" {
CUresult cuCtxGetCurrent(CUcontext* c) { *c = reinterpret_cast<CUcontext>(static_cast<size_t>(g_chip)); return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* d) { *d = 0; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) {
    *v = a == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? g_chip / 10 : g_chip % 10;
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* m, const void* code) {
    *m = reinterpret_cast<CUmodule>(const_cast<void*>(code));
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* symbol) {
    *f = reinterpret_cast<CUfunction>(new Function{reinterpret_cast<const char*>(m), symbol});
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned, unsigned, unsigned shared, CUstream,
                        void** parameters, void**) {
    const auto* function = reinterpret_cast<Function*>(f);
    const int grid[] = {static_cast<int>(x), static_cast<int>(y), static_cast<int>(z)};
    g_launch(function->code, function->symbol, grid, tx, shared, parameters);
    return CUDA_SUCCESS;
}

struct Tensor {
    int type, rank;  // as DataType; 1 to 4
    long shape[4];
    void* data;
};

// 0, or the number of the step that failed. texts: select and fold; counts: as token_reduce.py lists them.
int run_node(const char* plugin, int chip, const char* const* texts, const char* const* names, const long* counts, int n_counts,
             float eps, const Tensor* in, int n_in, Tensor* out, int n_out, long* workspace_bytes, Launch launch) {
    g_launch = launch;
    g_chip = chip;
    void* library = dlopen(plugin, RTLD_NOW);
    if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    const auto creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    int32_t n_creators = 0;
    auto* creator = static_cast<IPluginCreatorV3One*>(creators(n_creators)[0]);
    std::vector<PluginField> fields;
    const char* text_names[] = {"select", "fold"};
    for (int i = 0; i < 2; ++i)
        fields.push_back({text_names[i], texts[i], PluginFieldType::kCHAR, static_cast<int32_t>(std::string(texts[i]).size())});
    std::vector<int64_t> values(counts, counts + n_counts);
    for (int i = 0; i < n_counts; ++i) fields.push_back({names[i], &values[i], PluginFieldType::kINT64, 1});
    fields.push_back({"eps", &eps, PluginFieldType::kFLOAT32, 1});
    PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    IPluginV3* made = creator->createPlugin("node", &collection, TensorRTPhase::kBUILD);
    if (!made) return 2;
    // what is serialized makes the same plugin again
    auto* first = static_cast<IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    IPluginV3* node = creator->createPlugin("node", first->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
    if (!node) return 3;
    auto* build = static_cast<v_1_0::IPluginV3OneBuild*>(node->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* runtime = static_cast<IPluginV3OneRuntime*>(node->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    if (build->getNbOutputs() != n_out) return 4;
    std::vector<DynamicPluginTensorDesc> all;
    std::vector<PluginTensorDesc> plain;
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    for (int i = 0; i < n_in + n_out; ++i) {
        const Tensor& t = i < n_in ? in[i] : out[i - n_in];
        PluginTensorDesc d{};
        d.dims.nbDims = t.rank;
        for (int k = 0; k < t.rank; ++k) d.dims.d[k] = t.shape[k];
        d.type = static_cast<DataType>(t.type);
        d.format = TensorFormat::kLINEAR;
        plain.push_back(d);
        all.push_back({d, d.dims, d.dims, d.dims});
        if (i < n_in) inputs.push_back(t.data); else outputs.push_back(t.data);
    }
    for (int i = 0; i < n_in + n_out; ++i)
        if (!build->supportsFormatCombination(i, all.data(), n_in, n_out)) return 5;
    if (build->configurePlugin(all.data(), n_in, all.data() + n_in, n_out)) return 6;
    const long need = static_cast<long>(build->getWorkspaceSize(all.data(), n_in, all.data() + n_in, n_out));
    if (need > *workspace_bytes) return *workspace_bytes = need, 7;
    if (runtime->onShapeChange(plain.data(), n_in, plain.data() + n_in, n_out)) return 8;
    void* workspace = reinterpret_cast<void*>(workspace_bytes[1]);
    return runtime->enqueue(plain.data(), plain.data() + n_in, inputs.data(), outputs.data(), workspace, nullptr) ? 9 : 0;
}
}
