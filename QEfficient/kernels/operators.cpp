// SPDX-License-Identifier: BSD-3-Clause
// The kernels as operators of ONNX Runtime, in the domain "QEfficient".
#include <algorithm>
#include <thread>

#include "attention.h"
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
    if (!error && rank > kMostDims) error = api.status(kInvalidArgument, "BlockProduct: an input has too many dimensions");
    if (!error) error = api.dims(info, dims, rank);
    api.release(info);
    return error;
  }
};

enum Input { kX, kData, kScales, kZeros, kBias, kA, kB, kPlaces, kInputs };

// BlockProduct(x float (..., K), data, scales, zeros?, bias?, a?, b?, places?) -> (..., N), of the attributes K, N, bits and block_size.
// See products.h for the product, updates.h for what the adapters a (K, r) or (C, 1, K, p) and b (r, N) or (C, 1, p, N), float16, add.
struct BlockProduct {
  Weight weight{};

  static constexpr int64_t kAloneProducts = 1 << 15;

  // How many columns of y a thread makes at once, a multiple of `step`: some tasks for each core, for one may be slower than another, but long ones,
  // for each begins with weights that nobody asked for.
  static int64_t task_of(const Weight& w, int64_t step) {
    static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
    const int64_t bytes = std::clamp<int64_t>(w.rows * w.row_bytes() / (4 * cores), 1 << 15, 1 << 18);
    return std::clamp<int64_t>(bytes / w.row_bytes() / step * step, step, 2048);
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
    Tensor& x = in[kX];
    if (x.rank < 1 || x.dims[x.rank - 1] != w.columns) return api.status(kInvalidArgument, "BlockProduct: the last dimension of x is not K");
    int64_t count = 1;
    for (size_t i = 0; i + 1 < x.rank; ++i) count *= x.dims[i];

    const Tensor &a = in[kA], &b = in[kB], &places = in[kPlaces];
    Pieces pieces{0, w.columns, 0, w.rows, a.as<uint16_t>(), b.as<uint16_t>()};
    if (a.data) {
      pieces.count = a.rank == 4 ? a.dims[0] : 1;
      pieces.ranks = a.rank >= 2 ? a.dims[a.rank - 1] : 0;
      const auto fits = [&](const Tensor& t, int64_t high, int64_t wide) {
        return (t.rank == 2 || (t.rank == 4 && t.dims[0] == pieces.count && t.dims[1] == 1)) && t.dims[t.rank - 2] == high &&
               t.dims[t.rank - 1] == wide;
      };
      if (!fits(a, w.columns, pieces.ranks) || !fits(b, pieces.ranks, w.rows))
        return api.status(kInvalidArgument, "BlockProduct: a and b are not (K, r) and (r, N), nor pieces of such");
      const bool one = !places.data || (pieces.count == 1 && places.rank == 3 && places.dims[0] == 1);
      if (!one && (places.rank != 3 || places.dims[2] != pieces.count || places.dims[0] < 1 || count % places.dims[0]))
        return api.status(kInvalidArgument, "BlockProduct: places do not fit the rows and the pieces");
    }

    x.dims[x.rank - 1] = w.rows;
    OrtValue* made = nullptr;
    if (auto* failed = api.output(context, 0, x.dims, x.rank, &made)) return failed;
    void* y = nullptr;
    if (auto* failed = api.data(made, &y)) return failed;
    if (count == 0) return nullptr;

    thread_local Call call;  // of the calling thread; the session's other threads take parts of it
    call.weight = &w;
    call.pieces = pieces;
    call.x = x.as<float>();
    call.y = static_cast<float*>(y);
    call.count = count;
    call.task = task_of(w, pieces.count ? 64 : 8);  // 64 columns of b are two lines of the cache
    call.updates.find(pieces, count, places.as<float>(), places.dims[0], places.dims[1]);
    return with_layout(w, [&](auto layout) { return call.run<decltype(layout)>(context); });
  }

  struct Call {
    const Weight* weight;
    Pieces pieces;
    const float* x;
    float* y;
    int64_t count, task;
    Rows rows;
    Updates updates;

