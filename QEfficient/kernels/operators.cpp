// SPDX-License-Identifier: BSD-3-Clause
// The kernels as operators of ONNX Runtime, in the domain "QEfficient".
#include <algorithm>
#include <memory>
#include <thread>

#include "attention.h"
#include "floats.h"
#include "gates.h"
#include "norms.h"
#include "ort_abi.h"
#include "products.h"
#include "updates.h"

namespace {

Api api;

constexpr int64_t kMostDims = 8;

// An input of a call: null where it was left out.
struct Tensor {
  const void* data = nullptr;
  size_t rank = 0;
  int64_t dims[kMostDims] = {};

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  const OrtValue* value = nullptr;
  OrtStatus* read(const OrtKernelContext* context, size_t place, bool with_shape) {
    if (auto* error = api.input(context, place, &value)) return error;
    if (!value) return nullptr;
    void* start = nullptr;
    if (auto* error = api.data(const_cast<OrtValue*>(value), &start)) return error;
    data = start;
    if (!with_shape) return nullptr;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    if (auto* error = api.shape(value, &info)) return error;
    OrtStatus* error = api.rank(info, &rank);
    if (!error && rank > kMostDims) error = api.status(kInvalidArgument, "an input has too many dimensions");
    if (!error) error = api.dims(info, dims, rank);
    api.release(info);
    return error;
  }
};

// The columns of y that each part of an adapter's ranks adds to: the attribute `starts`, one number for each part. All add to all without it.
struct Shares {
  std::vector<int64_t> starts = {0};

  OrtStatus* create(const OrtKernelInfo* info, int64_t rows) {
    if (auto* error = api.attribute(info, "starts", &starts)) return error;
    const bool ordered = std::is_sorted(starts.begin(), starts.end());
    if (starts.empty() || !ordered || starts.front() < 0 || starts.back() >= rows)
      return api.status(kInvalidArgument, "a product: starts are not columns of y in their order");
    return nullptr;
  }
};

// A product with what adapters add: x (..., K) becomes y (..., N), a (K, r) or (C, 1, K, p) and b (r, N) or (C, 1, p, N) are added as updates.h has it; in
// 8 bits K and N have a tail.
template <class T>
struct Product {
  const float* x = nullptr;
  float* y = nullptr;
  int64_t count = 0, task = 0;  // rows of x, and how many columns of y a thread makes at once
  Pieces<T> pieces{};
  Updates updates;

  // Reads a call's inputs and makes its output.
  OrtStatus* open(OrtKernelContext* context, Tensor& in, const Tensor& a, const Tensor& b, const Tensor& places, const Shares& shares,
                  int64_t columns, int64_t rows) {
    if (in.rank < 1 || in.dims[in.rank - 1] != columns) return api.status(kInvalidArgument, "a product: the last dimension of x is not K");
    count = 1;
    for (size_t i = 0; i + 1 < in.rank; ++i) count *= in.dims[i];
    pieces = {0, columns, 0, rows, a.as<T>(), b.as<T>(), shares.starts.data(), static_cast<int64_t>(shares.starts.size())};
    if (a.data) {
      pieces.count = a.rank == 4 ? a.dims[0] : 1;
      pieces.ranks = a.rank >= 2 ? a.dims[a.rank - 1] : 0;
      const auto fits = [&](const Tensor& t, int64_t high, int64_t wide) {
        return (t.rank == 2 || (t.rank == 4 && t.dims[0] == pieces.count && t.dims[1] == 1)) && t.dims[t.rank - 2] == high &&
               t.dims[t.rank - 1] == wide;
      };
      if (!fits(a, pieces.depth(), pieces.ranks) || !fits(b, pieces.ranks, pieces.stride()))
        return api.status(kInvalidArgument, "a product: a and b are not (K, r) and (r, N), nor pieces of such, with the tails of 8 bits");
      if (pieces.ranks % pieces.shares) return api.status(kInvalidArgument, "a product: the ranks are not as many for each of the starts");
      const bool one = !places.data || (pieces.count == 1 && places.rank == 3 && places.dims[0] == 1);
      if (!one && (places.rank != 3 || places.dims[2] != pieces.count || places.dims[0] < 1 || count % places.dims[0]))
        return api.status(kInvalidArgument, "a product: places do not fit the rows and the pieces");
    }
    in.dims[in.rank - 1] = rows;
    OrtValue* made = nullptr;
    if (auto* error = api.output(context, 0, in.dims, in.rank, &made)) return error;
    void* to = nullptr;
    if (auto* error = api.data(made, &to)) return error;
    x = in.as<float>();
    y = static_cast<float*>(to);
    updates.find(pieces, count, places.as<float>(), places.dims[0], places.dims[1]);
    return nullptr;
  }

