// The driver of a step: checks, instruction sets, clipping, and the order of the passes.
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

#include "csrc/tensor_step.h"

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

}  // namespace

template <>
const KernelTable<float>& table<float>() {
  return kernels()[in_use()]->f32;
}
template <>
const KernelTable<double>& table<double>() {
  return kernels()[in_use()]->f64;
}

namespace {

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

template <typename T>
void update_factors(const KernelTable<T>& k, const TensorStep<T>& c) {
  k.add_factor_sums(c);
  k.move_factors(c, c.x_sums, T(c.tensor.loops.y), c.scratch, T(c.tensor.loops.x));
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
    if (factored) update_factors(k, c);
    mean_squares(c, squares);
    write_mean_squares(c, squares);
    return;
  }
  if (factored) {
    const Timed timed(clock, &PassTimes::factor_statistics);
    run_tiles(pool, c, k.factor_statistics);
    update_factors(k, c);
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

// Whether elements may be stored so where arithmetic is in type `arithmetic`.
bool storable(Dtype stored, Dtype arithmetic) {
  const bool half = stored == Dtype::bfloat16 || stored == Dtype::float16;
  return stored == arithmetic || (half && arithmetic == Dtype::float32);
}

}  // namespace

void refuse(int64_t index, const std::string& why) {
  throw std::invalid_argument("tensor " + std::to_string(index) + ": " + why);
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

  std::mutex mutex;
  const Clock shared = {times, 1.0 / double(pool.threads(pool.context)), &mutex},
              alone = {times, 1.0, &mutex};
  std::vector<Share> shares;
  for (int64_t i = 0; i < count; ++i)
    if (const int64_t n = elements(tensors[i])) shares.push_back({i, n, scratch_bytes(spec, tensors[i])});
  for_each_tensor(shares, pool, [&](int64_t i, const Pool& threads, Arena& arena, bool all_threads) {
    const Tensor& tensor = tensors[i];
    step_one(spec, tensor, tensor.clip_group < 0 ? 1.0 : clip[size_t(tensor.clip_group)], threads, arena,
             all_threads ? alone : shared);
  });
}

}  // namespace lopt