    template <class Layout>
    OrtStatus* run(const OrtKernelContext* context) {
      rows.resize<Layout>(count, *weight);
      const auto begin = [](void* data, size_t i) {  // a row to be rounded, or a job of the adapters
        auto& c = *static_cast<Call*>(data);
        const auto at = static_cast<int64_t>(i);
        if (at < c.count)
          c.rows.template round<Layout>(c.x + at * c.weight->columns, at, c.count, *c.weight);
        else
          c.updates.down(c.pieces, c.updates.jobs[at - c.count], c.x);
      };
      const size_t total = count + updates.jobs.size();
      if (weight->columns * (8 * count + pieces.ranks * static_cast<int64_t>(updates.rows.size())) < kAloneProducts) {
        for (size_t i = 0; i < total; ++i) begin(this, i);
      } else if (auto* error = api.parallel_for(context, begin, total, 0, this)) {
        return error;
      }
      updates.gather();
      const auto part = [](void* data, size_t i) {
        auto& c = *static_cast<Call*>(data);
        const int64_t first = i * c.task, last = std::min(first + c.task, c.weight->rows);
        product<Layout>(*c.weight, c.rows, c.count, first, last, c.y);
        c.updates.up(c.pieces, first, last, c.y);
      };
      return api.parallel_for(context, part, (weight->rows + task - 1) / task, 0, this);
    }
  };
};

OrtStatus* create(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
  int64_t bits = 0;
  Weight w{};
  for (auto [name, out] : {std::pair{"N", &w.rows}, {"K", &w.columns}, {"block_size", &w.block}, {"bits", &bits}})
    if (auto* error = api.attribute(info, name, out)) return error;
  w.bits = static_cast<int>(bits);
  if (w.rows < 1 || w.columns < 1 || (bits != 4 && bits != 8) || w.block < 32 || w.block > 256 || w.block & (w.block - 1))
    return api.status(kInvalidArgument, "BlockProduct: bits must be 4 or 8, block_size 32, 64, 128 or 256, N and K positive");
  w.blocks = (w.columns + w.block - 1) / w.block;
  auto* made = new BlockProduct;
  made->weight = w;
  *kernel = made;
  return nullptr;
}

// What all operators have in common.
OrtCustomOp common() {
  OrtCustomOp op{};
  op.version = kApiVersion;
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return kFloat; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return kRequired; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

OrtCustomOp block_product() {
  OrtCustomOp op = common();
  op.GetName = [](const OrtCustomOp*) { return "BlockProduct"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputs; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) {
    return i == kData || i == kZeros ? kUint8 : i == kA || i == kB ? kFloat16 : kFloat;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return i < 3 ? kRequired : kOptional; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return static_cast<BlockProduct*>(kernel)->compute(context);
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<BlockProduct*>(kernel); };
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

OrtStatus* create_attention(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
  auto* made = new CacheAttention;
  if (auto* error = made->create(info)) {
    delete made;
    return error;
  }
  *kernel = made;
  return nullptr;
}

OrtCustomOp cache_attention() {
  OrtCustomOp op = common();
  op.GetName = [](const OrtCustomOp*) { return "CacheAttention"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return CacheAttention::kInputs; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) { return i == CacheAttention::kLast || i == CacheAttention::kTotal ? kInt32 : kFloat; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i == CacheAttention::kKey || i == CacheAttention::kValue || i > CacheAttention::kTotal ? kOptional : kRequired;
  };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return CacheAttention::kOutputs; };
  op.CreateKernelV2 = create_attention;
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) { return static_cast<CacheAttention*>(kernel)->compute(context); };
  op.KernelDestroy = [](void* kernel) { delete static_cast<CacheAttention*>(kernel); };
  return op;
}

}  // namespace

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  static const OrtCustomOp ops[] = {block_product(), cache_attention()};
  api.table = base->GetApi(kApiVersion);
  if (!api.table) return nullptr;  // an older ONNX Runtime, which then knows no such operator and says so
  OrtCustomOpDomain* domain = nullptr;  // kept as long as the library is
  if (auto* error = api.create_domain("QEfficient", &domain)) return error;
  for (const OrtCustomOp& op : ops)
    if (auto* error = api.add_op(domain, &op)) return error;
  return api.add_domain(options, domain);
}
