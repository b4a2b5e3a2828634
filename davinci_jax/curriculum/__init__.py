"""Stages joined to one timeline: which step has which batch, learning rate and mixture."""
