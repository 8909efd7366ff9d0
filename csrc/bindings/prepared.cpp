#include "bindings/prepared.h"

#include <atomic>
#include <bit>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"
#include "common/engine.h"
#include "common/isa.h"

namespace py = pybind11;

namespace ktcore {
namespace {

// Never destroyed: Python may be gone by then.
PyObject* kept(const py::object& object) { return py::object(object).release().ptr(); }

// What torch offers to look into its tensors and to ask how it would compute; without `describe` if it is
// too old for that.
struct Torch {
  PyTypeObject* tensor = nullptr;
  decltype(dlpack::ExchangeApi::describe) describe = nullptr;
  PyObject *empty_like, *contiguous, *memory_format;
  PyObject *grad_enabled, *dispatch_modes, *tracing;

  Torch() {
    const py::module_ torch = py::module_::import("torch"), c = torch.attr("_C");
    const py::object type = torch.attr("Tensor");
    if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return;
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    while (api != nullptr && api->major != dlpack::kMajorVersion) api = api->older;
    if (api == nullptr || api->describe == nullptr) return;
    tensor = reinterpret_cast<PyTypeObject*>(kept(type));
    empty_like = kept(torch.attr("empty_like"));
    contiguous = kept(torch.attr("contiguous_format"));
    memory_format = kept(py::make_tuple("memory_format"));
    grad_enabled = kept(torch.attr("is_grad_enabled"));
    dispatch_modes = kept(c.attr("_len_torch_dispatch_stack"));
    tracing = kept(c.attr("_is_tracing"));
    describe = api->describe;
  }

  // Whether a call has to go through its dispatcher: for a gradient, for a mode, for a tracer.
  bool looks_on() const {
    for (PyObject* question : {grad_enabled, dispatch_modes, tracing}) {
      const auto answer = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(question));
      if (!answer || PyObject_IsTrue(answer.ptr()) != 0) return true;
    }
    return false;
  }
};
const Torch& torch() {
  static const Torch& it = *new Torch;
  return it;
}

std::atomic<int64_t> g_generation{0};
std::vector<PyObject*> g_hindrances;

bool hindered() {
  for (PyObject* variable : g_hindrances) {
    PyObject* value = nullptr;
    if (PyContextVar_Get(variable, Py_None, &value) != 0) return true;
    Py_DECREF(value);
    if (value != Py_None) return true;
  }
  return false;
}

bool type_of(const dlpack::DataType& type, DType& out) {
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kFloat && type.bits == 32) return out = DType::f32, true;
  if (type.code == dlpack::kFloat && type.bits == 16) return out = DType::f16, true;
  if (type.code == dlpack::kBfloat && type.bits == 16) return out = DType::bf16, true;
  return false;
}

// Rows on the CPU, each in one piece: a matrix, or [..., columns] in one piece as a whole.
struct Matrix {
  dlpack::Tensor raw;
  int64_t rows, columns, stride;
  bool floats;
  DType type;  // of floats
  const void* data;

  // Whether an object is such; no exception is left set.
  bool look_into(PyObject* object) {
    if (Py_TYPE(object) != torch().tensor) return false;
    if (torch().describe(object, &raw) != 0) {
      PyErr_Clear();
      return false;
    }
    if (raw.device_type != dlpack::kCpu || raw.ndim < 1 || raw.strides == nullptr) return false;
    const int last = raw.ndim - 1;
    columns = raw.shape[last];
    stride = last == 1 ? raw.strides[0] : columns;
    rows = 1;
    for (int i = last - 1; i >= 0; --i) {
      if (last != 1 && raw.shape[i] != 1 && raw.strides[i] != rows * columns) return false;
      rows *= raw.shape[i];
    }
    floats = type_of(raw.dtype, type);
    data = static_cast<const uint8_t*>(raw.data) + raw.byte_offset;
    return (raw.strides[last] == 1 || columns == 1) && (stride >= columns || rows == 1);
  }
  bool matrix() const { return raw.ndim == 2; }
  bool dense() const { return stride == columns || rows == 1; }
};

const float* bias_of(const py::handle& bias) {
  if (bias.is_none()) return nullptr;
  return reinterpret_cast<const float*>(bias.attr("data_ptr")().cast<uintptr_t>());
}

