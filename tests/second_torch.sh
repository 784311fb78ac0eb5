#!/usr/bin/env bash
# Loads the binary that is already built in another torch, and runs forward and backward there: one binary serves every
# torch from 2.10 on. Installs that torch into a scratch environment; not part of `make test`, since it downloads.
#
#   tests/second_torch.sh VERSION [PYTHON]      e.g. tests/second_torch.sh 2.11.0
#
# WHEEL names a wheel that is installed there and tested instead of the binary in this folder: what a user gets.
# TORCH_INDEX and TORCH_EXTRA_INDEX name package indexes, for builds that pip does not find by itself.
# SECOND_TORCH_VENV keeps the environment for the next time (default: a temporary folder, removed at the end).
set -euo pipefail

version=${1:?"usage: $0 VERSION [PYTHON], e.g. $0 2.11.0"}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${2:-$root/.venv/bin/python}
[ -x "$python" ] || { echo "no $python: build first (make build), or name the Python that the binary was built with"; exit 1; }
tag=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
binary=$root/pyseqnet/_C$tag
[ -n "${WHEEL:-}" ] || [ -f "$binary" ] || { echo "no $binary: build it first (make build)"; exit 1; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
venv=${SECOND_TORCH_VENV:-$scratch/venv}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
options=(--quiet --disable-pip-version-check)
[ -z "${TORCH_INDEX:-}" ] || options+=(--index-url "$TORCH_INDEX" ${TORCH_EXTRA_INDEX:+--extra-index-url "$TORCH_EXTRA_INDEX"})
"$venv/bin/python" -m pip install "${options[@]}" "torch==$version" numpy

if [ -n "${WHEEL:-}" ]; then
  "$venv/bin/python" -m pip install "${options[@]}" --force-reinstall --no-deps "$WHEEL"
  cd "$scratch"
  unset PYTHONPATH
  "$venv/bin/pyseqnet" info --json > /dev/null
else  # a copy: what runs is this binary and these files, whatever else the folder holds
  cp -r "$root/pyseqnet" "$scratch/pyseqnet"
  cd "$scratch"
  export PYTHONPATH=$scratch
fi
"$venv/bin/python" - <<'PYTHON'
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
torch_lstm, lstm = torch.nn.LSTM(5, 7, bidirectional=True), nn.LSTM(5, 7, bidirectional=True)
lstm.load_state_dict(torch_lstm.state_dict())
sequence = torch.randn(9, 3, 5)
torch.testing.assert_close(lstm(sequence)[0], torch_lstm(sequence)[0], rtol=1e-4, atol=1e-5)
q, k, v = (torch.randn(2, 2, 17, 8, requires_grad=True) for _ in range(3))
for f in (F, torch.nn.functional):
    out = f.scaled_dot_product_attention(q, k, v, is_causal=True)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    expected = grads if f is F else expected
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(
    F.linear_attention(q, k, v, causal=True), F.linear_attention_reference(q, k, v, causal=True), rtol=1e-4, atol=1e-5
)
logits, targets = torch.randn(12, 2, 5), torch.tensor([[1, 2, 2], [4, 1, 3]])
torch.testing.assert_close(
    F.ctc_loss(logits, targets, (12, 9), (3, 2), from_logits=True),
    torch.nn.functional.ctc_loss(logits.log_softmax(2), targets, (12, 9), (3, 2)), rtol=1e-4, atol=1e-5,
)
chain = [torch.randn(s) for s in ((2, 6, 4), (4,), (4,), (4, 4))]
assert F.crf_decode(chain[0], None, *chain[1:]) == F.crf_decode_reference(chain[0], None, *chain[1:])
model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
x8 = torch.randn(2, 5, 8)
before = model(x8)
assert pyseqnet.convert(model).replaced
torch.testing.assert_close(model(x8), before, rtol=1e-4, atol=1e-5)
exported = torch.export.export(lstm, (sequence,)).module()
torch.testing.assert_close(exported(sequence)[0], lstm(sequence)[0])
try:
    F.conv2d(x, torch.zeros(1, 2, 3, 3))
    raise SystemExit("a wrong weight was accepted")
except RuntimeError as error:
    assert "channels" in str(error), error
print(f"torch {torch.__version__}: pyseqnet {pyseqnet.__version__} loads and computes; {pyseqnet.build_info()}")
PYTHON
