// ktcore._C: addresses, shapes, strides and types in; nothing of torch. The Python side has checked
// tensors; here only what would otherwise crash is checked again.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/prepared.h"
#include "common/checksum.h"
#include "common/cpu_features.h"
#include "common/engine.h"
#include "common/isa.h"
#include "common/numa.h"
#include "common/thread_pool.h"

namespace py = pybind11;
using namespace ktcore;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr const char* kLayoutNames[kWeightFormats] = {
    "bf16",       "f16",    "f32",        "f8",     "int8",       "codes2", "codes2_g16", "codes3",
    "codes3_g16", "codes4", "codes4_g16", "codes5", "codes5_g16", "codes6", "codes6_g16", "codes8",
    "codes8_g16", "table3", "table3_g16", "table4", "table4_g16"};

template <size_t N>
int index_of(const char* what, const char* const (&names)[N], const std::string& name) {
  for (size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<int>(i);
  }
  throw std::invalid_argument(std::string(what) + ": there is no '" + name + "' here");
}

WeightFormat layout_of(const std::string& name) {
  return static_cast<WeightFormat>(index_of("format", kLayoutNames, name));
}

StoredFormat stored_format_of(const std::string& name) {
  static constexpr const char* kNames[] = {"bf16", "int8", "int4_g32"};
  return static_cast<StoredFormat>(index_of("format", kNames, name));
}

DType dtype_of(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("dtype: expected 0 (f32), 1 (f16) or 2 (bf16)");
  return static_cast<DType>(code);
}

DotKind dot_kind_of(const std::string& name) {
  if (name == "int8") return DotKind::int8;
  if (name == "bf16") return DotKind::bf16;
  if (name == "f32") return DotKind::f32;
  throw std::invalid_argument("kind: expected int8, bf16 or f32, got '" + name + "'");
}

void need_positive(const char* name, int64_t value) {
  if (value <= 0) {
    throw std::invalid_argument(std::string(name) + ": expected more than 0, got " +
                                std::to_string(value));
  }
}

// The kernels of the most capable instruction set that runs here, for measuring the machine.
const KernelTable& best_kernels() {
  const KernelTable* best = nullptr;
  for (const Isa& isa : isas()) {
    if (isa.missing().empty()) best = isa.table;
  }
  if (best == nullptr) throw std::runtime_error("no native instruction set runs on this machine");
  return *best;
}

void need(const char* name, bool wanted, uintptr_t address) {
  if (wanted && address == 0) {
    throw std::invalid_argument(std::string(name) + ": this layout needs them");
  }
}

// block_size, type_size and fields (at, size, bits, run, shift): see CodeField.
using BlockArguments =
    std::tuple<int64_t, int64_t, std::vector<std::tuple<int64_t, int64_t, int, int64_t, int>>>;

StoredMatrix stored_matrix(const WeightLayout& layout, uintptr_t data, uintptr_t scales,
                           uintptr_t row_scales, uintptr_t offsets, uintptr_t inner_scales,
                           uintptr_t inner_offsets, uintptr_t columns, int64_t scale_size,
                           int64_t group_size, int64_t cols, const BlockArguments& blocks) {
  need("data", true, data);
  need("scales", layout.scaled() || layout.format == WeightFormat::int8, scales);
  if (layout.scaled()) {
    need("row_scales", layout.row_scales, row_scales);
    need("offsets", layout.offsets, offsets);
    need("inner_scales", layout.inner_scales, inner_scales);
    need("inner_offsets", layout.inner_offsets, inner_offsets);
    need_positive("scale_size", scale_size);
    if (layout.inner_scales || layout.inner_offsets) need_positive("group_size", group_size);
  }
  StoredMatrix out{};
  out.data = pointer<const void>(data);
  out.scales = pointer<const float>(scales);
  out.row_scales = pointer<const float>(row_scales);
  out.offsets = pointer<const float>(offsets);
  out.inner_scales = pointer<const int8_t>(inner_scales);
  out.inner_offsets = pointer<const int8_t>(inner_offsets);
  out.scale_size = scale_size;
  out.group_size = group_size;
  need("columns", layout.reordered, columns);
  out.columns = pointer<const int64_t>(columns);
  const auto& [block_size, type_size, fields] = blocks;
  if (fields.empty()) return out;
  const auto check = [](bool sound) {
    if (!sound) throw std::invalid_argument("blocks: the fields are not those of such blocks");
  };
  check(layout.code_bits() > 0 && block_size > 0 && block_size % kGroup == 0 &&
        cols % block_size == 0);
  for (const auto& [at, size, bits, run, shift] : fields) {
    check(at >= 0 && size > 0 && at <= type_size && size <= type_size - at);
    check(bits == 1 || bits == 2 || bits == 4 || bits == 8);
    check(shift >= 0 && shift + bits <= 8 && size == block_size * bits / 8);
    // A step of 32 columns or of a run has all its bits at the same places.
    check(run > 0 && size % run == 0 && (run % kGroup == 0 || kGroup % run == 0));
    out.fields.push_back({at, size, bits, run, shift});
  }
  out.block_size = block_size;
  out.type_size = type_size;
  return out;
}

