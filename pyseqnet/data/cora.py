"""Cora: 2708 papers, the words they use, who cites whom, their field (Sen et al., 2008; split of Yang et al., 2016)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyseqnet.data import find

ORIGIN = "https://github.com/kimiyoung/planetoid, as one .npz (sparse rows, edges, split)"


@dataclass(frozen=True)
class Graph:
    """Nodes (N, features) with rows that sum to 1, labels (N,), edges (2, E) both ways, the nodes of each part."""

    nodes: Tensor
    labels: Tensor
    edges: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor
    classes: int


def graph() -> Graph:
    with np.load(find("planetoid/cora.npz", origin=ORIGIN), allow_pickle=False) as file:
        rows, columns = (int(size) for size in file["x_shape"])
        nodes = torch.zeros(rows, columns)
        places = torch.from_numpy(np.repeat(np.arange(rows), np.diff(file["x_indptr"])))
        nodes[places, torch.from_numpy(file["x_indices"]).long()] = torch.from_numpy(file["x_data"])
        one_way = torch.from_numpy(file["edges"]).long().t()
        labels = torch.from_numpy(file["y"]).long()
        train, validation, test = (torch.from_numpy(file[name]) for name in ("train", "val", "test"))
    nodes = nodes / nodes.sum(1, keepdim=True).clamp_min(1)
    edges = torch.cat([one_way, one_way.flip(0)], 1)
    return Graph(nodes, labels, edges, train, validation, test, int(labels.max()) + 1)
