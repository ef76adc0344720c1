// The driver of a step: checks, tiling, scratch memory, folding of the network, and the order of the passes.
#include "csrc/core.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/arena.h"
#include "kernels/small_fc_lopt/kernel.h"

namespace lopt {
namespace {

// ---- instruction sets ----

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> all;
#if defined(LOPT_X86_64)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) all.push_back(&v4::small_fc());
  if (__builtin_cpu_supports("x86-64-v3")) all.push_back(&v3::small_fc());
  if (__builtin_cpu_supports("x86-64-v2")) all.push_back(&v2::small_fc());
#else
  all.push_back(&portable::small_fc());
#endif
  return all;
}

const std::vector<const Kernels*>& kernels() {
  static const std::vector<const Kernels*> all = usable_kernels();
  if (all.empty()) throw std::runtime_error("lopt_fast needs a processor of at least x86-64-v2 (SSE 4.2)");
  return all;
}

std::string public_name(const Kernels& k) {
  return std::strcmp(k.name, "portable") == 0 ? k.name : "x86-64-" + std::string(k.name);
}

const std::vector<std::string>& kernel_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> n;
    for (const Kernels* k : kernels()) n.push_back(public_name(*k));
    return n;
  }();
  return names;
}

// Index into kernels(); changed by set_instruction_set alone.
std::atomic<size_t> chosen{0};
size_t in_use() { return chosen.load(std::memory_order_relaxed); }

template <typename T>
const KernelTable<T>& table();
template <>
const KernelTable<float>& table<float>() {
  return kernels()[in_use()]->f32;
}
template <>
const KernelTable<double>& table<double>() {
  return kernels()[in_use()]->f64;
}

// ---- tiling ----

constexpr int64_t kTileElements = 16384;  // least work of a task
constexpr int64_t kLargeTensor = 65536;   // from here on the tiles of one tensor go to several threads
constexpr int64_t kMostRowTiles = 64;     // bounds the scratch for sums along x
constexpr int64_t kLongestRun = 65536;    // a longer row is cut

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tiling tiling_of(const Loops& l) {
  Tiling t;
  t.rows = l.batch0 * l.x * l.batch1;
  t.run = l.y * l.batch2;
  // Vectors have a single row: cut that one as finely as tasks are to be.
  t.run_per_tile = t.rows == 1 ? kTileElements : kLongestRun;
  if (t.run_per_tile > t.run) t.run_per_tile = t.run;
  t.run_tiles = divide_up(t.run, t.run_per_tile);
  t.rows_per_tile = divide_up(kTileElements, t.run_per_tile);
  if (t.rows_per_tile * kMostRowTiles < t.rows) t.rows_per_tile = divide_up(t.rows, kMostRowTiles);
  if (t.rows_per_tile > t.rows) t.rows_per_tile = t.rows;
  t.row_tiles = divide_up(t.rows, t.rows_per_tile);
  return t;
}

// ---- one tensor ----

constexpr double kLog2E = 1.4426950408889634;

// Offsets of the meta-parameters in the flat array (lopt_fast.reference.flatten_theta).
struct ThetaLayout {
  int64_t w0, b0, w1, b1, w_out, b_out, decays, size;
  explicit ThetaLayout(const Spec& s) {
    const int64_t h = s.hidden_size;
    w0 = 0;
    b0 = w0 + kInputs * h;
    w1 = b0 + h;
    b1 = s.hidden_layers == 2 ? w1 + h * h : w1;
    w_out = s.hidden_layers == 2 ? b1 + h : w1;
    b_out = w_out + 2 * h;
    decays = b_out + 2;
    size = decays + kMomenta + 1 + kFactored;
  }
};

