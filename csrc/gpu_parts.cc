// The driver of steps over parts of tensors on a GPU: the phases of csrc/core.h as launches. Work items are
// those of csrc/gpu.cc, one phase of theirs a launch; what lies between them is in
// kernels/small_fc_lopt/gpu_parts.h.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "csrc/gpu_driver.h"
#include "csrc/parts.h"

namespace lopt {
namespace {

using namespace gpu;

// That hand over sums and places of one tensor.
constexpr int64_t kMostBlocks = 256;

// The tensors of the parts as those of an ordinary step.
struct Plain {
  std::vector<GpuTensor> tensors;
  GpuStep step = {};

  explicit Plain(const GpuPartStep& parts) {
    for (int64_t i = 0; i < parts.count; ++i) tensors.push_back(parts.tensors[i].tensor);
    step.spec = parts.spec;
    step.tensors = tensors.data();
    step.count = parts.count;
    step.grad_scale = parts.grad_scale;
    step.variant = parts.variant;
  }
};

void check_parts(const GpuPartStep& step) {
  for (int64_t i = 0; i < step.count; ++i) {
    const auto& [t, part, begin] = step.tensors[i];
    check_part(i, part, t.loops);
    if (t.clip_group >= 0) refuse(i, "a part is in no clip group");
    if (t.step) refuse(i, "a part counts no steps");
    if (whole_elements(part) == 0) continue;
    if (!begin || !t.theta || !step.squares || (t.loops.factored && (!step.factors || !t.row || !t.column)) ||
        (step.spec.lagged && !t.mean_squares))
      refuse(i, "a pointer is null");
    const Loops whole = loops_of(part, part.whole, t.loops);
    if (whole.batch0 > kMost || whole.batch1 > kMost || whole.batch2 > kMost ||
        whole.batch1 * whole.batch2 > kMost ||
        (whole.batch1 > 1 && whole.batch1 * whole.y * whole.batch2 > kMost))
      refuse(i, "batch axes of 2^31 or more, or as many elements in a row of them");
  }
}

// Row and column of the whole tensor: its segments, and one partial sum for each of its places.
TensorRecord whole_record(const TensorRecord& part, const Loops& l) {
  TensorRecord r = part;
  r.x = l.x, r.y = l.y;
  r.batch0 = int32_t(l.batch0), r.batch1 = int32_t(l.batch1), r.batch2 = int32_t(l.batch2);
  r.row_tiles = r.batch0, r.column_tiles = 1;
  r.rows_per_tile = int32_t(std::min(l.x, kMost));
  r.columns_per_tile = int32_t(std::min(l.batch1 * l.y * l.batch2, kMost));
  if (r.factored) {
    r.x_segments = x_axis(r).segments;
    r.y_segments = y_axis(r).segments;
  }
  return r;
}

PartRecord part_record(int64_t index, const GpuPartTensor& t) {
  const TensorPart& part = t.part;
  PartRecord r = {};
  r.begin = t.begin;
  r.copies = part.copies;
  const auto factored = [&](int32_t axis) { return axis == part.x_axis || axis == part.y_axis; };
  for (int32_t axis = 0; axis < part.ndim; ++axis) {
    const bool cut = part.sizes[axis] != part.whole[axis];
    if (axis > 0 && !cut && !factored(axis) && !factored(axis - 1)) {
      const int32_t last = r.axes - 1;
      for (int64_t* size : {r.size, r.whole, r.step}) size[last] *= part.whole[axis];
      continue;
    }
    if (r.axes == kPartAxes) refuse(index, "a part is cut along too many axes: at most 7 can be");
    r.size[r.axes] = part.sizes[axis];
    r.whole[r.axes] = part.whole[axis];
    r.step[r.axes] = 1;
    r.first[r.axes] = uint8_t(axis);
    if (axis == part.x_axis) r.x_axis = r.axes;
    if (axis == part.y_axis) r.y_axis = r.axes;
    r.axes += 1;
  }
  return r;
}

// The tensors that have elements, and where what they need lies in scratch memory; null: its size is asked
// for.
struct Work {
  std::vector<TensorRecord> local, whole, copied;  // copied: `whole` with the copies of the accumulators
  std::vector<PartRecord> parts;
  int64_t sums = 0;  // length of `factors`
  int64_t bytes = kAlign;

  Work(const GpuPartStep& step, int32_t width, float* scratch) {
    int64_t next = 0;  // floats
    const auto take = [&](int64_t floats) {
      const int64_t begin = next;
      next += align(4 * floats) / 4;
      return begin;
    };
    for (int64_t i = 0; i < step.count; ++i) {
      const GpuPartTensor& t = step.tensors[i];
      const Loops& l = t.tensor.loops;
      if (whole_elements(t.part) == 0) continue;
      TensorRecord own = record_of(t.tensor);
      TensorRecord all = whole_record(own, loops_of(t.part, t.part.whole, l));
      if (own.row_tiles) own.scratch = take(scratch_layout(own, width).size);
      all.scratch = take(scratch_layout(all, width).size);
      PartRecord part = l.factored ? part_record(i, t) : PartRecord{};
      part.copies = t.part.copies;
      part.factors = step.factors + sums;
      part.squares = step.squares + i * kPartSquares;
      TensorRecord copy = all;
      if (l.factored) {
        const Matrix m = matrix_of(all);
        const auto accumulators = [&](int64_t places) {
          const int64_t begin = take(kFactored * places);
          return scratch ? scratch + begin : nullptr;
        };
        float *const x = accumulators(m.x_size), *const y = accumulators(m.y_size);
        copy.row = l.x_is_row ? x : y;
        copy.column = l.x_is_row ? y : x;
      }
      sums += part_sums(t.part, l.factored);
      local.push_back(own);
      whole.push_back(all);
      copied.push_back(copy);
      parts.push_back(part);
    }
    bytes = std::max(bytes, 4 * next);
  }
};

// The launches of a phase.
class Launches {
 public:
  Launches(const GpuStep& step, MlpVariant variant, const GpuDevice& device, void* scratch, void* stream)
      : launch_(new GpuLaunch()), device_(device), stream_(stream) {
    open_launch(*launch_, step, variant);
    launch_->step.scratch = static_cast<float*>(scratch);
  }

