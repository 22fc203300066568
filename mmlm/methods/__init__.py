"""Model-side methods: those that need weights or training, one file each."""
