"""Positions that leave a prompt: before the first layer, or between two layers."""
