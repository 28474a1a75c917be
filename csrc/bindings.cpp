// The one file that knows Python: it turns Python's numbers and addresses into the launchers' arguments.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <utility>

#include "common/build_info.h"

namespace py = pybind11;
namespace ck = convnext_kernels;

namespace {

char const* name(ck::DeviceCode code) {
  switch (code) {
    case ck::DeviceCode::machine_code: return "machine code";
    case ck::DeviceCode::ptx: return "PTX";
    case ck::DeviceCode::none: return "none";
    case ck::DeviceCode::unavailable: return "unavailable";
  }
  throw std::logic_error("DeviceCode without a name");
}

std::pair<char const*, char const*> device_code(int device) {
  ck::DeviceSupport const support = ck::device_support(device);
  return {name(support.code), support.status == cudaSuccess ? "" : cudaGetErrorString(support.status)};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels of convnext_kernels: raw addresses, sizes, strides and a stream in, an error code out.";

  ck::BuildInfo const info = ck::build_info();
  module.attr("version") = info.version;
  module.attr("nvcc") = info.nvcc;
  module.attr("architectures") = info.architectures;
  module.attr("ptx") = info.ptx;

  module.def("device_code", &device_code, py::arg("device"), py::call_guard<py::gil_scoped_release>(),
             "(code, reason): code is 'machine code', 'PTX', 'none' or 'unavailable'; reason is empty for the first two.");
}