template <typename T>
TensorStep<T> describe(const Spec& spec, const Tensor& tensor, double clip) {
  const Loops& l = tensor.loops;
  const ThetaLayout at(spec);
  TensorStep<T> c = {};
  c.tensor = tensor;
  c.tiling = tiling_of(l);
  c.x_size = l.batch0 * l.x * l.batch1 * l.batch2;
  c.y_size = l.batch0 * l.batch1 * l.y * l.batch2;
  c.n = c.tiling.rows * c.tiling.run;
  c.hidden_size = spec.hidden_size;
  c.hidden_layers = spec.hidden_layers;
  c.lagged = spec.lagged && tensor.scalars->t > 0;

  const StepScalars& now = *tensor.scalars;
  c.grad_scale = T(now.grad_scale * clip);
  const double decay = now.lr * now.weight_decay;
  c.param_scale = T(tensor.apply ? 1.0 - decay : -decay);
  c.theta = static_cast<const T*>(tensor.theta);
  const T* d = c.theta + at.decays;
  for (int k = 0; k < kMomenta; ++k) c.d_momentum[k] = d[k];
  c.d_second_moment = d[kMomenta];
  for (int k = 0; k < kFactored; ++k) c.d_factored[k] = d[kMomenta + 1 + k];
  c.slow = true;
  for (int k = 1; k < kMomenta + 1; ++k) c.slow = c.slow && d[k] <= T(0.5);
  c.w1 = c.theta + at.w1;
  c.b1 = c.theta + at.b1;

  c.momentum = static_cast<T*>(tensor.momentum);
  c.momentum_stride = tensor.momentum_stride ? tensor.momentum_stride : c.n;
  c.second_moment = static_cast<T*>(tensor.second_moment);
  c.mean_squares = static_cast<T*>(tensor.mean_squares);
  if (l.factored) {
    c.x_accumulator = static_cast<T*>(l.x_is_row ? tensor.row : tensor.column);
    c.y_accumulator = static_cast<T*>(l.x_is_row ? tensor.column : tensor.row);
  } else {
    c.diagonal = static_cast<T*>(tensor.row);
  }
  return c;
}

template <typename T>
void take_scratch(TensorStep<T>& c, Arena& arena) {
  const Tiling& t = c.tiling;
  const Loops& l = c.tensor.loops;
  const int64_t h = c.hidden_size;
  c.x_stride = c.x_size + kPadding;
  c.y_stride = c.y_size + kPadding;
  c.w0 = arena.take<T>(kFeatures * h);
  c.b0 = arena.take<T>(h);
  c.w_out = arena.take<T>(2 * h);
  c.sums = arena.take<double>(t.tiles() * kFeatures);
  if (!l.factored) return;
  c.x_sums = arena.take<T>(t.run_tiles * c.x_size);
  c.y_sums = arena.take<T>((l.batch0 + t.row_tiles) * l.batch1 * t.run);
  c.scratch = arena.take<T>(c.x_stride > c.y_stride ? c.x_stride : c.y_stride);
  c.x_factor = arena.take<T>(kFactored * c.x_stride);
  c.y_factor = arena.take<T>(kFactored * c.y_stride);
  c.x_bias = arena.take<T>(h * c.x_stride);
  c.y_bias = arena.take<T>(h * c.y_stride);
}

template <typename T>
size_t scratch_bytes_of(const Spec& spec, const Tensor& tensor) {
  TensorStep<T> c = describe<T>(spec, tensor, 1.0);
  return Arena::bytes([&](Arena& counter) { take_scratch(c, counter); });
}

size_t scratch_bytes(const Spec& spec, const Tensor& tensor) {
  return tensor.dtype == Dtype::float32 ? scratch_bytes_of<float>(spec, tensor)
                                        : scratch_bytes_of<double>(spec, tensor);
}

// Bias of the first layer with the time columns: what of the network does not depend on statistics.
template <typename T>
void fold_time(TensorStep<T>& c, const Spec& spec) {
  const ThetaLayout at(spec);
  const int64_t h = spec.hidden_size;
  const double t = double(c.tensor.scalars->t);
  double time[kTimeColumns];
  for (int x = 0; x < kTimeColumns; ++x) time[x] = std::tanh(t / kTimescales[x] - 1.0);
  for (int64_t j = 0; j < h; ++j) {
    double bias = double(c.theta[at.b0 + j]);
    for (int x = 0; x < kTimeColumns; ++x)
      bias += time[x] * double(c.theta[at.w0 + (kNormalised + x) * h + j]);
    c.b0[j] = T(bias);
  }
}

// Mean squares of the features over the tensor: sums of all tiles, in their order.
template <typename T>
void mean_squares(const TensorStep<T>& c, double* out) {
  for (int f = 0; f < c.features(); ++f) {
    double total = 0;
    for (int64_t tile = 0; tile < c.tiling.tiles(); ++tile) total += c.sums[tile * kFeatures + f];
    out[f] = total / double(c.n);
  }
}

template <typename T>
void read_mean_squares(const TensorStep<T>& c, double* out) {
  for (int f = 0; f < c.features(); ++f) out[f] = double(c.mean_squares[kColumnOfFeature[f]]);
}

template <typename T>
void write_mean_squares(const TensorStep<T>& c, const double* from) {
  for (int column = 0; column < kNormalised; ++column) c.mean_squares[column] = T(0);
  for (int f = 0; f < c.features(); ++f) {
    c.mean_squares[kColumnOfFeature[f]] = T(from[f]);
    if (f >= fDiagonal) c.mean_squares[kColumnOfFeature[f] + kDiagonalTwin] = T(from[f]);
  }
}

