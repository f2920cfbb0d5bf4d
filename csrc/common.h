// Tensors as they come from Python, and the checks that name what is wrong with one.

#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace metis {

// A view of memory that Python keeps alive for the time of a call; no type of torch is needed.
struct Tensor {
  std::string name;
  std::uintptr_t address;
  std::string dtype;  // "float32", "bfloat16", "int64", ...
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(address);
  }
};

using Optional = std::optional<Tensor>;

inline std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

[[noreturn]] inline void refuse(const Tensor& t, const std::string& wanted) {
  throw std::invalid_argument("expected " + t.name + " " + wanted + ", got " + t.dtype + " " +
                              shape_text(t.shape) + " with strides " + shape_text(t.strides));
}

// Raises unless t is of that dtype and shape, with its last dimension side by side in memory.
inline void expect(const Tensor& t, const std::string& dtype,
                   const std::vector<std::int64_t>& shape) {
  const bool dense = shape.empty() || shape.back() <= 1 || t.strides.back() == 1;
  if (t.dtype != dtype || t.shape != shape || !dense)
    refuse(t, dtype + " " + shape_text(shape) + ", its last dimension contiguous");
}

inline void expect(const Optional& t, const std::string& dtype,
                   const std::vector<std::int64_t>& shape) {
  if (t) expect(*t, dtype, shape);
}

template <class T>
T* data_of(const Optional& t) {
  return t ? t->data<T>() : nullptr;
}

}  // namespace metis
