// The compiled kernels, and the CUDA driver that loads and launches them. Nothing is linked: libcuda.so.1 is opened when it is needed.
#pragma once
#include <cuda.h>
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace tokexport {

struct Kernel {
    const char* name;  // variant and type: "unit_64_fp16", "match_pairs"
    int chip;
    bool is_ptx;
    const unsigned char* code;
    const char* symbol;
    int warps, shared;
};
#include "kernels.inc"

struct Loaded {
    CUfunction function;
    const Kernel* kernel;
};

class Driver {
public:
    static Driver& get() {
        static Driver driver;
        return driver;
    }

    // The kernel of this name for the GPU of the current context. Throws std::runtime_error in words.
    Loaded load(const std::string& name) {
        open();
        CUcontext context = nullptr;
        check(context_(&context), "no CUDA context");
        std::lock_guard<std::mutex> guard(mutex_);
        const auto key = std::make_pair(context, name);
        const auto known = loaded_.find(key);
        if (known != loaded_.end()) return known->second;
        const Kernel& kernel = choose(name, chip());
        CUmodule module;
        check(load_(&module, kernel.code), kernel.symbol);
        CUfunction function;
        check(function_(&function, module, kernel.symbol), kernel.symbol);
        return loaded_[key] = Loaded{function, &kernel};
    }

    // Run-time parameters in order, then the two scratch pointers that Triton adds.
    template <typename... Args>
    void launch(const Loaded& k, CUstream stream, int64_t x, int64_t y, int64_t z, Args... args) {
        void* scratch[2] = {nullptr, nullptr};
        void* parameters[] = {static_cast<void*>(&args)..., &scratch[0], &scratch[1]};
        check(launch_(k.function, x, y, z, 32 * k.kernel->warps, 1, 1, k.kernel->shared, stream, parameters, nullptr),
              k.kernel->symbol);
    }

private:
    void open() {
        std::lock_guard<std::mutex> guard(mutex_);
        if (launch_) return;
        void* library = dlopen("libcuda.so.1", RTLD_NOW);
        if (!library) throw std::runtime_error("libcuda.so.1 cannot be opened: no NVIDIA driver is installed here");
        symbol(library, "cuCtxGetCurrent", context_);
        symbol(library, "cuCtxGetDevice", device_);
        symbol(library, "cuDeviceGetAttribute", attribute_);
        symbol(library, "cuModuleLoadData", load_);
        symbol(library, "cuModuleGetFunction", function_);
        symbol(library, "cuLaunchKernel", launch_);
    }

    template <typename F>
    static void symbol(void* library, const char* name, F& function) {
        function = reinterpret_cast<F>(dlsym(library, name));
        if (!function) throw std::runtime_error(std::string("libcuda.so.1 has no ") + name);
    }

    int chip() {
        CUdevice device;
        int major = 0, minor = 0;
        check(device_(&device), "no device");
        check(attribute_(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device), "capability");
        check(attribute_(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device), "capability");
        return 10 * major + minor;
    }

    // The chip's own cubin; else of the 8.x family an older one, which runs on a newer; else the PTX.
    static const Kernel& choose(const std::string& name, int chip) {
        const Kernel* best = nullptr;
        for (const Kernel& k : kKernels) {
            if (name != k.name) continue;
            const bool family = k.chip / 10 == 8 && chip / 10 == 8 && k.chip <= chip;
            const int rank = k.is_ptx ? (chip >= k.chip ? 1 : 0) : k.chip == chip ? 1000 : family ? k.chip : 0;
            const int had = !best ? 0 : best->is_ptx ? 1 : best->chip == chip ? 1000 : best->chip;
            if (rank > had) best = &k;
        }
        if (!best) throw std::runtime_error("no kernel " + name + " for compute capability " + std::to_string(chip));
        return *best;
    }

    static void check(CUresult result, const char* what) {
        if (result) throw std::runtime_error(std::string("CUDA driver error ") + std::to_string(result) + ": " + what);
    }

    std::mutex mutex_;
    std::map<std::pair<CUcontext, std::string>, Loaded> loaded_;
    decltype(&cuCtxGetCurrent) context_ = nullptr;
    decltype(&cuCtxGetDevice) device_ = nullptr;
    decltype(&cuDeviceGetAttribute) attribute_ = nullptr;
    decltype(&cuModuleLoadData) load_ = nullptr;
    decltype(&cuModuleGetFunction) function_ = nullptr;
    decltype(&cuLaunchKernel) launch_ = nullptr;
};

}  // namespace tokexport