// First layer with the normalisers, last layer with everything that multiplies the step.
template <typename T>
void fold_network(TensorStep<T>& c, const Spec& spec, const double* squares) {
  const ThetaLayout at(spec);
  const int64_t h = spec.hidden_size;
  const T* w0 = c.theta + at.w0;
  for (int f = 0; f < c.features(); ++f) {
    const double root = std::sqrt(squares[f] + kNormaliserEpsilon);
    const double scale = 1.0 / root;
    c.limits[f][1] = T(kLaggedClip * root);
    c.limits[f][0] = -c.limits[f][1];
    const int64_t column = kColumnOfFeature[f];
    for (int64_t j = 0; j < h; ++j) {
      double w = double(w0[column * h + j]);
      if (f >= fDiagonal) w += double(w0[(column + kDiagonalTwin) * h + j]);
      c.w0[f * h + j] = T(scale * w);
    }
  }
  double step = c.tensor.scalars->lr * spec.step_mult;
  if (spec.parameter_rms) step *= std::sqrt(squares[fP] + spec.scale_epsilon);
  const double multiplier[2] = {step, spec.exp_mult * kLog2E};
  for (int o = 0; o < 2; ++o) {
    for (int64_t j = 0; j < h; ++j)
      c.w_out[2 * j + o] = T(multiplier[o] * double(c.theta[at.w_out + 2 * j + o]));
    c.b_out[o] = T(multiplier[o] * double(c.theta[at.b_out + o]));
  }
}

// Adds the time from its construction on to one of the times of the passes, if there are any.
struct Clock {
  PassTimes* times;
  double share;  // 1 / threads where each thread works on tensors of its own
  std::mutex* mutex;
};
class Timed {
 public:
  Timed(const Clock& clock, double PassTimes::* pass) : clock_(clock), pass_(pass) {
    if (clock_.times) begin_ = std::chrono::steady_clock::now();
  }
  ~Timed() {
    if (!clock_.times) return;
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin_;
    const std::lock_guard<std::mutex> lock(*clock_.mutex);
    clock_.times->*pass_ += clock_.share * taken.count();
  }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  const Clock& clock_;
  double PassTimes::* pass_;
  std::chrono::steady_clock::time_point begin_;
};

// Runs `pass` over all tiles. Passes alternate in direction: each begins where the cache still holds what the
// one before read last.
template <typename T>
void run_tiles(const Pool& pool, const TensorStep<T>& c, void (*pass)(const TensorStep<T>&, int64_t),
               bool backwards = false) {
  struct Work {
    const TensorStep<T>* c;
    void (*pass)(const TensorStep<T>&, int64_t);
    int64_t first, direction;
  };
  const int64_t tiles = c.tiling.tiles();
  Work work = {&c, pass, backwards ? tiles - 1 : 0, backwards ? -1 : 1};
  if (tiles == 1) return pass(c, 0);
  pool.run(
      pool.context, tiles,
      [](void* w, int64_t i) {
        const Work& work = *static_cast<Work*>(w);
        work.pass(*work.c, work.first + i * work.direction);
      },
      &work);
}

template <typename T>
void step_tensor(const Spec& spec, const Tensor& tensor, double clip, const Pool& pool, Arena& arena,
                 const Clock& clock) {
  const KernelTable<T>& k = table<T>();
  TensorStep<T> c = describe<T>(spec, tensor, clip);
  arena.clear();
  take_scratch(c, arena);
  fold_time(c, spec);
  const bool factored = tensor.loops.factored;
  double squares[kFeatures];
  if (c.lagged) {
    const Timed timed(clock, &PassTimes::apply);
    if (factored) k.fold_factors(c);
    read_mean_squares(c, squares);
    fold_network(c, spec, squares);
    run_tiles(pool, c, k.apply);
    if (factored) k.update_factors(c);
    mean_squares(c, squares);
    write_mean_squares(c, squares);
    return;
  }
  if (factored) {
    const Timed timed(clock, &PassTimes::factor_statistics);
    run_tiles(pool, c, k.factor_statistics);
    k.update_factors(c);
    k.fold_factors(c);
  }
  {
    const Timed timed(clock, &PassTimes::feature_statistics);
    run_tiles(pool, c, k.feature_statistics, true);
    mean_squares(c, squares);
    fold_network(c, spec, squares);
  }
  const Timed timed(clock, &PassTimes::apply);
  c.lagged =
      spec.lagged;  // the first step of lagged statistics clips like all others; its own sums serve the next
  run_tiles(pool, c, k.apply);
  if (spec.lagged) write_mean_squares(c, squares);
}

