"""Networks on graphs as the examples of PyTorch Geometric write them: from its layers, with heads of their own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric import nn as layers


class GraphClassifier(nn.Module):
    """Isomorphism layers, a sum over the nodes, and two layers: the example for MUTAG and similar data."""

    def __init__(self, inputs: int = 12, width: int = 32, classes: int = 3) -> None:
        super().__init__()
        widths = [inputs, width, width]
        self.convs = nn.ModuleList(layers.GINConv(layers.MLP([size, width, width]), train_eps=True) for size in widths)
        self.lin1 = nn.Linear(width, width)
        self.lin2 = nn.Linear(width, classes)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Return the logits of the classes of one graph."""
        for conv in self.convs:
            x = conv(x, edge_index).relu()
        out: Tensor = self.lin2(self.lin1(x.sum(0, keepdim=True)).relu())
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return torch.randn(9, 12), torch.randint(0, 9, (2, 20))


class RelationalNetwork(nn.Module):
    """Two relational layers on nodes without features: the example for AIFB."""

    def __init__(self, nodes: int = 20, width: int = 16, classes: int = 4, relations: int = 6) -> None:
        super().__init__()
        self.conv1 = layers.RGCNConv(nodes, width, relations, num_bases=5)
        self.conv2 = layers.RGCNConv(width, classes, relations, num_bases=5)

    def forward(self, edge_index: Tensor, edge_type: Tensor) -> Tensor:
        """Return the logits of all nodes."""
        out: Tensor = self.conv2(self.conv1(None, edge_index, edge_type).relu(), edge_index, edge_type)
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return torch.randint(0, 20, (2, 40)), torch.randint(0, 6, (40,))


class HeterogeneousTransformer(nn.Module):
    """Layers of HGT between two kinds of nodes, and a linear head: the example for DBLP."""

    def __init__(self, width: int = 32, classes: int = 4, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        nodes, edges = ["author", "paper"], [("author", "writes", "paper"), ("paper", "written_by", "author")]
        self.lin_dict = nn.ModuleDict({kind: layers.Linear(10, width) for kind in nodes})
        self.convs = nn.ModuleList(layers.HGTConv(width, width, (nodes, edges), heads) for _ in range(depth))
        self.lin = layers.Linear(width, classes)

    def forward(self, x: dict[str, Tensor], edges: dict[Any, Tensor]) -> Tensor:
        """Return the logits of the authors."""
        x = {kind: self.lin_dict[kind](states).relu() for kind, states in x.items()}
        for conv in self.convs:
            x = conv(x, edges)
        out: Tensor = self.lin(x["author"])
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        edges = torch.randint(0, 5, (2, 12))
        kinds = (("author", "writes", "paper"), ("paper", "written_by", "author"))
        return {kind: torch.randn(5, 10) for kind in ("author", "paper")}, dict.fromkeys(kinds, edges)


class GraphTransformer(nn.Module):
    """GPS layers on molecules, whose atoms and bonds have embeddings: the example for ZINC."""

    def __init__(self, width: int = 32, encoding: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.node_emb = nn.Embedding(28, width - encoding)
        self.pe_lin = nn.Linear(20, encoding)
        self.pe_norm = nn.BatchNorm1d(20)
        self.edge_emb = nn.Embedding(4, width)
        self.convs = nn.ModuleList()
        for _ in range(depth):
            inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            self.convs.append(layers.GPSConv(width, layers.GINEConv(inner), heads=4))
        self.mlp = nn.Sequential(
            nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, width // 4), nn.ReLU(), nn.Linear(8, 1)
        )

    def forward(self, x: Tensor, pe: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        """Return a number for one molecule."""
        x = torch.cat((self.node_emb(x), self.pe_lin(self.pe_norm(pe))), 1)
        for conv in self.convs:
            x = conv(x, edge_index, edge_attr=self.edge_emb(edge_attr))
        out: Tensor = self.mlp(x.sum(0, keepdim=True))
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return torch.randint(0, 28, (9,)), torch.randn(9, 20), torch.randint(0, 9, (2, 20)), torch.randint(0, 4, (20,))


class LinkPredictor(nn.Module):
    """Autoencoder of a graph: the inner products of what the encoder gives are the output."""

    def __init__(self, inputs: int = 12, width: int = 32, latent: int = 16) -> None:
        super().__init__()
        self.conv1 = layers.GCNConv(inputs, width)
        self.conv_mu = layers.GCNConv(width, latent)
        self.conv_logstd = layers.GCNConv(width, latent)

    def forward(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and logarithms of deviations."""
        x = self.conv1(x, edge_index).relu()
        return self.conv_mu(x, edge_index), self.conv_logstd(x, edge_index)

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return torch.randn(9, 12), torch.randint(0, 9, (2, 20))
