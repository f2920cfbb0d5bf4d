// The index of what Python sees. Every function releases the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "packing.h"
#include "parallel.h"
#include "row_kernels.h"
#include "row_pass.h"

namespace py = pybind11;
using namespace metis;

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ core of metis_kernels; metis_kernels/_cpp.py and packing.py call it.";

  py::class_<Tensor>(m, "Tensor")
      .def(py::init<std::string, std::uintptr_t, std::string, std::vector<std::int64_t>,
                    std::vector<std::int64_t>>());
  py::class_<HeadOptions>(m, "HeadOptions").def(py::init<float, float>());
  py::class_<HDPOOptions>(m, "HDPOOptions")
      .def(py::init<double, double, double, double, double, double, double>());
  py::class_<HDPOInputs>(m, "HDPOInputs")
      .def(py::init<Optional, Tensor, Tensor, Optional, Optional, HDPOOptions>());
  py::class_<Given>(m, "Given").def(py::init<Tensor, Optional>());
  py::class_<Live>(m, "Live").def(py::init<Tensor, float>());
  py::class_<Runtime>(m, "Runtime").def(py::init<int, std::string>());

  const auto released = py::call_guard<py::gil_scoped_release>();
  using Integers = std::vector<std::int64_t>;
  using Floats = std::vector<float>;
  using Addresses = Rollouts::Addresses;
  py::class_<PackingBatch>(m, "PackingBatch")
      .def(py::init<Integers, Integers, Integers, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                    Tensor, Optional, Optional, Optional>());
  py::class_<Rollouts>(m, "Rollouts")
      .def(py::init<Integers, Addresses, Addresses, Addresses, Integers, std::int64_t, Floats,
                    Floats, std::array<Addresses, 3>, int>(),
           released)
      .def("policy_tokens", &Rollouts::policy_tokens)
      .def("common_prefixes", &Rollouts::common_prefixes, released)
      .def("assemble", &Rollouts::assemble, released);

  m.def("row_pass", &row_pass, released);
  m.def("row_statistics", &row_statistics, released);
  m.def("row_gradient", &row_gradient, released);

  m.def("thread_pool", &thread_pool);
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const char* name : {"avx512bf16", "avx512", "avx2", "baseline"})
      if (row_kernels(name) != nullptr) names.emplace_back(name);
    return names;
  });
}