void step_one(const Spec& spec, const Tensor& tensor, double clip, const Pool& pool, Arena& arena,
              const Clock& clock) {
  if (tensor.dtype == Dtype::float32)
    step_tensor<float>(spec, tensor, clip, pool, arena, clock);
  else
    step_tensor<double>(spec, tensor, clip, pool, arena, clock);
}

// ---- clipping by the global norm ----

int64_t elements(const Tensor& t) {
  return t.loops.batch0 * t.loops.x * t.loops.batch1 * t.loops.y * t.loops.batch2;
}

template <typename T>
double tile_square_sum(const Spec& spec, const Tensor& tensor, int64_t tile) {
  return table<T>().square_sum(describe<T>(spec, tensor, 1.0), tile);
}

// One factor per group: min(1, max_norm / (norm + 1e-6)).
std::vector<double> clip_factors(const Spec& spec, const Tensor* tensors, int64_t count,
                                 const double* max_norms, int32_t groups, const Pool& pool) {
  struct Piece {
    int64_t tensor, tile;
    double sum;
  };
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < count; ++i)
    if (tensors[i].clip_group >= 0 && elements(tensors[i]) > 0) {
      const int64_t tiles = tiling_of(tensors[i].loops).tiles();
      for (int64_t tile = 0; tile < tiles; ++tile) pieces.push_back({i, tile, 0.0});
    }
  std::vector<double> factors(size_t(groups), 1.0);
  if (pieces.empty()) return factors;
  struct Work {
    const Spec* spec;
    const Tensor* tensors;
    std::vector<Piece>* pieces;
  } work = {&spec, tensors, &pieces};
  pool.run(
      pool.context, int64_t(pieces.size()),
      [](void* w, int64_t i) {
        const Work& work = *static_cast<Work*>(w);
        Piece& piece = (*work.pieces)[size_t(i)];
        const Tensor& tensor = work.tensors[piece.tensor];
        piece.sum = tensor.dtype == Dtype::float32 ? tile_square_sum<float>(*work.spec, tensor, piece.tile)
                                                   : tile_square_sum<double>(*work.spec, tensor, piece.tile);
      },
      &work);
  std::vector<double> squares(size_t(groups), 0.0);
  for (const Piece& piece : pieces) squares[size_t(tensors[piece.tensor].clip_group)] += piece.sum;
  for (int32_t g = 0; g < groups; ++g) {
    const double factor = max_norms[g] / (std::sqrt(squares[size_t(g)]) + kClipEpsilon);
    if (!(factor >= 1.0)) factors[size_t(g)] = factor;  // NaN stays NaN, as in PyTorch
  }
  return factors;
}

// ---- checks ----

[[noreturn]] void refuse(int64_t index, const std::string& why) {
  throw std::invalid_argument("tensor " + std::to_string(index) + ": " + why);
}

// Whether elements may be stored so where arithmetic is in type `arithmetic`.
bool storable(Dtype stored, Dtype arithmetic) {
  const bool half = stored == Dtype::bfloat16 || stored == Dtype::float16;
  return stored == arithmetic || (half && arithmetic == Dtype::float32);
}

void check(const Spec& spec, const Tensor* tensors, int64_t count, int32_t clip_groups) {
  if (spec.hidden_size < 2 || spec.hidden_size > 256)
    throw std::invalid_argument("hidden_size " + std::to_string(spec.hidden_size) + " is not in 2..256");
  if (spec.hidden_layers != 1 && spec.hidden_layers != 2)
    throw std::invalid_argument("hidden_layers " + std::to_string(spec.hidden_layers) + " is not 1 or 2");
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& t = tensors[i];
    const Loops& l = t.loops;
    if (l.batch0 < 0 || l.x < 0 || l.batch1 < 0 || l.y < 0 || l.batch2 < 0) refuse(i, "negative size");
    if (!l.factored && (l.batch0 != 1 || l.x != 1 || l.batch1 != 1 || l.batch2 != 1))
      refuse(i, "not factored, but more than one axis");
    if (t.dtype != Dtype::float32 && t.dtype != Dtype::float64)
      refuse(i, "dtype is neither float32 nor float64");
    if (!storable(t.param.dtype, t.dtype) || !storable(t.grad.dtype, t.dtype) ||
        !storable(t.output.dtype, t.dtype))
      refuse(i, "storage is neither of the dtype nor, with float32, bfloat16 or float16");
    if (t.clip_group >= clip_groups) refuse(i, "clip group out of range");
    if (!t.scalars || !t.theta) refuse(i, "no scalars or no meta-parameters");
    if (elements(t) == 0) continue;
    if (!t.param.data || !t.grad.data || !t.output.data || !t.momentum || !t.second_moment || !t.row ||
        (l.factored && !t.column) || (spec.lagged && !t.mean_squares))
      refuse(i, "a pointer is null");
    if (t.momentum_stride != 0 && t.momentum_stride < elements(t)) refuse(i, "momenta overlap");
    if (t.param.strides || t.grad.strides || t.output.strides) {
      if (t.ndim < 0 || t.ndim > 64 || !t.sizes) refuse(i, "strides without sizes, or more than 64 axes");
      int64_t n = 1;
      for (int axis = 0; axis < t.ndim; ++axis) n *= t.sizes[axis];
      if (n != elements(t)) refuse(i, "sizes do not agree with the loops");
    }
  }
}

}  // namespace

