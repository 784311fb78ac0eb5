"""The cell of docs/extending.md is compiled as it stands there; its gradient is held against differences of steps."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT

PAGE = ROOT / "docs" / "extending.md"
CXX = shlex.split(os.environ.get("CXX", "g++"))
PROGRAM = """
#include "light_gru.h"

#include <cstdio>
using namespace pyseqnet;

template <class Real>
Real step(Real a, Real b, Real h, Real (&kept)[2]) {
  kept[0] = a, kept[1] = b;
  return LightGruCell<ScalarMath<Real>>::forward(kept, {h, Real{}}).h;
}

int main() {
  double worst = 0, apart = 0, scratch[2];
  for (double a = -3; a <= 3; a += 0.5)
    for (double b = -3; b <= 3; b += 0.5)
      for (double h = -2; h <= 2; h += 0.5) {
        CellBackward<double, 2> at{};
        CellGradient<double, 0> nothing{};
        const double now = step(a, b, h, at.kept), e = 1e-6;
        at.previous = {h, 0}, at.gradient = {1, 0};
        double d[2];
        const double to_h = LightGruCell<ScalarMath<double>>::backward(at, {}, d, nothing).h;
        const auto differs = [&](double da, double db, double dh, double gradient) {
          const double after = step(a + da, b + db, h + dh, scratch), before = step(a - da, b - db, h - dh, scratch);
          const double slope = (after - before) / (2 * e);
          worst = std::max(worst, std::abs(slope - gradient));
        };
        differs(e, 0, 0, d[0]), differs(0, e, 0, d[1]), differs(0, 0, e, to_h);
        float single[2];
        apart = std::max(apart, std::abs(now - double(step(float(a), float(b), float(h), single))));
      }
  std::printf("%g %g\\n", worst, apart);
}
"""

pytestmark = [
    pytest.mark.skipif(not PAGE.exists(), reason="an installed package has no docs"),
    pytest.mark.skipif(not shutil.which(CXX[0]), reason=f"there is no C++ compiler {CXX[0]}"),
]


def errors(cell: str, folder: Path) -> tuple[float, float]:
    """The gradient's largest error, and the largest difference between float and double."""
    (folder / "light_gru.h").write_text(cell)
    (folder / "main.cpp").write_text("#include <algorithm>\n#include <cmath>\n" + PROGRAM)
    command = [*CXX, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", f"-I{ROOT / 'kernels'}"]
    subprocess.run([*command, "-o", "cell", "main.cpp"], cwd=folder, check=True)
    answer = subprocess.run([folder / "cell"], capture_output=True, text=True, check=True)
    worst, apart = answer.stdout.split()
    return float(worst), float(apart)


def test_the_cell_of_the_page(tmp_path: Path) -> None:
    (cell,) = re.findall(r"^```cpp\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    worst, apart = errors(cell, tmp_path)
    assert worst < 1e-8
    assert apart < 1e-6
    wrong = cell.replace("(1 - n * n)", "(1 - n)")
    assert wrong != cell
    assert errors(wrong, tmp_path)[0] > 0.01
