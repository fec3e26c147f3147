"""The network 32-256-256-1 as a torch module, without MLflow: what a peer's user would write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def load_network(weights: str) -> torch.nn.Module:
    """Build the network around the weights that were exported from the registered model."""
    state = torch.load(weights, weights_only=True)
    layers: list[torch.nn.Module] = []
    for at in (0, 2, 4):
        width, features = state[f"{at}.weight"].shape
        layers += [torch.nn.Linear(features, width), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1])
    network.load_state_dict(state)
    return network.eval()


def score(network: torch.nn.Module, columns: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return one score a row from one array a feature."""
    x_NF = torch.from_numpy(np.column_stack(columns))
    with torch.inference_mode():
        return network(x_NF)[:, 0].numpy()