int64_t theta_size(const Spec& spec) { return ThetaLayout(spec).size; }

const char* instruction_set() { return kernel_names()[in_use()].c_str(); }

const char* const* available_instruction_sets() {
  static const std::vector<const char*> names = [] {
    std::vector<const char*> n;
    for (const std::string& name : kernel_names()) n.push_back(name.c_str());
    n.push_back(nullptr);
    return n;
  }();
  return names.data();
}

void set_instruction_set(const char* name) {
  std::string known;
  for (size_t i = 0; i < kernel_names().size(); ++i) {
    if (kernel_names()[i] == name) {
      chosen.store(i, std::memory_order_relaxed);
      return;
    }
    known += (known.empty() ? "" : ", ") + kernel_names()[i];
  }
  throw std::invalid_argument("instruction set '" + std::string(name) +
                              "' is not available; available: " + known);
}

void small_fc_step(const Spec& spec, const Tensor* tensors, int64_t count, const double* max_norms,
                   int32_t clip_groups, const Pool& pool, PassTimes* times) {
  check(spec, tensors, count, clip_groups);
  const std::vector<double> clip = clip_factors(spec, tensors, count, max_norms, clip_groups, pool);

  // Small tensors go to one thread each, several to a task; large ones are spread over all threads by their
  // tiles.
  struct Batch {
    int64_t begin, end;
  };
  std::vector<int64_t> small, large;
  size_t small_bytes = 0, large_bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = elements(tensors[i]);
    if (n == 0) continue;
    (n < kLargeTensor ? small : large).push_back(i);
    size_t& bytes = n < kLargeTensor ? small_bytes : large_bytes;
    bytes = std::max(bytes, scratch_bytes(spec, tensors[i]));
  }
  std::vector<Batch> batches;
  for (int64_t i = 0, work = 0; i < int64_t(small.size()); ++i) {
    if (work == 0) batches.push_back({i, i});
    batches.back().end = i + 1;
    work +=
        elements(tensors[small[size_t(i)]]) + 256;  // the constant: what a tensor costs besides its elements
    if (work >= kTileElements) work = 0;
  }
  struct Work {
    const Spec* spec;
    const Tensor* tensors;
    const std::vector<int64_t>* small;
    const std::vector<Batch>* batches;
    const std::vector<double>* clip;
    Arenas* arenas;
    Pool serial;
    Clock clock;

    void step(int64_t i, const Pool& pool, Arena& arena, const Clock& clock) const {
      const Tensor& tensor = tensors[i];
      step_one(*spec, tensor, tensor.clip_group < 0 ? 1.0 : (*clip)[size_t(tensor.clip_group)], pool, arena,
               clock);
    }
  };
  std::mutex mutex;
  const int64_t threads = pool.threads(pool.context);
  const Clock shared = {times, 1.0 / double(threads), &mutex}, whole = {times, 1.0, &mutex};
  // All memory is had before the first tensor is written.
  Arenas arenas(std::min(threads, int64_t(batches.size())), small_bytes);
  Arena arena;
  arena.reserve(large_bytes);
  Work work = {&spec, tensors, &small, &batches, &clip, &arenas, serial_pool(), shared};
  if (!batches.empty())
    pool.run(
        pool.context, int64_t(batches.size()),
        [](void* w, int64_t b) {
          const Work& work = *static_cast<Work*>(w);
          const Batch& batch = (*work.batches)[size_t(b)];
          work.arenas->lend([&](Arena& arena) {
            for (int64_t i = batch.begin; i < batch.end; ++i)
              work.step((*work.small)[size_t(i)], work.serial, arena, work.clock);
          });
        },
        &work);
  for (int64_t i : large) work.step(i, pool, arena, whole);
}

}  // namespace lopt
