"""Shipped presets, found by name: `mmlm generate --config decode/vhr`."""
