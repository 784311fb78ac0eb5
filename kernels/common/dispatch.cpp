// What PYSEQNET_FORCE and PYSEQNET_VERBOSE say; see dispatch.h.
#include "common/dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

namespace pyseqnet {

namespace {

// The value of the last entry "key:value" whose key is the operation; else of the last whose key is the
// family.
std::string pinned(std::string_view entries, std::string_view family, std::string_view operation) {
  std::string by_family, by_operation;
  while (!entries.empty()) {
    const size_t comma = entries.find(',');
    const std::string_view entry = entries.substr(0, comma);
    entries = comma == std::string_view::npos ? std::string_view() : entries.substr(comma + 1);
    const size_t colon = entry.find(':');
    if (colon == std::string_view::npos) continue;
    const std::string_view key = entry.substr(0, colon), value = entry.substr(colon + 1);
    if (key == operation) by_operation = value;
    if (key == family) by_family = value;
  }
  return by_operation.empty() ? by_family : by_operation;
}

}  // namespace

DispatchRequest dispatch_request(const char* family, const char* operation) {
  DispatchRequest request;
  if (const char* force = std::getenv("PYSEQNET_FORCE"); force && *force)
    request.forced = pinned(force, family, operation);
  const char* verbose = std::getenv("PYSEQNET_VERBOSE");
  request.verbose = verbose && *verbose && std::strcmp(verbose, "0") != 0;
  return request;
}

void print_choice(const char* operation, const std::string& problem, const char* chosen,
                  const std::string& refusals) {
  std::fprintf(stderr, "pyseqnet: %s %s -> %s%s%s%s\n", operation, problem.c_str(), chosen,
               refusals.empty() ? "" : " (", refusals.c_str(), refusals.empty() ? "" : ")");
}

}  // namespace pyseqnet
