// What of DLPack 1.3 (dmlc.github.io/dlpack) is needed to look at another library's tensors without its
// headers: a table of functions that the tensor's type offers as a capsule, "dlpack_exchange_api".
#pragma once

#include <cstdint>

namespace ktcore::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;                           // a device type
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;  // type codes

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* older;  // for other major versions
  void (*allocate)();  // this one and the next two are not called here
  void (*from_object)();
  void (*to_object)();
  // Describes a tensor object, as long as nothing changes it; not 0: cannot, and a Python exception is
  // set. Null where a library does not offer it.
  int (*describe)(void* object, Tensor* out);
};

}  // namespace ktcore::dlpack
