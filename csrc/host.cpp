// _host: the Philox streams as NumPy arrays, bit for bit those of every other back end.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "philox.h"

namespace py = pybind11;

namespace {

// Calls put(i, word) for numbers first .. first + n of a stream.
template <class Put>
void words(int64_t n, uint64_t key, uint32_t stream, uint64_t first, Put&& put) {
  uint32_t w[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t index = first + static_cast<uint64_t>(i);
    if (i == 0 || index % 4 == 0) dgf::philox_block(index / 4, stream, key, w);
    put(i, w[index % 4]);
  }
}

py::array_t<uint32_t> bits(int64_t n, uint64_t key, uint32_t stream, uint64_t first) {
  py::array_t<uint32_t> out(n);
  auto* o = out.mutable_data();
  words(n, key, stream, first, [o](int64_t i, uint32_t w) { o[i] = w; });
  return out;
}

py::array_t<double> uniform(int64_t n, uint64_t key, uint32_t stream, uint64_t first) {
  py::array_t<double> out(n);
  auto* o = out.mutable_data();
  words(n, key, stream, first, [o](int64_t i, uint32_t w) { o[i] = static_cast<double>(w >> 8) * 0x1p-24; });
  return out;
}

py::array_t<double> normal(int64_t n, uint64_t key, uint32_t stream, uint64_t first) {
  py::array_t<double> out(n);
  auto* o = out.mutable_data();
  for (int64_t i = 0; i < n;) {
    const uint64_t index = first + static_cast<uint64_t>(i);
    uint32_t w[4];
    double z[4];
    dgf::philox_block(index / 4, stream, key, w);
    dgf::box_muller_double(w[0], w[1], z[0], z[1]);
    dgf::box_muller_double(w[2], w[3], z[2], z[3]);
    for (uint64_t j = index % 4; j < 4 && i < n; ++j) o[i++] = z[j];
  }
  return out;
}

py::array_t<uint32_t> philox4x32(py::array_t<uint32_t, py::array::c_style> counter,
                                 py::array_t<uint32_t, py::array::c_style> key) {
  if (counter.ndim() != 2 || counter.shape(1) != 4 || key.ndim() != 2 || key.shape(1) != 2 ||
      key.shape(0) != counter.shape(0))
    throw py::value_error("counter is [n, 4] and key [n, 2]");
  py::array_t<uint32_t> out({counter.shape(0), py::ssize_t(4)});
  for (py::ssize_t i = 0; i < counter.shape(0); ++i) {
    uint32_t w[4];
    for (int j = 0; j < 4; ++j) w[j] = counter.at(i, j);
    dgf::philox4x32<dgf::Scalar>(w, key.at(i, 0), key.at(i, 1));
    for (int j = 0; j < 4; ++j) out.mutable_at(i, j) = w[j];
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Philox4x32-10 streams as NumPy arrays.";
  m.def("bits", &bits, py::arg("n"), py::arg("key"), py::arg("stream") = 0, py::arg("first") = 0);
  m.def("uniform", &uniform, py::arg("n"), py::arg("key"), py::arg("stream") = 0, py::arg("first") = 0);
  m.def("normal", &normal, py::arg("n"), py::arg("key"), py::arg("stream") = 0, py::arg("first") = 0);
  m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"));
  m.attr("compiler") = __VERSION__;
}
