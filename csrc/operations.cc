// The drivers of the operations: checks, cuts into tasks, scratch memory, folding of the network, order of
// passes.
#include "csrc/operations.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/arena.h"
#include "kernels/adam/kernel.h"
#include "kernels/common/constants.h"
#include "kernels/element_mlp/kernel.h"
#include "kernels/statistics/kernel.h"

namespace lopt {
namespace {

// ---- kernels of the instruction set in use ----

struct Tables {
  const MlpKernels* mlp;
  const AdamKernels* adam;
  const StatisticsKernels* statistics;
};

Tables tables() {
#if defined(LOPT_X86_64)
  const std::string name = instruction_set();
  if (name == "x86-64-v4") return {&v4::element_mlp(), &v4::adam(), &v4::statistics()};
  if (name == "x86-64-v3") return {&v3::element_mlp(), &v3::adam(), &v3::statistics()};
  return {&v2::element_mlp(), &v2::adam(), &v2::statistics()};
#else
  return {&portable::element_mlp(), &portable::adam(), &portable::statistics()};
#endif
}

template <typename T, typename Kernels>
const auto& table_of(const Kernels& kernels) {
  if constexpr (sizeof(T) == sizeof(float))
    return kernels.f32;
  else
    return kernels.f64;
}

// ---- tasks ----

constexpr int64_t kTileElements = 16384;  // work of a task; a multiple of a block
constexpr int64_t kLargeTensor = 65536;   // from here on the tiles of one tensor go to several threads
constexpr int64_t kTensorCost = 256;      // what a tensor costs besides its elements, in elements
constexpr int64_t kMostRowTiles = 32;     // bounds the scratch for sums along x
constexpr int64_t kLongestRun = 65536;    // a longer row is cut in pass 1

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t elements(const OperationTensor& t) {
  const Loops& l = t.loops;
  return l.batch0 * l.x * l.batch1 * l.y * l.batch2;
}

template <typename F>
void run(const Pool& pool, int64_t tasks, const F& f) {
  if (tasks == 1) return f(0);
  pool.run(
      pool.context, tasks, [](void* argument, int64_t i) { (*static_cast<const F*>(argument))(i); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Elements begin to end of a tensor.
struct Piece {
  int64_t tensor, begin, end;
};

// All tensors cut into tiles, and tasks: pieces of about as much work.
struct Pieces {
  std::vector<Piece> all;
  std::vector<int64_t> tasks;  // task i is pieces tasks[i] to tasks[i + 1]

  Pieces(const OperationTensor* tensors, int64_t count) {
    int64_t work = kTileElements;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = elements(tensors[i]);
      for (int64_t begin = 0; begin < n; begin += kTileElements) {
        if (work >= kTileElements) {
          tasks.push_back(int64_t(all.size()));
          work = 0;
        }
        const int64_t end = begin + kTileElements < n ? begin + kTileElements : n;
        all.push_back({i, begin, end});
        work += end - begin + kTensorCost;
      }
    }
    tasks.push_back(int64_t(all.size()));
  }

  template <typename F>
  void run(const Pool& pool, const F& f) const {
    const int64_t n = int64_t(tasks.size()) - 1;
    if (n <= 0) return;
    lopt::run(pool, n, [&](int64_t task) {
      for (int64_t i = tasks[size_t(task)]; i < tasks[size_t(task) + 1]; ++i) f(all[size_t(i)], i);
    });
  }
};

// ---- one tensor ----

template <typename T>
Operand<T> operand_of(const OperationTensor& t, const Averages& averages, const GradientRule& rule,
                      Output output) {
  Operand<T> o = {};
  o.n = elements(t);
  o.param = static_cast<const T*>(t.param);
  o.grad = static_cast<const T*>(t.grad);
  o.output = static_cast<T*>(t.output);
  o.momentum = static_cast<T*>(t.momentum);
  o.second_moment = static_cast<T*>(t.second_moment);
  o.momentum_stride = t.momentum_stride;
  o.second_moment_stride = t.second_moment_stride;
  o.momenta = int32_t(averages.momentum.size());
  o.second_moments = int32_t(averages.second_moment.size());
  for (size_t k = 0; k < averages.momentum.size(); ++k) o.d_momentum[k] = T(averages.momentum[k]);
  for (size_t k = 0; k < averages.second_moment.size(); ++k)
    o.d_second_moment[k] = T(averages.second_moment[k]);
  for (size_t k = 0; k < averages.factored.size(); ++k) o.d_factored[k] = T(averages.factored[k]);
  o.grad_scale = T(rule.scale);
  o.grad_bound = T(rule.bound);
  o.result = output;
  o.decay = output == Output::step ? T(0) : T(t.lr * t.weight_decay);
  return o;
}

// ---- element_mlp ----

// Columns that show factored moments: what ElementMlp::factored_vectors is about.
bool shows_factored(Group g) {
  return g == Group::fac_row || g == Group::fac_column || g == Group::rsqrt_fac_row ||
         g == Group::rsqrt_fac_column || g == Group::fac_m;
}

int32_t group_size(Group g, const Averages& a) {
  switch (g) {
    case Group::m:
    case Group::m_rsqrt_rms:
      return int32_t(a.momentum.size());
    case Group::rms:
    case Group::rsqrt_rms:
    case Group::g_rsqrt_rms:
      return int32_t(a.second_moment.size());
    default:
      return g == Group::fac_g || shows_factored(g) ? int32_t(a.factored.size()) : 1;
  }
}

// Where the features of a group begin.
int32_t& feature_row(FeatureRows& at, Group g, bool factored) {
  switch (g) {
    case Group::g:
      return at.g;
    case Group::clip_g:
      return at.clip_g;
    case Group::p:
      return at.p;
    case Group::log_abs_p:
      return at.log_abs_p;
    case Group::m:
      return at.m;
    case Group::rms:
      return at.v;
    case Group::m_rsqrt_rms:
      return at.m_root_v;
    case Group::rsqrt_rms:
      return at.root_v;
    case Group::g_rsqrt_rms:
      return at.g_root_v;
    case Group::fac_g:
      return at.fac_g;
    case Group::fac_m:
      return at.fac_m;
    case Group::fac_row:
      return at.row;
    case Group::rsqrt_fac_row:
      return at.row_root;
    case Group::fac_column:
      return factored ? at.column : at.row;  // below rank 2 both axes show the same
    case Group::rsqrt_fac_column:
      return factored ? at.column_root : at.row_root;
  }
  throw std::invalid_argument("unknown group of columns");
}

RowTiles row_tiles_of(const Loops& l) {
  RowTiles t;
  t.rows = l.batch0 * l.x * l.batch1;
  t.run = l.y * l.batch2;
  t.run_per_tile = t.run < kLongestRun ? t.run : kLongestRun;
  t.run_tiles = divide_up(t.run, t.run_per_tile);
  t.rows_per_tile = divide_up(kTileElements, t.run_per_tile);
  if (t.rows_per_tile * kMostRowTiles < t.rows) t.rows_per_tile = divide_up(t.rows, kMostRowTiles);
  if (t.rows_per_tile > t.rows) t.rows_per_tile = t.rows;
  t.row_tiles = divide_up(t.rows, t.rows_per_tile);
  return t;
}

constexpr int32_t kMostGroups = int32_t(Group::fac_m) + 1;  // each once

// The columns of one tensor, and passes 1 and 2 over them.
template <typename T>
class MlpColumns {
 protected:
  MlpColumns(const MlpSpec& spec, const Averages& averages, const GradientRule& rule, Output output,
             const MlpTable<T>& kernels, const OperationTensor& tensor)
      : kernels_(kernels) {
    describe(spec, averages, rule, output, tensor);
    choose_features(spec, averages);
  }

  // Pass 1: moves the accumulators on.
  void move_factored(const Pool& pool) {
    if (!c_.factored() || !c_.factored_moments) return;
    run(pool, c_.tiles.count(), [this](int64_t tile) { kernels_.factor_sums(c_, tile); });
    kernels_.factors(c_);
  }

  // Pass 2: `sums_` of the features, then of the parameter, over all elements. spreads: (tiles, quantities),
  // or null.
  void add_squares(const Pool& pool, Spread* spreads, bool moved) {
    const int64_t size = c_.at.count + 1;
    // Passes alternate in direction: each begins where the cache still holds what the one before read last.
    run(pool, tiles_, [&](int64_t i) {
      const int64_t tile = tiles_ - 1 - i;
      double* sums = sums_ + tile * size;
      for (int64_t f = 0; f < size; ++f) sums[f] = 0;
      kernels_.feature_sums(c_, tile * kTileElements, tile_end(tile), sums,
                            spreads ? spreads + tile * quantities(c_.operand) : nullptr, moved);
    });
    for (int64_t tile = 1; tile < tiles_; ++tile)
      for (int64_t f = 0; f < size; ++f) sums_[f] += sums_[tile * size + f];
  }

  int64_t tile_end(int64_t tile) const {
    return (tile + 1) * kTileElements < c_.operand.n ? (tile + 1) * kTileElements : c_.operand.n;
  }

  void take_scratch(Arena& arena) {
    const Loops& l = c_.loops;
    const RowTiles& t = c_.tiles;
    tiles_ = divide_up(c_.operand.n, kTileElements);
    sums_ = arena.take<double>(tiles_ * (c_.at.count + 1));
    if (!c_.factored() || !c_.factored_moments) return;
    const int64_t longest = c_.x_stride > c_.y_stride ? c_.x_stride : c_.y_stride;
    c_.x_sums = arena.take<T>(t.run_tiles * c_.x_size);
    c_.y_sums = arena.take<T>((l.batch0 + t.row_tiles) * l.batch1 * t.run);
    c_.x_factor = arena.take<T>(c_.factored_moments * c_.x_stride);
    c_.y_factor = arena.take<T>(c_.factored_moments * c_.y_stride);
    c_.scratch = arena.take<T>(longest);
  }

  // Consecutive columns of the network's input.
  struct GroupColumns {
    Group group;
    int32_t column, size, feature;  // feature -1: they show an axis of a factored tensor
    bool of_row() const { return group == Group::fac_row || group == Group::rsqrt_fac_row; }
    bool of_roots() const { return group == Group::rsqrt_fac_row || group == Group::rsqrt_fac_column; }
  };

  // Without those that the tensor lacks. No vector: nothing is allocated once tensors are being written.
  struct Groups {
    GroupColumns all[kMostGroups];
    int32_t count = 0;
    const GroupColumns* begin() const { return all; }
    const GroupColumns* end() const { return all + count; }
  };

  const MlpTable<T>& kernels_;
  MlpStep<T> c_;
  Groups groups_;
  int64_t tiles_;
  double* sums_;

 private:
  void describe(const MlpSpec& spec, const Averages& averages, const GradientRule& rule, Output output,
                const OperationTensor& t) {
    const Loops& l = t.loops;
    c_ = {};
    c_.operand = operand_of<T>(t, averages, rule, output);
    c_.loops = l;
    c_.tanh = spec.tanh;
    c_.factored_moments = int32_t(averages.factored.size());
    c_.rms_epsilon = T(spec.rms_epsilon);
    c_.diagonal_momentum_epsilon = T(spec.diagonal_momentum_epsilon);
    c_.normaliser_epsilon = T(spec.normaliser_epsilon);
    c_.hidden_size = spec.hidden_size;
    c_.normalised_over = t.normalised_over ? t.normalised_over : c_.operand.n;
    T *row = static_cast<T*>(t.row), *column = static_cast<T*>(t.column);
    if (l.factored) {
      c_.x_accumulator = l.x_is_row ? row : column;
      c_.y_accumulator = l.x_is_row ? column : row;
      c_.x_accumulator_stride = l.x_is_row ? t.row_stride : t.column_stride;
      c_.y_accumulator_stride = l.x_is_row ? t.column_stride : t.row_stride;
    } else {
      c_.operand.diagonal = row;
      c_.operand.diagonal_stride = t.row_stride;
      c_.operand.diagonals = c_.factored_moments;
    }
    c_.tiles = row_tiles_of(l);
    c_.x_size = l.batch0 * l.x * l.batch1 * l.batch2;
    c_.y_size = l.batch0 * l.batch1 * l.y * l.batch2;
    c_.x_stride = c_.x_size + kScratchPadding;
    c_.y_stride = c_.y_size + kScratchPadding;
  }

  // Which inputs of the network are features of elements, and in which row of a block.
  void choose_features(const MlpSpec& spec, const Averages& averages) {
    FeatureRows& at = c_.at;
    at = FeatureRows();
    int32_t column = 0;
    for (Group g : spec.groups) {
      if (!c_.factored() && !spec.factored_vectors && shows_factored(g)) continue;
      const int32_t size = group_size(g, averages);
      const bool of_axis = shows_factored(g) && g != Group::fac_m;
      int32_t first = -1;
      if (!(of_axis && c_.factored() && !c_.axes_are_features())) {
        int32_t& row = feature_row(at, g, c_.factored());
        if (row < 0) {
          row = at.count;
          at.count += size;
        }
        first = row;
      }
      groups_.all[groups_.count++] = {g, column, size, first};
      column += size;
    }
  }
};

// What all tensors of a call of element_mlp have in common.
struct MlpCall {
  const MlpSpec& spec;
  const Averages& averages;
  const MlpLayer* layers;
  const double *multipliers, *column_mean_square;
  const GradientRule& rule;
  Output output;
  double* messages;
  Tables tables;
};

constexpr double kLog2E = 1.4426950408889634;

// One tensor during one step.
template <typename T>
class MlpTensor : MlpColumns<T> {
  using Columns = MlpColumns<T>;
  using Columns::c_, Columns::kernels_, Columns::groups_, Columns::tiles_, Columns::sums_, Columns::tile_end;

 public:
  MlpTensor(const MlpCall& call, const OperationTensor& tensor, int64_t index)
      : Columns(call.spec, call.averages, call.rule, call.output, table_of<T>(*call.tables.mlp), tensor),
        call_(call),
        index_(index),
        lr_(call.output == Output::step ? 1.0 : tensor.lr) {}

  void take_scratch(Arena& arena) {
    const int64_t h = c_.hidden_size, layers = call_.spec.hidden_layers;
    Columns::take_scratch(arena);
    weights_ = arena.take<double>(c_.at.count * h);
    parameter_sums_ = arena.take<double>(tiles_);
    hidden_sums_ = arena.take<double>(tiles_ * h);
    take_network(arena, net_);
    for (int64_t layer = 1; layer < layers; ++layer) {
      net_.w[layer] = arena.take<T>(h * h);
      net_.b[layer] = arena.take<T>(h);
    }
    if (!is_whole()) {
      Network<T> net = {};
      double* sums;
      task_bytes_ = int64_t(Arena::bytes([&](Arena& counter) { take_task(counter, net, sums); }));
      task_memory_ = arena.take<char>(matrix_tasks() * task_bytes_);
    }
    if (!c_.factored() || !c_.factored_moments) return;
    c_.x_bias = arena.take<T>(h * c_.x_stride);
    c_.y_bias = arena.take<T>(h * c_.y_stride);
    for (T*& weights : axis_weights_) weights = arena.take<T>(c_.factored_moments * h);
  }

  // After take_scratch.
  void step(const Pool& pool) {
    copy_weights();
    this->move_factored(pool);
    if (is_whole())
      whole(pool);
    else
      by_matrices(pool);
    if (call_.spec.messages) write_messages();
  }

 private:
  bool is_whole() const { return c_.normalised_over == c_.operand.n; }
  int64_t matrices_per_task() const { return divide_up(kTileElements, c_.normalised_over); }
  int64_t matrix_tasks() const { return divide_up(c_.operand.n / c_.normalised_over, matrices_per_task()); }

  // What of a network depends on normalisers.
  void take_network(Arena& arena, Network<T>& net) const {
    const int64_t h = c_.hidden_size, layers = call_.spec.hidden_layers;
    net.hidden_layers = int32_t(layers);
    net.hidden_size = int32_t(h);
    net.w[0] = arena.take<T>(c_.at.count * h);
    net.b[0] = arena.take<T>(h);
    net.w[layers] = arena.take<T>(2 * h);
    net.b[layers] = arena.take<T>(2);
  }

  // What a task of by_matrices has to itself: its network, and the sums of one matrix.
  void take_task(Arena& arena, Network<T>& net, double*& sums) const {
    take_network(arena, net);
    sums = arena.take<double>(c_.at.count + 1);
  }

  const double* weights_of(int64_t layer) const {
    return call_.layers[layer].w + index_ * call_.layers[layer].w_stride;
  }
  const double* biases_of(int64_t layer) const {
    return call_.layers[layer].b + index_ * call_.layers[layer].b_stride;
  }

  // Weights of the first layer by feature, before normalisers; those of the axes; the layers in the middle.
  void copy_weights() {
    const int64_t h = c_.hidden_size;
    std::memset(weights_, 0, size_t(c_.at.count * h) * sizeof(double));
    T* axis[4] = {};
    for (const auto& g : groups_) {
      const double* w = weights_of(0) + g.column * h;
      if (g.feature >= 0) {
        for (int64_t i = 0; i < g.size * h; ++i) weights_[g.feature * h + i] += w[i];
        continue;
      }
      const int which = (g.of_row() == c_.loops.x_is_row ? 0 : 2) + (g.of_roots() ? 1 : 0);
      axis[which] = axis_weights_[which];
      for (int64_t i = 0; i < g.size * h; ++i) axis[which][i] = T(w[i]);
    }
    c_.x_weights = axis[0], c_.x_root_weights = axis[1], c_.y_weights = axis[2], c_.y_root_weights = axis[3];
    for (int64_t layer = 1; layer < net_.hidden_layers; ++layer) {
      for (int64_t i = 0; i < h * h; ++i) net_.w[layer][i] = T(weights_of(layer)[i]);
      for (int64_t i = 0; i < h; ++i) net_.b[layer][i] = T(biases_of(layer)[i]);
    }
  }

  // First layer with the normalisers from sums over `count` elements, last layer with all that multiplies the
  // step.
  void fold(Network<T>& net, const double* sums, double count, double parameter_square) const {
    const MlpSpec& spec = call_.spec;
    const int64_t h = c_.hidden_size;
    for (int64_t f = 0; f < c_.at.count; ++f) {
      const double scale = 1.0 / std::sqrt(sums[f] / count + spec.normaliser_epsilon);
      for (int64_t j = 0; j < h; ++j) net.w[0][f * h + j] = T(scale * weights_[f * h + j]);
    }
    for (int64_t j = 0; j < h; ++j) net.b[0][j] = T(biases_of(0)[j]);
    double step = lr_ * spec.step_mult;
    if (call_.multipliers) step *= call_.multipliers[index_];
    if (spec.parameter_rms) {
      double scale = std::sqrt(parameter_square + spec.scale_epsilon);
      const double cap = spec.scale_cap * std::sqrt(double(c_.operand.n));
      if (scale > cap) scale = cap;
      step *= scale;
    }
    const double multiplier[2] = {step, spec.exp_mult * kLog2E};
    const int64_t last = net.hidden_layers, outputs = call_.layers[last].outputs;
    for (int o = 0; o < 2; ++o) {
      for (int64_t j = 0; j < h; ++j)
        net.w[last][2 * j + o] = T(multiplier[o] * weights_of(last)[outputs * j + o]);
      net.b[last][o] = T(multiplier[o] * biases_of(last)[o]);
    }
  }

  // All elements share normalisers.
  void whole(const Pool& pool) {
    const int64_t features = c_.at.count, h = c_.hidden_size;
    const double n = double(c_.operand.n);
    if (call_.column_mean_square) {
      take_given();
      fold(net_, sums_, 1.0, mean_parameter_square(pool));
    } else {
      this->add_squares(pool, nullptr, false);
      fold(net_, sums_, n, sums_[features] / n);
    }
    if (c_.has_axis_biases()) kernels_.axis_biases(c_, net_.b[0]);
    run(pool, tiles_, [&](int64_t tile) {
      double* hidden = call_.spec.messages ? hidden_sums_ + tile * h : nullptr;
      for (int64_t j = 0; hidden && j < h; ++j) hidden[j] = 0;
      kernels_.apply(c_, net_, tile * kTileElements, tile_end(tile), hidden);
    });
    hidden_tasks_ = tiles_;
  }

  // Mean squares of the features that the caller knows. Those of the axes are found with their biases.
  void take_given() {
    const double* given = call_.column_mean_square + index_ * call_.layers[0].inputs;
    for (const auto& g : groups_)
      for (int32_t k = 0; g.feature >= 0 && k < g.size; ++k) sums_[g.feature + k] = given[g.column + k];
  }

  // As far as the step depends on it.
  double mean_parameter_square(const Pool& pool) {
    if (!call_.spec.parameter_rms) return 0;
    const double n = double(c_.operand.n);
    if (call_.column_mean_square && c_.at.p >= 0) return sums_[c_.at.p];
    run(pool, tiles_, [&](int64_t tile) {
      double total = 0;
      for (int64_t i = tile * kTileElements; i < tile_end(tile); ++i)
        total += double(c_.operand.param[i]) * double(c_.operand.param[i]);
      parameter_sums_[tile] = total;
    });
    double total = 0;
    for (int64_t tile = 0; tile < tiles_; ++tile) total += parameter_sums_[tile];
    return total / n;
  }

  // Each matrix has its own normalisers: passes 2 and 3 of one follow each other.
  void by_matrices(const Pool& pool) {
    const int64_t features = c_.at.count, n = c_.operand.n, h = c_.hidden_size, size = c_.normalised_over;
    const double parameter_square = mean_parameter_square(pool);
    const int64_t matrices = n / size, per_task = matrices_per_task();
    hidden_tasks_ = matrix_tasks();
    run(pool, hidden_tasks_, [&](int64_t task) {
      Arena arena(task_memory_ + task * task_bytes_);
      Network<T> net = net_;
      double* sums;
      take_task(arena, net, sums);
      double* hidden = call_.spec.messages ? hidden_sums_ + task * h : nullptr;
      for (int64_t j = 0; hidden && j < h; ++j) hidden[j] = 0;
      const int64_t end = (task + 1) * per_task < matrices ? (task + 1) * per_task : matrices;
      for (int64_t matrix = task * per_task; matrix < end; ++matrix) {
        for (int64_t f = 0; f <= features; ++f) sums[f] = 0;
        kernels_.feature_sums(c_, matrix * size, (matrix + 1) * size, sums, nullptr, false);
        fold(net, sums, double(size), parameter_square);
        kernels_.apply(c_, net, matrix * size, (matrix + 1) * size, hidden);
      }
    });
  }

  // Means of outputs, from those of the last hidden units: the last layer is linear.
  void write_messages() const {
    const int64_t h = c_.hidden_size, last = net_.hidden_layers, outputs = call_.layers[last].outputs;
    for (int64_t task = 1; task < hidden_tasks_; ++task)
      for (int64_t j = 0; j < h; ++j) hidden_sums_[j] += hidden_sums_[task * h + j];
    for (int64_t k = 0; k < call_.spec.messages; ++k) {
      double total = 0;
      for (int64_t j = 0; j < h; ++j) total += hidden_sums_[j] * weights_of(last)[outputs * j + 2 + k];
      call_.messages[index_ * call_.spec.messages + k] =
          total / double(c_.operand.n) + biases_of(last)[2 + k];
    }
  }

  const MlpCall& call_;
  const int64_t index_;
  double lr_;
  Network<T> net_ = {};
  int64_t hidden_tasks_, task_bytes_;
  char* task_memory_;
  double *weights_, *parameter_sums_, *hidden_sums_;
  T* axis_weights_[4];  // of x, its roots, y, its roots
};

template <typename Tensor>
size_t scratch_bytes(Tensor tensor) {
  return Arena::bytes([&](Arena& counter) { tensor.take_scratch(counter); });
}

// Calls f(i, pool, arena) for each tensor that has elements: small ones go to one thread each, several to a
// task; large ones are spread over all threads. The arena is empty and has bytes(i), all of it allocated
// before the first call.
template <typename Bytes, typename F>
void for_each_tensor(const OperationTensor* tensors, int64_t count, const Pool& pool, const Bytes& bytes,
                     const F& f) {
  std::vector<int64_t> small, large, tasks;
  size_t small_bytes = 0, large_bytes = 0;
  for (int64_t i = 0, work = kTileElements; i < count; ++i) {
    const int64_t n = elements(tensors[i]);
    if (n == 0) continue;
    if (n >= kLargeTensor) {
      large.push_back(i);
      large_bytes = std::max(large_bytes, bytes(i));
      continue;
    }
    if (work >= kTileElements) {
      tasks.push_back(int64_t(small.size()));
      work = 0;
    }
    small.push_back(i);
    small_bytes = std::max(small_bytes, bytes(i));
    work += n + kTensorCost;
  }
  tasks.push_back(int64_t(small.size()));
  const int64_t small_tasks = int64_t(tasks.size()) - 1;
  Arenas arenas(std::min(int64_t(pool.threads(pool.context)), small_tasks), small_bytes);
  Arena arena;
  arena.reserve(large_bytes);
  if (small_tasks > 0)
    run(pool, small_tasks, [&](int64_t task) {
      arenas.lend([&](Arena& mine) {
        for (int64_t i = tasks[size_t(task)]; i < tasks[size_t(task) + 1]; ++i) {
          mine.clear();
          f(small[size_t(i)], serial_pool(), mine);
        }
      });
    });
  for (int64_t i : large) {
    arena.clear();
    f(i, pool, arena);
  }
}

// ---- statistics of a tensor ----

// One row of statistics, from spreads (tiles, quantities) of its n elements. Returns the place behind it.
double* write_statistics(const Spread* spreads, int64_t n, int64_t momenta, int64_t seconds, double* row) {
  const int64_t size = kFirstAverage + momenta + seconds;
  Spread total[kMostQuantities] = {};
  for (int64_t begin = 0; begin < n; begin += kTileElements, spreads += size)
    for (int64_t q = 0; q < size; ++q)
      merge(total[q], double(begin), spreads[q],
            double(begin + kTileElements < n ? kTileElements : n - begin));
  const auto put = [&](int64_t first, int64_t count) {
    for (int64_t k = 0; k < count; ++k) *row++ = total[first + k].mean;
    for (int64_t k = 0; k < count; ++k) *row++ = total[first + k].squares / double(n);
  };
  put(0, 1);
  put(1, 1);
  *row++ = total[2].mean;
  put(kFirstAverage, momenta);
  put(kFirstAverage + momenta, seconds);
  return row;
}

// One tensor's statistics with the mean squares of columns, in one pass (and pass 1 of element_mlp).
template <typename T>
class ColumnStatistics : MlpColumns<T> {
  using Columns = MlpColumns<T>;
  using Columns::c_, Columns::kernels_, Columns::groups_, Columns::tiles_, Columns::sums_;

 public:
  ColumnStatistics(const MlpSpec& spec, const Averages& averages, const GradientRule& rule,
                   const OperationTensor& tensor)
      : Columns(spec, averages, rule, Output::step, table_of<T>(*tables().mlp), tensor) {}

  void take_scratch(Arena& arena) {
    Columns::take_scratch(arena);
    spreads_ = arena.take<Spread>(tiles_ * quantities(c_.operand));
    if (!c_.factored()) return;
    x_moved_ = arena.take<T>(c_.factored_moments * c_.x_stride);
    y_moved_ = arena.take<T>(c_.factored_moments * c_.y_stride);
  }

  // row: as of write_statistics, then the columns. After take_scratch.
  void write(bool moved, const Pool& pool, double* row) {
    if (c_.factored()) copy_accumulators();
    this->move_factored(pool);
    this->add_squares(pool, spreads_, moved);
    const Operand<T>& o = c_.operand;
    double* columns = write_statistics(spreads_, o.n, o.momenta, o.second_moments, row);
    for (const auto& g : groups_) {
      double* out = columns + g.column;
      if (g.feature < 0) kernels_.axis_mean_squares(c_, g.of_row() == c_.loops.x_is_row, g.of_roots(), out);
      for (int32_t k = 0; g.feature >= 0 && k < g.size; ++k) out[k] = sums_[g.feature + k] / double(o.n);
    }
  }

 private:
  // Pass 1 moves the accumulators on: copies of them, as statistics write no state.
  void copy_accumulators() {
    for (int64_t k = 0; k < c_.factored_moments; ++k) {
      std::memcpy(x_moved_ + k * c_.x_stride, c_.x_accumulator + k * c_.x_accumulator_stride,
                  size_t(c_.x_size) * sizeof(T));
      std::memcpy(y_moved_ + k * c_.y_stride, c_.y_accumulator + k * c_.y_accumulator_stride,
                  size_t(c_.y_size) * sizeof(T));
    }
    c_.x_accumulator = x_moved_, c_.x_accumulator_stride = c_.x_stride;
    c_.y_accumulator = y_moved_, c_.y_accumulator_stride = c_.y_stride;
  }

  Spread* spreads_;
  T *x_moved_, *y_moved_;
};

// ---- checks ----

[[noreturn]] void refuse(int64_t index, const std::string& why) {
  throw std::invalid_argument("tensor " + std::to_string(index) + ": " + why);
}

void check(const OperationTensor* tensors, int64_t count, const Averages& averages, bool writes) {
  for (const std::vector<double>* rates : {&averages.momentum, &averages.second_moment, &averages.factored})
    if (rates->size() > size_t(kMostAverages))
      throw std::invalid_argument(std::to_string(rates->size()) + " running averages of one kind: at most " +
                                  std::to_string(kMostAverages));
  for (int64_t i = 0; i < count; ++i) {
    const OperationTensor& t = tensors[i];
    const Loops& l = t.loops;
    if (l.batch0 < 0 || l.x < 0 || l.batch1 < 0 || l.y < 0 || l.batch2 < 0) refuse(i, "negative size");
    if (!l.factored && (l.batch0 != 1 || l.x != 1 || l.batch1 != 1 || l.batch2 != 1))
      refuse(i, "not factored, but more than one axis");
    if (t.dtype != Dtype::float32 && t.dtype != Dtype::float64)
      refuse(i, "dtype is neither float32 nor float64");
    const int64_t n = elements(t);
    if (n == 0) continue;
    if (!t.param || !t.grad || (writes && !t.output) || (!averages.momentum.empty() && !t.momentum) ||
        (!averages.second_moment.empty() && !t.second_moment) ||
        (!averages.factored.empty() && (!t.row || (l.factored && !t.column))))
      refuse(i, "a pointer is null");
    if (t.normalised_over < 0 || t.normalised_over > n || (t.normalised_over && n % t.normalised_over))
      refuse(i, "normalised_over does not divide the number of elements");
  }
}

// Returns how many columns there are.
int64_t check_columns(const MlpSpec& spec, const Averages& averages) {
  int64_t columns = 0;
  for (size_t i = 0; i < spec.groups.size(); ++i) {
    const Group g = spec.groups[i];
    for (size_t j = 0; j < i; ++j)
      if (spec.groups[j] == g) throw std::invalid_argument("a group of columns is given twice");
    const size_t momenta = averages.momentum.size(), second = averages.second_moment.size();
    if (g == Group::m_rsqrt_rms && second != 1 && second != momenta)
      throw std::invalid_argument("m_rsqrt_rms needs one second moment, or as many as momenta");
    if (g == Group::fac_m && averages.factored.size() != momenta)
      throw std::invalid_argument("fac_m needs as many factored moments as momenta");
    columns += group_size(g, averages);
  }
  return columns;
}

// That each tensor has one mean square for each column.
void check_whole(const OperationTensor* tensors, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (tensors[i].normalised_over && tensors[i].normalised_over != elements(tensors[i]))
      refuse(i, "mean squares of columns are of whole tensors, and it has normalised_over");
}

void check(const MlpSpec& spec, const Averages& averages, const MlpLayer* layers) {
  if (spec.hidden_size < 1 || spec.hidden_size > kMostHidden)
    throw std::invalid_argument("hidden_size " + std::to_string(spec.hidden_size) + " is not in 1..256");
  if (spec.hidden_layers < 1 || spec.hidden_layers > kMostLayers)
    throw std::invalid_argument("hidden_layers " + std::to_string(spec.hidden_layers) + " is not in 1..8");
  const int64_t inputs = check_columns(spec, averages);
  for (int64_t layer = 0; layer <= spec.hidden_layers; ++layer) {
    const bool last = layer == spec.hidden_layers;
    const int64_t in = layer == 0 ? inputs : spec.hidden_size,
                  out = last ? 2 + spec.messages : spec.hidden_size;
    const MlpLayer& l = layers[layer];
    if (l.inputs != in || (last ? l.outputs < out : l.outputs != out))
      throw std::invalid_argument("weights of layer " + std::to_string(layer) + " are (" +
                                  std::to_string(l.inputs) + ", " + std::to_string(l.outputs) +
                                  "), expected (" + std::to_string(in) + ", " + std::to_string(out) + ")");
  }
}

}  // namespace

Group group_of(const std::string& name) {
  static const char* const names[] = {
      "g",         "clip_g",      "p",     "log_abs_p", "m",          "rms",           "m_rsqrt_rms",
      "rsqrt_rms", "g_rsqrt_rms", "fac_g", "fac_row",   "fac_column", "rsqrt_fac_row", "rsqrt_fac_column",
      "fac_m"};
  for (int32_t i = 0; i <= int32_t(Group::fac_m); ++i)
    if (name == names[i]) return Group(i);
  throw std::invalid_argument("group of columns '" + name + "' is unknown");
}

void element_mlp(const MlpSpec& spec, const Averages& averages, const MlpLayer* layers,
                 const OperationTensor* tensors, int64_t count, const double* multipliers,
                 const double* column_mean_square, const GradientRule& rule, Output output, double* messages,
                 const Pool& pool) {
  check(spec, averages, layers);
  check(tensors, count, averages, true);
  if (column_mean_square) check_whole(tensors, count);
  for (int64_t i = 0; i < count * spec.messages; ++i)
    messages[i] = std::nan("");  // of tensors without elements
  const MlpCall call{spec, averages, layers,   multipliers, column_mean_square,
                     rule, output,   messages, tables()};
  const auto with_tensor = [&](int64_t i, const auto& f) {
    return tensors[i].dtype == Dtype::float32 ? f(MlpTensor<float>(call, tensors[i], i))
                                              : f(MlpTensor<double>(call, tensors[i], i));
  };
  for_each_tensor(
      tensors, count, pool,
      [&](int64_t i) { return with_tensor(i, [](auto tensor) { return scratch_bytes(tensor); }); },
      [&](int64_t i, const Pool& mine, Arena& arena) {
        with_tensor(i, [&](auto tensor) {
          tensor.take_scratch(arena);
          tensor.step(mine);
        });
      });
}

// ---- adam ----

namespace {

template <typename T>
void adam_piece(const AdamTable<T>& kernels, const OperationTensor& tensor, const AdamScalars& s,
                const Averages& averages, const GradientRule& rule, Output output, const Piece& piece,
                Spread* spreads) {
  const double lr = output == Output::step ? 1.0 : tensor.lr;
  const AdamNumbers<T> numbers = {T(lr * s.scale), T(s.momentum_factor), T(s.gradient_factor),
                                  T(s.v_factor),   T(s.epsilon),         T(s.root_epsilon),
                                  T(s.l2)};
  kernels.update(operand_of<T>(tensor, averages, rule, output), numbers, piece.begin, piece.end, spreads);
}

// Rows of statistics from spreads (pieces, quantities); NaN for tensors without elements.
void write_rows(const Pieces& pieces, const std::vector<Spread>& spreads, const OperationTensor* tensors,
                int64_t count, int64_t momenta, int64_t seconds, double* out) {
  const int64_t size = 5 + 2 * (momenta + seconds);
  for (int64_t i = 0; i < count * size; ++i) out[i] = std::nan("");
  for (size_t i = 0; i < pieces.all.size(); ++i)
    if (const Piece& piece = pieces.all[i]; piece.begin == 0)
      write_statistics(spreads.data() + i * size_t(kFirstAverage + momenta + seconds),
                       elements(tensors[piece.tensor]), momenta, seconds, out + piece.tensor * size);
}

}  // namespace

void adam(const OperationTensor* tensors, int64_t count, const AdamScalars* scalars, const GradientRule& rule,
          Output output, double* statistics, const Pool& pool) {
  check(tensors, count, {{0}, {0}, {}}, true);
  const AdamKernels& kernels = *tables().adam;
  const Pieces pieces(tensors, count);
  std::vector<Averages> averages;
  for (int64_t i = 0; i < count; ++i)
    averages.push_back({{1.0 - scalars[i].beta1}, {1.0 - scalars[i].beta2}, {}});
  constexpr int64_t quantities = kFirstAverage + 2;
  std::vector<Spread> spreads(statistics ? pieces.all.size() * size_t(quantities) : 0);
  pieces.run(pool, [&](const Piece& piece, int64_t i) {
    const OperationTensor& t = tensors[piece.tensor];
    const AdamScalars& s = scalars[piece.tensor];
    const Averages& a = averages[size_t(piece.tensor)];
    Spread* seen = statistics ? spreads.data() + i * quantities : nullptr;
    if (t.dtype == Dtype::float32)
      adam_piece<float>(kernels.f32, t, s, a, rule, output, piece, seen);
    else
      adam_piece<double>(kernels.f64, t, s, a, rule, output, piece, seen);
  });
  if (statistics) write_rows(pieces, spreads, tensors, count, 1, 1, statistics);
}

// ---- statistics ----

int64_t statistics_size(const Averages& averages, const MlpSpec* columns) {
  return 5 + 2 * int64_t(averages.momentum.size() + averages.second_moment.size()) +
         (columns ? check_columns(*columns, averages) : 0);
}

namespace {

void column_statistics(const MlpSpec& spec, const Averages& averages, bool moved,
                       const OperationTensor* tensors, int64_t count, const GradientRule& rule, double* out,
                       const Pool& pool) {
  check(tensors, count, averages, false);
  check_whole(tensors, count);
  const int64_t size = statistics_size(averages, &spec);
  const auto with_tensor = [&](int64_t i, const auto& f) {
    return tensors[i].dtype == Dtype::float32 ? f(ColumnStatistics<float>(spec, averages, rule, tensors[i]))
                                              : f(ColumnStatistics<double>(spec, averages, rule, tensors[i]));
  };
  for_each_tensor(
      tensors, count, pool,
      [&](int64_t i) { return with_tensor(i, [](auto tensor) { return scratch_bytes(tensor); }); },
      [&](int64_t i, const Pool& mine, Arena& arena) {
        double* row = out + i * size;
        for (int64_t k = 0; k < size; ++k) row[k] = 0;  // columns that the tensor lacks
        with_tensor(i, [&](auto tensor) {
          tensor.take_scratch(arena);
          tensor.write(moved, mine, row);
        });
      });
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; elements(tensors[i]) == 0 && k < size; ++k) out[i * size + k] = std::nan("");
}

}  // namespace

void statistics(const Averages& averages, const MlpSpec* columns, bool moved, const OperationTensor* tensors,
                int64_t count, const GradientRule& rule, double* out, const Pool& pool) {
  if (columns) return column_statistics(*columns, averages, moved, tensors, count, rule, out, pool);
  check(tensors, count, {averages.momentum, averages.second_moment, {}}, false);
  const StatisticsKernels& kernels = *tables().statistics;
  const int64_t momenta = int64_t(averages.momentum.size()), seconds = int64_t(averages.second_moment.size());
  const int64_t quantities = kFirstAverage + momenta + seconds;
  const Pieces pieces(tensors, count);
  std::vector<Spread> spreads(pieces.all.size() * size_t(quantities));
  pieces.run(pool, [&](const Piece& piece, int64_t i) {
    const OperationTensor& t = tensors[piece.tensor];
    Spread* seen = spreads.data() + i * quantities;
    if (t.dtype == Dtype::float32)
      kernels.f32.spreads(operand_of<float>(t, averages, rule, Output::step), moved, piece.begin, piece.end,
                          seen);
    else
      kernels.f64.spreads(operand_of<double>(t, averages, rule, Output::step), moved, piece.begin, piece.end,
                          seen);
  });
  write_rows(pieces, spreads, tensors, count, momenta, seconds, out);
}

}  // namespace lopt