  // Some tasks for each core, for one may be slower than another, but long ones, for each begins with weights that nobody asked for.
  void divide(int64_t row_bytes, int64_t step) {
    static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
    if (pieces.count) step = std::max<int64_t>(step, 64);  // columns of b are whole lines of the cache then
    const int64_t bytes = std::clamp<int64_t>(pieces.rows * row_bytes / (4 * cores), 1 << 15, 1 << 18);
    task = std::clamp<int64_t>(bytes / row_bytes / step * step, step, 2048);
  }
  int64_t tasks() const { return (pieces.rows + task - 1) / task; }
  int64_t first_of(int64_t i) const { return std::min(i * task, pieces.rows); }  // column of a task; of the one behind the last: their number
};

// Reads the attributes of a weight in blocks: N, K, bits and block_size.
OrtStatus* read(const OrtKernelInfo* info, Weight* w) {
  int64_t bits = 0;
  for (auto [name, out] : {std::pair{"N", &w->rows}, {"K", &w->columns}, {"block_size", &w->block}, {"bits", &bits}})
    if (auto* error = api.attribute(info, name, out)) return error;
  w->bits = static_cast<int>(bits);
  if (w->rows < 1 || w->columns < 1 || (bits != 4 && bits != 8) || w->block < 32 || w->block > 256 || w->block & (w->block - 1))
    return api.status(kInvalidArgument, "a weight in blocks: bits must be 4 or 8, block_size 32, 64, 128 or 256, N and K positive");
  w->blocks = (w->columns + w->block - 1) / w->block;
  return nullptr;
}

// BlockProduct(x float (..., K), data, scales, zeros?, bias?, a?, b?, places?) -> (..., N), of the attributes K, N, bits, block_size and perhaps starts:
// weights in blocks as in products.h, adapters in 8 bits as in updates.h.
struct BlockProduct {
  enum Input { kX, kData, kScales, kZeros, kBias, kA, kB, kPlaces, kInputs };
  Weight weight{};
  Shares shares;

  OrtStatus* create(const OrtKernelInfo* info) {
    if (auto* error = read(info, &weight)) return error;
    return shares.create(info, weight.rows);
  }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor in[kInputs];
    for (size_t i = 0; i < kInputs; ++i)
      if (auto* error = in[i].read(context, i, i == kX || i >= kA)) return error;
    Weight w = weight;
    w.data = in[kData].as<uint8_t>();
    w.scales = in[kScales].as<float>();
    w.zeros = in[kZeros].as<uint8_t>();
    w.bias = in[kBias].as<float>();
    thread_local Call call;  // of the calling thread; the session's other threads take parts of it
    if (auto* error = call.open(context, in[kX], in[kA], in[kB], in[kPlaces], shares, w.columns, w.rows)) return error;
    if (call.count == 0) return nullptr;
    call.weight = &w;
    call.divide(w.row_bytes(), kStrip);
    return w.bits == 4 ? call.run<Int4>(context) : call.run<Int8>(context);
  }

  static constexpr int64_t kAlone = 1 << 16;  // multiplications that take less than to call other threads

  struct Call : Product<int8_t> {
    const Weight* weight;
    Rows rows;

