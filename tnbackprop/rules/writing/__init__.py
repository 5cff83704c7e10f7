"""What rows are written with: accesses, legs, numbers, slopes at kinks."""