  int32_t width() const { return launch_->width; }

  // All items of a phase.
  void items(Phase phase, const std::vector<TensorRecord>& records) {
    GpuLaunch& launch = *launch_;
    launch.kind = LaunchKind::items;
    in_tables(records.size(), kTableTensors, [&](size_t begin, int32_t count) {
      launch.tensors = count;
      std::copy_n(records.data() + begin, count, launch.records);
      launch.spans = 0;
      launch.span_first[0] = 0;
      for (int32_t t = 0; t < count; ++t) add_span(launch, t, phase);
      launch.first_item = 0;
      launch.last_item = int32_t(launch.span_first[launch.spans]);
      if (launch.last_item > 0) run();
    });
  }

  // What lies between them.
  void parts(LaunchKind kind, PartPhase phase, const Work& work, const std::vector<TensorRecord>& whole) {
    GpuLaunch& launch = *launch_;
    launch.kind = kind;
    in_tables(whole.size(), kTableParts, [&](size_t begin, int32_t count) {
      PartTable& table = launch.parts;
      launch.tensors = count;
      table.phase = phase;
      table.blocks = 0;
      std::copy_n(work.local.data() + begin, count, table.local);
      std::copy_n(whole.data() + begin, count, table.whole);
      std::copy_n(work.parts.data() + begin, count, table.parts);
      for (int32_t t = 0; t < count; ++t) {
        const Matrix m = matrix_of(table.whole[t]);
        const int64_t places = table.whole[t].factored ? m.x_size + m.y_size : 1;
        const int64_t tiles = int64_t(table.local[t].row_tiles) * table.local[t].column_tiles;
        table.parts[t].first_block = table.blocks;
        table.blocks += int32_t(std::min(divide_up(std::max(places, tiles), kThreads), kMostBlocks));
      }
      run();
    });
  }

  void clear(float* memory, int64_t floats) {
    if (floats > 0) require_ok(device_, device_.clear(memory, size_t(4 * floats), stream_));
  }

 private:
  template <typename F>
  static void in_tables(size_t count, int32_t most, const F& f) {
    for (size_t begin = 0; begin < count; begin += size_t(most))
      f(begin, int32_t(std::min(count - begin, size_t(most))));
  }
  void run() { require_ok(device_, device_.launch(*launch_, stream_)); }

  std::unique_ptr<GpuLaunch> launch_;
  const GpuDevice& device_;
  void* stream_;
};

}  // namespace

int64_t gpu_phase_scratch_bytes(const GpuPartStep& step) {
  const Plain plain(step);
  check(plain.step);
  check_parts(step);
  return Work(step, width_of(step.spec, true), nullptr).bytes;  // enough for every variant
}

void gpu_phase(const GpuPartStep& step, PartPhase phase, const GpuDevice& device, int32_t ordinal,
               void* scratch, void* stream) {
  const Plain plain(step);
  check_phase(step.spec, phase);
  check(plain.step);
  check_parts(step);
  if (step.count == 0) return;
  const GpuProperties properties = open_device(device, ordinal, scratch);
  Launches run(plain.step, variant_of(plain.step, properties), device, scratch, stream);
  const Work work(step, run.width(), static_cast<float*>(scratch));
  const auto between = [&](LaunchKind kind, const std::vector<TensorRecord>& whole) {
    run.parts(kind, phase, work, whole);
  };
  const auto fold = [&](const std::vector<TensorRecord>& whole) {
    between(LaunchKind::take_sums, whole);
    run.items(kAxes, whole);
    run.items(kFold, whole);
    between(LaunchKind::cut_places, whole);
  };
  const auto give = [&](bool factors, bool squares) {
    if (factors) run.clear(step.factors, work.sums);
    if (squares) run.clear(step.squares, step.count * kPartSquares);
    between(LaunchKind::give_sums, work.whole);
  };
  switch (phase) {
    case PartPhase::factor_sums:
      run.items(kFactorSums, work.local);
      return give(true, false);
    case PartPhase::feature_sums:
      fold(work.copied);
      run.items(kFeatureSums, work.local);
      return give(false, true);
    case PartPhase::apply:
      fold(work.whole);
      run.items(kNetwork, work.local);
      run.items(kApply, work.local);
      if (step.spec.lagged) give(true, true);
      return;
    case PartPhase::finish:
      between(LaunchKind::take_sums, work.whole);
      return run.items(kFinish, work.whole);
  }
}

}  // namespace lopt
