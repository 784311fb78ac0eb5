// Stored results of single PTX wrappers: what the instruction set says that they do, as the simulator does it
// and as a device must. A program of this folder runs its kernels and holds each result against a line of
// golden/<program>.txt:
//
//   name  count  checksum  first values ...
//
// Inputs are small integers, so that products and sums are exact and results equal bit for bit; what is
// approximate says so with a tolerance. `--write` writes the file, after the results have been held against
// plain loops over matrices where the test has such.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "common/ptx.cuh"
#include "device_memory.h"

namespace pyseqnet::conformance {

// Of the bits (FNV-1a).
inline std::string checksum(const std::vector<float>& values) {
  uint64_t h = 14695981039346656037ull;
  for (float v : values) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    for (int i = 0; i < 4; i++) h = (h ^ (bits >> (8 * i) & 255)) * 1099511628211ull;
  }
  char words[20];
  std::snprintf(words, sizeof words, "%016llx", static_cast<unsigned long long>(h));
  return words;
}

class Golden {
 public:
  Golden(int argc, char** argv, const char* source) : write_(argc > 1 && std::string(argv[1]) == "--write") {
    std::string path(source);  // __FILE__ of the program
    const size_t slash = path.rfind('/'), dot = path.rfind('.');
    path_ = path.substr(0, slash + 1) + "golden/" + path.substr(slash + 1, dot - slash - 1) + ".txt";
    std::ifstream file(path_);
    for (std::string line; std::getline(file, line);) stored_[line.substr(0, line.find(' '))] = line;
  }

  // Runs launch(y) with `count` floats of poisoned output. want: by definition, empty where there is none.
  template <class Launch>
  void check(const std::string& name, size_t count, const Launch& launch, const std::vector<float>& want = {},
             float tolerance = 0) {
    auto* y = static_cast<float*>(device_memory::allocate(count * sizeof(float), "y"));
    std::string trouble = device_memory::finish(launch(y));
    std::vector<float> got(count);
    device_memory::download(got.data(), y, count * sizeof(float));
    const std::string damage = device_memory::free_all();
    if (trouble.empty()) trouble = damage;
    if (trouble.empty() && !want.empty()) trouble = difference(got, want, tolerance);
    const std::string line = line_of(name, got);
    lines_.push_back(line);
    if (trouble.empty() && !write_)
      trouble = tolerance > 0 ? close_to_stored(name, got, tolerance) : same(name, line);
    std::printf("%s %s%s%s\n", trouble.empty() ? "ok    " : "FAILED", name.c_str(),
                trouble.empty() ? "" : ": ", trouble.c_str());
    failures_ += !trouble.empty();
  }

  int finish() {
    if (write_ && !failures_) {
      std::ofstream file(path_);
      for (const std::string& line : lines_) file << line << "\n";
    }
    std::printf("%zu results, %d wrong\n", lines_.size(), failures_);
    return failures_ || lines_.empty();
  }

 private:
  static constexpr size_t shown = 16;
  static std::string line_of(const std::string& name, const std::vector<float>& values) {
    std::ostringstream line;
    line.precision(9);
    line << name << " " << values.size() << " " << checksum(values);
    for (size_t i = 0; i < values.size() && i < shown; i++) line << " " << values[i];
    return line.str();
  }
  static std::string difference(const std::vector<float>& got, const std::vector<float>& want,
                                float tolerance) {
    for (size_t i = 0; i < want.size(); i++)
      if (!(std::fabs(got[i] - want[i]) <= tolerance * std::fabs(want[i])))
        return "value " + std::to_string(i) + " is " + std::to_string(got[i]) + ", by definition " +
               std::to_string(want[i]);
    return "";
  }
  std::string same(const std::string& name, const std::string& line) const {
    const auto stored = stored_.find(name);
    if (stored == stored_.end()) return "no stored result in " + path_;
    return stored->second == line ? "" : "\n    stored " + stored->second + "\n    got    " + line;
  }
  std::string close_to_stored(const std::string& name, const std::vector<float>& got, float tolerance) const {
    const auto stored = stored_.find(name);
    if (stored == stored_.end()) return "no stored result in " + path_;
    std::istringstream words(stored->second);
    std::string word;
    for (int i = 0; i < 3; i++) words >> word;
    std::vector<float> values;
    for (float v; words >> v;) values.push_back(v);
    return difference(got, values, tolerance);
  }

  bool write_;
  std::string path_;
  std::map<std::string, std::string> stored_;
  std::vector<std::string> lines_;
  int failures_ = 0;
};

// Input number i: an integer from -8 to 7 that a 16-bit type holds exactly, without a visible pattern.
PYSEQNET_HOST_DEVICE int input(unsigned i) { return int((i * 2654435761u >> 13) % 16) - 8; }

}  // namespace pyseqnet::conformance
