"""MIA-DPO: multi-image preference pairs selected by attention (arXiv 2410.17637)."""
