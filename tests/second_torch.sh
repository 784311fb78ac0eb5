#!/usr/bin/env bash
# Loads the binary that is already built in another torch, and runs forward and backward there: one binary serves every
# torch from 2.10 on. Installs that torch into a scratch environment; not part of `make test`, since it downloads.
#
#   tests/second_torch.sh VERSION [PYTHON]      e.g. tests/second_torch.sh 2.11.0
#
# TORCH_INDEX and TORCH_EXTRA_INDEX name package indexes, for builds that pip does not find by itself.
# SECOND_TORCH_VENV keeps the environment for the next time (default: a temporary folder, removed at the end).
set -euo pipefail

version=${1:?"usage: $0 VERSION [PYTHON], e.g. $0 2.11.0"}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${2:-$root/.venv/bin/python}
[ -x "$python" ] || { echo "no $python: build first (make build), or name the Python that the binary was built with"; exit 1; }
tag=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
binary=$root/pyseqnet/_C$tag
[ -f "$binary" ] || { echo "no $binary: build it first (make build)"; exit 1; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
venv=${SECOND_TORCH_VENV:-$scratch/venv}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
options=(--quiet --disable-pip-version-check)
[ -z "${TORCH_INDEX:-}" ] || options+=(--index-url "$TORCH_INDEX" ${TORCH_EXTRA_INDEX:+--extra-index-url "$TORCH_EXTRA_INDEX"})
"$venv/bin/python" -m pip install "${options[@]}" "torch==$version" numpy

# A copy: what runs is this binary and these files, whatever else the folder holds.
cp -r "$root/pyseqnet" "$scratch/pyseqnet"
cd "$scratch"
PYTHONPATH=$scratch "$venv/bin/python" - <<'PYTHON'
import torch
import pyseqnet
import pyseqnet.functional as F
from pyseqnet import nn

torch.manual_seed(0)
ours = torch.nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=8))
theirs = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.MaxPool2d(2), torch.nn.Conv2d(8, 8, 3, groups=8))
theirs.load_state_dict(ours.state_dict())
x = torch.randn(2, 3, 20, 21, requires_grad=True)
for a, b in zip(*(torch.autograd.grad(m(x).square().sum(), [x, *m.parameters()]) for m in (ours, theirs)), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
with torch.no_grad():
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 5), (3, 2, 3))]
assert torch.autograd.gradcheck(lambda x, w: F.max_pool1d(F.conv1d(x, w, padding=1), 2), inputs)
compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x), ours(x))
try:
    F.conv2d(x, torch.zeros(1, 2, 3, 3))
    raise SystemExit("a wrong weight was accepted")
except RuntimeError as error:
    assert "channels" in str(error), error
print(f"torch {torch.__version__}: pyseqnet {pyseqnet.__version__} loads and computes; {pyseqnet.build_info()}")
PYTHON