    template <class Format>
    OrtStatus* run(const OrtKernelContext* context) {
      rows.resize<Format>(count, *weight);
      // Part after part of the columns: a panel to be rounded, or a job of the adapters.
      const auto begin = [](void* data, size_t i) {
        auto& c = *static_cast<Call*>(data);
        const int64_t panels = Rows::count(c.count), each = panels + c.updates.jobs.size(), part = i / each, at = i % each;
        if (at < panels)
          c.rows.template round<Format>(c.x, Rows::begin_of(at, c.count), c.count, part * Updates::kDepth, Updates::kDepth, *c.weight);
        else
          c.updates.down(c.pieces, c.updates.jobs[at - panels], part, c.x);
      };
      const size_t total = Updates::parts_of(weight->columns) * (Rows::count(count) + updates.jobs.size());
      // Rounding a row takes as long as some multiplications.
      if (weight->columns * (8 * count + pieces.ranks * static_cast<int64_t>(updates.rows.size())) < kAlone) {
        for (size_t i = 0; i < total; ++i) begin(this, i);
      } else if (auto* error = api.parallel_for(context, begin, total, 0, this)) {
        return error;
      }
      updates.gather(pieces);
      const auto part = [](void* data, size_t i) {
        auto& c = *static_cast<Call*>(data);
        const int64_t first = c.first_of(i), last = c.first_of(i + 1);
        thread_local std::vector<Part<int8_t>> parts;
        c.updates.divide(c.pieces, first, last, parts);
        const int64_t strip = first / kStrip, end = (last + kStrip - 1) / kStrip;
        Asking<int8_t> asking(parts, c.pieces.stride(), (end - strip) * c.weight->blocks);
        product<Format>(*c.weight, c.rows, c.count, strip, end, c.y, asking);
        for (const auto& part : parts) c.updates.up(c.pieces, part, c.y);
      };
      return api.parallel_for(context, part, tasks(), 0, this);
    }
  };
};

// BlockRows(ids int64, data, scales, zeros?) -> (..., K), of the attributes K, N, bits and block_size: those rows of a weight in blocks.
struct BlockRows {
  enum Input { kIds, kData, kScales, kZeros, kInputs };
  Weight weight{};

  OrtStatus* create(const OrtKernelInfo* info) { return read(info, &weight); }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor in[kInputs];
    for (size_t i = 0; i < kInputs; ++i)
      if (auto* error = in[i].read(context, i, i == kIds)) return error;
    Tensor& ids = in[kIds];
    if (ids.rank == kMostDims) return api.status(kInvalidArgument, "BlockRows: ids have too many dimensions");
    Call call{weight, ids.as<int64_t>(), nullptr, 1};
    for (size_t i = 0; i < ids.rank; ++i) call.count *= ids.dims[i];
    for (int64_t i = 0; i < call.count; ++i)
      if (call.ids[i] < 0 || call.ids[i] >= weight.rows) return api.status(kInvalidArgument, "BlockRows: there is no row of an id");
    call.weight.data = in[kData].as<uint8_t>();
    call.weight.scales = in[kScales].as<float>();
    call.weight.zeros = in[kZeros].as<uint8_t>();
    ids.dims[ids.rank] = weight.columns;
    OrtValue* out = nullptr;
    void* rows = nullptr;
    if (auto* error = api.output(context, 0, ids.dims, ids.rank + 1, &out)) return error;
    if (auto* error = api.data(out, &rows)) return error;
    call.rows = static_cast<float*>(rows);
    const auto take = [](void* data, size_t i) {
      const auto& c = *static_cast<const Call*>(data);
      row_of(c.weight, c.ids[i], c.rows + i * c.weight.columns);
    };
    if (call.count == 0) return nullptr;
    return api.parallel_for(context, take, call.count, 0, &call);
  }

  struct Call {
    Weight weight;
    const int64_t* ids;
    float* rows;
    int64_t count;
  };
};

