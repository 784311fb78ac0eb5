"""Functions with torch.nn.functional's names and arguments, computed by pyseqnet's kernels.

Each has a ``*_reference``: the same in plain torch.
"""

from pyseqnet.functional.additive import additive_attention, additive_attention_reference
from pyseqnet.functional.attention import scaled_dot_product_attention, scaled_dot_product_attention_reference
from pyseqnet.functional.conv import conv1d, conv1d_reference, conv2d, conv2d_reference
from pyseqnet.functional.conv_relu_pool import (
    conv1d_relu,
    conv1d_relu_reference,
    conv2d_relu,
    conv2d_relu_max_pool2d,
    conv2d_relu_max_pool2d_reference,
    conv2d_relu_reference,
)
from pyseqnet.functional.crf import (
    crf_decode,
    crf_decode_reference,
    crf_log_likelihood,
    crf_log_likelihood_reference,
    crf_log_partition,
    crf_log_partition_reference,
    crf_marginals,
    crf_marginals_reference,
)
from pyseqnet.functional.ctc import ctc_loss, ctc_loss_reference
from pyseqnet.functional.linear_attention import (
    linear_attention,
    linear_attention_reference,
    linear_attention_step,
    linear_attention_step_reference,
)
from pyseqnet.functional.locally_connected import locally_connected2d, locally_connected2d_reference
from pyseqnet.functional.pool import max_pool1d, max_pool1d_reference, max_pool2d, max_pool2d_reference
from pyseqnet.functional.recurrent import (
    gru,
    gru_reference,
    jordan,
    jordan_reference,
    lstm,
    lstm_reference,
    rnn,
    rnn_reference,
)
from pyseqnet.functional.recurrent_cell import (
    gru_cell,
    gru_cell_reference,
    jordan_cell,
    jordan_cell_reference,
    lstm_cell,
    lstm_cell_reference,
    rnn_cell,
    rnn_cell_reference,
)

__all__ = [
    "additive_attention",
    "additive_attention_reference",
    "conv1d",
    "conv1d_reference",
    "conv1d_relu",
    "conv1d_relu_reference",
    "conv2d",
    "conv2d_reference",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "conv2d_relu_max_pool2d_reference",
    "conv2d_relu_reference",
    "crf_decode",
    "crf_decode_reference",
    "crf_log_likelihood",
    "crf_log_likelihood_reference",
    "crf_log_partition",
    "crf_log_partition_reference",
    "crf_marginals",
    "crf_marginals_reference",
    "ctc_loss",
    "ctc_loss_reference",
    "gru",
    "gru_cell",
    "gru_cell_reference",
    "gru_reference",
    "jordan",
    "jordan_cell",
    "jordan_cell_reference",
    "jordan_reference",
    "linear_attention",
    "linear_attention_reference",
    "linear_attention_step",
    "linear_attention_step_reference",
    "locally_connected2d",
    "locally_connected2d_reference",
    "lstm",
    "lstm_cell",
    "lstm_cell_reference",
    "lstm_reference",
    "max_pool1d",
    "max_pool1d_reference",
    "max_pool2d",
    "max_pool2d_reference",
    "rnn",
    "rnn_cell",
    "rnn_cell_reference",
    "rnn_reference",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_reference",
]