// Contiguous bytes of a Python object, which it keeps alive.
Buffer memory_of(const py::buffer& object) {
  auto view = std::make_shared<py::buffer_info>(object.request());
  if (view->ndim != 1 || view->itemsize != 1 || (view->size > 0 && view->strides[0] != 1)) {
    throw std::invalid_argument("memory: expected contiguous bytes");
  }
  const auto* data = static_cast<const uint8_t*>(view->ptr);
  const auto bytes = static_cast<size_t>(view->size);
  return Buffer(data, bytes, std::move(view));
}

// What both kinds of packed weights offer of their memory.
template <class Packed>
void def_memory(py::class_<Packed>& c) {
  c.def_property_readonly("nbytes", [](const Packed& self) { return self.buffer.size(); })
      .def(
          "lock",
          [](const Packed& self) {
            py::gil_scoped_release release;
            return self.buffer.lock();
          },
          "Has the system keep the weights in memory. Empty, or why it refuses.")
      .def_buffer([](Packed& self) {
        return py::buffer_info(self.buffer.data(), static_cast<py::ssize_t>(self.buffer.size()),
                               /*readonly=*/true);
      });
}

// A number of operator calls, to be made again and again with the same arguments: what they point to may
// change in between, as captured graphs of accelerators have it.
class Recording {
 public:
  // Adds a call that reads `weights`, which this keeps alive.
  void add(const char* op, std::function<void()> call, std::vector<py::object> weights) {
    calls_.push_back({op, std::move(call)});
    for (py::object& each : weights) weights_.push_back(std::move(each));
  }
  void run() const {
    for (const Call& each : calls_) each.run();
  }
  // The same, with the operator and the seconds of each.
  std::vector<std::pair<const char*, double>> time() const {
    using Clock = std::chrono::steady_clock;
    std::vector<std::pair<const char*, double>> out;
    for (const Call& each : calls_) {
      const auto start = Clock::now();
      each.run();
      out.emplace_back(each.op, std::chrono::duration<double>(Clock::now() - start).count());
    }
    return out;
  }
  size_t size() const { return calls_.size(); }

 private:
  struct Call {
    const char* op;
    std::function<void()> run;
  };
  std::vector<Call> calls_;
  std::vector<py::object> weights_;
};

// Where this thread's calls are added, beside being made.
thread_local Recording* t_recording = nullptr;

template <class Call, class... Weights>
void perform(const char* op, Call call, const Weights&... weights) {
  if (t_recording != nullptr) t_recording->add(op, call, {py::cast(weights)...});
  py::gil_scoped_release release;
  call();
}

ConstHeads heads_of(uintptr_t data, int64_t stride, int64_t head_stride, DType type) {
  return {pointer<const void>(data), stride, head_stride, type};
}
Heads out_heads_of(uintptr_t data, int64_t stride, int64_t head_stride, DType type) {
  return {pointer<void>(data), stride, head_stride, type};
}

