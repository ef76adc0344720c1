// The driver of a step on a GPU: checks, tiles, scratch memory, tables, and the order of the work items.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/gpu_driver.h"

namespace lopt {
namespace gpu {
namespace {

int64_t elements(const Loops& l) { return l.batch0 * l.x * l.batch1 * l.y * l.batch2; }

// ---- checks ----

void check_scalar(const DeviceScalar& s, const std::string& name) {
  if (s.device && (int32_t(s.type) < 0 || int32_t(s.type) >= kHostScalar))
    throw std::invalid_argument(name + ": unknown type of a number on the device");
}

bool known(Storage s) { return int32_t(s) >= 0 && int32_t(s) <= int32_t(Storage::float16); }

}  // namespace

void refuse(int64_t index, const std::string& why) {
  throw std::invalid_argument("tensor " + std::to_string(index) + ": " + why);
}

void check(const GpuStep& step) {
  const Spec& spec = step.spec;
  if (spec.hidden_size < 2 || spec.hidden_size > 64)
    throw std::invalid_argument("hidden_size " + std::to_string(spec.hidden_size) +
                                " is not in 2..64: the GPU kernels know no other");
  if (int32_t(step.variant) < 0 || int32_t(step.variant) > int32_t(MlpVariant::matmul_bfloat16))
    throw std::invalid_argument("unknown variant of the network");
  if (spec.hidden_layers != 1 && spec.hidden_layers != 2)
    throw std::invalid_argument("hidden_layers " + std::to_string(spec.hidden_layers) + " is not 1 or 2");
  check_scalar(step.grad_scale, "grad_scale");
  if (step.clip_groups < 0 || (step.clip_groups > 0 && !step.max_norms))
    throw std::invalid_argument("clip_groups without max_norms");
  for (int32_t g = 0; g < step.clip_groups; ++g) check_scalar(step.max_norms[g], "max_norm");
  for (int64_t i = 0; i < step.count; ++i) {
    const GpuTensor& t = step.tensors[i];
    const Loops& l = t.loops;
    if (l.batch0 < 0 || l.x < 0 || l.batch1 < 0 || l.y < 0 || l.batch2 < 0) refuse(i, "negative size");
    if (!l.factored && (l.batch0 != 1 || l.x != 1 || l.batch1 != 1 || l.batch2 != 1))
      refuse(i, "not factored, but more than one axis");
    if (!known(t.parameter) || !known(t.gradient) ||
        (t.state != Storage::float32 && t.state != Storage::bfloat16))
      refuse(i, "parameters and gradients are float32, bfloat16 or float16, state float32 or bfloat16");
    if (t.clip_group >= step.clip_groups) refuse(i, "clip group out of range");
    check_scalar(t.lr, "lr");
    check_scalar(t.weight_decay, "weight_decay");
    check_scalar(t.t, "t");
    if (elements(l) == 0) continue;
    if (l.batch0 > kMost || l.batch1 > kMost || l.batch2 > kMost || l.batch1 * l.batch2 > kMost)
      refuse(i, "batch axes of 2^31 or more");
    if (!t.param || !t.grad || !t.output || !t.momentum || !t.second_moment || !t.row ||
        (l.factored && !t.column) || (spec.lagged && !t.mean_squares) || !t.theta)
      refuse(i, "a pointer is null");
    if (t.momentum_stride != 0 && t.momentum_stride < elements(l)) refuse(i, "momenta overlap");
  }
}

// ---- tensors ----

namespace {

Scalar scalar_of(const DeviceScalar& s, uint8_t* type) {
  Scalar out = {0};
  if (s.device) {
    *type = uint8_t(s.type);
    out.bits = uint64_t(reinterpret_cast<uintptr_t>(s.device));
  } else {
    *type = kHostScalar;
    std::memcpy(&out.bits, &s.value, sizeof out.bits);
  }
  return out;
}

int64_t power_above(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// Cuts a tensor into tiles, by its shape alone: sums never depend on the device.
//
// Why 4,096 elements up to 4 M of them (estimates for an H200, 264 blocks with 18 GB/s each; nothing is
// measured): an item takes about 2 us beside its bytes; those of a tile take 5.4 us in pass 2 and
// 10 us in pass 3. Tiles twice as large would save 1 us for each of these, and pass 2 of a tensor, which pass
// 3 waits for, would end 5 us later, with nothing but pass 1 of the next to fill that. Pass 1 alone reads so
// little (16 KB, 0.9 us) that its items take several tiles: kFactorTiles.
void cut(TensorRecord& r) {
  const Matrix m = matrix_of(r);
  const int64_t n = m.rows * m.columns;
  if (n == 0) return;  // no tiles
  const int64_t tile = std::clamp<int64_t>(power_above(divide_up(n, 1024)), 4096, 32768);
  int64_t columns, rows;
  if (r.batch0 > 1 && r.x * m.columns * 2 <= tile) {  // several batches
    columns = m.columns;
    rows = std::min<int64_t>(tile / (r.x * m.columns), r.batch0) * r.x;
  } else {
    // Whole warps beside each other; wide enough that the sums of its rows are few, and that few rows fill
    // it.
    int64_t least = std::max<int64_t>(128, 32 * int64_t(r.batch2));
    least = std::max(least, tile / std::max<int64_t>(r.x, 1));
    least = least <= 1024 ? power_above(least) : divide_up(least, 1024) * 1024;
    columns = std::min(least, m.columns);
    rows = std::clamp<int64_t>(tile / columns, 1, std::min(r.x, most_rows(columns)));
  }
  const int64_t column_tiles = divide_up(m.columns, columns);
  const int64_t row_tiles = rows > r.x ? divide_up(m.rows, rows) : int64_t(r.batch0) * divide_up(r.x, rows);
  if (columns > kMost || row_tiles * column_tiles > kMost / 2)
    throw std::invalid_argument("a tensor is cut into more than 2^30 tiles");
  r.columns_per_tile = int32_t(columns);
  r.rows_per_tile = int32_t(rows);
  r.column_tiles = int32_t(column_tiles);
  r.row_tiles = int32_t(row_tiles);
  if (r.factored) {
    r.x_segments = x_axis(r).segments;
    r.y_segments = y_axis(r).segments;
  }
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
size_t size_of(Storage s) { return s == Storage::float32 ? 4 : 2; }

}  // namespace

TensorRecord record_of(const GpuTensor& t) {
  TensorRecord r = {};
  const Loops& l = t.loops;
  r.param = t.param, r.grad = t.grad, r.output = t.output;
  r.momentum = t.momentum, r.second_moment = t.second_moment;
  r.row = t.row, r.column = t.column, r.mean_squares = t.mean_squares;
  r.theta = t.theta;
  r.lr = scalar_of(t.lr, &r.lr_type);
  r.weight_decay = scalar_of(t.weight_decay, &r.weight_decay_type);
  r.t = scalar_of(t.t, &r.t_type);
  r.step = t.step;
  r.momentum_stride = t.momentum_stride ? t.momentum_stride : elements(l);
  r.x = l.x, r.y = l.y;
  r.batch0 = int32_t(l.batch0), r.batch1 = int32_t(l.batch1), r.batch2 = int32_t(l.batch2);
  r.clip_group = t.clip_group;
  r.parameter = uint8_t(t.parameter), r.gradient = uint8_t(t.gradient), r.state = uint8_t(t.state);
  r.factored = l.factored, r.x_is_row = l.x_is_row, r.apply = t.apply;
  if (elements(l) == 0) {
    r.clip_group = -1;
    return r;
  }
  cut(r);
  r.vector = !several(r) && l.batch1 * l.y * l.batch2 % 4 == 0 && r.momentum_stride % 4 == 0 &&
             r.columns_per_tile % 4 == 0 && aligned(t.param, 4 * size_of(t.parameter)) &&
             aligned(t.output, 4 * size_of(t.parameter)) && aligned(t.grad, 4 * size_of(t.gradient)) &&
             aligned(t.momentum, 4 * size_of(t.state)) && aligned(t.second_moment, 4 * size_of(t.state)) &&
             (l.factored || aligned(t.row, 16));
  return r;
}

// ---- scratch: clip factors, clip sums, items done, tickets, then each tensor's own ----

namespace {

struct Layout {
  int64_t clip_factors, clip_sums, counters, counter_bytes, tensors, size;
};

struct Work {
  std::vector<TensorRecord> records;
  std::vector<int32_t> groups;  // tiles of each clip group, then where its sums end
  Layout at;
  int32_t width;
};

// Width from which on `automatic` takes the tensor cores: wider than any. They are predicted to be faster
// from 16 on (kernels/small_fc_lopt/GPU.md), but nothing is measured.
constexpr int32_t kMatmulFrom = 128;

// Tensor cores know tf32 and bfloat16 from compute capability 8.0 on. Networks of 64 units take up to 137 KiB
// of shared memory: 8.6, 8.9 and 12.x have 99 KiB for a block, all others 163 KiB or more.
bool has_matmul(int32_t capability, int64_t width) {
  const bool small = capability == 86 || capability == 89 || capability >= 120;
  return capability >= 80 && !(small && width > 32);
}

}  // namespace

MlpVariant variant_of(const GpuStep& step, const GpuProperties& properties) {
  const int64_t width = power_above(step.spec.hidden_size);
  const bool can = has_matmul(properties.compute_capability, width);
  if (step.variant == MlpVariant::automatic)
    return can && width >= kMatmulFrom ? MlpVariant::matmul : MlpVariant::elementwise;
  if (step.variant != MlpVariant::elementwise && !can)
    throw std::invalid_argument(
        "the network on tensor cores needs compute capability 8.0 and, from 33 hidden units on, more than "
        "99 KiB of shared memory for a block: choose elementwise");
  return step.variant;
}

// Tensor cores take eight units at a time.
int32_t width_of(const Spec& spec, bool matmul) {
  return std::max(int32_t(power_above(spec.hidden_size)), matmul ? 8 : 2);
}

namespace {

Work prepare(const GpuStep& step, int32_t width) {
  Work w;
  w.width = width;
  w.records.reserve(size_t(step.count));
  for (int64_t i = 0; i < step.count; ++i) w.records.push_back(record_of(step.tensors[i]));
  // Sums of a clip group lie together, tensor by tensor.
  int32_t sums = 0;
  for (int32_t g = 0; g < step.clip_groups; ++g) {
    for (TensorRecord& r : w.records)
      if (r.clip_group == g) {
        r.clip_tile = sums;
        sums += r.row_tiles * r.column_tiles;
      }
    w.groups.push_back(sums);
  }
  int64_t bytes = 0;
  w.at.clip_factors = bytes, bytes += align(8 * int64_t(step.clip_groups));
  w.at.clip_sums = bytes, bytes += align(8 * int64_t(sums));
  // A ticket for each table (of one tensor at least).
  w.at.counters = bytes;
  w.at.counter_bytes = align(4 * (kPhases + 1) * int64_t(w.records.size()));
  bytes += w.at.counter_bytes;
  w.at.tensors = bytes;
  for (TensorRecord& r : w.records) {
    r.scratch = (bytes - w.at.tensors) / 4;
    if (r.row_tiles) bytes += align(4 * scratch_layout(r, w.width).size);
  }
  w.at.size = std::max<int64_t>(bytes, kAlign);
  return w;
}

// ---- order ----

// Tensors whose passes follow each other closely enough that the later ones find their bytes in the cache.
struct Chunk {
  int32_t begin, end;
};

}  // namespace

bool add_span(GpuLaunch& launch, int32_t tensor, int32_t phase) {
  const int32_t items = items_of(launch.records[tensor], phase, launch.step.lagged);
  if (!items) return true;
  if (items == 1 && launch.spans > 0) {
    uint16_t& last = launch.span_what[launch.spans - 1];
    uint32_t& end = launch.span_first[launch.spans];
    const int32_t what = last % kOneEach, length = int32_t(end - launch.span_first[launch.spans - 1]);
    const bool one_each = length == 1 || last & kOneEach;
    if (one_each && what % kPhases == phase && what / kPhases + length == tensor) {
      last |= kOneEach;
      end += 1;
      return true;
    }
  }
  if (launch.spans == kTableSpans) return false;
  launch.span_what[launch.spans] = uint16_t(tensor * kPhases + phase);
  launch.span_first[launch.spans + 1] = launch.span_first[launch.spans] + uint32_t(items);
  launch.spans += 1;
  return true;
}

namespace {

int64_t item_count(const TensorRecord& r, bool lagged) {
  int64_t items = 0;
  for (int32_t phase = kFactorSums; phase < kPhases; ++phase) items += items_of(r, phase, lagged);
  return items;
}

// The order of a single launch. Each stage takes one more chunk of tensors into pass 1 and works on those of
// the stages before: what an item waits for lies back as far as possible. Whether there is room for it.
bool pipeline(GpuLaunch& launch, const std::vector<Chunk>& chunks) {
  struct Slot {
    int32_t phase, delay;
  };
  // Between passes 2 and 3 of a chunk there is only pass 1 (4 of 28 bytes read), so that pass 3 finds in the
  // cache what pass 2 has read. One block waits for the end of pass 2 and computes the network meanwhile.
  static constexpr Slot kExact[] = {{kFold, 1},  {kNetwork, 2}, {kFactorSums, 0},
                                    {kApply, 2}, {kAxes, 0},    {kFeatureSums, 1}};
  // Nothing but the first step has passes 1 and 2: pass 3 of other chunks lies between any two phases.
  static constexpr Slot kLagged[] = {{kFactorSums, 0}, {kAxes, 1},  {kFold, 2},  {kFeatureSums, 3},
                                     {kNetwork, 4},    {kApply, 5}, {kFinish, 6}};
  const Slot* slots = launch.step.lagged ? kLagged : kExact;
  const int count = launch.step.lagged ? int(std::size(kLagged)) : int(std::size(kExact));
  const int32_t stages = int32_t(chunks.size()) + 6;
  for (int32_t stage = 0; stage < stages; ++stage)
    for (int i = 0; i < count; ++i) {
      const int32_t c = stage - slots[i].delay;
      if (c < 0 || c >= int32_t(chunks.size())) continue;
      for (int32_t t = chunks[size_t(c)].begin; t < chunks[size_t(c)].end; ++t)
        if (!add_span(launch, t, slots[i].phase)) return false;
    }
  return true;
}

std::vector<Chunk> chunks_of(const GpuLaunch& launch, int64_t l2_bytes) {
  // Three chunks are under way. A tensor that is larger is a chunk of its own.
  const int64_t most = std::max<int64_t>(l2_bytes / 4, 1);
  std::vector<Chunk> chunks;
  int64_t bytes = 0;
  for (int32_t t = 0; t < launch.tensors; ++t) {
    const Matrix m = matrix_of(launch.records[t]);
    const int64_t own = m.rows * m.columns * 24;
    if (chunks.empty() || bytes + own > most) {
      chunks.push_back({t, t});
      bytes = 0;
    }
    chunks.back().end = t + 1;
    bytes += own;
  }
  return chunks;
}

}  // namespace

void require_ok(const GpuDevice& device, const char* error) {
  if (error) throw std::runtime_error(std::string(device.name) + ": " + error);
}

GpuProperties open_device(const GpuDevice& device, int32_t ordinal, const void* scratch) {
  if (device.abi != kGpuAbi)
    throw std::runtime_error(std::string(device.name) +
                             " was built for another version: reinstall lopt_fast");
  if (!scratch || !aligned(scratch, kAlign))
    throw std::invalid_argument("scratch is null or not aligned to 256 bytes");
  GpuProperties properties = {};
  require_ok(device, device.properties(ordinal, &properties));
  return properties;
}

void open_launch(GpuLaunch& launch, const GpuStep& step, MlpVariant variant) {
  const Spec& spec = step.spec;
  launch.width = width_of(spec, variant != MlpVariant::elementwise);
  launch.variant = variant;
  launch.step.hidden_size = spec.hidden_size;
  launch.step.hidden_layers = spec.hidden_layers;
  launch.step.lagged = spec.lagged;
  launch.step.parameter_rms = spec.parameter_rms;
  launch.step.divide = step.divide;
  uint8_t type;
  launch.step.grad_scale = scalar_of(step.grad_scale, &type);
  launch.step.grad_scale_type = type;
  launch.step.step_mult = spec.step_mult;
  launch.step.exp_mult = spec.exp_mult;
  launch.step.scale_epsilon = spec.scale_epsilon;
  launch.step.found_inf = step.found_inf;
}

}  // namespace gpu

using namespace gpu;

int64_t gpu_scratch_bytes(const GpuStep& step) {
  check(step);
  return prepare(step, width_of(step.spec, true)).at.size;  // enough for every variant
}

void gpu_step(const GpuStep& step, const GpuDevice& device, int32_t ordinal, void* scratch, void* stream) {
  check(step);
  if (step.count == 0) return;
  const GpuProperties properties = open_device(device, ordinal, scratch);
  const std::unique_ptr<GpuLaunch> memory(new GpuLaunch());
  GpuLaunch& launch = *memory;
  open_launch(launch, step, variant_of(step, properties));
  Work work = prepare(step, launch.width);
  char* const base = static_cast<char*>(scratch);
  // Some phases alone come after a whole step: what they need is done.
  if (!step.phases)
    require_ok(device, device.clear(base + work.at.counters, size_t(work.at.counter_bytes), stream));
  const Spec& spec = step.spec;
  const auto run = [&] { require_ok(device, device.launch(launch, stream)); };
  launch.step.scratch = reinterpret_cast<float*>(base + work.at.tensors);
  launch.step.clip_sums = reinterpret_cast<double*>(base + work.at.clip_sums);
  launch.step.clip_factors = reinterpret_cast<double*>(base + work.at.clip_factors);
  int32_t* const done = reinterpret_cast<int32_t*>(base + work.at.counters);
  int32_t* ticket = done + int64_t(kPhases) * int64_t(work.records.size());
  const int32_t count = int32_t(work.records.size());

  const auto open = [&](int32_t begin, int32_t end) {
    launch.tensors = end - begin;
    std::copy(work.records.begin() + begin, work.records.begin() + end, launch.records);
    launch.step.done = done + int64_t(kPhases) * begin;
    launch.spans = 0;
    launch.span_first[0] = 0;
  };
  const auto run_items = [&](uint32_t first, uint32_t last) {
    if (first == last) return;
    launch.first_item = int32_t(first);
    launch.last_item = int32_t(last);
    run();
  };

  if (!work.groups.empty() && work.groups.back() > 0) {
    launch.kind = LaunchKind::items;
    launch.step.wait = false;
    for (int32_t begin = 0; begin < count; begin += kTableTensors) {
      open(begin, std::min(count, begin + kTableTensors));
      for (int32_t t = 0; t < launch.tensors; ++t) add_span(launch, t, kClipSums);
      run_items(0, launch.span_first[launch.spans]);
    }
    launch.kind = LaunchKind::clip_total;
    for (int32_t begin = 0; begin < step.clip_groups; begin += kTableGroups) {
      launch.tensors = std::min(step.clip_groups - begin, kTableGroups);
      for (int32_t i = 0; i < launch.tensors; ++i) {
        const int32_t g = begin + i;
        ClipRecord& record = launch.groups[i];
        uint8_t type;
        record.max_norm = scalar_of(step.max_norms[g], &type);
        record.type = type;
        record.group = g;
        record.begin = g ? work.groups[size_t(g) - 1] : 0;
        record.end = work.groups[size_t(g)];
      }
      run();
    }
  }

  // Tables: as many tensors as fit one launch. First come those of one tile: between large ones they would be
  // stages of their own, too short to hide what the next ones wait for.
  const auto small = [](const TensorRecord& r) { return r.row_tiles * r.column_tiles <= 1; };
  const auto fits = [&](int32_t begin, int32_t end) {
    int64_t items = 0;
    for (int32_t i = begin; i < end; ++i) items += item_count(work.records[size_t(i)], spec.lagged);
    std::stable_partition(work.records.begin() + begin, work.records.begin() + end, small);
    open(begin, end);
    return items <= kMost && pipeline(launch, chunks_of(launch, properties.l2_bytes));
  };
  launch.kind = LaunchKind::items;
  launch.step.wait = step.schedule != GpuSchedule::phased;
  for (int32_t begin = 0, end; begin < count; begin = end) {
    end = std::min(count, begin + kTableTensors);
    while (!fits(begin, end) && end - begin > 1) end -= (end - begin + 7) / 8;
    launch.step.ticket = ticket++;
    if (launch.step.wait) {
      run_items(0, launch.span_first[launch.spans]);
      continue;
    }
    open(begin, end);
    for (int32_t phase = kFactorSums; phase < kPhases; ++phase) {
      if (step.phases && !(step.phases >> phase & 1)) continue;
      const int32_t first = launch.spans;
      for (int32_t t = 0; t < launch.tensors; ++t) add_span(launch, t, phase);
      run_items(launch.span_first[first], launch.span_first[launch.spans]);
    }
  }

  if (step.phases) return;  // not a step
  // Step counters go last: tensors may share the number that they read.
  launch.kind = LaunchKind::count;
  for (int32_t begin = 0; begin < count; begin += kTableTensors) {
    open(begin, std::min(count, begin + kTableTensors));
    const auto counts = [](const TensorRecord& r) { return r.step != nullptr; };
    if (std::any_of(launch.records, launch.records + launch.tensors, counts)) run();
  }
}

}  // namespace lopt
