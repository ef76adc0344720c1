#include "csrc/xla_operations.h"

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "csrc/operations.h"
#include "csrc/xla_frame.h"
#include "csrc/xla_threads.h"
#include "kernels/element_mlp/kernel.h"

namespace lopt {
namespace {

using xla::Buffer;
using xla::CallFrame;
using xla::require;

constexpr int64_t kFormat = 2;  // of the attributes
constexpr int64_t kCallFields = 7, kTensorFields = 8, kSpecFields = 8, kRealFields = 7, kLayerFields = 4;

const Buffer& operand(const CallFrame& frame, int64_t i) {
  require(i < frame.operands.size, "too few operands");
  return *static_cast<const Buffer*>(frame.operands.values[i]);
}

const Buffer& result(const CallFrame& frame, int64_t i) {
  require(i < frame.results.size, "too few results");
  return *static_cast<const Buffer*>(frame.results.values[i]);
}

const int64_t* integers(const CallFrame& frame, const char* name, int64_t size) {
  const xla::Array& array = xla::attribute(frame, name, xla::kS64);
  require(static_cast<int64_t>(array.size) == size, "an attribute has the wrong size");
  return static_cast<const int64_t*>(array.data);
}

std::vector<double> as_doubles(const Buffer& buffer, int64_t count) {
  std::vector<double> values(static_cast<size_t>(count));
  const size_t bytes = xla::real_bytes(buffer);
  for (int64_t i = 0; i < count; ++i)
    values[size_t(i)] = xla::real_at(static_cast<const char*>(buffer.data) + size_t(i) * bytes, buffer.dtype);
  return values;
}

void write_doubles(const Buffer& buffer, const std::vector<double>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (xla::real_bytes(buffer) == sizeof(double))
      static_cast<double*>(buffer.data)[i] = values[i];
    else
      static_cast<float*>(buffer.data)[i] = static_cast<float>(values[i]);
  }
}

// What the calls of all operations have in common. `extra` numbers belong to each tensor of the operation,
// `weights` operands lie before the tensors. `writes`: it has outputs and new averages.
class Call {
 public:
  Call(const CallFrame& frame, int64_t extra, int64_t weights, bool writes)
      : frame_(frame),
        header_(integers(frame, "call", kCallFields)),
        batch_(operand(frame, 0), 1),
        extra_(extra) {
    require(header_[0] == kFormat, "this call was written for another version of lopt_fast");
    const int64_t most = int64_t(kMostAverages);
    require(count() >= 0 && header_[2] >= 0 && header_[3] >= 0 && header_[4] >= 0 && header_[2] <= most &&
                header_[3] <= most && header_[4] <= most && header_[5] >= 0 && header_[5] <= 2,
            "a number of the call is out of range");
    width_ = averages_count() + 2 + (2 + extra) * count();
    numbers_ = as_doubles(batch_.check(operand(frame, 0), width_), batch_.size * width_);
    read_tensors(1 + weights, writes);
  }

  int64_t count() const { return header_[1]; }
  int64_t models() const { return batch_.size; }
  int64_t mode() const { return header_[5]; }
  // Of adam: whether there are statistics. Of statistics: whether there are columns.
  bool has_more() const { return header_[6] != 0; }
  const xla::Batch& batch() const { return batch_; }
  // Tensors of a model.
  const OperationTensor* tensors(int64_t model) const { return tensors_.data() + model * count(); }
  // Numbers of the operation's own.
  const double* extra(int64_t model) const { return numbers(model) + averages_count() + 2 + 2 * count(); }

  // How many, without rates.
  Averages counts() const {
    const auto zeros = [](int64_t count) { return std::vector<double>(static_cast<size_t>(count)); };
    return {zeros(header_[2]), zeros(header_[3]), zeros(header_[4])};
  }
  Averages averages(int64_t model) const {
    const double *momentum = numbers(model), *second = momentum + header_[2], *factored = second + header_[3];
    return {{momentum, second}, {second, factored}, {factored, factored + header_[4]}};
  }
  GradientRule rule(int64_t model) const {
    const double* rule = numbers(model) + averages_count();
    return {rule[0], rule[1]};
  }
  // The result behind those of the tensors, which are all that there are if nothing is to follow.
  const Buffer& last_result(int64_t elements) const {
    require(frame_.results.size == results_ + 1, "wrong number of results");
    return batch_.check(result(frame_, results_), elements);
  }
  void require_no_more_results() const {
    require(frame_.results.size == results_, "wrong number of results");
  }

  // f(model, pool) for each model of the batch, after state that XLA has not aliased has been copied.
  template <typename F>
  void run(const F& f) const {
    for (const Copy& copy : copies_) std::memcpy(copy.to, copy.from, copy.bytes);
    xla::Threads threads(frame_);
    struct Context {
      const F& f;
      Pool pool;
    } context{f, threads.pool()};
    context.pool.run(
        context.pool.context, models(),
        [](void* argument, int64_t model) {
          const Context& c = *static_cast<const Context*>(argument);
          c.f(model, c.pool);
        },
        &context);
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };

  int64_t averages_count() const { return header_[2] + header_[3] + header_[4]; }
  const double* numbers(int64_t model) const { return numbers_.data() + model * width_; }

  void read_tensors(int64_t next, bool writes) {
    const int64_t* table = integers(frame_, "tensors", count() * kTensorFields);
    tensors_.resize(static_cast<size_t>(models() * count()));
    for (int64_t i = 0; i < count(); ++i) {
      const int64_t* f = table + i * kTensorFields;
      const Loops loops{f[0], f[1], f[2], f[3], f[4], f[5] != 0, f[6] != 0};
      const int64_t n = loops.batch0 * loops.x * loops.batch1 * loops.y * loops.batch2;
      const Buffer& param = batch_.check(operand(frame_, next++), n);
      const size_t bytes = xla::real_bytes(param);
      const auto same_type = [&](const Buffer& buffer, int64_t elements) -> const Buffer& {
        require(buffer.dtype == param.dtype, "an array of a tensor is of another type than the parameter");
        return batch_.check(buffer, elements);
      };
      const Buffer& grad = same_type(operand(frame_, next++), n);
      const Buffer* output = writes ? &same_type(result(frame_, results_++), n) : nullptr;

      // Of momentum, second moment, row and column: how many, and elements of each.
      const int64_t d1 = loops.x_is_row ? loops.x : loops.y, d0 = loops.x_is_row ? loops.y : loops.x;
      const int64_t row = !loops.factored ? n : d0 ? n / d0 : 0, column = loops.factored && d1 ? n / d1 : 0;
      const int64_t counts[4] = {header_[2], header_[3], header_[4], loops.factored ? header_[4] : 0};
      const int64_t sizes[4] = {n, n, row, column};
      char* state[4] = {};
      for (int k = 0; k < 4; ++k) {
        if (counts[k] == 0) continue;
        const int64_t elements = counts[k] * sizes[k];
        const Buffer& from = same_type(operand(frame_, next++), elements);
        const Buffer& to = writes ? same_type(result(frame_, results_++), elements) : from;
        const size_t total = size_t(models() * elements) * bytes;
        if (from.data != to.data && total > 0) copies_.push_back({to.data, from.data, total});
        state[k] = static_cast<char*>(to.data);
      }

      for (int64_t m = 0; m < models(); ++m) {
        const auto at = [&](void* data, int64_t elements) -> void* {
          return data ? static_cast<char*>(data) + size_t(m * elements) * bytes : nullptr;
        };
        const double* rates = numbers(m) + averages_count() + 2;
        tensors_[size_t(m * count() + i)] = {param.dtype == xla::kF64 ? Dtype::float64 : Dtype::float32,
                                             loops,
                                             at(param.data, n),
                                             at(grad.data, n),
                                             output ? at(output->data, n) : nullptr,
                                             at(state[0], counts[0] * n),
                                             at(state[1], counts[1] * n),
                                             at(state[2], counts[2] * row),
                                             at(state[3], counts[3] * column),
                                             n,
                                             n,
                                             row,
                                             column,
                                             f[7],
                                             rates[i],
                                             rates[count() + i]};
      }
    }
    require(next == frame_.operands.size, "too many operands");
  }

  const CallFrame& frame_;
  const int64_t* header_;
  xla::Batch batch_;
  int64_t extra_, width_ = 0, results_ = 0;
  std::vector<double> numbers_;
  std::vector<OperationTensor> tensors_;
  std::vector<Copy> copies_;
};

// The numbers that an operation returns beside tensors: (models, tensors, size), the last result if there are
// any.
class Rows {
 public:
  Rows(const Call& call, int64_t size)
      : size_(call.count() * size), found_(static_cast<size_t>(call.models() * size_)) {
    if (size_)
      to_ = &call.last_result(size_);
    else
      call.require_no_more_results();
  }
  // Null where there are none.
  double* of(int64_t model) { return size_ ? found_.data() + model * size_ : nullptr; }
  void write() const {
    if (to_) write_doubles(*to_, found_);
  }

 private:
  int64_t size_;
  std::vector<double> found_;
  const Buffer* to_ = nullptr;
};

Output output_of(const Call& call) { return static_cast<Output>(call.mode()); }

// ---- element_mlp ----

MlpSpec spec_of(const CallFrame& frame) {
  const int64_t* s = integers(frame, "spec", kSpecFields);
  const xla::Array &reals = xla::attribute(frame, "reals", xla::kF64),
                   &names = xla::attribute(frame, "groups", xla::kU8);
  require(static_cast<int64_t>(reals.size) == kRealFields, "an attribute has the wrong size");
  const auto* r = static_cast<const double*>(reals.data);
  MlpSpec spec{{},   int32_t(s[0]), int32_t(s[1]), int32_t(s[2]), r[0], r[1], s[3] != 0,
               r[2], r[3],          s[4] != 0,     r[4],          r[5], r[6], s[5] != 0};
  std::string name;
  for (size_t i = 0; i < names.size; ++i) {
    const char c = static_cast<const char*>(names.data)[i];
    if (c != ' ') {
      name += c;
      continue;
    }
    spec.groups.push_back(group_of(name));
    name.clear();
  }
  require(spec.hidden_layers >= 1 && spec.hidden_layers <= kMostLayers && spec.messages >= 0,
          "a number of the specification is out of range");
  return spec;
}

// A layer of all models of the batch.
struct Layer {
  int64_t inputs, outputs;
  int64_t w_stride, b_stride;  // from one tensor to the next
  int64_t w_size, b_size;      // of a model
  std::vector<double> w, b;