// Bfloat16Product and Float16Product(x float (..., K), data (N, K), bias?, a?, b?, places?) -> (..., N), of the attributes K, N and perhaps starts: weights
// as in floats.h, adapters in float32.
template <class F>
struct FloatProduct {
  enum Input { kX, kData, kBias, kA, kB, kPlaces, kInputs };
  FloatWeight weight{};
  Shares shares;

  OrtStatus* create(const OrtKernelInfo* info) {
    for (auto [name, out] : {std::pair{"N", &weight.rows}, {"K", &weight.columns}})
      if (auto* error = api.attribute(info, name, out)) return error;
    if (weight.rows < 1 || weight.columns < 1) return api.status(kInvalidArgument, "a product of floats: N and K must be positive");
    return shares.create(info, weight.rows);
  }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor in[kInputs];
    for (size_t i = 0; i < kInputs; ++i)
      if (auto* error = in[i].read(context, i, i == kX || i >= kA)) return error;
    FloatWeight w = weight;
    w.data = in[kData].template as<uint16_t>();
    w.bias = in[kBias].template as<float>();
    thread_local Call call;
    if (auto* error = call.open(context, in[kX], in[kA], in[kB], in[kPlaces], shares, w.columns, w.rows)) return error;
    if (call.count == 0) return nullptr;
    call.weight = w;
    call.divide(w.columns * sizeof(uint16_t), kPanel);
    return call.run(context);
  }

  struct Call : Product<float> {
    FloatWeight weight;

    // Jobs of the adapters and tasks of the product together, so that no thread waits for the former; then what the adapters add.
    OrtStatus* run(const OrtKernelContext* context) {
      const auto begin = [](void* data, size_t i) {
        auto& c = *static_cast<Call*>(data);
        const int64_t parts = Updates::parts_of(c.weight.columns), jobs = parts * c.updates.jobs.size(), at = static_cast<int64_t>(i);
        if (at < jobs)
          c.updates.down(c.pieces, c.updates.jobs[at / parts], at % parts, c.x);
        else
          product<F>(c.weight, c.x, c.count, c.first_of(at - jobs), c.first_of(at - jobs + 1), c.y);
      };
      const size_t jobs = this->updates.jobs.size() * Updates::parts_of(weight.columns);
      if (auto* error = api.parallel_for(context, begin, jobs + this->tasks(), 0, this)) return error;
      if (this->updates.jobs.empty()) return nullptr;
      this->updates.gather(this->pieces);
      const auto add = [](void* data, size_t i) {
        auto& c = *static_cast<Call*>(data);
        thread_local std::vector<Part<float>> parts;
        c.updates.divide(c.pieces, c.first_of(i), c.first_of(i + 1), parts);
        for (const auto& part : parts) c.updates.up(c.pieces, part, c.y);
      };
      return api.parallel_for(context, add, this->tasks(), 0, this);
    }
  };
};

// GatedSilu(gate, up) -> y, all of one shape.
struct GatedSilu {
  enum Input { kGate, kUp, kInputs };
  static constexpr int64_t kTask = 4096;  // numbers that a thread makes at once

  OrtStatus* create(const OrtKernelInfo*) { return nullptr; }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor in[kInputs];
    for (size_t i = 0; i < kInputs; ++i)
      if (auto* error = in[i].read(context, i, true)) return error;
    const Tensor &gate = in[kGate], &up = in[kUp];
    if (gate.rank != up.rank || !std::equal(gate.dims, gate.dims + gate.rank, up.dims))
      return api.status(kInvalidArgument, "GatedSilu: gate and up are not of one shape");
    OrtValue* out = nullptr;
    void* y = nullptr;
    if (auto* error = api.output(context, 0, gate.dims, gate.rank, &out)) return error;
    if (auto* error = api.data(out, &y)) return error;
    Call call{gate.as<float>(), up.as<float>(), static_cast<float*>(y), 1};
    for (size_t i = 0; i < gate.rank; ++i) call.count *= gate.dims[i];
    const auto part = [](void* data, size_t i) {
      const auto& c = *static_cast<const Call*>(data);
      const int64_t first = static_cast<int64_t>(i) * kTask;
      ::gate(c.gate + first, c.up + first, std::min(kTask, c.count - first), c.y + first);
    };
    if (call.count == 0) return nullptr;
    return api.parallel_for(context, part, (call.count + kTask - 1) / kTask, 0, &call);
  }

  struct Call {
    const float *gate, *up;
    float* y;
    int64_t count;
  };
};

