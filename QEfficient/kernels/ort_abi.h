// SPDX-License-Identifier: BSD-3-Clause
// What these kernels need of ONNX Runtime's C API, which its wheels bring no header for.
//
// The API is a table of functions that only ever grows, so a function has the same place in every later version. The places below are
// those of include/onnxruntime/core/session/onnxruntime_c_api.h, API version 20 (ONNX Runtime 1.20) and later.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

constexpr uint32_t kApiVersion = 20;

struct OrtStatus;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtCustomOpDomain;
struct OrtSessionOptions;
struct OrtApi;
struct OrtOp;
struct OrtOpAttr;

enum ElementType { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16 };
enum AttributeType { kInt = 1, kReal = 3 };
enum Presence { kRequired = 0, kOptional = 1 };
enum ErrorCode { kFail = 1, kInvalidArgument = 2 };

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// The functions of the table that are called here, by their places.
struct Api {
  const OrtApi* table;

  template <int Place, class... Args>
  OrtStatus* call(Args... args) const {
    return reinterpret_cast<OrtStatus* (*const*)(Args...)>(table)[Place](args...);
  }
  OrtStatus* status(ErrorCode code, const char* text) const { return call<0>(code, text); }
  OrtStatus* create_domain(const char* name, OrtCustomOpDomain** out) const { return call<26>(name, out); }
  OrtStatus* add_op(OrtCustomOpDomain* domain, const void* op) const { return call<27>(domain, op); }
  OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const { return call<28>(options, domain); }
  OrtStatus* data(OrtValue* value, void** out) const { return call<51>(value, out); }
  OrtStatus* rank(const OrtTensorTypeAndShapeInfo* info, size_t* out) const { return call<61>(info, out); }
  OrtStatus* dims(const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t n) const { return call<62>(info, out, n); }
  OrtStatus* shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) const { return call<65>(value, out); }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, float* out) const { return call<85>(info, name, out); }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t* out) const { return call<86>(info, name, out); }
  // Several numbers; `out` stays as it is where there is no such attribute.
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, std::vector<int64_t>* out) const {
    size_t size = 0;
    if (auto* absent = call<163>(info, name, static_cast<int64_t*>(nullptr), &size)) {
      reinterpret_cast<void (*const*)(void*)>(table)[93](absent);
      return nullptr;
    }
    out->resize(size);
    return call<163>(info, name, out->data(), &size);
  }
  OrtStatus* input(const OrtKernelContext* c, size_t i, const OrtValue** out) const { return call<90>(c, i, out); }
  OrtStatus* output(OrtKernelContext* c, size_t i, const int64_t* dims, size_t n, OrtValue** out) const {
    return call<91>(c, i, dims, n, out);
  }
  void release(OrtTensorTypeAndShapeInfo* info) const { reinterpret_cast<void (*const*)(void*)>(table)[99](info); }
  OrtStatus* create_attribute(const char* name, const void* value, AttributeType type, OrtOpAttr** out) const {
    return call<211>(name, value, 1, type, out);
  }
  void release(OrtOpAttr* attribute) const { reinterpret_cast<void (*const*)(void*)>(table)[212](attribute); }
  // Makes one of ONNX Runtime's own kernels, chosen by the types of its inputs.
  OrtStatus* create_kernel(const OrtKernelInfo* info, const char* name, const char* domain, int version, const char** types,
                           const ElementType* of_types, int type_count, const OrtOpAttr* const* attributes, int attribute_count, int inputs,
                           int outputs, OrtOp** out) const {
    return call<213>(info, name, domain, version, types, of_types, type_count, attributes, attribute_count, inputs, outputs, out);
  }
  OrtStatus* run_kernel(const OrtKernelContext* c, const OrtOp* kernel, const OrtValue* const* inputs, int input_count, OrtValue* const* outputs,
                        int output_count) const {
    return call<214>(c, kernel, inputs, input_count, outputs, output_count);
  }
  void release(OrtOp* kernel) const { reinterpret_cast<void (*const*)(void*)>(table)[215](kernel); }
  // Calls fn(data, i) for i in [0, total) on the session's threads, in `batches` consecutive pieces (0: one for each thread).
  OrtStatus* parallel_for(const OrtKernelContext* c, void (*fn)(void*, size_t), size_t total, size_t batches, void* data) const {
    return call<274>(c, fn, total, batches, data);
  }
};

// A custom operator, as API version 20 knows it. What is null has its default.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  ElementType (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  ElementType (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  Presence (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  Presence (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, void*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};
