"""Published preference formats in, the columns of training programs out."""
