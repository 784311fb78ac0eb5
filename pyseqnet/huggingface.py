"""Another name for `pyseqnet.integrations.huggingface`: the same module."""

import sys

from pyseqnet.integrations import huggingface

sys.modules[__name__] = huggingface
