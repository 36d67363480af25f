// SPDX-License-Identifier: MIT
// The fused step on CUDA: a thread takes 16 bytes of every tensor, all loads before the first store.
//
// The row is read from device memory, where every thread of a warp asks for the same word. Its coefficients never
// travel as arguments: a captured graph reads the table that is there when it is replayed.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>

#include "step_cuda.h"

namespace fastdiff {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

__device__ __forceinline__ void narrow(float value, __half* out) { *out = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }
__device__ __forceinline__ void narrow(float value, float* out) { *out = value; }
__device__ __forceinline__ void narrow(double value, double* out) { *out = value; }

// V consecutive elements, moved in one access where V of them are 16 bytes.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
    T values[V];
};

// Elements [0, count) at `from`, count <= V; the rest is 0.
template <typename T, typename C, int V>
__device__ __forceinline__ void load(const void* from, int64_t offset, int count, C (&to)[V]) {
    const T* source = static_cast<const T*>(from) + offset;
    Pack<T, V> pack;
    if (count == V) {
        pack = *reinterpret_cast<const Pack<T, V>*>(source);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) narrow(C(0), &pack.values[i]);
#pragma unroll
        for (int i = 0; i < V; ++i)
            if (i < count) pack.values[i] = source[i];
    }
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = widen(pack.values[i]);
}

template <typename T, typename C, int V>
__device__ __forceinline__ void store(const C (&from)[V], void* to, int64_t offset, int count) {
    T* target = static_cast<T*>(to) + offset;
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) narrow(from[i], &pack.values[i]);
    if (count == V) {
        *reinterpret_cast<Pack<T, V>*>(target) = pack;
        return;
    }
#pragma unroll
    for (int i = 0; i < V; ++i)
        if (i < count) target[i] = pack.values[i];
}

template <typename T, typename C, int V>
__global__ void __launch_bounds__(kThreads) step_kernel(const StepArgs args, int64_t packs_a_sample) {
    const int64_t pack = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t b = pack / packs_a_sample;
    if (b >= args.batch) return;
    const int64_t at = (pack - b * packs_a_sample) * V;
    const int64_t left = args.inner - at;
    const int count = left < V ? static_cast<int>(left) : V;
    // b · inner + at, since packs of more than one element fill their samples; written so, stores stay 16 bytes wide.
    const int64_t here = pack * V;
    const int64_t there = b * args.model_stride + at;
    const C* __restrict__ row = static_cast<const C*>(args.row);

    C terms[kColumns][V];
    bool present[kColumns] = {};
    C uncond[V], variance[V];
    load<T>(args.sample, here, count, terms[kSample]);
    load<T>(args.model_output, there, count, terms[kModelOutput]);
    present[kSample] = present[kModelOutput] = present[kPrediction] = true;
    if (args.uncond != nullptr) load<T>(args.uncond, there, count, uncond);
#pragma unroll
    for (int j = 0; j < kRegisters; ++j) {
        present[kHistory0 + j] = args.history[j] != nullptr;
        if (present[kHistory0 + j]) load<T>(args.history[j], here, count, terms[kHistory0 + j]);
    }
    present[kNoise] = args.noise != nullptr;
    const bool learned = present[kNoise] && args.variance_kind != Variance::kFixed;
    if (present[kNoise]) load<T>(args.noise, here, count, terms[kNoise]);
    if (learned) load<T>(args.variance, there, count, variance);

    if (args.uncond != nullptr) {
        const C scale = static_cast<const C*>(args.guidance)[b * args.guidance_stride];
#pragma unroll
        for (int i = 0; i < V; ++i) terms[kModelOutput][i] = guide(terms[kModelOutput][i], uncond[i], scale);
    }
#pragma unroll
    for (int i = 0; i < V; ++i)
        terms[kPrediction][i] =
            clamp_to(predict(row[kPredictionSample], row[kPredictionOutput], terms[kSample][i], terms[kModelOutput][i]),
                     row[kClip]);
    if (args.threshold != nullptr) {
        const C threshold = static_cast<const C*>(args.threshold)[b];
#pragma unroll
        for (int i = 0; i < V; ++i) terms[kPrediction][i] = clamp_to(terms[kPrediction][i], threshold) / threshold;
    }
    if (learned) {
#pragma unroll
        for (int i = 0; i < V; ++i)
            terms[kNoise][i] *= learned_std(variance[i], row[kVarianceOffset], row[kVarianceSlope], args.variance_kind);
    }

#pragma unroll
    for (int o = 0; o < kMaxOutputs; ++o) {
        if (o >= args.num_outputs) break;
        C sum[V];
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] = C(0);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const C weight = row[static_cast<int>(kPrevSample) + o * static_cast<int>(kColumns) + c];
            if (!present[c] || weight == C(0)) continue;
#pragma unroll
            for (int i = 0; i < V; ++i) sum[i] = multiply_add(weight, terms[c][i], sum[i]);
        }
        store<T>(sum, args.outputs[o], here, count);
    }
}
static_assert(int{kKeep0} == int{kPrevSample} + int{kColumns} && int{kKeep1} == int{kKeep0} + int{kColumns},
              "the maps of a row follow one another");

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether every access of V elements falls on 16 bytes.
bool vectorizable(const StepArgs& args, int elements) {
    if (args.batch > 1 && (args.inner % elements != 0 || args.model_stride % elements != 0)) return false;
    for (const void* pointer : {args.sample, args.model_output, args.uncond, args.variance, args.noise})
        if (!aligned(pointer)) return false;
    for (const void* pointer : args.history)
        if (!aligned(pointer)) return false;
    for (int o = 0; o < args.num_outputs; ++o)
        if (!aligned(args.outputs[o])) return false;
    return true;
}

template <typename T, typename C, int V>
void launch_packs(const StepArgs& args, cudaStream_t stream) {
    const int64_t packs_a_sample = (args.inner + V - 1) / V;
    const int64_t blocks = (args.batch * packs_a_sample + kThreads - 1) / kThreads;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    // An error of the launch is read once, in launch_step.
    (void)cudaLaunchKernelEx(&config, step_kernel<T, C, V>, args, packs_a_sample);
}

template <typename T, typename C>
void launch_as(const StepArgs& args, cudaStream_t stream) {
    constexpr int kPack = 16 / sizeof(T);
    if (vectorizable(args, kPack))
        launch_packs<T, C, kPack>(args, stream);
    else
        launch_packs<T, C, 1>(args, stream);
}

}  // namespace

const char* launch_step(const StepArgs& args, int device, void* stream) {
    int before = device;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    const auto on = static_cast<cudaStream_t>(stream);
    switch (args.dtype) {
        case DType::kFloat16:
            launch_as<__half, float>(args, on);
            break;
        case DType::kBFloat16:
            launch_as<__nv_bfloat16, float>(args, on);
            break;
        case DType::kFloat32:
            launch_as<float, float>(args, on);
            break;
        case DType::kFloat64:
            launch_as<double, double>(args, on);
            break;
    }
    error = cudaGetLastError();
    if (before != device) {
        const cudaError_t restored = cudaSetDevice(before);
        if (error == cudaSuccess) error = restored;
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastdiff
