"""Training DARA's factors, or adapters to compare with, on episodes of `mmlm data micl`."""