// Makes the call that the first argument, weights, has prepared, with the other arguments.
template <class Call>
PyObject* call_prepared(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  static PyObject* const name = PyUnicode_InternFromString("prepared");
  PyObject* out = nullptr;
  if (count == 1 + Call::kArguments) {
    const auto held = py::reinterpret_steal<py::object>(PyObject_GetAttr(arguments[0], name));
    if (held && PyCapsule_IsValid(held.ptr(), Call::kName)) {
      const auto* call = static_cast<const Call*>(PyCapsule_GetPointer(held.ptr(), Call::kName));
      if (call->generation == g_generation.load() && !hindered() && !torch().looks_on()) {
        try {
          out = (*call)(arguments + 1);
        } catch (const std::exception&) {  // also what Python raised; nothing is left set
        }
      }
    }
  }
  if (out != nullptr) return out;
  PyErr_Clear();
  Py_RETURN_NONE;
}

template <class Call>
py::object owned(std::unique_ptr<Call> call) {
  return py::capsule(call.release(), Call::kName, [](PyObject* capsule) {
    delete static_cast<Call*>(PyCapsule_GetPointer(capsule, Call::kName));
  });
}

template <class Call>
void def_call(py::module_& m) {
  static PyMethodDef definition{
      Call::kName,
      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_prepared<Call>)),
      METH_FASTCALL, nullptr};
  m.attr(Call::kName) = py::reinterpret_steal<py::object>(PyCFunction_New(&definition, nullptr));
}

// What calls of either operator keep, and what they do alike.
template <class Args, void (*kOperator)(const KernelTable&, const Args&)>
struct Prepared {
  int64_t generation;
  Args args{};
  const KernelTable* table;
  py::object packed;

  // Whether a call of these rows, and with this `exact`, is like the one that was prepared for.
  bool takes(const Matrix& x, int64_t columns, PyObject* exact) const {
    return x.floats && x.type == args.x.dtype && x.rows == args.tokens && x.columns == columns &&
           exact == (args.exact ? Py_True : Py_False);
  }

  // Computes a call on `x` into a tensor that was made for it, which it returns.
  static PyObject* compute(const KernelTable& table, Args call, const Matrix& x,
                           py::object result) {
    Matrix out;
    if (!result || !out.look_into(result.ptr())) return nullptr;
    call.x.data = x.data;
    call.x.stride = x.stride;
    call.out = {const_cast<void*>(out.data), out.columns, x.type};
    {
      py::gil_scoped_release release;
      kOperator(table, call);
    }
    return result.release().ptr();
  }
};

struct PreparedMoe : Prepared<MoeArgs, moe> {
  static constexpr const char* kName = "prepared_moe";
  static constexpr Py_ssize_t kArguments = 5;

  py::object activation;
  py::tuple biases;

  // A new reference, or null, possibly with an exception set.
  PyObject* operator()(PyObject* const* arguments) const {
    Matrix x, ids, weights;
    if (arguments[3] != activation.ptr() || !x.look_into(arguments[0]) ||
        !ids.look_into(arguments[1]) || !weights.look_into(arguments[2])) {
      return nullptr;
    }
    const dlpack::DataType& id = ids.raw.dtype;
    if (!x.matrix() || !takes(x, args.experts->hidden_size, arguments[4]) || !ids.matrix() ||
        ids.rows != x.rows || ids.columns < 1 || !ids.dense() || id.code != dlpack::kInt ||
        (id.bits != 64 && id.bits != 32) || !weights.matrix() || weights.rows != x.rows ||
        weights.columns != ids.columns || !weights.dense() || !weights.floats ||
        weights.type == DType::f16) {
      return nullptr;
    }
    MoeArgs call = args;
    call.top_k = ids.columns;
    call.ids = static_cast<const int64_t*>(ids.data);
    call.weights = static_cast<const float*>(weights.data);
    const int64_t pairs = ids.rows * ids.columns;
    std::vector<int64_t> wide_ids;
    if (id.bits == 32) {
      const auto* from = static_cast<const int32_t*>(ids.data);
      wide_ids.assign(from, from + pairs);
      call.ids = wide_ids.data();
    }
    std::vector<float> wide_weights;
    if (weights.type == DType::bf16) {
      for (int64_t i = 0; i < pairs; ++i) {
        const uint32_t bits = static_cast<const uint16_t*>(weights.data)[i];
        wide_weights.push_back(std::bit_cast<float>(bits << 16));
      }
      call.weights = wide_weights.data();
    }
    PyObject* const like[] = {arguments[0], torch().contiguous};
    return compute(*table, call, x,
                   py::reinterpret_steal<py::object>(
                       PyObject_Vectorcall(torch().empty_like, like, 1, torch().memory_format)));
  }
};

