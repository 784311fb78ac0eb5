"""Graph attention: only the scores of edges exist.

Veličković, Cucurull, Casanova, Romero, Liò, Bengio: Graph attention networks, 2018.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from torch.nn.functional import dropout, leaky_relu

DEFAULT_SLOPE = 0.2  # of LeakyReLU, as in the paper


def _edge_softmax(scores: Tensor, target: Tensor, nodes: int) -> Tensor:
    """Softmax of (edges, heads) among the edges that end in the same node."""
    index = target.unsqueeze(1).expand_as(scores)
    # The shift changes no result, so it needs no gradient.
    largest = scores.detach().new_full((nodes, scores.shape[1]), -torch.inf)
    largest = largest.scatter_reduce(0, index, scores.detach(), "amax")
    exponentials = (scores - largest[target]).exp()
    sums = scores.new_zeros(nodes, scores.shape[1]).index_add(0, target, exponentials)
    return exponentials / sums[target]


class GraphAttention(Module):
    """The layer of graph attention networks: a node's mean of its neighbours, weighted by attention.

    ``alpha[i, j] = softmax over the edges j -> i of LeakyReLU(att_src . W x[j] + att_dst . W x[i])``, for each head;
    the output is ``sum_j alpha[i, j] W x[j] + bias``, heads side by side, or their mean (``concat=False``). Time and
    memory are proportional to the edges. Parameters are named as those of PyTorch Geometric's ``GATConv``.

    For scaled dot-product attention along edges take `MultiheadAttention` with ``pattern=masks.Edges(...)``.

    Args:
        in_features, out_features: of a node, and of a head.
        heads, concat, negative_slope, bias: as above.
        dropout: probability of dropping a weight in training.
        add_self_loops: every node also sees itself, once.

    Shapes of ``forward(x, edge_index)``:
        x ``(N, in_features)``; edge_index ``(2, edges)`` int64, row 0 the source (key), row 1 the target (query). An
        edge that is listed twice counts twice. Returns ``(N, heads * out_features)`` or ``(N, out_features)``; with
        ``need_weights=True`` also ``(edge_index, alpha)``, the edges that took part and their weights (edges, heads).
        A node without an edge gets the bias.

    >>> layer = GraphAttention(4, 3, heads=2)
    >>> layer(torch.zeros(5, 4), torch.tensor([[0, 1, 2], [1, 2, 3]])).shape
    torch.Size([5, 6])

    Paper: Veličković et al., 2018.
    """

    bias: Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        heads: int = 1,
        concat: bool = True,
        negative_slope: float = DEFAULT_SLOPE,
        dropout: float = 0.0,
        add_self_loops: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features), ("heads", heads)):
            if size <= 0:
                raise ValueError(f"{name} must be positive; got {size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; got {dropout}")
        self.in_features, self.out_features, self.heads, self.concat = in_features, out_features, heads, concat
        self.negative_slope, self.dropout, self.add_self_loops = negative_slope, dropout, add_self_loops
        factory = {"device": device, "dtype": dtype}
        self.lin = Linear(in_features, heads * out_features, bias=False, **factory)
        self.att_src = Parameter(torch.empty(1, heads, out_features, **factory))
        self.att_dst = Parameter(torch.empty(1, heads, out_features, **factory))
        if bias:
            self.bias = Parameter(torch.empty(heads * out_features if concat else out_features, **factory))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot, as in the paper; the bias is 0."""
        for weight in (self.lin.weight, self.att_src, self.att_dst):
            torch.nn.init.xavier_uniform_(weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def _edges(self, x: Tensor, edge_index: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x must be (N, {self.in_features}); got {tuple(x.shape)}")
        if not isinstance(edge_index, Tensor) or edge_index.dtype != torch.int64:
            kind = edge_index.dtype if isinstance(edge_index, Tensor) else type(edge_index).__name__
            raise TypeError(f"edge_index must be an int64 tensor, got {kind}")
        if edge_index.dim() != 2 or edge_index.shape[0] != 2:
            raise ValueError(f"edge_index must be (2, edges); got {tuple(edge_index.shape)}")
        nodes = x.shape[0]
        # On a GPU, and in a compiler, indexing itself complains.
        look = edge_index.device.type == "cpu" and not torch.compiler.is_compiling() and edge_index.numel() > 0
        if look and not (int(edge_index.min()) >= 0 and int(edge_index.max()) < nodes):
            raise ValueError(f"edge_index must name nodes between 0 and {nodes - 1}; got others")
        if not self.add_self_loops:
            return edge_index
        loops = torch.arange(nodes, device=x.device).expand(2, nodes)
        return torch.cat([edge_index[:, edge_index[0] != edge_index[1]], loops], 1)

    def forward(self, x: Tensor, edge_index: Tensor, *, need_weights: bool = False) -> Any:
        edges = self._edges(x, edge_index)
        source, target = edges.unbind(0)
        projected = self.lin(x).unflatten(1, (self.heads, self.out_features))
        from_source, from_target = ((projected * att).sum(2) for att in (self.att_src, self.att_dst))
        scores = leaky_relu(from_source[source] + from_target[target], self.negative_slope)
        alpha = _edge_softmax(scores, target, x.shape[0])
        weights = dropout(alpha, self.dropout, self.training)
        output = torch.zeros_like(projected).index_add(0, target, projected[source] * weights.unsqueeze(2))
        output = output.flatten(1) if self.concat else output.mean(1)
        if self.bias is not None:
            output = output + self.bias
        return (output, (edges, alpha)) if need_weights else output

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, heads={self.heads}, concat={self.concat}"
