// An expert layer, or a product with one matrix, as llama.cpp computes it, to be timed beside
// ktcore's: see ktcore/bench/peers/llama_cpp.py, which starts this program and speaks to it.
//
//   ggml-layer moe|linear THREADS TYPE HIDDEN INTERMEDIATE EXPERTS TOP_K
//
// reads commands from standard input, little-endian:
//
//   'w' path\n                                 a layer's weights: gate, up and down, as a GGUF file
//                                              stores them, one after the other; of `linear` one
//                                              matrix [INTERMEDIATE][HIDDEN]
//   'r' layer tokens x ids weights             int32, int32, f32 [tokens][HIDDEN], int32 and f32
//                                              [tokens][TOP_K]; of `linear` x alone
//
// and answers with one byte, '+', after 'w', and with the seconds (f64) and the result (f32
// [tokens][HIDDEN], of `linear` [tokens][INTERMEDIATE]) after 'r'. Weights go where llama.cpp would
// put them, its repacking buffers included; the graph is the one that it builds for Qwen3-MoE.
#include <sys/prctl.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "ggml-layer: %s\n", why.c_str());
  std::exit(1);
}

void read_all(std::FILE* from, void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, from) != bytes) fail("input is cut short");
}

struct Sizes {
  bool experts_chosen;  // moe; else linear, which has no experts
  int64_t hidden, intermediate, experts, top_k;
};

ggml_context* new_context(size_t tensors) {
  const size_t bytes = ggml_tensor_overhead() * tensors + ggml_graph_overhead();
  return ggml_init({bytes, nullptr, true});
}

// The buffer types of the CPU, in the order in which llama.cpp tries them.
std::vector<ggml_backend_buffer_type_t> buffer_types(ggml_backend_dev_t cpu) {
  std::vector<ggml_backend_buffer_type_t> types;
  const auto extra =
      reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
          ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts"));
  if (extra != nullptr) {
    for (auto* type = extra(cpu); type != nullptr && *type != nullptr; ++type) {
      types.push_back(*type);
    }
  }
  types.push_back(ggml_backend_dev_buffer_type(cpu));
  return types;
}

ggml_tensor* new_weight(ggml_context* context, ggml_type type, int64_t columns, int64_t rows,
                        const Sizes& sizes) {
  if (!sizes.experts_chosen) return ggml_new_tensor_2d(context, type, columns, rows);
  return ggml_new_tensor_3d(context, type, columns, rows, sizes.experts);
}

// Whether the CPU multiplies a weight in such a buffer with activations.
bool serves(ggml_backend_dev_t cpu, ggml_backend_buffer_type_t type, ggml_type weight,
            int64_t columns, int64_t rows, const Sizes& sizes) {
  ggml_context* context = new_context(8);
  ggml_tensor *w = new_weight(context, weight, columns, rows, sizes), *product;
  if (sizes.experts_chosen) {
    ggml_tensor* x = ggml_new_tensor_3d(context, GGML_TYPE_F32, columns, sizes.top_k, 512);
    ggml_tensor* ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, sizes.top_k, 512);
    product = ggml_mul_mat_id(context, w, x, ids);
  } else {
    product = ggml_mul_mat(context, w, ggml_new_tensor_2d(context, GGML_TYPE_F32, columns, 512));
  }
  // The check looks at the buffer's type: an empty buffer will do.
  w->buffer = ggml_backend_buft_alloc_buffer(type, 0);
  const bool served = ggml_backend_dev_supports_op(cpu, product);
  ggml_backend_buffer_free(w->buffer);
  ggml_free(context);
  return served;
}

struct Layer {
  ggml_tensor *gate, *up, *down;  // of `linear` gate alone
};

struct Graph {
  ggml_context* context;
  ggml_cgraph* graph;
  ggml_tensor *x, *ids, *weights, *out;
};

class Program {
 public:
  Program(int threads, ggml_type type, const Sizes& sizes) : type_(type), sizes_(sizes) {
    cpu_ = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (cpu_ == nullptr) fail("no CPU backend");
    backend_ = ggml_backend_dev_init(cpu_, nullptr);
    ggml_threadpool_params params = ggml_threadpool_params_default(threads);
    ggml_backend_cpu_set_n_threads(backend_, threads);
    ggml_backend_cpu_set_threadpool(backend_, ggml_threadpool_new(&params));
    allocator_ = ggml_gallocr_new(ggml_backend_dev_buffer_type(cpu_));
  }

  void add_layer(const std::string& path) {
    std::FILE* file = std::fopen(path.c_str(), "rb");
    if (file == nullptr) fail("cannot open " + path);
    const int64_t h = sizes_.hidden, i = sizes_.intermediate;
    Layer layer{read_weight(file, h, i), nullptr, nullptr};
    if (sizes_.experts_chosen) {
      layer.up = read_weight(file, h, i);
      layer.down = read_weight(file, i, h);
    }
    std::fclose(file);
    layers_.push_back(layer);
  }

  double run(int32_t layer, int32_t tokens, const std::vector<float>& x,
             const std::vector<int32_t>& ids, const std::vector<float>& weights,
             std::vector<float>& out) {
    if (layer < 0 || layer >= static_cast<int32_t>(layers_.size()) || tokens < 1) {
      fail("no such layer");
    }
    const Graph g = build(layers_[static_cast<size_t>(layer)], tokens);
    if (!ggml_gallocr_alloc_graph(allocator_, g.graph)) fail("out of memory");
    ggml_backend_tensor_set(g.x, x.data(), 0, ggml_nbytes(g.x));
    if (sizes_.experts_chosen) {
      ggml_backend_tensor_set(g.ids, ids.data(), 0, ggml_nbytes(g.ids));
      ggml_backend_tensor_set(g.weights, weights.data(), 0, ggml_nbytes(g.weights));
    }
    const auto start = std::chrono::steady_clock::now();
    if (ggml_backend_graph_compute(backend_, g.graph) != GGML_STATUS_SUCCESS) fail("failed");
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    ggml_backend_tensor_get(g.out, out.data(), 0, ggml_nbytes(g.out));
    ggml_free(g.context);
    return took.count();
  }

