#include "csrc/xla_call.h"

#include "csrc/parts.h"
#include "csrc/xla_frame.h"

namespace lopt::xla {
namespace {

constexpr int64_t kFormat = 1;
constexpr int64_t kCallFields = 9, kRealFields = 3, kLeafFields = 17;

// Elements of a tensor, and sizes of its factored axes.
struct Axes {
  int64_t n, d1, d0;
};

// Of the leaf, or of the whole that it is a part of.
Axes axes_of(const Loops& l, const TensorPart* part) {
  int64_t n = l.batch0 * l.x * l.batch1 * l.y * l.batch2, x = l.x, y = l.y;
  if (part) {
    n = whole_elements(*part);
    require(part->x_axis >= 0 && part->x_axis < part->ndim && part->y_axis >= 0 && part->y_axis < part->ndim,
            "a part has no such axis");
    x = part->whole[part->x_axis];
    y = part->whole[part->y_axis];
  }
  return l.x_is_row ? Axes{n, x, y} : Axes{n, y, x};
}

}  // namespace

Call decode(const CallFrame& frame, const CallShape& shape) {
  const Array& numbers = attribute(frame, "call", kS64);
  const Array& reals = attribute(frame, "reals", kF64);
  const Array& sizes = attribute(frame, "sizes", kS64);
  const Array& table = attribute(frame, "leaves", kS64);
  const auto* c = static_cast<const int64_t*>(numbers.data);
  const auto* r = static_cast<const double*>(reals.data);
  require(numbers.size == kCallFields && reals.size == kRealFields && c[0] == kFormat,
          "this call was written for another version of lopt_fast");
  const int64_t thetas = c[1], leaves = c[2], buffers = static_cast<int64_t>(sizes.size);
  require(thetas >= 1 && leaves >= 0 && table.size == static_cast<size_t>(leaves * kLeafFields),
          "the table of leaves has the wrong size");
  const int64_t written = (shape.state ? buffers : 0) + (shape.outputs ? leaves : 0);
  require(frame.operands.size == 2 + thetas + buffers + 2 * leaves + shape.operands &&
              frame.results.size == written + shape.results + (shape.scratch ? 1 : 0),
          "wrong number of operands or results");
  Call call{};
  call.spec = {
      static_cast<int32_t>(c[3]), static_cast<int32_t>(c[4]), r[0], r[1], c[5] != 0, r[2], c[6] != 0};
  call.clip = c[7] != 0;
  call.apply = c[8] != 0;

  auto operand = [&](int64_t i) -> const Buffer& {
    return *static_cast<const Buffer*>(frame.operands.values[i]);
  };
  auto result = [&](int64_t i) -> const Buffer& {
    return *static_cast<const Buffer*>(frame.results.values[i]);
  };

  const Batch batch(operand(2), 1);
  const Buffer& count = batch.check(operand(0), 1);
  const Buffer& scalars = batch.check(operand(1), Call::kScalars);
  require(count.dtype == kS32, "count is not int32");
  real_bytes(scalars);
  call.batch = batch.size;
  call.count = static_cast<const char*>(count.data);
  call.scalars = static_cast<const char*>(scalars.data);
  call.scalar_dtype = scalars.dtype;
  const int64_t meta_parameters = theta_size(call.spec);
  for (int64_t i = 0; i < thetas; ++i) real_bytes(batch.check(operand(2 + i), meta_parameters));
  const int64_t* size_of = static_cast<const int64_t*>(sizes.data);
  const int64_t first_state = 2 + thetas, first_param = first_state + buffers,
                first_grad = first_param + leaves;
  for (int64_t i = 0; i < buffers && shape.state; ++i) {
    const Buffer &from = batch.check(operand(first_state + i), size_of[i]),
                 &to = batch.check(result(i), size_of[i]);
    const size_t bytes = batch.size * size_of[i] * storage_bytes(from);
    require(to.dtype == from.dtype, "state changes its type");
    if (from.data != to.data && bytes > 0) call.copies.push_back({to.data, from.data, bytes});
  }
  if (shape.scratch) {
    const Buffer& scratch = result(written);
    require(scratch.dtype == kU8, "scratch memory is not uint8");
    call.scratch = scratch.data;
    call.scratch_bytes = batch.size * batch.elements(scratch);
  }

  call.tensors.resize(batch.size * leaves);
  for (int64_t leaf = 0; leaf < leaves; ++leaf) {
    const int64_t* f = static_cast<const int64_t*>(table.data) + leaf * kLeafFields;
    const Loops loops{f[0], f[1], f[2], f[3], f[4], f[5] != 0, f[6] != 0};
    const int64_t n = loops.batch0 * loops.x * loops.batch1 * loops.y * loops.batch2;
    const Buffer& param = batch.check(operand(first_param + leaf), n);
    const Buffer& grad = batch.check(operand(first_grad + leaf), n);
    const Buffer& output = shape.outputs ? batch.check(result(buffers + leaf), n) : param;
    const size_t bytes = storage_bytes(param);
    require(grad.dtype == param.dtype && output.dtype == param.dtype,
            "a gradient's type is not its parameter's");
    const int32_t computed = arithmetic(param.dtype);
    int64_t theta = 0;
    while (theta < thetas && operand(2 + theta).dtype != computed) ++theta;
    require(theta < thetas, "no meta-parameters of a parameter's type");

    const Axes whole = axes_of(loops, shape.parts ? &shape.parts[leaf] : nullptr);
    const int64_t row = whole.d0 ? 3 * whole.n / whole.d0 : 0, column = whole.d1 ? 3 * whole.n / whole.d1 : 0;
    const int64_t slot_sizes[5] = {3 * n, n, loops.factored ? row : 3 * n, loops.factored ? column : 0,
                                   call.spec.lagged ? 28 : 0};
    char* slots[5];
    size_t slot_strides[5];
    int32_t averages = computed;
    for (int k = 0; k < 5; ++k) {
      const int64_t slot = f[7 + 2 * k], offset = f[8 + 2 * k];
      slots[k] = nullptr;
      slot_strides[k] = 0;
      if (slot_sizes[k] == 0) continue;
      require(slot >= 0 && slot < buffers && offset >= 0 && offset <= size_of[slot] - slot_sizes[k],
              "a leaf's state lies outside its buffer");
      const Buffer& buffer =
          shape.state ? result(slot) : batch.check(operand(first_state + slot), size_of[slot]);
      if (k == 0 && buffer.dtype == kBF16) averages = kBF16;
      require(buffer.dtype == (k < 2 ? averages : computed), "a leaf's state is of another type");
      slots[k] = static_cast<char*>(buffer.data) + offset * storage_bytes(buffer);
      slot_strides[k] = size_of[slot] * storage_bytes(buffer);
    }

    for (int64_t b = 0; b < batch.size; ++b) {
      auto at = [&](const Buffer& buffer) -> void* {
        return static_cast<char*>(buffer.data) + b * n * bytes;
      };
      auto state = [&](int k) -> void* { return slots[k] ? slots[k] + b * slot_strides[k] : nullptr; };
      const Buffer& weights = operand(2 + theta);
      const char* own_theta =
          static_cast<const char*>(weights.data) + b * meta_parameters * real_bytes(weights);
      call.tensors[b * leaves + leaf] = {loops,    param.dtype, averages, b,        at(param),
                                         at(grad), at(output),  state(0), state(1), state(2),
                                         state(3), state(4),    own_theta};
    }
  }
  return call;
}

PhaseCall decode_phase(const CallFrame& frame, bool scratch) {
  const Array& number = attribute(frame, "phase", kS64);
  require(number.size == 1 && frame.operands.size >= 3 && frame.results.size >= 2,
          "a phase and its operands are needed");
  PhaseCall found{};
  found.phase = PartPhase(*static_cast<const int64_t*>(number.data));
  const auto last = [](const auto& buffers, int64_t from_last) {
    return static_cast<const Buffer*>(buffers.values[buffers.size - from_last]);
  };
  found.begin = last(frame.operands, 3);
  found.factors = last(frame.operands, 2);
  found.squares = last(frame.operands, 1);
  found.new_factors = last(frame.results, 2);
  found.new_squares = last(frame.results, 1);
  const Array& table = attribute(frame, "parts", kS64);
  const auto* numbers = static_cast<const int64_t*>(table.data);
  for (size_t at = 0; at < table.size;) {
    const int64_t* n = numbers + at;
    const int64_t ndim = n[0];
    require(ndim >= 1 && ndim <= 64 && at + 4 + 2 * size_t(ndim) <= table.size,
            "the table of parts has the wrong size");
    found.parts.push_back({int32_t(ndim), n + 4, n + 4 + ndim, nullptr, int32_t(n[1]), int32_t(n[2]), n[3]});
    at += 4 + 2 * size_t(ndim);
    found.axes += ndim;
  }
  const int64_t leaves = int64_t(found.parts.size());

  CallShape shape;
  shape.operands = 3;
  shape.scratch = scratch;
  shape.state = found.phase == PartPhase::apply || found.phase == PartPhase::finish;
  shape.outputs = found.phase == PartPhase::apply;
  shape.parts = found.parts.data();
  shape.results = 2;
  require(attribute(frame, "leaves", kS64).size == size_t(leaves * kLeafFields), "each leaf needs its part");
  found.call = decode(frame, shape);
  require(found.call.batch == 1 && !found.call.clip, "a phase has no batch, and does not clip");
  for (int64_t i = 0; i < leaves; ++i)
    found.sums += part_sums(found.parts[size_t(i)], found.call.tensors[size_t(i)].loops.factored);
  const Batch unbatched(*found.begin, 1);
  require(unbatched.size == 1 && found.begin->dtype == kS32, "begin is batched, or not int32");
  unbatched.check(*found.begin, found.axes);
  for (const Buffer* b : {found.factors, found.new_factors}) unbatched.check(*b, found.sums);
  for (const Buffer* b : {found.squares, found.new_squares}) unbatched.check(*b, leaves * kPartSquares);
  return found;
}

}  // namespace lopt::xla
