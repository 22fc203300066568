"""Bridges to programs that this project does not depend on."""