 private:
  ggml_tensor* read_weight(std::FILE* file, int64_t columns, int64_t rows) {
    ggml_context* context = new_context(1);
    ggml_tensor* w = new_weight(context, type_, columns, rows, sizes_);
    for (ggml_backend_buffer_type_t type : buffer_types(cpu_)) {
      if (!serves(cpu_, type, type_, columns, rows, sizes_)) continue;
      if (ggml_backend_alloc_ctx_tensors_from_buft(context, type) == nullptr) fail("out of memory");
      std::vector<uint8_t> bytes(ggml_nbytes(w));
      read_all(file, bytes.data(), bytes.size());
      ggml_backend_tensor_set(w, bytes.data(), 0, bytes.size());
      return w;
    }
    fail(std::string("weights of type ") + ggml_type_name(type_) + " are not served");
  }

  Graph build(const Layer& layer, int64_t tokens) const {
    const Sizes& s = sizes_;
    ggml_context* c = new_context(32 + 4 * static_cast<size_t>(s.top_k));
    Graph g{c, ggml_new_graph(c), nullptr, nullptr, nullptr, nullptr};
    if (!s.experts_chosen) {
      g.x = ggml_new_tensor_2d(c, GGML_TYPE_F32, s.hidden, tokens);
      ggml_set_input(g.x);
      g.out = ggml_mul_mat(c, layer.gate, g.x);
      ggml_set_output(g.out);
      ggml_build_forward_expand(g.graph, g.out);
      return g;
    }
    g.x = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.hidden, 1, tokens);
    g.ids = ggml_new_tensor_2d(c, GGML_TYPE_I32, s.top_k, tokens);
    g.weights = ggml_new_tensor_3d(c, GGML_TYPE_F32, 1, s.top_k, tokens);
    for (ggml_tensor* input : {g.x, g.ids, g.weights}) ggml_set_input(input);
    ggml_tensor* up = ggml_mul_mat_id(c, layer.up, g.x, g.ids);
    ggml_tensor* gate = ggml_mul_mat_id(c, layer.gate, g.x, g.ids);
    ggml_tensor* inner = ggml_swiglu_split(c, gate, up);
    ggml_tensor* experts = ggml_mul_mat_id(c, layer.down, inner, g.ids);
    experts = ggml_mul(c, experts, g.weights);
    for (int64_t k = 0; k < s.top_k; ++k) {
      ggml_tensor* one = ggml_view_2d(c, experts, s.hidden, tokens, experts->nb[2],
                                      static_cast<size_t>(k) * experts->nb[1]);
      ggml_build_forward_expand(g.graph, one);
      g.out = k == 0 ? one : ggml_add(c, g.out, one);
    }
    if (s.top_k == 1) g.out = ggml_cont(c, g.out);
    ggml_set_output(g.out);
    ggml_build_forward_expand(g.graph, g.out);
    return g;
  }

  ggml_type type_;
  Sizes sizes_;
  ggml_backend_dev_t cpu_;
  ggml_backend_t backend_;
  ggml_gallocr_t allocator_;
  std::vector<Layer> layers_;
};

ggml_type type_of(const std::string& name) {
  for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
    const char* known = ggml_type_name(static_cast<ggml_type>(t));
    if (known != nullptr && name == known) return static_cast<ggml_type>(t);
  }
  fail("no type " + name);
}

void quiet(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string op = count == 8 ? arguments[1] : "";
  if (op != "moe" && op != "linear") {
    fail("expected moe|linear THREADS TYPE HIDDEN INTERMEDIATE EXPERTS TOP_K");
  }
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // stopped, it would not see the end of its input
  ggml_log_set(quiet, nullptr);
  const auto number = [&](int i) { return std::atoll(arguments[i]); };
  const Sizes sizes{op == "moe", number(4), number(5), number(6), number(7)};
  const int64_t width = sizes.experts_chosen ? sizes.hidden : sizes.intermediate;
  const int64_t chosen = sizes.experts_chosen ? sizes.top_k : 0;
  Program program(static_cast<int>(number(2)), type_of(arguments[3]), sizes);
  for (int command; (command = std::getchar()) != EOF;) {
    if (command == 'w') {
      std::string path;
      for (int c; (c = std::getchar()) != '\n';) {
        if (c == EOF) fail("input is cut short");
        path += static_cast<char>(c);
      }
      program.add_layer(path);
      std::putchar('+');
    } else if (command == 'r') {
      int32_t head[2];
      read_all(stdin, head, sizeof head);
      const auto tokens = static_cast<size_t>(head[1]);
      std::vector<float> x(tokens * static_cast<size_t>(sizes.hidden));
      std::vector<float> out(tokens * static_cast<size_t>(width));
      std::vector<int32_t> ids(tokens * static_cast<size_t>(chosen));
      std::vector<float> weights(ids.size());
      read_all(stdin, x.data(), x.size() * sizeof(float));
      read_all(stdin, ids.data(), ids.size() * sizeof(int32_t));
      read_all(stdin, weights.data(), weights.size() * sizeof(float));
      const double seconds = program.run(head[0], head[1], x, ids, weights, out);
      std::fwrite(&seconds, sizeof seconds, 1, stdout);
      std::fwrite(out.data(), sizeof(float), out.size(), stdout);
    } else {
      fail("no such command");
    }
    std::fflush(stdout);
  }
  return 0;
}