// SkipNorm(a, b, weight) -> (y, sum), of the attribute epsilon: a and b of one shape (..., N), weight (N).
struct SkipNorm {
  enum Input { kA, kB, kWeight, kInputs };
  enum Output { kY, kSum, kOutputs };
  static constexpr int64_t kAlone = 1 << 14;  // numbers that take less than to call other threads
  float epsilon = 0;

  OrtStatus* create(const OrtKernelInfo* info) { return api.attribute(info, "epsilon", &epsilon); }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor in[kInputs];
    for (size_t i = 0; i < kInputs; ++i)
      if (auto* error = in[i].read(context, i, true)) return error;
    const Tensor &a = in[kA], &b = in[kB], &weight = in[kWeight];
    if (a.rank < 1 || a.rank != b.rank || !std::equal(a.dims, a.dims + a.rank, b.dims) || weight.rank != 1 || weight.dims[0] != a.dims[a.rank - 1])
      return api.status(kInvalidArgument, "SkipNorm: a and b are not of one shape, or the weight is not as long as their last dimension");
    void* to[kOutputs] = {};
    for (size_t i = 0; i < kOutputs; ++i) {
      OrtValue* out = nullptr;
      if (auto* error = api.output(context, i, a.dims, a.rank, &out)) return error;
      if (auto* error = api.data(out, &to[i])) return error;
    }
    Call call{a.as<float>(), b.as<float>(), weight.as<float>(), static_cast<float*>(to[kSum]), static_cast<float*>(to[kY]), weight.dims[0], epsilon};
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < a.rank; ++i) rows *= a.dims[i];
    const auto part = [](void* data, size_t i) {
      const auto& c = *static_cast<const Call*>(data);
      const int64_t at = static_cast<int64_t>(i) * c.columns;
      skip_norm(c.a + at, c.b + at, c.weight, c.columns, c.epsilon, c.sum + at, c.y + at);
    };
    if (rows * call.columns > kAlone) return api.parallel_for(context, part, rows, 0, &call);
    for (int64_t i = 0; i < rows; ++i) part(&call, i);
    return nullptr;
  }

  struct Call {
    const float *a, *b, *weight;
    float *sum, *y;
    int64_t columns;
    float epsilon;
  };
};

// The operator whose kernels are of a class.
template <class Kernel>
OrtCustomOp operator_of() {
  OrtCustomOp op{};
  op.version = kApiVersion;
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
    auto made = std::make_unique<Kernel>();
    if (auto* error = made->create(info)) return error;
    *kernel = made.release();
    return nullptr;
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) { return static_cast<Kernel*>(kernel)->compute(context); };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return Kernel::kInputs; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return kFloat; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return kRequired; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

OrtCustomOp block_product() {
  using Kernel = BlockProduct;
  OrtCustomOp op = operator_of<Kernel>();
  op.GetName = [](const OrtCustomOp*) { return "BlockProduct"; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) {
    return i == Kernel::kData || i == Kernel::kZeros ? kUint8 : i == Kernel::kA || i == Kernel::kB ? kInt8 : kFloat;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return i <= Kernel::kScales ? kRequired : kOptional; };
  return op;
}

OrtCustomOp block_rows() {
  using Kernel = BlockRows;
  OrtCustomOp op = operator_of<Kernel>();
  op.GetName = [](const OrtCustomOp*) { return "BlockRows"; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) { return i == Kernel::kIds ? kInt64 : i == Kernel::kScales ? kFloat : kUint8; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return i < Kernel::kZeros ? kRequired : kOptional; };
  return op;
}