// keys, values, dtype, pages, heads, key_size, value_size, key_stride, value_stride, latent
using PagesArguments = std::tuple<uintptr_t, uintptr_t, int, int64_t, int64_t, int64_t, int64_t,
                                  int64_t, int64_t, bool>;

KvPages pages_of(const PagesArguments& a) {
  return {pointer<void>(std::get<0>(a)),
          pointer<void>(std::get<1>(a)),
          dtype_of(std::get<2>(a)),
          std::get<3>(a),
          std::get<4>(a),
          std::get<5>(a),
          std::get<6>(a),
          std::get<7>(a),
          std::get<8>(a),
          std::get<9>(a)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of ktcore, for every instruction set at once.";
#if defined(KTCORE_EMULATE_AVX512)
  m.attr("emulates_avx512") = true;
#else
  m.attr("emulates_avx512") = false;
#endif

  m.def(
      "cpu_features",
      [] {
        py::dict out;
        for (const CpuFeature& f : cpu_features()) out[f.name] = py::make_tuple(f.cpu, f.os);
        return out;
      },
      "{feature: (the processor has it, the operating system allows it)}");

  m.def(
      "isas",
      [] {
        py::list out;
        for (const Isa& isa : isas()) {
          py::dict d;
          d["name"] = isa.name;
          d["backend"] = isa.backend;
          d["requires"] = std::vector<std::string>(isa.requires_.begin(), isa.requires_.end());
          d["supported"] = isa.missing().empty();
          d["bf16_products"] = isa.table->bf16_products;
          out.append(d);
        }
        return out;
      },
      "The instruction sets this build has kernels for, most capable last within a backend.");

  m.def("set_num_threads", [](int n) {
    need_positive("num_threads", n);
    py::gil_scoped_release release;
    set_default_pool_size(n);
  });
  m.def("get_num_threads", &default_pool_size);
  m.def(
      "set_prefetch",
      [](int64_t first, int64_t second, int64_t step) {
        const bool best = first == -1 && second == -1 && step == -1;
        if (!best && (first < 0 || second < 0 || step < 1)) {
          throw std::invalid_argument(
              "set_prefetch: expected bytes of at least 0 and a panel_step of at least 1, or -1 "
              "for "
              "all three, got " +
              std::to_string(first) + ", " + std::to_string(second) + ", " + std::to_string(step));
        }
        set_prefetch({first, second, step});
      },
      py::arg("first_level"), py::arg("second_level"), py::arg("panel_step"),
      "How many bytes ahead the weights of few tokens are asked for, for either cache; of how many "
      "lines one is, with many tokens; -1, -1, -1: as is best.");
  m.def("allowed_nodes", &allowed_nodes, "NUMA nodes whose memory this process may use.");
  m.def("set_memory_nodes", &set_memory_nodes);
  m.def("get_memory_nodes", &memory_nodes, "NUMA nodes over which packed weights are spread.");
  m.attr("sources") = KTCORE_SOURCES;  // a digest of csrc/

  m.def(
      "checksum",
      [](const py::buffer& object) {
        const Buffer memory = memory_of(object);
        py::gil_scoped_release release;
        return checksum(memory.data(), memory.size());
      },
      py::arg("memory"), "A fast checksum of bytes, on all threads: see checksum.h.");

  m.def(
      "measure_read_bandwidth",
      [](int threads, size_t bytes) {
        need_positive("threads", threads);
        const KernelTable& table = best_kernels();
        py::gil_scoped_release release;
        return measure_read_bandwidth(table, threads, bytes);
      },
      py::arg("threads"), py::arg("bytes"), "GB/s that a plain read loop reaches.");
  m.def(
      "measure_dot_peak",
      [](const std::string& isa, const std::string& kind, int threads) {
        need_positive("threads", threads);
        const KernelTable& table = kernels(isa);
        const DotKind k = dot_kind_of(kind);
        py::gil_scoped_release release;
        return measure_dot_peak(table, k, threads);
      },
      py::arg("isa"), py::arg("kind"), py::arg("threads"),
      "Gop/s that dot products reach in registers; a multiply-add counts as two.");

  py::class_<WeightLayout>(m, "WeightLayout")
      .def(py::init([](const std::string& format, int scale_type, int64_t span, bool inner_scales,
                       bool row_scales, bool offsets, bool inner_offsets, bool inner_nibbles,
                       int bias, const std::vector<int>& levels, int largest, bool reordered,
                       bool byte_activations) {
             need_positive("span", span);
             if (levels.size() > 16) throw std::invalid_argument("levels: at most 16");
             WeightLayout layout;
             layout.format = layout_of(format);
             if (scale_type < 0 || scale_type > 3) {
               throw std::invalid_argument("scale_type: expected 0 to 3, got " +
                                           std::to_string(scale_type));
             }
             layout.scale_type = static_cast<ScaleType>(scale_type);
             if (layout.scale_type == ScaleType::e8m0 && layout.format == WeightFormat::f8) {
               throw std::invalid_argument(
                   "scale_type: f8 has NaN for a scale, which e8m0 has not here");
             }
             layout.span = span;
             layout.inner_scales = inner_scales;
             layout.row_scales = row_scales;
             layout.offsets = offsets;
             layout.inner_offsets = inner_offsets;
             if (inner_nibbles &&
                 !(layout.format == WeightFormat::codes2_g16 && inner_scales && inner_offsets)) {
               throw std::invalid_argument(
                   "inner_nibbles: only of codes2_g16 with both inner factors");
             }
             layout.inner_nibbles = inner_nibbles;
             layout.bias = bias;
             if (largest < 1 || largest > 128) {
               throw std::invalid_argument("largest: expected 1 to 128, got " +
                                           std::to_string(largest));
             }
             layout.largest = largest;
             layout.reordered = reordered;
             layout.byte_activations = byte_activations;
             for (size_t i = 0; i < levels.size(); ++i) {
               layout.levels[i] = static_cast<int8_t>(levels[i]);
             }
             return layout;
           }),
           py::arg("format"), py::kw_only(), py::arg("scale_type") = 0, py::arg("span") = 1,
           py::arg("inner_scales") = false, py::arg("row_scales") = false,
           py::arg("offsets") = false, py::arg("inner_offsets") = false,
           py::arg("inner_nibbles") = false, py::arg("bias") = 0,
           py::arg("levels") = std::vector<int>{}, py::arg("largest") = 128,
           py::arg("reordered") = false, py::arg("byte_activations") = false)
      .def(
          "describe",
          [](const WeightLayout& self) {
            py::dict out;
            out["format"] = kLayoutNames[static_cast<int>(self.format)];
            out["scale_type"] = static_cast<int>(self.scale_type);
            out["span"] = self.span;
            out["inner_scales"] = self.inner_scales;
            out["row_scales"] = self.row_scales;
            out["offsets"] = self.offsets;
            out["inner_offsets"] = self.inner_offsets;
            out["inner_nibbles"] = self.inner_nibbles;
            out["bias"] = self.bias;
            out["largest"] = self.largest;
            out["reordered"] = self.reordered;
            out["byte_activations"] = self.byte_activations;
            out["levels"] = std::vector<int>(std::begin(self.levels), std::end(self.levels));
            return out;
          },
          "The arguments that make this layout again, as plain data.")
      .def("__eq__", [](const WeightLayout& a, const WeightLayout& b) { return a == b; });

  py::class_<PackedMatrix> packed_matrix(m, "PackedMatrix", py::buffer_protocol());
  def_memory(packed_matrix);
  packed_matrix
      .def(py::init([](const WeightLayout& layout, int64_t rows, int64_t cols) {
        need_positive("rows", rows);
        need_positive("cols", cols);
        return new PackedMatrix(layout, rows, cols);
      }))
      .def(py::init(
          [](const WeightLayout& layout, int64_t rows, int64_t cols, const py::buffer& memory) {
            need_positive("rows", rows);
            need_positive("cols", cols);
            return new PackedMatrix(layout, rows, cols, memory_of(memory));
          }))
      .def(
          "pack",
          [](PackedMatrix& self, uintptr_t data, uintptr_t scales, uintptr_t row_scales,
             uintptr_t offsets, uintptr_t inner_scales, uintptr_t inner_offsets, uintptr_t columns,
             int64_t scale_size, int64_t group_size, const BlockArguments& blocks) {
            const StoredMatrix stored =
                stored_matrix(self.layout, data, scales, row_scales, offsets, inner_scales,
                              inner_offsets, columns, scale_size, group_size, self.cols, blocks);
            py::gil_scoped_release release;
            self.pack(stored);
          },
          py::arg("data"), py::arg("scales") = 0, py::arg("row_scales") = 0, py::arg("offsets") = 0,
          py::arg("inner_scales") = 0, py::arg("inner_offsets") = 0, py::arg("columns") = 0,
          py::arg("scale_size") = 0, py::arg("group_size") = 0,
          py::arg("blocks") = BlockArguments{})
      .def_readonly("layout", &PackedMatrix::layout)
      .def_readonly("rows", &PackedMatrix::rows)
      .def_readonly("cols", &PackedMatrix::cols);

  py::class_<PackedExperts> packed_experts(m, "PackedExperts", py::buffer_protocol());
  def_memory(packed_experts);
  packed_experts
      .def(py::init([](const WeightLayout& gate_up, const WeightLayout& down, int64_t e, int64_t h,
                       int64_t i) {
        need_positive("num_experts", e);
        need_positive("hidden_size", h);
        need_positive("intermediate_size", i);
        return new PackedExperts(gate_up, down, e, h, i);
      }))
      .def(py::init([](const WeightLayout& gate_up, const WeightLayout& down, int64_t e, int64_t h,
                       int64_t i, const py::buffer& memory) {
        need_positive("num_experts", e);
        need_positive("hidden_size", h);
        need_positive("intermediate_size", i);
        return new PackedExperts(gate_up, down, e, h, i, memory_of(memory));
      }))
      .def(
          "pack",
          [](PackedExperts& self, int64_t expert, const std::string& projection, uintptr_t data,
             uintptr_t scales, uintptr_t row_scales, uintptr_t offsets, uintptr_t inner_scales,
             uintptr_t inner_offsets, uintptr_t columns, int64_t scale_size, int64_t group_size,
             const BlockArguments& blocks) {
            if (expert < 0 || expert >= self.num_experts) throw std::out_of_range("expert");
            PackedExperts::Projection p;
            if (projection == "gate")
              p = PackedExperts::Projection::gate;
            else if (projection == "up")
              p = PackedExperts::Projection::up;
            else if (projection == "down")
              p = PackedExperts::Projection::down;
            else
              throw std::invalid_argument("projection: expected gate, up or down, got '" +
                                          projection + "'");
            const WeightLayout& layout =
                p == PackedExperts::Projection::down ? self.down_layout : self.gate_up_layout;
            const StoredMatrix stored = stored_matrix(
                layout, data, scales, row_scales, offsets, inner_scales, inner_offsets, columns,
                scale_size, group_size,
                p == PackedExperts::Projection::down ? self.intermediate_size : self.hidden_size,
                blocks);
            py::gil_scoped_release release;
            self.pack(expert, p, stored);
          },
          py::arg("expert"), py::arg("projection"), py::arg("data"), py::arg("scales") = 0,
          py::arg("row_scales") = 0, py::arg("offsets") = 0, py::arg("inner_scales") = 0,
          py::arg("inner_offsets") = 0, py::arg("columns") = 0, py::arg("scale_size") = 0,
          py::arg("group_size") = 0, py::arg("blocks") = BlockArguments{})
      .def(
          "in_one_piece",
          [](const py::object& self) {
            const auto& packed = self.cast<const PackedExperts&>();
            if (packed.gate_up_runs().size() == 1) return self;
            return py::cast(packed.in_one_piece());
          },
          "The same weights as for a single NUMA node: how they are stored.")
      .def_property_readonly(
          "nodes", [](const PackedExperts& self) { return self.gate_up_runs().size(); },
          "NUMA nodes over which the weights are cut.")
      .def_readonly("gate_up_layout", &PackedExperts::gate_up_layout)
      .def_readonly("down_layout", &PackedExperts::down_layout)
      .def_readonly("num_experts", &PackedExperts::num_experts)
      .def_readonly("hidden_size", &PackedExperts::hidden_size)
      .def_readonly("intermediate_size", &PackedExperts::intermediate_size);

  m.def("moe", [](const std::string& isa, const PackedExperts& experts, uintptr_t x, int dtype,
                  int64_t tokens, int64_t x_stride, uintptr_t ids, uintptr_t weights, int64_t top_k,
                  uintptr_t gate_bias, uintptr_t up_bias, uintptr_t down_bias, uintptr_t out,
                  int64_t out_stride, int activation, bool exact) {
    const DType type = dtype_of(dtype);
    const MoeArgs args{&experts,
                       {pointer<const void>(x), x_stride, type},
                       {pointer<void>(out), out_stride, type},
                       tokens,
                       top_k,
                       pointer<const int64_t>(ids),
                       pointer<const float>(weights),
                       pointer<const float>(gate_bias),
                       pointer<const float>(up_bias),
                       pointer<const float>(down_bias),
                       static_cast<Activation>(activation),
                       exact};
    const KernelTable& table = kernels(isa);
    perform("moe", [&table, args] { moe(table, args); }, experts);
  });

  def_prepared(m);

  m.def("linear", [](const std::string& isa, const PackedMatrix& weight, uintptr_t x, int dtype,
                     int64_t tokens, int64_t x_stride, uintptr_t bias, uintptr_t out,
                     int64_t out_stride, bool exact) {
    const DType type = dtype_of(dtype);
    const LinearArgs args{&weight,
                          {pointer<const void>(x), x_stride, type},
                          {pointer<void>(out), out_stride, type},
                          tokens,
                          pointer<const float>(bias),
                          exact};
    const KernelTable& table = kernels(isa);
    perform("linear", [&table, args] { linear(table, args); }, weight);
  });

  m.def("route", [](const std::string& isa, uintptr_t logits, int64_t stride, int64_t tokens,
                    int64_t num_experts, int64_t top_k, int scoring, uintptr_t correction_bias,
                    int64_t n_group, int64_t topk_group, bool renormalize, float scale,
                    uintptr_t ids, uintptr_t weights) {
    if (num_experts > 4096) throw std::invalid_argument("num_experts: at most 4096");
    const RouteJob job{pointer<const float>(logits),
                       stride,
                       tokens,
                       num_experts,
                       top_k,
                       static_cast<Scoring>(scoring),
                       pointer<const float>(correction_bias),
                       n_group,
                       topk_group,
                       renormalize,
                       scale,
                       pointer<int64_t>(ids),
                       pointer<float>(weights)};
    const KernelTable& table = kernels(isa);
    perform("route", [&table, job] { route(table, job); });
  });

  m.def("rms_norm", [](const std::string& isa, uintptr_t x, int64_t x_stride, int64_t x_head_stride,
                       uintptr_t residual, int64_t residual_stride, int64_t residual_head_stride,
                       uintptr_t sum, uintptr_t out, int dtype, int64_t tokens, int64_t heads,
                       int64_t size, uintptr_t weight, float eps) {
    const DType type = dtype_of(dtype);
    const NormJob job{heads_of(x, x_stride, x_head_stride, type),
                      heads_of(residual, residual_stride, residual_head_stride, type),
                      out_heads_of(sum, heads * size, size, type),
                      out_heads_of(out, heads * size, size, type),
                      tokens,
                      heads,
                      size,
                      pointer<const float>(weight),
                      eps};
    const KernelTable& table = kernels(isa);
    perform("rms_norm", [&table, job] { rms_norm(table, job); });
  });

  m.def("rotary", [](const std::string& isa, uintptr_t x, int64_t x_stride, int64_t x_head_stride,
                     uintptr_t out, int dtype, int64_t tokens, int64_t heads, int64_t head_size,
                     int64_t rotary_size, uintptr_t cos, uintptr_t sin, int64_t table_positions,
                     uintptr_t positions, bool interleaved) {
    const DType type = dtype_of(dtype);
    const RotaryJob job{heads_of(x, x_stride, x_head_stride, type),
                        out_heads_of(out, heads * head_size, head_size, type),
                        tokens,
                        heads,
                        head_size,
                        rotary_size,
                        pointer<const float>(cos),
                        pointer<const float>(sin),
                        table_positions,
                        pointer<const int64_t>(positions),
                        interleaved};
    const KernelTable& table = kernels(isa);
    perform("rotary", [&table, job] { rotary(table, job); });
  });

  m.def("store_kv",
        [](const std::string& isa, uintptr_t key, int64_t key_stride, int64_t key_head_stride,
           uintptr_t value, int64_t value_stride, int64_t value_head_stride, int dtype,
           int64_t tokens, const PagesArguments& pages, uintptr_t slots) {
          const DType type = dtype_of(dtype);
          const StoreKvJob job{heads_of(key, key_stride, key_head_stride, type),
                               heads_of(value, value_stride, value_head_stride, type), tokens,
                               pages_of(pages), pointer<const int64_t>(slots)};
          const KernelTable& table = kernels(isa);
          perform("store_kv", [&table, job] { store_kv(table, job); });
        });

  m.def("attention",
        [](const std::string& isa, uintptr_t query, int64_t query_stride, int64_t query_head_stride,
           uintptr_t out, int dtype, int64_t tokens, int64_t heads, const PagesArguments& pages,
           uintptr_t page_table, int64_t table_stride, uintptr_t lengths, uintptr_t query_begin,
           int64_t sequences, float scale) {
          const DType type = dtype_of(dtype);
          const KvPages kv = pages_of(pages);
          const AttentionArgs args{heads_of(query, query_stride, query_head_stride, type),
                                   out_heads_of(out, heads * kv.value_size, kv.value_size, type),
                                   tokens,
                                   heads,
                                   kv,
                                   pointer<const int32_t>(page_table),
                                   table_stride,
                                   pointer<const int64_t>(lengths),
                                   pointer<const int64_t>(query_begin),
                                   sequences,
                                   scale};
          const KernelTable& table = kernels(isa);
          perform("attention", [&table, args] { attention(table, args); });
        });
  m.attr("page_positions") = kPagePositions;

  py::class_<Recording>(m, "Recording", "Operator calls that can be made again.")
      .def(py::init<>())
      .def("__len__", &Recording::size)
      .def(
          "start", [](Recording& self) { t_recording = &self; },
          "From now on this thread's calls are added, beside being made.")
      .def_static("stop", [] { t_recording = nullptr; })
      .def(
          "time",
          [](const Recording& self) {
            py::gil_scoped_release release;
            return self.time();
          },
          "Makes them, and says how many seconds each takes.")
      .def("run", [](const Recording& self) {
        py::gil_scoped_release release;
        self.run();
      });

  m.def("dequantize", [](const std::string& isa, const std::string& format, int64_t rows,
                         int64_t cols, uintptr_t data, uintptr_t scales, uintptr_t out, int dtype) {
    const DequantizeJob job{stored_format_of(format),
                            rows,
                            cols,
                            pointer<const void>(data),
                            pointer<const void>(scales),
                            pointer<void>(out),
                            dtype_of(dtype)};
    const KernelTable& table = kernels(isa);
    py::gil_scoped_release release;
    dequantize(table, job);
  });

  m.def("quantize",
        [](const std::string& isa, const std::string& format, uintptr_t x, int dtype, int64_t rows,
           int64_t cols, int64_t x_stride, uintptr_t data, uintptr_t scales) {
          const QuantizeJob job{stored_format_of(format),
                                {pointer<const void>(x), x_stride, dtype_of(dtype)},
                                rows,
                                cols,
                                pointer<void>(data),
                                pointer<void>(scales)};
          const KernelTable& table = kernels(isa);
          py::gil_scoped_release release;
          quantize(table, job);
        });
}