  MlpLayer of(int64_t model) const {
    return {w.data() + model * w_size, b.data() + model * b_size, inputs, outputs, w_stride, b_stride};
  }
};

std::vector<Layer> layers_of(const CallFrame& frame, const MlpSpec& spec, const Call& call) {
  const int64_t layers = spec.hidden_layers + 1;
  const int64_t* table = integers(frame, "layers", layers * kLayerFields);
  std::vector<Layer> found;
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t *f = table + i * kLayerFields, numbers = f[0] * f[1];
    const int64_t w_size = numbers * (f[2] ? call.count() : 1), b_size = f[1] * (f[3] ? call.count() : 1);
    const Buffer &w = call.batch().check(operand(frame, 1 + 2 * i), w_size),
                 &b = call.batch().check(operand(frame, 2 + 2 * i), b_size);
    found.push_back({f[0], f[1], f[2] ? numbers : 0, f[3] ? f[1] : 0, w_size, b_size,
                     as_doubles(w, call.models() * w_size), as_doubles(b, call.models() * b_size)});
  }
  return found;
}

void run_element_mlp(const CallFrame& frame) {
  const MlpSpec spec = spec_of(frame);
  const bool multiplied = integers(frame, "spec", kSpecFields)[6] != 0;
  const int64_t given = integers(frame, "spec", kSpecFields)[7];  // mean squares of columns
  const Call call(frame, given + (multiplied ? 1 : 0), 2 * (spec.hidden_layers + 1), true);
  const std::vector<Layer> layers = layers_of(frame, spec, call);
  require(given == 0 || given == layers[0].inputs, "wrong number of mean squares of columns");
  Rows messages(call, spec.messages);
  call.run([&](int64_t model, const Pool& pool) {
    std::vector<MlpLayer> mine;
    for (const Layer& layer : layers) mine.push_back(layer.of(model));
    const double* mean_squares = given ? call.extra(model) + (multiplied ? call.count() : 0) : nullptr;
    element_mlp(spec, call.averages(model), mine.data(), call.tensors(model), call.count(),
                multiplied ? call.extra(model) : nullptr, mean_squares, call.rule(model), output_of(call),
                messages.of(model), pool);
  });
  messages.write();
}

// ---- adam ----

void run_adam(const CallFrame& frame) {
  constexpr int64_t scalars = sizeof(AdamScalars) / sizeof(double);
  const Call call(frame, scalars, 0, true);
  Rows rows(call, call.has_more() ? statistics_size({{0}, {0}, {}}, nullptr) : 0);
  call.run([&](int64_t model, const Pool& pool) {
    std::vector<AdamScalars> mine;
    for (const double *s = call.extra(model), *end = s + scalars * call.count(); s < end; s += scalars)
      mine.push_back({s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]});
    adam(call.tensors(model), call.count(), mine.data(), call.rule(model), output_of(call), rows.of(model),
         pool);
  });
  rows.write();
}

// ---- statistics ----

void run_statistics(const CallFrame& frame) {
  const Call call(frame, 0, 0, false);
  MlpSpec spec;
  const MlpSpec* columns = nullptr;
  if (call.has_more()) columns = &(spec = spec_of(frame));
  Rows rows(call, statistics_size(call.counts(), columns));
  call.run([&](int64_t model, const Pool& pool) {
    statistics(call.averages(model), columns, call.mode() != 0, call.tensors(model), call.count(),
               call.rule(model), rows.of(model), pool);
  });
  rows.write();
}

xla::Error* handle_element_mlp(xla::CallFrame* frame) {
  return xla::respond(frame, "element_mlp", 0, run_element_mlp);
}
xla::Error* handle_adam(xla::CallFrame* frame) { return xla::respond(frame, "adam", 0, run_adam); }
xla::Error* handle_statistics(xla::CallFrame* frame) {
  return xla::respond(frame, "statistics", 0, run_statistics);
}

}  // namespace

MlpSpec xla_mlp_spec(const xla::CallFrame& frame) { return spec_of(frame); }
bool xla_mlp_multiplied(const xla::CallFrame& frame) { return integers(frame, "spec", kSpecFields)[6] != 0; }

void* xla_element_mlp_handler() { return reinterpret_cast<void*>(&handle_element_mlp); }
void* xla_adam_handler() { return reinterpret_cast<void*>(&handle_adam); }
void* xla_statistics_handler() { return reinterpret_cast<void*>(&handle_statistics); }

}  // namespace lopt