template <class F, ElementType kType>
OrtCustomOp float_product() {
  using Kernel = FloatProduct<F>;
  OrtCustomOp op = operator_of<Kernel>();
  op.GetName = [](const OrtCustomOp*) { return kType == kBfloat16 ? "Bfloat16Product" : "Float16Product"; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) { return i == Kernel::kData ? kType : kFloat; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return i <= Kernel::kData ? kRequired : kOptional; };
  return op;
}

OrtCustomOp gated_silu() {
  OrtCustomOp op = operator_of<GatedSilu>();
  op.GetName = [](const OrtCustomOp*) { return "GatedSilu"; };
  op.GetInputType = [](const OrtCustomOp*, size_t) { return kFloat; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return kRequired; };
  return op;
}

OrtCustomOp skip_norm() {
  using Kernel = SkipNorm;
  OrtCustomOp op = operator_of<Kernel>();
  op.GetName = [](const OrtCustomOp*) { return "SkipNorm"; };
  op.GetInputType = [](const OrtCustomOp*, size_t) { return kFloat; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return kRequired; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return Kernel::kOutputs; };
  return op;
}

// CacheAttention(query, key?, value?, past_key, past_value, seqlens_k, total_sequence_length, cos?, sin?) -> (y, present_key, present_value): what
// ONNX Runtime's GroupQueryAttention does, by its attributes. It computes calls of several tokens, too; those of one token go by attention.h.
struct CacheAttention {
  enum Input { kQuery, kKey, kValue, kPastKey, kPastValue, kLast, kTotal, kCos, kSin, kInputs };
  enum Output { kY, kPresentKey, kPresentValue, kOutputs };

  int64_t heads = 0, kv_heads = 0, window = 0, rotary = 0;
  float scale = 0;
  OrtOp* chunks = nullptr;

  ~CacheAttention() {
    if (chunks) api.release(chunks);
  }

  OrtStatus* create(const OrtKernelInfo* info) {
    const int64_t none = 0;
    std::vector<OrtOpAttr*> made;
    OrtStatus* error = nullptr;
    const auto pass_on = [&](const char* name, const void* value, AttributeType type) {
      if (error) return;
      OrtOpAttr* attribute = nullptr;
      error = api.create_attribute(name, value, type, &attribute);
      if (!error) made.push_back(attribute);
    };
    for (auto [name, out] :
         {std::pair{"num_heads", &heads}, {"kv_num_heads", &kv_heads}, {"local_window_size", &window}, {"do_rotary", &rotary}}) {
      if (!error) error = api.attribute(info, name, out);
      pass_on(name, out, kInt);
    }
    if (!error) error = api.attribute(info, "scale", &scale);
    pass_on("scale", &scale, kReal);
    pass_on("rotary_interleaved", &none, kInt);
    if (!error && (kv_heads < 1 || heads < 1 || heads % kv_heads))
      error = api.status(kInvalidArgument, "CacheAttention: num_heads is not a multiple of kv_num_heads");
    const char* types[] = {"T", "T_CACHE", "T_KV_SCALE", "M"};
    const ElementType of_types[] = {kFloat, kFloat, kFloat, kInt32};
    if (!error)
      error = api.create_kernel(info, "GroupQueryAttention", "com.microsoft", 1, types, of_types, 4, made.data(), static_cast<int>(made.size()),
                                kInputs, kOutputs, &chunks);
    for (auto* attribute : made) api.release(attribute);
    return error;
  }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor in[kInputs];
    for (size_t i = 0; i < kInputs; ++i)
      if (auto* error = in[i].read(context, i, i == kQuery || i == kPastKey || i == kCos)) return error;
    const Tensor &query = in[kQuery], &past = in[kPastKey];
    if (query.rank != 3 || past.rank != 4 || past.dims[1] != kv_heads || past.dims[0] != query.dims[0])
      return api.status(kInvalidArgument, "CacheAttention: the query and the cache do not fit");
    const int64_t rows = query.dims[0], tokens = query.dims[1], size = past.dims[3];
    const bool packed = !in[kKey].data;
    if (query.dims[2] != (packed ? heads + 2 * kv_heads : heads) * size)
      return api.status(kInvalidArgument, "CacheAttention: the last dimension of the query does not fit the heads");

