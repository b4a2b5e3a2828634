"""Routing of tokens to experts."""

from pallas_kernels.kernels.routing.api import Routing, route
from pallas_kernels.kernels.routing.losses import load_balancing_loss, router_z_loss

__all__ = ["Routing", "load_balancing_loss", "route", "router_z_loss"]
