"""One small file per format."""
