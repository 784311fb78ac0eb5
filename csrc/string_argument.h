// A string argument of a boxed operation.
//
// torch's own conversion to std::string (torch/csrc/stable, seen in 2.10 to 2.14) makes a copy on the heap at each call
// and leaves it there. An operation that takes the handle instead owns it: read here, and deleted.
#pragma once
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <string>

namespace pyseqnet {

inline std::string taken(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

}  // namespace pyseqnet
