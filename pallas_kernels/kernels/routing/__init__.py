"""Routing of tokens to experts."""

from pallas_kernels.kernels.routing.api import Routing, route
from pallas_kernels.kernels.routing.losses import balance, load_balancing_loss, mean_shares, router_z_loss

__all__ = ["Routing", "balance", "load_balancing_loss", "mean_shares", "route", "router_z_loss"]