    OrtValue* out[kOutputs] = {};
    void* to[kOutputs] = {};
    const int64_t dims[] = {rows, tokens, heads * size};
    if (auto* error = api.output(context, kY, dims, 3, &out[kY])) return error;
    for (size_t i : {kPresentKey, kPresentValue})
      if (auto* error = api.output(context, i, past.dims, 4, &out[i])) return error;
    for (size_t i = 0; i < kOutputs; ++i)
      if (auto* error = api.data(out[i], &to[i])) return error;

    const bool in_place = to[kPresentKey] == past.data && to[kPresentValue] == in[kPastValue].data;
    if (tokens != 1 || !in_place || size % kLanes) {
      const OrtValue* values[kInputs];
      for (size_t i = 0; i < kInputs; ++i) values[i] = in[i].value;
      return api.run_kernel(context, chunks, values, kInputs, out, kOutputs);
    }
    thread_local Attention call;
    call.rows = rows, call.heads = heads, call.kv_heads = kv_heads, call.size = size, call.places = past.dims[2];
    call.window = window, call.scale = scale;
    call.query = query.as<float>();
    call.key = packed ? call.query + heads * size : in[kKey].as<float>();
    call.value = packed ? call.key + kv_heads * size : in[kValue].as<float>();
    call.query_stride = query.dims[2];
    call.key_stride = packed ? query.dims[2] : kv_heads * size;
    call.keys = static_cast<float*>(to[kPresentKey]), call.values = static_cast<float*>(to[kPresentValue]);
    call.last = in[kLast].as<int32_t>();
    call.cos = rotary ? in[kCos].as<float>() : nullptr, call.sin = rotary ? in[kSin].as<float>() : nullptr;
    call.turned = call.cos ? 2 * in[kCos].dims[1] : 0;
    call.y = static_cast<float*>(to[kY]);
    for (int64_t b = 0; b < rows; ++b)
      if (call.last[b] < 0 || call.last[b] >= call.places || (call.cos && call.last[b] >= in[kCos].dims[0]))
        return api.status(kInvalidArgument, "CacheAttention: a row's length does not fit the cache");
    call.begin();
    const auto part = [](void* data, size_t i) { static_cast<Attention*>(data)->attend(static_cast<int64_t>(i)); };
    if (auto* error = api.parallel_for(context, part, call.parts.size(), 0, &call)) return error;
    call.end();
    return nullptr;
  }
};

OrtCustomOp cache_attention() {
  using Kernel = CacheAttention;
  OrtCustomOp op = operator_of<Kernel>();
  op.GetName = [](const OrtCustomOp*) { return "CacheAttention"; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) { return i == Kernel::kLast || i == Kernel::kTotal ? kInt32 : kFloat; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i == Kernel::kKey || i == Kernel::kValue || i > Kernel::kTotal ? kOptional : kRequired;
  };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return Kernel::kOutputs; };
  return op;
}

}  // namespace

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  static const OrtCustomOp ops[] = {block_product(), block_rows(), float_product<Bfloat16, kBfloat16>(), float_product<Float16, kFloat16>(),
                                    cache_attention(), gated_silu(), skip_norm()};
  api.table = base->GetApi(kApiVersion);
  if (!api.table) return nullptr;  // an older ONNX Runtime, which then knows no such operator and says so
  OrtCustomOpDomain* domain = nullptr;  // kept as long as the library is
  if (auto* error = api.create_domain("QEfficient", &domain)) return error;
  for (const OrtCustomOp& op : ops)
    if (auto* error = api.add_op(domain, &op)) return error;
  return api.add_domain(options, domain);
}
