"""Training of DyVTE's routers (arXiv 2411.19628): exact labels, and nothing but routers learns."""