struct PreparedLinear : Prepared<LinearArgs, linear> {
  static constexpr const char* kName = "prepared_linear";
  static constexpr Py_ssize_t kArguments = 3;

  PyObject* operator()(PyObject* const* arguments) const {
    Matrix x, bias;
    const bool biased = arguments[1] != Py_None;
    if (!x.look_into(arguments[0]) || !takes(x, args.weight->cols, arguments[2])) return nullptr;
    if (biased && (!bias.look_into(arguments[1]) || bias.raw.ndim != 1 || !bias.floats ||
                   bias.type != DType::f32 || bias.columns != args.weight->rows)) {
      return nullptr;
    }
    py::tuple shape(x.raw.ndim);
    for (int i = 0; i < x.raw.ndim; ++i) {
      shape[i] = py::int_(i + 1 < x.raw.ndim ? x.raw.shape[i] : args.weight->rows);
    }
    static PyObject* const name = PyUnicode_InternFromString("new_empty");
    PyObject* const like[] = {arguments[0], shape.ptr()};
    LinearArgs call = args;
    call.bias = biased ? static_cast<const float*>(bias.data) : nullptr;
    return compute(
        *table, call, x,
        py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(name, like, 2, nullptr)));
  }
};

// A call prepared for rows like `x`; null if they, or this torch, cannot be looked into.
template <class Call, class Weights>
std::unique_ptr<Call> prepare(int64_t generation, const std::string& isa, py::object packed,
                              const py::object& x, bool exact, const Weights*& weights) {
  Matrix rows;
  if (torch().describe == nullptr || !rows.look_into(x.ptr()) || !rows.floats) return nullptr;
  auto call = std::make_unique<Call>();
  call->generation = generation;
  weights = &packed.cast<const Weights&>();
  call->args.x.dtype = rows.type;
  call->args.tokens = rows.rows;
  call->args.exact = exact;
  call->table = &kernels(isa);
  call->packed = std::move(packed);
  return call;
}

py::object prepare_linear(int64_t generation, const std::string& isa, py::object packed,
                          const py::object& x, bool exact) {
  const PackedMatrix* weight = nullptr;
  auto call = prepare<PreparedLinear>(generation, isa, std::move(packed), x, exact, weight);
  if (!call) return py::none();
  call->args.weight = weight;
  return owned(std::move(call));
}

py::object prepare_moe(int64_t generation, const std::string& isa, py::object packed,
                       const py::object& hidden_states, py::tuple biases, py::object activation,
                       int code, bool exact) {
  const PackedExperts* experts = nullptr;
  auto call =
      prepare<PreparedMoe>(generation, isa, std::move(packed), hidden_states, exact, experts);
  if (!call) return py::none();
  call->args.experts = experts;
  call->args.gate_bias = bias_of(biases[0]);
  call->args.up_bias = bias_of(biases[1]);
  call->args.down_bias = bias_of(biases[2]);
  call->args.activation = static_cast<Activation>(code);
  call->activation = std::move(activation);
  call->biases = std::move(biases);
  return owned(std::move(call));
}

}  // namespace

void def_prepared(py::module_& m) {
  m.def("prepare_moe", &prepare_moe);
  m.def("prepare_linear", &prepare_linear);
  def_call<PreparedMoe>(m);
  def_call<PreparedLinear>(m);
  m.def("set_generation", [](int64_t number) { g_generation.store(number); });
  m.def("set_hindrances", [](const py::list& variables) {
    for (const py::handle variable : variables) {
      g_hindrances.push_back(kept(py::reinterpret_borrow<py::object>(variable)));
    }
  });
}

}  // namespace ktcore
