// The driver of the operations on GPUs: checks, tiles, scratch memory, tables, and the order of the phases.
#include "csrc/gpu_operations.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/adam/gpu.h"
#include "kernels/element_mlp/gpu.h"
#include "kernels/statistics/gpu.h"

namespace lopt {
namespace {

constexpr int64_t kMost = 0x7fffffff;

int64_t elements(const Loops& l) { return l.batch0 * l.x * l.batch1 * l.y * l.batch2; }

// ---- the network ----

// Columns that show factored moments: what ElementMlp::factored_vectors is about.
bool shows_factored(Group g) { return g >= Group::fac_row; }

int32_t size_of(Group g, const std::array<int32_t, 3>& averages) {
  if (g == Group::m || g == Group::m_rsqrt_rms) return averages[0];
  if (g == Group::rms || g == Group::rsqrt_rms || g == Group::g_rsqrt_rms) return averages[1];
  return g >= Group::fac_g ? averages[2] : 1;
}

int32_t columns_of(const MlpSpec& spec, const std::array<int32_t, 3>& averages) {
  int32_t columns = 0;
  for (Group g : spec.groups) columns += size_of(g, averages);
  return columns;
}

// Units computed: kernels/element_mlp/cuda.cu has these.
int32_t units_of(int32_t hidden_size) { return hidden_size <= 4 ? 4 : hidden_size <= 8 ? 8 : 32; }

GpuMlp mlp_of(const GpuOperation& call) {
  const MlpSpec& spec = *call.spec;
  GpuMlp mlp = {};
  for (int32_t factored = 0; factored < 2; ++factored) {
    std::fill_n(mlp.place[factored], kGroups, -1);
    int32_t column = 0;
    for (Group g : spec.groups) {
      if (factored || spec.factored_vectors || !shows_factored(g)) mlp.place[factored][int(g)] = column;
      column += size_of(g, call.averages);
    }
    mlp.columns = column;
  }
  mlp.hidden_size = spec.hidden_size;
  mlp.units = units_of(spec.hidden_size);
  mlp.hidden_layers = spec.hidden_layers;
  mlp.messages = spec.messages;
  mlp.tanh = spec.tanh;
  mlp.parameter_rms = spec.parameter_rms;
  mlp.multiplied = call.multiplied;
  mlp.step_mult = float(spec.step_mult);
  mlp.exp_mult = float(spec.exp_mult);
  mlp.scale_epsilon = float(spec.scale_epsilon);
  mlp.scale_cap = float(spec.scale_cap);
  mlp.rms_epsilon = float(spec.rms_epsilon);
  mlp.diagonal_momentum_epsilon = float(spec.diagonal_momentum_epsilon);
  mlp.normaliser_epsilon = float(spec.normaliser_epsilon);
  for (int32_t i = 0; i <= spec.hidden_layers; ++i) {
    GpuMlpLayer layer = call.layers[i];
    layer.w_model = layer.inputs * layer.outputs * (layer.w_stride ? call.count : 1);
    layer.b_model = layer.outputs * (layer.b_stride ? call.count : 1);
    mlp.layer[i] = layer;
  }
  return mlp;
}

// ---- checks ----

void require(bool fits, const std::string& what) {
  if (!fits) throw std::invalid_argument(what);
}

void check(const GpuOperation& call) {
  const bool mlp = call.operation == Operation::element_mlp;
  for (int32_t n : call.averages)
    require(n >= 0 && n <= kMostAverages, "more averages than the kernels take");
  require(call.count >= 0 && call.models >= 0 && (call.count == 0 || call.models <= kMost / call.count),
          "too many tensors");
  require(call.operation != Operation::adam || (call.averages[0] == 1 && call.averages[1] == 1),
          "adam has one momentum and one second moment");
  if (mlp) {
    const char* refusal = gpu_mlp_refusal(*call.spec, call.averages);
    require(!refusal, refusal ? refusal : "");
    const MlpSpec& spec = *call.spec;
    for (int32_t i = 0; i <= spec.hidden_layers; ++i) {
      const GpuMlpLayer& layer = call.layers[i];
      require(layer.w && layer.b, "a pointer of a layer is null");
      require(layer.inputs == (i ? spec.hidden_size : columns_of(spec, call.averages)) &&
                  (i < spec.hidden_layers ? layer.outputs == spec.hidden_size
                                          : layer.outputs >= 2 + spec.messages),
              "layer " + std::to_string(i) + " has the wrong size");
    }
  }
  for (int64_t i = 0; i < call.models * call.count; ++i) {
    const GpuOperationTensor& t = call.tensors[i];
    const Loops& l = t.loops;
    const std::string name = "tensor " + std::to_string(i % call.count) + ": ";
    require(l.batch0 >= 0 && l.x >= 0 && l.batch1 >= 0 && l.y >= 0 && l.batch2 >= 0, name + "negative size");
    require(l.factored || (l.batch0 == 1 && l.x == 1 && l.batch1 == 1 && l.batch2 == 1),
            name + "not factored, but more than one axis");
    require(int32_t(t.storage) >= 0 && int32_t(t.storage) <= int32_t(Storage::float16),
            name + "unknown type");
    if (elements(l) == 0) continue;
    require(l.batch0 <= kMost && l.batch1 <= kMost && l.batch2 <= kMost && l.batch0 * l.batch1 <= kMost &&
                l.batch0 * l.batch1 * l.batch2 <= kMost,
            name + "batch axes of 2^31 or more");
    require(t.param && t.grad && (t.output || call.operation == Operation::statistics) &&
                (t.momentum || !call.averages[0]) && (t.second_moment || !call.averages[1]) &&
                (!mlp || !call.averages[2] || (t.row && (t.column || !l.factored))),
            name + "a pointer is null");
  }
}

// ---- tensors ----

int32_t log2_above(int64_t n) {
  int32_t shift = 0;
  while ((int64_t(1) << shift) < n) ++shift;
  return shift;
}

// Cuts a tensor into tiles, by its shape alone: sums never depend on the device. Small ones are cut finer, so
// that there are enough blocks.
void cut(OperationRecord& r) {
  const int64_t tile = r.n >= int64_t(1) << 22 ? 16384 : r.n >= int64_t(1) << 19 ? 8192 : 4096;
  int64_t columns = tile;
  if (r.factored) {  // near 64 columns, more where there are few rows
    const int64_t rows = std::min(int64_t(1) << log2_above(r.x), tile);
    columns = std::clamp<int64_t>(tile / rows, 64, kMostFactoredColumns);
  }
  r.column_shift = std::clamp(log2_above(r.run), 2, log2_above(columns));
  r.rows_per_tile = int32_t(tile >> r.column_shift);
  const int64_t x_tiles = (r.x + r.rows_per_tile - 1) / r.rows_per_tile;
  const int64_t run_tiles = ((r.run - 1) >> r.column_shift) + 1;
  require(x_tiles * run_tiles * r.groups <= kMost, "a tensor is cut into more than 2^31 tiles");
  r.x_tiles = int32_t(x_tiles);
  r.run_tiles = int32_t(run_tiles);
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

OperationRecord record_of(const GpuOperation& call, int64_t index) {
  const GpuOperationTensor& t = call.tensors[index];
  const bool with_axes = call.operation == Operation::element_mlp && call.averages[2] > 0 && t.loops.factored;
  const int64_t n = elements(t.loops);
  const Loops flat = {1, 1, 1, n, 1, true, false}, &l = with_axes ? t.loops : flat;
  OperationRecord r = {};
  r.param = t.param, r.grad = t.grad, r.output = t.output;
  r.momentum = t.momentum, r.second_moment = t.second_moment;
  r.momentum_stride = t.momentum_stride, r.second_moment_stride = t.second_moment_stride;
  const bool x_is_row = !with_axes || l.x_is_row;
  r.x_accumulator = x_is_row ? t.row : t.column, r.y_accumulator = x_is_row ? t.column : t.row;
  r.x_stride = x_is_row ? t.row_stride : t.column_stride;
  r.y_stride = x_is_row ? t.column_stride : t.row_stride;
  r.n = n, r.x = l.x, r.run = l.y * l.batch2;
  r.groups = int32_t(l.batch0 * l.batch1), r.batch1 = int32_t(l.batch1), r.batch2 = int32_t(l.batch2);
  r.model = int32_t(index / call.count), r.tensor = int32_t(index % call.count);
  r.storage = uint8_t(t.storage);
  // The columns of a tensor are those of its rank, whether or not there are factored moments.
  r.factored = with_axes, r.x_is_row = x_is_row;
  if (n == 0) return r;
  cut(r);
  const size_t bytes = t.storage == Storage::float32 ? 16 : 8;
  const auto averages = [](const float* array, int64_t stride, int32_t count) {
    return count == 0 || (aligned(array, 16) && (count == 1 || stride % 4 == 0));
  };
  const int32_t moments = call.operation == Operation::element_mlp ? call.averages[2] : 0;
  r.vector = r.run % 4 == 0 && r.batch2 == 1 && aligned(t.param, bytes) && aligned(t.grad, bytes) &&
             aligned(t.output, bytes) && averages(t.momentum, t.momentum_stride, call.averages[0]) &&
             averages(t.second_moment, t.second_moment_stride, call.averages[1]) &&
             (with_axes ? averages(r.y_accumulator, r.y_stride, moments)
                        : averages(r.x_accumulator, r.x_stride, moments));
  return r;
}

// ---- scratch ----

constexpr int64_t kAlign = 256;

// Places of a tensor's scratch memory from `base` on; returns the end, in bytes.
int64_t place_scratch(OperationRecord& r, const OperationCall& call, Operation operation, char* base,
                      int64_t offset) {
  const auto take = [&](int64_t floats) {
    float* const at = reinterpret_cast<float*>(base + offset);
    offset += (4 * floats + kAlign - 1) / kAlign * kAlign;
    return at;
  };
  const int64_t tiles = tiles_of(r);
  if (r.factored) {
    r.x_sums = take(r.run_tiles * x_places(r));
    r.y_sums = take(r.x_tiles * y_places(r));
    r.row_scales = take(call.factored_moments * batches_of(r));
  }
  if (operation == Operation::element_mlp) {
    r.tile_sums = take(sums_of(call.mlp) * tiles);
    r.network = take(network_layout(call.mlp, call.mlp.units).size);
  } else if (operation == Operation::statistics) {
    r.tile_sums = take(2 * quantities_of(call) * tiles);
  }
  return offset;
}

struct Work {
  OperationCall call;
  std::vector<OperationRecord> records;
  int64_t scratch_bytes;
};

Work prepare(const GpuOperation& call, char* scratch) {
  check(call);
  Work work = {};
  work.call.numbers = call.numbers;
  work.call.found_inf = call.found_inf;
  work.call.results = call.results;
  work.call.numbers_size = gpu_operation_numbers(call);
  work.call.tensors = int32_t(call.count);
  work.call.momenta = call.averages[0];
  work.call.second_moments = call.averages[1];
  work.call.factored_moments = call.averages[2];
  work.call.output = call.output;
  work.call.moved = call.moved;
  if (call.operation == Operation::element_mlp) work.call.mlp = mlp_of(call);
  const int64_t records = call.models * call.count;
  work.records.reserve(size_t(records));
  for (int64_t i = 0; i < records; ++i) {
    work.records.push_back(record_of(call, i));
    work.scratch_bytes =
        place_scratch(work.records.back(), work.call, call.operation, scratch, work.scratch_bytes);
  }
  work.scratch_bytes = std::max(work.scratch_bytes, kAlign);
  return work;
}

// ---- launches ----

int64_t items_of(const OperationRecord& r, OperationPhase phase) {
  const bool axes = r.factored && r.n > 0;
  switch (phase) {
    case OperationPhase::factor_sums:
      return axes ? tiles_of(r) : 0;
    case OperationPhase::move_axes:
      return axes ? axis_items(x_places(r)) + axis_items(y_places(r)) : 0;
    case OperationPhase::row_scales:
      return axes ? batches_of(r) : 0;
    case OperationPhase::fold:
    case OperationPhase::messages:
    case OperationPhase::merge:
      return 1;
    default:
      return tiles_of(r);
  }
}

std::vector<OperationPhase> phases_of(const GpuOperation& call) {
  switch (call.operation) {
    case Operation::adam:
      return {OperationPhase::adam};
    case Operation::statistics:
      return {OperationPhase::spreads, OperationPhase::merge};
    default:
      break;
  }
  std::vector<OperationPhase> phases;
  if (call.averages[2] > 0)
    phases = {OperationPhase::factor_sums, OperationPhase::move_axes, OperationPhase::row_scales};
  phases.insert(phases.end(), {OperationPhase::column_sums, OperationPhase::fold, OperationPhase::apply});
  if (call.spec->messages > 0) phases.push_back(OperationPhase::messages);
  return phases;
}

}  // namespace

const char* gpu_mlp_refusal(const MlpSpec& spec, const std::array<int32_t, 3>& averages) {
  static_assert(kMostGpuHidden == 32 && kMostGpuLayers == 2 && kMostColumns == 43, "as the messages say");
  if (spec.hidden_size < 1 || spec.hidden_size > kMostGpuHidden) return "it takes hidden_size 1 to 32";
  if (spec.hidden_layers < 1 || spec.hidden_layers > kMostGpuLayers) return "it takes 1 or 2 hidden layers";
  if (columns_of(spec, averages) > kMostColumns) return "it takes networks of up to 43 columns";
  if (spec.messages < 0) return "it takes 0 messages or more";
  for (size_t i = 0; i < spec.groups.size(); ++i)
    for (size_t j = 0; j < i; ++j)
      if (spec.groups[i] == spec.groups[j]) return "it takes each group of columns once";
  return nullptr;
}

int64_t gpu_operation_numbers(const GpuOperation& call) {
  const int64_t own = call.operation == Operation::adam ? int64_t(sizeof(GpuAdamScalars) / sizeof(float))
                      : call.operation == Operation::element_mlp && call.multiplied ? 1
                                                                                    : 0;
  return call.averages[0] + call.averages[1] + call.averages[2] + 2 + (2 + own) * call.count;
}

int64_t gpu_operation_scratch_bytes(const GpuOperation& call) { return prepare(call, nullptr).scratch_bytes; }

void gpu_operation(const GpuOperation& call, const GpuDevice& device, void* scratch, void* stream) {
  if (device.abi != kGpuAbi)
    throw std::runtime_error(std::string(device.name) +
                             " was built for another version: reinstall lopt_fast");
  require(scratch && aligned(scratch, kAlign), "scratch is null or not aligned to 256 bytes");
  const Work work = prepare(call, static_cast<char*>(scratch));
  const std::unique_ptr<OperationLaunch> launch(new OperationLaunch());
  launch->call = work.call;
  const std::vector<OperationPhase> phases = phases_of(call);
  const size_t count = work.records.size();
  for (size_t begin = 0; begin < count; begin += kTableRecords) {
    const size_t end = std::min(begin + kTableRecords, count);
    launch->tensors = int32_t(end - begin);
    std::copy(work.records.begin() + int64_t(begin), work.records.begin() + int64_t(end), launch->records);
    for (OperationPhase phase : phases) {
      int64_t items = 0;
      for (size_t i = begin; i < end; ++i) {
        launch->first_item[i - begin] = int32_t(items);
        items += items_of(work.records[i], phase);
        if (items > kMost) throw std::runtime_error("tensors of more than 2^31 tiles in a launch");
      }
      launch->first_item[end - begin] = int32_t(items);
      if (items == 0) continue;
      launch->phase = phase;
      if (const char* error = device.launch_operation(*launch, stream))
        throw std::runtime_error(std::string(device.name) + ": " + error);
    }
  }
}

}  // namespace lopt
